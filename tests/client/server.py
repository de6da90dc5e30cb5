"""A small server of the protocol, for tests: real sockets and regions, faults on demand.

It is written for being understood beside docs/protocol.md, one thread per connection, and not for
speed. `affine`: input x FP32 [-1,16], output y = 2x + 1. `identity`: every input comes back under
its own name, whatever its datatype and shape. `digest`: of every input, INT64 [CRC-32 of its bytes,
*its shape]; a request with large inputs and small outputs.
"""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnavailableError,
)
from edge_runtime.wire import messages, regions, sockets
from edge_runtime.wire.frames import RESPONSE, Kind
from edge_runtime.wire.messages import InferResponse, TensorHeader, TensorParameters
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge
from tests.wire.receiving import received

METADATA = {
    "affine": {
        "name": "affine",
        "versions": ["7"],
        "platform": "numpy",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 16]}],
        "parameters": {"batch_axis": 0, "labels": [f"label number {n}" for n in range(5000)]},
    },
    "identity": {
        "name": "identity",
        "versions": ["1"],
        "platform": "numpy",
        "inputs": [],
        "outputs": [],
    },
}


def affine(inputs: dict[str, Any]) -> dict[str, Any]:
    if set(inputs) != {"x"}:
        raise RequestError(f"inputs {sorted(inputs)}", expected="x")
    x = inputs["x"]
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != 16:
        raise RequestError(f"x is {x.dtype} {list(x.shape)}", expected="FP32 [-1,16]")
    return {"y": x * np.float32(2) + np.float32(1)}


def identity(inputs: dict[str, Any]) -> dict[str, Any]:
    return dict(inputs)


def digest(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.array([zlib.crc32(tensors.to_bytes(array)), *array.shape], np.int64)
        for name, array in inputs.items()
    }


MODELS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "affine": affine,
    "identity": identity,
    "digest": digest,
}


@dataclass
class Faults:
    """Each counter is used up by the requests (INFER unless said otherwise) that it spoils."""

    overloaded: int = 0
    unavailable: int = 0
    retry_after_s: float = 0.0
    close_before_answer: int = 0
    close_inside_answer: int = 0
    delay_s: float = 0.0
    delays: int = 0
    stray_frames: int = 0
    nonsense_header: int = 0
    nonsense_bytes: int = 0
    answer_header: bytes | None = None  # instead of the right one
    refuse_regions: bool = False
    trickle: bool = False  # answers leave in pieces of 7 bytes
    shuffle: int = 0  # hold answers back until that many are there, then send them last first
    seen: list[dict[str, Any]] = field(default_factory=list)

    def use(self, name: str) -> bool:
        left = getattr(self, name)
        if left:
            setattr(self, name, left - 1)
        return bool(left)


class Server:
    """Listens at once; `close()` ends it and all its threads."""

    def __init__(self, path: Path, *, body_size_max: int = 1 << 20) -> None:
        self.path = str(path)
        self.faults = Faults()
        self.connections_accepted = 0
        self.control: dict[str, Callable[..., dict[str, Any]]] = {}
        self._body_size_max = body_size_max
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = sockets.listen_unix(path)
        self._listener.setblocking(True)
        self._start(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def drop_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # gone already
                    pass

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections_accepted += 1
            with self._lock:
                self._open.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            Peer(self, connection, self._body_size_max).serve()
        except OSError:  # the client went away
            pass
        finally:
            with self._lock:
                self._open.remove(connection)
                connection.close()


class Peer:
    """One connection."""

    def __init__(self, server: Server, connection: socket.socket, body_size_max: int) -> None:
        self.server = server
        self.faults = server.faults
        self.socket = connection
        self.reader = FrameReader(body_size_max=body_size_max)
        self.fds: list[int] = []
        self.regions: dict[int, regions.Region] = {}
        self.held: list[bytes] = []

    def serve(self) -> None:
        try:
            while self._receive():
                while (frame := self.reader.next_frame()) is not None:
                    if not self._handle(frame):
                        return
        except RequestError as e:  # malformed
            self.socket.sendall(messages.encode_error(e, self.reader.failed_request_id))
        finally:
            sockets.close_fds(self.fds)

    def _receive(self) -> bool:
        size, fds = received(self.socket, self.reader.get_buffer())
        self.fds += fds
        self.reader.advance(size)
        return bool(size)

    def _handle(self, frame: Frame | TooLarge) -> bool:
        request_id = frame.prefix.request_id
        try:
            if isinstance(frame, TooLarge):
                raise frame.error
            answer = self._answer(frame)
        except EdgeError as e:
            answer = messages.encode_error(e, request_id)
        if answer is None:
            return False
        self._send(answer, frame.prefix.kind)
        return True

    def _send(self, answer: bytes, kind: int) -> None:
        if kind == Kind.INFER and self.faults.shuffle:
            self.held.append(answer)
            if len(self.held) < self.faults.shuffle:
                return
            answer, self.held = b"".join(reversed(self.held)), []
        step = 7 if self.faults.trickle else len(answer)
        for at in range(0, len(answer), step):
            self.socket.sendall(answer[at : at + step])

    def _answer(self, frame: Frame) -> bytes | None:
        kind, request_id = frame.prefix.kind, frame.prefix.request_id
        if kind == Kind.INFER:
            return self._infer(frame)
        if kind == Kind.CONTROL:
            return self._control(frame)
        document: Any = {}
        if kind == Kind.REGION_ADD:
            self._region_add(messages.decode_region_add(frame.header))
        elif kind == Kind.REGION_DROP:
            self.regions.pop(messages.decode_region_drop(frame.header).region, None)
        elif kind == Kind.MODEL_METADATA:
            document = METADATA[self._known(messages.model_name_of(frame.header))]
        elif kind == Kind.MODEL_READY:
            document = {"name": self._known(messages.model_name_of(frame.header)), "ready": True}
        elif kind == Kind.SERVER_METADATA:
            document = messages.ServerMetadata("edge-runtime", "0", ("shared_memory",))
        elif kind == Kind.SERVER_LIVE:
            document = {"live": True}
        elif kind == Kind.SERVER_READY:
            document = {"ready": True}
        else:
            raise RequestError(f"a client does not send frames of kind {kind:#04x}")
        return messages.encode_document(kind | RESPONSE, document, request_id=request_id)

    def _known(self, name: str) -> str:
        if name not in MODELS:
            raise NotFoundError(f"no model {name!r}", expected="one of " + ", ".join(MODELS))
        return name

    def _region_add(self, add: messages.RegionAdd) -> None:
        if not self.fds:
            raise RequestError("no descriptor came with the frame")
        fd = self.fds.pop(0)
        if self.faults.refuse_regions:
            sockets.close_fds([fd])
            raise RequestError("this server takes no regions")
        self.regions[add.region] = regions.adopt_region(fd, add.byte_size)

    def _infer(self, frame: Frame) -> bytes | None:
        faults, prefix = self.faults, frame.prefix
        if faults.use("overloaded"):
            raise OverloadedError("queue full", retry_after_s=faults.retry_after_s or None)
        if faults.use("unavailable"):
            raise UnavailableError("loading", retry_after_s=faults.retry_after_s or None)
        if faults.use("close_before_answer"):
            return None
        started_ns = time.monotonic_ns()
        if faults.use("delays"):
            time.sleep(faults.delay_s)  # a slow model
        if prefix.time_ns and time.monotonic_ns() > prefix.time_ns and not faults.delay_s:
            raise DeadlineError("too late")
        request = messages.decode_infer_request(frame.header)
        faults.seen.append(
            {"request": request, "body_size": prefix.body_size, "priority": prefix.priority}
        )
        inputs = self._inputs(request, frame)
        outputs = MODELS[self._known(request.model_name)](inputs)
        header, body = self._outputs(request, outputs)
        if faults.use("nonsense_header"):
            header = b'{"model_name": "affine", "outputs": [{}]}'
        if faults.answer_header is not None:
            header = faults.answer_header
        answer = messages.encode_frame(
            Kind.INFER | RESPONSE,
            header,
            body,
            request_id=prefix.request_id,
            time_ns=time.monotonic_ns() - started_ns,
        )
        if faults.use("stray_frames"):
            stray = messages.encode_frame(Kind.INFER | RESPONSE, header, body, request_id=1 << 60)
            answer = stray + answer
        if faults.use("nonsense_bytes"):
            answer = b"HTTP/1.1 400 Bad Request\r\n\r\n" + answer
        if faults.use("close_inside_answer"):
            self.socket.sendall(answer[:-3])
            return None
        return answer

    def _inputs(self, request: messages.InferRequest, frame: Frame) -> dict[str, Any]:
        if messages.body_size_of(request.inputs) != frame.prefix.body_size:
            raise RequestError("sizes of the inputs and of the body differ")
        offset = 0
        inputs = {}
        for tensor in request.inputs:
            size = tensor.parameters.binary_data_size
            if size is None:
                data = self._place(tensor.parameters)
            else:
                data = frame.body[offset : offset + size]
                offset += size
            inputs[tensor.name] = tensors.from_bytes(data, tensor.datatype, tensor.shape)
        return inputs

    def _place(self, where: TensorParameters) -> memoryview:
        region = self.regions.get(
            -1 if where.shared_memory_region is None else where.shared_memory_region
        )
        end = where.shared_memory_offset + where.shared_memory_byte_size
        if region is None or end > region.size_bytes:
            raise RequestError(f"no such place: {where}")
        return memoryview(region.memory)[where.shared_memory_offset : end]

    def _outputs(
        self, request: messages.InferRequest, outputs: dict[str, Any]
    ) -> tuple[bytes, bytes]:
        wanted = {output.name: output.parameters for output in request.outputs}
        if missing := set(wanted) - set(outputs):
            raise RequestError(f"no outputs {sorted(missing)}")
        headers = []
        body = b""
        for name, array in outputs.items():
            if wanted and name not in wanted:
                continue
            data = tensors.to_bytes(array)
            where = wanted.get(name, TensorParameters())
            if where.shared_memory_region is None:
                parameters = TensorParameters(binary_data_size=data.nbytes)
                body += data
            else:
                room = self._place(where)
                if len(room) < data.nbytes:
                    raise TooLargeError(f"output {name} of {data.nbytes} bytes")
                room[: data.nbytes] = data
                parameters = TensorParameters(
                    None, where.shared_memory_region, where.shared_memory_offset, data.nbytes
                )
            datatype = tensors.datatype_of(array.dtype)
            headers.append(TensorHeader(name, datatype, array.shape, parameters))
        response = InferResponse(request.model_name, request.model_version or "7", tuple(headers))
        return messages.encode_header(response), body

    def _control(self, frame: Frame) -> bytes | None:
        command, arguments = messages.decode_control(frame.header)
        if command not in self.server.control:
            raise NotFoundError(f"no command {command!r}")

        def event(**document: Any) -> None:
            self.socket.sendall(
                messages.encode_document(Kind.EVENT, document, request_id=frame.prefix.request_id)
            )

        fds, self.fds = self.fds, []
        try:
            answer = self.server.control[command](event=event, fds=fds, **arguments)
        finally:
            sockets.close_fds(fds)
        return messages.encode_document(
            Kind.CONTROL | RESPONSE, answer, request_id=frame.prefix.request_id
        )
