"""How many multiplications one run takes.

Law of this file: it counts convolutions and matrix products, as papers do; everything else is small
beside them. A free dimension counts as 1: it is the batch, or the file does not say.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantize import onnx_door

Shapes = dict[str, tuple[int | None, ...]]


def macs(path: Path) -> int:
    """Multiply-accumulates of one sample; quantized operators count like their float ones.

    0: not known, for the file does not say how large a value is that is convolved or multiplied;
    folding its constants (the pass `clean`) usually shows it.
    """
    graph = onnx_door.infer_shapes(onnx_door.load(path)).graph
    shapes = value_shapes(graph)
    counts = [_of_node(node, shapes) for node in graph.node]
    unsure = any(
        count and not all(_known(name, shapes) for name in (*node.input[:1], node.output[0]))
        for node, count in zip(graph.node, counts, strict=True)
    )
    return 0 if unsure else sum(counts)


def by_node(path: Path) -> dict[str, int]:
    """The same by the node's name (its output's, where it has none); what is not known counts 1."""
    graph = onnx_door.infer_shapes(onnx_door.load(path)).graph
    shapes = value_shapes(graph)
    return {node.name or node.output[0]: _of_node(node, shapes) for node in graph.node}


def _known(value: str, shapes: Shapes) -> bool:
    """Whether all sizes but the first are."""
    shape = shapes.get(value, ())
    return bool(shape) and None not in shape[1:]


def value_shapes(graph: Any) -> Shapes:
    """Shapes by name of values and weights; None where a size is not known."""
    found: Shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            found[info.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim
            )
    return found


def _of_node(node: Any, shapes: Shapes) -> int:
    out, into = shapes.get(node.output[0], ()), [shapes.get(name, ()) for name in node.input]
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        weight = into[3 if node.op_type == "QLinearConv" else 1]
        return _size(out) * _size(weight[1:])
    if node.op_type == "ConvTranspose":
        return _size(into[0]) * _size(into[1][1:])
    if node.op_type in ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "QGemm"):
        inner = into[0][-1:] if into else ()
        return _size(out) * _size(inner)
    return 0


def _size(shape: tuple[int | None, ...]) -> int:
    return math.prod(1 if size is None else size for size in shape)
