"""The contract of protocol.py, over every backend in contract.ROWS."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import BACKENDS, backend
from edge_runtime.errors import BackendError, RequestError, UsageError
from edge_runtime.tensors import TensorSpec

from .contract import CLASSES, ROWS, WIDTH, Row


def batch(rows: int, seed: int = 1) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_backend_of_the_table_is_put_to_the_contract():
    assert set(ROWS) == set(BACKENDS)


class TestAnyBackend:
    def test_it_has_the_name_of_its_row_and_a_version(self, row: Row):
        loaded = backend(row.name)
        assert loaded.name == row.name
        assert loaded.version()[0].isdigit()

    def test_the_signature_comes_from_the_artifact(self, linear: Any):
        assert linear.inputs == (TensorSpec("input", "FP32", (-1, WIDTH)),)
        assert linear.outputs == (TensorSpec("output", "FP32", (-1, CLASSES)),)
        assert isinstance(linear.concurrent, bool)

    def test_placement_names_a_device(self, linear: Any):
        assert [place.device for place in linear.placement] == ["CPU"]

    @pytest.mark.parametrize("rows", [0, 1, 2, 7])
    def test_run_takes_any_batch_size(self, linear: Any, weights: np.ndarray, rows: int):
        outputs = linear.run({"input": batch(rows)})
        assert list(outputs) == ["output"]
        assert outputs["output"].shape == (rows, CLASSES)
        close(outputs["output"], batch(rows) @ weights)

    def test_run_takes_read_only_and_strided_arrays(self, linear: Any, weights: np.ndarray):
        frozen = np.frombuffer(batch(2).tobytes(), np.float32).reshape(2, WIDTH)
        close(linear.run({"input": frozen})["output"], batch(2) @ weights)
        strided = batch(6)[::2]
        close(linear.run({"input": strided})["output"], batch(6)[::2] @ weights)

    def test_the_outputs_of_a_run_are_the_callers(self, linear: Any, weights: np.ndarray):
        first = linear.run({"input": batch(1, seed=1)})["output"]
        kept = first.copy()
        linear.run({"input": batch(1, seed=2)})
        np.testing.assert_array_equal(first, kept)
        first[...] = 0  # and writeable

    def test_two_inputs_and_two_outputs_keep_their_names(self, pair: Any):
        a, b = np.ones((2, 3), np.float32), np.full((2, 3), 10, np.float32)
        outputs = pair.run({"b": b, "a": a})
        close(outputs["sum"], a + b)
        close(outputs["double"], 2 * a)

    def test_a_valid_option_is_taken(self, row: Row, tmp_path: Path, weights: np.ndarray):
        model = backend(row.name).load(row.linear(tmp_path, weights), row.options)
        close(model.run({"input": batch(1)})["output"], batch(1) @ weights)


class TestAnyBinding:
    def test_it_reads_the_given_memory_anew_at_each_run(self, linear: Any, weights: np.ndarray):
        memory = batch(2, seed=1)
        run = linear.bind({"input": memory}, {"output": None})
        close(run()["output"], batch(2, seed=1) @ weights)
        memory[...] = batch(2, seed=2)
        close(run()["output"], batch(2, seed=2) @ weights)

    def test_it_writes_outputs_in_place(self, linear: Any, weights: np.ndarray):
        memory, out = batch(2), np.full((2, CLASSES), np.nan, np.float32)
        run = linear.bind({"input": memory}, {"output": out})
        assert np.isnan(out).all(), "bind must not run the model"
        assert run()["output"] is out
        close(out, batch(2) @ weights)
        memory[...] = 0
        run()
        close(out, np.zeros((2, CLASSES)))

    def test_it_works_on_a_slice_of_a_larger_mapping(self, linear: Any, weights: np.ndarray):
        region = bytearray(4096)
        memory = np.frombuffer(region, np.float32, 2 * WIDTH, 64).reshape(2, WIDTH)
        out = np.frombuffer(region, np.float32, 2 * CLASSES, 2048).reshape(2, CLASSES)
        run = linear.bind({"input": memory}, {"output": out})
        memory[...] = batch(2)
        run()
        close(np.frombuffer(region, np.float32, 2 * CLASSES, 2048).reshape(2, -1), out)
        close(out, batch(2) @ weights)
        assert not any(region[2048 + out.nbytes :]), "it wrote past its output"

    @pytest.mark.parametrize("bound", [("sum",), ("double",), ("sum", "double"), ()])
    def test_bound_and_free_outputs_mix(self, pair: Any, bound: tuple[str, ...]):
        a, b = np.ones((2, 3), np.float32), np.full((2, 3), 10, np.float32)
        outputs = {
            name: np.empty((2, 3), np.float32) if name in bound else None
            for name in ("sum", "double")
        }
        run = pair.bind({"a": a, "b": b}, outputs)
        for factor in (1, 3):
            a[...] = factor
            results = run()
            assert set(results) == {"sum", "double"}
            assert all(results[name] is outputs[name] for name in bound)
            close(results["sum"], a + b)
            close(results["double"], 2 * a)

    def test_only_the_wanted_outputs_come(self, pair: Any):
        a = np.ones((2, 3), np.float32)
        assert set(pair.bind({"a": a, "b": a}, {"double": None})()) == {"double"}

    def test_many_bindings_run_on_many_threads_at_once(self, linear: Any, weights: np.ndarray):
        if not linear.concurrent:
            pytest.skip("this backend says that it is not concurrent")
        wrong: list[str] = []
        barrier = threading.Barrier(4)

        def work(seed: int) -> None:
            memory = batch(3, seed)
            out = np.empty((3, CLASSES), np.float32)
            run = linear.bind({"input": memory}, {"output": out})
            barrier.wait(10)
            for number in range(200):
                memory[...] = batch(3, seed) * (number % 5)
                run()
                if not np.allclose(out, memory @ weights, rtol=1e-4, atol=1e-5):
                    wrong.append(f"thread {seed} run {number}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong and not any(thread.is_alive() for thread in threads)

    def test_a_binding_outlives_its_arrays_names(self, linear: Any, weights: np.ndarray):
        run = linear.bind({"input": batch(64)}, {"output": np.empty((64, CLASSES), np.float32)})
        _ = [np.full((64, WIDTH), np.nan, np.float32) for _ in range(50)]  # reuses freed memory
        close(run()["output"], batch(64) @ weights)


WRONG_INPUTS = {
    "a missing input": ({}, "'input' is missing"),
    "an unknown input": ({"inptu": batch(1)}, "did you mean 'input'"),
    "another datatype": ({"input": batch(1).astype(np.float64)}, "float64"),
    "the other byte order": ({"input": batch(1).astype(">f4")}, "FP32"),
    "another width": ({"input": np.zeros((1, WIDTH - 1), np.float32)}, "[1, 15]"),
    "another rank": ({"input": np.zeros(WIDTH, np.float32)}, "[16]"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
class TestAnyWrongRequest:
    def test_run_refuses_it(self, linear: Any, case: str):
        inputs, text = WRONG_INPUTS[case]
        with pytest.raises(RequestError) as caught:
            linear.run(inputs)
        assert text in str(caught.value)

    def test_bind_refuses_it(self, linear: Any, case: str):
        inputs, text = WRONG_INPUTS[case]
        with pytest.raises(RequestError) as caught:
            linear.bind(inputs, {"output": None})
        assert text in str(caught.value)


def frozen() -> np.ndarray:
    array = np.empty((1, CLASSES), np.float32)
    array.flags.writeable = False
    return array


WRONG_OUTPUTS = {
    "no output": ({}, "no output is wanted"),
    "an unknown output": ({"ouput": None}, "did you mean 'output'"),
    "another datatype": ({"output": np.empty((1, CLASSES), np.float16)}, "float16"),
    "another width": ({"output": np.empty((1, CLASSES + 1), np.float32)}, "[1, 5]"),
    "a transposed array": ({"output": np.empty((CLASSES, 2), np.float32).T}, "C-contiguous"),
    "a read-only array": ({"output": frozen()}, "read-only"),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_bind_refuses_outputs_that_cannot_be_written(linear: Any, case: str):
    outputs, text = WRONG_OUTPUTS[case]
    with pytest.raises(RequestError) as caught:
        linear.bind({"input": batch(1)}, outputs)
    assert text in str(caught.value)


def test_bind_refuses_an_input_that_is_not_contiguous(linear: Any):
    with pytest.raises(RequestError, match="C-contiguous"):
        linear.bind({"input": batch(4)[::2]}, {"output": None})


def test_a_bound_output_of_another_batch_size_is_a_request_error(linear: Any, weights: np.ndarray):
    # Only the run can tell: the batch axis is free in the model's signature.
    out = np.full((1, CLASSES), 5, np.float32)
    run = linear.bind({"input": batch(2)}, {"output": out})
    with pytest.raises(RequestError, match="shape"):
        run()
    assert (out == 5).all()
    close(linear.run({"input": batch(1)})["output"], batch(1) @ weights)  # and it still works


@pytest.mark.parametrize(
    "garbage", [b"", b"garbage", b"\x00" * 4096, b'{"format": 1}', b"\x08\x07"]
)
def test_garbage_is_a_backend_error(row: Row, tmp_path: Path, garbage: bytes):
    artifact = tmp_path / "garbage"
    artifact.write_bytes(garbage)
    with pytest.raises(BackendError) as caught:
        backend(row.name).load(artifact, {})
    assert str(artifact) in str(caught.value)


def test_a_truncated_artifact_is_a_backend_error(row: Row, tmp_path: Path, weights: np.ndarray):
    artifact = row.linear(tmp_path, weights)
    artifact.write_bytes(artifact.read_bytes()[: artifact.stat().st_size // 2])
    with pytest.raises(BackendError):
        backend(row.name).load(artifact, {})


def test_an_absent_artifact_is_a_backend_error(row: Row, tmp_path: Path):
    with pytest.raises(BackendError, match="absent"):
        backend(row.name).load(tmp_path / "absent", {})


def test_an_unknown_option_names_the_nearest(row: Row, tmp_path: Path, weights: np.ndarray):
    unknown, known = row.misspelt
    with pytest.raises(UsageError) as caught:
        backend(row.name).load(row.linear(tmp_path, weights), {unknown: 1})
    assert caught.value.where == f"options.{unknown}"
    assert f"did you mean {known!r}" in str(caught.value)


def test_an_option_of_a_wrong_type_is_a_usage_error(row: Row, tmp_path: Path, weights: np.ndarray):
    name, value = row.wrong_type
    with pytest.raises(UsageError) as caught:
        backend(row.name).load(row.linear(tmp_path, weights), {name: value})
    assert caught.value.where == f"options.{name}"
    assert "str" in str(caught.value)


# A template: imports the library, prepares it, forks; each child loads, runs, and is right.
TEMPLATE = """
import os, sys
from pathlib import Path
import numpy as np
from edge_runtime.backends import backend
from edge_runtime.backends.protocol import Preparing

name, artifact, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
template = backend(name)
template.version()
if isinstance(template, Preparing):
    threads = len(os.listdir("/proc/self/task"))
    template.prepare()
    assert len(os.listdir("/proc/self/task")) <= threads, "threads do not survive a fork"
for child in range(3):
    pid = os.fork()
    if pid == 0:
        model = template.load(artifact, {})
        given = np.full((rows, 16), child, np.float32)
        out = np.empty((rows, 4), np.float32)
        run = model.bind({"input": given}, {"output": out})
        run()
        want = model.run({"input": given})["output"]
        os._exit(0 if np.array_equal(out, want) and np.isfinite(out).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0, f"child {child} failed"
"""


def test_a_fork_safe_backend_works_after_a_fork(row: Row, tmp_path: Path, weights: np.ndarray):
    if not backend(row.name).fork_safe:
        pytest.skip("this backend says that it is started fresh")
    artifact = row.linear(tmp_path, weights)
    done = subprocess.run(
        [sys.executable, "-c", TEMPLATE, row.name, str(artifact), "3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a library writes to stderr, which is the journal's"


def test_the_table_refuses_an_unknown_backend_and_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        backend("onnxrumtime")
    assert "did you mean 'onnxruntime'" in str(caught.value)
    assert "reference" in str(caught.value)


def test_the_table_imports_no_library():
    code = (
        "import sys, edge_runtime.backends; "
        "print([m for m in ('numpy', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
