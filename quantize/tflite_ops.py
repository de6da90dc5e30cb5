"""What the operators of a .tflite graph mean to a quantizer: names, work, what may stay float.

Law of this file: pure; a graph that `litert_door` read goes in, names and numbers come out. An
operator's name is that of the tensors it makes, joined by ";": it is in the file, no other operator
has it, and it is what the rules of ai-edge-quantizer are matched with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from edge_runtime.errors import UsageError, did_you_mean
from quantize.kernels import THIN_CHANNELS_MAX, Slow

INTEGERS = frozenset({"int8", "uint8", "int16", "int4"})
# They hand values on as they are: in integers nothing is lost or won, between floats two
# conversions are paid. POOL: the largest of some integers is the integer of the largest.
MOVING = frozenset(
    {
        "RESHAPE",
        "TRANSPOSE",
        "MAX_POOL_2D",
        "EXPAND_DIMS",
        "SQUEEZE",
        "SLICE",
        "STRIDED_SLICE",
        "SPLIT",
        "PACK",
        "UNPACK",
        "GATHER",
        "GATHER_ND",
        "BROADCAST_TO",
        "PAD",
        "MIRROR_PAD",
        "SPACE_TO_DEPTH",
        "DEPTH_TO_SPACE",
        "RESIZE_NEAREST_NEIGHBOR",
    }
)
# ai-edge-quantizer's default_policy.py: operators whose weights it stores in 4 bits.
FOUR_BITS = frozenset({"FULLY_CONNECTED", "CONV_2D"})
# Its kernel for integers ends the run where a divisor rounds to 0 (LiteRT 2.3, div.cc).
FLOAT_ONLY = frozenset({"DIV"})
# Where the weights of an operator that multiplies are among its inputs.
_WEIGHTS = {
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "FULLY_CONNECTED": 1,
    "TRANSPOSE_CONV": 1,
    "BATCH_MATMUL": 1,
}
NAMED_MAX = 10_000  # characters of a scope that the library looks at


class Tensor(NamedTuple):
    """A tensor of the main graph.

    Attributes:
        datatype: numpy's name; "int4" for packed four bits. scale, zero_point: real = scale *
            (stored - zero_point), for the whole tensor; scale 0: not quantized, or by channel.
    """

    number: int
    name: str
    shape: tuple[int, ...]
    datatype: str
    scale: float = 0.0
    zero_point: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Operator(NamedTuple):
    """A node of the main graph, as the file has it."""

    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """See the law of this file."""
        return ";".join(one.name for one in self.outputs or self.inputs)

    @property
    def scope(self) -> str:
        """A regular expression that ai-edge-quantizer finds this operator by, and no other."""
        return f"^{re.escape(f'{self.name};'[:NAMED_MAX])}$"

    @property
    def weights(self) -> Tensor | None:
        """What it multiplies with, for kinds that do."""
        place = _WEIGHTS.get(self.kind, 0)
        return self.inputs[place] if 0 < place < len(self.inputs) else None


class Graph(NamedTuple):
    """The main graph. `inputs`, `outputs`: in the file's order."""

    operators: tuple[Operator, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


# --- names ----------------------------------------------------------------------------------------


def named(graph: Graph, asked: Iterable[str], where: str) -> list[Operator]:
    """The operators of these names, in the graph's order; `*` stands for any text.

    Raises:
        UsageError: a name that no operator has.
    """
    found: set[int] = set()
    for pattern in asked:
        rule = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
        hits = {n for n, one in enumerate(graph.operators) if rule.fullmatch(one.name)}
        if not hits:
            raise unknown(pattern, [one.name for one in graph.operators], where)
        found |= hits
    return [one for number, one in enumerate(graph.operators) if number in found]


def unknown(name: str, known: Sequence[str], where: str) -> UsageError:
    """For a name that no operator has."""
    return UsageError(
        f"the model has no operator {name!r}",
        where=where,
        expected="the name of the tensor that it makes; * stands for any text",
        remedy=did_you_mean(name, known) or "`edge-quantize sensitivity` lists the operators",
    )


def four_bits(graph: Graph, asked: Iterable[str], where: str) -> list[Operator]:
    """`named`, for those that can have weights of 4 bits.

    Raises:
        UsageError: a name that no operator has, or of one without such weights.
    """
    chosen = named(graph, asked, where)
    for one in chosen:
        if one.kind not in FOUR_BITS:
            raise UsageError(
                f"{one.name!r} is {one.kind}: its weights cannot be stored in 4 bits",
                where=where,
                expected=" or ".join(sorted(FOUR_BITS)),
            )
    return chosen


def of_kinds(graph: Graph, kinds: Container[str]) -> tuple[str, ...]:
    """Names of the operators of these kinds, in the graph's order."""
    return tuple(one.name for one in graph.operators if one.kind in kinds)


# --- what stays float -----------------------------------------------------------------------------


def between_floats(graph: Graph, floats: Iterable[str]) -> list[Operator]:
    """Operators that only move values, all of whose neighbours are float: float they cost nothing.

    Args:
        floats: operators that stay float, by name. Inputs and outputs of the graph are float.
    """
    outside = set(floats)
    moving = [one for one in graph.operators if one.kind in MOVING and one.name not in outside]
    made = {tensor.number: one for one in graph.operators for tensor in one.outputs}
    readers: dict[int, list[Operator]] = {}
    for one in graph.operators:
        for tensor in one.inputs:
            readers.setdefault(tensor.number, []).append(one)

    def is_float(one: Operator, kept: set[str]) -> bool:
        before = [made[t.number] for t in one.inputs if t.number in made]
        after = [reader for t in one.outputs for reader in readers.get(t.number, ())]
        return all(each.name in outside or each.name in kept for each in (*before, *after))

    kept = {one.name for one in moving}
    while gone := {one.name for one in moving if one.name in kept and not is_float(one, kept)}:
        kept -= gone
    return [one for one in moving if one.name in kept]


def slow(graph: Graph) -> Slow:
    """Operators that integers may serve badly, by name; see kernels.Slow."""
    computing = [one for one in graph.operators if one.weights is not None]
    thin = [one.name for one in computing if _is_thin(one)]
    depthwise = [one for one in computing if one.kind == "DEPTHWISE_CONV_2D"]
    deep = [one.name for one in depthwise if one.name not in thin]
    last = [one.name for one in computing[-1:]] if len(computing) > 1 else []
    return Slow(tuple(thin), tuple(deep), tuple(last))


def _is_thin(one: Operator) -> bool:
    """A convolution over few channels; over one channel, converters write it as depthwise."""
    if one.kind not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        return False
    return one.inputs[0].shape[-1:] <= (THIN_CHANNELS_MAX,)


# --- work -----------------------------------------------------------------------------------------


def macs(one: Operator) -> int:
    """Multiplications of one run with the shapes of the file; only kinds that have weights."""
    weights = one.weights
    if weights is None or not one.outputs:
        return 0
    inner = weights.shape
    if one.kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):  # [out, h, w, in] and [1, h, w, channels]
        each = math.prod(inner[1:] if one.kind == "CONV_2D" else inner[1:3])
        return one.outputs[0].size * each
    if one.kind == "TRANSPOSE_CONV":  # inputs: shape, weights [out, h, w, in], data
        return one.inputs[2].size * math.prod(inner[:3]) if len(one.inputs) > 2 else 0
    return one.outputs[0].size * (one.inputs[0].shape or (0,))[-1]


def shares(graph: Graph) -> dict[str, float]:
    """Each operator's share of all multiplications."""
    total = max(sum(map(macs, graph.operators)), 1)
    return {one.name: macs(one) / total for one in graph.operators}


def work(graph: Graph, float_cost: int) -> int:
    """Multiplications, those that are not of 8-bit integers counted `float_cost` times."""
    return sum(macs(one) * (1 if _is_integer(one) else float_cost) for one in graph.operators)


def _is_integer(one: Operator) -> bool:
    """8-bit weights, and activations of 8 bits or (dynamic) float ones that become so in the run.

    16-bit activations are none: their kernels take longer than those of floats.
    """
    weights = one.weights
    return (
        weights is not None
        and weights.datatype in INTEGERS
        and all(tensor.datatype != "int16" for tensor in one.inputs)
    )


# --- integers -------------------------------------------------------------------------------------

_SUFFIX = "_quantized"  # what ai-edge-quantizer calls the integers made of a float tensor
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}


def quantized(graph: Graph) -> frozenset[str]:
    """Names of the operators that make integers; in a quantized file."""
    return frozenset(
        one.name
        for one in graph.operators
        if one.kind not in ("QUANTIZE", "DEQUANTIZE")
        and any(tensor.datatype in INTEGERS and tensor.scale for tensor in one.outputs)
    )


def ranges(graph: Graph) -> dict[str, tuple[float, float]]:
    """By tensor of the float model the range that its integers can say."""
    found: dict[str, tuple[float, float]] = {}
    tensors = [tensor for one in graph.operators for tensor in one.outputs]
    for tensor in (*graph.inputs, *tensors):
        if tensor.scale and tensor.datatype in _LIMITS:
            least, most = _LIMITS[tensor.datatype]
            low, high = (tensor.scale * (end - tensor.zero_point) for end in (least, most))
            found.setdefault(tensor.name.removesuffix(_SUFFIX), (low, high))
    return found
