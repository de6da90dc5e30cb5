"""The door to onnx: reading, checking, writing graphs.

Law of this file: no pass lives here, only what several need of the library. Every exception of the
library becomes ours here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.errors import ModelError, NotFoundError, UsageError, did_you_mean

PROTOBUF_BYTES_MAX = 1 << 31  # of one message, and an ONNX file is one


def library() -> Any:
    """The module. Raises: UsageError with the remedy."""
    try:
        import onnx
    except ImportError as e:
        raise UsageError(
            f"onnx does not import: {e}", remedy="pip install 'edge-runtime[quantize]'"
        ) from e
    return onnx


def load(path: Path) -> Any:
    """The ModelProto of a file without external data. Raises: ModelError."""
    onnx = library()
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as e:
        raise ModelError(f"is not an ONNX model: {_brief(e)}", where=str(path)) from e


class Part(NamedTuple):
    """A file that holds weights of a model that lies beside it."""

    path: Path
    size_bytes: int
    changed_ns: int


def parts(path: Path) -> tuple[Part, ...]:
    """The other files that a model's weights lie in. Raises: ModelError, NotFoundError."""
    external = library().external_data_helper
    model = load(path)
    infos = (
        external.ExternalDataInfo(one)
        for one in external._get_all_tensors(model)  # those of nodes and subgraphs too
        if external.uses_external_data(one)
    )
    found = [path.resolve().parent / name for name in sorted({one.location for one in infos})]
    for one in found:
        if not one.is_file():
            raise NotFoundError(
                "there is no such file, and the model keeps weights in it",
                where=str(one),
                remedy=f"put it beside {path.name} under this name",
            )
    stats = [(one, one.stat()) for one in found]
    return tuple(Part(one, stat.st_size, stat.st_mtime_ns) for one, stat in stats)


def join(path: Path, out: Path) -> None:
    """Write a model that keeps weights in other files as one file; nothing else is changed.

    Raises:
        ModelError: it is too large for one file, or a file does not hold what the model says.
    """
    onnx = library()
    size = path.stat().st_size + sum(one.size_bytes for one in parts(path))
    if size >= PROTOBUF_BYTES_MAX:
        raise ModelError(
            f"has {size} bytes with the weights that it keeps in other files",
            where=str(path),
            expected=f"less than {PROTOBUF_BYTES_MAX}: a device is given one file, and ONNX bounds"
            " it so",
            remedy="export it in float16, or in parts",
        )
    try:
        onnx.save(onnx.load(str(path)), str(out))
    except Exception as e:
        raise ModelError(
            f"the weights in other files cannot be read: {_brief(e)}", where=str(path)
        ) from e


def save(model: Any, path: Path) -> None:
    """Check the model and write it. Raises: ModelError."""
    onnx = library()
    try:
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
    except Exception as e:
        raise ModelError(f"the result is not valid ONNX: {_brief(e)}", where=str(path)) from e


def infer_shapes(model: Any) -> Any:
    """The model with the shapes of its inner tensors; as it was where they cannot be inferred."""
    onnx = library()
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # noqa: BLE001 - shapes are a help, and custom operators have none
        return model


def raised(model: Any, opset: int) -> Any:
    """The model in at least this version of the standard operators.

    Raises:
        ModelError: the library cannot convert it.
    """
    onnx = library()
    (version,) = {one.version for one in model.opset_import if one.domain in ("", "ai.onnx")} or {0}
    if not 0 < version < opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as e:
        raise ModelError(
            f"cannot be raised from operator set {version} to {opset}: {_brief(e)}",
            remedy=f"export the model again with opset {opset} or later",
        ) from e


def refuse_unknown(names: Sequence[str], model: Any) -> None:
    """Raises: UsageError for a name that no node has: libraries ignore it."""
    known = [node.name for node in model.graph.node]
    for name in names:
        if name not in known:
            raise UsageError(
                f"the model has no node {name!r}",
                where="exclude",
                remedy=did_you_mean(name, known) or "`edge-quantize sensitivity` lists the nodes",
            )


def tell_apart(model: Any) -> None:
    """Give nodes that share a name (as those of a function may) different ones; the first stays."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.name in seen:
            free = (f"{node.name}.{number}" for number in itertools.count(1))
            node.name = next(name for name in free if name not in taken)
            taken.add(node.name)
        if node.name:
            seen.add(node.name)


def sort(model: Any) -> None:
    """Put every node of the graph after those that make its inputs; else keep the order.

    Inputs of subgraphs count as the node's own.
    """
    graph = model.graph
    waiting = list(graph.node)
    made = {""} | {one.name for one in (*graph.input, *graph.initializer)}
    needs = {id(node): _reads(node) for node in waiting}
    every = {name for node in waiting for name in node.output}
    ordered: list[Any] = []
    while waiting:
        ready = [node for node in waiting if not (needs[id(node)] & every) - made]
        if not ready:  # a circle: the checker will say so
            ready = waiting
        ordered += ready
        made |= {name for node in ready for name in node.output}
        taken = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in taken]
    kept = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(kept)


def _reads(node: Any) -> set[str]:
    """Names of the values that a node and its subgraphs read."""
    found = set(node.input)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for graph in graphs:
            for inner in graph.node:
                found |= _reads(inner)
    return found


def arrays(model: Any) -> dict[str, Any]:
    """Weights by name as numpy arrays."""
    numpy_helper = library().numpy_helper
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


def quantized_ranges(model: Any) -> dict[str, tuple[float, float]]:
    """By tensor the range that its integers can say; tensors with one scale, no weights.

    That is what a QuantizeLinear keeps, or what an operator in integers (QOperator) answers.
    """
    known = arrays(model)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            known[node.output[0]] = library().numpy_helper.to_array(node.attribute[0].t)
    found = {}
    for node in model.graph.node:
        at = _SCALES.get(node.op_type)
        if at is None or len(node.input) < at + 2 or node.input[0] in known:
            continue
        scale, zero = known.get(node.input[at]), known.get(node.input[at + 1])
        if scale is None or zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
            continue
        bits = 8 * zero.dtype.itemsize
        least = 0 if zero.dtype.kind == "u" else -(1 << bits - 1)
        step, middle = float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
        is_pair = node.op_type == "QuantizeLinear"
        name = node.input[0] if is_pair else node.output[0].removesuffix(_INTEGERS)
        found[name] = step * (least - middle), step * (least + (1 << bits) - 1 - middle)
    return found


def limited(source: Any, made: Any) -> dict[str, str]:
    """By a node's output the output of the Relu or Clip behind it, where that alone counts.

    It is so where nothing else reads the first, and where `made` has no such Relu or Clip any more:
    a range of integers that ends where it does does the same, so quantizers leave it out.
    """
    there = {name.removesuffix(_INTEGERS) for node in made.graph.node for name in node.output}
    readers = Counter(name for node in source.graph.node for name in _reads(node))
    readers.update(one.name for one in source.graph.output)
    return {
        node.input[0]: node.output[0]
        for node in source.graph.node
        if node.op_type in ("Relu", "Clip")
        and (readers[node.input[0]] == 1 or node.output[0] not in there)
    }


# Operator -> where among its inputs the scale of what it makes stands; the zero point follows.
_SCALES = {
    "QuantizeLinear": 1,
    "QLinearConv": 6,
    "QLinearMatMul": 6,
    "QGemm": 7,
    "QLinearAdd": 6,
    "QLinearMul": 6,
    "QLinearAveragePool": 3,
    "QLinearGlobalAveragePool": 3,
    "QLinearSigmoid": 3,
    "QLinearLeakyRelu": 3,
    "QLinearSoftmax": 3,
    "QLinearReduceMean": 3,
    "QLinearConcat": 0,
}
_INTEGERS = "_quantized"  # what onnxruntime calls the integers that stand for a float tensor


def lift_constants(model: Any) -> None:
    """Constant nodes of the graph as initializers under the same names; `model` is changed."""
    lifted = [(node, _constant(node)) for node in model.graph.node if node.op_type == "Constant"]
    for node, tensor in lifted:
        if tensor is not None:
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
            model.graph.node.remove(node)


def _constant(node: Any) -> Any:
    """A Constant node's value as a TensorProto; None for strings and sparse tensors."""
    onnx, attribute = library(), node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        copy = onnx.TensorProto()
        copy.CopyFrom(value)
        return copy
    kinds = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
    kind = kinds.get(attribute.name)
    return onnx.numpy_helper.from_array(np.array(value, kind)) if kind else None


def strip(model: Any) -> None:
    """Take off what an exporter noted for its maker: lines of code, paths of its machine."""
    graph = model.graph
    for one in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del one.metadata_props[:]
        one.doc_string = ""
    for item in graph.initializer:
        del item.metadata_props[:]
        item.doc_string = ""


def version() -> str:
    return str(library().__version__)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# Operators that hand on the values they get.
_PASSES_ON = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
_PASSES_ON |= {"Cast", "Dropout", "QuantizeLinear", "DequantizeLinear"}


def origin(path: Path, output: str) -> str:
    """The operator that an output's values come from; what only hands on or adds a bias is none."""
    made = {out: node for node in load(path).graph.node for out in node.output}
    while output in made:
        node = made[output]
        inner = [name for name in node.input if name in made]
        if node.op_type not in _PASSES_ON and not (node.op_type == "Add" and len(inner) == 1):
            return str(node.op_type)
        output = (inner or list(node.input))[0]
    return ""
