"""What ONNX operators are in torch, so that a graph can be trained.

Law of this file: one rule for each operator, and which of an operator's inputs are weights to be
trained. torch is an argument: nothing is imported. A rule computes what the operator's page says
(onnx.ai/onnx/operators) or raises; it never approximates. Where torch's kernel differs (one-sided
pads, rounding of sizes), the rule makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_runtime.errors import UsageError


class Node(NamedTuple):
    """What a rule may know of a node. `opset`: of the graph, for defaults that changed."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)


class Call(NamedTuple):
    """One run of a node.

    Attributes:
        torch: the library. given: tensors, None for an input that was left out. training: whether
            the module is in training mode.
    """

    torch: Any
    node: Node
    given: list[Any]
    training: bool

    @property
    def x(self) -> Any:
        return self.given[0]

    @property
    def functional(self) -> Any:
        return self.torch.nn.functional

    def get(self, name: str, default: Any) -> Any:
        return self.node.attributes.get(name, default)

    def input(self, place: int) -> Any:
        """The tensor at a place, None if there is none."""
        return self.given[place] if place < len(self.given) else None

    def numbers(self, place: int, name: str) -> list[Any] | None:
        """Small constants that newer opsets take as an input and older ones as an attribute."""
        tensor = self.input(place)
        if tensor is not None:
            return list(tensor.reshape(-1).tolist())
        return list(self.get(name, [])) or None

    def no(self, what: str) -> UsageError:
        """The error for a case that has no rule."""
        return UsageError(
            f"{self.node.op} {self.node.name} with {what} cannot be trained here",
            where="fine_tune",
            remedy="train with your own code, and begin the recipe with its result",
        )


# --- convolutions and products --------------------------------------------------------------------


def _conv(call: Call) -> Any:
    rank = call.given[1].dim() - 2
    kernel = tuple(call.given[1].shape[2:])
    return _of_rank(call, "conv{}d", rank)(
        _padded(call, call.x, kernel),
        call.given[1],
        call.input(2),
        stride=call.get("strides", [1] * rank),
        dilation=call.get("dilations", [1] * rank),
        groups=call.get("group", 1),
    )


def _transposed(call: Call) -> Any:
    """Without pads, then cut off what the pads take away: they may differ from side to side."""
    rank = call.given[1].dim() - 2
    if call.get("output_shape", None) or call.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise call.no("output_shape or auto_pad")
    whole = _of_rank(call, "conv_transpose{}d", rank)(
        call.x,
        call.given[1],
        call.input(2),
        stride=call.get("strides", [1] * rank),
        output_padding=call.get("output_padding", [0] * rank),
        groups=call.get("group", 1),
        dilation=call.get("dilations", [1] * rank),
    )
    pads = call.get("pads", [0] * 2 * rank)
    for axis in range(rank):
        size = whole.shape[axis + 2] - pads[axis] - pads[axis + rank]
        whole = whole.narrow(axis + 2, pads[axis], size)
    return whole


def _of_rank(call: Call, name: str, rank: int) -> Any:
    if not 1 <= rank <= 3:
        raise call.no(f"{rank} axes behind the channels")
    return getattr(call.functional, name.format(rank))


def _padded(call: Call, x: Any, kernel: tuple[int, ...], fill: float = 0.0) -> Any:
    """ONNX pads each side on its own; torch's kernels do not."""
    pads = _pads(call, x, kernel)
    half = len(pads) // 2
    if not any(pads):
        return x
    sides = [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]
    return call.functional.pad(x, sides, value=fill)


def _pads(call: Call, x: Any, kernel: tuple[int, ...]) -> list[int]:
    """Begins, then ends, of the axes behind the channels."""
    how = call.get("auto_pad", b"NOTSET")
    if how == b"NOTSET":
        return list(call.get("pads", []))
    begins, ends = [], []
    for axis, size in enumerate(kernel):
        stride = call.get("strides", [1] * len(kernel))[axis]
        span = (size - 1) * call.get("dilations", [1] * len(kernel))[axis] + 1
        length = x.shape[axis + 2]
        total = 0 if how == b"VALID" else (-(-length // stride) - 1) * stride + span - length
        small = max(total, 0) // 2
        large = max(total, 0) - small
        begins.append(small if how == b"SAME_UPPER" else large)
        ends.append(large if how == b"SAME_UPPER" else small)
    return begins + ends


def _gemm(call: Call) -> Any:
    a = call.given[0].T if call.get("transA", 0) else call.given[0]
    b = call.given[1].T if call.get("transB", 0) else call.given[1]
    product = call.get("alpha", 1.0) * (a @ b)
    bias = call.input(2)
    return product if bias is None else product + call.get("beta", 1.0) * bias


# --- normalizations -------------------------------------------------------------------------------


def _batch_norm(call: Call) -> Any:
    """As torch's own: in training mode with the batch's statistics, and the kept ones follow."""
    x, scale, bias, mean, variance = call.given[:5]
    return call.functional.batch_norm(
        x,
        mean,
        variance,
        scale,
        bias,
        training=call.training,
        momentum=1 - call.get("momentum", 0.9),
        eps=call.get("epsilon", 1e-5),
    )


def _instance_norm(call: Call) -> Any:
    return call.functional.instance_norm(
        call.x, weight=call.given[1], bias=call.given[2], eps=call.get("epsilon", 1e-5)
    )


def _layer_norm(call: Call) -> Any:
    axis = call.get("axis", -1) % call.x.dim()
    return call.functional.layer_norm(
        call.x, call.x.shape[axis:], call.given[1], call.input(2), call.get("epsilon", 1e-5)
    )


def _softmax(call: Call) -> Any:
    """Before opset 13 over all axes from `axis` on, taken as one."""
    run = getattr(call.torch, {"Softmax": "softmax", "LogSoftmax": "log_softmax"}[call.node.op])
    if call.node.opset >= 13:
        return run(call.x, dim=call.get("axis", -1))
    flat = call.x.flatten(call.get("axis", 1) % call.x.dim())
    return run(flat, dim=-1).reshape(call.x.shape)


def _dropout(call: Call) -> Any:
    ratio = call.input(1)
    share = call.get("ratio", 0.5) if ratio is None else float(ratio)
    return call.functional.dropout(call.x, share, call.training)


# --- pools and reductions -------------------------------------------------------------------------


def _max_pool(call: Call) -> Any:
    kernel = tuple(call.node.attributes["kernel_shape"])
    return _of_rank(call, "max_pool{}d", len(kernel))(
        _padded(call, call.x, kernel, -math.inf),
        kernel,
        stride=call.get("strides", [1] * len(kernel)),
        dilation=call.get("dilations", [1] * len(kernel)),
        ceil_mode=bool(call.get("ceil_mode", 0)),
    )


def _average_pool(call: Call) -> Any:
    """Values of the pads count as zeros, or (the default) are left out of the mean."""
    kernel = tuple(call.node.attributes["kernel_shape"])
    if call.get("ceil_mode", 0) or any(one != 1 for one in call.get("dilations", [])):
        raise call.no("ceil_mode or dilations")
    pool, strides = (
        _of_rank(call, "avg_pool{}d", len(kernel)),
        call.get("strides", [1] * len(kernel)),
    )
    mean = pool(_padded(call, call.x, kernel), kernel, stride=strides)
    if call.get("count_include_pad", 0) or not any(_pads(call, call.x, kernel)):
        return mean
    ones = call.torch.ones_like(call.x[:1, :1])
    return mean / pool(_padded(call, ones, kernel), kernel, stride=strides)


def _global(name: str) -> Callable[[Call], Any]:
    return lambda call: getattr(call.x, name)(dim=tuple(range(2, call.x.dim())), keepdim=True)


def _reduce(run: Callable[[Any, Any, bool], Any]) -> Callable[[Call], Any]:
    def rule(call: Call) -> Any:
        axes = call.numbers(1, "axes")
        if axes is None and call.get("noop_with_empty_axes", 0):
            return call.x
        dims = tuple(range(call.x.dim())) if axes is None else tuple(axes)
        return run(call.x, dims, bool(call.get("keepdims", 1)))

    return rule


# --- shapes ---------------------------------------------------------------------------------------


def _flatten(call: Call) -> Any:
    axis = call.get("axis", 1)
    return call.x.reshape(math.prod(call.x.shape[:axis]), -1)


def _reshape(call: Call) -> Any:
    wanted = call.given[1].tolist()
    if not call.get("allowzero", 0):
        wanted = [call.x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return call.x.reshape(wanted)


def _squeeze(call: Call) -> Any:
    axes = call.numbers(1, "axes")
    return call.x.squeeze() if axes is None else call.x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Any:
    axes, x = call.numbers(1, "axes") or [], call.x
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(call: Call) -> Any:
    starts, ends = call.numbers(1, "starts") or [], call.numbers(2, "ends") or []
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = call.numbers(4, "steps") or [1] * len(starts)
    x = call.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, taken.start, len(taken))
        else:
            index = call.torch.tensor(list(taken), dtype=call.torch.int64, device=x.device)
            x = x.index_select(axis, index)
    return x


def _split(call: Call) -> Any:
    axis = call.get("axis", 0)
    sizes = call.numbers(1, "split")
    part = -(-call.x.shape[axis] // len(call.node.outputs))
    return call.torch.split(call.x, sizes or part, dim=axis)


def _gather(call: Call) -> Any:
    axis = call.get("axis", 0) % call.x.dim()
    return call.x[(slice(None),) * axis + (call.given[1],)]


def _shape(call: Call) -> Any:
    sizes = list(call.x.shape)[call.get("start", 0) : call.get("end", None)]
    return call.torch.tensor(sizes, dtype=call.torch.int64)


def _pad(call: Call) -> Any:
    pads, rank = call.numbers(1, "pads") or [], call.x.dim()
    axes = call.numbers(3, "axes") or list(range(rank))
    sides = {axis % rank: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    first = min((axis for axis, pair in sides.items() if any(pair)), default=rank)
    flat = [side for axis in reversed(range(first, rank)) for side in sides.get(axis, (0, 0))]
    mode = call.get("mode", b"constant")
    if mode not in _PAD_MODES:
        raise call.no(f"mode {mode.decode()}")
    if mode != b"constant":
        return call.functional.pad(call.x, flat, mode=_PAD_MODES[mode]) if flat else call.x
    value = call.input(2)
    fill = call.get("value", 0.0) if value is None else float(value)
    return call.functional.pad(call.x, flat, value=fill)


_PAD_MODES = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}


def _resize(call: Call) -> Any:
    """What torch's interpolate computes too: nearest by whole factors, linear."""
    how = (call.get("mode", b"nearest"), call.get("coordinate_transformation_mode", b"half_pixel"))
    if call.get("axes", None) or call.get("antialias", 0):
        raise call.no("axes or antialias")
    x, sizes, scales = call.x, call.input(3), call.input(2)
    if sizes is not None:
        wanted = sizes.tolist()
    elif scales is not None and scales.numel():
        wanted = [int(size * scale) for size, scale in zip(x.shape, scales.tolist(), strict=True)]
    else:
        raise call.no("neither scales nor sizes")
    if wanted[:2] != list(x.shape[:2]):
        raise call.no("other channels")
    if how[0] == b"nearest":
        whole = all(new % old == 0 for new, old in zip(wanted, x.shape, strict=True))
        if not whole or how[1] not in _ALIGNED or call.get("nearest_mode", b"") == b"ceil":
            raise call.no("nearest by a factor that is no whole number")
        return call.functional.interpolate(x, wanted[2:])
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(x.dim() - 2)
    if how[0] != b"linear" or mode is None or how[1] not in _LINEAR:
        raise call.no(f"mode {how[0].decode()} and {how[1].decode()}")
    return call.functional.interpolate(x, wanted[2:], mode=mode, align_corners=_LINEAR[how[1]])


# By whole factors, these two take the same source value when rounded as by default.
_ALIGNED = (b"asymmetric", b"half_pixel")
_LINEAR = {b"half_pixel": False, b"pytorch_half_pixel": False, b"align_corners": True}


def _depth_to_space(call: Call) -> Any:
    n, c, h, w = call.x.shape
    b = call.node.attributes["blocksize"]
    if call.get("mode", b"DCR") == b"CRD":
        return call.functional.pixel_shuffle(call.x, b)
    apart = call.x.reshape(n, b, b, c // (b * b), h, w)
    return apart.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def _space_to_depth(call: Call) -> Any:
    n, c, h, w = call.x.shape
    b = call.node.attributes["blocksize"]
    apart = call.x.reshape(n, c, h // b, b, w // b, b)
    return apart.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


# --- value by value -------------------------------------------------------------------------------


def _clip(call: Call) -> Any:
    low = call.input(1) if call.input(1) is not None else call.get("min", None)
    high = call.input(2) if call.input(2) is not None else call.get("max", None)
    return call.x if low is None and high is None else call.torch.clamp(call.x, low, high)


def _cast(call: Call) -> Any:
    kinds = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
    kind = kinds.get(call.node.attributes["to"])
    if kind is None:
        raise call.no("another type")
    return call.x.to(getattr(call.torch, kind))


def _divide(call: Call) -> Any:
    a, b = call.given
    return a / b if a.is_floating_point() else call.torch.div(a, b, rounding_mode="trunc")


def _prelu(call: Call) -> Any:
    return call.torch.where(call.x >= 0, call.x, call.x * call.given[1])


def _folded(name: str) -> Callable[[Call], Any]:
    """An operator of two or more inputs."""

    def rule(call: Call) -> Any:
        found = call.x
        for other in call.given[1:]:
            found = getattr(call.torch, name)(found, other)
        return found

    return rule


def _named(*names: str) -> dict[str, Callable[[Call], Any]]:
    """Operators of one input that torch calls by the same name in lower case."""

    def rule(name: str) -> Callable[[Call], Any]:
        return lambda call: getattr(call.torch, name)(call.x)

    return {name: rule(name.lower()) for name in names}


def _functional(name: str, **defaults: float) -> Callable[[Call], Any]:
    """Of torch.nn.functional, with attributes under the same names."""
    return lambda call: getattr(call.functional, name)(
        call.x, **{key: call.get(key, value) for key, value in defaults.items()}
    )


RULES: dict[str, Callable[[Call], Any]] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _folded("matmul"),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LRN": lambda call: call.functional.local_response_norm(
        call.x,
        call.node.attributes["size"],
        call.get("alpha", 1e-4),
        call.get("beta", 0.75),
        call.get("bias", 1.0),
    ),
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Dropout": _dropout,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("amax"),
    "ReduceMean": _reduce(lambda x, dims, keep: x.mean(dims, keep)),
    "ReduceSum": _reduce(lambda x, dims, keep: x.sum(dims, keep)),
    "ReduceMax": _reduce(lambda x, dims, keep: x.amax(dims, keep)),
    "ReduceMin": _reduce(lambda x, dims, keep: x.amin(dims, keep)),
    "ReduceL2": _reduce(lambda x, dims, keep: x.square().sum(dims, keep).sqrt()),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda call: call.x.permute(call.get("perm", list(reversed(range(call.x.dim()))))),
    "Concat": lambda call: call.torch.cat(call.given, dim=call.node.attributes["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Shape": _shape,
    "Pad": _pad,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Add": _folded("add"),
    "Sub": _folded("sub"),
    "Mul": _folded("mul"),
    "Div": _divide,
    "Pow": _folded("pow"),
    "Min": _folded("minimum"),
    "Max": _folded("maximum"),
    "Sum": _folded("add"),
    "Clip": _clip,
    "Cast": _cast,
    "Identity": lambda call: call.x,
    "PRelu": _prelu,
    "LeakyRelu": lambda call: call.functional.leaky_relu(call.x, call.get("alpha", 0.01)),
    "HardSigmoid": lambda call: call.torch.clamp(
        call.get("alpha", 0.2) * call.x + call.get("beta", 0.5), 0, 1
    ),
    "HardSwish": _functional("hardswish"),
    "Elu": _functional("elu", alpha=1.0),
    "Celu": _functional("celu", alpha=1.0),
    "Selu": _functional("selu"),
    "Softplus": _functional("softplus"),
    "Softsign": _functional("softsign"),
    "Mish": _functional("mish"),
    "Gelu": lambda call: call.functional.gelu(
        call.x, approximate=call.get("approximate", b"none").decode()
    ),
    **_named("Relu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Reciprocal"),
}

# The inputs of an operator that are trained, where they are constants; of Add and its like only
# those with more than one value: a lone number is a part of the formula (x + 3, x / 6).
TRAINED: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "PRelu": (1,),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
}
ALWAYS_TRAINED = frozenset(TRAINED) - {"Add", "Sub", "Mul"}
# Operators of several outputs, all of which a rule gives; of others only the first may be used.
SEVERAL = frozenset({"Split"})
