"""The reference backend: its arithmetic, and each fault in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.backends import reference
from edge_runtime.backends.reference import Reference, tiny
from edge_runtime.clock import ManualClock
from edge_runtime.errors import BackendError, EdgeError, UsageError

ONE = {"input": np.ones((1, 16), np.float32)}
POISON = {"input": np.full((1, 16), 13, np.float32)}


class Stop(Exception):
    """Ends a sleep that would not."""


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "model.reference.json"
    path.write_text(json.dumps(document))
    return path


def load(folder: Path, document: dict[str, Any] | None = None, **options: Any) -> Any:
    return Reference().load(write(folder, document or tiny()), options)


def graph(op: str, shape: list[int], out: tuple[str, list[int]], **node: Any) -> dict[str, Any]:
    """A document of one node over an FP32 input "x"."""
    return {
        "format": reference.FORMAT,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": shape}],
        "outputs": [{"name": "y", "datatype": out[0], "shape": out[1]}],
        "nodes": [{"op": op, "inputs": ["x"], "output": "y", **node}],
    }


X = np.array([[1, -2, 3], [0, 5, -6]], np.float32)
E = np.exp(X - X.max(axis=1, keepdims=True))
CASES = {
    "identity": (graph("identity", [-1, 3], ("FP32", [-1, 3])), X),
    "affine": (graph("affine", [-1, 3], ("FP32", [-1, 3]), scale=2, offset=1), 2 * X + 1),
    "add": (graph("add", [-1, 3], ("FP32", [-1, 3]), inputs=["x", "x"]), 2 * X),
    "relu": (graph("relu", [-1, 3], ("FP32", [-1, 3])), np.maximum(X, 0)),
    "flatten": (graph("flatten", [-1, 3], ("FP32", [-1, 3])), X),
    "softmax": (graph("softmax", [-1, 3], ("FP32", [-1, 3])), E / E.sum(axis=1, keepdims=True)),
    "argmax": (graph("argmax", [-1, 3], ("INT64", [-1])), np.array([2, 1])),
    "matmul": (
        graph("matmul", [-1, 3], ("FP32", [-1, 1]), weights=[[1], [2], [3]], bias=[10]),
        X @ np.array([[1], [2], [3]], np.float32) + 10,
    ),
}


def test_every_op_has_a_case():
    assert set(CASES) == set(reference.OPS)


@pytest.mark.parametrize("op", CASES)
def test_an_op_computes_what_numpy_does(tmp_path: Path, op: str):
    document, want = CASES[op]
    np.testing.assert_allclose(load(tmp_path, document).run({"x": X})["y"], want, rtol=1e-6)


def test_an_output_is_never_a_view_of_an_input(tmp_path: Path):
    for op in ("identity", "flatten"):
        model = load(tmp_path, CASES[op][0])
        assert not np.shares_memory(model.run({"x": X})["y"], X)


def test_seeded_weights_are_the_same_for_ever(tmp_path: Path):
    # Written down once; goldens in the field depend on them.
    outputs = load(tmp_path, tiny(seed=5)).run(ONE)["output"]
    np.testing.assert_allclose(outputs, [[-0.1211574, 1.9055753, -0.1285462, 0.2033609]], rtol=1e-4)


BROKEN = {
    "no format": {"inputs": [], "outputs": [], "nodes": []},
    "another format": tiny() | {"format": "other"},
    "an unknown op": graph("matmull", [-1, 3], ("FP32", [-1, 3])),
    "an unknown tensor": graph("relu", [-1, 3], ("FP32", [-1, 3]), inputs=["z"]),
    "no tensor at all": graph("relu", [-1, 3], ("FP32", [-1, 3]), inputs=[]),
    "an output that nothing makes": graph("relu", [-1, 3], ("FP32", [-1, 3]), output="z"),
    "another datatype than promised": graph("argmax", [-1, 3], ("FP32", [-1])),
    "another shape than promised": graph("relu", [-1, 3], ("FP32", [-1, 4])),
    "an unknown datatype": graph("relu", [-1, 3], ("FP33", [-1, 3])),
    "weights that do not fit": graph("matmul", [-1, 3], ("FP32", [-1, 1]), weights=[[1], [2]]),
    "weights that are ragged": graph("matmul", [-1, 3], ("FP32", [-1, 1]), weights=[[1], [2, 3]]),
    "no weights": graph("matmul", [-1, 3], ("FP32", [-1, 1])),
    "an unknown behaviour": tiny(speed=3),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_document_is_a_backend_error_that_names_the_file(tmp_path: Path, case: str):
    with pytest.raises(BackendError) as caught:
        load(tmp_path, BROKEN[case])
    assert "model.reference.json" in str(caught.value)


def test_an_artifact_over_the_size_limit_is_refused(tmp_path: Path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(reference.ARTIFACT_SIZE_MAX + 1)
    with pytest.raises(BackendError, match="this large"):
        Reference().load(path, {})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["inputs", "outputs", "nodes", "behaviour", "format"]),
)
def test_any_value_in_any_place_of_a_document_loads_or_is_a_backend_error(value: Any, key: str):
    document = tiny() | {key: value}
    try:
        parsed = reference.decode(json.dumps(document).encode(), "somewhere")
        reference.compile_graph(parsed, "somewhere")
    except BackendError as e:
        assert "somewhere" in str(e)


class TestOptions:
    def test_an_option_wins_over_the_artifact(self, tmp_path: Path):
        slept: list[float] = []
        path = write(tmp_path, tiny(run_ms=250, load_ms=1000))
        model = Reference(sleep=slept.append).load(path, {"run_ms": 7})
        model.run(ONE)
        assert slept == [1.0, 0.007]

    def test_a_wrong_fault_is_named_by_its_key_path(self, tmp_path: Path):
        with pytest.raises(UsageError) as caught:
            load(tmp_path, faults=[{"action": "raise"}, {"action": "explode"}])
        assert caught.value.where == "options.faults[1].action"

    def test_concurrent_is_what_it_was_told(self, tmp_path: Path):
        assert load(tmp_path).concurrent
        assert not load(tmp_path, concurrent=False).concurrent


def test_busy_latency_watches_the_clock_and_does_not_sleep(tmp_path: Path):
    class Ticking(ManualClock):
        def monotonic_ns(self) -> int:
            self.advance_s(0.001)
            return super().monotonic_ns()

    def never(_: float) -> None:
        raise AssertionError("slept")

    clock = Ticking()
    model = Reference(never, clock).load(write(tmp_path, tiny()), {"busy": True, "run_ms": 20})
    before_ns = clock.monotonic_ns()
    model.run(ONE)
    assert 20_000_000 <= clock.monotonic_ns() - before_ns < 30_000_000


class TestFaults:
    def test_an_error_at_load(self, tmp_path: Path):
        with pytest.raises(BackendError, match="on order"):
            load(tmp_path, faults=[{"action": "raise", "at": "load"}])

    def test_an_error_in_the_second_run_only(self, tmp_path: Path):
        fault = {"action": "raise", "first_run": 2, "last_run": 2}
        model = load(tmp_path, faults=[fault])
        model.run(ONE)
        with pytest.raises(BackendError):
            model.run(ONE)
        model.run(ONE)

    def test_an_error_on_a_magic_value_only(self, tmp_path: Path):
        model = load(tmp_path, faults=[{"action": "memory_error", "on_value": 13}])
        model.run(ONE)
        with pytest.raises(MemoryError):
            model.run(POISON)
        model.run(ONE)

    def test_bindings_suffer_too(self, tmp_path: Path):
        run = load(tmp_path, faults=[{"action": "raise", "first_run": 2}]).bind(
            ONE, {"output": None}
        )
        run()
        with pytest.raises(BackendError):
            run()

    def test_wrong_answers_begin_after_n_runs_and_look_right(self, tmp_path: Path):
        model = load(tmp_path, faults=[{"action": "wrong", "first_run": 3}])
        right = [model.run(ONE)["output"] for _ in range(2)]
        np.testing.assert_array_equal(right[0], right[1])
        wrong = model.run(ONE)["output"]
        assert wrong.shape == right[0].shape and wrong.dtype == right[0].dtype
        assert (np.abs(wrong - right[0]) > 0.5).all()

    def test_a_hang_sleeps_for_ever(self, tmp_path: Path):
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                raise Stop

        options = {"faults": [{"action": "hang"}]}
        model = Reference(sleep).load(write(tmp_path, tiny()), options)
        with pytest.raises(Stop):
            model.run(ONE)
        assert sum(slept) > 3600

    def test_allocated_memory_is_resident_and_stays(self, tmp_path: Path):
        model = load(tmp_path, faults=[{"action": "allocate", "size_mb": 64, "last_run": 1}])
        before = _resident_bytes()
        model.run(ONE)
        assert _resident_bytes() - before > 55_000_000
        model.run(ONE)
        assert 55_000_000 < _resident_bytes() - before < 80_000_000


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_a_child(work: Callable[[], None], seconds: int = 10) -> int:
    """The wait status of a fork that did the work (0: it lived); a hang is ended by SIGALRM."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        for number in (signal.SIGSEGV, signal.SIGILL, signal.SIGABRT):
            signal.signal(number, signal.SIG_DFL)  # pytest's faulthandler would print
        try:
            work()
        except EdgeError:
            os._exit(99)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


DEATHS = {
    "segv": -signal.SIGSEGV,
    "ill": -signal.SIGILL,
    "abort": -signal.SIGABRT,
    "exit": 1,
    "raise": 99,
}


@pytest.mark.parametrize("at", ["load", "run"])
@pytest.mark.parametrize("action", DEATHS)
def test_a_process_dies_as_ordered(tmp_path: Path, action: str, at: str):
    def work() -> None:
        load(tmp_path, faults=[{"action": action, "at": at}]).run(ONE)

    assert os.waitstatus_to_exitcode(in_a_child(work)) == DEATHS[action]


def test_a_deadly_value_kills_and_others_do_not(tmp_path: Path):
    model = load(tmp_path, faults=[{"action": "segv", "on_value": 13}])
    assert in_a_child(lambda: model.run(ONE)) == 0
    assert os.waitstatus_to_exitcode(in_a_child(lambda: model.run(POISON))) == -signal.SIGSEGV


def test_an_exit_code_is_as_ordered(tmp_path: Path):
    fault = {"action": "exit", "at": "load", "exit_code": 77}
    assert os.waitstatus_to_exitcode(in_a_child(lambda: load(tmp_path, faults=[fault]))) == 77


def test_spinning_never_ends(tmp_path: Path):
    def work() -> None:
        load(tmp_path, faults=[{"action": "spin"}]).run(ONE)

    assert os.waitstatus_to_exitcode(in_a_child(work, seconds=1)) == -signal.SIGALRM
