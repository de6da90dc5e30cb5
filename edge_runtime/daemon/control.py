"""The control socket: one command at a time per connection, with progress.

Law of this file: frames in and out, who may ask, and the table from command to coroutine. What a
command does is in `commands`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from edge_runtime.daemon.access import Access
from edge_runtime.errors import (
    EdgeError,
    InternalError,
    MalformedError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RequestError,
)
from edge_runtime.events import Events
from edge_runtime.serving import channel
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.reader import FrameReader, TooLarge

# Commands are small; files come as descriptors.
BODY_SIZE_MAX = 1024 * 1024
_ANCILLARY = socket.CMSG_SPACE(4 * 4)
# A command takes one at most; those that came early with the next few are kept.
FDS_MAX = 16
# When there is no descriptor left for a new connection: until old ones have ended.
ACCEPT_PAUSE_S = 0.2
# How long, and how many at once, clients that were refused may take to read it.
TURNED_AWAY_S = 1.0
TURNED_AWAY_MAX = 16

Say = Callable[[dict[str, Any]], None]
Command = Callable[[dict[str, Any], list[int], Say], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers on control.sock."""

    def __init__(
        self,
        sock: socket.socket,
        commands: Mapping[str, Command],
        access: Access,
        connections_max: int,
        events: Events,
    ) -> None:
        self._sock = sock
        self._commands = commands
        self._access = access
        self._connections_max = connections_max
        self._events = events
        self._uid = os.geteuid()
        self._sessions: set[asyncio.Task[None]] = set()
        self._turned_away: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._accept)

    async def close(self) -> None:
        """Stop listening; commands under way are cancelled."""
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        tasks = [*self._sessions, *self._turned_away]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # EMFILE: it stays readable, so look away for a moment
            self._events.emit("accept_failed", str(error), level="warning")
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accept)
            return
        sock.setblocking(False)
        refusal = self._refusal(sock)
        if refusal is None:
            self._keep(self._sessions, self._session(sock))
        else:
            self._keep(self._turned_away, self._turn_away(sock, refusal))

    def _keep(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _resume_accept(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    async def _turn_away(self, sock: socket.socket, refusal: EdgeError) -> None:
        """Say why, and stay until it is read: a client that still sends would lose it."""
        try:
            sock.send(messages.encode_error(refusal))
            sock.shutdown(socket.SHUT_WR)
            if len(self._turned_away) <= TURNED_AWAY_MAX:
                async with asyncio.timeout(TURNED_AWAY_S):
                    while await self._loop.sock_recv(sock, 65536):
                        pass
        except (OSError, TimeoutError):
            pass  # gone, or it does not go: told either way
        finally:
            sock.close()

    def _refusal(self, sock: socket.socket) -> EdgeError | None:
        if len(self._sessions) >= self._connections_max:
            return OverloadedError(
                "too many control connections",
                expected=f"<= {self._connections_max} (limits.control_connections_max)",
                retry_after_s=0.5,
            )
        try:
            peer = sockets.peer_credentials(sock)
        except EdgeError as error:
            return error
        if self._access.admits(peer, self._uid):
            return None
        return PermissionDeniedError(
            f"user {peer.uid} may not control this daemon",
            remedy="see access.control in the configuration",
        )

    async def _session(self, sock: socket.socket) -> None:
        reader = FrameReader(body_size_max=BODY_SIZE_MAX)
        fds: list[int] = []
        try:
            while True:
                frame = reader.next_frame()
                if frame is None:
                    await _wait_readable(self._loop, sock)
                    data, ancillary, _, _ = sock.recvmsg(65536, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
                    fds += channel.descriptors(ancillary)
                    if not data:
                        return
                    if len(fds) > FDS_MAX:
                        raise MalformedError("too many descriptors", expected=f"<= {FDS_MAX}")
                    reader.feed(data)
                elif isinstance(frame, TooLarge):
                    await self._send(
                        sock, messages.encode_error(frame.error, frame.prefix.request_id)
                    )
                else:
                    await self._answer(sock, frame.prefix, frame.header, fds)
        except MalformedError as error:
            await self._send(sock, messages.encode_error(error))
        except OSError:
            pass  # the client left
        finally:
            _close_all(fds)
            sock.close()

    async def _answer(
        self, sock: socket.socket, prefix: frames.Prefix, header: bytes, fds: list[int]
    ) -> None:
        """Run one command and send events and answer; closes and clears `fds`."""
        request_id = prefix.request_id

        def say(event: dict[str, Any]) -> None:
            try:
                sock.send(messages.encode_document(Kind.EVENT, event, request_id=request_id))
            except OSError:
                pass  # progress is a courtesy: a client that does not read it loses it

        try:
            if prefix.kind != Kind.CONTROL:
                raise RequestError(f"frames of kind {prefix.kind:#04x} are not answered here")
            name, arguments = messages.decode_control(header)
            command = self._commands.get(name)
            if command is None:
                raise NotFoundError(
                    f"unknown command {name!r}", expected=", ".join(sorted(self._commands))
                )
            result = await command(arguments, fds, say)
            reply = messages.encode_document(
                Kind.CONTROL | frames.RESPONSE, result, request_id=request_id
            )
        except EdgeError as error:
            reply = messages.encode_error(error, request_id)
        except Exception as error:  # noqa: BLE001 - a command must not end the daemon
            self._events.emit("command_failed", repr(error), level="error")
            failure = InternalError(f"{type(error).__name__}: {error}", remedy="please report this")
            reply = messages.encode_error(failure, request_id)
        finally:
            _close_all(fds)
        await self._send(sock, reply)

    async def _send(self, sock: socket.socket, data: bytes) -> None:
        await self._loop.sock_sendall(sock, data)


async def _wait_readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_reader(sock.fileno(), _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
