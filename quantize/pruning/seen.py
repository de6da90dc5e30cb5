"""What calibration samples make of the values that weights read, and what of it can be foretold.

Law of this file: pure; arrays in, numbers out. A channel that goes is replaced by what the channels
that stay say of it (a linear regression, on average exact): the weights that read those take it on.
So a channel costs only what no other channel knows. Source of the idea: He et al. 2017, "Channel
pruning for accelerating very deep neural networks"; the order of going is that of Hassibi and Stork
1992, "Optimal brain surgeon", for whole channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Shares of the average variance: against channels that are alike to the last bit, and, times
# channels / positions, against following noise where few samples were seen.
RIDGE, RIDGE_FEW = 1e-4, 0.03
# Channels of a value up to which one goes after the other, each cost anew: n^3 steps.
ANEW_MAX = 2048
# Positions of one batch that are looked at; pictures have more, and neighbours say the same.
POSITIONS_MAX = 4096


class Seen(NamedTuple):
    """Of a value [elements]; its axis has `block` elements a channel.

    Attributes:
        mean, square: of each element, and of its square. together: covariance of the channels
            [channels, channels], of all elements of a channel in one. ridge: what is added to its
            diagonal before it is inverted.
    """

    mean: Array
    square: Array
    together: Array
    ridge: float

    def foretold(self, left: Array, gone: Array, constant: bool) -> Array:
        """[gone, left]: how much of each channel that stays is in one that goes; beside a constant
        that a bias can add, or without."""
        products = self._products(constant)
        known = products[np.ix_(left, left)] + self.ridge * np.eye(len(left))
        return np.linalg.solve(known, products[np.ix_(left, gone)]).T

    def precision(self, constant: bool) -> Array:
        """1 / its diagonal is what of a channel no other one (and no constant) foretells."""
        products = self._products(constant)
        return np.linalg.inv(products + self.ridge * np.eye(len(products)))

    def _products(self, constant: bool) -> Array:
        means = self.mean.reshape(len(self.together), -1)
        return self.together if constant else self.together + means @ means.T / means.shape[1]


class Sums:
    """What was seen of a value so far."""

    def __init__(self, axis: int, block: int) -> None:
        self.axis, self.block = axis, block
        self._count = 0
        self._sums: Any = 0.0
        self._squares: Any = 0.0
        self._products: Any = 0.0

    def add(self, value: Array) -> None:
        """Another batch."""
        rows = np.moveaxis(value, self.axis, 0).reshape(value.shape[self.axis], -1)
        rows = rows[:, :: -(-rows.shape[1] // POSITIONS_MAX) | 1].astype(np.float64)
        channels = rows.reshape(len(rows) // self.block, -1)
        self._count += rows.shape[1]
        self._sums = self._sums + rows.sum(axis=1)
        self._squares = self._squares + np.square(rows).sum(axis=1)
        self._products = self._products + channels @ channels.T

    def seen(self) -> Seen:
        """All batches."""
        mean = self._sums / self._count
        by_channel = mean.reshape(-1, self.block)
        together = (self._products / self._count - by_channel @ by_channel.T) / self.block
        few = len(by_channel) / (self._count * self.block)
        ridge = (RIDGE + RIDGE_FEW * few) * float(np.diag(together).mean())
        return Seen(mean, self._squares / self._count, together, max(ridge, 1e-12))


class Read(NamedTuple):
    """How a reader takes a group.

    Attributes:
        norms: squared, of the weights that read each channel of its axis [channels]. own: which of
            these channels are the group's. constant: it has a bias.
    """

    seen: Seen
    norms: Array
    own: Array
    constant: bool


def going(readers: Sequence[Read]) -> Array:
    """Of each channel of a group what it costs when the cheapest always goes first: what no channel
    that is still there foretells, times the weights that read it; in shares of what the layer has.
    """
    precisions = [one.seen.precision(one.constant) for one in readers]
    shares = [one.norms[one.own] / _strength(one) for one in readers]
    anew = max(len(one) for one in precisions) <= ANEW_MAX
    count = len(readers[0].own)
    costs, left, worst = np.zeros(count), np.ones(count, bool), 0.0
    for turn in range(count):
        now = np.zeros(count)
        for one, precision, share in zip(readers, precisions, shares, strict=True):
            now += share / np.maximum(np.diag(precision)[one.own], TINY)
        if not anew:
            return np.sqrt(now)
        first = int(np.where(left, now, np.inf).argmin())
        worst = max(worst, float(now[first]))
        costs[first] = math.sqrt(worst) * (1 + TINY_STEP * turn)  # in the order of going
        left[first] = False
        for one, precision in zip(readers, precisions, strict=True):
            _forget(precision, int(one.own[first]))
    return costs


TINY, TINY_STEP = 1e-30, 1e-9


def _strength(one: Read) -> float:
    """What a channel adds to the reader, on the average of the group's."""
    return max(float((one.norms * np.diag(one.seen.together))[one.own].mean()), 1e-12)


def _forget(precision: Array, gone: int) -> None:
    """The precision of what is left without a channel; in place."""
    column = precision[:, gone].copy()
    precision -= np.outer(column, column) / max(float(column[gone]), TINY)
    precision[gone, gone] = 1.0
