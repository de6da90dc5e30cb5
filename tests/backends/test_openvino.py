"""What is particular to OpenVINO: free shapes, devices, precision, state, odd datatypes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend, openvino_library
from edge_runtime.backends import openvino as door
from edge_runtime.errors import BackendError, RequestError, UsageError
from edge_runtime.tensors import TensorSpec

from . import contract

openvino = contract.openvino()
helper = pytest.importorskip("onnx.helper", reason="onnx is not installed")


def load(artifact: Path, **options: Any) -> door.OpenVinoModel:
    return door.OpenVino().load(artifact, options)


def identity(folder: Path, element_type: str = "FLOAT") -> Path:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    tensor = (element_type, ["N", 2])
    return contract.write_onnx(folder / f"{element_type}.onnx", nodes, {"x": tensor}, {"y": tensor})


def nonzero(folder: Path) -> Path:
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Relu", ["x"], ["y"])]
    return contract.write_onnx(
        folder / "nonzero.onnx",
        nodes,
        {"x": ("FLOAT", ["N", 4])},
        {"where": ("INT64", [2, "K"]), "y": ("FLOAT", ["N", 4])},
    )


class TestMemory:
    def test_outputs_whose_shape_depends_on_the_data_may_change_between_runs(self, tmp_path: Path):
        given, y = np.ones((1, 4), np.float32), np.empty((1, 4), np.float32)
        run = load(nonzero(tmp_path)).bind({"x": given}, {"where": None, "y": y})
        for count in (4, 1, 0, 3):
            given[...] = 0
            given[0, :count] = 1
            results = run()
            assert results["where"].tolist() == [[0] * count, list(range(count))]
            assert results["y"] is y and y.sum() == count

    def test_a_bound_output_that_outgrows_its_array_is_never_an_old_answer(self, tmp_path: Path):
        """The library leaves the array as it was and reports nothing."""
        given, where = np.ones((1, 4), np.float32), np.zeros((2, 2), np.int64)
        run = load(nonzero(tmp_path)).bind({"x": given}, {"where": where})
        given[0, 2:] = 0
        assert run()["where"] is where and where.tolist() == [[0, 0], [0, 1]]
        for count in (4, 1):
            given[...] = 0
            given[0, :count] = 1
            with pytest.raises(RequestError, match="shape"):
                run()

    def test_after_the_first_run_the_library_writes_into_the_given_memory(self, tmp_path: Path):
        x, y = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
        model = load(identity(tmp_path))
        requests: list[Any] = []
        make = model._request
        model._request = lambda: requests.append(make()) or requests[-1]  # type: ignore[method-assign]
        run = model.bind({"x": x}, {"y": y})
        run()
        addresses = [requests[0].get_input_tensor(0).data, requests[0].get_output_tensor(0).data]
        assert [a.ctypes.data for a in addresses] == [x.ctypes.data, y.ctypes.data]
        x[...] = 5
        assert run()["y"] is y and (y == 5).all()

    def test_read_only_memory_is_read_in_place(self, tmp_path: Path):
        backing = bytearray(16)
        x = np.frombuffer(memoryview(backing).toreadonly(), np.float32).reshape(2, 2)
        assert not x.flags.writeable
        run = load(identity(tmp_path)).bind({"x": x}, {"y": None})
        np.frombuffer(backing, np.float32)[...] = 7
        assert (run()["y"] == 7).all()

    @pytest.mark.parametrize(
        ("element_type", "datatype", "values"),
        [
            ("BOOL", "BOOL", np.array([[True, False]])),
            ("UINT8", "UINT8", np.array([[0, 255]], np.uint8)),
            ("UINT16", "UINT16", np.array([[0, 65535]], np.uint16)),
            ("INT64", "INT64", np.array([[-(2**31), 2**31 - 1]], np.int64)),
            ("FLOAT16", "FP16", np.array([[0.5, -2]], np.float16)),
            ("DOUBLE", "FP64", np.array([[0.5, 1e30]])),
            ("BFLOAT16", "BF16", np.array([[0x3F80, 0xC000]], np.uint16)),
        ],
    )
    def test_a_datatype_survives_run_and_both_ways_to_bind(
        self, tmp_path: Path, element_type: str, datatype: str, values: np.ndarray
    ):
        model = load(identity(tmp_path, element_type))
        assert model.inputs == (TensorSpec("x", datatype, (-1, 2)),)
        out = np.empty_like(values)
        bound = model.bind({"x": values}, {"y": out})
        bound()
        results = [model.run({"x": values}), model.bind({"x": values}, {"y": None})(), bound()]
        for result in results:
            assert result["y"].dtype == values.dtype
            np.testing.assert_array_equal(result["y"], values)


class TestPrecision:
    """On processors with bf16 units the library's own default is bf16."""

    def test_it_is_float32_unless_asked_otherwise(self, tmp_path: Path):
        model = load(contract.onnx_linear(tmp_path, np.ones((16, 4), np.float32)))
        assert model.placement[0].detail.endswith("f32")
        x = np.full((1, 16), 1 + 2**-12, np.float32)  # bf16 has 8 bits
        np.testing.assert_allclose(model.run({"input": x})["output"], x.sum(), rtol=1e-6)

    def test_another_one_is_taken_and_reported(self, tmp_path: Path):
        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this processor does not compute in bf16")
        artifact = contract.onnx_linear(tmp_path, np.ones((16, 4), np.float32))
        model = load(artifact, precision="bf16")
        assert model.placement[0].detail.endswith("bf16")


class TestDevices:
    def test_auto_goes_on_to_the_next_device_and_keeps_the_reason(self, tmp_path: Path):
        if "NPU" in openvino.Core().available_devices:
            pytest.skip("this machine has an NPU")
        model = load(identity(tmp_path), device="AUTO:NPU,CPU")
        (place,) = model.placement
        assert place.device == "CPU" and place.nodes == 1
        assert "refused by NPU" in place.detail
        assert model.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[1, 1]]

    def test_auto_alone_takes_what_the_machine_has(self, tmp_path: Path):
        assert load(identity(tmp_path), device="AUTO").placement

    def test_a_device_that_is_not_there_is_an_error_with_its_reason(self, tmp_path: Path):
        if "GPU" in openvino.Core().available_devices:
            pytest.skip("this machine has a GPU that OpenVINO drives")
        for device in ("GPU", "AUTO:GPU", "HETERO:GPU,CPU"):
            with pytest.raises(BackendError) as caught:
                load(identity(tmp_path), device=device)
            assert caught.value.where == "options.device" and "driver" in caught.value.remedy

    def test_hetero_counts_nodes_by_device(self, tmp_path: Path):
        model = load(contract.onnx_pair(tmp_path), device="HETERO:CPU")
        assert [(p.device, p.nodes) for p in model.placement] == [("CPU", 2)]

    @pytest.mark.parametrize("device", ["cpu", "TPU", "AUTO:", "AUTO:CPU,", "CPU;rm", "MULTI:CPU"])
    def test_what_is_no_device_is_a_usage_error(self, tmp_path: Path, device: str):
        with pytest.raises(UsageError) as caught:
            load(identity(tmp_path), device=device)
        assert caught.value.where == "options.device"


class Kept(dict[str, bytes]):
    """A cache in memory, which counts what was asked and given."""

    def __init__(self) -> None:
        self.hits = 0

    def get(self, key: str) -> bytes | None:  # type: ignore[override]
        blob = super().get(key)
        self.hits += blob is not None
        return blob

    def put(self, key: str, blob: bytes) -> None:
        self[key] = blob


class TestCompiled:
    """On the CPU, told to keep: the library does the same for an NPU."""

    def load(self, artifact: Path, cache: Kept, **options: Any) -> door.OpenVinoModel:
        backend = door.OpenVino()
        backend.cache = cache
        return backend.load(artifact, {"compiled": "keep", **options})

    def test_the_second_load_takes_what_the_first_has_compiled(
        self, tmp_path: Path, weights: np.ndarray
    ):
        artifact, cache = contract.onnx_linear(tmp_path, weights), Kept()
        x = np.ones((3, 16), np.float32)
        answers = []
        for hits in (0, 1):
            model = self.load(artifact, cache)
            assert (len(cache), cache.hits) == (1, hits)
            run = model.bind({"input": x}, {"output": np.empty((3, 4), np.float32)})
            answers += [model.run({"input": x})["output"], run()["output"], run()["output"]]
        for answer in answers:
            np.testing.assert_array_equal(answer, answers[0])

    def test_other_options_shapes_or_versions_are_other_blobs(
        self, tmp_path: Path, weights: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ):
        artifact, cache = contract.onnx_linear(tmp_path, weights), Kept()
        choices: list[dict[str, Any]] = [{}, {"streams": 2}, {"shapes": {"input": [1, 16]}}]
        for options in choices:
            self.load(artifact, cache, **options)
        monkeypatch.setattr(openvino, "__version__", "2031.1")
        self.load(artifact, cache)
        assert len(cache) == 4 and cache.hits == 0

    @pytest.mark.parametrize("damage", [lambda blob: b"", lambda blob: blob[: len(blob) // 2]])
    def test_a_blob_that_the_library_refuses_is_compiled_again(
        self, tmp_path: Path, weights: np.ndarray, damage: Any
    ):
        artifact, cache = contract.onnx_linear(tmp_path, weights), Kept()
        self.load(artifact, cache)
        ((key, blob),) = cache.items()
        cache[key] = damage(blob)
        model = self.load(artifact, cache)
        assert len(cache[key]) == len(blob)
        x = np.ones((1, 16), np.float32)
        np.testing.assert_allclose(model.run({"input": x})["output"], x @ weights, rtol=1e-5)

    def test_by_default_nothing_is_kept_for_the_cpu(self, tmp_path: Path):
        backend, cache = door.OpenVino(), Kept()
        backend.cache = cache
        backend.load(identity(tmp_path), {})
        assert not cache


class TestOptions:
    def test_every_option_reaches_the_compiled_model(self, tmp_path: Path):
        model = load(identity(tmp_path), streams=2, hint="throughput")
        told = model._compiled.get_property
        assert told("NUM_STREAMS") == 2
        assert told("PERFORMANCE_HINT") == "THROUGHPUT"
        assert model.concurrent

    def test_by_default_there_is_one_thread_that_is_not_pinned(self, tmp_path: Path):
        model = load(identity(tmp_path))
        told = model._compiled.get_property
        assert (told("NUM_STREAMS"), told("INFERENCE_NUM_THREADS")) == (1, 1)
        assert not told("ENABLE_CPU_PINNING") and not model.concurrent

    def test_a_shape_is_fixed_by_the_inputs_name(self, tmp_path: Path):
        model = load(identity(tmp_path), shapes={"x": [3, 2]})
        assert model.inputs[0].shape == model.outputs[0].shape == (3, 2)
        with pytest.raises(RequestError, match=r"\[1, 2\]"):
            model.run({"x": np.ones((1, 2), np.float32)})

    @pytest.mark.parametrize("shapes", [{"z": [1, 2]}, {"input": [1, 17]}])
    def test_a_shape_that_does_not_fit_is_an_error(self, tmp_path: Path, shapes: Any):
        artifact = contract.onnx_linear(tmp_path, np.ones((16, 4), np.float32))
        with pytest.raises(UsageError) as caught:
            load(artifact, shapes=shapes)
        assert caught.value.where.startswith("options.shapes")

    def test_two_streams_run_two_bindings_at_once(self, tmp_path: Path, weights: np.ndarray):
        import threading

        model = load(contract.onnx_linear(tmp_path, weights), streams=2)
        wrong: list[int] = []

        def work(seed: int) -> None:
            x = np.full((3, 16), seed, np.float32)
            out = np.empty((3, 4), np.float32)
            run = model.bind({"input": x}, {"output": out})
            for number in range(200):
                x[...] = seed * number
                run()
                if not np.allclose(out, x @ weights, rtol=1e-4, atol=1e-3):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not wrong and not any(thread.is_alive() for thread in threads)


class TestState:
    """A sum of all inputs so far, kept in the model."""

    @pytest.fixture
    def artifact(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        nodes = [helper.make_node("Add", ["x", "before"], ["after"])]
        nodes.append(helper.make_node("Identity", ["after"], ["y"]))
        tensor = ("FLOAT", [1, 2])
        path = contract.write_onnx(
            tmp_path / "sum.onnx",
            nodes,
            {"x": tensor, "before": tensor},
            {"y": tensor, "after": tensor},
        )
        from openvino._offline_transformations import apply_make_stateful_transformation

        read = door.read

        def read_with_state(given: Path) -> Any:
            model = read(given)
            apply_make_stateful_transformation(model, {"before": "after"})
            return model

        monkeypatch.setattr(door, "read", read_with_state)
        return path

    def test_by_default_every_run_begins_anew(self, artifact: Path):
        model = load(artifact)
        x = np.ones((1, 2), np.float32)
        run = model.bind({"x": x}, {"y": np.empty((1, 2), np.float32)})
        assert [run()["y"][0, 0] for _ in range(3)] == [1, 1, 1]
        assert [model.run({"x": x})["y"][0, 0] for _ in range(2)] == [1, 1]

    def test_a_kept_state_is_one_for_all_bindings_and_goldens_do_not_disturb_it(
        self, artifact: Path
    ):
        model = load(artifact, stateful="keep")
        x = np.ones((1, 2), np.float32)
        one = model.bind({"x": x}, {"y": np.empty((1, 2), np.float32)})
        other = model.bind({"x": x}, {"y": None})
        values = [run()["y"][0, 0] for run in (one, other, one)]
        assert values == [1, 2, 3]
        assert model.run({"x": x})["y"][0, 0] == 1  # a golden, or the heartbeat
        assert other()["y"][0, 0] == 4


class TestFailures:
    def test_garbage_is_refused_without_a_word_to_stderr(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        for number, garbage in enumerate([b"", b"garbage", b"\0\0\0\0TFL3" + bytes(64)]):
            path = tmp_path / str(number)
            path.write_bytes(garbage)
            with pytest.raises(BackendError):
                load(path)
        assert capfd.readouterr().err == ""

    def test_text_is_refused_by_name(self, tmp_path: Path):
        with pytest.raises(BackendError, match="'x' is a string"):
            load(identity(tmp_path, "STRING"))

    def test_a_library_that_does_not_import_is_a_backend_error(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "openvino", None)
        openvino_library.library.cache_clear()
        with pytest.raises(BackendError, match=r"edge-runtime\[openvino\]"):
            backend("openvino").version()

    def test_messages_name_no_file_of_the_librarys_source(self, tmp_path: Path):
        path = tmp_path / "short"
        path.write_bytes(b"garbage")
        with pytest.raises(BackendError) as caught:
            load(path)
        assert ".cpp" not in str(caught.value)


IMPORT = """
import os, sys
from edge_runtime.backends import backend
import numpy
before = len(os.listdir("/proc/self/task"))
backend("openvino").version()
print(len(os.listdir("/proc/self/task")) - before)
print(*[name for name in sys.modules if "telemetry" in name and sys.modules[name]])
"""


def test_the_import_starts_no_thread_sends_nothing_and_leaves_no_file(tmp_path: Path):
    """It reports to its maker by default; a build server would be spared, so we are none."""
    environ = {key: value for key, value in os.environ.items() if key != "CI"}
    environ |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    environ.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("device", ["CPU", "AUTO:CPU", "HETERO:CPU"])
def test_a_run_that_fails_is_an_error_and_the_next_one_is_right(
    tmp_path: Path, device: str, threads: int
):
    """The library loses the errors of a single thread: outputs stay what the last run left."""
    from onnx import helper, numpy_helper

    table = numpy_helper.from_array(np.arange(8, dtype=np.float32), "table")
    node = helper.make_node("GatherElements", ["table", "at"], ["y"])
    ends = {"at": ("INT64", [1])}, {"y": ("FLOAT", [1])}
    path = contract.write_onnx(tmp_path / "m.onnx", [node], *ends, [table])
    model = backend("openvino").load(path, {"device": device, "threads": threads})
    at, y = np.array([3]), np.zeros(1, np.float32)
    run = model.bind({"at": at}, {"y": y})
    for right, wrong in ((3, 8), (6, 99), (5, -9)):
        at[0] = right
        assert run()["y"] == right and model.run({"at": at})["y"] == right
        at[0] = wrong
        with pytest.raises(BackendError, match="indices values"):
            run()
        with pytest.raises(BackendError, match="indices values"):
            model.run({"at": at})
        other = model.bind({"at": np.array([1])}, {"y": None})
        assert other()["y"] == 1, "what failed is queued still"
