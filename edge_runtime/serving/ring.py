"""A queue of records in shared memory, from one process to one other; a full one refuses.

Law of this file: memory only; what records mean is elsewhere. The memory is a sealed memfd that the
supervisor made, so neither side can shrink it under the other. The writer never waits and never
believes what the reader writes (a wrong head makes the queue look full, nothing more). The bell is
an eventfd: it counts records, its kernel lock orders their bytes before their count, and a reader
that is not asleep on it costs the writer no wake-up.

Layout: word 0 is the head (bytes read, ever), the data begin at DATA. A record is contiguous and
begins at a multiple of ALIGNMENT; where it would not fit before the end, a length of 0 says "go to
the front".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from edge_runtime.errors import MalformedError
from edge_runtime.wire import regions

DATA = 64
ALIGNMENT = 32
SECTIONS = 4
JOIN_BYTES_MAX = 8192  # small records are put together first: one copy more, many steps fewer
_RECORD = struct.Struct(f"<QQ{SECTIONS}I")  # whole length, a number, lengths of the sections
Buffer = bytes | memoryview


class Offer(Enum):
    """What became of a record."""

    TAKEN = "taken"
    FULL = "full"
    TOO_LARGE = "too_large"


class Record(NamedTuple):
    """A record; `sections` are views into the ring, good until `Reader.done`."""

    number: int
    sections: tuple[memoryview, ...]


def open_ring(fd: int, size_bytes: int) -> memoryview:
    """Map a received ring; closes `fd`.

    Raises:
        RequestError, StorageError: it is no sealed memfd of that size.
    """
    return memoryview(regions.adopt_region(fd, size_bytes).memory)


class Writer:
    """The side that offers; `bell` stays the caller's."""

    def __init__(self, memory: memoryview, bell: int) -> None:
        self._head = memory[:8].cast("Q")
        self._data = memory[DATA:]
        self._capacity = len(self._data) // ALIGNMENT * ALIGNMENT
        self._tail = 0
        self._bell = bell

    def has_room(self, size_bytes: int) -> bool:
        """Whether a record with so many bytes in its sections might be taken now; cheaper to ask
        than to put one together in vain.
        """
        used = self._tail - self._head[0]
        free = self._capacity - _RECORD.size - size_bytes
        return 0 <= used <= free or free < self._capacity // 2  # `offer` says "too large"

    def offer(self, number: int, sizes: Sequence[int], parts: Sequence[Buffer]) -> Offer:
        """Append a record whose sections have these sizes; the parts fill them in order."""
        size = _RECORD.size + sum(sizes)
        need = -(-size // ALIGNMENT) * ALIGNMENT
        capacity, tail = self._capacity, self._tail
        if need > capacity // 2:
            return Offer.TOO_LARGE
        at = tail % capacity
        skip = capacity - at if at + need > capacity else 0
        if not 0 <= tail - self._head[0] <= capacity - skip - need:
            return Offer.FULL
        data = self._data
        if skip:
            _RECORD.pack_into(data, at, 0, 0, 0, 0, 0, 0)
            at = 0
        head = _RECORD.pack(need, number, *sizes)
        if size <= JOIN_BYTES_MAX:
            data[at : at + size] = b"".join((head, *parts))
        else:
            for part in (head, *parts):
                data[at : at + len(part)] = part
                at += len(part)
        self._tail = tail + skip + need
        os.eventfd_write(self._bell, 1)
        return Offer.TAKEN


class Reader:
    """The side that takes; `bell` stays the caller's."""

    def __init__(self, memory: memoryview, bell: int) -> None:
        self._head = memory[:8].cast("Q")
        self._data = memory[DATA:]
        self._capacity = len(self._data) // ALIGNMENT * ALIGNMENT
        self._at = 0
        self._next = 0
        self._bell = bell
        self.waiting = 0  # records that are there, as far as the bell was heard

    def listen(self) -> int:
        """Hear the bell; how many records are there."""
        try:
            self.waiting += os.eventfd_read(self._bell)
        except BlockingIOError:
            pass  # nothing new
        return self.waiting

    def take(self) -> Record:
        """The oldest record (`waiting` > 0); `done` gives its memory back.

        Raises:
            MalformedError: there is none where one must be: the ring is of no use any more.
        """
        length, number, *sizes = self._read()
        if not length:
            self._at += self._capacity - self._at % self._capacity
            length, number, *sizes = self._read()
        offset = self._at % self._capacity
        if not _RECORD.size + sum(sizes) <= length <= self._capacity - offset:
            raise MalformedError(f"a record of {length} bytes with sections of {sizes}")
        self._next = self._at + length
        sections = []
        begin = offset + _RECORD.size
        for size in sizes:
            sections.append(self._data[begin : begin + size])
            begin += size
        return Record(number, tuple(sections))

    def _read(self) -> tuple[int, ...]:
        return _RECORD.unpack_from(self._data, self._at % self._capacity)

    def done(self) -> None:
        """The record taken last is not needed any more."""
        self._at = self._next
        self._head[0] = self._at
        self.waiting -= 1
