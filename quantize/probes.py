"""How a format's models are quantized in part and looked into; what `sensitivity` asks.

Law of this file: one probe by format, all with the same verbs, and their table. Ranges of
activations are found once and used for every part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from edge_runtime.errors import UsageError
from quantize import (
    edge_quantizer_door,
    litert_door,
    noise,
    onnx_door,
    onnxruntime_door,
    tflite_ops,
)
from quantize.models import ModelFile
from quantize.passes import ONNX, TFLITE, Bench
from quantize.passes.integer import StaticInt8
from quantize.passes.tflite import TfliteInt8
from quantize.pruning import work

Method = Literal["", "average", "minmax", "entropy", "percentile", "mse"]
Nodes = Sequence[tuple[str, str]]  # (name, operator)

ROWS = 64  # calibration samples by which a layer's own output is judged
# Of large inputs (sound, pictures) so few that these values are in them; each layer's are computed.
ROW_VALUES = 1 << 19


class Parts(Protocol):
    """A float model whose nodes can be quantized one by one.

    Attributes:
        backend: what runs it. suffix: of its files. work: multiplications of a run; 0: not known.
    """

    backend: str
    suffix: str

    @property
    def work(self) -> int: ...

    def write(self, out: Path, only: Sequence[str], exclude: Sequence[str]) -> None:
        """The model with these nodes quantized, or all but those.

        Raises:
            UsageError: the library is missing. ModelError: nothing could be quantized.
        """

    def nodes(self, full: Path) -> Nodes:
        """Those that are quantized in `full`, where all that can be are."""

    def shares(self) -> dict[str, float]:
        """Each node's share of the model's multiplications."""

    def noise(self, made: Path, nodes: Nodes) -> dict[str, float]:
        """By node the signal to noise in dB of its own output in `made`."""


class OnnxParts:
    """Through onnxruntime; see Parts."""

    backend = "onnxruntime"
    suffix = ".onnx"

    def __init__(self, source: Path, bench: Bench, method: Method, folder: Path) -> None:
        self._source, self._bench = source, bench
        self._how = msgspec.convert({"method": method} if method else {}, StaticInt8)
        self._ranges = folder / "ranges.json"

    @property
    def work(self) -> int:
        return work.macs(self._source)

    def write(self, out: Path, only: Sequence[str], exclude: Sequence[str]) -> None:
        how = msgspec.structs.replace(self._how, exclude=tuple(exclude))
        onnxruntime_door.quantize_static(
            self._source, out, how, self._bench, tuple(only), self._ranges
        )

    def nodes(self, full: Path) -> Nodes:
        """(name, operator) of nodes whose inputs are integers in the quantized model."""
        graph = onnx_door.load(full).graph
        made = {out: node.op_type for node in graph.node for out in node.output}
        inside = {
            node.name
            for node in graph.node
            if any(made.get(name) == "DequantizeLinear" for name in node.input)
        }
        nodes = onnx_door.load(self._source).graph.node
        return [(node.name, node.op_type) for node in nodes if node.name and node.name in inside]

    def shares(self) -> dict[str, float]:
        counts = work.by_node(self._source)
        total = max(sum(counts.values()), 1)
        return {name: count / total for name, count in counts.items()}

    def noise(self, made: Path, nodes: Nodes) -> dict[str, float]:
        bench = self._bench
        seen = _seen_at(self._source, made, [name for name, _ in nodes])
        feeds = {name: array[:ROWS] for name, array in bench.calibration.items()}
        want = {a for a, _ in seen.values()}, {b for _, b in seen.values()}
        powers = noise.Powers()
        for before, after in zip(
            onnxruntime_door.activations(self._source, feeds, bench, want[0]),
            onnxruntime_door.activations(made, feeds, bench, want[1]),
            strict=True,
        ):
            for name, (a, b) in seen.items():
                if a in before and b in after and before[a].shape == after[b].shape:
                    powers.add(name, before[a], after[b])
        return powers.decibels()


def _seen_at(source: Path, full: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The tensors, in the source and in the quantized model, at which a node's answer is seen.

    That is its output as the next node gets it, so behind the quantize/dequantize pair. A quantizer
    lets a Conv swallow the Relu that follows: then it is the Relu's, which has no negative values.
    """
    nodes, made = onnx_door.load(source).graph.node, onnx_door.load(full).graph.node
    there = {out for node in made for out in node.output}
    pair = {node.input[0]: node.output[0] for node in made if node.op_type in _PAIR}
    after = {node.input[0]: node.output[0] for node in nodes if node.op_type in ("Relu", "Clip")}
    seen = {}
    for node in nodes:
        out = node.output[0]
        tensor = out if out in there else after.get(out, "")
        if node.name in set(names) and tensor in there:
            seen[node.name] = tensor, pair.get(pair.get(tensor, ""), tensor)
    return seen


_PAIR = ("QuantizeLinear", "DequantizeLinear")


class TfliteParts:
    """Through ai-edge-quantizer and LiteRT; see Parts.

    Operators that only move values are none of its nodes: they lose nothing.
    """

    backend = "litert"
    suffix = ".tflite"

    def __init__(self, source: Path, bench: Bench, method: Method, folder: Path) -> None:
        if method == "entropy":
            raise UsageError(
                "ranges of .tflite models are not found by entropy",
                where="--method",
                expected="average, minmax, percentile or mse",
            )
        self._source, self._bench = source, bench
        self._how = msgspec.convert({"method": method} if method else {}, TfliteInt8)
        self._ranges = folder / "ranges.json"
        self._graph = litert_door.graph(source)

    @property
    def work(self) -> int:
        return sum(map(tflite_ops.macs, self._graph.operators))

    def write(self, out: Path, only: Sequence[str], exclude: Sequence[str]) -> None:
        how = msgspec.structs.replace(self._how, exclude=tuple(exclude))
        edge_quantizer_door.quantize_static(self._source, out, how, self._bench, only, self._ranges)

    def nodes(self, full: Path) -> Nodes:
        made = tflite_ops.quantized(litert_door.graph(full))
        return [
            (one.name, one.kind)
            for one in self._graph.operators
            if one.kind not in tflite_ops.MOVING and one.name in made
        ]

    def shares(self) -> dict[str, float]:
        return tflite_ops.shares(self._graph)

    def noise(self, made: Path, nodes: Nodes) -> dict[str, float]:
        bench, first = self._bench, dict(nodes)
        seen = {one.name: one.outputs[0].name for one in self._graph.operators if one.name in first}
        largest = max(array[0].size for array in bench.calibration.values())
        rows = min(ROWS, max(ROW_VALUES // max(largest, 1), 4))
        feeds = {name: array[:rows] for name, array in bench.calibration.items()}
        powers = noise.Powers()
        for before, after in zip(
            litert_door.activations(self._source, feeds, bench, set(seen.values())),
            litert_door.activations(made, feeds, bench, set(seen.values())),
            strict=True,
        ):
            for name, tensor in seen.items():
                if tensor in before and tensor in after:
                    powers.add(name, before[tensor], after[tensor])
        return powers.decibels()


_PARTS: dict[str, Callable[[Path, Bench, Method, Path], Parts]] = {
    ONNX: OnnxParts,
    TFLITE: TfliteParts,
}


def parts(source: ModelFile, bench: Bench, method: Method, folder: Path) -> Parts:
    """Of a model.

    Args:
        method: how ranges are read from calibration; "": the default of the format's pass.
        folder: for what is kept between calls.

    Raises:
        UsageError: a format whose models cannot be quantized in part, or a method it lacks.
    """
    make = _PARTS.get(source.format)
    if make is None:
        raise UsageError(
            f"sensitivity is measured on models of the formats {', '.join(_PARTS)}, not"
            f" {source.format}",
            where=str(source.path),
        )
    return make(source.path, bench, method, folder)
