"""From a histogram of activations to the range that a quantizer should keep.

Law of this file: counts in, ranges out. Source of the choice by error: the clipping that minimizes
the mean squared error of rounding plus clipping over the histogram (Banner et al. 2019, "Post
training 4-bit quantization of convolutional networks"), searched here and not in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

Values = Mapping[str, Array]  # of one run, by tensor

BINS = 2048
KEPT = 0.95  # of a moving average
STEPS = 60  # clippings tried per side: 1 % of the range each down to 40 %


class Histogram(NamedTuple):
    """Counts of equal bins from `low` to `high`; the range contains 0."""

    counts: Array
    low: float
    high: float

    @property
    def centres(self) -> Array:
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[1:] + edges[:-1]) / 2


def counted(before: Histogram | None, values: Array, low: float, high: float) -> Histogram:
    """The histogram with these values added."""
    high = high if high > low else low + 1e-6
    counts, _ = np.histogram(values, bins=BINS, range=(low, high))
    return Histogram(counts if before is None else before.counts + counts, low, high)


def histograms(runs: Callable[[], Iterable[Values]]) -> dict[str, Histogram]:
    """Of every tensor over all runs; `runs` is called twice: for the extremes, then to count."""
    limits = extremes(runs())
    found: dict[str, Histogram] = {}
    for values in runs():
        for name, value in values.items():
            if name in limits:
                found[name] = counted(found.get(name), finite(value), *limits[name])
    return found


def finite(values: Array) -> Array:
    """The values without infinities and NaNs (a logarithm of 0): no integer stands for these."""
    if not values.size or np.isfinite([values.min(), values.max()]).all():
        return values
    kept: Array = values[np.isfinite(values)]
    return kept


def extremes(runs: Iterable[Values]) -> dict[str, tuple[float, float]]:
    """By tensor the smallest and largest finite value, and 0."""
    found: dict[str, tuple[float, float]] = {}
    for values in runs:
        for name, whole in values.items():
            value = finite(whole)
            low, high = found.get(name, (0.0, 0.0))
            if value.size:
                found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def averaged(runs: Iterable[Values]) -> dict[str, tuple[float, float]]:
    """By tensor a moving average of the extremes of each run, the last ones counting most.

    So ai-edge-quantizer and TensorFlow do it, with this KEPT: what few samples reach is cut off.
    """
    found: dict[str, tuple[float, float]] = {}
    for values in runs:
        for name, whole in values.items():
            value = finite(whole)
            if value.size:
                new = float(value.min()), float(value.max())
                old = found.get(name, new)
                low, high = (KEPT * a + (1 - KEPT) * b for a, b in zip(old, new, strict=True))
                found[name] = low, high
    return found


def percentile(found: dict[str, Histogram], percent: float) -> dict[str, tuple[float, float]]:
    """Per tensor the range that keeps so many percent of its values, half of the rest per side."""
    cut = (1 - percent / 100) / 2
    kept = {}
    for name, one in found.items():
        shares = np.cumsum(one.counts) / max(float(one.counts.sum()), 1.0)
        edges = np.linspace(one.low, one.high, len(one.counts) + 1)
        low = edges[np.searchsorted(shares, cut, side="right")]
        high = edges[min(int(np.searchsorted(shares, 1 - cut)) + 1, len(one.counts))]
        kept[name] = min(float(low), 0.0), max(float(high), 0.0)
    return kept


def mse(found: dict[str, Histogram], bits: int) -> dict[str, tuple[float, float]]:
    """Per tensor the range with the least squared error at so many bits."""
    best = {name: least_error(one, bits) for name, one in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in best.items()}


def least_error(histogram: Histogram, bits: int) -> tuple[float, float]:
    """The best of STEPS clippings of each side; a side that is 0 stays 0."""
    shares = np.linspace(1.0, 0.4, STEPS)
    if histogram.low >= 0 or histogram.high <= 0:
        candidates = [(histogram.low * share, histogram.high * share) for share in shares]
    else:
        coarse = shares[::6]
        candidates = [(histogram.low * a, histogram.high * b) for a in coarse for b in coarse]
    return min(candidates, key=lambda one: squared_error(histogram, one[0], one[1], bits))


def squared_error(histogram: Histogram, low: float, high: float, bits: int) -> float:
    """Mean squared error of the values when quantized to 2**bits steps from low to high."""
    step = max(high - low, 1e-12) / (2**bits - 1)
    values = histogram.centres
    rounded = low + np.round((np.clip(values, low, high) - low) / step) * step
    total = max(float(histogram.counts.sum()), 1.0)
    return float((histogram.counts * (values - rounded) ** 2).sum() / total)


def saturated(histogram: Histogram, low: float, high: float, bits: int = 8) -> float:
    """The share of values that a quantizer with the range cuts off, by more than one step of it."""
    values = histogram.centres
    margin = (histogram.high - histogram.low) / len(histogram.counts) / 2
    margin = max(margin, (high - low) / (2**bits - 1))
    outside = (values > high + margin) | (values < low - margin)
    return float(histogram.counts[outside].sum() / max(float(histogram.counts.sum()), 1.0))
