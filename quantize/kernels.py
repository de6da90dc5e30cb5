"""Which nodes integer kernels serve badly: left in float, a model can be faster than all integer.

Law of this file: a graph in, names out. Claimed is only what was measured with onnxruntime 1.32 on
x86 with VNNI: the first convolution of the Fashion-MNIST CNN (one input channel) takes longer in
integers than in float, because integer kernels read input channels in blocks of 4 and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from quantize import onnx_door

# Input channels per group with which the inner loop of an integer convolution runs mostly empty.
THIN_CHANNELS_MAX = 3


class Slow(NamedTuple):
    """Names of nodes, in the graph's order.

    Attributes:
        thin: convolutions over few input channels. depthwise: one input channel per group.
        last: the last convolution or product: it is small, and its error is seen directly.
    """

    thin: tuple[str, ...] = ()
    depthwise: tuple[str, ...] = ()
    last: tuple[str, ...] = ()


def slow(path: Path) -> Slow:
    """Of an ONNX model. Nodes without a name cannot be left out, so they are not named."""
    model = onnx_door.load(path)
    weights = {item.name: tuple(item.dims) for item in model.graph.initializer}
    computing = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.name
    ]
    thin: list[str] = []
    depthwise: list[str] = []
    for node in computing:
        shape = weights.get(node.input[1], ())
        if node.op_type != "Conv" or len(shape) < 3 or shape[1] > THIN_CHANNELS_MAX:
            continue
        (depthwise if _groups(node) > 1 else thin).append(node.name)
    last = tuple(node.name for node in computing[-1:]) if len(computing) > 1 else ()
    return Slow(tuple(thin), tuple(depthwise), last)


def _groups(node: Any) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "group"), 1)
