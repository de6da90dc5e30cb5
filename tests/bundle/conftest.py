"""Real small ONNX models and bundles, made with the onnx package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime import backends
from edge_runtime.bundle import archive, source
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.create import Load
from edge_runtime.bundle.manifest import Manifest

WIDTH, CLASSES = 16, 4


def weights(seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((WIDTH, CLASSES)).astype(np.float32)


def model_of(
    nodes: list[Any],
    initializers: Mapping[str, Any],
    inputs: Mapping[str, tuple[int, list[Any]]] | None = None,
    outputs: Mapping[str, tuple[int, list[Any]]] | None = None,
    **extra: Any,
) -> onnx.ModelProto:
    """A model of opset 17; "input" FP32 [N, 16] -> "output" FP32 [N, 4] unless told otherwise."""
    inputs = inputs or {"input": (TensorProto.FLOAT, ["N", WIDTH])}
    outputs = outputs or {"output": (TensorProto.FLOAT, ["N", CLASSES])}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(data), name) for name, data in initializers.items()],
    )
    opsets = extra.pop("opset_imports", [helper.make_opsetid("", 17)])
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=8, producer_name="tests", **extra
    )


def linear(seed: int = 0, *, batch: Any = "N", output_batch: Any = None) -> onnx.ModelProto:
    """A matrix product: the smallest model with weights."""
    return model_of(
        [helper.make_node("MatMul", ["input", "w"], ["output"])],
        {"w": weights(seed)},
        {"input": (TensorProto.FLOAT, [batch, WIDTH])},
        {"output": (TensorProto.FLOAT, [output_batch or batch, CLASSES])},
    )


def linear_int8(output_scale: float = 0.05) -> onnx.ModelProto:
    """The same product, statically quantized (QDQ), its output too."""
    full = weights()
    scale = np.float32(np.abs(full).max() / 127)
    quantized = np.clip(np.round(full / scale), -127, 127).astype(np.int8)
    names = {
        "si": np.float32(1 / 255),
        "zi": np.uint8(0),
        "sw": scale,
        "zw": np.int8(0),
        "qw": quantized,
        "so": np.float32(output_scale),
        "zo": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "si", "zi"], ["qi"]),
        helper.make_node("DequantizeLinear", ["qi", "si", "zi"], ["di"]),
        helper.make_node("DequantizeLinear", ["qw", "sw", "zw"], ["dw"]),
        helper.make_node("MatMul", ["di", "dw"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "so", "zo"], ["qo"]),
        helper.make_node("DequantizeLinear", ["qo", "so", "zo"], ["output"]),
    ]
    return model_of(nodes, names)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def load_with_backend() -> Load:
    """The real backends, as the command line passes them."""
    return lambda variant, path: backends.backend(variant.backend).load(path, variant.options).run


def document(blob: bytes = b"artifact", **changes: Any) -> dict[str, Any]:
    """A small right document; `changes` replace its keys."""
    golden = np.zeros(4, np.float32).tobytes()
    tensor = {
        "datatype": "FP32",
        "shape": [1, 4],
        "blob": {"sha256": hashlib.sha256(golden).hexdigest(), "size": len(golden)},
    }
    artifact = {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
    return {
        "schema": 1,
        "name": "model",
        "version": 3,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
        "batch_axis": 0,
        "variants": [
            {
                "name": "fp32",
                "backend": "onnxruntime",
                "artifact": {**artifact, "filename": "model.onnx"},
            }
        ],
        "goldens": [{"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}],
        **changes,
    }


def bundle_of(blob: bytes = b"artifact", **changes: Any) -> archive.Bundle:
    """An open bundle of `document`, in memory."""
    contents = [blob, np.zeros(4, np.float32).tobytes()]
    manifest: Manifest = manifests.from_document(document(blob, **changes))
    sources = {hashlib.sha256(data).hexdigest(): source.from_bytes(data) for data in contents}
    return archive.compose(manifest, sources)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A small `.bundle` file."""
    path = tmp_path / "model.bundle"
    archive.pack(bundle_of(), path)
    return path
