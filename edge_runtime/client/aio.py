"""`AsyncClient`: the surface of `Client` with `await`; concurrent calls share one connection.

Law of this file: asyncio lives here and nowhere else in the package. Calls of one model are
pipelined over one connection and matched by id. A call that times out or is cancelled leaves the
connection to the others: its answer is dropped when it comes, and shared memory that the server may
still write for it stays reserved until then.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edge_runtime.client import codec
from edge_runtime.client.codec import InferResult
from edge_runtime.client.memory import Arena, Pool
from edge_runtime.client.retry import RETRYABLE, RetryPolicy, out_of_time, plain
from edge_runtime.client.sync import SHARED_MEMORY_MIN_BYTES, WINDOW
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import (
    ConnectionClosedError,
    DeadlineError,
    EdgeError,
    MalformedError,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnavailableError,
)
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge
from edge_runtime.wire.regions import REGION_SIZE_MAX

if TYPE_CHECKING:
    from edge_runtime.tensors import Array

T = TypeVar("T")

ROOMS_MAX = 64  # kinds of request whose output sizes are remembered


class _Connection:
    """One connection to one model, on one event loop."""

    def __init__(self, path: str, model: str, own: Pool, timeout_s: float) -> None:
        self.model = model
        self.own = own
        self.scratch: Pool | None = Pool()
        self.rooms: dict[Any, dict[str, int]] = {}
        self._where = path
        self._numbers: dict[Arena, asyncio.Task[int]] = {}
        self._next_id = 0
        # id -> who waits, and what must live until the answer: kept also when nobody waits any more
        self._waiting: dict[int, tuple[asyncio.Future[Frame], object]] = {}
        self._outbox: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._reader = FrameReader(body_size_max=REGION_SIZE_MAX)
        self._loop = asyncio.get_running_loop()
        self._socket = sockets.connect_unix(path, timeout_s)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._readable)
        self.closed = False

    def close(self, error: EdgeError | None = None) -> None:
        """Close and fail whoever waits."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(
                    error or ConnectionClosedError("the client was closed", where=self._where)
                )
                future.exception()  # whoever stopped waiting must not be told about it in the log
        self._waiting.clear()

    async def request(
        self,
        kind: Kind,
        header: bytes,
        body: Sequence[memoryview] = (),
        *,
        deadline_ns: int = 0,
        priority: int = 0,
        fds: Sequence[int] = (),
        keep: object = None,
    ) -> Frame:
        """Send and wait for the answer. Raises what the server answered."""
        if self.closed:
            raise ConnectionClosedError("the connection is closed", where=self._where)
        self._next_id += 1
        size = sum(part.nbytes for part in body)
        prefix = frames.encode_prefix(kind, len(header), size, self._next_id, deadline_ns, priority)
        future: asyncio.Future[Frame] = self._loop.create_future()
        self._waiting[self._next_id] = (future, keep)
        idle = not self._outbox
        self._outbox.append((memoryview(prefix + header), fds))
        self._outbox.extend((part, ()) for part in body if part.nbytes)
        if idle:
            self._writable()
        return await future

    async def region(self, arena: Arena) -> int:
        """The number of an arena, announcing it if it is new. Raises what the server answered."""
        if arena not in self._numbers:
            self._numbers[arena] = self._loop.create_task(self._announce(arena, len(self._numbers)))
        # A caller that is cancelled must not cancel it for the others.
        return await asyncio.shield(self._numbers[arena])

    async def _announce(self, arena: Arena, number: int) -> int:
        header = messages.encode_header(messages.RegionAdd(self.model, number, arena.size_bytes))
        await self.request(Kind.REGION_ADD, header, fds=[arena.fd])
        return number

    def _writable(self) -> None:
        try:
            while self._outbox:
                data, fds = self._outbox[0]
                sent = (
                    sockets.send_with_fds(self._socket, data, fds)
                    if fds
                    else self._socket.send(data, socket.MSG_NOSIGNAL)
                )
                if sent == len(data):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = (data[sent:], ())
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._writable)
            return
        except OSError as e:
            self.close(ConnectionClosedError(f"the connection broke: {e}", where=self._where))
            return
        self._loop.remove_writer(self._socket)

    def _readable(self) -> None:
        try:
            size = self._socket.recv_into(self._reader.get_buffer())
        except BlockingIOError:
            return
        except OSError as e:
            self.close(ConnectionClosedError(f"the connection broke: {e}", where=self._where))
            return
        if not size:
            inside = "" if self._reader.eof() else " inside a frame"
            message = f"the server closed the connection{inside}"
            self.close(ConnectionClosedError(message, where=self._where))
            return
        self._reader.advance(size)
        try:
            while (frame := self._reader.next_frame()) is not None:
                self._answer(frame)
        except RequestError as e:
            self.close(e)

    def _answer(self, frame: Frame | TooLarge) -> None:
        prefix = frame.prefix
        if prefix.request_id == 0 and isinstance(frame, Frame) and prefix.kind == Kind.ERROR:
            self.close(messages.decode_error(frame.header))
            return
        future, _ = self._waiting.pop(prefix.request_id, (None, None))
        if future is None or future.done():
            return  # abandoned
        if isinstance(frame, TooLarge):
            future.set_exception(frame.error)
        elif prefix.kind == Kind.ERROR:
            future.set_exception(messages.decode_error(frame.header))
        else:
            future.set_result(frame)


class AsyncClient:
    """As `Client`; use it on one event loop, with `async with`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float = 5.0,
        shared_memory_min_bytes: int = SHARED_MEMORY_MIN_BYTES,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._shared_min_bytes = shared_memory_min_bytes
        self._retry = retry or RetryPolicy()
        self._now_ns = (clock or SystemClock()).monotonic_ns
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._connections: dict[str, _Connection] = {}
        self._own = Pool()
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls in flight fail with ConnectionClosedError."""
        self._closed = True
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        routing_key: str = "",
        copy: bool = True,
    ) -> dict[str, Array]:
        """As `Client.infer`."""
        result = await self.infer_result(
            model,
            inputs,
            outputs=outputs,
            version=version,
            timeout_s=timeout_s,
            priority=priority,
            routing_key=routing_key,
            copy=copy,
        )
        return result.outputs

    async def infer_result(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        routing_key: str = "",
        copy: bool = True,
    ) -> InferResult:
        """As `Client.infer_result`."""
        arrays = codec.as_arrays(inputs)
        wanted = () if outputs is None else tuple(outputs)

        async def work(connection: _Connection, deadline_ns: int) -> InferResult:
            return await self._infer_once(
                connection, arrays, wanted, version, routing_key, priority, deadline_ns, copy
            )

        return await self._call(model, timeout_s, work)

    async def infer_many(
        self,
        model: str,
        inputs: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        window: int = WINDOW,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        routing_key: str = "",
    ) -> AsyncIterator[dict[str, Array]]:
        """As `Client.infer_many`, on the shared connection; `inputs` may be asynchronous."""
        assert window >= 1
        running: deque[asyncio.Task[dict[str, Array]]] = deque()
        try:
            async for item in _each(inputs):
                if len(running) == window:
                    yield await running.popleft()
                call = self.infer(
                    model,
                    item,
                    outputs=outputs,
                    version=version,
                    timeout_s=timeout_s,
                    priority=priority,
                    routing_key=routing_key,
                )
                running.append(asyncio.create_task(call))
            while running:
                yield await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def tensor(self, shape: Sequence[int], dtype: Any) -> Array:
        """As `Client.tensor`."""
        shape, dtype = tuple(shape), np.dtype(dtype)
        array = self._own.array(shape, dtype)
        return np.empty(shape, dtype) if array is None else array

    async def metadata(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> dict[str, Any]:
        """As `Client.metadata`."""
        header = messages.ModelRef(model, version)
        return await self._ask(Kind.MODEL_METADATA, model, header, timeout_s)

    async def ready(self, model: str, *, version: str = "", timeout_s: float | None = None) -> bool:
        """As `Client.ready`."""
        header = messages.ModelRef(model, version)
        return bool((await self._ask(Kind.MODEL_READY, model, header, timeout_s)).get("ready"))

    async def server_metadata(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """As `Client.server_metadata`."""
        return await self._ask(Kind.SERVER_METADATA, "", {}, timeout_s)

    async def live(self, *, timeout_s: float | None = None) -> bool:
        """As `Client.live`."""
        try:
            return bool((await self._ask(Kind.SERVER_LIVE, "", {}, timeout_s)).get("live"))
        except (UnavailableError, DeadlineError):
            return False

    async def _ask(
        self, kind: Kind, model: str, header: Any, timeout_s: float | None
    ) -> dict[str, Any]:
        encoded = messages.encode_header(header)

        async def work(connection: _Connection, deadline_ns: int) -> Frame:
            return await connection.request(kind, encoded, deadline_ns=deadline_ns)

        frame = await self._call(model, timeout_s, work)
        return messages.decode_document(frame.header, frame.body)

    async def _call(
        self,
        model: str,
        timeout_s: float | None,
        work: Callable[[_Connection, int], Awaitable[T]],
    ) -> T:
        """Do `work` on the model's connection, again and again while that may help."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_ns = self._now_ns() + int(timeout_s * 1e9)
        failures = 0
        before: EdgeError | None = None
        while True:
            remaining_s = (deadline_ns - self._now_ns()) / 1e9
            try:
                async with asyncio.timeout(remaining_s):
                    return await work(self._connection(model, remaining_s), deadline_ns)
            except TimeoutError as e:
                late = DeadlineError("no answer in time", where=f"{self.path} {model}".strip())
                raise out_of_time(late, before) from (before or e)
            except RETRYABLE as e:
                remaining_s = (deadline_ns - self._now_ns()) / 1e9
                await self._sleep(self._retry.delay_s(e, failures, remaining_s, self._rng))
                failures += 1
                before = plain(e)

    def _connection(self, model: str, timeout_s: float) -> _Connection:
        assert not self._closed, "the client is closed"
        connection = self._connections.get(model)
        if connection is None or connection.closed:
            connection = self._connect(model, timeout_s)
            self._connections[model] = connection
        return connection

    def _connect(self, model: str, timeout_s: float) -> _Connection:
        # Connecting to a unix socket does not wait, except for a full accept queue: then for 20 ms
        # at most, which the loop can bear, and again after a pause.
        try:
            return _Connection(self.path, model, self._own, min(timeout_s, 0.02))
        except DeadlineError as e:
            raise UnavailableError(e.message, where=e.where) from e

    async def _infer_once(
        self,
        connection: _Connection,
        arrays: Mapping[str, Array],
        wanted: tuple[str, ...],
        version: str,
        routing_key: str,
        priority: int,
        deadline_ns: int,
        copy: bool,
    ) -> InferResult:
        key = (version, wanted, *[(n, a.shape, a.dtype) for n, a in arrays.items()])
        while True:
            draft, numbers = await self._place(connection, key, arrays, wanted)
            header = draft.encode(connection.model, version, numbers, routing_key)
            try:
                frame = await connection.request(
                    Kind.INFER,
                    header,
                    draft.body(),
                    deadline_ns=deadline_ns,
                    priority=priority,
                    keep=draft,
                )
                break
            except TooLargeError:
                if not draft.rooms:
                    raise
                connection.rooms[key] = {}  # an output outgrew its place: let it travel
        try:
            plan = codec.understand(frame.header)
            outputs = codec.unpack(plan, frame.body, draft.rooms, copy=copy)
        except MalformedError as e:
            connection.close(e)
            raise
        self._learn_rooms(connection, key, plan)
        return InferResult(outputs, plan.model_version, frame.prefix.time_ns)

    async def _place(
        self,
        connection: _Connection,
        key: Any,
        arrays: Mapping[str, Array],
        wanted: tuple[str, ...],
    ) -> tuple[codec.Draft, dict[Arena, int]]:
        while True:
            draft = codec.draft(
                arrays,
                wanted,
                own=self._own,
                scratch=connection.scratch,
                room_sizes=connection.rooms.get(key, {}),
                shared_min_bytes=self._shared_min_bytes,
            )
            try:
                return draft, {arena: await connection.region(arena) for arena in draft.arenas()}
            except MalformedError:
                raise
            except (RequestError, OverloadedError):  # not allowed, or this user has too many
                connection.scratch = None

    def _learn_rooms(self, connection: _Connection, key: Any, plan: codec.ResponsePlan) -> None:
        if connection.scratch is None or key in connection.rooms:
            return
        large = codec.large_outputs(plan, self._shared_min_bytes)
        if large:
            if len(connection.rooms) >= ROOMS_MAX:
                connection.rooms.clear()
            connection.rooms[key] = large


async def _each(
    source: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any]]:
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item
