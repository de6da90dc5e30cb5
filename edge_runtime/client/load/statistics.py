"""What came of a load: counts, rates, distributions, recovery.

Law of this file: values in, values out; no socket and no clock. Every request of a load has exactly
one outcome, so the counts add up: offered = sent + unsent, and sent = good + late + refused +
expired + errors + unanswered.

All latencies count from the moment a request was due, not from when it could be sent: a server that
does not read makes its clients wait, and that wait is part of its latency ("coordinated omission"
is the error of leaving it out).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime import errors

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Outcomes of a request, by number: four of ours, then the protocol's error codes.
NOT_OFFERED, UNSENT, UNANSWERED, ANSWERED = range(4)
CODES = tuple(errors.BY_CODE)
FIRST_CODE = 4
OUTCOME_OF_CODE = {code: FIRST_CODE + index for index, code in enumerate(CODES)}
# A refusal is an answer to "may I now?": nothing is broken and nothing was run.
REFUSALS = frozenset({"overloaded", "throttled", "unavailable"})
EXPIRED = "deadline_exceeded"

# Shares of the requests at which the latency curve is drawn.
CURVE = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0)

# The generator sends this late (p99) without a remark. Half of the 10 ms in which a refusal is
# expected: beyond it, a figure says as much about the generator as about the server.
LAG_MS_P99_MAX = 5.0

# A window of the time after an overload: so many requests that its p99 is more than its maximum,
# but not longer than half of the second in which a server is expected to be itself again.
WINDOW_REQUESTS = 100
WINDOW_S_MIN, WINDOW_S_MAX = 0.05, 0.5
WINDOW_STEPS = 10  # windows overlap: the answer is a tenth of a window exact


class Observations(NamedTuple):
    """What a generator saw; arrays of one entry per request, ns from the beginning.

    `due_ns` ascends. `dispatched_ns` is when the generator got to it, -1: never. `answered_ns`
    is when its answer was read, -1: never. `elapsed_ns` is when the last request was due, or when
    it was interrupted.
    """

    due_ns: Array
    dispatched_ns: Array
    answered_ns: Array
    outcome: Array
    elapsed_ns: int
    cpu_share: float = 0.0
    interrupted: bool = False


class Quantiles(msgspec.Struct, frozen=True):
    """Of `count` values in ms; all None when there were none."""

    count: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


class Load(msgspec.Struct, frozen=True):
    """One row of the report.

    Attributes:
        name: "2x", "300/s" or "16 in flight".
        open_loop: requests came by schedule; false: each came when an answer made room.
        offered_per_s: what the schedule asked for; of a closed loop, what it came to.
        goodput_per_s: answers within the deadline that arrived during the load, per second.
        refused, errors: number of requests by error code.
        expired: the server said that the deadline had passed before the model ran.
        unsent: the server's sockets took nothing until the deadline, or until too many waited.
        unanswered: sent, and no answer came until a while after the deadline.
        latency_ms: of all answers, in time or late.
        refusal_ms: of all refusals.
        lag_ms: how late the generator got to its requests.
        generator_cpu: processor time of the generator per second.
        recovery_s: from the end of the load until the latency was that of the calm before it;
            None: not measured, or not seen within `recovery_watched_s`.
    """

    name: str
    open_loop: bool
    duration_s: float
    offered: int
    sent: int
    unsent: int
    good: int
    late: int
    refused: dict[str, int]
    expired: int
    errors: dict[str, int]
    unanswered: int
    offered_per_s: float
    sent_per_s: float
    goodput_per_s: float
    latency_ms: Quantiles
    refusal_ms: Quantiles
    lag_ms: Quantiles
    generator_cpu: float
    latency_curve_ms: tuple[tuple[float, float], ...] = ()
    recovery_s: float | None = None
    recovery_watched_s: float = 0.0

    @property
    def generator_lagged(self) -> bool:
        """Whether the figures say more about the generator than about the server."""
        return (self.lag_ms.p99 or 0.0) > LAG_MS_P99_MAX

    @property
    def accounted(self) -> int:
        """The sum of all outcomes of what was sent: `sent`, or we are wrong."""
        refused, failed = sum(self.refused.values()), sum(self.errors.values())
        return self.good + self.late + refused + self.expired + failed + self.unanswered


def quantile(ordered: Array, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return float(ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)])


def quantiles(values: Array) -> Quantiles:
    """Of values in any order."""
    if not len(values):
        return Quantiles(0)
    ordered = np.sort(values)
    picked = (round(quantile(ordered, share), 4) for share in (0.5, 0.9, 0.99, 0.999, 1.0))
    return Quantiles(len(ordered), *picked)


def load(
    seen: Observations,
    *,
    name: str,
    begin_ns: int,
    end_ns: int,
    deadline_ms: float,
    open_loop: bool = True,
) -> Load:
    """The row of the requests due from `begin_ns` to `end_ns` (less, if it was interrupted)."""
    end_ns = max(begin_ns + 1, min(end_ns, seen.elapsed_ns))
    first, last = np.searchsorted(seen.due_ns, [begin_ns, end_ns])
    due, outcome = seen.due_ns[first:last], seen.outcome[first:last]
    offered = outcome != NOT_OFFERED
    waited_ms = (seen.answered_ns[first:last] - due) / 1e6
    answered_ms = waited_ms[outcome == ANSWERED]
    counts = np.bincount(outcome, minlength=FIRST_CODE + len(CODES)).tolist()
    by_code = {code: counts[OUTCOME_OF_CODE[code]] for code in CODES}
    seconds = (end_ns - begin_ns) / 1e9
    sent = sum(counts[UNANSWERED:])
    good = int((answered_ms <= deadline_ms).sum())
    return Load(
        name=name,
        open_loop=open_loop,
        duration_s=round(seconds, 3),
        offered=int(offered.sum()),
        sent=sent,
        unsent=counts[UNSENT],
        good=good,
        late=len(answered_ms) - good,
        refused={code: n for code, n in by_code.items() if n and code in REFUSALS},
        expired=by_code[EXPIRED],
        errors={c: n for c, n in by_code.items() if n and c not in REFUSALS and c != EXPIRED},
        unanswered=counts[UNANSWERED],
        offered_per_s=round(int(offered.sum()) / seconds, 2),
        sent_per_s=round(sent / seconds, 2),
        goodput_per_s=round(_good_between(seen, begin_ns, end_ns, deadline_ms) / seconds, 2),
        latency_ms=quantiles(answered_ms),
        refusal_ms=quantiles(waited_ms[np.isin(outcome, _REFUSED)]),
        lag_ms=quantiles((seen.dispatched_ns[first:last] - due)[offered] / 1e6),
        generator_cpu=round(seen.cpu_share, 3),
        latency_curve_ms=curve(answered_ms),
    )


_REFUSED = [OUTCOME_OF_CODE[code] for code in sorted(REFUSALS)]


def _good_between(seen: Observations, begin_ns: int, end_ns: int, deadline_ms: float) -> int:
    """Answers in time by when they came: what waits at the end of a load is not its goodput."""
    came = (seen.answered_ns >= begin_ns) & (seen.answered_ns < end_ns)
    in_time = seen.answered_ns - seen.due_ns <= deadline_ms * 1e6
    return int((came & in_time & (seen.outcome == ANSWERED)).sum())


def curve(values_ms: Array) -> tuple[tuple[float, float], ...]:
    """(share, latency) points; without those that so few values cannot tell apart."""
    if not len(values_ms):
        return ()
    ordered = np.sort(values_ms)
    shares = [share for share in CURVE if share == 1.0 or (1 - share) * len(ordered) >= 1]
    return tuple((share, round(quantile(ordered, share), 4)) for share in shares)


def recovery_s(seen: Observations, begin_ns: int, end_ns: int, limit_ms: float) -> float | None:
    """From `begin_ns` until the first window in which all is well again; None: not until `end_ns`.

    Well is: every request due in the window was answered, 99 % of them within `limit_ms`.
    """
    end_ns = min(end_ns, seen.elapsed_ns)
    first, last = np.searchsorted(seen.due_ns, [begin_ns, end_ns])
    if first == last:
        return None
    window_ns = window_s(int(last - first), (end_ns - begin_ns) / 1e9) * 1e9
    answered = seen.outcome[first:last] == ANSWERED
    waited_ms = np.where(answered, (seen.answered_ns - seen.due_ns)[first:last] / 1e6, np.inf)
    due = seen.due_ns[first:last]
    for step in range(int((end_ns - begin_ns - window_ns) / window_ns * WINDOW_STEPS) + 1):
        at = begin_ns + step * window_ns / WINDOW_STEPS
        left, right = np.searchsorted(due, [at, at + window_ns])
        window = np.sort(waited_ms[left:right])
        if len(window) and quantile(window, 0.99) <= limit_ms and np.isfinite(window[-1]):
            return round(float(at - begin_ns) / 1e9, 4)
    return None


def window_s(count: int, duration_s: float) -> float:
    """How long a window of the time after an overload is, at `count` requests in `duration_s`."""
    wanted = WINDOW_REQUESTS / max(count / duration_s, 1e-9) if duration_s > 0 else WINDOW_S_MAX
    return min(max(wanted, WINDOW_S_MIN), WINDOW_S_MAX, max(duration_s, 1e-9))
