"""Signal to quantization noise, in decibels.

Law of this file: arrays in, numbers out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Better than this is noise of float arithmetic itself.
SQNR_DB_MAX = 120.0


class Powers:
    """Of signal and noise by name, summed over runs."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, want: Array, got: Array) -> None:
        signal, noise = self._sums.get(name, (0.0, 0.0))
        more = powers(want, got)
        self._sums[name] = signal + more[0], noise + more[1]

    def decibels(self) -> dict[str, float]:
        return {name: decibels(*both) for name, both in self._sums.items()}


def sqnr_db(want: Array, got: Array) -> float:
    """10 log10 of signal power over noise power, at most SQNR_DB_MAX."""
    return decibels(*powers(want, got))


def powers(want: Array, got: Array) -> tuple[float, float]:
    """(of the signal, of the noise), summed over all values."""
    wide = want.astype(np.float64)
    return float((wide**2).sum()), float(((wide - got) ** 2).sum())


def decibels(signal: float, noise: float) -> float:
    """Of two powers; without signal or noise SQNR_DB_MAX."""
    if signal == 0 or noise == 0:
        return SQNR_DB_MAX
    return min(10 * math.log10(signal / noise), SQNR_DB_MAX)
