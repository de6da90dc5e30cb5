"""The door to torch: an ONNX graph as a module that can be trained, and back.

Law of this file: the only one of quantize/ that imports torch. The module runs the graph's own
nodes; its parameters are the graph's float weights under their names. After training they are
written into the same graph: nothing is exported anew, so names, shapes and the rest stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ModelError, UsageError
from quantize import onnx_door

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


def library() -> Any:
    """The module. Raises: UsageError with the remedy."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as e:
        raise UsageError(
            f"torch does not import: {e}", remedy="pip install 'edge-runtime[quantize-torch]'"
        ) from e


def version() -> str:
    return str(library().__version__)


def fine_tune(source: Path, out: Path, train: str, seed: int) -> None:
    """Have the user's function train the model, and write it with its new weights.

    Args:
        train: `module:function`; called with (model, seed). The model is a torch.nn.Module that
            takes the graph's inputs in order and returns its outputs (one: itself, several: a
            tuple). What it returns, or the model it was given, is written.

    Raises:
        UsageError: torch or the function is missing, or the graph has an operator without a rule.
        ModelError: the function failed.
    """
    torch, function = library(), _function(train)
    model = onnx_door.load(source)
    module = module_of(model)
    torch.manual_seed(seed)
    try:
        trained = function(module, seed)
    except Exception as e:
        raise ModelError(f"{train} failed: {type(e).__name__}: {e}", where="fine_tune") from e
    write_back(model, module if trained is None else trained)
    onnx_door.save(model, out)


def module_of(model: Any) -> Any:
    """A torch.nn.Module that computes what the graph does.

    Raises:
        UsageError: an operator has no rule here; it is named.
    """
    torch = library()
    unknown = sorted({node.op_type for node in model.graph.node} - set(_RULES))
    if unknown:
        raise UsageError(
            f"operators that cannot be trained here: {', '.join(unknown)}",
            where="fine_tune",
            expected="a graph of " + ", ".join(sorted(_RULES)),
            remedy="train with your own code, and begin the recipe with its result",
        )
    return _graph_class(torch)(model, torch)


def write_back(model: Any, module: Any) -> None:
    """The module's parameters and statistics as the graph's weights.

    Raises:
        ModelError: a weight is missing or has another shape.
    """
    onnx = onnx_door.library()
    held = module.weights()
    for item in model.graph.initializer:
        value = held.get(item.name)
        if value is None:
            continue
        array = value.detach().cpu().numpy()
        if tuple(array.shape) != tuple(item.dims):
            raise ModelError(
                f"weight {item.name!r} has shape {list(array.shape)} after training",
                expected=str(list(item.dims)),
            )
        item.CopyFrom(onnx.numpy_helper.from_array(array.copy(), item.name))


def _function(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(
            f"{text!r} cannot be imported: {e}",
            where="fine_tune.train",
            expected="module:function that Python finds (PYTHONPATH)",
        ) from e
    return found  # type: ignore[no-any-return]


def _graph_class(torch: Any) -> Any:
    """The class is made here because its base needs torch."""

    class Graph(torch.nn.Module):  # type: ignore[misc]
        """Runs the nodes in order; parameters are in a list, names beside it."""

        def __init__(self, model: Any, torch: Any) -> None:
            super().__init__()
            self._nodes = [_Node(node) for node in model.graph.node]
            self._inputs = [
                one.name
                for one in model.graph.input
                if one.name not in {item.name for item in model.graph.initializer}
            ]
            self._outputs = [one.name for one in model.graph.output]
            statistics = {
                name
                for node in self._nodes
                if node.op == "BatchNormalization"
                for name in node.inputs[3:5]
            }
            self._names: list[str] = []
            self.parameters_list = torch.nn.ParameterList()
            self._constants: dict[str, Any] = {}
            for name, array in onnx_door.arrays(model).items():
                tensor = torch.from_numpy(array.copy())
                if tensor.is_floating_point() and name not in statistics:
                    self._names.append(name)
                    self.parameters_list.append(torch.nn.Parameter(tensor))
                else:
                    self._constants[name] = tensor

        def weights(self) -> dict[str, Any]:
            """Every float weight by its name in the graph."""
            trained = dict(zip(self._names, self.parameters_list, strict=True))
            return trained | {
                name: value for name, value in self._constants.items() if value.is_floating_point()
            }

        def forward(self, *inputs: Any) -> Any:
            values = dict(self._constants) | dict(
                zip(self._names, self.parameters_list, strict=True)
            )
            values |= dict(zip(self._inputs, inputs, strict=True))
            for node in self._nodes:
                given = [values.get(name) if name else None for name in node.inputs]
                values[node.output] = _RULES[node.op](torch, node, given, self.training)
            found = tuple(values[name] for name in self._outputs)
            return found[0] if len(found) == 1 else found

    return Graph


class _Node:
    """What a rule needs of a node."""

    def __init__(self, node: Any) -> None:
        helper = onnx_door.library().helper
        self.op = node.op_type
        self.inputs = list(node.input)
        self.output = node.output[0]
        self.attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)


# --- rules: (torch, node, inputs, training) -> output ---------------------------------------------


def _padded(torch: Any, node: _Node, x: Any, fill: float = 0.0) -> Any:
    """ONNX pads each side on its own; torch's kernels do not."""
    if node.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UsageError(f"auto_pad of {node.op} is not understood", where="fine_tune")
    pads = list(node.get("pads", []))
    half = len(pads) // 2
    if not any(pads):
        return x
    sides = [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]
    return torch.nn.functional.pad(x, sides, value=fill)


def _conv(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    weight, bias = given[1], given[2] if len(given) > 2 else None
    rank = weight.dim() - 2
    run = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
    return run[rank - 1](
        _padded(torch, node, given[0]),
        weight,
        bias,
        stride=node.get("strides", [1] * rank),
        dilation=node.get("dilations", [1] * rank),
        groups=node.get("group", 1),
    )


def _max_pool(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    return torch.nn.functional.max_pool2d(
        _padded(torch, node, given[0], float("-inf")),
        node.attributes["kernel_shape"],
        stride=node.get("strides", [1, 1]),
        dilation=node.get("dilations", [1, 1]),
        ceil_mode=bool(node.get("ceil_mode", 0)),
    )


def _average_pool(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    if any(node.get("pads", [])):
        raise UsageError("AveragePool with padding is not understood", where="fine_tune")
    return torch.nn.functional.avg_pool2d(
        given[0], node.attributes["kernel_shape"], stride=node.get("strides", [1, 1])
    )


def _normalize(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    """Statistics as in the file: they are not learnt again, weights and biases are."""
    x, scale, bias, mean, variance = given[:5]
    return torch.nn.functional.batch_norm(
        x, mean, variance, scale, bias, training=False, eps=node.get("epsilon", 1e-5)
    )


def _gemm(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    a = given[0].T if node.get("transA", 0) else given[0]
    b = given[1].T if node.get("transB", 0) else given[1]
    product = node.get("alpha", 1.0) * (a @ b)
    return product if len(given) < 3 else product + node.get("beta", 1.0) * given[2]


def _clip(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    low = given[1] if len(given) > 1 else node.get("min", None)
    high = given[2] if len(given) > 2 else node.get("max", None)
    return torch.clamp(given[0], low, high)


def _flatten(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    return given[0].flatten(node.get("axis", 1))


def _reshape(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    shape = [
        given[0].shape[i] if size == 0 else int(size) for i, size in enumerate(given[1].tolist())
    ]
    return given[0].reshape(shape)


def _mean(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
    axes = node.get("axes", None) or (given[1].tolist() if len(given) > 1 else None)
    return given[0].mean(dim=axes, keepdim=bool(node.get("keepdims", 1)))


def _of_one(name: str) -> Callable[..., Any]:
    def run(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
        return getattr(torch, name)(given[0])

    return run


def _of_two(name: str) -> Callable[..., Any]:
    def run(torch: Any, node: _Node, given: list[Any], training: bool) -> Any:
        return getattr(torch, name)(given[0], given[1])

    return run


_RULES: dict[str, Callable[..., Any]] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda t, n, given, _: given[0].mean(dim=(2, 3), keepdim=True),
    "BatchNormalization": _normalize,
    "Gemm": _gemm,
    "MatMul": _of_two("matmul"),
    "Add": _of_two("add"),
    "Sub": _of_two("sub"),
    "Mul": _of_two("mul"),
    "Div": _of_two("div"),
    "Relu": _of_one("relu"),
    "Sigmoid": _of_one("sigmoid"),
    "Tanh": _of_one("tanh"),
    "Identity": lambda t, n, given, _: given[0],
    "Dropout": lambda t, n, given, training: t.nn.functional.dropout(given[0], 0.2, training),
    "LeakyRelu": lambda t, n, given, _: t.nn.functional.leaky_relu(given[0], n.get("alpha", 0.01)),
    "HardSwish": lambda t, n, given, _: t.nn.functional.hardswish(given[0]),
    "Clip": _clip,
    "Concat": lambda t, n, given, _: t.cat(given, dim=n.get("axis", 1)),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda t, n, given, _: given[0].permute(list(n.attributes["perm"])),
    "ReduceMean": _mean,
    "Softmax": lambda t, n, given, _: t.softmax(given[0], dim=n.get("axis", -1)),
}
