"""Samples that belong together: how much is known of a mean when they do.

Law of this file: arrays in, numbers out. Ten views of one photograph are hardly more than one
sample; an interval that counts ten is too sure. Without groups every sample is one of its own.

Sources: Liang & Zeger 1986, with G - 1 degrees of freedom and the factor G / (G - 1) that Cameron &
Miller advise (Journal of Human Resources 50, 2015); Korn & Graubard 1998 (Survey Methodology 24:
effective sample size for shares); Student 1908; Hall 1992 (Journal of the Royal Statistical Society
B 54: a transformation that removes skew).
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# With more degrees of freedom Student's quantile is the normal one to four digits.
NORMAL_FROM = 2000
SKEW_MIN = 1e-6  # below it the correction is rounding
# Three groups with a loss say little of how the samples of a group go together; so much of a group
# all of which goes together is added to what they say. With it a bound of 95 % held in 90 to 100 of
# 100 simulated sets of 20 to 200 groups of ten, losses of 1 to 6 %, correlations of up to 0.3 in a
# group; without it in 85 to 100, without groups in 71 to 100.
PRIOR_GROUPS = 0.5


class Sums(NamedTuple):
    """Of each group: the sum of its values and how many there are."""

    values: Array
    counts: Array

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.counts.sum())


def count(groups: Array) -> int:
    """How many groups there are."""
    return len(np.unique(groups))


def sums(values: Array, groups: Array | None) -> Sums:
    """By group; groups [samples] are any integers, None: each sample is its own."""
    if groups is None:
        return Sums(values, np.ones(len(values)))
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    return Sums(np.bincount(codes, weights=values), np.bincount(codes).astype(np.float64))


def standard_error(values: Array, groups: Array | None = None) -> float:
    """Of the mean of values [samples], whatever happens inside a group. Infinite for one group."""
    by_group = sums(values, groups)
    if len(by_group.values) < 2:
        return math.inf
    rest = by_group.values - by_group.mean * by_group.counts
    factor = len(rest) / (len(rest) - 1)
    return math.sqrt(factor * float((rest**2).sum())) / len(values)


def mean_bound(
    values: Array, groups: Array | None, quantile: float, *, is_skew: bool = True
) -> float:
    """The mean of values [samples] at this quantile of doubt, over groups.

    Student's bound, or if values may be skew the farther of that and Hall's: of losses most
    of which are small and few are large, Student's 95 % held in 81 to 94 of 100 simulated sets of
    20 to 500, this one in 89 to 97.
    """
    by_group = sums(values, groups)
    number = len(by_group.values)
    if number < 2:
        return math.copysign(math.inf, quantile - 0.5)
    rest = by_group.values - by_group.mean * by_group.counts
    t = student(quantile, number - 1)
    if is_skew:
        t = (max if quantile > 0.5 else min)(t, _hall(t, rest))
    return by_group.mean + standard_error(values, groups) * t


def _hall(t: float, rest: Array) -> float:
    """Student's t as it is where values are as skew as these, of mean 0."""
    number, variance = len(rest), float((rest**2).mean())
    skew = float((rest**3).mean()) / variance**1.5 if variance > 0 else 0.0
    if abs(skew) < SKEW_MIN:
        return t
    root = math.sqrt(number)
    return root * 3 / skew * (1 - math.cbrt(1 - skew * (t / root + skew / (6 * number))))


def effective(values: Array, groups: Array, quantile: float) -> float:
    """How many independent samples know as much of the mean of values [samples] as these do.

    Korn and Graubard's: fewer by the ratio of the variances with and without groups, and by what
    few groups know of that ratio. The ratio is drawn towards that of groups all of whose samples go
    together (Kish 1965), the more the fewer groups have a value that is not the usual one. Where
    all values are alike it is taken as if one sample were not: nothing lost may not prove less than
    one loss. So it is too sure where all of a group is lost together and none was seen.
    """
    total, number = len(values), count(groups)
    sizes = sums(values, groups).counts
    most = float((sizes**2).sum()) / total
    alone = standard_error(values)
    ratio = (standard_error(values, groups) / alone) ** 2 if alone else 1.0
    odd = max(count(groups[values != _usual(values)]), 1)
    ratio = max((odd * ratio + PRIOR_GROUPS * most) / (odd + PRIOR_GROUPS), 1.0)
    doubt = (student(quantile, total - 1) / student(quantile, max(number - 1, 1))) ** 2
    return max(total / ratio * doubt, 1.0)


def _usual(values: Array) -> float:
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


@functools.cache
def student(quantile: float, degrees: int) -> float:
    """The quantile of Student's distribution, by halving; quantile in (0, 1), degrees >= 1."""
    assert 0 < quantile < 1 and degrees >= 1
    if degrees >= NORMAL_FROM:
        return NormalDist().inv_cdf(quantile)
    if quantile < 0.5:
        return -student(1 - quantile, degrees)
    low, high = 0.0, 1.0
    while _within(high, degrees) < 2 * quantile - 1:
        low, high = high, high * 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 2 * quantile - 1 else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """Probability of -t to t (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    is_odd = degrees % 2
    term = total = math.cos(angle) if is_odd else 1.0
    for index in range(3 if is_odd else 2, degrees - 1, 2):
        term *= square * (index - 1) / index
        total += term
    if is_odd:
        inner = math.sin(angle) * total if degrees > 1 else 0.0
        return 2 / math.pi * (angle + inner)
    return math.sin(angle) * total
