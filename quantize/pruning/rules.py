"""What each operator does to the channels of its inputs.

Law of this file: one rule for each operator: True if the node is understood; what it cuts, reads
and gives is then noted in the walk. False freezes the groups of its inputs: a rule that is not sure
says so. A value without a layout has channels that nobody may take (the model's own input).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from quantize.pruning.groups import Layout, Maker, Walk


def _conv(walk: Walk, node: Any) -> bool:
    """weight [O, I / groups, ...]: makes channels; depthwise: keeps those of its input."""
    weight = walk.weights.get(node.input[1])
    if weight is None or weight.ndim < 3:
        return False
    groups, incoming = _integer(node, "group", 1), walk.layouts.get(node.input[0])
    if groups == 1:
        return _reads(walk, node, 1, 1) and _makes(walk, node, 0, 1)
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


def _transposed_conv(walk: Walk, node: Any) -> bool:
    """weight [I, O / groups, ...]."""
    if node.input[1] not in walk.weights or _integer(node, "group", 1) != 1:
        return False
    return _reads(walk, node, 0, 1) and _makes(walk, node, 1, 1)


def _gemm(walk: Walk, node: Any) -> bool:
    """A [N, I] times B [I, O], or [O, I] with transB."""
    if node.input[1] not in walk.weights or _integer(node, "transA", 0):
        return False
    into, out = (1, 0) if _integer(node, "transB", 0) else (0, 1)
    return _reads(walk, node, into, 1) and _makes(walk, node, out, 1)


def _matmul(walk: Walk, node: Any) -> bool:
    """Activations [..., I] times a constant [I, O]."""
    weight, shape = walk.weights.get(node.input[1]), walk.shape(node.input[0])
    if weight is None or weight.ndim != 2 or not shape:
        return False
    last = len(shape) - 1
    return _reads(walk, node, 0, last) and _makes(walk, node, 1, last)


def _reads(walk: Walk, node: Any, into: int, axis: int) -> bool:
    """The axis `into` of the node's weight reads its input's axis."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    # A transposed convolution adds by place, a scaled product by its factors: no plain sum.
    scaled = any(one.name in ("alpha", "beta") and one.f != 1 for one in node.attribute)
    plain = node.op_type in ("Conv", "Gemm") and not scaled and len(node.input) > 2
    bias = node.input[2] if plain else ""
    return layout.axis == axis and walk.read(node.input[0], node.input[1], into, layout, bias)


def _makes(walk: Walk, node: Any, out: int, axis: int) -> bool:
    """The node's output has channels of its own, made by slices of the weight's axis `out`."""
    group = walk.new_group(Maker(node.input[1], out, 0), node)
    layout = Layout(axis, (group,))
    if not walk.cut(node.input[1], out, layout) or not _bias(walk, node, 2, layout):
        walk.freeze_group(group, f"the weights of {node.op_type} {node.name} are shared")
    return walk.give(node, layout)


def _bias(walk: Walk, node: Any, place: int, layout: Layout) -> bool:
    if len(node.input) <= place or not node.input[place]:
        return True
    bias = walk.weights.get(node.input[place])
    if bias is None:
        return False
    return bias.size == 1 or walk.cut(node.input[place], bias.ndim - 1, layout)


def _normalization(walk: Walk, node: Any) -> bool:
    """Scale and bias, of BatchNormalization mean and variance too, [C] beside X [N, C, ...]."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return (
        layout.axis == 1
        and all(walk.cut(name, 0, layout) for name in node.input[1:5])
        and walk.give(node, layout)
    )


def _same(walk: Walk, node: Any) -> bool:
    """Each value becomes one value at its place."""
    layout = walk.layouts.get(node.input[0])
    return layout is None or walk.give(node, layout)


def _spatial(walk: Walk, node: Any) -> bool:
    """Works over the axes behind the channels, and leaves those."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return layout.axis == 1 and layout.block == 1 and walk.give(node, layout)


def _pad(walk: Walk, node: Any) -> bool:
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    pads = walk.weights.get(node.input[1]) if len(node.input) > 1 else None
    if pads is None or len(node.input) > 3:
        return False
    half = len(pads) // 2
    clear = pads[layout.axis] == 0 and pads[layout.axis + half] == 0
    return bool(clear) and layout.block == 1 and walk.give(node, layout)


def _resize(walk: Walk, node: Any) -> bool:
    """By scales that leave the channels, or by sizes, of which one states how many they are."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    if layout.block != 1 or _integers(node, "axes") is not None:
        return False
    if len(node.input) == 4:
        sizes = walk.weights.get(node.input[3])
        fits = sizes is not None and int(sizes[layout.axis]) == walk.length(layout)
        return fits and walk.state(node.input[3], layout.axis, layout) and walk.give(node, layout)
    scales = walk.weights.get(node.input[-1])
    if len(node.input) != 3 or scales is None or len(scales) <= layout.axis:
        return False
    return bool(scales[layout.axis] == 1) and walk.give(node, layout)


def _reduce(walk: Walk, node: Any) -> bool:
    """A mean or sum over axes behind the channels."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axes = _axes(walk, node)
    if not axes or not rank or layout.block != 1:
        return False
    return all(axis % rank > layout.axis for axis in axes) and walk.give(node, layout)


def _elementwise(walk: Walk, node: Any) -> bool:
    """Values of the same place meet: their channels go together; a constant is cut with them."""
    known = {name: walk.layouts[name] for name in node.input if name in walk.layouts}
    if not known:
        return True
    # One channel beside many (a map of attention) is the same for all of them.
    many = {name: one for name, one in known.items() if walk.length(one) > 1} or known
    first, rank = next(iter(many.values())), max(len(walk.shape(name)) for name in node.input)
    if any(len(walk.shape(name)) != rank for name in known):
        return False
    for name in node.input:
        if name in many:
            if not walk.align(first, many[name]):
                return False
        elif name in walk.weights:
            if not _constant(walk, name, first, rank):
                return False
        elif _extent(walk.shape(name), first.axis, rank) != 1:
            return False  # somebody else's values, as many as there are channels
    return walk.give(node, first)


def _constant(walk: Walk, name: str, layout: Layout, rank: int) -> bool:
    shape = walk.weights[name].shape
    place = layout.axis - (rank - len(shape))
    if place < 0 or shape[place] == 1:
        return True  # the same for all channels
    return walk.cut(name, place, layout)


def _extent(shape: tuple[int | None, ...], axis: int, rank: int) -> int | None:
    place = axis - (rank - len(shape))
    return 1 if place < 0 else shape[place]


def _prelu(walk: Walk, node: Any) -> bool:
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    if node.input[1] not in walk.weights:
        return False
    rank = len(walk.shape(node.input[0]))
    return _constant(walk, node.input[1], layout, rank) and walk.give(node, layout)


def _concat(walk: Walk, node: Any) -> bool:
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
        return all(walk.align(first, one) for one in known) and walk.give(node, first)
    groups = tuple(group for one in known for group in one.groups)
    return walk.give(node, Layout(axis, groups, first.block))


def _flatten(walk: Walk, node: Any) -> bool:
    """[N, C, H, W] -> [N, C H W]."""
    layout = walk.layouts.get(node.input[0])
    if layout is None:
        return True
    return _integer(node, "axis", 1) == 1 and _flat(walk, node, layout)


def _flat(walk: Walk, node: Any, layout: Layout) -> bool:
    behind = walk.shape(node.input[0])[2:]
    if layout.axis != 1 or any(size is None for size in behind):
        return False
    block = layout.block * math.prod(size for size in behind if size is not None)
    return walk.give(node, Layout(1, layout.groups, block))


def _reshape(walk: Walk, node: Any) -> bool:
    """Only what Flatten does too: two dimensions, the first untouched."""
    layout, target = walk.layouts.get(node.input[0]), walk.weights.get(node.input[1])
    if layout is None:
        return True
    if target is None or target.shape != (2,):
        return False
    batch = walk.shape(node.input[0])[:1]
    if target[0] not in (0, -1, *batch) or not _flat(walk, node, layout):
        return False
    flat = walk.layouts[node.output[0]]
    if target[1] == -1:
        return True
    return int(target[1]) == walk.length(flat) and walk.state(node.input[1], 1, flat)


def _transpose(walk: Walk, node: Any) -> bool:
    layout, order = walk.layouts.get(node.input[0]), _integers(node, "perm")
    if layout is None:
        return True
    if order is None:
        return False
    return walk.give(node, layout._replace(axis=order.index(layout.axis)))


def _squeeze(walk: Walk, node: Any) -> bool:
    """Squeeze and Unsqueeze, of axes behind the channels."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axes = _axes(walk, node)
    if not axes or not rank:
        return False
    if node.op_type == "Unsqueeze":
        rank += len(axes)  # its axes are those of what comes out
    return all(axis % rank > layout.axis for axis in axes) and walk.give(node, layout)


def _slice(walk: Walk, node: Any) -> bool:
    """Along other axes than the channels'."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axes = walk.weights.get(node.input[3]) if len(node.input) > 3 else None
    if axes is None or not rank or layout.axis in [int(axis) % rank for axis in axes]:
        return False
    return walk.give(node, layout)


def _split(walk: Walk, node: Any) -> bool:
    """Along the channels: by sizes that are stated, and changed. Along another axis: each part."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    if not rank or layout.block != 1:
        return False
    parts = [layout] * len(node.output)
    if _integer(node, "axis", 0) % rank == layout.axis:
        sizes = walk.own(node.input[1]) if len(node.input) > 1 else None
        if sizes is None or int(sizes.sum()) != walk.length(layout):
            return False
        parts = walk.apart(layout, [int(size) for size in sizes])
        for index, part in enumerate(parts):
            walk.state(node.input[1], index, part)
    walk.layouts.update(zip(node.output, parts, strict=True))
    return True


def _softmax(walk: Walk, node: Any) -> bool:
    """Along another axis than the channels'."""
    layout, rank = walk.layouts.get(node.input[0]), len(walk.shape(node.input[0]))
    if layout is None:
        return True
    axis = _integer(node, "axis", 0)  # the default changed at opset 13: not guessed
    return bool(rank) and axis % rank > layout.axis and walk.give(node, layout)


def _axes(walk: Walk, node: Any) -> list[int] | None:
    """Of a node that takes them as an attribute (older) or as a constant input."""
    given = walk.weights.get(node.input[1]) if len(node.input) > 1 else None
    return _integers(node, "axes") if given is None else [int(one) for one in given]


def _looks(walk: Walk, node: Any) -> bool:
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

Rule = Callable[[Walk, Any], bool]


def _table(*rows: tuple[Iterable[str], Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names}


RULES: dict[str, Rule] = _table(
    (["Conv"], _conv),
    (["ConvTranspose"], _transposed_conv),
    (["Gemm"], _gemm),
    (["MatMul"], _matmul),
    (["BatchNormalization", "InstanceNormalization"], _normalization),
    (["PRelu"], _prelu),
    (["Concat"], _concat),
    (["Flatten"], _flatten),
    (["Reshape"], _reshape),
    (["Transpose"], _transpose),
    (["Squeeze", "Unsqueeze"], _squeeze),
    (["Slice"], _slice),
    (["Split"], _split),
    (["Softmax", "LogSoftmax"], _softmax),
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
