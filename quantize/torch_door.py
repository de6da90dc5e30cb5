"""The door to torch: an ONNX graph as a module that can be trained, and back.

Law of this file: the only one of quantize/ that imports torch. The module runs the graph's own
nodes by the rules of `torch_rules`; its parameters are the graph's weights. After training they are
written into the same graph: nothing is exported anew, so names, shapes and the rest stay.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeError, ModelError, UsageError
from quantize import foreign, onnx_door, torch_rules
from quantize.passes import Say
from quantize.torch_rules import Call, Node


def library() -> Any:
    """The module. Raises: UsageError with the remedy."""
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as e:
        raise missing(str(e)) from e


def missing(why: str) -> UsageError:
    """The error where torch is not installed."""
    return UsageError(
        f"torch does not import: {why}", remedy="pip install 'edge-runtime[quantize-torch]'"
    )


def version() -> str:
    return str(library().__version__)


def code_sha256(train: str, where: str = "fine_tune.train") -> str:
    """Of the file of `module:function`. Raises: UsageError if Python does not find it."""
    return foreign.code_sha256(train, where)


def fine_tune(source: Path, out: Path, train: str, seed: int, say: Say) -> None:
    """Have the user's function train the model, and write it with its new weights.

    Args:
        train: `module:function`; called with (model, seed). The model is a torch.nn.Module that
            takes the graph's inputs in order and returns its outputs (one: itself, several: a
            tuple). It comes in training mode: BatchNormalization takes the batch's statistics and
            the kept ones follow, as in torch; after model.eval() they stand still. The function
            returns None, or the module to write: the same, or a copy.
        say: gets each line that the function prints.

    Raises:
        UsageError: torch or the function is missing, or the graph has an operator without a rule.
        ModelError: the function failed, returned another thing, or left weights not finite.
    """
    model = onnx_door.load(source)
    onnx_door.lift_constants(model)
    write_back(model, trained(module_of(model), train, seed, say, "fine_tune"))
    onnx_door.save(model, out)


def trained(module: Any, train: str, seed: int, say: Say, where: str) -> Any:
    """What the user's function makes of a module. See fine_tune."""
    torch, function = library(), foreign.function(train, f"{where}.train")
    torch.manual_seed(seed)
    with _printed(say), _ours(train, where):
        found = function(module.train(), seed)
    if found is not None and not isinstance(found, type(module)):
        raise ModelError(
            f"{train} returned a {type(found).__name__}",
            where=where,
            expected="None, or the module that it was given or a copy of it",
        )
    return module if found is None else found


def module_of(model: Any) -> Any:
    """A torch.nn.Module that computes what the graph does, in training mode.

    Raises:
        UsageError: an operator has no rule; it is named.
    """
    nodes = [_node(model, one) for one in model.graph.node if one.op_type != "Constant"]
    unknown = sorted({_unknown(node) for node in nodes} - {""})
    foreign = {one.domain for one in model.graph.node} - {"", "ai.onnx"}
    unknown += [f"those of {domain}" for domain in sorted(foreign)]
    if unknown:
        raise UsageError(
            f"operators that cannot be trained here: {', '.join(unknown)}",
            where="fine_tune",
            expected="a graph of " + ", ".join(sorted(torch_rules.RULES)),
            remedy="put the pass `clean` before it: it folds what an export computes; or train with"
            " your own code, and begin the recipe with its result",
        )
    onnx_door.lift_constants(model)
    return _graph_class()(model, nodes)


def write_back(model: Any, module: Any) -> None:
    """The module's parameters and statistics as the graph's weights, in the graph's datatypes.

    Raises:
        ModelError: a weight is no number any more (the training diverged), or has another shape.
    """
    onnx, torch = onnx_door.library(), library()
    held = module.weights()
    for item in model.graph.initializer:
        value = held.get(item.name)
        if value is None:
            continue
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"weight {item.name!r} is not finite after training",
                where="fine_tune",
                remedy="a smaller learning rate",
            )
        if tuple(value.shape) != tuple(item.dims):
            raise ModelError(
                f"weight {item.name!r} became {list(value.shape)}, it was {list(item.dims)}",
                where="fine_tune",
                remedy="training may change numbers alone; channels go by the pass prune_channels",
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(item.data_type)
        array = value.detach().cpu().double().numpy().astype(dtype)
        item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))


def trained_names(nodes: list[Node], arrays: dict[str, Any]) -> list[str]:
    """The constants that training may change, in the order of their first use."""
    found: dict[str, None] = {}
    for node in nodes:
        for place in torch_rules.TRAINED.get(node.op, ()):
            array = arrays.get(node.inputs[place]) if place < len(node.inputs) else None
            if array is None or array.dtype.kind != "f":
                continue
            if node.op in torch_rules.ALWAYS_TRAINED or array.size > 1:
                found[node.inputs[place]] = None
    return list(found)


def _node(model: Any, node: Any) -> Node:
    value = onnx_door.library().helper.get_attribute_value
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 1)
    return Node(
        node.op_type,
        node.name or (node.output[0] if node.output else ""),
        tuple(node.input),
        tuple(node.output),
        {one.name: value(one) for one in node.attribute},
        opset,
    )


def _unknown(node: Node) -> str:
    """What of a node has no rule; empty if all has one."""
    if node.op not in torch_rules.RULES:
        return node.op
    more = [name for name in node.outputs[1:] if name]
    if more and node.op not in torch_rules.SEVERAL:
        return f"{node.op} with {len(more) + 1} outputs"
    return ""


@contextlib.contextmanager
def _ours(train: str, where: str) -> Iterator[None]:
    """What the user's function raises becomes ours; our own errors (a rule's) stay."""
    try:
        yield
    except EdgeError:
        raise
    except (Exception, SystemExit) as e:  # exit() in it would end the run as if all were well
        first = str(e).partition("\n")[0]
        raise ModelError(f"{train} failed: {type(e).__name__}: {first}", where=where) from e


@contextlib.contextmanager
def _printed(say: Say) -> Iterator[None]:
    """Lines that are printed go to `say`: standard output is for the outcome (it may be JSON)."""
    lines = _Lines(say)
    with contextlib.redirect_stdout(lines):
        try:
            yield
        finally:
            lines.end()


class _Lines(io.TextIOBase):
    """A text stream that hands on whole lines."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._part = ""

    def write(self, text: str, /) -> int:
        *whole, self._part = (self._part + text).replace("\r", "\n").split("\n")
        for line in filter(None, whole):
            self._say(line)
        return len(text)

    def end(self) -> None:
        """The last line, if no newline ended it."""
        if self._part:
            self._say(self._part)
            self._part = ""


@functools.cache
def _graph_class() -> Any:
    """The module's class; made here because its base is torch's."""
    torch: Any = library()
    base: Any = torch.nn.Module

    class Graph(base):  # type: ignore[misc]
        """A graph's nodes, run in order. Parameters and buffers are kept by number, for the names
        of a graph may hold dots."""

        def __init__(self, model: Any, nodes: list[Node]) -> None:
            super().__init__()
            arrays = onnx_door.arrays(model)
            self._nodes = nodes
            self._inputs = [one.name for one in model.graph.input if one.name not in arrays]
            self._outputs = [one.name for one in model.graph.output]
            self._names = trained_names(nodes, arrays)
            self.trained = torch.nn.ParameterList(
                torch.nn.Parameter(torch.from_numpy(arrays[name].copy())) for name in self._names
            )
            self._fixed = [name for name in arrays if name not in set(self._names)]
            for number, name in enumerate(self._fixed):
                self.register_buffer(f"fixed_{number}", torch.from_numpy(arrays[name].copy()))

        def weights(self) -> dict[str, Any]:
            """Every float constant by its name in the graph, statistics included."""
            return {
                name: value
                for name, value in self._constants().items()
                if value.is_floating_point()
            }

        def _constants(self) -> dict[str, Any]:
            fixed = (getattr(self, f"fixed_{number}") for number in range(len(self._fixed)))
            return dict(zip(self._fixed, fixed, strict=True)) | dict(
                zip(self._names, self.trained, strict=True)
            )

        def forward(self, *inputs: Any) -> Any:
            values = self._constants() | dict(zip(self._inputs, inputs, strict=True))
            for node in self._nodes:
                given = [values[name] if name else None for name in node.inputs]
                made = torch_rules.RULES[node.op](Call(torch, node, given, self.training))
                several = made if node.op in torch_rules.SEVERAL else (made,)
                values.update(zip(node.outputs, several, strict=False))
            found = tuple(values[name] for name in self._outputs)
            return found[0] if len(found) == 1 else found

    return Graph
