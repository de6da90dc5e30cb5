"""What is particular to onnxruntime: zero copy for real, options, placement, odd datatypes."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.backends import onnxruntime as door
from edge_runtime.errors import BackendError, RequestError, UsageError
from edge_runtime.tensors import TensorSpec

from . import contract

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
helper = pytest.importorskip("onnx.helper", reason="onnx is not installed")

# 1.20.1 is old, 1.32.0 is not; where the border lies was not looked for.
IS_OLD = not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")


def load(artifact: Path, **options: Any) -> door.OnnxModel:
    return door.OnnxRuntime().load(artifact, options)


def identity(folder: Path, element_type: str) -> Path:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    tensor = (element_type, ["N", 2])
    return contract.write_onnx(folder / f"{element_type}.onnx", nodes, {"x": tensor}, {"y": tensor})


# In a process of its own, so that the peak is its own. Prints what a run added, in input sizes.
PEAK = """
import sys
from pathlib import Path
import numpy as np
from edge_runtime.backends import backend

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

model = backend("onnxruntime").load(Path(sys.argv[1]), {"memory_arena": False})
given = np.ones((8_000_000, 2), np.float32)
out = np.full_like(given, 2)
small = {"x": given[:1]}, {"y": out[:1]}
model.bind(*small)()
run = model.bind({"x": given}, {"y": out if sys.argv[2] == "bound" else None})
before = peak_bytes()
results = run()
assert (results["y"][::1000] == 1).all()
print((peak_bytes() - before) / given.nbytes)
"""


def test_a_bound_run_takes_no_memory_and_a_free_one_takes_the_output(tmp_path: Path):
    """64 MB in and out of an identity; the unbound run shows that the measurement can tell."""
    artifact = identity(tmp_path, "FLOAT")
    grown = {
        how: float(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(artifact), how],
                stdout=subprocess.PIPE,
                check=True,
                timeout=60,
            ).stdout
        )
        for how in ("bound", "free")
    }
    assert grown["bound"] < 0.1
    assert 0.9 < grown["free"] < 1.1


# Loads in a process of its own; prints what the load added to its own memory, in bytes.
LOAD = """
import sys
from pathlib import Path
from edge_runtime.backends import backend, heap

def private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

if sys.argv[2] == "kept":
    heap.give_back = lambda: None
loader = backend("onnxruntime")
loader.version()
before = private_bytes()
model = loader.load(Path(sys.argv[1]), {})
print(private_bytes() - before)
"""


@pytest.mark.skipif(IS_OLD, reason="this onnxruntime keeps weights that it has packed")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_a_load_frees_goes_back_to_the_system(tmp_path: Path):
    artifact = _many_layers(tmp_path / "layers.onnx", layers=200, width=160)
    added = {
        how: int(subprocess.check_output([sys.executable, "-c", LOAD, str(artifact), how]))
        for how in ("kept", "given")
    }
    weights_bytes = 200 * 160 * 160 * 4
    print(f"weights {weights_bytes}, added {added}")
    assert added["given"] < 1.5 * weights_bytes < added["kept"]


def _many_layers(path: Path, layers: int, width: int) -> Path:
    nodes, weights = [], []
    for number in range(layers):
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
        data = np.full((width, width), number, np.float32).tobytes()
        weights.append(helper.make_tensor(f"w{number}", 1, [width, width], data, raw=True))
    tensor = ("FLOAT", ["N", width])
    return contract.write_onnx(path, nodes, {"x0": tensor}, {f"x{layers}": tensor}, weights)


def test_the_library_is_given_the_arrays_own_addresses(tmp_path: Path):
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    assert door._memory(array, False) == ("cpu", 0, np.float32, (2, 2), value.data_ptr())


def test_it_binds_a_shared_mapping_that_another_process_fills(tmp_path: Path):
    model = load(identity(tmp_path, "FLOAT"))
    region = mmap.mmap(-1, 4096)
    given = np.frombuffer(region, np.float32, 2).reshape(1, 2)
    out = np.frombuffer(region, np.float32, 2, 64).reshape(1, 2)
    run = model.bind({"x": given}, {"y": out})
    pid = os.fork()
    if pid == 0:  # no library call here: only memory is written
        given[...] = [3, 4]
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    run()
    assert out.tolist() == [[3, 4]]


def test_outputs_whose_shape_depends_on_the_data_may_change_between_runs(tmp_path: Path):
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Relu", ["x"], ["y"])]
    artifact = contract.write_onnx(
        tmp_path / "nonzero.onnx",
        nodes,
        {"x": ("FLOAT", ["N", 4])},
        {"where": ("INT64", [2, "K"]), "y": ("FLOAT", ["N", 4])},
    )
    given, y = np.ones((1, 4), np.float32), np.empty((1, 4), np.float32)
    run = load(artifact).bind({"x": given}, {"where": None, "y": y})
    for count in (4, 1, 0, 3):
        given[...] = 0
        given[0, :count] = 1
        results = run()
        assert results["where"].tolist() == [[0] * count, list(range(count))]
        assert results["y"] is y and y.sum() == count


@pytest.mark.parametrize(
    ("element_type", "datatype", "values"),
    [
        ("BOOL", "BOOL", np.array([[True, False]])),
        ("UINT8", "UINT8", np.array([[0, 255]], np.uint8)),
        ("INT64", "INT64", np.array([[-(2**62), 2**62]], np.int64)),
        ("FLOAT16", "FP16", np.array([[0.5, -2]], np.float16)),
        ("DOUBLE", "FP64", np.array([[0.1, 1e300]])),
        ("BFLOAT16", "BF16", np.array([[0x3F80, 0xC000]], np.uint16)),
    ],
)
def test_a_datatype_survives_run_and_both_ways_to_bind(
    tmp_path: Path, element_type: str, datatype: str, values: np.ndarray
):
    model = load(identity(tmp_path, element_type))
    assert model.inputs == (TensorSpec("x", datatype, (-1, 2)),)
    out = np.empty_like(values)
    results = [
        model.run({"x": values}),
        model.bind({"x": values}, {"y": None})(),
        model.bind({"x": values}, {"y": out})(),
    ]
    for result in results:
        assert result["y"].dtype == values.dtype
        np.testing.assert_array_equal(result["y"], values)


class TestText:
    def test_bytes_come_back_as_bytes(self, tmp_path: Path):
        model = load(identity(tmp_path, "STRING"))
        assert model.inputs[0].datatype == "BYTES"
        given = np.array([[b"edge", "Br\u00fccke".encode()]], dtype=object)
        assert model.run({"x": given})["y"].tolist() == given.tolist()

    def test_a_binding_reads_and_writes_the_given_objects(self, tmp_path: Path):
        given = np.array([[b"a", b"b"]], dtype=object)
        out = np.empty((1, 2), dtype=object)
        run = load(identity(tmp_path, "STRING")).bind({"x": given}, {"y": out})
        given[0, 1] = b"changed"
        assert run()["y"] is out
        assert out.tolist() == [[b"a", b"changed"]]

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path):
        model = load(identity(tmp_path, "STRING"))
        with pytest.raises(RequestError, match="UTF-8"):
            model.run({"x": np.array([[b"\xff\xfe", b""]], dtype=object)})

    def test_a_bound_text_output_of_another_shape_is_refused(self, tmp_path: Path):
        given = np.array([[b"a", b"b"]], dtype=object)
        run = load(identity(tmp_path, "STRING")).bind({"x": given}, {"y": np.empty((2, 2), object)})
        with pytest.raises(RequestError, match=r"\[1, 2\]"):
            run()


class TestOptions:
    def test_a_provider_that_is_not_there_is_an_error_that_lists_what_is(self, tmp_path: Path):
        artifact = identity(tmp_path, "FLOAT")
        with pytest.raises(BackendError) as caught:
            load(artifact, providers=[{"name": "NoSuchExecutionProvider"}, door.CPU])
        assert caught.value.where == "options.providers[0]"
        assert door.CPU in caught.value.expected

    @pytest.mark.parametrize(
        ("provider", "text"),
        [
            ("CUDAExecutionProvider", "pip install onnxruntime-gpu"),
            ("XnnpackExecutionProvider", "--use_xnnpack"),
            ("QNNExecutionProvidr", "did you mean 'QNNExecutionProvider'?"),
        ],
    )
    def test_a_missing_provider_has_its_remedy(self, tmp_path: Path, provider: str, text: str):
        if provider in onnxruntime.get_available_providers():
            pytest.skip(f"this onnxruntime has {provider}")
        with pytest.raises(BackendError) as caught:
            load(identity(tmp_path, "FLOAT"), providers=[provider])
        assert text in caught.value.remedy

    @pytest.mark.skipif(IS_OLD, reason="this onnxruntime takes no plug-ins")
    def test_a_plugin_that_is_none_is_an_error_that_names_its_file(self, tmp_path: Path):
        library = tmp_path / "libplugin.so"
        library.write_bytes(b"no library")
        provider = {"name": "OtherExecutionProvider", "library": str(library)}
        for _ in range(2):  # not remembered as done
            with pytest.raises(BackendError) as caught:
                load(identity(tmp_path, "FLOAT"), providers=[provider])
            assert caught.value.where == "options.providers[0]"
            assert str(library) in caught.value.expected

    def test_a_provider_takes_its_own_options(self, tmp_path: Path):
        provider = {"name": door.CPU, "options": {"use_arena": "0"}}
        model = load(identity(tmp_path, "FLOAT"), providers=[provider])
        assert model.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[1, 1]]

    def test_every_option_reaches_the_session(self, tmp_path: Path):
        options = door.Options(
            threads=2,
            inter_op_threads=3,
            execution_mode="parallel",
            graph_level="basic",
            memory_arena=False,
            spinning=True,
            cpu_fallback=False,
        )
        session = door._session_options(onnxruntime, options)
        assert session.intra_op_num_threads == 2
        assert session.inter_op_num_threads == 3
        assert session.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        assert session.graph_optimization_level == level
        assert not session.enable_cpu_mem_arena
        assert session.get_session_config_entry("session.intra_op.allow_spinning") == "1"
        assert session.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"

    def test_by_default_there_is_one_thread_and_no_spinning(self):
        session = door._session_options(onnxruntime, door.Options())
        assert session.intra_op_num_threads == 1
        assert session.get_session_config_entry("session.intra_op.allow_spinning") == "0"

    def test_a_dimension_is_fixed_by_its_name(self, tmp_path: Path):
        model = load(identity(tmp_path, "FLOAT"), dimensions={"N": 3})
        assert model.inputs[0].shape == (3, 2)
        with pytest.raises(RequestError, match=r"\[1, 2\]"):
            model.run({"x": np.ones((1, 2), np.float32)})

    def test_a_dimension_that_the_model_has_not_is_an_error(self, tmp_path: Path):
        with pytest.raises(UsageError) as caught:
            load(identity(tmp_path, "FLOAT"), dimensions={"M": 1})
        assert caught.value.where == "options.dimensions.M"
        assert "N" in caught.value.expected

    @pytest.mark.parametrize(
        ("options", "where"),
        [
            ({"threads": 0}, "options.threads"),
            ({"threads": 100_000}, "options.threads"),
            ({"graph_level": "most"}, "options.graph_level"),
            ({"providers": [{"name": "x", "option": {}}]}, "options.providers[0].option"),
            ({"dimensions": {"N": "one"}}, "options.dimensions[...]"),
        ],
    )
    def test_a_wrong_value_is_named_by_its_key_path(
        self, tmp_path: Path, options: dict[str, Any], where: str
    ):
        with pytest.raises(UsageError) as caught:
            load(identity(tmp_path, "FLOAT"), **options)
        assert caught.value.where == where


class TestPlacement:
    @pytest.mark.skipif(IS_OLD, reason="this onnxruntime cannot tell where nodes were placed")
    def test_it_counts_the_nodes_of_each_provider(self, tmp_path: Path):
        model = load(contract.onnx_pair(tmp_path))
        assert [(p.device, p.detail, p.nodes) for p in model.placement] == [("CPU", door.CPU, 2)]

    def test_a_library_that_cannot_tell_says_so(self):
        class Older:
            def get_providers(self) -> list[str]:
                return ["QNNExecutionProvider", door.CPU]

        first, last = door._placement(Older(), [])
        assert (first.device, first.nodes) == ("QNN", 0)
        assert "not known" in first.detail and last.device == "CPU"


class TestFailures:
    def test_a_model_with_a_sequence_is_refused_by_name(self, tmp_path: Path):
        import onnx

        given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N"])
        made = helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, None)
        node = helper.make_node("SplitToSequence", ["x"], ["parts"])
        model = helper.make_model(
            helper.make_graph([node], "g", [given], [made]),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        onnx.save(model, tmp_path / "sequence.onnx")
        with pytest.raises(BackendError, match="'parts'"):
            load(tmp_path / "sequence.onnx")

    def test_a_failing_node_is_a_backend_error_and_stderr_stays_silent(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ):
        nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
        table = helper.make_tensor("table", 1, [2], [1.0, 2.0])
        artifact = contract.write_onnx(
            tmp_path / "gather.onnx",
            nodes,
            {"x": ("INT64", ["N"])},
            {"y": ("FLOAT", ["N"])},
            [table],
        )
        model = load(artifact)
        given = np.array([7])
        with pytest.raises(BackendError, match="run"):
            model.run({"x": given})
        with pytest.raises(BackendError, match="run"):
            model.bind({"x": given}, {"y": None})()
        with pytest.raises(BackendError, match="run"):
            model.bind({"x": given}, {"y": np.empty(1, np.float32)})()
        assert capfd.readouterr().err == ""
        assert model.run({"x": np.array([1])})["y"].tolist() == [2]

    def test_a_library_that_does_not_import_is_a_backend_error(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        door._library.cache_clear()
        with pytest.raises(BackendError, match=r"edge-runtime\[onnxruntime\]"):
            backend("onnxruntime").version()

    def test_every_class_that_the_library_raises_is_caught(self):
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        assert {state.Fail, state.InvalidArgument, state.EPFail} <= set(door._foreign())


def test_bfloat16_memory_is_copied_to_the_byte(tmp_path: Path):
    """The one output that numpy cannot wrap: read through its address, see _array."""
    model = load(identity(tmp_path, "BFLOAT16"))
    values = np.arange(2000, dtype=np.uint16).reshape(1000, 2)
    result = model.bind({"x": values}, {"y": None})()["y"]
    assert ctypes.string_at(result.ctypes.data, result.nbytes) == values.tobytes()


def test_a_convolution_left_float_between_quantized_tensors_computes_in_float(tmp_path: Path):
    """The library rounds its weights with one scale for both channels: 0.3 beside 100 is then 0."""
    weights = np.array([[100, -100], [0.3, 0.3]], np.float32).reshape(2, 2, 1, 1)
    pair = ["one", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", *pair], ["xd"]),
        helper.make_node("Conv", ["xd", "w"], ["c"], name="float"),
        helper.make_node("QuantizeLinear", ["c", *pair], ["c8"]),
        helper.make_node("DequantizeLinear", ["c8", *pair], ["y"]),
    ]
    constants = {"w": weights, "one": np.array(1, np.float32), "zero": np.array(0, np.uint8)}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "left-float",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 1, 1])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 1, 1])],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, str(tmp_path / "left-float.onnx"))
    answer = load(tmp_path / "left-float.onnx").run({"x": np.full((1, 2, 1, 1), 200, np.float32)})
    assert answer["y"].reshape(-1).tolist() == [0, 120]
