"""The front: nothing on it is beaten, everything beside it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantize import pareto

COSTS = st.tuples(*[st.integers(0, 6).map(float)] * 3)
POINTS = st.lists(COSTS, max_size=20)


@given(POINTS)
def test_a_point_is_on_the_front_or_something_there_beats_or_equals_it(
    points: list[pareto.Costs],
) -> None:
    front = pareto.front(points)
    for index, point in enumerate(points):
        rivals = [points[other] for other in front if other != index]
        beaten = any(pareto.dominates(rival, point) or rival == point for rival in rivals)
        assert beaten != (index in front)


@given(POINTS, st.tuples(*[st.floats(0, 0.5)] * 3))
def test_thinning_keeps_something_as_good_to_within_the_margins_and_each_best(
    points: list[pareto.Costs], margins: pareto.Costs
) -> None:
    kept = [points[index] for index in pareto.thinned(points, margins)]
    assert set(kept) <= set(points)
    for point in points:
        assert any(
            all(a <= b * (1 + m) + 1e-9 for a, b, m in zip(one, point, margins, strict=True))
            for one in kept
        )


@given(POINTS)
def test_by_turns_begins_with_the_best_of_each_coordinate(points: list[pareto.Costs]) -> None:
    order = pareto.by_turns(points, range(len(points)))
    assert sorted(order) == list(range(len(points)))
    for axis in range(3) if points else ():
        best = min(point[axis] for point in points)
        assert any(points[index][axis] == best for index in order[:3])
