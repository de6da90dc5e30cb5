"""From samples to figures: medians, quartiles, ratios of rounds, and whether a target is met.

Law of this file: values in, values out; no clock, no process, no printing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Rounds = Mapping[str, Sequence[float]]  # peer -> one value per round, all of the same length


class Spread(NamedTuple):
    """The middle of some values and where half of them lie."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int


class Target(NamedTuple):
    """What a figure was promised to be: at most `value`, or at least it.

    `of` says which part of its spread: "low" for an interval that must reach the value.
    """

    value: float
    at_most: bool = True
    of: str = "median"

    def met(self, values: Spread) -> bool:
        value: float = getattr(values, self.of)
        return value <= self.value if self.at_most else value >= self.value


class Figure(NamedTuple):
    """One row of the report."""

    name: str
    spread: Spread
    unit: str
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None: nothing was promised."""
        return None if self.target is None else self.target.met(self.spread)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated linearly."""
    assert values and 0 <= share <= 1
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    return Spread(
        quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75), len(values)
    )


def per_round(rounds: Rounds, figure: Callable[[Mapping[str, float]], float]) -> Spread:
    """`figure` of each round's values, then the spread over rounds.

    A ratio is taken inside its round, because what disturbs a machine for a second disturbs both
    of its sides; a ratio of two medians would mix quiet rounds of one with loud ones of the other.
    """
    count = {len(values) for values in rounds.values()}
    assert len(count) == 1, "every peer has a value for every round"
    return spread(
        [figure({peer: values[i] for peer, values in rounds.items()}) for i in range(count.pop())]
    )
