"""A worker's life before it serves, in this process and in a real one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest

from edge_runtime.backends.reference import tiny
from edge_runtime.daemon.templates import SINGLE_THREADED
from edge_runtime.errors import BundleError
from edge_runtime.serving import channel, page, process, sandbox
from edge_runtime.serving import template as template_process
from edge_runtime.serving.spec import GoldenFile, GoldenPair, WorkerSpec
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire.reader import Frame, FrameReader

from .rig import Array, NumpyModel, answer_of, close_all, double_plus_one, infer

WAIT_S_MAX = 30.0


def spec_of(artifact: Path, **fields: Any) -> WorkerSpec:
    """A worker of the reference backend's tiny model, its tensors named as the rig's."""
    width = 4
    return WorkerSpec(
        model="m",
        version=1,
        generation=1,
        variant="fp32",
        backend="reference",
        artifact=str(artifact),
        artifact_sha256=hashlib.sha256(artifact.read_bytes()).hexdigest(),
        inputs=(TensorSpec("x", "FP32", (-1, width)),),
        outputs=(TensorSpec("y", "FP32", (-1, width)),),
        batch_axis=0,
        supervisor_pid=os.getpid(),
        **fields,
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    document = tiny(width=4, classes=4)
    for kind, name in (("inputs", "x"), ("outputs", "y")):
        document[kind][0]["name"] = name
    document["nodes"] = [
        {"op": "affine", "inputs": ["x"], "output": "y", "scale": 2.0, "offset": 1.0}
    ]
    path = tmp_path / "model.reference.json"
    path.write_text(json.dumps(document))
    return path


# --- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "run_ms", "concurrent", "runners"),
    [
        (-1, 0.1, True, 0),
        (-1, 0.1, False, 0),
        (-1, 9.0, False, 1),
        (0, 9.0, True, 0),
        (3, 0.1, True, 3),
        (3, 0.1, False, 1),
        (0, 9.0, False, 0),
        (1000, 0.1, True, page.RUNNERS_MAX),
    ],
)
def test_runners_are_as_many_as_asked_for_or_as_the_measurement_says(
    artifact: Path, asked: int, run_ms: float, concurrent: bool, runners: int
) -> None:
    spec = spec_of(artifact, runners=asked, runner_threshold_ms=2.0)
    assert process._runners(spec, run_ms, concurrent) == runners


def test_a_slow_model_gets_a_runner_for_each_of_its_processors(artifact: Path) -> None:
    spec = spec_of(artifact, runners=-1, runner_threshold_ms=2.0)
    assert process._runners(spec, 2.0, True) == len(os.sched_getaffinity(0))


def test_an_artifact_that_changed_on_disk_is_never_loaded(artifact: Path) -> None:
    spec = spec_of(artifact)
    process._verify(spec)
    artifact.write_bytes(artifact.read_bytes() + b" ")
    with pytest.raises(BundleError, match="changed on disk"):
        process._verify(spec)


def test_warm_up_runs_with_zeros_and_finds_the_outputs_of_a_free_shape(artifact: Path) -> None:
    inputs = (
        TensorSpec("x", "FP32", (-1, 4)),
        TensorSpec("t", "BYTES", (-1,)),
        TensorSpec("h", "BF16", (2, -1)),
    )
    zeros = process.goldens.zeros(inputs)
    assert {name: (a.shape, str(a.dtype)) for name, a in zeros.items()} == {
        "x": ((1, 4), "float32"),
        "t": ((1,), "object"),
        "h": ((2, 1), "uint16"),
    }
    assert zeros["t"].tolist() == [b""]
    model = NumpyModel(lambda i: {"y": np.zeros((5, 4), np.float32)})
    spec = spec_of(artifact, warmup_runs=3)
    warm = process._warm_up(model, spec)
    assert warm.free == {"y"} and warm.run_ms >= warm.fastest_ms >= 0 and len(model.ran) == 3


def test_runs_that_compute_are_compared_by_processor_time_and_those_that_wait_by_the_clock(
    artifact: Path,
) -> None:
    def computes(inputs: Mapping[str, Array]) -> dict[str, Array]:
        until_s = time.thread_time() + 0.0005
        while time.thread_time() < until_s:
            pass
        return double_plus_one(inputs)

    def waits(inputs: Mapping[str, Array]) -> dict[str, Array]:
        time.sleep(0.002)  # a device at work
        return double_plus_one(inputs)

    clocks = [
        process._warm_up(NumpyModel(function), spec_of(artifact, warmup_runs=40)).clock_ns
        for function in (computes, waits)
    ]
    assert clocks == [time.thread_time_ns, process.monotonic_ns]


# --- real processes -------------------------------------------------------------------------------


class Template:
    """A template process, and the supervisor's end of its channel."""

    def __init__(self, backend: str) -> None:
        self.control, theirs = channel.pair()
        self.control.settimeout(WAIT_S_MAX)
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "edge_runtime.serving.template", backend],
            {**os.environ, **SINGLE_THREADED},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), channel.TEMPLATE_FD)],
        )
        theirs.close()

    def hears(self) -> channel.Message | None:
        return channel.receive(self.control)[0]

    def fork(self, spec: WorkerSpec) -> tuple[int, socket.socket, int]:
        """A worker's process id, our end of its channel, and its page."""
        ours, theirs = channel.pair()
        ours.settimeout(WAIT_S_MAX)
        page_fd, spec_fd = page.create(), os.memfd_create("spec")
        os.pwrite(spec_fd, msgspec.msgpack.encode(spec), 0)
        channel.send(self.control, channel.Fork(7), [theirs.fileno(), page_fd, spec_fd])
        theirs.close()
        os.close(spec_fd)
        forked = self.hears()
        assert isinstance(forked, channel.Forked) and forked.token == 7 and forked.pid
        return forked.pid, ours, page_fd

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def end(self) -> int:
        """Close the channel: it ends by itself. Its exit code."""
        self.control.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def hears_until(control: socket.socket, last: type) -> list[channel.Message]:
    heard: list[channel.Message] = []
    while not heard or not isinstance(heard[-1], last):
        message, fds = channel.receive(control)
        close_all(fds)
        assert message is not None, f"the worker ended after {heard}"
        heard.append(message)
    return heard


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Workers become children of this process, as they do of a supervisor."""
    sandbox.become_subreaper()
    yield
    sandbox._prctl(sandbox.PR_SET_CHILD_SUBREAPER, 0)


def test_a_template_forks_workers_that_load_serve_and_end(
    artifact: Path, tmp_path: Path, subreaper: None
) -> None:
    template = Template("reference")
    ready = template.hears()
    assert isinstance(ready, channel.TemplateReady) and ready.version == np.__version__
    before = template.descriptors()
    goldens = (golden(tmp_path, 2.0), golden(tmp_path, 3.0))
    for _ in range(3):
        pid, control, page_fd = template.fork(spec_of(artifact, goldens=goldens, atol=0.5))
        heard = hears_until(control, channel.Ready)
        assert [type(m) for m in heard] == [channel.Phase] * 3 + [channel.Ready]
        assert heard[-1].goldens == 2 and heard[-1].golden_deviation <= 1  # type: ignore[union-attr]
        ours, theirs = socket.socketpair()
        channel.send(control, channel.Adopt(own=False), [theirs.fileno()])
        theirs.close()
        ours.settimeout(WAIT_S_MAX)
        ours.sendall(infer(4.0, 11))
        reader = FrameReader()
        while (frame := reader.next_frame()) is None:
            reader.feed(ours.recv(65536))
        assert isinstance(frame, Frame) and answer_of(frame).array().tolist() == [[9.0] * 4]
        words = page.words(page_fd)
        assert words[page.CONNECTIONS] == 1 and words[page.LOOP_NS] > 0
        channel.send(control, channel.Stop())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert ours.recv(1) == b"", "its connections end with it"
        words.release()
        os.close(page_fd)
        control.close()
        ours.close()
    assert template.descriptors() == before, "forks leave nothing open in the template"
    assert not Path(f"/proc/{template.pid}/task/{template.pid}/children").read_text(), "no zombies"
    assert template.end() == 0


class Prepared:
    """A backend of which only `prepare` is of interest here."""

    name = "prepared"
    fork_safe = True

    def __init__(self, prepare: Callable[[], object]) -> None:
        self._prepare = prepare
        self.done = 0

    def version(self) -> str:
        raise AssertionError

    def load(self, artifact: Path, options: object) -> NoReturn:
        raise AssertionError

    def prepare(self) -> None:
        self._prepare()
        self.done += 1


def leave_a_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def fail() -> None:
    raise BundleError("a broken library")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("what", "done"), [(int, 1), (leave_a_thread, 0), (fail, 0), (crash, 0)])
def test_a_template_prepares_only_what_a_rehearsal_shows_to_be_harmless(
    what: Callable[[], object], done: int
) -> None:
    backend = Prepared(what)
    template_process._prepare(backend)
    assert backend.done == done


def test_a_template_of_onnxruntime_has_one_thread_when_it_is_ready() -> None:
    pytest.importorskip("onnxruntime")
    ours = Template("onnxruntime")
    assert isinstance(ours.hears(), channel.TemplateReady)
    assert len(list(Path(f"/proc/{ours.pid}/task").iterdir())) == 1
    assert ours.end() == 0


def golden(directory: Path, value: float) -> GoldenPair:
    files = []
    for name, array in (("x", value), ("y", value * 2 + 1)):
        path = directory / f"{name}{value}.bin"
        path.write_bytes(np.full((1, 4), array, np.float32).tobytes())
        files.append(GoldenFile(name, "FP32", (1, 4), str(path)))
    return GoldenPair((files[0],), (files[1],))


def test_a_worker_says_why_it_cannot_serve_and_ends(
    artifact: Path, tmp_path: Path, subreaper: None
) -> None:
    wrong = golden(tmp_path, 1.0)
    Path(wrong.outputs[0].path).write_bytes(np.full((1, 4), 50, np.float32).tobytes())
    other_outputs = (TensorSpec("z", "FP32", (-1, 4)),)
    fault = {"faults": [{"action": "memory_error", "at": "run"}]}
    cases = [
        ({"goldens": (wrong,)}, "goldens", "golden_mismatch"),
        ({"options": {"nonsense": 1}}, "load", "invalid_config"),
        ({"options": fault}, "warmup", "backend_failed"),
        ({"outputs": other_outputs}, "load", "backend_failed"),
        ({"artifact_sha256": "0" * 64}, "load", "invalid_bundle"),
    ]
    template = Template("reference")
    template.hears()
    for fields, phase, code in cases:
        pid, control, page_fd = template.fork(msgspec.structs.replace(spec_of(artifact), **fields))
        failed = hears_until(control, channel.Failed)[-1]
        assert isinstance(failed, channel.Failed)
        assert (failed.phase, failed.error["code"]) == (phase, code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == process.EXIT_FAILED
        os.close(page_fd)
        control.close()
    assert template.end() == 0


def test_a_worker_dies_with_its_channel_and_a_template_with_stop(
    artifact: Path, subreaper: None
) -> None:
    template = Template("reference")
    template.hears()
    pid, control, page_fd = template.fork(spec_of(artifact, sandbox=False))
    ready = hears_until(control, channel.Ready)[-1]
    assert isinstance(ready, channel.Ready) and ready.sandbox == ["off by configuration"]
    control.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(page_fd)
    channel.send(template.control, channel.Stop())
    assert template.end() == 0


def test_a_template_whose_library_is_missing_says_so() -> None:
    template = Template("no-such-backend")
    failed = template.hears()
    assert isinstance(failed, channel.Failed) and failed.phase == "import"
    assert template.end() == 70


def test_a_spec_survives_the_way_to_the_worker(artifact: Path) -> None:
    spec = spec_of(artifact, metadata=b'{"a":1}', cpus=(0, 1), options={"x": [1, {"y": None}]})
    data = msgspec.msgpack.encode(spec)
    assert msgspec.msgpack.decode(data, type=WorkerSpec) == spec
