"""Which channels of a graph belong together, and which weights must be cut with them.

Law of this file: it reads a graph and changes nothing. A *group* is a set of channels that can only
go together (the output of a convolution, and everything that is added to it); a *layout* says how a
value's axis is made of groups; a *cut* is a weight's axis with its layout. Propagation is one walk
in the graph's (topological) order over a table of rules by operator; an operator without a rule, or
a case that its rule does not know, freezes the groups of its inputs.

Source of the idea: Fang et al. 2023, "DepGraph: towards any structural pruning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """How an axis is made of groups: their channels one after the other, `block` elements each.

    `block` is more than 1 after a Flatten: the H x W values of each channel stand together.
    """

    axis: int
    groups: tuple[int, ...]
    block: int = 1


class Cut(NamedTuple):
    """A weight that loses slices of `axis` when channels of the layout's groups go."""

    weight: str
    axis: int
    groups: tuple[int, ...]
    block: int


class Channels(NamedTuple):
    """What was found.

    Attributes:
        sizes: of each group, by its number. prunable: groups whose channels may go.
        cuts: all weights that hang on groups. made_by: the weights whose slices *make* a channel,
            for its importance: (weight, axis).
        frozen: why a group may not be pruned.
        reshapes: constants that state a size which changes: (constant's name, index in it).
        depthwise: convolutions with a filter for each channel: (output's name, groups).
        nodes: the nodes that make a group's channels.
    """

    sizes: dict[int, int]
    prunable: tuple[int, ...]
    cuts: tuple[Cut, ...]
    made_by: dict[int, tuple[tuple[str, int], ...]]
    frozen: dict[int, str]
    reshapes: tuple[tuple[str, int], ...]
    depthwise: tuple[tuple[str, tuple[int, ...]], ...]
    nodes: dict[int, tuple[str, ...]]


def analyse(
    graph: Any, shapes: dict[str, tuple[int | None, ...]], weights: dict[str, Array]
) -> Channels:
    """Find groups and cuts.

    Args:
        graph: a GraphProto in topological order. shapes: of all values, None where not known.
        weights: constant tensors by name.
    """
    walk = _Walk(graph, shapes, weights)
    for node in graph.node:
        walk.visit(node)
    for out in graph.output:
        walk.freeze(out.name, "it is an output of the model")
    return walk.result()


class _Walk:
    """The state of one walk."""

    def __init__(
        self, graph: Any, shapes: dict[str, tuple[int | None, ...]], weights: dict[str, Array]
    ) -> None:
        self.shapes = shapes
        self.weights = weights
        self.layouts: dict[str, Layout] = {}
        self.sizes: dict[int, int] = {}
        self.cuts: list[Cut] = []
        self.made_by: dict[int, list[tuple[str, int]]] = {}
        self.nodes: dict[int, list[str]] = {}
        self.frozen: dict[int, str] = {}
        self.reshapes: list[tuple[str, int]] = []
        self.depthwise: list[tuple[str, tuple[int, ...]]] = []
        self._parent: dict[int, int] = {}
        self._uses = _uses(graph)

    def visit(self, node: Any) -> None:
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        before = len(self.cuts)
        if rule is None or not rule(self, node):
            del self.cuts[before:]
            for name in node.input:
                self.freeze(name, f"{node.op_type} {node.name or node.output[0]} needs them all")

    # -- groups ------------------------------------------------------------------------------------

    def new_group(self, size: int, node: Any) -> int:
        number = len(self._parent)
        self._parent[number] = number
        self.sizes[number] = size
        self.nodes[number] = [node.name or node.output[0]]
        self.made_by[number] = []
        return number

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        self._parent[b] = a
        self.made_by[a] += self.made_by.pop(b)
        self.nodes[a] += self.nodes.pop(b)
        if b in self.frozen:
            self.frozen.setdefault(a, self.frozen[b])

    def freeze(self, value: str, reason: str) -> None:
        layout = self.layouts.get(value)
        for group in layout.groups if layout else ():
            self.frozen.setdefault(self.root(group), reason)

    # -- values and weights ------------------------------------------------------------------------

    def shape(self, value: str) -> tuple[int | None, ...]:
        if value in self.weights:
            return tuple(self.weights[value].shape)
        return self.shapes.get(value, ())

    def length(self, layout: Layout) -> int:
        """Elements of the axis."""
        return sum(self.sizes[group] for group in layout.groups) * layout.block

    def cut(self, weight: str, axis: int, layout: Layout) -> bool:
        """Note a weight; False if it is none, is shared, or does not fit."""
        if weight not in self.weights or self._uses[weight] != 1:
            return False
        if self.weights[weight].shape[axis] != self.length(layout):
            return False
        self.cuts.append(Cut(weight, axis, layout.groups, layout.block))
        return True

    def give(self, node: Any, layout: Layout) -> bool:
        self.layouts[node.output[0]] = layout
        return True

    def result(self) -> Channels:
        rooted: dict[int, str] = {}
        for group, reason in self.frozen.items():
            rooted.setdefault(self.root(group), reason)
        roots = [group for group in self._parent if self.root(group) == group]
        cuts = [one._replace(groups=tuple(map(self.root, one.groups))) for one in self.cuts]
        return Channels(
            {group: self.sizes[group] for group in roots},
            tuple(group for group in roots if group not in rooted and self.sizes[group] > 1),
            tuple(cuts),
            {group: tuple(self.made_by[group]) for group in roots},
            rooted,
            tuple(self.reshapes),
            tuple((name, tuple(map(self.root, groups))) for name, groups in self.depthwise),
            {group: tuple(self.nodes[group]) for group in roots},
        )


def _uses(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            counts[name] = counts.get(name, 0) + 1
    return counts


# --- rules: True if the node is understood --------------------------------------------------------


def _conv(walk: _Walk, node: Any) -> bool:
    """weight [O, I / groups, ...]: makes channels; depthwise: keeps those of its input."""
    weight = walk.weights.get(node.input[1])
    if weight is None or weight.ndim < 3:
        return False
    groups, incoming = _integer(node, "group", 1), walk.layouts.get(node.input[0])
    if groups == 1:
        if incoming is not None and not (
            incoming.axis == 1 and walk.cut(node.input[1], 1, incoming)
        ):
            return False
        return _makes(walk, node, node.input[1], 0, 1)
    if incoming is None:
        return True  # channels of the model's own input: nothing here may go
    if groups == weight.shape[0] == walk.length(incoming) and incoming.axis == 1:
        walk.depthwise.append((node.output[0], incoming.groups))
        return (
            walk.cut(node.input[1], 0, incoming)
            and _bias(walk, node, 2, incoming)
            and walk.give(node, incoming)
        )
    return False


def _transposed_conv(walk: _Walk, node: Any) -> bool:
    """weight [I, O / groups, ...]."""
    if node.input[1] not in walk.weights or _integer(node, "group", 1) != 1:
        return False
    incoming = walk.layouts.get(node.input[0])
    if incoming is not None and not (incoming.axis == 1 and walk.cut(node.input[1], 0, incoming)):
        return False
    return _makes(walk, node, node.input[1], 1, 1)


def _gemm(walk: _Walk, node: Any) -> bool:
    """A [N, I] times B [I, O], or [O, I] with transB."""
    if node.input[1] not in walk.weights or _integer(node, "transA", 0):
        return False
    into, out = (1, 0) if _integer(node, "transB", 0) else (0, 1)
    incoming = walk.layouts.get(node.input[0])
    if incoming is not None and not (
        incoming.axis == 1 and walk.cut(node.input[1], into, incoming)
    ):
        return False
    return _makes(walk, node, node.input[1], out, 1)


def _matmul(walk: _Walk, node: Any) -> bool:
    """Activations [..., I] times a constant [I, O]."""
    weight, shape = walk.weights.get(node.input[1]), walk.shape(node.input[0])
    if weight is None or weight.ndim != 2 or not shape:
        return False
    last, incoming = len(shape) - 1, walk.layouts.get(node.input[0])
    if incoming is not None and not (
        incoming.axis == last and walk.cut(node.input[1], 0, incoming)
    ):
        return False
    return _makes(walk, node, node.input[1], 1, last)


def _makes(walk: _Walk, node: Any, weight: str, axis: int, out_axis: int) -> bool:
    """The node's output has channels of its own, made by slices of the weight."""
    group = walk.new_group(walk.weights[weight].shape[axis], node)
    layout = Layout(out_axis, (group,))
    if not walk.cut(weight, axis, layout) or not _bias(walk, node, 2, layout):
        walk.frozen[group] = f"the weights of {node.op_type} {node.name} are shared"
        return walk.give(node, layout)
    walk.made_by[group].append((weight, axis))
    return walk.give(node, layout)


def _bias(walk: _Walk, node: Any, place: int, layout: Layout) -> bool:
    if len(node.input) <= place or not node.input[place]:
        return True
    bias = walk.weights.get(node.input[place])
    if bias is None:
        return False
    return bias.size == 1 or walk.cut(node.input[place], bias.ndim - 1, layout)


def _normalization(walk: _Walk, node: Any) -> bool:
    """Scale, bias, mean and variance [C] beside X [N, C, ...]."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return (
        layout.axis == 1
        and all(walk.cut(name, 0, layout) for name in node.input[1:5])
        and walk.give(node, layout)
    )


def _same(walk: _Walk, node: Any) -> bool:
    """Each value becomes one value at its place."""
    layout = walk.layouts.get(node.input[0])
    return layout is None or walk.give(node, layout)


def _spatial(walk: _Walk, node: Any) -> bool:
    """Works over the axes behind the channels, and leaves those."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return layout.axis == 1 and layout.block == 1 and walk.give(node, layout)


def _pad(walk: _Walk, node: Any) -> bool:
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    pads = walk.weights.get(node.input[1]) if len(node.input) > 1 else None
    if pads is None or len(node.input) > 3:
        return False
    half = len(pads) // 2
    clear = pads[layout.axis] == 0 and pads[layout.axis + half] == 0
    return bool(clear) and layout.block == 1 and walk.give(node, layout)


def _resize(walk: _Walk, node: Any) -> bool:
    """Only by scales: sizes would state the number of channels."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    scales = walk.weights.get(node.input[2]) if len(node.input) == 3 else None
    if scales is None or layout.block != 1 or len(scales) <= layout.axis:
        return False
    return bool(scales[layout.axis] == 1) and walk.give(node, layout)


def _reduce(walk: _Walk, node: Any) -> bool:
    """A mean or sum over axes behind the channels."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axes = _integers(node, "axes")
    if axes is None and len(node.input) > 1:
        given = walk.weights.get(node.input[1])
        axes = None if given is None else [int(one) for one in given]
    if not axes or not rank or layout.block != 1:
        return False
    return all(axis % rank > layout.axis for axis in axes) and walk.give(node, layout)


def _elementwise(walk: _Walk, node: Any) -> bool:
    """Values of the same place meet: their channels go together; a constant is cut with them."""
    known = [walk.layouts[name] for name in node.input if name in walk.layouts]
    if not known:
        return True
    first, rank = known[0], max(len(walk.shape(name)) for name in node.input)
    if any(len(walk.shape(name)) != rank for name in node.input if name in walk.layouts):
        return False
    for name in node.input:
        if name in walk.layouts:
            if not _joined(walk, first, walk.layouts[name]):
                return False
        elif name in walk.weights:
            if not _constant(walk, name, first, rank):
                return False
        elif _extent(walk.shape(name), first.axis, rank) != 1:
            return False  # somebody else's values, as many as there are channels
    return walk.give(node, first)


def _joined(walk: _Walk, one: Layout, other: Layout) -> bool:
    """Whether two layouts are made alike; then their groups become one, pair by pair."""
    sizes = [[walk.sizes[group] for group in layout.groups] for layout in (one, other)]
    if sizes[0] != sizes[1] or one.axis != other.axis or one.block != other.block:
        return False
    for a, b in zip(one.groups, other.groups, strict=True):
        walk.join(a, b)
    return True


def _constant(walk: _Walk, name: str, layout: Layout, rank: int) -> bool:
    shape = walk.weights[name].shape
    place = layout.axis - (rank - len(shape))
    if place < 0 or shape[place] == 1:
        return True  # the same for all channels
    return walk.cut(name, place, layout)


def _extent(shape: tuple[int | None, ...], axis: int, rank: int) -> int | None:
    place = axis - (rank - len(shape))
    return 1 if place < 0 else shape[place]


def _prelu(walk: _Walk, node: Any) -> bool:
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    if node.input[1] not in walk.weights:
        return False
    rank = len(walk.shape(node.input[0]))
    return _constant(walk, node.input[1], layout, rank) and walk.give(node, layout)


def _concat(walk: _Walk, node: Any) -> bool:
    """Along the channels: groups one after the other. Along another axis: they go together."""
    rank = len(walk.shape(node.input[0]))
    layouts = [walk.layouts.get(name) for name in node.input]
    if all(layout is None for layout in layouts):
        return True
    if any(layout is None for layout in layouts) or not rank:
        return False
    known = [layout for layout in layouts if layout is not None]
    first, axis = known[0], _integer(node, "axis", 1) % rank
    if any(one.axis != first.axis or one.block != first.block for one in known):
        return False
    if axis != first.axis:
        return all(_joined(walk, first, one) for one in known) and walk.give(node, first)
    groups = tuple(group for one in known for group in one.groups)
    return walk.give(node, Layout(axis, groups, first.block))


def _flatten(walk: _Walk, node: Any) -> bool:
    """[N, C, H, W] -> [N, C H W]."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return _integer(node, "axis", 1) == 1 and _flat(walk, node, layout)


def _flat(walk: _Walk, node: Any, layout: Layout) -> bool:
    behind = walk.shape(node.input[0])[2:]
    if layout.axis != 1 or any(size is None for size in behind):
        return False
    block = layout.block * math.prod(size for size in behind if size is not None)
    return walk.give(node, Layout(1, layout.groups, block))


def _reshape(walk: _Walk, node: Any) -> bool:
    """Only what Flatten does too: two dimensions, the first untouched."""
    layout, target = walk.layouts.get(node.input[0]), walk.weights.get(node.input[1])
    if layout is None:
        return True
    if target is None or target.shape != (2,) or walk._uses[node.input[1]] != 1:
        return False
    batch = walk.shape(node.input[0])[:1]
    if target[0] not in (0, -1, *batch) or not _flat(walk, node, layout):
        return False
    if target[1] != -1:
        walk.reshapes.append((node.input[1], 1))
        return bool(target[0] != -1)  # two free sizes are none
    return True


def _transpose(walk: _Walk, node: Any) -> bool:
    layout, order = walk.layouts.get(node.input[0]), _integers(node, "perm")
    if layout is None:
        return True
    if order is None:
        return False
    return walk.give(node, layout._replace(axis=order.index(layout.axis)))


def _squeeze(walk: _Walk, node: Any) -> bool:
    """Of axes behind the channels."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axes = _integers(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1] in walk.weights:
        axes = [int(one) for one in walk.weights[node.input[1]]]
    if not axes or not rank:
        return False
    return all(axis % rank > layout.axis for axis in axes) and walk.give(node, layout)


def _looks(walk: _Walk, node: Any) -> bool:
    """Nothing of the values themselves is used."""
    return all(name not in walk.layouts for name in node.input)


_UNARY = (
    "Relu Sigmoid HardSigmoid HardSwish Tanh Clip LeakyRelu Elu Selu Celu Softplus Softsign Mish"
    " Gelu Erf Exp Log Neg Abs Sqrt Reciprocal Identity Dropout Cast Floor Ceil Round Sign"
    " ThresholdedRelu"
)
_POOLS = "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool"
_BINARY = "Add Sub Mul Div Min Max Pow Sum Mean"
_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2"

Rule = Callable[[_Walk, Any], bool]


def _table(*rows: tuple[Iterable[str], Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names}


_RULES: dict[str, Rule] = _table(
    (["Conv"], _conv),
    (["ConvTranspose"], _transposed_conv),
    (["Gemm"], _gemm),
    (["MatMul"], _matmul),
    (["BatchNormalization"], _normalization),
    (["PRelu"], _prelu),
    (["Concat"], _concat),
    (["Flatten"], _flatten),
    (["Reshape"], _reshape),
    (["Transpose"], _transpose),
    (["Squeeze"], _squeeze),
    (["Pad"], _pad),
    (["Resize"], _resize),
    (["Constant", "Shape"], _looks),
    (_UNARY.split(), _same),
    (_POOLS.split(), _spatial),
    (_BINARY.split(), _elementwise),
    (_REDUCTIONS.split(), _reduce),
)


def _integer(node: Any, name: str, default: int) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)


def _integers(node: Any, name: str) -> list[int] | None:
    return next((list(one.ints) for one in node.attribute if one.name == name), None)
