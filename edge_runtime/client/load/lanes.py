"""One connection of a load: opened, warmed, written and read without waiting.

Law of this file: the only place of the package that touches a socket. It does not know the
schedule and records nothing; what to send is handed in, what came is handed out.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator

from edge_runtime.client.load.request import Template
from edge_runtime.errors import (
    ConnectionClosedError,
    DeadlineError,
    MalformedError,
)
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import PREFIX_SIZE, PREFIX_TAIL, Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge
from edge_runtime.wire.regions import REGION_SIZE_MAX

READS_MAX = 8  # of one connection before the schedule is looked at again
FOREIGN_ID = 1 << 63  # of frames that are not a load's: their answers are nobody's


class Lane:
    """A connection that is open or not (`is_open`).

    Attributes:
        waiting: numbers of requests that are not wholly sent, oldest first.
        begun: bytes of the oldest that are out.
        blocked: the kernel took less than was offered; wait until it is writable.
        retry_at_ns: when a closed one may be opened again; the generator's.
    """

    def __init__(self, number: int, path: str, template: Template) -> None:
        self.number = number
        self.waiting: deque[int] = deque()
        self.begun = 0
        self.blocked = False
        self.retry_at_ns = 0
        self._path = path
        self._template = template
        self._sock: socket.socket | None = None
        self._reader = FrameReader(body_size_max=REGION_SIZE_MAX)

    def fileno(self) -> int:
        """For select()."""
        assert self._sock is not None
        return self._sock.fileno()

    @property
    def is_open(self) -> bool:
        """Whether requests may be put into `waiting`."""
        return self._sock is not None

    def close(self) -> None:
        """Forget the connection and what waits for it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self.waiting.clear()
        self.begun = 0
        self.blocked = False

    def open(self, timeout_s: float) -> None:
        """Connect and announce the region, without waiting for an answer.

        Raises:
            EdgeError: as sockets.connect_unix; ConnectionClosedError.
        """
        assert self._sock is None
        sock = sockets.connect_unix(self._path, timeout_s)
        self._reader = FrameReader(body_size_max=REGION_SIZE_MAX)
        try:
            if self._template.announce:
                announce = bytearray(self._template.announce)
                PREFIX_TAIL.pack_into(announce, frames.PREFIX_TAIL_AT, FOREIGN_ID, 0)
                sockets.send_all_with_fds(sock, announce, [self._template.region_fd])
        except OSError as e:
            sock.close()
            raise self._broken(e) from e
        self._sock = sock

    def start(self) -> None:
        """From now on nothing waits in this connection."""
        assert self._sock is not None
        self._sock.setblocking(False)

    def warm(self, request_id: int, deadline_ns: int) -> None:
        """Before `start`: one request and its answer. The connection is the worker's after it.

        Raises:
            EdgeError: the server's answer to the region or the request.
            DeadlineError, ConnectionClosedError, MalformedError: there was none, or nonsense.
        """
        assert self._sock is not None
        tail = PREFIX_TAIL.pack(request_id, deadline_ns)
        try:
            self._sock.sendall(self._template.head + tail + self._template.rest)
            if self._template.announce:
                self._expect(FOREIGN_ID)
            self._expect(request_id)
        except BlockingIOError as e:
            raise DeadlineError("no answer to the first request", where=self._path) from e
        except OSError as e:
            raise self._broken(e) from e

    def _expect(self, request_id: int) -> None:
        assert self._sock is not None
        while (frame := self._reader.next_frame()) is None:
            size = self._sock.recv_into(self._reader.get_buffer())
            if not size:
                raise ConnectionClosedError("the server closed the connection", where=self._path)
            self._reader.advance(size)
        if isinstance(frame, TooLarge):
            raise frame.error
        if frame.prefix.kind == Kind.ERROR:
            raise messages.decode_error(frame.header)
        if frame.prefix.request_id != request_id:
            raise MalformedError("an answer to what was not asked", where=self._path)

    def _broken(self, error: OSError) -> ConnectionClosedError:
        return ConnectionClosedError(f"the connection broke: {error}", where=self._path)

    def send(self, tails: list[bytes]) -> int:
        """Offer the requests with these prefix tails, the first `begun` bytes of which are out.

        Returns how many are wholly sent; `begun` and `blocked` say the rest.

        Raises:
            OSError: the connection is gone.
        """
        assert self._sock is not None
        head, rest = self._template.head, self._template.rest
        pieces: list[bytes | memoryview] = []
        for tail in tails:
            pieces += (head + tail, rest)
        if self.begun >= PREFIX_SIZE:
            pieces[:2] = [memoryview(rest)[self.begun - PREFIX_SIZE :]]
        elif self.begun:
            pieces[0] = pieces[0][self.begun :]
        try:
            sent = self._sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        whole, self.begun = divmod(self.begun + sent, self._template.size)
        self.blocked = whole < len(tails)
        return whole

    def receive(self) -> Iterator[list[Frame | TooLarge]]:
        """What has come, a list for each read.

        Raises:
            OSError, MalformedError, ConnectionClosedError: the connection is gone.
        """
        assert self._sock is not None
        for _ in range(READS_MAX):
            room = self._reader.get_buffer()
            try:
                size = self._sock.recv_into(room)
            except BlockingIOError:
                return
            if not size:
                raise ConnectionClosedError("the server closed the connection", where=self._path)
            self._reader.advance(size)
            yield list(iter(self._reader.next_frame, None))
            if size < len(room):
                return
