"""Biases as onnxruntime's quantizer can take them: one vector a node, under a name of its own.

Law of this file: a graph in, a graph out, the same answers. Two faults of the library (1.32) are
kept away from users: it copies a bias that several nodes share to its name with a digit behind, a
name that another tensor may have (TensorFlow's exporters count like that), and it fails on a bias
[1, n], which Gemm allows.
"""

from __future__ import annotations

from typing import Any

from quantize import onnx_door

_PLACE = 2  # of the bias among the inputs
_KINDS = frozenset({"Conv", "ConvTranspose", "Gemm"})


def separated(model: Any) -> bool:
    """Give each node its own bias [n]; says whether `model` was changed."""
    make = onnx_door.library().numpy_helper.from_array
    weights = onnx_door.arrays(model)
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    seen: set[str] = set()
    replaced: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in _KINDS or len(node.input) <= _PLACE:
            continue
        name = node.input[_PLACE]
        bias = weights.get(name)
        if bias is None or not bias.ndim or bias.size != bias.shape[-1]:
            continue
        if bias.ndim > 1 or name in seen:
            node.input[_PLACE] = _free(f"{name}/own", taken)
            model.graph.initializer.append(make(bias.reshape(-1), node.input[_PLACE]))
            replaced.add(name)
        seen.add(node.input[_PLACE])
    _drop(model.graph, replaced)
    return bool(replaced)


def _drop(graph: Any, names: set[str]) -> None:
    """Take out initializers that nothing uses any more: the library warns of them."""
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # a branch of an If may use them
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in (*graph.input, *graph.output)}
    for tensor in [one for one in graph.initializer if one.name in names - used]:
        graph.initializer.remove(tensor)


def _free(name: str, taken: set[str]) -> str:
    """The name with the first number behind it that no tensor has; it is taken now."""
    number = 0
    while (found := f"{name}{number}") in taken:
        number += 1
    taken.add(found)
    return found
