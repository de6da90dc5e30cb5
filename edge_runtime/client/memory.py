"""Tensors in shared memory on the client's side: arenas (one sealed memfd each) cut into arrays.

Law of this file: it hands out numpy arrays and takes their memory back when they are garbage
collected; it knows no socket. Announcing an arena to a server is the connection's job.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import StorageError
from edge_runtime.wire import regions

if TYPE_CHECKING:
    from edge_runtime.tensors import Array

ALIGNMENT = 64  # a cache line; what vector code of the backends likes best
ARENA_SIZE_MIN = 4 * 1024 * 1024  # bytes; pages are real only when touched
_FOREIGN = ">" if sys.byteorder == "little" else ">="  # byte orders that the wire does not have
ARENAS_MAX = 8  # half of a connection's region numbers: one pool of tensors, one of scratch


class Arena:
    """One memfd, mapped, with a first-fit allocator."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = regions.create_region(size_bytes)
        try:
            self._memory = regions.map_region(self.fd, size_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._free = [(0, size_bytes)]  # (offset, size), by offset
        # Finalizers may run at any moment, also while this thread allocates: they only append here.
        self._returned: deque[tuple[int, int]] = deque()
        self.offsets: dict[int, int] = {}  # of the arrays handed out and alive, by id()
        weakref.finalize(self, os.close, self.fd).atexit = False

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """An array of unset content, or None when there is no room."""
        size = _aligned(max(1, math.prod(shape) * dtype.itemsize))
        while self._returned:
            self._give_back(*self._returned.popleft())
        offset = self._take(size)
        if offset is None:
            return None
        array: Array = np.ndarray(shape, dtype, self._memory, offset)
        end = weakref.finalize(
            array, _end_of, id(array), self.offsets, self._returned, (offset, size)
        )
        end.atexit = False
        # Only now: an id that outlives its array, because a signal came in between, would name a
        # stranger's.
        self.offsets[id(array)] = offset
        return array

    def _take(self, size: int) -> int | None:
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                rest = [(offset + size, room - size)] if room > size else []
                self._free[index : index + 1] = rest
                return offset
        return None

    def _give_back(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged


class Pool:
    """Arenas that grow by doubling. Threads may share it."""

    def __init__(self) -> None:
        self._arenas: list[Arena] = []
        self._lock = threading.Lock()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """An array in shared memory, C-contiguous, of unset content; None: no room (any more).

        Its memory is used again when the array and all views of it are gone.
        """
        size = _aligned(math.prod(shape) * dtype.itemsize)
        if dtype.hasobject or size > regions.REGION_SIZE_MAX:
            return None
        with self._lock:
            for arena in self._arenas:
                if (array := arena.array(shape, dtype)) is not None:
                    return array
            if len(self._arenas) == ARENAS_MAX:
                return None
            try:
                arena = Arena(self._next_size(size))
            except StorageError:  # a limit of this process: tensors travel in frames then
                return None
            self._arenas.append(arena)
            return arena.array(shape, dtype)

    def locate(self, array: Array) -> tuple[Arena, int] | None:
        """Arena and offset of an array that lies in one as the wire wants it: C-contiguous and
        little-endian."""
        if not self._arenas or not array.flags.c_contiguous or array.dtype.byteorder in _FOREIGN:
            return None
        for arena in self._arenas:  # asking an array for its address takes longer: 1 us, 17 cold
            if (offset := arena.offsets.get(id(array))) is not None:
                return arena, offset
        address = array.ctypes.data
        for arena in self._arenas:
            offset = address - arena.address
            if offset >= 0 and offset + array.nbytes <= arena.size_bytes:
                return arena, offset
        return None

    def _next_size(self, size: int) -> int:
        grown = ARENA_SIZE_MIN << len(self._arenas)
        return min(regions.REGION_SIZE_MAX, max(grown, 1 << (size - 1).bit_length()))


def _end_of(
    key: int,
    offsets: dict[int, int],
    returned: deque[tuple[int, int]],
    place: tuple[int, int],
) -> None:
    offsets.pop(key, None)
    returned.append(place)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
