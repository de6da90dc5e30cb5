"""The order of the steps: calm, peak, loads, and the recovery after each overload.

Law of this file: it decides what is offered next from what was seen, and neither sends nor prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from edge_runtime.client.load import schedule, statistics
from edge_runtime.client.load.schedule import Segment
from edge_runtime.client.load.statistics import Load, Observations
from edge_runtime.errors import ModelError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# In flight while the peak is looked for: enough for runners and batches, fewer than the server's
# default queue of 256; small ones too, because a short queue refuses the large ones.
PEAK_IN_FLIGHT = (4, 16, 48)
# Of the peak: the load of the calm before and after an overload. Not 1.0: a full queue that gets
# exactly what it can serve stays full, and whatever the server does it never recovers. At half the
# peak a queue needs twice the time that its requests take.
CALM = 0.5
CALM_TRIES = 3
RECOVERY_S = 2.0  # watched after an overload: twice what a server should need
# The calm's p99 is a maximum of some hundred requests: "back" is within this factor, or this much.
RECOVERED_FACTOR, RECOVERED_MORE_MS = 2.0, 2.0
STEP_S_MIN, STEP_S_MAX = 0.3, 3.0  # of each peak step and of the calm


class Source(Protocol):
    """What makes the loads: a `generator.Generator`, or a simulation."""

    def open_loop(self, due_ns: Array, end_ns: int, deadline_s: float) -> Observations: ...

    def closed_loop(self, in_flight: int, duration_s: float, deadline_s: float) -> Observations: ...


class Plan(msgspec.Struct, frozen=True):
    """What to measure: one of the three lists is not empty.

    Attributes:
        factors: open loop, multiples of the measured peak.
        rates_per_s: open loop, given rates.
        in_flight: closed loop.
        duration_s: of each load.
        deadline_ms: of each request, from when it is due.
    """

    factors: tuple[float, ...] = ()
    rates_per_s: tuple[float, ...] = ()
    in_flight: tuple[int, ...] = ()
    duration_s: float = 5.0
    deadline_ms: float = 1000.0
    arrivals: str = "poisson"
    seed: int = 0


class Report(msgspec.Struct, frozen=True):
    """What was measured. `peak` and `calm` only when loads are multiples of the peak."""

    plan: Plan
    peak: Load | None
    calm: Load | None
    loads: tuple[Load, ...]
    interrupted: bool


class Campaign:
    """Runs a plan; `say` hears of each step before it begins."""

    def __init__(self, source: Source, plan: Plan, say: Callable[[str], None]) -> None:
        self._source = source
        self._plan = plan
        self._say = say
        self._rng = np.random.default_rng(plan.seed)
        self._step_s = min(max(plan.duration_s * 0.4, STEP_S_MIN), STEP_S_MAX)
        self._interrupted = False

    def run(self) -> Report:
        """All steps in order; after Ctrl-C what there is by then.

        Raises:
            ModelError: the model answered nothing in time, so that there is no peak.
        """
        peak = calm = None
        loads: list[Load] = []
        if self._plan.factors:
            peak = self._peak()
            if not self._interrupted:
                calm = self._calm(peak)
        for step in self._steps(peak, calm):
            if self._interrupted:
                break
            loads.append(step())
        return Report(self._plan, peak, calm, tuple(loads), self._interrupted)

    def _steps(self, peak: Load | None, calm: Load | None) -> Iterator[Callable[[], Load]]:
        for in_flight in self._plan.in_flight:
            yield lambda n=in_flight: self._closed(n, self._plan.duration_s)  # type: ignore[misc]
        for rate in self._plan.rates_per_s:
            yield lambda r=rate: self._open(f"{r:g}/s", r)[0]  # type: ignore[misc]
        if peak is not None and calm is not None:
            for factor in self._plan.factors:
                yield lambda f=factor: self._multiple(f, peak, calm)  # type: ignore[misc]

    def _peak(self) -> Load:
        found = []
        for in_flight in PEAK_IN_FLIGHT:
            if not self._interrupted:
                found.append(self._closed(in_flight, self._step_s))
        best = max(found, key=lambda one: one.goodput_per_s)
        if not best.goodput_per_s and not self._interrupted:
            raise ModelError(
                f"no answer within {self._plan.deadline_ms:g} ms in {self._step_s:g} s",
                expected="a model that answers within the deadline",
                remedy="give a longer --deadline, and a --duration of many answers",
            )
        return best

    def _calm(self, peak: Load) -> Load:
        """The calm, again when the generator was late in it: recovery is judged by its p99."""
        found: list[Load] = []
        while len(found) < CALM_TRIES and not self._interrupted:
            rate = CALM * peak.goodput_per_s
            found.append(self._open(f"{CALM:g}x", rate, duration_s=self._step_s)[0])
            if not found[-1].generator_lagged:
                return found[-1]
        return min(found, key=lambda one: one.latency_ms.p99 or float("inf"))

    def _multiple(self, factor: float, peak: Load, calm: Load) -> Load:
        """A load of a multiple of the peak; above 1x its end is watched."""
        rate = schedule.bounded(factor * peak.goodput_per_s, self._plan.duration_s).rate_per_s
        name = f"{rate / peak.goodput_per_s:.3g}x"  # less than was asked for, beyond RATE_MAX
        if factor <= 1:
            return self._open(name, rate)[0]
        after = schedule.bounded(CALM * peak.goodput_per_s, RECOVERY_S)
        row, seen, (begin_ns, end_ns) = self._open(name, rate, then=[after])
        before_ms = calm.latency_ms.p99 or 0.0
        limit_ms = max(before_ms * RECOVERED_FACTOR, before_ms + RECOVERED_MORE_MS)
        recovery_s = statistics.recovery_s(seen, begin_ns, end_ns, limit_ms)
        return msgspec.structs.replace(
            row, recovery_s=recovery_s, recovery_watched_s=after.duration_s
        )

    def _open(
        self,
        name: str,
        rate_per_s: float,
        *,
        duration_s: float | None = None,
        then: Sequence[Segment] = (),
    ) -> tuple[Load, Observations, tuple[int, int]]:
        """One open-loop load; with the bounds of what came `then`."""
        first = schedule.bounded(rate_per_s, duration_s or self._plan.duration_s)
        self._say(f"{name}: {first.rate_per_s:.0f} requests/s for {first.duration_s:.3g} s")
        plan = schedule.make([first, *then], self._plan.arrivals, self._rng)
        seen = self._source.open_loop(plan.due_ns, plan.ends_ns[-1], self._plan.deadline_ms / 1e3)
        self._interrupted |= seen.interrupted
        begin_ns, end_ns = plan.bounds_ns(0)
        row = statistics.load(
            seen,
            name=name,
            begin_ns=begin_ns,
            end_ns=end_ns,
            deadline_ms=self._plan.deadline_ms,
        )
        return row, seen, plan.bounds_ns(len(then))

    def _closed(self, in_flight: int, duration_s: float) -> Load:
        name = f"{in_flight} in flight"
        self._say(f"{name}, for {duration_s:.3g} s")
        seen = self._source.closed_loop(in_flight, duration_s, self._plan.deadline_ms / 1e3)
        self._interrupted |= seen.interrupted
        return statistics.load(
            seen,
            name=name,
            begin_ns=0,
            end_ns=seen.elapsed_ns,
            deadline_ms=self._plan.deadline_ms,
            open_loop=False,
        )
