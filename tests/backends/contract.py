"""What any backend must do: one set of tests, one row per backend.

Law of this file: nothing here knows a library. A row says how to write the three artifacts that the
tests run; a new backend is a new row in ROWS and nothing else. All artifacts take free batch sizes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import reference
from tests import tflite_writer

WIDTH, CLASSES = 16, 4


@dataclass(frozen=True)
class Row:
    """How one backend is put to the contract.

    linear: writes a model "input" FP32 [N, 16] -> "output" FP32 [N, 4], input @ weights.
    pair: writes a model "a", "b" FP32 [N, 3] -> "sum" = a + b, "double" = 2 a, both FP32 [N, 3].
    """

    name: str
    library: str  # the module that must be importable for the row to run
    linear: Callable[[Path, np.ndarray], Path]
    pair: Callable[[Path], Path]
    options: Mapping[str, Any]  # a valid choice that is not the default
    misspelt: tuple[str, str]  # an unknown option and the known one that it resembles
    wrong_type: tuple[str, Any]


def reference_linear(folder: Path, weights: np.ndarray) -> Path:
    document = reference.tiny(WIDTH, CLASSES)
    document["nodes"][0]["weights"] = weights.tolist()
    return _write_json(folder / "linear.reference.json", document)


def reference_pair(folder: Path) -> Path:
    tensor = {"datatype": "FP32", "shape": [-1, 3]}
    document = {
        "format": reference.FORMAT,
        "inputs": [{"name": name, **tensor} for name in ("a", "b")],
        "outputs": [{"name": name, **tensor} for name in ("sum", "double")],
        "nodes": [
            {"op": "add", "inputs": ["a", "b"], "output": "sum"},
            {"op": "affine", "inputs": ["a"], "output": "double", "scale": 2},
        ],
    }
    return _write_json(folder / "pair.reference.json", document)


def _write_json(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def onnx_linear(folder: Path, weights: np.ndarray) -> Path:
    from onnx import helper, numpy_helper

    nodes = [helper.make_node("MatMul", ["input", "weights"], ["output"])]
    return write_onnx(
        folder / "linear.onnx",
        nodes,
        {"input": ("FLOAT", ["N", WIDTH])},
        {"output": ("FLOAT", ["N", CLASSES])},
        [numpy_helper.from_array(weights, "weights")],
    )


def onnx_pair(folder: Path) -> Path:
    from onnx import helper

    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Add", ["a", "a"], ["double"]),
    ]
    tensor = ("FLOAT", ["N", 3])
    return write_onnx(
        folder / "pair.onnx", nodes, {"a": tensor, "b": tensor}, {"sum": tensor, "double": tensor}
    )


def write_onnx(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[str, list[Any]]],
    outputs: dict[str, tuple[str, list[Any]]],
    weights: list[Any] | None = None,
) -> Path:
    """Tensors are name -> (element type, shape with names for free dimensions)."""
    import onnx
    from onnx import TensorProto, helper

    def values(tensors: dict[str, tuple[str, list[Any]]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
            for name, (kind, shape) in tensors.items()
        ]

    graph = helper.make_graph(nodes, "test", values(inputs), values(outputs), weights or [])
    # Opset 17 and IR 8 are what the oldest onnxruntime that we allow (1.20) reads with ease.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def tflite_linear(folder: Path, weights: np.ndarray) -> Path:
    return _write_bytes(folder / "linear.tflite", tflite_writer.linear(weights))


def tflite_pair(folder: Path) -> Path:
    return _write_bytes(folder / "pair.tflite", tflite_writer.pair())


def _write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def installed_tflite() -> str:
    """The library that the backend `litert` will use."""
    return "ai_edge_litert" if find_spec("ai_edge_litert") else "tflite_runtime"


ROWS = {
    row.name: row
    for row in (
        Row(
            name="reference",
            library="numpy",
            linear=reference_linear,
            pair=reference_pair,
            options={"concurrent": True, "run_ms": 0.0},
            misspelt=("runms", "run_ms"),
            wrong_type=("run_ms", "fast"),
        ),
        Row(
            name="onnxruntime",
            library="onnxruntime",
            linear=onnx_linear,
            pair=onnx_pair,
            options={"threads": 2, "graph_level": "basic"},
            misspelt=("thread", "threads"),
            wrong_type=("threads", "two"),
        ),
        Row(
            name="litert",
            library=installed_tflite(),
            linear=tflite_linear,
            pair=tflite_pair,
            options={"threads": 2, "xnnpack": False, "interpreters": 2},
            misspelt=("thread", "threads"),
            wrong_type=("threads", "two"),
        ),
        Row(
            name="openvino",
            library="openvino",
            linear=onnx_linear,
            pair=onnx_pair,
            options={"streams": 2, "threads": 2, "precision": "model", "hint": "throughput"},
            misspelt=("stream", "streams"),
            wrong_type=("streams", "two"),
        ),
    )
}


def compiled_delegate(folder: Path) -> Path:
    """The C delegate of `delegate/`, compiled; without a compiler the test is skipped."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to build a delegate with")
    out = folder / "libtest_delegate.so"
    source = Path(__file__).parent / "delegate" / "delegate.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", out, source], check=True)
    return out


def require(library: str) -> None:
    """Skip where a library is not installed; it is not imported: some report that to their maker,
    and only our doors know how to prevent it.
    """
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed", allow_module_level=True)


def openvino() -> Any:
    """The library, imported by its door; the test or module is skipped where it is missing."""
    require("openvino")
    from edge_runtime.backends import openvino_library

    return openvino_library.library()


def rows() -> list[Any]:
    """The rows as pytest parameters; a backend that is not installed is skipped by name."""
    return [pytest.param(row, id=row.name) for row in ROWS.values()]
