"""Which of several candidates are worth keeping: those that nothing beats in everything.

Law of this file: pure; numbers in, choice out. Every coordinate is a cost, less is better. The
order of the input breaks ties, so that the same candidates give the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence

Costs = tuple[float, ...]


def dominates(one: Costs, other: Costs) -> bool:
    """Nowhere worse and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def front(points: Sequence[Costs]) -> list[int]:
    """Indices of the points that none dominates; of equals the first."""
    return [
        index
        for index, point in enumerate(points)
        if point not in points[:index] and not any(dominates(other, point) for other in points)
    ]


def thinned(points: Sequence[Costs], margins: Costs) -> list[int]:
    """The front without what another member makes up for to within the margins.

    Args:
        margins: per coordinate the relative difference that means nothing (0.03: 3 %).

    The cheapest by each coordinate in turn is looked at first, so that each best one stays.
    """
    kept: list[int] = []
    for index in by_turns(points, front(points)):
        if not any(_makes_up(points[other], points[index], margins) for other in kept):
            kept.append(index)
    return sorted(kept)


def by_turns(points: Sequence[Costs], among: Sequence[int]) -> list[int]:
    """All of `among`: the best by the first coordinate, by the second, ..., then second bests."""
    if not among:
        return []
    ranked = [
        sorted(among, key=lambda index: (points[index][axis], points[index], index))
        for axis in range(len(points[among[0]]))
    ]
    order = [index for same_rank in zip(*ranked, strict=True) for index in same_rank]
    return list(dict.fromkeys(order))


def _makes_up(one: Costs, other: Costs, margins: Costs) -> bool:
    return all(a <= b + abs(b) * m for a, b, m in zip(one, other, margins, strict=True))
