"""The arithmetic of the figures."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.summary import Figure, Target, per_round, quantile, spread

VALUES = st.lists(st.floats(min_value=-1e9, max_value=1e9), min_size=1, max_size=40)


@given(VALUES)
def test_the_middle_quantile_is_the_median(values: list[float]) -> None:
    assert quantile(values, 0.5) == pytest.approx(statistics.median(values))


@given(VALUES, st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_quantiles_stay_between_the_extremes_and_in_order(
    values: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert min(values) <= quantile(values, low) + 1e-6
    assert quantile(values, low) <= quantile(values, high) + 1e-6
    assert quantile(values, high) <= max(values) + 1e-6


def test_quartiles_are_interpolated() -> None:
    assert spread([4, 1, 3, 2]) == (2.5, 1.75, 3.25, 4)


def test_ratios_are_taken_inside_their_round() -> None:
    # The machine was ten times slower in the second round: the ratio is 2 in each.
    rounds = {"ours": [2.0, 20.0, 2.0], "theirs": [1.0, 10.0, 1.0]}
    assert per_round(rounds, lambda us: us["ours"] / us["theirs"]) == (2.0, 2.0, 2.0, 3)


def test_rounds_of_different_lengths_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        per_round({"a": [1.0], "b": [1.0, 2.0]}, lambda us: us["a"])


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (3.0, Target(3.0), True),
        (3.1, Target(3.0), False),
        (0.95, Target(0.95, at_most=False), True),
        (0.94, Target(0.95, at_most=False), False),
        (9.9, None, None),
    ],
)
def test_a_target_is_met_up_to_its_value(
    value: float, target: Target | None, met: bool | None
) -> None:
    assert Figure("f", spread([value]), "x", target).met is met
