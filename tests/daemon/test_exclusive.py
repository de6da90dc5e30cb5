"""Models on a device that only one process may open: they share a worker process, and its fate."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bundle.manifest import Variant
from edge_runtime.errors import EdgeError, RequestError
from edge_runtime.serving import sandbox
from tests.backends.contract import compiled_delegate, require
from tests.daemon.world import NO_BLOB, QUICK_RESTART, Daemon, bundle, filled, onnx_bundle, until

PROFILE = """
name: mine
title: a board with an accelerator that one process may open
accelerators:
  fake: {{title: a fake one, device_class: npu, nodes: ["{node}"], exclusive: {exclusive}}}
backends:
  - {{backend: reference, device_class: npu, accelerator: fake}}
"""


class Board:
    """A daemon on a machine with a fake accelerator, which is a file."""

    def __init__(
        self, root: Path, daemon: Callable[..., Daemon], exclusive: bool = True, **options: Any
    ) -> None:
        self.node = root / "accel0"
        self.node.touch()
        profile = root / "mine.yaml"
        profile.write_text(PROFILE.format(node=self.node, exclusive=str(exclusive).lower()))
        workers = {"restart": QUICK_RESTART, "heartbeat_idle_s": 0.2, "run_time_max_ms": 1500}
        models = {"swapped": {"keep_previous_warm": False}, "slow": {"load_time_max_s": 1}}
        config = {"profile": str(profile), "workers": workers, "models": models}
        self.daemon = daemon(config, **options).start()

    def add(self, name: str, version: int = 1, **given: Any) -> dict[str, Any]:
        """Install and activate a model that runs on the accelerator; it computes scale x + 1."""
        options = {"device_node": str(self.node), **given.pop("options", {})}
        return self.daemon.add(name, version, options=options, device_class="npu", **given)

    def pid(self, name: str) -> int:
        return int(self.daemon.worker(name).get("pid", 0))

    def ready(self, *names: str) -> None:
        until(lambda: all(map(self.daemon.ready, names)), f"{names} ready")


@pytest.fixture
def board(tmp_path: Path, make_daemon: Callable[..., Daemon]) -> Iterator[Board]:
    one = Board(tmp_path, make_daemon)
    yield one
    assert not one.daemon.events("internal_error")


class Asking:
    """A client in a thread that asks one model without pause, and checks each answer."""

    def __init__(self, daemon: Daemon, model: str, right: Callable[[float], set[float]]) -> None:
        self._daemon, self._model, self._right = daemon, model, right
        self.answers = 0
        self.waits_s: list[float] = []
        self.failure: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._guarded)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(20)
        assert not self._thread.is_alive(), "the client hangs"
        if self.failure is not None:
            raise self.failure

    def _guarded(self) -> None:
        try:
            with self._daemon.impatient() as client:
                while not self._done.is_set():
                    value = float(self.answers % 50)
                    began_s = time.monotonic()
                    got = client.infer(self._model, {"x": filled(value, 1 + self.answers % 3)})["y"]
                    self.waits_s.append(time.monotonic() - began_s)
                    assert set(got.ravel().tolist()) <= self._right(value), (value, got)
                    self.answers += 1
        except BaseException as error:  # noqa: BLE001 - reported by the test, whatever it was
            self.failure = error


def scaled(*scales: float) -> Callable[[float], set[float]]:
    return lambda value: {scale * value + 1 for scale in scales}


def test_two_models_share_one_process_and_both_answer(board: Board) -> None:
    daemon = board.daemon
    board.add("first", scale=2.0)
    board.add("second", scale=3.0, golden_off=0.0)
    assert daemon.infer("first", 5.0) == 11.0 and daemon.infer("second", 5.0) == 16.0
    first, second = daemon.worker("first"), daemon.worker("second")
    assert first["pid"] == second["pid"] and first["host"] == second["host"] == "npu"
    assert daemon.model("second")["device"] == "ACCEL0"
    assert "shares its process with all models on npu" in second["sandbox"]
    whole = sum(one["private_bytes"] for one in (first, second))
    assert 0 < second["private_bytes"] < first["private_bytes"] <= whole < 80_000_000
    assert len(daemon.events("host_started")) == 1
    until(lambda: _goldens(daemon, "second") > 0, "a golden while it serves")


def _goldens(daemon: Daemon, model: str) -> float:
    lines = str(daemon.control("metrics")["text"]).splitlines()
    found = [one for one in lines if one.startswith(f'edge_goldens_total{{model="{model}"')]
    return sum(float(one.split()[-1]) for one in found)


def test_without_the_mark_the_second_model_is_refused_with_the_reason(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    board = Board(tmp_path, make_daemon, exclusive=False)
    board.add("first")
    with pytest.raises(EdgeError, match="in use by another process"):
        board.add("second")
    assert board.daemon.infer("first", 5.0) == 11.0
    assert board.daemon.worker("first")["host"] == ""


def test_answers_of_many_interleaved_requests_are_right(board: Board) -> None:
    models = {f"m{scale}": float(scale) for scale in range(2, 5)}
    for name, scale in models.items():
        board.add(name, scale=scale)
    asking = [Asking(board.daemon, name, scaled(scale)) for name, scale in models.items()]
    asking += [Asking(board.daemon, name, scaled(scale)) for name, scale in models.items()]
    for one in asking:
        one.__enter__()
    until(lambda: all(one.answers >= 100 for one in asking), "a hundred answers for each")
    for one in asking:
        one.__exit__()
    assert len({board.pid(name) for name in models}) == 1


def test_a_busy_model_does_not_keep_another_from_its_turn(board: Board) -> None:
    board.add("busy", options={"run_ms": 20})
    board.add("rare", options={"run_ms": 1})
    with Asking(board.daemon, "busy", scaled(2.0)), Asking(board.daemon, "busy", scaled(2.0)):
        with Asking(board.daemon, "rare", scaled(2.0)) as rare:
            until(lambda: rare.answers >= 20, "answers of the rare one")
    waits_s = sorted(rare.waits_s)
    assert waits_s[len(waits_s) // 2] < 0.1, "about one run of the other: 20 ms"


def test_when_the_process_is_killed_all_its_models_come_back_in_one(board: Board) -> None:
    daemon = board.daemon
    board.add("first", scale=2.0)
    board.add("second", scale=3.0)
    killed = board.pid("first")
    os.kill(killed, signal.SIGKILL)
    until(lambda: board.pid("first") not in (0, killed), "a new process")
    until(lambda: board.pid("second") not in (0, killed), "a new process")
    assert board.pid("first") == board.pid("second")
    assert daemon.infer("first", 5.0) == 11.0 and daemon.infer("second", 5.0) == 16.0
    for name in ("first", "second"):
        (death,) = daemon.events("worker_died", model=name)
        assert death["fields"]["cause"] == "signal", "it did nothing: it may be either"
        assert daemon.model(name)["restarts"] == 1


def test_a_model_that_crashes_is_counted_and_its_neighbour_is_not(board: Board) -> None:
    daemon = board.daemon
    board.add("good", scale=3.0)
    board.add("bad", options={"faults": [{"action": "segv", "on_value": 13.0}]})
    for crash in range(1, 3):
        with daemon.impatient() as client, pytest.raises(EdgeError):
            client.infer("bad", {"x": filled(13.0)})
        until(lambda: len(daemon.events("worker_died", model="good")) == crash, "its end")  # noqa: B023
        board.ready("good", "bad")
        assert daemon.infer("good", 5.0) == 16.0 and daemon.infer("bad", 5.0) == 11.0
    causes = {
        name: {one["fields"]["cause"] for one in daemon.events("worker_died", model=name)}
        for name in ("good", "bad")
    }
    assert causes == {"good": {"neighbour"}, "bad": {"signal"}}
    (told, *_) = daemon.events("worker_died", model="good")
    assert "SIGSEGV" in told["message"] and "suspected: bad@1" in told["message"]


def test_a_load_that_kills_the_process_is_refused_and_the_others_are_back(board: Board) -> None:
    daemon = board.daemon
    board.add("first", scale=2.0)
    board.add("second", scale=3.0)
    with pytest.raises(EdgeError, match="SIGSEGV"):
        board.add("killer", options={"faults": [{"action": "segv", "at": "load"}]})
    board.ready("first", "second")
    assert daemon.infer("first", 5.0) == 11.0 and daemon.infer("second", 5.0) == 16.0
    for name in ("first", "second"):
        (death,) = daemon.events("worker_died", model=name)
        assert death["fields"]["cause"] == "neighbour"


def test_who_hangs_is_told_from_who_waits_for_it(board: Board) -> None:
    daemon = board.daemon
    board.add("good", scale=3.0)
    board.add("bad", options={"faults": [{"action": "hang", "on_value": 13.0}]})
    hung = threading.Thread(target=_ask_in_vain, args=(daemon, "bad", 13.0))
    hung.start()
    until(lambda: daemon.worker("bad").get("connections"), "its connection")
    with daemon.client() as client:  # it waits for its turn, which does not come, and tries again
        got = client.infer("good", {"x": filled(5.0)}, timeout_s=12.0)["y"]
    assert got[0, 0] == 16.0
    hung.join(10)
    assert [one["fields"]["cause"] for one in daemon.events("worker_died", model="bad")] == ["hang"]
    causes = [one["fields"]["cause"] for one in daemon.events("worker_died", model="good")]
    assert causes == ["neighbour"]


def _ask_in_vain(daemon: Daemon, model: str, value: float) -> None:
    with daemon.impatient() as client, pytest.raises(EdgeError):
        client.infer(model, {"x": filled(value)})


def test_a_worker_refuses_while_it_waits_for_its_turn(board: Board) -> None:
    board.add("long", options={"run_ms": 500})
    board.add("quick")
    waits_s = []
    with (
        Asking(board.daemon, "long", scaled(2.0)) as long,
        Asking(board.daemon, "quick", scaled(2.0)) as quick,
        board.daemon.client() as client,
    ):
        until(lambda: long.answers and quick.answers > 1, "answers of both")
        for _ in range(5):
            began_s = time.monotonic()
            with pytest.raises(RequestError):
                client.infer("quick", {"wrong": filled(1.0)})
            waits_s.append(time.monotonic() - began_s)
    assert sorted(waits_s)[2] < 0.3, f"not as long as a long run: {waits_s}"


def test_a_library_that_does_not_survive_a_fork_is_the_host_itself(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    board = Board(tmp_path, make_daemon, odd_backends=True)
    board.add("first", scale=2.0, backend="unforkable")
    board.add("second", scale=3.0, backend="unforkable")
    assert board.pid("first") == board.pid("second")
    os.kill(board.pid("first"), signal.SIGKILL)
    assert board.daemon.infer("first", 5.0) == 11.0 and board.daemon.infer("second", 5.0) == 16.0
    with pytest.raises(EdgeError, match="in use through unforkable"):
        board.add("third", backend="reference")


def test_a_swap_does_not_disturb_the_other_model(board: Board) -> None:
    slow = {"options": {"load_ms": 300}}
    board.add("swapped", 1, scale=2.0, **slow)
    board.add("other", scale=5.0)
    board.add("swapped", 2, scale=3.0, **slow)
    pid = board.pid("other")
    with (
        Asking(board.daemon, "other", scaled(5.0)) as other,
        Asking(board.daemon, "swapped", scaled(2.0, 3.0)) as swapped,
    ):
        for version in (1, 2, 1, 2):
            before = other.answers
            board.daemon.control("activate", name="swapped", version=version)
            until(lambda: other.answers > before + 20, "answers after the swap")  # noqa: B023
    assert swapped.answers > 20
    assert board.pid("other") == board.pid("swapped") == pid
    assert len(board.daemon.events("worker_ready", model="swapped")) == 6, "each was a load"
    assert max(other.waits_s) < 0.25, "no answer waited for a load of 300 ms"


def test_a_candidate_beside_the_active_version_runs_in_the_same_process(board: Board) -> None:
    daemon = board.daemon
    board.add("model", 1, scale=2.0)
    options = {"device_node": str(board.node)}
    path = bundle(daemon.bundles, "model", 2, scale=2.0, options=options, device_class="npu")
    daemon.install(path, activate=False)
    daemon.control("shadow", name="model", version=2, share=1.0)
    daemon.control("split", name="model", version=2, share=0.2)
    with Asking(daemon, "model", scaled(2.0)) as asking:
        until(lambda: asking.answers >= 50, "answers")
        until(lambda: daemon.control("shadow", name="model")["shadow"]["compared"] > 20, "shadows")
    assert daemon.worker("model", "candidate")["pid"] == board.pid("model")
    daemon.control("promote", name="model")
    assert daemon.infer("model", 5.0) == 11.0


def test_the_best_of_two_variants_on_the_device_is_found_by_measuring(board: Board) -> None:
    daemon = board.daemon
    node = {"device_node": str(board.node)}
    variants = [("slow", {**node, "run_ms": 8}), ("quick", {**node, "run_ms": 1})]
    daemon.add("choice", device_class="npu", variants=variants)
    board.add("other")
    assert daemon.model("choice")["active"]["variant"] == "quick"
    assert board.pid("choice") == board.pid("other")
    pid = board.pid("other")
    until(lambda: len(list(Path(f"/proc/{pid}/task").iterdir())) == 5, "the end of the slow one")


def test_an_unload_ends_the_model_only_and_leaves_nothing_behind(board: Board) -> None:
    daemon = board.daemon
    board.add("stays", scale=3.0)
    pid = board.pid("stays")

    def traces() -> tuple[int, int]:
        """Threads and descriptors of the process."""
        return len(list(Path(f"/proc/{pid}/task").iterdir())), daemon.fds(pid)

    until(lambda: traces()[0] == 3, "main thread, one worker and its runner")
    before = traces()
    for _ in range(3):
        board.add("goes", scale=2.0)
        with daemon.client() as client:
            client.infer("goes", {"x": filled(1.0)})
            daemon.control("unload", name="goes")
        until(lambda: traces() == before, f"{before} again, not {traces()}")
        daemon.control("remove", name="goes", version=1)
    assert daemon.infer("stays", 5.0) == 16.0 and board.pid("stays") == pid
    stopped = daemon.events("worker_stopped", model="goes")
    assert len(stopped) == 3 and "stay with the others of its process" in stopped[0]["message"]
    daemon.control("unload", name="stays")
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the process with its last model")
    assert not daemon.events("host_died")


def test_a_load_that_is_too_slow_is_given_up_without_its_neighbours(board: Board) -> None:
    board.add("good", scale=3.0)
    with pytest.raises(EdgeError, match=r"longer than 1 s"):
        board.add("slow", options={"load_ms": 2500})
    assert board.daemon.infer("good", 5.0) == 16.0
    board.add("next", scale=4.0)  # when the slow one has left
    assert board.pid("next") == board.pid("good")
    assert not board.daemon.events("worker_died")


@pytest.mark.skipif(not sandbox.landlock_abi(), reason="this kernel has no landlock")
def test_each_models_threads_are_confined(board: Board) -> None:
    board.add("first")
    board.add("second", scale=3.0)
    pid = board.pid("first")
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text()
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status
    measures = board.daemon.worker("second")["sandbox"]
    assert any(one.startswith("landlock") for one in measures), measures
    assert f"may use {board.node}" in measures


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_real_libraries_serve_several_models_from_one_process(
    tmp_path: Path, make_daemon: Callable[..., Daemon], backend: str
) -> None:
    require(backend)
    profile = tmp_path / "mine.yaml"
    profile.write_text(PROFILE.format(node=os.devnull, exclusive="true"))
    workers = {"cpu_fallback": "allow"}  # it is a processor that plays the accelerator
    daemon = make_daemon({"profile": str(profile), "workers": workers}).start()
    models = {"double": 2.0, "triple": 3.0}
    options = {"compiled": "keep"} if backend == "openvino" else {}
    for name, scale in models.items():
        variant = Variant("fp32", backend, NO_BLOB, "fp32", "npu", options)
        path = onnx_bundle(daemon.bundles, name, scale=scale, rows="n", variants=[variant])
        daemon.install(path)
    with (
        Asking(daemon, "double", lambda value: {2 * value}) as double,
        Asking(daemon, "triple", lambda value: {3 * value}) as triple,
    ):
        until(lambda: min(double.answers, triple.answers) >= 50, "answers of both")
    kept = 2 if options else 0
    until(lambda: len(daemon.events("compiled_kept")) == kept, "what was compiled is kept")
    daemon.control("unload", name="triple")
    pid = daemon.worker("double")["pid"]
    assert daemon.infer("double", 5.0) == 10.0
    daemon.control("activate", name="triple", version=1)
    assert daemon.worker("triple")["pid"] == pid
    assert daemon.infer("triple", 5.0) == 15.0
    assert len(daemon.events("compiled_kept")) == kept, "found again, in the same process"


def test_models_with_a_delegate_share_the_process_that_opened_its_device(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    from tests import tflite_writer
    from tests.daemon.test_litert import on_npu

    library = str(compiled_delegate(tmp_path))
    profile = tmp_path / "mine.yaml"
    profile.write_text(PROFILE.format(node="/dev/full", exclusive="true"))
    # What is on Python's path is readable in the sandbox; a real delegate is in /usr/lib.
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    daemon = make_daemon({"profile": str(profile)}, environment={"PYTHONPATH": path}).start()
    names = ["one", "two", "three"]
    for name in names:
        daemon.install(on_npu(daemon, name, tflite_writer.pair(), library))
    x = np.arange(3, dtype=np.float32).reshape(1, 3)
    with daemon.client() as client:
        for name in names * 20:
            assert (client.infer(name, {"a": x, "b": x})["sum"] == 2 * x).all()
    assert len({daemon.worker(name)["pid"] for name in names}) == 1
    daemon.control("unload", name="one")  # the one that opened the device
    with daemon.client() as client:
        for name in names[1:]:
            assert (client.infer(name, {"a": x, "b": x})["sum"] == 2 * x).all()
            assert daemon.model(name)["device"] == "NPU"
