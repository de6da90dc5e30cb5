"""What is offered next, and what is concluded: against a simulated server, in simulated time."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from edge_runtime.client.load import campaign
from edge_runtime.client.load.campaign import Campaign, Plan, Report
from edge_runtime.client.load.statistics import (
    ANSWERED,
    OUTCOME_OF_CODE,
    Observations,
)
from edge_runtime.errors import ModelError

OVERLOADED = OUTCOME_OF_CODE["overloaded"]
DELAY_NS = 50_000  # of the way there and back


class Simulated:
    """One model, one queue: `run_ms` each; a refusal costs `refusal_ms` of the model's time.

    `sulk_s`: after a refusal it runs nothing for so long, as a server that recovers slowly.
    `late_until`: the generator is late in so many loads.
    """

    def __init__(
        self,
        run_ms: float,
        queue: int,
        *,
        refusal_ms: float = 0.0,
        sulk_s: float = 0.0,
        interrupt_at: int = 0,
        late_until: int = 0,
    ) -> None:
        self._run_ns, self._queue = round(run_ms * 1e6), queue
        self._refusal_ns, self._sulk_ns = round(refusal_ms * 1e6), round(sulk_s * 1e9)
        self._interrupt_at = interrupt_at
        self._late_until = late_until
        self.calls: list[tuple[str, float]] = []

    def open_loop(self, due_ns: Any, end_ns: int, deadline_s: float) -> Observations:
        self.calls.append(("open", len(due_ns) / end_ns * 1e9))
        waiting: deque[int] = deque()  # when each that waits will be done
        free_ns = sulk_until_ns = 0
        outcome = np.full(len(due_ns), ANSWERED, np.uint8)
        answered = np.empty(len(due_ns), np.int64)
        for index, now_ns in enumerate(due_ns.tolist()):
            while waiting and waiting[0] <= now_ns:
                waiting.popleft()
            if len(waiting) > self._queue:
                outcome[index] = OVERLOADED
                answered[index] = now_ns + DELAY_NS
                free_ns += self._refusal_ns
                sulk_until_ns = now_ns + self._sulk_ns
                continue
            free_ns = max(free_ns, now_ns, sulk_until_ns) + self._run_ns
            waiting.append(free_ns)
            answered[index] = free_ns + DELAY_NS
        return self._seen(due_ns, answered, outcome, end_ns)

    def closed_loop(self, in_flight: int, duration_s: float, deadline_s: float) -> Observations:
        self.calls.append(("closed", in_flight))
        due = np.arange(int(duration_s * 1e9 / self._run_ns), dtype=np.int64) * self._run_ns
        answered = due + self._run_ns * min(in_flight, self._queue) + DELAY_NS
        outcome = np.full(len(due), ANSWERED, np.uint8)
        return self._seen(due, answered, outcome, round(duration_s * 1e9))

    def _seen(self, due: Any, answered: Any, outcome: Any, end_ns: int) -> Observations:
        interrupted = len(self.calls) == self._interrupt_at
        lag_ns = 50_000_000 if len(self.calls) <= self._late_until else 0
        return Observations(due, due + lag_ns, answered + lag_ns, outcome, end_ns, 0.1, interrupted)


def run(source: Simulated, **plan: Any) -> Report:
    return Campaign(source, Plan(**{"factors": (1.0, 2.0, 5.0), **plan}), lambda _: None).run()


def test_a_good_server_keeps_its_peak_and_is_itself_again_at_once() -> None:
    report = run(Simulated(2, 64))
    assert report.peak is not None
    assert report.peak.goodput_per_s == pytest.approx(500, rel=0.05)
    assert [one.name for one in report.loads] == ["1x", "2x", "5x"]
    for load in report.loads:
        factor = float(load.name[:-1])
        assert load.offered_per_s == pytest.approx(factor * report.peak.goodput_per_s, rel=0.1)
        assert load.accounted == load.sent
    worst = report.loads[-1]
    assert worst.goodput_per_s == pytest.approx(report.peak.goodput_per_s, rel=0.05)
    assert sum(worst.refused.values()) == pytest.approx(worst.sent * 4 / 5, rel=0.05)
    # A full queue of 64 is 128 ms of work; half of the time is left for it.
    assert worst.recovery_s is not None and 0.1 < worst.recovery_s < 0.3
    assert report.loads[0].recovery_watched_s == 0


def test_a_server_that_spends_its_time_on_refusals_is_seen_to() -> None:
    worst = run(Simulated(2, 64, refusal_ms=1.0)).loads[-1]
    assert worst.goodput_per_s < 250
    assert worst.latency_ms.p99 is not None and worst.latency_ms.p99 > 120


def test_a_server_that_does_not_recover_is_seen_to() -> None:
    worst = run(Simulated(2, 64, sulk_s=60)).loads[-1]
    assert worst.recovery_s is None and worst.recovery_watched_s == campaign.RECOVERY_S


@pytest.mark.parametrize(("late_until", "calms"), [(0, 1), (3, 1), (4, 2), (9, 3)])
def test_a_calm_that_the_generator_disturbed_is_measured_again(late_until: int, calms: int) -> None:
    """Three steps of the peak come first."""
    source = Simulated(2, 64, late_until=late_until)
    report = run(source, factors=(1.0,))
    assert len(source.calls) == 3 + calms + 1
    assert report.calm is not None and report.calm.generator_lagged == (late_until == 9)


def test_the_deadline_decides_what_is_goodput() -> None:
    """A full queue is 128 ms of waiting."""
    patient = run(Simulated(2, 64), deadline_ms=200.0).loads[-1]
    hurried = run(Simulated(2, 64), deadline_ms=100.0).loads[-1]
    assert patient.late == 0 < hurried.late
    assert hurried.goodput_per_s < 0.2 * patient.goodput_per_s


def test_given_rates_and_concurrencies_need_no_peak() -> None:
    source = Simulated(2, 64)
    report = run(source, factors=(), rates_per_s=(100.0, 2000.0), in_flight=(1, 16))
    assert report.peak is report.calm is None
    assert [kind for kind, _ in source.calls] == ["closed", "closed", "open", "open"]
    assert [one.name for one in report.loads] == [
        "1 in flight",
        "16 in flight",
        "100/s",
        "2000/s",
    ]
    assert [one.open_loop for one in report.loads] == [False, False, True, True]


def test_a_multiple_beyond_what_can_be_sent_is_named_as_what_it_is() -> None:
    report = run(Simulated(0.02, 64), factors=(10.0,), duration_s=0.5)
    assert report.loads[0].name == "4x"  # 200,000 of 50,000 a second


@pytest.mark.parametrize(("at", "loads"), [(1, 0), (4, 0), (5, 1), (6, 2)])
def test_after_an_interrupt_there_is_what_was_measured(at: int, loads: int) -> None:
    """Three steps of the peak, the calm, then the loads."""
    source = Simulated(2, 64, interrupt_at=at)
    report = run(source)
    assert report.interrupted and len(source.calls) == at
    assert report.peak is not None and len(report.loads) == loads
    assert (report.calm is None) == (at < 4)


def test_a_model_that_answers_nothing_in_time_has_no_peak() -> None:
    with pytest.raises(ModelError, match="--deadline"):
        run(Simulated(2, 64), deadline_ms=1.0)
