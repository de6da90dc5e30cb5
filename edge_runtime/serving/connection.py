"""One client connection inside a worker: its buffer, regions and unfinished business.

Law of this file: the state of a connection and its hand-over; no decisions about requests. A
connection is owned by exactly one process at a time; what that process has read and not used, the
regions, and descriptors not yet claimed travel with it.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from typing import TYPE_CHECKING

from edge_runtime.errors import EdgeError, RequestError, StorageError
from edge_runtime.serving import channel
from edge_runtime.serving.plan import Plan, Region, Slot
from edge_runtime.wire import regions as shared
from edge_runtime.wire.frames import HEADER_SIZE_MAX, PREFIX, PREFIX_SIZE

if TYPE_CHECKING:
    from edge_runtime.serving.running import Request

# Holds the largest header with its prefix; larger bodies are received elsewhere. Small connections
# start small: sixteen idle ones cost 256 KiB.
BUFFER_SIZE_MIN = 16 * 1024
BUFFER_SIZE_MAX = PREFIX_SIZE + HEADER_SIZE_MAX + 32 * 1024


class Connection:
    """State of one connection; fields are the worker loop's to read and write."""

    __slots__ = (
        "buffer",
        "end",
        "fd",
        "in_flight",
        "leaving",
        "outbox",
        "own",
        "peer",
        "plans",
        "receiving",
        "regions",
        "skip",
        "sock",
        "stalled_since_ns",
        "start",
        "stray",
        "turns",
        "view",
    )

    def __init__(self, sock: socket.socket, own: bool, peer: tuple[int, int, int]) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.own = own
        self.peer = peer
        self.buffer = bytearray(BUFFER_SIZE_MIN)
        self.view = memoryview(self.buffer)
        self.start = 0  # first byte not yet used
        self.end = 0  # behind the last byte read
        self.stray: list[int] = []  # descriptors that came with bytes not yet parsed
        self.regions: dict[int, Region] = {}
        self.plans: dict[bytes, Plan] = {}  # of headers that name regions
        self.receiving: Request | None = None  # a large body on its way into its slot
        self.skip = 0  # body bytes still to be thrown away
        self.turns: dict[int, int] = {}  # by priority: that of its newest request in line
        self.in_flight = 0  # admitted, not yet answered
        self.outbox: deque[tuple[memoryview, Slot | None]] = (
            deque()
        )  # answers the socket did not take
        self.leaving = False  # goes back to the supervisor when nothing is in flight
        self.stalled_since_ns = 0  # half a frame received, or an answer not taken, since then

    def make_room(self) -> memoryview:
        """Where the next bytes go: never empty."""
        if self.start == self.end:
            self.start = self.end = 0
            if len(self.buffer) > BUFFER_SIZE_MAX:  # came with a large hand-over
                self.buffer = bytearray(BUFFER_SIZE_MIN)
                self.view = memoryview(self.buffer)
        elif self.end == len(self.buffer):
            self._compact()
        return self.view[self.end :] if self.end else self.view

    def _compact(self) -> None:
        """Move what is unread to the front; into a larger buffer when it already is there."""
        unread = bytes(self.view[self.start : self.end])
        if self.start == 0:
            assert len(self.buffer) < BUFFER_SIZE_MAX, "a full buffer always holds a whole header"
            self.buffer = bytearray(BUFFER_SIZE_MAX)
            self.view = memoryview(self.buffer)
        self.view[: len(unread)] = unread
        self.start, self.end = 0, len(unread)

    def feed(self, data: bytes) -> None:
        """Bytes that another process has read."""
        if len(data) > len(self.buffer):
            self.buffer = bytearray(max(len(data), BUFFER_SIZE_MIN))
            self.view = memoryview(self.buffer)
        self.view[: len(data)] = data
        self.start, self.end = 0, len(data)

    def unread(self) -> bytes:
        """All bytes read and not used, a half-received large body with its frame included."""
        parts = []
        if self.receiving is not None:
            request = self.receiving
            assert request.slot is not None
            parts = [request.prefix, request.header, bytes(request.slot.body[: request.filled])]
        parts.append(bytes(self.view[self.start : self.end]))
        return b"".join(parts)

    def add_region(self, number: int, byte_size: int, fd: int) -> None:
        """Map a client's memfd as region `number`, replacing an older one; takes over `fd`.

        Raises:
            RequestError: not a sealed memfd, or smaller than announced (then `fd` is closed).
        """
        try:
            region = open_region(number, byte_size, fd)
        except BaseException:
            os.close(fd)
            raise
        self.drop_region(number)
        self.regions[number] = region

    def missing(self) -> int:
        """How many bytes the prefix or header of the frame in progress still lacks; at least 1."""
        have = self.end - self.start
        if have < PREFIX_SIZE:
            return PREFIX_SIZE - have
        header_size: int = PREFIX.unpack_from(self.buffer, self.start)[5]
        return max(PREFIX_SIZE + header_size - have, 1)

    def drop_region(self, number: int) -> bool:
        """Forget a region; its memory stays mapped while a request still uses it."""
        region = self.regions.pop(number, None)
        if region is None:
            return False
        retire(self.plans)
        os.close(region.fd)
        return True

    def close(self) -> None:
        """Close everything that belongs to this connection."""
        for number in list(self.regions):
            self.drop_region(number)
        for fd in self.stray:
            os.close(fd)
        self.stray.clear()
        retire(self.plans)
        self.sock.close()
        self.fd = -1

    def hand_over(self, to: socket.socket) -> None:
        """Send the connection with all its state to the supervisor, and forget it here."""
        residual, size, memory = channel.pack_residual(self.unread())
        regions = sorted(self.regions.values())
        message = channel.Returned(
            own=self.own,
            residual=residual,
            residual_size=size,
            regions=tuple((region.number, region.memory.nbytes) for region in regions),
            stray=len(self.stray),
            skip=self.skip,
            peer=self.peer,
        )
        fds = [self.fd, *(region.fd for region in regions), *self.stray]
        if memory is not None:
            fds.append(memory)
        try:
            channel.send(to, message, fds)
        finally:
            if memory is not None:
                os.close(memory)
            self.close()


def retire(plans: dict[bytes, Plan]) -> None:
    """Forget plans; their slots at rest go now, those in use when they are released."""
    for plan in plans.values():
        plan.retire()
    plans.clear()


def open_region(number: int, byte_size: int, fd: int) -> Region:
    """Check and map a memfd (see wire.regions).

    Raises:
        RequestError: it is not what it should be, or cannot be mapped now: the same to a client,
            which then sends its tensors in frames.
    """
    # The limit is the worker's configured one, and was checked.
    writable = shared.check_region(fd, byte_size, byte_size_max=byte_size).writable
    try:
        memory = memoryview(shared.map_region(fd, byte_size, writable=writable))
    except StorageError as error:
        remedy = "send the tensors in frames"
        raise RequestError(error.message, where=error.where, remedy=remedy) from error
    return Region(number, memory, fd, writable)


def adopt(message: channel.Adopt, fds: list[int]) -> Connection:
    """The connection that the supervisor hands over; takes ownership of `fds`.

    Raises:
        EdgeError: it cannot be served here, and is closed: descriptors did not all arrive (this
            process has as many as it may), or a region cannot be mapped.
    """
    try:
        channel.check_complete(message, fds)
        residual = channel.unpack_residual(message.residual, message.residual_size, fds)
    except EdgeError:
        for fd in fds:
            os.close(fd)
        raise
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    connection = Connection(sock, message.own, message.peer)
    connection.stray = fds[1:]  # until they are known to be more than that
    try:
        for number, byte_size in message.regions:
            region = open_region(number, byte_size, connection.stray[0])
            connection.regions[number] = region
            del connection.stray[0]
    except EdgeError:
        connection.close()
        raise
    connection.skip = message.skip
    if residual:
        connection.feed(residual)
    return connection
