"""`Client`: blocking, thread-safe, numpy in and numpy out.

Law of this file: which connection, when to retry, what the caller gets. Sockets are in
`connection`, arrays and headers in `codec`, shared memory in `memory`.

One connection per model, made when first needed; a lock per connection, so that threads that use
one client for one model take turns (give each thread its own client, or use `infer_many` or
`AsyncClient`, to have several requests at the server at once). A request that gets no answer in
time closes its connection: the server sees that nobody waits any more, and nothing late can be
taken for the answer to the next request. After a fork the child starts with fresh connections and
memory.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from edge_runtime.client import codec
from edge_runtime.client.codec import InferResult
from edge_runtime.client.connection import Connection, Flight
from edge_runtime.client.memory import Pool
from edge_runtime.client.retry import RETRYABLE, RetryPolicy, out_of_time, plain
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import DeadlineError, EdgeError, UnavailableError
from edge_runtime.wire import messages
from edge_runtime.wire.frames import Kind

if TYPE_CHECKING:
    from edge_runtime.tensors import Array

# From this size on, bytes of a tensor are cheaper in shared memory than through a socket.
SHARED_MEMORY_MIN_BYTES = 65536
WINDOW = 16  # requests of infer_many at the server at once: enough to fill a batch, few to lose

P = ParamSpec("P")
T = TypeVar("T")


class _Channel:
    """The place of the connection to one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection: Connection | None = None

    def drop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Client:
    """A client of `infer.sock` (any model) or of a model's own socket.

    Args:
        path: of the socket.
        timeout_s: deadline of each call that names none; retries and back-off included.
        shared_memory_min_bytes: tensors from this size on go by shared memory.
        spin_us: look for an answer for so long before sleeping; 0: sleep at once. Saves the waking
            of a sleeping core at each call, costs a busy one meanwhile: for models of microseconds,
            where client and worker have a core each (docs/serving.md, "Spinning").
        retry: what to do about closed connections, models that are not ready, and overload.
        clock, rng, sleep: time and randomness, for tests.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float = 5.0,
        shared_memory_min_bytes: int = SHARED_MEMORY_MIN_BYTES,
        spin_us: float = 0.0,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._shared_min_bytes = shared_memory_min_bytes
        self._spin_us = spin_us
        self._retry = retry or RetryPolicy()
        self._now_ns = (clock or SystemClock()).monotonic_ns
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._closed = False
        self._start_afresh()
        _CLIENTS.add(self)

    def _start_afresh(self) -> None:
        self._channels: dict[str, _Channel] = {}
        self._own = Pool()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, waiting for calls of other threads; later calls are refused."""
        self._closed = True
        for channel in list(self._channels.values()):
            with channel.lock:
                channel.drop()

    def infer(
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
        """The model's outputs for these inputs.

        Args:
            inputs: by name; numpy arrays, or what numpy makes arrays of.
            outputs: names of those wanted; None: all.
            version: a version counter as text; "": the active one.
            priority: 0 to 255; larger is served earlier.
            routing_key: while two versions share the traffic (`edge-runtime split`), requests with
                the same key (a user, a camera) are answered by the same one; at most 256
                characters. "": each request is decided by its id.
            copy: false lets large outputs be views of shared memory: no copy. They are the
                caller's for as long as it holds them; until then their memory is not reused. (But
                shared memory is limited: who keeps many gets the later ones through the socket.)

        Raises:
            DeadlineError: no answer in time; its cause is the last failure.
            EdgeError: what the server answered: NotFoundError, RequestError, ModelError, ...
        """
        return self.infer_result(
            model,
            inputs,
            outputs=outputs,
            version=version,
            timeout_s=timeout_s,
            priority=priority,
            routing_key=routing_key,
            copy=copy,
        ).outputs

    def infer_result(
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
        """As `infer`, with the version that answered and the server's time."""
        if timeout_s is None:
            timeout_s = self.timeout_s
        for array in inputs.values():
            if type(array) is not np.ndarray:
                inputs = codec.as_arrays(inputs)
                break
        return self._call(
            model,
            self._now_ns() + int(timeout_s * 1e9),
            timeout_s,
            Connection.infer,
            inputs,
            () if outputs is None else tuple(outputs),
            version,
            routing_key,
            priority,
            copy,
        )

    def infer_many(
        self,
        model: str,
        inputs: Iterable[Mapping[str, Any]],
        *,
        window: int = WINDOW,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        routing_key: str = "",
    ) -> Iterator[dict[str, Array]]:
        """Outputs for each of `inputs`, in order, with up to `window` requests at the server.

        Uses a connection of its own, which closes with the iterator; requests that a broken
        connection loses are sent again. `timeout_s` is for each request from its first sending.

        Raises:
            As `infer`, at the request that it concerns; the iterator ends there.
        """
        assert window >= 1
        key = (version, () if outputs is None else tuple(outputs), routing_key)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        run = _Pipeline(self, model, key, timeout_s, priority)
        source = iter(inputs)
        try:
            while True:
                while len(run.items) < window and (item := next(source, None)) is not None:
                    run.add(codec.as_arrays(item))
                if not run.items:
                    return
                yield run.take_first()
        finally:
            run.close()

    def tensor(self, shape: Sequence[int], dtype: Any) -> Array:
        """An array of unset content in shared memory: an infer with it (or with a contiguous part
        of it, from `shared_memory_min_bytes` on) copies nothing.

        It is the caller's; its memory is used again when it and all its views are gone. While an
        infer with it runs, do not write to it. When shared memory is used up: an ordinary array.
        """
        shape, dtype = tuple(shape), np.dtype(dtype)
        array = self._own.array(shape, dtype)
        return np.empty(shape, dtype) if array is None else array

    def metadata(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> dict[str, Any]:
        """OIP ModelMetadataResponse as a dict. Raises as infer."""
        return self._ask(Kind.MODEL_METADATA, model, messages.ModelRef(model, version), timeout_s)

    def ready(self, model: str, *, version: str = "", timeout_s: float | None = None) -> bool:
        """Whether the model would answer now. Raises as infer."""
        header = messages.ModelRef(model, version)
        return bool(self._ask(Kind.MODEL_READY, model, header, timeout_s).get("ready"))

    def server_metadata(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """OIP ServerMetadataResponse as a dict. Raises as infer."""
        return self._ask(Kind.SERVER_METADATA, "", {}, timeout_s)

    def live(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server answers; false, and not an error, when nobody listens."""
        try:
            return bool(self._ask(Kind.SERVER_LIVE, "", {}, timeout_s).get("live"))
        except (UnavailableError, DeadlineError):
            return False

    # Connections and retries

    def _ask(self, kind: Kind, model: str, header: Any, timeout_s: float | None) -> dict[str, Any]:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_ns = self._now_ns() + int(timeout_s * 1e9)
        encoded = messages.encode_header(header)
        frame = self._call(model, deadline_ns, timeout_s, Connection.request, kind, encoded)
        return messages.decode_document(frame.header, frame.body)

    def _call(
        self,
        model: str,
        deadline_ns: int,
        timeout_s: float,
        work: Callable[Concatenate[Connection, int, float, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do `work` on the model's connection, again and again while that may help."""
        failures = 0
        before: EdgeError | None = None
        while True:
            try:
                channel = self._channels.get(model) or self._channels.setdefault(model, _Channel())
                lock = channel.lock
                if not lock.acquire(False):
                    if not lock.acquire(timeout=max(0.0, timeout_s)):
                        raise DeadlineError(
                            "other threads kept the connection busy", where=self.path
                        )
                    timeout_s = (deadline_ns - self._now_ns()) / 1e9
                try:
                    connection = channel.connection
                    if connection is None:
                        connection = channel.connection = self.connect(model, timeout_s)
                    return work(connection, deadline_ns, timeout_s, *args, **kwargs)
                except BaseException:
                    if channel.connection is not None and channel.connection.busy:
                        channel.drop()
                    raise
                finally:
                    lock.release()
            except DeadlineError as e:
                if before is None:
                    raise
                raise out_of_time(e, before) from before
            except RETRYABLE as e:
                self.pause(e, failures, deadline_ns)
                failures += 1
                before = plain(e)
                timeout_s = (deadline_ns - self._now_ns()) / 1e9

    def connect(self, model: str, timeout_s: float) -> Connection:
        """A new connection for one model."""
        assert not self._closed, "the client is closed"
        return Connection(
            self.path,
            model,
            timeout_s=timeout_s,
            now_ns=self._now_ns,
            own=self._own,
            shared_min_bytes=self._shared_min_bytes,
            spin_us=self._spin_us,
        )

    def pause(self, error: EdgeError, failures: int, deadline_ns: int) -> None:
        """Wait before another attempt, or raise: see RetryPolicy.delay_s."""
        remaining_s = (deadline_ns - self._now_ns()) / 1e9
        delay_s = self._retry.delay_s(error, failures, remaining_s, self._rng)
        if delay_s > 0:
            self._sleep(delay_s)

    def deadline_ns(self, timeout_s: float) -> int:
        """On the client's clock."""
        return self._now_ns() + int(timeout_s * 1e9)


class _Item:
    """One request of a pipeline. `flight` is None until it is sent, and again when it was lost."""

    def __init__(self, inputs: dict[str, Array]) -> None:
        self.inputs = inputs
        self.key = sum(((name, a.shape, a.dtype) for name, a in inputs.items()), ())
        self.deadline_ns = 0
        self.flight: Flight | None = None


class _Pipeline:
    """The requests of one `infer_many`, first to last, over one connection at a time."""

    def __init__(
        self,
        client: Client,
        model: str,
        key: tuple[str, tuple[str, ...], str],
        timeout_s: float,
        priority: int,
    ) -> None:
        self._client = client
        self._model = model
        self._key = key
        self._timeout_s = timeout_s
        self._priority = priority
        self._connection: Connection | None = None
        self.items: deque[_Item] = deque()

    def add(self, inputs: dict[str, Array]) -> None:
        self.items.append(_Item(inputs))

    def take_first(self) -> dict[str, Array]:
        """Send what is not sent, wait for the first, again and again while that may help."""
        failures = 0
        while True:
            try:
                connection = self._send_all()
                first = self.items[0]
                assert first.flight is not None
                result = connection.finish(first.flight, first.deadline_ns, True)
                self.items.popleft()
                return result.outputs
            except RETRYABLE as e:
                self.items[0].flight = None
                if self._connection is None or self._connection.busy:
                    self.close()
                self._client.pause(e, failures, self.items[0].deadline_ns)
                failures += 1

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for item in self.items:
            item.flight = None

    def _send_all(self) -> Connection:
        for item in self.items:
            item.deadline_ns = item.deadline_ns or self._client.deadline_ns(self._timeout_s)
        if self._connection is None:
            self._connection = self._client.connect(self._model, self._timeout_s)
        for item in self.items:
            if item.flight is None:
                item.flight = self._connection.submit(
                    item.deadline_ns, (*self._key, *item.key), item.inputs, self._priority
                )
        return self._connection


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Nothing of the parent may be used: its locks may be held, its connections carry its answers,
    its shared memory holds its tensors. The parent's own descriptors stay as they are."""
    for client in list(_CLIENTS):
        client._start_afresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
