"""What came of a load: the counts add up, and no figure flatters."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import errors
from edge_runtime.client.load import statistics
from edge_runtime.client.load.statistics import (
    ANSWERED,
    CODES,
    FIRST_CODE,
    NOT_OFFERED,
    OUTCOME_OF_CODE,
    UNANSWERED,
    UNSENT,
    Load,
    Observations,
)

SECOND = 1_000_000_000
REFUSED = OUTCOME_OF_CODE["overloaded"]
HAS_ANSWER = {ANSWERED, *OUTCOME_OF_CODE.values()}


def seen(
    rows: list[tuple[float, float, int]], elapsed_s: float = 1.0, lag_ms: float = 0.0
) -> Observations:
    """From (due in s, answered after ms, outcome)."""
    rows = sorted(rows)
    due = np.array([round(due_s * 1e9) for due_s, _, _ in rows], np.int64)
    outcome = np.array([row[2] for row in rows], np.uint8)
    took = np.array([round(row[1] * 1e6) for row in rows], np.int64)
    dispatched = np.where(outcome == NOT_OFFERED, -1, due + round(lag_ms * 1e6))
    answered = np.where(np.isin(outcome, list(HAS_ANSWER)), due + took, -1)
    return Observations(due, dispatched, answered, outcome, round(elapsed_s * 1e9))


def row(observations: Observations, **given_: Any) -> Load:
    options = {"name": "x", "begin_ns": 0, "end_ns": SECOND, "deadline_ms": 100.0, **given_}
    return statistics.load(observations, **options)


ROWS = st.lists(
    st.tuples(
        st.floats(0, 0.999),
        st.floats(0, 500),
        st.integers(NOT_OFFERED, FIRST_CODE + len(CODES) - 1),
    ),
    max_size=60,
)


@given(ROWS)
def test_every_request_has_one_outcome_and_the_counts_add_up(
    rows: list[tuple[float, float, int]],
) -> None:
    load = row(seen(rows))
    assert load.offered == load.sent + load.unsent
    assert load.accounted == load.sent
    assert load.offered == sum(outcome != NOT_OFFERED for *_, outcome in rows)
    assert load.latency_ms.count == load.good + load.late
    assert load.refusal_ms.count == sum(load.refused.values())
    assert set(load.refused) <= {"overloaded", "throttled", "unavailable"}
    assert "deadline_exceeded" not in load.errors
    assert load.goodput_per_s <= load.good  # in one second; what comes later is not counted
    msgspec.json.encode(load)


@given(ROWS, st.floats(0.1, 0.9))
def test_two_halves_of_a_load_are_the_whole(
    rows: list[tuple[float, float, int]], cut_s: float
) -> None:
    cut_ns, observations = round(cut_s * 1e9), seen(rows)
    halves = [row(observations, end_ns=cut_ns), row(observations, begin_ns=cut_ns)]
    whole = row(observations)
    for name in ("offered", "sent", "unsent", "good", "late", "expired", "unanswered"):
        assert sum(getattr(half, name) for half in halves) == getattr(whole, name)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_a_value_that_enough_others_do_not_exceed(
    values: list[float], share: float
) -> None:
    ordered = np.sort(np.array(values))
    found = statistics.quantile(ordered, share)
    assert found in values
    assert (ordered <= found).mean() >= share - 1e-9
    assert (ordered < found).mean() <= share + 1e-9


@given(st.lists(st.floats(0.001, 1e6), max_size=300))
def test_a_curve_ascends_to_the_maximum(values: list[float]) -> None:
    points = statistics.curve(np.array(values))
    assert [share for share, _ in points] == sorted({share for share, _ in points})
    assert [ms for _, ms in points] == sorted(ms for _, ms in points)
    assert not values or points[-1] == (1.0, pytest.approx(max(values), abs=1e-4))


def test_an_answer_after_the_deadline_is_late_and_no_goodput() -> None:
    load = row(seen([(0.1, 99, ANSWERED), (0.2, 101, ANSWERED)]))
    assert (load.good, load.late, load.goodput_per_s) == (1, 1, 1.0)
    assert load.latency_ms.max == pytest.approx(101)


def test_what_is_answered_after_the_load_is_in_time_but_not_its_goodput() -> None:
    """A queue that is full at the end of a load would make any server look faster than it is."""
    load = row(seen([(0.5, 50, ANSWERED), (0.99, 50, ANSWERED)], elapsed_s=2))
    assert (load.good, load.goodput_per_s) == (2, 1.0)


def test_outcomes_are_told_by_their_codes() -> None:
    codes = ["overloaded", "unavailable", "deadline_exceeded", "closed", "invalid_request"]
    rows = [(0.1, 1.0, OUTCOME_OF_CODE[code]) for code in codes]
    load = row(seen([*rows, (0.2, 0, UNANSWERED), (0.3, 0, UNSENT), (0.4, 0, NOT_OFFERED)]))
    assert load.refused == {"overloaded": 1, "unavailable": 1}
    assert load.errors == {"closed": 1, "invalid_request": 1}
    assert (load.expired, load.unanswered, load.unsent) == (1, 1, 1)
    assert (load.sent, load.offered) == (6, 7)
    assert load.refusal_ms.p50 == pytest.approx(1.0)


def test_all_codes_of_the_protocol_have_an_outcome() -> None:
    assert set(OUTCOME_OF_CODE) == set(errors.BY_CODE)
    assert max(OUTCOME_OF_CODE.values()) < 256  # kept in a byte


def test_a_late_generator_is_named() -> None:
    assert not row(seen([(0.1, 1, ANSWERED)], lag_ms=1)).generator_lagged
    assert row(seen([(0.1, 1, ANSWERED)], lag_ms=50)).generator_lagged


def test_an_interrupted_load_is_as_long_as_it_was() -> None:
    rows = [(n / 100, 1.0, ANSWERED if n < 50 else NOT_OFFERED) for n in range(100)]
    load = row(seen(rows, elapsed_s=0.5))
    assert (load.duration_s, load.offered, load.offered_per_s) == (0.5, 50, 100.0)


# --- recovery -----------------------------------------------------------------------------------


def after_overload(well_from_s: float, trouble: tuple[float, int]) -> Observations:
    """1000 requests/s for 2 s; until `well_from_s` each has this latency and outcome."""
    rows = [
        (n / 1000, *(trouble if n / 1000 < well_from_s else (1.0, ANSWERED))) for n in range(2000)
    ]
    return seen(rows, elapsed_s=2)


@pytest.mark.parametrize(
    "trouble", [(300.0, ANSWERED), (1.0, REFUSED), (0.0, UNSENT), (0.0, UNANSWERED)]
)
@pytest.mark.parametrize("well_from_s", [0.0, 0.25, 1.0])
def test_recovery_is_when_answers_are_quick_and_nothing_is_refused(
    well_from_s: float, trouble: tuple[float, int]
) -> None:
    observations = after_overload(well_from_s, trouble)
    found = statistics.recovery_s(observations, 0, 2 * SECOND, limit_ms=5)
    assert found == pytest.approx(well_from_s, abs=0.011)


def test_what_is_never_well_has_no_recovery() -> None:
    never = after_overload(9, (300.0, ANSWERED))
    assert statistics.recovery_s(never, 0, 2 * SECOND, limit_ms=5) is None
    assert statistics.recovery_s(seen([]), 0, 2 * SECOND, limit_ms=5) is None


@given(ROWS, st.floats(0.1, 100))
def test_recovery_is_within_what_was_watched(
    rows: list[tuple[float, float, int]], limit_ms: float
) -> None:
    found = statistics.recovery_s(seen(rows), 0, SECOND, limit_ms)
    assert found is None or 0 <= found <= 1
