"""From an accepted connection to the worker that serves it.

Law of this file: it reads as much of a frame as names the model, checks who asks, and passes the
connection on with what was read. Requests to the server itself, and refusals, are answered here. It
never reads tensor data except to throw it away, and nothing here waits.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge_runtime import __version__
from edge_runtime.clock import Clock
from edge_runtime.config import Config
from edge_runtime.daemon.access import Access
from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    MalformedError,
    OverloadedError,
    PermissionDeniedError,
    RequestError,
    TooLargeError,
    UnavailableError,
)
from edge_runtime.events import Events
from edge_runtime.serving import channel
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import PREFIX_SIZE, Kind, Prefix
from edge_runtime.wire.sockets import PeerCredentials

EXTENSIONS = (
    "binary_tensor_data",
    "shared_memory_regions",
    "pipelining",
    "deadlines",
    "priorities",
)
# How long a request without a deadline waits for its model to be loaded again.
WAKE_S_MAX = 30.0
# One read; also what is thrown away at a time of a refused body.
CHUNK_SIZE = 64 * 1024
# When there is no descriptor left for a new connection: until old ones have ended.
ACCEPT_PAUSE_S = 0.2
# A client whose answers back up here is not reading them; its next refusal closes the connection.
_ANCILLARY = socket.CMSG_SPACE(4 * 4)


class Worker(Protocol):
    """Where a connection can go."""

    def adopt(self, message: channel.Adopt, fds: list[int]) -> bool: ...


class Directory(Protocol):
    """What the router asks about models."""

    def worker(self, model: str, version: str) -> Worker | None:
        """The worker to use now; None: not ready. Raises NotFoundError."""

    def access(self, model: str) -> Access:
        """Who may infer with the model."""

    def wake(self, model: str) -> asyncio.Task[Any] | None:
        """Load a model that sleeps; done when it is loaded or cannot be. None: it does not."""

    def sleeping(self, model: str) -> bool:
        """Whether the model would be loaded for a request."""

    def not_ready(self, model: str) -> UnavailableError:
        """What to tell a client whose request cannot be served now."""

    def models(self) -> list[str]:
        """Names of installed models."""

    def ready(self) -> bool:
        """Whether every active model serves."""

    def connections(self) -> int:
        """Connections that workers have now."""

    def connections_of(self, uid: int) -> int:
        """Those of one user."""


class Visitor:
    """A connection while the daemon has it."""

    __slots__ = (
        "buffer",
        "deadline",
        "own",
        "parked",
        "peer",
        "regions",
        "skip",
        "sock",
        "stray",
        "woken",
    )

    def __init__(self, sock: socket.socket, peer: PeerCredentials, own: str) -> None:
        self.sock = sock
        self.peer = peer
        self.own = own  # the model whose own socket it came by; "": any
        self.buffer = bytearray()
        self.stray: list[int] = []
        self.regions: list[tuple[int, int, int]] = []  # (number, byte size, descriptor)
        self.skip = 0
        self.deadline: asyncio.TimerHandle | None = None
        self.parked = False  # its first frame waits for a model to be loaded
        self.woken = False  # it has waited: no second time for the same frame

    def descriptors(self) -> list[int]:
        """Everything that travels with it, the connection first; duplicates none."""
        return [self.sock.detach(), *(fd for _, _, fd in self.regions), *self.stray]


class Router:
    """Accepts, checks, passes on."""

    def __init__(self, directory: Directory, config: Config, events: Events, clock: Clock) -> None:
        self._directory = directory
        self._limits = config.limits
        self._events = events
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[str, socket.socket] = {}
        self._visitors: dict[int, Visitor] = {}
        self._visitors_of: Counter[int] = Counter()  # by uid
        self._uid = os.geteuid()
        # Of those that wait for a model: epoll reports a hang-up even if nothing is asked of it.
        self._hang_ups = select.epoll()
        self._loop.add_reader(self._hang_ups.fileno(), self._hung_up)
        self.accepted = 0
        self.refused = 0
        self.closing = False

    # -- listening --------------------------------------------------------------------------------

    def listen(self, sock: socket.socket, own: str = "") -> None:
        """Serve a listening socket; `own` is the one model it is for."""
        sock.setblocking(False)
        self._listeners[own] = sock
        self._loop.add_reader(sock.fileno(), self._accept, sock, own)

    def listening(self, own: str) -> bool:
        """Whether a model has its own socket already."""
        return own in self._listeners

    def address(self) -> str:
        """Where the socket for any model is."""
        return str(self._listeners[""].getsockname())

    def unlisten(self, own: str) -> None:
        """Stop serving the own socket of a model and remove its file."""
        sock = self._listeners.pop(own, None)
        if sock is not None:
            self._loop.remove_reader(sock.fileno())
            name = sock.getsockname()
            sock.close()
            try:
                os.unlink(name)  # noqa: PTH108 - a socket's name, as the kernel has it
            except OSError:
                pass  # somebody tidied up before us

    def close(self) -> None:
        """No new connections, and the end of those that wait here."""
        self.closing = True
        for sock in self._listeners.values():
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._listeners.clear()
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._loop.remove_reader(self._hang_ups.fileno())
        self._hang_ups.close()

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and connections waiting here now."""
        return {
            "accepted": self.accepted,
            "refused": self.refused,
            "waiting": len(self._visitors),
        }

    def _accept(self, listener: socket.socket, own: str) -> None:
        for _ in range(16):  # then let others have a turn
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # EMFILE: it stays readable, so look away for a moment
                self._events.emit("accept_failed", str(error), level="warning")
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accept, listener, own)
                return
            self.accepted += 1
            try:
                peer = sockets.peer_credentials(sock)
            except EdgeError:
                sock.close()
                continue
            visitor = Visitor(sock, peer, own)
            refusal = self._refusal(peer)
            if refusal is not None:
                self._say(visitor, messages.encode_error(refusal))
                sock.close()
                self.refused += 1
                continue
            self._admit(visitor)

    def _refusal(self, peer: PeerCredentials) -> OverloadedError | None:
        """Why there is no room for one more connection, of this user or at all; None: there is."""
        if peer.pid == os.getpid():  # a crowd must not starve the watchdog
            return None
        limits = self._limits
        if len(self._visitors) + self._directory.connections() >= limits.connections_max:
            return OverloadedError(
                "too many connections",
                expected=f"<= {limits.connections_max} (limits.connections_max)",
                retry_after_s=0.1,
            )
        theirs = self._visitors_of[peer.uid] + self._directory.connections_of(peer.uid)
        if theirs >= limits.connections_per_user_max:
            return OverloadedError(
                f"too many connections of user {peer.uid}",
                expected=f"<= {limits.connections_per_user_max} (limits.connections_per_user_max)",
                remedy="keep connections and use them for many requests",
                retry_after_s=0.1,
            )
        return None

    def _resume_accept(self, listener: socket.socket, own: str) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener, own)

    def _admit(self, visitor: Visitor) -> None:
        self._enter(visitor)
        self._loop.add_reader(visitor.sock.fileno(), self._readable, visitor)

    def _enter(self, visitor: Visitor) -> None:
        visitor.sock.setblocking(False)
        self._visitors[visitor.sock.fileno()] = visitor
        self._visitors_of[visitor.peer.uid] += 1

    # -- reading ----------------------------------------------------------------------------------

    def take_back(self, message: channel.Returned, fds: list[int], own: str) -> None:
        """A worker returns a connection: route it anew. Takes over `fds`."""
        try:
            channel.check_complete(message, fds)
        except EdgeError as error:
            self._events.emit("connection_lost", str(error), level="warning")
            sockets.close_fds(fds)
            return
        residual = channel.unpack_residual(message.residual, message.residual_size, fds)
        sock = socket.socket(fileno=fds[0])
        try:
            peer = sockets.peer_credentials(sock)
        except EdgeError:
            sockets.close_fds(fds[1:])
            sock.close()
            return
        visitor = Visitor(sock, peer, own if message.own else "")
        numbers = message.regions
        visitor.regions = [
            (number, size, fd) for (number, size), fd in zip(numbers, fds[1:], strict=False)
        ]
        visitor.stray = fds[1 + len(numbers) :]
        visitor.skip = message.skip
        visitor.buffer += residual
        self._enter(visitor)
        if self.closing:
            self._drop(visitor)
            return
        self._progress(visitor)  # most go on at once: they are watched only if they stay
        if self._here(visitor) and not visitor.parked:
            self._loop.add_reader(sock.fileno(), self._readable, visitor)

    def _readable(self, visitor: Visitor) -> None:
        wanted = min(visitor.skip, CHUNK_SIZE) or self._wanted(visitor)
        try:
            data, ancillary, _, _ = visitor.sock.recvmsg(
                wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        visitor.stray += channel.descriptors(ancillary)
        if not data or len(visitor.stray) > 8:
            self._drop(visitor)
            return
        if visitor.skip:
            visitor.skip -= len(data)
            return
        visitor.buffer += data
        self._progress(visitor)

    def _wanted(self, visitor: Visitor) -> int:
        """Bytes up to the end of the prefix or header: the body stays in the socket."""
        have = len(visitor.buffer)
        if have < PREFIX_SIZE:
            return PREFIX_SIZE - have
        header_size = frames.decode_prefix(visitor.buffer).header_size
        return max(PREFIX_SIZE + header_size - have, 1)

    def _progress(self, visitor: Visitor) -> None:
        """Use what has been read."""
        try:
            while self._here(visitor) and not visitor.parked:
                if visitor.skip:
                    used = min(visitor.skip, len(visitor.buffer))
                    del visitor.buffer[:used]
                    visitor.skip -= used
                if len(visitor.buffer) < PREFIX_SIZE:
                    break
                prefix = frames.decode_prefix(visitor.buffer)
                end = PREFIX_SIZE + prefix.header_size
                if len(visitor.buffer) < end:
                    break
                self._frame(visitor, prefix, bytes(visitor.buffer[PREFIX_SIZE:end]))
        except (MalformedError, TooLargeError) as error:
            self._say(visitor, messages.encode_error(error))
            self._drop(visitor)
            return
        if self._here(visitor):
            self._guard(visitor)

    def _guard(self, visitor: Visitor) -> None:
        """A frame, once begun, must arrive in time."""
        if not visitor.buffer and visitor.deadline is not None:
            visitor.deadline.cancel()
            visitor.deadline = None
        elif visitor.buffer and visitor.deadline is None:
            visitor.deadline = self._loop.call_later(
                self._limits.connection_idle_header_s, self._drop, visitor
            )

    def _here(self, visitor: Visitor) -> bool:
        return visitor.sock.fileno() >= 0

    def _frame(self, visitor: Visitor, prefix: Prefix, header: bytes) -> None:
        """Act on a frame whose header is complete."""
        try:
            if prefix.kind in frames.MODEL_KINDS:
                if self._route(visitor, prefix, header):
                    return
                if self._park(visitor, prefix, header):
                    return
                reply = self._not_ready(prefix, header)
            elif prefix.kind in SERVER_ANSWERS:
                reply = messages.encode_document(
                    prefix.kind | frames.RESPONSE,
                    SERVER_ANSWERS[Kind(prefix.kind)](self._directory),
                    request_id=prefix.request_id,
                )
            else:
                raise RequestError(
                    f"frames of kind {prefix.kind:#04x} are not answered on this socket"
                )
        except EdgeError as error:
            self.refused += 1
            reply = messages.encode_error(error, prefix.request_id)
        self._answer(visitor, prefix, reply)

    def _answer(self, visitor: Visitor, prefix: Prefix, reply: bytes) -> None:
        """Take the frame off the buffer, with its body and descriptors, and answer it."""
        del visitor.buffer[: PREFIX_SIZE + prefix.header_size]
        visitor.skip = prefix.body_size
        if prefix.kind == Kind.REGION_ADD or not visitor.buffer:  # else a later frame's, perhaps
            sockets.close_fds(visitor.stray)
            visitor.stray.clear()
        visitor.woken = False
        self._say(visitor, reply)

    def _route(self, visitor: Visitor, prefix: Prefix, header: bytes) -> bool:
        """Pass the connection to the worker it asks for; False: it is not ready.

        Raises:
            RequestError, NotFoundError, PermissionDeniedError: the request cannot be served.
        """
        ref = messages.decode_model_ref(header)
        name, version = ref.model_name, ref.model_version
        if visitor.own not in ("", name):
            raise PermissionDeniedError(
                f"this socket is for {visitor.own} only", where=name, remedy="use infer.sock"
            )
        if not self._directory.access(name).admits(visitor.peer, self._uid):
            raise PermissionDeniedError(
                f"user {visitor.peer.uid} may not infer with {name}",
                where=name,
                remedy="see `access` in the configuration",
            )
        worker = self._directory.worker(name, version)
        return worker is not None and self._pass_on(visitor, worker)

    def _pass_on(self, visitor: Visitor, worker: Worker) -> bool:
        residual, size, memory = channel.pack_residual(visitor.buffer)
        message = channel.Adopt(
            own=bool(visitor.own),
            residual=residual,
            residual_size=size,
            regions=tuple((number, byte_size) for number, byte_size, _ in visitor.regions),
            stray=len(visitor.stray),
            skip=visitor.skip,
            peer=(visitor.peer.pid, visitor.peer.uid, visitor.peer.gid),
        )
        self._forget(visitor)
        fds = visitor.descriptors()
        if memory is not None:
            fds.append(memory)
        worker.adopt(message, fds)  # if it is gone by now, the client sees the end, as at any death
        return True

    def _park(self, visitor: Visitor, prefix: Prefix, header: bytes) -> bool:
        """Let a request wait while its model is loaded again; False: it is not being loaded.

        Raises:
            DeadlineError: it is too late already; nothing is loaded for it.
        """
        if visitor.woken or prefix.kind == Kind.MODEL_READY:
            return False  # asking whether it is ready is not asking for it
        wait_s = WAKE_S_MAX
        if prefix.time_ns:
            left_s = (prefix.time_ns - self._clock.monotonic_ns()) / 1e9
            if left_s <= 0:
                raise DeadlineError("the deadline passed before the request was read")
            wait_s = min(left_s, WAKE_S_MAX)
        waking = self._directory.wake(messages.model_name_of(header))
        if waking is None:
            return False
        visitor.parked = visitor.woken = True
        fd = visitor.sock.fileno()
        self._loop.remove_reader(fd)
        self._hang_ups.register(fd, 0)
        if visitor.deadline is not None:
            visitor.deadline.cancel()
        visitor.deadline = self._loop.call_later(wait_s, self._give_up, visitor, prefix)
        waking.add_done_callback(lambda _: self._unpark(visitor))
        return True

    def _unpark(self, visitor: Visitor) -> None:
        """The model is loaded, or cannot be: look at the frame again."""
        if visitor.parked:
            self._resume(visitor)
            self._progress(visitor)

    def _resume(self, visitor: Visitor) -> None:
        """Read on from a visitor that was parked."""
        self._wait_no_more(visitor)
        self._loop.add_reader(visitor.sock.fileno(), self._readable, visitor)

    def _wait_no_more(self, visitor: Visitor) -> None:
        if visitor.deadline is not None:
            visitor.deadline.cancel()
            visitor.deadline = None
        if visitor.parked:
            visitor.parked = False
            self._hang_ups.unregister(visitor.sock.fileno())

    def _give_up(self, visitor: Visitor, prefix: Prefix) -> None:
        """The request has waited for its model for as long as it may."""
        self._resume(visitor)
        late = prefix.time_ns and prefix.time_ns <= self._clock.monotonic_ns()
        error: EdgeError = (
            DeadlineError("the deadline passed while the model was being loaded")
            if late
            else UnavailableError("the model is still being loaded", retry_after_s=1.0)
        )
        self.refused += 1
        self._answer(visitor, prefix, messages.encode_error(error, prefix.request_id))
        self._progress(visitor)

    def _hung_up(self) -> None:
        """Clients left while they waited. Their sockets may still hold unread requests, so that
        only the kernel's word tells, not a read.
        """
        for fd, _ in self._hang_ups.poll(0):
            self._drop(self._visitors[fd])

    def _not_ready(self, prefix: Prefix, header: bytes) -> bytes:
        name = messages.model_name_of(header)
        if prefix.kind == Kind.MODEL_READY:
            answer = messages.ModelReady(name, self._directory.sleeping(name))
            kind = prefix.kind | frames.RESPONSE
            return messages.encode_document(kind, answer, request_id=prefix.request_id)
        raise self._directory.not_ready(name)

    def _say(self, visitor: Visitor, data: bytes) -> None:
        """Answer at once or not at all: a client that lets its answers pile up is dropped."""
        try:
            if visitor.sock.send(data, socket.MSG_DONTWAIT) == len(data):
                return
        except OSError:
            pass  # gone, or full: the same end
        self._drop(visitor)

    def _forget(self, visitor: Visitor) -> None:
        fd = visitor.sock.fileno()
        if self._visitors.pop(fd, None) is not None:
            self._loop.remove_reader(fd)
            self._visitors_of[visitor.peer.uid] -= 1
            if not self._visitors_of[visitor.peer.uid]:
                del self._visitors_of[visitor.peer.uid]
        self._wait_no_more(visitor)

    def _drop(self, visitor: Visitor) -> None:
        self._forget(visitor)
        sockets.close_fds([fd for _, _, fd in visitor.regions] + visitor.stray)
        visitor.regions.clear()
        visitor.stray.clear()
        visitor.sock.close()


def _metadata(directory: Directory) -> messages.ServerMetadata:
    return messages.ServerMetadata(
        "edge-runtime", __version__, EXTENSIONS, tuple(directory.models())
    )


SERVER_ANSWERS: Mapping[Kind, Callable[[Directory], Any]] = {
    Kind.SERVER_METADATA: _metadata,
    Kind.SERVER_LIVE: lambda _: {"live": True},
    Kind.SERVER_READY: lambda directory: {"ready": directory.ready()},
}


__all__ = ["Directory", "Router", "Visitor"]
