"""Fewer bits for weights while the arithmetic stays float, and float16.

Law of this file: options, and the one graph change that is ours: weights stored as int8 with a
DequantizeLinear before their node. It makes files smaller, not runs faster; the report says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np

from edge_runtime.errors import UsageError
from quantize import onnx_door, onnxruntime_door, openvino_door
from quantize.passes import FLOAT, ONNX, OPENVINO, SMALL_WEIGHTS, Bench

Array = np.ndarray[Any, Any]

# Which input of a node holds its weights, and along which axis its output channels lie.
_WEIGHTS = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, 1), "MatMul": (1, -1)}
# Smaller tensors cost more in nodes than they save in bytes.
ELEMENTS_MIN = 256


class WeightOnly(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights in 8 or 4 bits, activations as they were.

    Attributes:
        bits: 8: any Conv, Gemm or MatMul, one scale per output channel. 4: MatMul only, in blocks
            (MatMulNBits, an operator of onnxruntime).
        block: values that share a scale, with 4 bits.
        exclude: nodes by name that keep their weights; others that share these keep them too.
    """

    bits: Literal[8, 4] = 8
    block: Annotated[int, msgspec.Meta(ge=16, le=256)] = 32
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        if self.bits == 4:
            onnxruntime_door.pack_weights(source, out, self)
        else:
            _store_as_int8(source, out, self.exclude)

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions()


class Float16(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights in float16; inputs and outputs stay as they were.

    In ONNX the arithmetic is float16 too, as far as the backend follows; in OpenVINO IR it is what
    the variant's option `precision` says.

    Attributes:
        exclude: nodes by name that stay float32; of ONNX models only.
    """

    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, OPENVINO, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        if source.suffix != openvino_door.IR:
            onnxruntime_door.to_float16(source, out, self.exclude)
        elif self.exclude:
            raise UsageError("OpenVINO IR takes no exclude list", where="float16.exclude")
        else:
            openvino_door.to_float16(source, out)

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions() | openvino_door.versions()


def _store_as_int8(source: Path, out: Path, exclude: tuple[str, ...]) -> None:
    onnx = onnx_door.library()
    model = onnx_door.load(source)
    if next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0) < 13:
        raise UsageError(
            "scales per channel need operator set 13",
            remedy="export the model with opset 13 or later",
        )
    onnx_door.refuse_unknown(exclude, model)
    weights = onnx_door.arrays(model)
    floats = {name for node in model.graph.node if node.name in exclude for name in node.input}
    done: set[str] = set()
    for node in list(model.graph.node):
        place, axis = _WEIGHTS.get(node.op_type, (1, 0))
        if node.op_type not in _WEIGHTS or len(node.input) <= place:
            continue
        name = node.input[place]
        if name in floats or name not in weights or weights[name].size < ELEMENTS_MIN:
            continue
        if node.op_type == "Gemm" and _transposed(node):
            axis = 0
        if name not in done:
            _replace(onnx, model.graph, name, weights[name], axis)
            done.add(name)
    if not done:
        raise UsageError("no Conv, Gemm or MatMul has constant weights of a useful size")
    onnx_door.save(model, out)


def _transposed(node: Any) -> bool:
    return any(one.name == "transB" and one.i for one in node.attribute)


def _replace(onnx: Any, graph: Any, name: str, values: Array, axis: int) -> None:
    """Store a weight as int8, one scale per slice of `axis`; its users see floats as before."""
    axis %= values.ndim
    others = tuple(i for i in range(values.ndim) if i != axis)
    scales = np.maximum(np.abs(values).max(axis=others), 1e-12).astype(np.float32) / 127
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    stored = np.clip(np.round(values / scales.reshape(shape)), -127, 127).astype(np.int8)
    kept = [one for one in graph.initializer if one.name != name]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    make = onnx.numpy_helper.from_array
    graph.initializer.extend(
        [
            make(stored, f"{name}_int8"),
            make(scales, f"{name}_scale"),
            make(np.zeros(scales.shape, np.int8), f"{name}_zero"),
        ]
    )
    given = [one for one in graph.input if one.name != name]  # old exports list weights as inputs
    del graph.input[:]
    graph.input.extend(given)
    node = onnx.helper.make_node(
        "DequantizeLinear",
        [f"{name}_int8", f"{name}_scale", f"{name}_zero"],
        [name],
        name=f"{name}_dequantize",
        axis=axis,
    )
    graph.node.insert(0, node)
