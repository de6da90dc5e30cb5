"""Who is chosen: the share is kept, the choice stays, and a larger share takes nobody away."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving import routing

numbers = st.integers(0, (1 << 64) - 1)
shares = st.floats(0, 1)
SECOND_NS = 1_000_000_000


@given(numbers, numbers, shares, shares)
def test_raising_the_share_keeps_everybody_who_was_chosen(number, seed, one, other):
    low, high = sorted((one, other))
    if routing.mix(number, seed) < routing.limit_of(low):
        assert routing.mix(number, seed) < routing.limit_of(high)


@given(st.text(), numbers, shares, shares)
def test_so_does_the_choice_by_key(key, seed, one, other):
    low, high = sorted((one, other))
    if routing.mix_key(key, seed) < routing.limit_of(low):
        assert routing.mix_key(key, seed) < routing.limit_of(high)


@given(numbers, numbers, st.text())
def test_nobody_of_a_share_of_0_and_everybody_of_a_share_of_1(number, seed, key):
    for mixed in (routing.mix(number, seed), routing.mix_key(key, seed)):
        assert routing.limit_of(0) <= mixed < routing.limit_of(1)


@settings(deadline=None)
@given(st.integers(0, 1 << 40), numbers, st.floats(0.01, 0.99))
def test_consecutive_ids_are_chosen_as_often_as_the_share_says(first, seed, share):
    """Five standard deviations: one false alarm in a million examples."""
    count = 4000
    limit = routing.limit_of(share)
    chosen = sum(routing.mix(number, seed) < limit for number in range(first, first + count))
    assert abs(chosen - count * share) <= 5 * math.sqrt(count * share * (1 - share)) + 1


def test_a_pattern_in_the_traffic_is_not_one_in_the_sample():
    """Three cameras in turn and a share of a third: each is seen."""
    seed, limit = routing.seed_of("m", 2), routing.limit_of(1 / 3)
    by_camera = [0, 0, 0]
    for number in range(30_000):
        by_camera[number % 3] += routing.mix(number, seed) < limit
    assert all(3000 < count < 3700 for count in by_camera), by_camera


def test_the_choice_is_the_same_in_every_release():
    """Those who were routed to a candidate before an update of this program still are."""
    seed = routing.seed_of("fashion-mnist", 2)
    assert seed == 0xF9414EC310A213A8
    assert routing.mix(1, seed) == 0x9840315F6062846E
    assert routing.mix_key("camera-7", seed) == 0x594DF526A8D6E0B3


def test_another_candidate_gets_other_clients():
    limit = routing.limit_of(0.1)
    chosen = [
        {n for n in range(5000) if routing.mix(n, routing.seed_of("m", version)) < limit}
        for version in (2, 3)
    ]
    assert len(chosen[0] & chosen[1]) < 100  # 50 by chance


times = st.integers(0, 1 << 62)


@given(times, times, st.integers(0, 1 << 40))
def test_patience_ends_within_a_second_and_leaves_half_of_the_time(now_ns, left_ns, run_ns):
    deadline_ns = now_ns + left_ns
    until_ns = routing.patience_until_ns(now_ns, deadline_ns, run_ns)
    assert until_ns <= now_ns + SECOND_NS
    if deadline_ns:
        assert until_ns <= now_ns + left_ns // 2
        assert until_ns <= deadline_ns - 2 * run_ns


def test_without_a_deadline_the_candidate_has_a_second():
    assert routing.patience_until_ns(5, 0, 1e12) == 5 + SECOND_NS
