"""The slope and its interval."""

from __future__ import annotations

import random

import pytest

from bench.reload import slope
from bench.summary import Figure, Spread, Target


def test_a_line_has_its_slope_and_no_doubt() -> None:
    per_thousand, margin = slope([5 + 0.25 * step for step in range(100)])
    assert per_thousand == pytest.approx(250)
    assert margin == pytest.approx(0, abs=1e-6)


def test_a_constant_has_no_slope() -> None:
    assert slope([7.0] * 50) == (0.0, 0.0)


def test_noise_has_a_slope_that_is_not_told_from_none_most_of_the_time() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(400):
        per_thousand, margin = slope([rng.gauss(20, 1) for _ in range(100)])
        found += per_thousand - margin > 0
    assert found / 400 < 0.06  # one side of a 95 % interval: 2.5 %, and chance


def test_a_creep_is_found_in_noise() -> None:
    rng = random.Random(1)
    per_thousand, margin = slope([rng.gauss(20, 1) + 0.03 * step for step in range(200)])
    assert per_thousand - margin > 0


def test_a_wandering_series_is_not_taken_for_a_creep_too_often() -> None:
    rng = random.Random(2)
    found = 0
    for _ in range(200):
        value, values = 0.0, []
        for _ in range(150):
            value = 0.8 * value + rng.gauss(0, 1)  # neighbours resemble each other
            values.append(value)
        per_thousand, margin = slope(values)
        found += per_thousand - margin > 0
    assert found / 200 < 0.1


def test_a_target_may_be_on_the_low_end_of_an_interval() -> None:
    target = Target(0.0, of="low")
    assert Figure("f", Spread(1.0, -0.5, 2.5, 9), "x", target).met
    assert not Figure("f", Spread(1.0, 0.1, 1.9, 9), "x", target).met
