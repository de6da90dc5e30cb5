"""When requests are due."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.client.load import schedule
from edge_runtime.client.load.schedule import Segment
from edge_runtime.errors import UsageError

SEGMENTS = st.lists(
    st.builds(Segment, st.floats(0.5, 5000), st.floats(0.01, 2)), min_size=1, max_size=4
)


@given(SEGMENTS, st.sampled_from(sorted(schedule.ARRIVALS)), st.integers(0, 2**32))
def test_arrivals_ascend_and_stay_in_their_segment(
    segments: list[Segment], arrivals: str, seed: int
) -> None:
    made = schedule.make(segments, arrivals, np.random.default_rng(seed))
    assert made.due_ns.dtype == np.int64
    assert (np.diff(made.due_ns) >= 0).all()
    for index, segment in enumerate(segments):
        begin_ns, end_ns = made.bounds_ns(index)
        assert end_ns - begin_ns == round(segment.duration_s * 1e9)
        inside = ((made.due_ns >= begin_ns) & (made.due_ns < end_ns)).sum()
        wanted = segment.rate_per_s * segment.duration_s
        if arrivals == "uniform":
            assert abs(inside - wanted) <= 1
        else:
            assert abs(inside - wanted) <= 8 * wanted**0.5 + 8
    assert made.due_ns.size == 0 or 0 <= made.due_ns[0] <= made.due_ns[-1] < made.ends_ns[-1]


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_others() -> None:
    first, again, other = (
        schedule.make([Segment(100, 1)], "poisson", np.random.default_rng(seed)).due_ns
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_arrivals_have_the_gaps_of_independent_clients() -> None:
    """Exponential gaps: standard deviation as large as the mean; 1/e of them over the mean."""
    due = schedule.make([Segment(10_000, 10)], "poisson", np.random.default_rng(3)).due_ns
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.03)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.01)


@pytest.mark.parametrize(
    "segment",
    [
        Segment(0, 1),
        Segment(-1, 1),
        Segment(float("nan"), 1),
        Segment(schedule.RATE_MAX * 1.01, 1),
        Segment(1, 0),
        Segment(1, schedule.DURATION_S_MAX + 1),
        Segment(schedule.RATE_MAX, 11),
    ],
)
def test_what_is_over_a_limit_is_refused_by_name(segment: Segment) -> None:
    with pytest.raises(UsageError, match="expected"):
        schedule.make([segment], "poisson", np.random.default_rng(0))


@given(st.floats(0.01, 1e9), st.floats(0.001, 1e6))
def test_a_bounded_segment_is_within_all_limits(rate_per_s: float, duration_s: float) -> None:
    segment = schedule.bounded(rate_per_s, duration_s)
    schedule.check(segment)
    assert segment.rate_per_s <= rate_per_s and segment.duration_s <= duration_s
