"""A small daemon on real sockets, for tests of the command line.

It speaks the real frames (edge_runtime.wire) on DIR/control.sock and DIR/infer.sock, answers with
what a test puts in, and remembers what it was asked.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edge_runtime import tensors
from edge_runtime.cli import main
from edge_runtime.errors import EdgeError, NotFoundError
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.reader import Frame, FrameReader
from tests.wire.receiving import received

Arrays = dict[str, Any]


class Reply(NamedTuple):
    """What a control command is answered with: events first, then the document or the error."""

    document: dict[str, Any] | EdgeError
    events: tuple[dict[str, Any], ...] = ()


class Asked(NamedTuple):
    """A control command as it arrived; `files` is the content of the descriptors."""

    command: str
    arguments: dict[str, Any]
    files: list[bytes]


class Model(NamedTuple):
    """A model of the infer socket: its metadata and what it computes."""

    metadata: dict[str, Any]
    run: Callable[[Arrays], Arrays]
    ready: bool = True


class FakeDaemon:
    """Both sockets, a thread each, connections one after the other."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.replies: dict[str, Reply | EdgeError | dict[str, Any]] = {}
        self.models: dict[str, Model] = {}
        self.asked: list[Asked] = []
        self._listeners = []
        for name, answer in (("control", self._control), ("infer", self._infer)):
            listener = sockets.listen_unix(run_dir / f"{name}.sock", 0o600)
            listener.setblocking(True)
            self._listeners.append(listener)
            threading.Thread(target=self._accept, args=(listener, answer), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners:
            # shutdown wakes the accept that close alone leaves waiting
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket, answer: Callable[..., bytes]) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, answer), daemon=True).start()

    def _serve(self, connection: socket.socket, answer: Callable[..., bytes]) -> None:
        reader = FrameReader()
        fds: list[int] = []
        with connection:
            while True:
                while (frame := reader.next_frame()) is not None:
                    assert isinstance(frame, Frame)
                    try:
                        data = answer(frame, fds)
                    except EdgeError as error:
                        data = messages.encode_error(error, frame.prefix.request_id)
                    fds = []
                    try:
                        connection.sendall(data)
                    except OSError:
                        return
                try:
                    size, new = received(connection, reader.get_buffer())
                except OSError:
                    return
                if not size:
                    return
                fds += new
                reader.advance(size)

    def _control(self, frame: Frame, fds: list[int]) -> bytes:
        command, arguments = messages.decode_control(frame.header)
        files = []
        for fd in fds:
            with os.fdopen(fd, "rb") as file:
                files.append(file.read())
        self.asked.append(Asked(command, arguments, files))
        reply = self.replies.get(command)
        if reply is None:
            raise NotFoundError(f"no command {command!r}")
        if not isinstance(reply, Reply):
            reply = Reply(reply)
        request_id = frame.prefix.request_id
        out = [
            messages.encode_document(frames.Kind.EVENT, event, request_id=request_id)
            for event in reply.events
        ]
        if isinstance(reply.document, EdgeError):
            out.append(messages.encode_error(reply.document, request_id))
        else:
            kind = frames.Kind.CONTROL | frames.RESPONSE
            out.append(messages.encode_document(kind, reply.document, request_id=request_id))
        return b"".join(out)

    def _infer(self, frame: Frame, fds: list[int]) -> bytes:
        name = messages.model_name_of(frame.header)
        if name not in self.models:
            raise NotFoundError(f"there is no model {name!r}")
        model, kind = self.models[name], frame.prefix.kind
        request_id = frame.prefix.request_id
        document: dict[str, Any] = model.metadata
        if kind == frames.Kind.MODEL_READY:
            document = {"name": name, "ready": model.ready}
        if kind == frames.Kind.INFER:
            return _run(model, frame)
        return messages.encode_document(kind | frames.RESPONSE, document, request_id=request_id)


def _run(model: Model, frame: Frame) -> bytes:
    request = messages.decode_infer_request(frame.header)
    inputs, offset = {}, 0
    for header in request.inputs:
        size = header.parameters.binary_data_size or 0
        data = frame.body[offset : offset + size]
        inputs[header.name] = tensors.from_bytes(data, header.datatype, header.shape)
        offset += size
    outputs = model.run(inputs)
    if request.outputs:
        outputs = {wanted.name: outputs[wanted.name] for wanted in request.outputs}
    bodies = [bytes(tensors.to_bytes(array)) for array in outputs.values()]
    headers = tuple(
        messages.TensorHeader(
            name=name,
            datatype=tensors.datatype_of(array.dtype),
            shape=array.shape,
            parameters=messages.TensorParameters(binary_data_size=len(body)),
        )
        for (name, array), body in zip(outputs.items(), bodies, strict=True)
    )
    response = messages.InferResponse(request.model_name, "7", headers)
    return messages.encode_frame(
        frames.Kind.INFER | frames.RESPONSE,
        messages.encode_header(response),
        b"".join(bodies),
        request_id=frame.prefix.request_id,
        time_ns=123_000,
    )


def classifier(shape: list[int], **parameters: Any) -> Model:
    """A model of ten classes that answers with the brightness of its input: 0 dark, 9 bright."""

    def run(inputs: Arrays) -> Arrays:
        scores = np.zeros((1, 10), np.float32)
        scores[0, min(int(inputs["image"].mean() * 10), 9)] = 5.0
        return {"scores": scores}

    metadata = {
        "name": "brightness",
        "versions": ["7"],
        "platform": "reference",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": shape}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
        "parameters": parameters,
    }
    return Model(metadata, run)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: the kernel gives a socket's path 107 bytes, and pytest's names are long."""
    path = Path(tempfile.mkdtemp(prefix="edge-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def daemon(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon whose run directory is the default of the commands run in this test."""
    fake = FakeDaemon(run_dir)
    monkeypatch.setenv("EDGE_RUNTIME_RUN_DIR", str(run_dir))
    yield fake
    fake.close()


class Done(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def edge(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process."""

    def run(*words: object) -> Done:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def run_process(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m edge_runtime` in a process of its own."""
    command = [sys.executable, "-m", "edge_runtime", *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=60, check=False, **options)
