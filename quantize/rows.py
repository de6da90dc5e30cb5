"""Samples that are read when they are asked for: more of them than fit into memory.

Law of this file: which part of an array is read, and how often; where it comes from is another's
function. An array of numpy's is one such thing: whoever takes `Samples` indexes the first axis,
asks for shape and datatype, and does nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Read = Callable[[Array], Array]  # indices [n] of samples -> [n, ...]

# What is smaller is simply held: 80,000 pictures of 28 x 28, 400 of 3 x 224 x 224, in float32.
HELD_BYTES_MAX = 256 << 20
# Read at once by whoever looks at all samples.
PIECE_BYTES = 16 << 20


class Samples(Protocol):
    """An array [samples, ...] whose first axis can be indexed by a number, a slice or indices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, which: Any, /) -> Any: ...


class Rows:
    """Samples behind a function."""

    def __init__(self, read: Read, shape: tuple[int, ...], dtype: Any) -> None:
        """`read` gets indices in 0 .. shape[0] - 1 and returns as many samples of that shape."""
        self._read = read
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice | Array) -> Array:
        """Samples as an array; for a number one, without the axis of samples."""
        if isinstance(which, int | np.integer):
            one: Array = self._got(np.array([range(len(self))[which]]))[0]
            return one
        return self._got(np.arange(len(self))[which])

    def _got(self, indices: Array) -> Array:
        if not len(indices):
            return np.empty((0, *self.shape[1:]), self.dtype)
        found = self._read(indices)
        assert found.dtype == self.dtype and found.shape == (len(indices), *self.shape[1:])
        return found

    def taken(self, chosen: Array) -> Rows:
        """The samples at these indices, still unread."""
        order = np.arange(len(self))[chosen]
        return Rows(lambda i: self._read(order[i]), (len(order), *self.shape[1:]), self.dtype)

    def changed(self, change: Callable[[Array], Array], shape: tuple[int, ...], dtype: Any) -> Rows:
        """Samples as `change` makes them of those that were read; `shape` is that of one."""
        return Rows(lambda i: change(self._read(i)), (len(self), *shape), dtype)


def size_bytes(array: Samples) -> int:
    """What it would take to hold all."""
    return math.prod(array.shape) * array.dtype.itemsize


def held_if_small(array: Rows) -> Samples:
    """Read now what is at most HELD_BYTES_MAX."""
    return array if size_bytes(array) > HELD_BYTES_MAX else array[:]


def taken(array: Samples, chosen: Array) -> Samples:
    """The samples at these indices: a copy of a few, else read when they are asked for."""
    if isinstance(array, Rows):
        return held_if_small(array.taken(chosen))
    whole = Rows(lambda i: np.asarray(array[i]), array.shape, array.dtype)
    return held_if_small(whole.taken(chosen))


def pieces(array: Samples) -> Iterator[Array]:
    """All samples, some at a time: at most PIECE_BYTES, but one at least."""
    step = max(PIECE_BYTES // max(size_bytes(array) // max(len(array), 1), 1), 1)
    for first in range(0, len(array), step):
        yield np.asarray(array[first : first + step])


def thinned(array: Array, most: int) -> Array:
    """Every k-th of an array's values, flat, about `most` or less; all where there are no more.

    No step divides an axis: of [samples, height, width, 3] each third value would be red.
    """
    flat = array.reshape(-1)
    step = -(-flat.size // most)
    while step > 1 and math.gcd(step, flat.size) > 1:
        step += 1
    return flat[::step]


def spread(array: Samples, most: int) -> Array:
    """At most so many samples and HELD_BYTES_MAX (but two at least), evenly spread over all."""
    fit = HELD_BYTES_MAX * len(array) // max(size_bytes(array), 1)
    most = min(most, max(fit, 2))
    if len(array) <= most:
        return np.asarray(array[:])
    return np.asarray(array[np.linspace(0, len(array) - 1, most).astype(int)])
