"""The supervisor's end of a channel to a template, a worker or a host.

Law of this file: messages and descriptors, in order and without ever blocking the loop; what they
mean is their receiver's. A descriptor that could not be sent is closed here.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable

import msgspec

from edge_runtime.serving import channel
from edge_runtime.wire import sockets


class Line:
    """Our end of a channel: sends never block, messages arrive as calls."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        receive: Callable[[channel.Message, list[int]], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._receive = receive
        self._queue: deque[tuple[channel.Message, list[int]]] = deque()
        self._crowded = False  # why the first of the queue waits (channel.send)
        loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: channel.Message, fds: list[int] | None = None) -> bool:
        """Send, or queue; the descriptors are ours from now on. False: the peer is gone."""
        fds = fds or []
        if self._sock.fileno() < 0:
            sockets.close_fds(fds)
            return False
        if not self._queue and self._try(message, fds):
            return self._sock.fileno() >= 0
        if self._sock.fileno() < 0:
            return False
        self._queue.append((message, fds))
        if len(self._queue) == 1:
            self._wait()
        return True

    def _wait(self) -> None:
        """Go on when there is room: in the socket, or among the descriptors on their way."""
        if self._crowded:
            self._loop.remove_writer(self._sock.fileno())
            self._loop.call_later(channel.CROWDED_PAUSE_S, self._writable)
        else:
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _try(self, message: channel.Message, fds: list[int]) -> bool:
        """Whether it is dealt with: sent, or the peer is gone."""
        try:
            channel.send(self._sock, message, fds)
        except BlockingIOError as error:
            self._crowded = error.errno == errno.ETOOMANYREFS
            return False
        except OSError:
            sockets.close_fds(fds)
            self.close()
            return True
        sockets.close_fds(fds)
        return True

    def _writable(self) -> None:
        while self._queue:
            message, fds = self._queue.popleft()  # before: a failure closes those in the queue
            if not self._try(message, fds):
                self._queue.appendleft((message, fds))
                self._wait()
                return
        if self._sock.fileno() >= 0:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        while self._sock.fileno() >= 0:
            try:
                message, fds = channel.receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, msgspec.DecodeError):
                message, fds = None, []
            if message is None:
                self.close()
                return
            self._receive(message, fds)

    def drain(self) -> None:
        """Take in what the peer sent before it ended."""
        self._readable()

    def close(self) -> None:
        """No more messages either way."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._queue:
            sockets.close_fds(fds)
        self._queue.clear()
