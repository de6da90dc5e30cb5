"""Frames out of a stream of bytes, as they arrive.

Law of this file: no I/O, no JSON, no numpy. Bytes are put into the reader's own memory (or fed) and
whole frames come out; it decides only what is whole, what is malformed and what is too large.

Memory: a reader holds the frame that is arriving and at most one chunk beside it, so its bound is
32 + HEADER_SIZE_MAX + body_size_max + CHUNK_SIZE. A large frame's memory is anonymous pages that
become real only as its bytes arrive, so that a prefix that promises 64 MiB costs nothing yet.
Memory that was handed out as a body is never written again: a body stays valid for as long as
somebody holds it.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from edge_runtime.errors import MalformedError, TooLargeError
from edge_runtime.wire.frames import (
    BODY_SIZE_MAX,
    HEADER_ALIGNMENT,
    PREFIX,
    PREFIX_SIZE,
    Prefix,
    decode_prefix,
)

# Some seventy frames of a small model between two allocations, and little beside a hundred idle
# connections.
CHUNK_SIZE = 16 * 1024
_ROOM_MIN = 2 * 1024  # an empty reader reads at least this much: a small frame in one call
_LAZY_SIZE_MIN = 128 * 1024  # from here on memory is mapped, not zeroed by us


class Frame(NamedTuple):
    """A whole frame. `body` is of format "B" and belongs to whoever holds it."""

    prefix: Prefix
    header: bytes
    body: memoryview


class TooLarge(NamedTuple):
    """A frame over the cap: reported once, its bytes are skipped, the stream stays usable."""

    prefix: Prefix
    error: TooLargeError


class FrameReader:
    """Incremental decoder of one direction of one connection.

    Either `n = sock.recv_into(reader.get_buffer()); reader.advance(n)` or `reader.feed(data)`; then
    `next_frame()` until it returns None. n == 0 is the end: ask `eof()`.

    Args:
        body_size_max: bytes; larger bodies are reported as TooLarge and skipped.
        data: bytes read earlier, elsewhere: the `pending()` of the reader that goes before.
        skip_size: the `skip_size` of that reader.
    """

    def __init__(
        self, *, body_size_max: int = BODY_SIZE_MAX, data: bytes = b"", skip_size: int = 0
    ) -> None:
        self._body_size_max = body_size_max
        self._memory = memoryview(b"")
        self._start = 0  # first byte not yet handed out
        self._end = 0  # end of what was received
        self._prefix: Prefix | None = None  # of the frame at _start, when it is known
        self._need = PREFIX_SIZE  # bytes from _start that the next step needs
        self._failed: MalformedError | None = None
        self.skip_size = skip_size  # bytes of a too large frame still to come
        self.failed_request_id = 0  # after MalformedError: for the ERROR frame; 0: not known
        if data:
            self.feed(data)

    def get_buffer(self, size_hint: int = 0) -> memoryview:
        """Memory to receive into: never empty, and at least `size_hint` bytes.

        Without a hint it ends where the frame in progress ends, and a large frame is never moved.
        """
        have = self._end - self._start
        if not have:
            # Each frame that does not arrive together with another begins aligned.
            self._start = self._end = -(-self._end // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
        room = max(self._need - have, size_hint, 1 if have else _ROOM_MIN)
        if len(self._memory) - self._end < room:
            # When frames lie there that nobody took, double: many small reads stay linear.
            spare = have if have >= self._need else 0
            self._move(max(CHUNK_SIZE, have + room + spare))
        return self._memory[self._end :]

    def advance(self, size: int) -> None:
        """`size` bytes were received into what `get_buffer` gave."""
        assert 0 <= size <= len(self._memory) - self._end
        if self.skip_size:  # nothing is buffered then: drop the bytes where they lie
            skipped = min(self.skip_size, size)
            self.skip_size -= skipped
            if skipped == size:
                return
            self._start = self._end + skipped
        if self._failed is None:
            self._end += size

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Copy received bytes in."""
        size = len(data)
        self.get_buffer(size)[:size] = data
        self.advance(size)

    def next_frame(self) -> Frame | TooLarge | None:
        """The next whole frame, a TooLarge report, or None: more bytes are needed.

        Raises:
            MalformedError: the bytes are not frames (also when a header is over its limit). The
                reader stays failed: every further call raises the same.
        """
        start = self._start
        if self._end - start < self._need:
            if self._failed is not None:
                raise self._failed
            return None
        prefix = self._prefix or self._decode(start)
        if prefix.body_size > self._body_size_max:
            return self._skip(prefix)
        header_end = start + PREFIX_SIZE + prefix.header_size
        frame_end = header_end + prefix.body_size
        if self._end < frame_end:
            self._prefix = prefix
            self._need = frame_end - start
            return None
        self._prefix = None
        self._need = PREFIX_SIZE
        self._start = frame_end
        memory = self._memory
        header = memory[start + PREFIX_SIZE : header_end].tobytes()
        return Frame(prefix, header, memory[header_end:frame_end])

    def pending(self) -> bytes:
        """What was received and not handed out: goes with a connection that is handed over.

        `skip_size` must travel with it.
        """
        return self._memory[self._start : self._end].tobytes()

    def eof(self) -> bool:
        """At the end of the stream: True if it ended between frames, False inside one."""
        return self._start == self._end and not self.skip_size and self._failed is None

    def _decode(self, start: int) -> Prefix:
        try:
            return decode_prefix(self._memory, start)
        except TooLargeError as e:  # a header that both ends know to be impossible: same fault
            self.failed_request_id = int(PREFIX.unpack_from(self._memory, start)[7])
            self._failed = MalformedError(e.message, expected=e.expected)
            self._drop()
            raise self._failed from e
        except MalformedError as e:
            self._failed = e
            self._drop()
            raise

    def _drop(self) -> None:
        self._start = self._end
        self._need = PREFIX_SIZE

    def _skip(self, prefix: Prefix) -> TooLarge:
        size = PREFIX_SIZE + prefix.header_size + prefix.body_size
        here = min(size, self._end - self._start)
        self._start += here
        self.skip_size = size - here
        message = f"frame body of {prefix.body_size} bytes"
        remedy = "send large tensors by shared memory, or fewer at once"
        expected = f"<= {self._body_size_max} bytes"
        return TooLarge(prefix, TooLargeError(message, expected=expected, remedy=remedy))

    def _move(self, size: int) -> None:
        held = self._memory[self._start : self._end]
        self._memory = _allocate(size)
        self._memory[: len(held)] = held
        self._start, self._end = 0, len(held)


def _allocate(size: int) -> memoryview:
    if size < _LAZY_SIZE_MIN:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
