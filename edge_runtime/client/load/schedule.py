"""When requests are due: segments of constant rate, and the arrivals inside them.

Law of this file: values in, values out; the random generator is an argument. An arrival is decided
before the first request is sent and never moved by an answer: that is what "open loop" means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Requests of one segment: each costs 26 bytes of records, so 52 MB; 12 s of the most that one
# process can send. A longer load is cut, and its row says how long it was.
REQUESTS_MAX = 2_000_000
# Requests per second: more than this generator can send (measured: 160,000 with a core of its own).
# Above it a schedule would only measure the generator.
RATE_MAX = 200_000.0
# Seconds of one load: what is not seen in ten minutes is the business of a soak test.
DURATION_S_MAX = 600.0


class Segment(NamedTuple):
    """A time of constant rate."""

    rate_per_s: float
    duration_s: float


class Schedule(NamedTuple):
    """`due_ns`: int64, ascending, from the beginning. `ends_ns`: the end of each segment."""

    due_ns: Array
    ends_ns: tuple[int, ...]

    def bounds_ns(self, index: int) -> tuple[int, int]:
        """Begin (inclusive) and end (exclusive) of a segment."""
        return (self.ends_ns[index - 1] if index else 0), self.ends_ns[index]


def poisson(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Array:
    """Arrivals in seconds, as from many clients that know nothing of each other.

    Given their number, the arrivals of a Poisson process are uniform and independent.
    """
    return np.sort(rng.random(rng.poisson(rate_per_s * duration_s)) * duration_s)


def uniform(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Array:
    """Arrivals in seconds at equal distances, as from one camera."""
    return np.arange(int(rate_per_s * duration_s)) / rate_per_s


ARRIVALS = {"poisson": poisson, "uniform": uniform}


def make(segments: Sequence[Segment], arrivals: str, rng: np.random.Generator) -> Schedule:
    """The segments one after the other.

    Raises:
        UsageError: a rate or duration that is not positive or over its limit, or too many requests.
    """
    times, ends_ns, begin_ns = [], [], 0
    for segment in segments:
        check(segment)
        end_ns = begin_ns + round(segment.duration_s * 1e9)
        due_s = ARRIVALS[arrivals](segment.rate_per_s, segment.duration_s, rng)
        # Rounding must not move an arrival into the next segment.
        times.append(np.minimum((due_s * 1e9).astype(np.int64) + begin_ns, end_ns - 1))
        ends_ns.append(end_ns)
        begin_ns = end_ns
    return Schedule(np.concatenate(times) if times else np.empty(0, np.int64), tuple(ends_ns))


def check(segment: Segment) -> None:
    """Raises UsageError, as `make`."""
    if not 0 < segment.rate_per_s <= RATE_MAX:
        raise UsageError(
            f"a load of {segment.rate_per_s:g} requests/s", expected=f"> 0 and <= {RATE_MAX:,.0f}"
        )
    if not 0 < segment.duration_s <= DURATION_S_MAX:
        raise UsageError(
            f"a load of {segment.duration_s:g} s", expected=f"> 0 and <= {DURATION_S_MAX:.0f} s"
        )
    if segment.rate_per_s * segment.duration_s > REQUESTS_MAX * (1 + 1e-9):  # rounding
        raise UsageError(
            f"{segment.rate_per_s:g} requests/s for {segment.duration_s:g} s",
            expected=f"<= {REQUESTS_MAX:,} requests",
            remedy="make it shorter",
        )


def bounded(rate_per_s: float, duration_s: float) -> Segment:
    """A segment cut to the limits: a slower rate, or a shorter time."""
    rate_per_s = min(rate_per_s, RATE_MAX)
    return Segment(rate_per_s, min(duration_s, DURATION_S_MAX, REQUESTS_MAX / rate_per_s))
