"""A worker in this process: its loop, a model of a few lines, and clients on real sockets.

Law of this file: helpers only, no test. The loop is the real one and runs in the test's own thread:
`settle()` runs it until there is nothing left to do, so nothing here sleeps, and whatever the loop
raises is raised in the test.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import EdgeError, RequestError
from edge_runtime.serving import (
    admission,
    channel,
    dispatch,
    intake,
    page,
    peers,
    plan,
    sleeping,
    worker,
)
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.spec import Limits, WorkerSpec
from edge_runtime.serving.worker import Worker
from edge_runtime.tensors import DATATYPES, TensorSpec, from_bytes
from edge_runtime.wire import messages, regions
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.reader import Frame, FrameReader

Array = np.ndarray[Any, Any]
WIDTH = 4
NAME = "m"
X = TensorSpec("x", "FP32", (-1, WIDTH))
Y = TensorSpec("y", "FP32", (-1, WIDTH))
ANSWER_S_MAX = 10.0  # of waiting for a runner thread
# The modules whose `_monotonic_ns` is the clock of a worker.
CLOCKED = (worker, dispatch, sleeping, intake, admission, peers)


def double_plus_one(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The model that most tests serve: y = 2 x + 1."""
    with np.errstate(all="ignore"):  # a fuzz sends infinities
        return {"y": inputs["x"] * np.float32(2) + np.float32(1)}


class NumpyModel:
    """A `Model` around a function of arrays; `ran` has the first number of each run's input."""

    placement = (Placement("CPU"),)

    def __init__(
        self,
        function: Callable[[Mapping[str, Array]], dict[str, Array]] = double_plus_one,
        inputs: tuple[TensorSpec, ...] = (X,),
        outputs: tuple[TensorSpec, ...] = (Y,),
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.outputs = outputs
        self.concurrent = True
        self.keeps_state = False
        self.facts: dict[str, Any] = {}
        self.ran: list[Any] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        first = next(iter(inputs.values())).reshape(-1)
        self.ran.append(first[0].item() if first.size and first.dtype != object else None)
        return self.function(inputs)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        for array in (*inputs.values(), *outputs.values()):
            assert array is None or array.ctypes.data % array.itemsize == 0

        def run() -> dict[str, Array]:
            results = self.run(inputs)
            for name, into in outputs.items():
                if into is not None:
                    if into.shape != results[name].shape:
                        raise RequestError(f"{name}: {into.shape} for {results[name].shape}")
                    into[...] = results[name]
            return results

        return run


# --- frames ---------------------------------------------------------------------------------------


def tensor(name: str, array: Array, **parameters: Any) -> messages.TensorHeader:
    """The description of an array in a request; without parameters it is in the body."""
    parameters = parameters or {"binary_data_size": array.nbytes}
    kinds = {numpy: name for name, (numpy, _) in DATATYPES.items() if name != "BF16"}
    return messages.TensorHeader(
        name, kinds[str(array.dtype)], array.shape, messages.TensorParameters(**parameters)
    )


def infer(
    values: Array | float,
    request_id: int = 1,
    *,
    model: str = NAME,
    version: str = "",
    deadline_ns: int = 0,
    priority: int = 0,
    outputs: tuple[messages.RequestedOutput, ...] = (),
) -> bytes:
    """An INFER frame for `x` in the body; a number stands for a row of it."""
    if not isinstance(values, np.ndarray):
        values = np.full((1, WIDTH), values, dtype=np.float32)
    request = messages.InferRequest(model, (tensor("x", values),), version, outputs)
    return messages.encode_frame(
        Kind.INFER,
        messages.encode_header(request),
        values.tobytes(),
        request_id=request_id,
        time_ns=deadline_ns,
        priority=priority,
    )


def other(kind: int, document: Mapping[str, Any], request_id: int = 1, body: bytes = b"") -> bytes:
    """A frame of another kind."""
    return messages.encode_frame(
        kind, messages.encode_header(document), body, request_id=request_id
    )


def region_add(number: int, byte_size: int, request_id: int = 1) -> bytes:
    """A REGION_ADD frame; its descriptor is the sender's business."""
    document = {"model_name": NAME, "region": number, "byte_size": byte_size}
    return other(Kind.REGION_ADD, document, request_id)


class Answer(NamedTuple):
    """What a client sees of an answer; `code` is "" where it is no error."""

    request_id: int
    code: str
    kind: int
    header: bytes
    body: bytes

    def array(self, name: str = "y") -> Array:
        """An inline output."""
        assert not self.code, self.header
        offset = 0
        for output in messages.decode_infer_response(self.header).outputs:
            size = output.parameters.binary_data_size or 0
            if output.name == name:
                data = self.body[offset : offset + size]
                return from_bytes(data, output.datatype, output.shape)
            offset += size
        raise AssertionError(f"no output {name}")

    def error(self) -> EdgeError:
        return messages.decode_error(self.header)


def answer_of(frame: Frame) -> Answer:
    prefix = frame.prefix
    code = messages.decode_error(frame.header).code if prefix.kind == Kind.ERROR else ""
    return Answer(prefix.request_id, code, prefix.kind, frame.header, bytes(frame.body))


# --- the worker -----------------------------------------------------------------------------------


class _Idle(Exception):
    """Nothing is left to do."""


class _Stepper:
    """An epoll that raises instead of waiting for something that cannot come by itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._real = worker._epoll
        self.stalled = False

    def poll(self, timeout_s: float) -> list[tuple[int, int]]:
        ready = self._real.poll(0)
        if ready or timeout_s == 0:
            return ready
        runners = self._worker._runners
        if runners is None or runners.idle == runners.count or self.stalled:
            raise _Idle
        ready = self._real.poll(ANSWER_S_MAX)
        assert ready, "a runner did not answer"
        return ready

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _LastRequest:
    """Ends the runner thread that looks at it; those of a real worker end with its process.

    They must be gone before their descriptor's number is used again.
    """

    @property
    def slot(self) -> None:
        raise SystemExit


class Client:
    """The other end of a served connection."""

    def __init__(self, rig: Rig, sock: socket.socket) -> None:
        self.rig = rig
        self.sock = sock
        self.closed = False  # the worker has closed it
        self._reader = FrameReader()
        self._got: list[Answer] = []

    def send(self, data: bytes, fds: Iterable[int] = ()) -> Client:
        """Send all of it, the worker taking its turns whenever the socket is full."""
        fds, full = list(fds), 0
        view = memoryview(data)
        while view and not self.closed:
            try:
                sent = socket.send_fds(self.sock, [view], fds) if fds else self.sock.send(view)
            except BlockingIOError:
                full += 1
                assert full < 4, "the worker does not read"
                self.rig.settle()
                full = 0 if self._receive() else full
                continue
            except (BrokenPipeError, ConnectionResetError):
                return self
            fds, full = [], 0
            view = view[sent:]
        return self

    def _receive(self) -> bool:
        """Take everything that is there; whether there was anything."""
        had = len(self._got)
        while not self.closed:
            try:
                data = self.sock.recv(1 << 18)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self.closed = not data
            self._reader.feed(data)
            had = -1
        while (frame := self._reader.next_frame()) is not None:
            assert isinstance(frame, Frame)
            self._got.append(answer_of(frame))
        return len(self._got) != had

    def answers(self) -> list[Answer]:
        """Everything that came since the last call, until the worker has nothing left to do."""
        self.rig.settle()
        while self._receive():
            self.rig.settle()
        got, self._got = self._got, []
        return got

    def ask(self, data: bytes, fds: Iterable[int] = ()) -> Answer:
        """One frame, one answer."""
        (answer,) = self.send(data, fds).answers()
        return answer

    def close(self) -> None:
        self.sock.close()
        self.closed = True


class Rig:
    """One worker, the supervisor's end of its channel, and its clients."""

    def __init__(
        self,
        model: NumpyModel | None = None,
        *,
        runners: int = 0,
        batch_axis: int | None = 0,
        free: frozenset[str] = frozenset(),
        metadata: bytes = b"{}",
        version: int = 1,
        batch_rows_max: int = 1,
        batch_window_ms: float = 0.0,
        cache_bytes_max: int = 0,
        spin_us: float = 0.0,
        **limits: int,
    ) -> None:
        self.model = model or NumpyModel()
        inputs, outputs = self.model.inputs, self.model.outputs
        self.spec = WorkerSpec(
            model=NAME,
            version=version,
            generation=1,
            variant="fp32",
            backend="numpy",
            artifact="/nowhere",
            artifact_sha256="",
            inputs=inputs,
            outputs=outputs,
            batch_axis=batch_axis,
            metadata=metadata,
            batch_window_ms=batch_window_ms,
            cache_bytes_max=cache_bytes_max,
            spin_us=spin_us,
            limits=Limits(**limits),
        )
        self.control, self._theirs = channel.pair()
        self.control.setblocking(False)
        self.status = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
        planner = plan.Planner(
            self.model, NAME, version, batch_axis, inputs, outputs, free, batch_rows_max
        )
        others = set(threading.enumerate())
        self.worker = Worker(self.spec, planner, self._theirs, self.status, runners, batch_rows_max)
        self._threads = set(threading.enumerate()) - others
        self.stepper = _Stepper(self.worker)
        self.worker._epoll = self.stepper  # type: ignore[assignment]
        self.clients: list[Client] = []

    def settle(self) -> None:
        """Run the loop until there is nothing to do."""
        try:
            self.worker.serve()
        except _Idle:
            return

    def connections(self) -> list[Connection]:
        return list(self.worker._peers.by_fd.values())

    def client(self, *, buffer_bytes: int = 0) -> Client:
        """A new connection, adopted; `buffer_bytes`: of the worker's send buffer."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        if buffer_bytes:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        client = Client(self, ours)
        self.clients.append(client)
        self.adopt(channel.Adopt(own=False), [theirs.fileno()])
        theirs.close()
        return client

    def adopt(self, message: channel.Adopt, fds: list[int]) -> None:
        """Hand a connection over; `fds` stay the caller's."""
        channel.send(self.control, message, fds)
        self.settle()

    def tell(self, message: channel.Message) -> None:
        channel.send(self.control, message)
        self.settle()

    def told(self) -> list[tuple[channel.Message, list[int]]]:
        """What the worker has sent to the supervisor."""
        found = []
        while True:
            try:
                message, fds = channel.receive(self.control)
            except BlockingIOError:
                return found
            if message is None:
                return found
            found.append((message, fds))

    def drain(self) -> list[tuple[channel.Returned, list[int]]]:
        """Tell it to hand everything back; what came back."""
        self.tell(channel.Drain())
        return self.returned()

    def returned(self) -> list[tuple[channel.Returned, list[int]]]:
        return [
            (message, fds) for message, fds in self.told() if isinstance(message, channel.Returned)
        ]

    def take_over(self, other: Rig, returned: Iterable[tuple[channel.Returned, list[int]]]) -> None:
        """What the supervisor does with what another worker returned."""
        for message, fds in returned:
            self.adopt(adopt_of(message), fds)
            close_all(fds)
        for client in other.clients:
            client.rig = self
        self.clients += other.clients
        other.clients = []

    def close(self) -> None:
        """End everything, and say that nothing is left in use."""
        for client in self.clients:
            client.sock.close()
        self.settle()
        if self.control.fileno() >= 0:
            for _, fds in self.told():
                close_all(fds)
        for owner in self.connections():
            self.worker._peers.close(owner)
        used = self.worker._slots.used_bytes
        runners = self.worker._runners
        self.worker._epoll.close()
        if runners:
            for _ in self._threads:
                runners._todo.put(([_LastRequest()], None))  # type: ignore[list-item]
            # pytest's hook warns of SystemExit, Python's own does not.
            hook, threading.excepthook = threading.excepthook, threading.__excepthook__
            for thread in self._threads:
                thread.join(ANSWER_S_MAX)
                assert not thread.is_alive()
            threading.excepthook = hook
            os.close(runners.wake_fd)
        self.control.close()
        self._theirs.close()
        assert used == 0, f"{used} bytes of slots are never given back"


def adopt_of(message: channel.Returned) -> channel.Adopt:
    """The same connection, handed on."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return channel.Adopt(**fields)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def open_descriptors() -> list[str]:
    """What this process has open: number and target of each descriptor."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            pass  # the directory's own
    return sorted(found)


def memfd(byte_size: int = 4096, *, fill: Array | None = None) -> int:
    """A sealed memfd, as a client makes one."""
    fd = regions.create_region(byte_size)
    if fill is not None:
        os.pwrite(fd, fill.tobytes(), 0)
    return fd


class Gate:
    """A model that waits in its run until it is let go: for runner threads."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.entered.release()
        assert self.open.wait(ANSWER_S_MAX)
        return double_plus_one(inputs)
