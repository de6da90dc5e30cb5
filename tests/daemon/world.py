"""The world around a daemon under test: bundles to install, the process itself, raw connections.

Law of this file: helpers only, no test. A `Daemon` is the real program in a process of its own; it
is told apart from every other by a mark in its environment, which its children inherit, so that
whatever outlives it is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import (
    Blob,
    Budgets,
    Golden,
    GoldenTensor,
    Manifest,
    Tolerance,
    Variant,
)
from edge_runtime.bundle.source import from_bytes
from edge_runtime.client import Client
from edge_runtime.client.control import ControlClient
from edge_runtime.client.retry import RetryPolicy
from edge_runtime.errors import EdgeError
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge

HERE = Path(__file__).parent
WIDTH = 16
NO_BLOB = Blob("0" * 64, 0)  # in a variant whose artifact is put in its place later
# Quick enough for a test, and the doubling still shows.
QUICK_RESTART = {"backoff_initial_s": 0.02, "backoff_max_s": 0.3, "deaths_max": 3, "window_s": 60}


def until(condition: Callable[[], Any], what: str = "it", timeout_s: float = 15.0) -> Any:
    """Poll until `condition()` is true; what it returned."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.005)


# --- bundles --------------------------------------------------------------------------------------


def affine(scale: float = 2.0, offset: float = 1.0, width: int = WIDTH) -> dict[str, Any]:
    """A reference document: x FP32 [-1, width] -> y = scale x + offset."""
    return {
        "format": "edge-runtime-reference",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, width]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, width]}],
        "nodes": [
            {"op": "affine", "inputs": ["x"], "output": "y", "scale": scale, "offset": offset}
        ],
    }


def fault(action: str, **more: Any) -> dict[str, Any]:
    """Options of a variant whose runs (or load) go wrong."""
    return {"faults": [{"action": action, **more}]}


def bundle(
    directory: Path,
    name: str,
    version: int = 1,
    *,
    scale: float = 2.0,
    offset: float = 1.0,
    width: int = WIDTH,
    options: dict[str, Any] | None = None,
    backend: str = "reference",
    golden_off: float | None = None,
    variants: Sequence[tuple[str, dict[str, Any]]] = (),
    memory_bytes: int = 0,
    device_class: str = "cpu",
) -> Path:
    """Pack a bundle of the affine reference model.

    Args:
        golden_off: with a golden, whose recorded answer is wrong by this; None: no golden.
        variants: (name, options) of several variants of the same artifact instead of one.
        memory_bytes: as the manifest's budgets state it.
    """
    artifact = json.dumps(affine(scale, offset, width)).encode()
    blobs = {_sha(artifact): artifact}
    blob = Blob(_sha(artifact), len(artifact), f"{name}.reference.json")
    goldens: tuple[Golden, ...] = ()
    if golden_off is not None:
        x = np.linspace(0, 1, width, dtype=np.float32).reshape(1, width)
        y = x * np.float32(scale) + np.float32(offset) + np.float32(golden_off)
        goldens = (Golden((_golden("x", x, blobs),), (_golden("y", y, blobs),)),)
    shape = (-1, width)
    manifest = Manifest(
        schema=1,
        name=name,
        version=version,
        inputs=(TensorSpec("x", "FP32", shape),),
        outputs=(TensorSpec("y", "FP32", shape),),
        batch_axis=0,
        variants=tuple(
            Variant(
                *(label, backend, blob, "fp32", device_class),
                options=given,
                tolerance=Tolerance(),
            )
            for label, given in (variants or [("fp32", options or {})])
        ),
        goldens=goldens,
        budgets=Budgets(memory_bytes=memory_bytes),
    )
    return _packed(directory, manifest, blobs)


def packed_document(directory: Path, name: str, version: int, data: bytes) -> Path:
    """Pack a bundle of the affine model's inputs and outputs around an artifact as given."""
    specs = (TensorSpec("x", "FP32", (-1, WIDTH)),), (TensorSpec("y", "FP32", (-1, WIDTH)),)
    artifact = Blob(_sha(data), len(data), f"{name}.reference.json")
    manifest = Manifest(
        schema=1,
        name=name,
        version=version,
        inputs=specs[0],
        outputs=specs[1],
        batch_axis=0,
        variants=(Variant("fp32", "reference", artifact, "fp32"),),
    )
    return _packed(directory, manifest, {_sha(data): data})


def onnx_bundle(
    directory: Path,
    name: str,
    version: int = 1,
    *,
    scale: float = 2.0,
    width: int = WIDTH,
    rows: int | str = 1,
    variants: Sequence[Variant] = (Variant("fp32", "onnxruntime", NO_BLOB, "fp32"),),
) -> Path:
    """Pack a bundle of a tiny ONNX model, x FP32 [rows, width] -> y = scale x.

    Args:
        rows: a name makes them a batch axis of any size.
        variants: the artifact of each is put in its place.
    """
    from onnx import TensorProto, helper, numpy_helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "s"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [rows, width])],
        [info("y", TensorProto.FLOAT, [rows, width])],
        [numpy_helper.from_array(np.float32(scale), "s")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    blobs = {_sha(model): model}
    x = np.ones((1, width), np.float32)
    golden = Golden((_golden("x", x, blobs),), (_golden("y", x * np.float32(scale), blobs),))
    shape = (rows if isinstance(rows, int) else -1, width)
    blob = Blob(_sha(model), len(model), "m.onnx")
    manifest = Manifest(
        schema=1,
        name=name,
        version=version,
        inputs=(TensorSpec("x", "FP32", shape),),
        outputs=(TensorSpec("y", "FP32", shape),),
        batch_axis=None if isinstance(rows, int) else 0,
        variants=tuple(msgspec.structs.replace(one, artifact=blob) for one in variants),
        goldens=(golden,),
    )
    return _packed(directory, manifest, blobs)


def large_onnx_bundle(directory: Path, name: str, weights_bytes: int) -> Path:
    """Pack a bundle of an ONNX model with so many bytes of weights, all of them the same number.

    x FP32 [1, 1024] -> y [1, columns] with y = (MiB of the weights) * sum(x).
    """
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = 1024, weights_bytes // 4096
    weights = np.full((rows, columns), weights_bytes >> 20, np.float32)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [1, rows])],
        [info("y", TensorProto.FLOAT, [1, columns])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    blob = Blob(_sha(model), len(model), "m.onnx")
    manifest = Manifest(
        schema=1,
        name=name,
        version=1,
        inputs=(TensorSpec("x", "FP32", (1, rows)),),
        outputs=(TensorSpec("y", "FP32", (1, columns)),),
        variants=(Variant("fp32", "onnxruntime", blob, "fp32"),),
    )
    return _packed(directory, manifest, {_sha(model): model})


def _golden(name: str, array: np.ndarray[Any, Any], blobs: dict[str, bytes]) -> GoldenTensor:
    data = array.tobytes()
    blobs[_sha(data)] = data
    return GoldenTensor(name, "FP32", array.shape, Blob(_sha(data), len(data)))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _packed(directory: Path, manifest: Manifest, blobs: dict[str, bytes]) -> Path:
    path = directory / f"{manifest.name}-{manifest.version}-{uuid.uuid4().hex[:6]}.bundle"
    archive.pack(
        archive.compose(manifest, {sha: from_bytes(data) for sha, data in blobs.items()}), path
    )
    return path


# --- the daemon -----------------------------------------------------------------------------------


def serve_command(state_dir: Path, run_dir: Path, *more: str) -> list[str]:
    words = ["-m", "edge_runtime", "serve", "--state-dir", str(state_dir)]
    return [sys.executable, *words, "--run-dir", str(run_dir), *more]


class Daemon:
    """`edge-runtime serve` in its own directory; the path is short: a socket's has 108 bytes."""

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        *,
        environment: dict[str, str] | None = None,
        state_dir: Path | None = None,
        odd_backends: bool = False,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp"))
        self.root.chmod(0o755)  # clients of other users must reach the sockets
        self.run_dir = self.root / "run"
        self.state_dir = state_dir or self.root / "state"
        self.bundles = self.root / "bundles"
        self.bundles.mkdir()
        self._config = {"log": {"format": "json", "level": "debug"}, **(config or {})}
        self._mark = f"EDGE_TEST_MARK={uuid.uuid4().hex}"
        self._environment = {**os.environ, **(environment or {})}
        if odd_backends:
            paths = [str(HERE / "odd"), self._environment.get("PYTHONPATH", "")]
            self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        name, _, value = self._mark.partition("=")
        self._environment[name] = value
        self.log_path = self.root / "log"
        self.process: subprocess.Popen[bytes] | None = None

    # -- its life

    def start(
        self,
        *,
        wait: bool = True,
        enter: Callable[[], None] | None = None,
        prefix: Sequence[str] = (),
    ) -> Daemon:
        """Start it.

        Args:
            enter: runs in the new process before the program (to join a cgroup).
            prefix: a program that becomes the daemon (to be another user).
        """
        config = self.root / "config.yaml"
        config.write_text(yaml.safe_dump(self._config))
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *serve_command(self.state_dir, self.run_dir, "--config", str(config))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                preexec_fn=enter,
            )
        if wait:
            until(self.answers, "an answer on control.sock")
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended:\n{self.log()}"
        try:
            self.control("config")
        except EdgeError:
            return False
        return True

    def control_or_none(self) -> dict[str, Any] | None:
        try:
            return self.control("config")
        except EdgeError:
            return None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM; it must end well and leave nothing behind."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        assert code == 0, f"exit code {code}:\n{self.log()[-4000:]}"
        self.gone()
        assert "Traceback" not in self.log(), self.log()[-8000:]
        assert not self.events("command_failed"), self.events("command_failed")

    def kill(self) -> None:
        """SIGKILL, as a power cut for the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.gone()

    def gone(self) -> None:
        """Nothing that it started lives."""
        until(lambda: not self.relatives(), f"the end of {self.relatives()}", timeout_s=5)

    def relatives(self) -> list[int]:
        """Living processes that carry its mark."""
        mark = self._mark.encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended while we looked
        return found

    def remove(self) -> None:
        """End what still runs, without a question, and delete everything."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    # -- talking to it

    @property
    def infer_path(self) -> str:
        return str(self.run_dir / "infer.sock")

    @property
    def control_path(self) -> str:
        return str(self.run_dir / "control.sock")

    def control(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """One command on a connection of its own."""
        with ControlClient(self.control_path, timeout_s=60) as control:
            return control.call(command, arguments, fds=fds)

    def install(self, path: Path, *, activate: bool = True) -> dict[str, Any]:
        with path.open("rb") as file:
            return self.control("install", [file.fileno()], activate=activate, filename=path.name)

    def add(self, name: str, version: int = 1, **given: Any) -> dict[str, Any]:
        """Make a bundle of the reference model, install and activate it."""
        return self.install(bundle(self.bundles, name, version, **given))

    def client(self, **options: Any) -> Client:
        return Client(self.infer_path, **{"timeout_s": 15.0, **options})

    def impatient(self, **options: Any) -> Client:
        """A client that reports every failure as it is."""
        return self.client(retry=RetryPolicy(enabled=False), **options)

    def raw(self, path: str = "") -> RawConnection:
        return RawConnection(path or self.infer_path)

    def infer(self, model: str, value: float = 3.0, rows: int = 1, **options: Any) -> float:
        """One answer of an affine model to `value`, by a connection of its own."""
        with self.client() as client:
            y = client.infer(model, {"x": filled(value, rows)}, **options)["y"]
            assert (y == y[0, 0]).all()
            return float(y[0, 0])

    # -- looking at it

    def model(self, name: str) -> dict[str, Any]:
        models = self.control("models")["models"]
        return next(one for one in models if one["name"] == name)

    def ready(self, name: str) -> bool:
        return bool(self.model(name)["state"] == "ready")

    def worker(self, name: str, state: str = "active") -> dict[str, Any]:
        """Its worker as `ps` tells; {} when there is none."""
        workers = self.control("ps")["workers"]
        return next((one for one in workers if one["model"] == name and one["state"] == state), {})

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Events from the log, oldest first."""
        found = []
        for line in self.log().splitlines():
            if line.startswith("{"):
                event = json.loads(line)
                have = event["fields"]
                if event["name"] == name and all(have.get(k) == v for k, v in fields.items()):
                    found.append(event)
        return found

    def fds(self, pid: int = 0) -> int:
        return len(list(Path(f"/proc/{pid or self.pid}/fd").iterdir()))

    def descriptors(self) -> list[str]:
        """What its descriptors are, for messages."""
        found = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(str(entry.readlink()).partition(":[")[0])
        return sorted(found)

    def rss_bytes(self, pid: int = 0) -> int:
        status = Path(f"/proc/{pid or self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@contextlib.contextmanager
def running(
    config: dict[str, Any] | None = None,
    *,
    enter: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Daemon]:
    """A daemon that runs, and at the end stops well and leaves nothing behind."""
    daemon = Daemon(config, **options)
    try:
        daemon.start(enter=enter)
        yield daemon
        daemon.stop()
    finally:
        daemon.remove()


# --- clients --------------------------------------------------------------------------------------


def filled(value: float, rows: int = 1, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.full((rows, width), value, np.float32)


def infer_frame(
    model: str,
    value: float = 3.0,
    *,
    rows: int = 1,
    version: str = "",
    request_id: int = 1,
    deadline_ns: int = 0,
    priority: int = 0,
    width: int = WIDTH,
) -> bytes:
    """A whole INFER frame with its tensor in the body."""
    body = filled(value, rows, width).tobytes()
    tensor = messages.TensorHeader(
        "x", "FP32", (rows, width), messages.TensorParameters(binary_data_size=len(body))
    )
    header = messages.encode_header(messages.InferRequest(model, (tensor,), version))
    prefix = frames.encode_prefix(
        Kind.INFER, len(header), len(body), request_id, deadline_ns, priority
    )
    return prefix + header + body


class RawConnection:
    """Frames and bytes over a socket, without any manners."""

    def __init__(self, path: str, timeout_s: float = 15.0) -> None:
        self.sock = sockets.connect_unix(path, timeout_s)
        self._reader = FrameReader()

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        sockets.send_all_with_fds(self.sock, data, fds)

    def ask(self, data: bytes, fds: Sequence[int] = ()) -> Frame:
        self.send(data, fds)
        return self.frame()

    def frame(self) -> Frame:
        """The next frame. Raises ConnectionError at the end of the stream."""
        while (frame := self._reader.next_frame()) is None:
            size = self.sock.recv_into(self._reader.get_buffer())
            if not size:
                raise ConnectionResetError("closed")
            self._reader.advance(size)
        assert not isinstance(frame, TooLarge)
        return frame

    def error(self) -> EdgeError:
        """The next frame, which is an error."""
        frame = self.frame()
        assert frame.prefix.kind == Kind.ERROR, frame
        return messages.decode_error(frame.header)

    def value(self) -> tuple[str, float, int]:
        """The next frame, an answer of an affine model: version, value, request id."""
        frame = self.frame()
        if frame.prefix.kind == Kind.ERROR:
            raise messages.decode_error(frame.header)
        response = messages.decode_infer_response(frame.header)
        y = np.frombuffer(frame.body, np.float32)
        assert (y == y[0]).all()
        return response.model_version, float(y[0]), frame.prefix.request_id

    def is_closed(self) -> bool:
        """Whether the server closed it (waits for the answer or the end)."""
        try:
            self.frame()
        except (ConnectionError, TimeoutError):
            return True
        return False
