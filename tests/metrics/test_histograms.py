"""Buckets, quantiles, merging: the arithmetic of durations, and the words that hold them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import metrics
from edge_runtime.serving import page

# Up to 9 hours: beyond what the buckets tell apart.
durations = st.one_of(
    st.integers(0, 1 << 45),
    st.integers(0, 45).flatmap(lambda bits: st.integers(max((1 << bits) - 2, 0), (1 << bits) + 2)),
)
# What the buckets tell apart.
measurable = st.floats(10, 37, exclude_max=True).map(lambda bits: int(2**bits))


def words() -> memoryview:
    return memoryview(bytearray(page.PAGE_SIZE)).cast("Q")


def histogram(values: list[int]) -> list[int]:
    """As a worker makes it."""
    status = words()
    for value in values:
        page.observe(status, page.REQUEST, value)
    return status[page.REQUEST : page.REQUEST + metrics.WORDS].tolist()


@given(durations)
def test_a_duration_is_within_the_borders_of_its_bucket(value_ns: int) -> None:
    index = metrics.bucket(value_ns)
    assert metrics.lower_ns(index) <= value_ns
    assert index == metrics.BUCKETS - 1 or value_ns < metrics.lower_ns(index + 1)


def test_buckets_follow_each_other_and_none_is_wider_than_an_eighth() -> None:
    borders = [metrics.lower_ns(index) for index in range(metrics.BUCKETS)]
    assert [metrics.bucket(border) for border in borders] == list(range(metrics.BUCKETS))
    assert borders[1] == 1024 and borders[-1] == 1 << 37
    assert all(8 * (above - below) <= below for below, above in pairwise(borders[1:]))


@given(st.lists(durations, max_size=50))
def test_a_worker_counts_in_the_same_buckets_and_sums_exactly(values: list[int]) -> None:
    counted = histogram(values)
    expected = [0] * metrics.BUCKETS
    for value in values:
        expected[metrics.bucket(value)] += 1
    assert counted == [sum(values), *expected]
    assert metrics.count(counted) == len(values)


def test_the_quick_way_ends_where_the_exact_one_begins() -> None:
    edge = page._NARROW_NS_MAX
    values = [*range(0, 5000, 7), *range(edge - 3, edge + 3), edge * 2]
    for value in values:
        counted = histogram([value])
        assert counted[1 + metrics.bucket(value)] == 1, value


@given(
    st.lists(measurable, min_size=1, max_size=200),
    st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]), st.floats(0, 1)),
)
def test_a_quantile_is_within_a_sixteenth_of_the_true_one(values: list[int], share: float) -> None:
    rank = max(math.ceil(share * len(values)), 1)
    true_ns = sorted(values)[rank - 1]
    found_s = metrics.quantile_s(histogram(values), share)
    assert found_s is not None
    assert abs(found_s * 1e9 - true_ns) <= true_ns / 16 + 1


def test_nothing_has_no_quantile_and_what_is_off_the_scale_is_at_its_border() -> None:
    assert metrics.quantile_s(histogram([]), 0.5) is None
    assert metrics.quantile_s(histogram([10]), 0.5) == pytest.approx(512e-9)
    assert metrics.quantile_s(histogram([1 << 44]), 0.5) == pytest.approx((1 << 37) / 1e9)


@given(st.lists(durations, max_size=30), st.lists(durations, max_size=30))
def test_pages_added_up_are_one_page_that_saw_it_all(ours: list[int], theirs: list[int]) -> None:
    first, second, both = words(), words(), words()
    for status, values in ((first, ours), (second, theirs), (both, ours + theirs)):
        for value in values:
            page.observe(status, page.QUEUE, value)
            status[page.REQUESTS] += 1
    page.add(first, second)
    assert first.tolist() == both.tolist()


@given(st.lists(durations, max_size=30), st.lists(durations, min_size=1, max_size=30))
def test_the_time_between_two_looks_is_what_came_in_it(old: list[int], new: list[int]) -> None:
    before, now = histogram(old), histogram(old + new)
    assert metrics.since(now, before) == histogram(new)
    restarted = histogram(new)
    assert metrics.since(restarted, now) == (restarted if old else [0] * metrics.WORDS)


def test_what_is_about_now_is_not_added_up() -> None:
    total, status = words(), words()
    for word in range(page.END):
        status[word] = 1
    page.add(total, status)
    page.add(total, status)
    now = {page.CONNECTIONS, page.WAITING, page.LOOP_NS}
    now |= set(range(page.RUN_BEGAN, page.RUN_BEGAN + page.RUNNERS_MAX))
    assert all(total[word] == 0 for word in now)
    assert all(total[word] == 2 for word in page.COUNTERS)
    assert now.isdisjoint(page.COUNTERS) and len(set(page.COUNTERS)) == len(page.COUNTERS)


def test_a_page_of_garbage_is_added_up_without_an_error() -> None:
    total, garbage = words(), words()
    garbage.obj[:] = b"\xff" * page.PAGE_SIZE  # type: ignore[index]
    for _ in range(3):
        page.add(total, garbage)
    counted = total[page.REQUEST : page.REQUEST + metrics.WORDS].tolist()
    assert metrics.quantile_s(counted, 0.99) is not None
    assert "edge_queue_duration_seconds_count" in metrics.render(
        [metrics.Sample("edge_queue_duration_seconds", ("m", "1", "v", "b"), counted)]
    )


def test_histograms_lie_behind_everything_else_and_within_the_pages() -> None:
    begins = [page.REQUEST, page.QUEUE, page.COMPUTE, page.END]
    assert begins[0] >= page.RUN_BEGAN + page.RUNNERS_MAX
    assert all(b - a == metrics.WORDS for a, b in pairwise(begins))
    assert page.END * 8 <= page.PAGE_SIZE
