"""Which layers suffer from integers: each alone, all together, and what to leave float.

Law of this file: it quantizes one node at a time with ranges that were found once, and looks at the
answers in this process; the final word on a variant is `evaluating`'s. Everything is by seed and
order, nothing by time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError, UsageError
from quantize import datasets, judging, models, onnx_door, onnxruntime_door
from quantize.models import ModelFile
from quantize.passes import ONNX, Bench, Say
from quantize.passes.graph import Clean
from quantize.passes.integer import StaticInt8
from quantize.pruning import work
from quantize.recipe import Calibration, Data, Evaluation
from quantize.scores import Metric

Array = np.ndarray[Any, Any]

# Samples that each layer is judged with: enough to rank layers; the proposal is judged with all.
SAMPLES_DEFAULT = 512
ROWS = 64
# Better than this is noise of float arithmetic itself.
SQNR_DB_MAX = 120.0


class Layer(msgspec.Struct, frozen=True):
    """One node that can be quantized.

    Attributes:
        sqnr_db: signal to quantization noise of the model's answer when this node alone is
            quantized; less is worse. loss: of the metric then.
        alone_sqnr_db: of this node's own output then. own_sqnr_db: of it when the whole model is
            quantized. 0: not known.
        macs_share: its share of the model's multiplications.
    """

    name: str
    operator: str
    sqnr_db: float
    loss: float
    alone_sqnr_db: float
    own_sqnr_db: float
    macs_share: float


class Sensitivity(msgspec.Struct, frozen=True):
    """What was found, the most sensitive layer first.

    Attributes:
        loss_all: of the metric when everything is quantized. exclude: the fewest of the most
            sensitive nodes that must stay float for the loss to keep `drop_max`; loss_excluded: the
            loss then. Without need it is empty; if nothing helps it holds all layers.
    """

    layers: tuple[Layer, ...]
    samples: int
    metric: str
    loss_all: float
    drop_max: float
    exclude: tuple[str, ...]
    loss_excluded: float


class Probe:
    """Quantizes any set of nodes of one model and says what that costs."""

    def __init__(
        self,
        source: ModelFile,
        bench: Bench,
        data: datasets.Dataset,
        metric: Metric,
        output: str,
        how: StaticInt8,
        folder: Path,
    ) -> None:
        if source.format != ONNX:
            raise UsageError(
                f"sensitivity is measured on ONNX models, not {source.format}",
                where=str(source.path),
            )
        self.how = how
        self._source, self._bench, self._data = source, bench, data
        self._metric, self._output, self._folder = metric, output, folder
        self._ranges = folder / "ranges.json"
        self._count = 0
        self.samples = len(data)
        self._reference = self.answers(source.path)
        self._scores = metric.score(self._reference, data.labels, self._reference)

    def quantized(self, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> Path:
        """The model with these nodes quantized, or all but those; ranges are found the first time.

        The file is the caller's, to delete when it was looked at.

        Raises:
            ModelError: nothing could be quantized.
        """
        self._count += 1
        out = self._folder / f"probe{self._count}.onnx"
        how = msgspec.structs.replace(self.how, exclude=tuple(exclude))
        onnxruntime_door.quantize_static(
            self._source.path, out, how, self._bench, tuple(only), self._ranges
        )
        return out

    def answers(self, path: Path) -> Array:
        """The main output for every sample."""
        model = backend("onnxruntime").load(path, {"threads": 1})
        rows = ROWS if self._source.batch_axis == 0 else 1
        parts = [
            model.run(feed)[self._output]
            for feed in datasets.batches(self._data.inputs, rows, self._source.inputs)
        ]
        return np.concatenate(parts)

    def cost(self, path: Path) -> tuple[float, float]:
        """(signal to noise in dB, loss of the metric) of a model beside the float one."""
        got = self.answers(path)
        mine = self._metric.score(got, self._data.labels, self._reference)
        return sqnr_db(self._reference, got), float((self._scores - mine).mean())

    def cost_of(self, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[float, float]:
        """`cost` of `quantized`; nothing stays on disk. Raises: ModelError."""
        path = self.quantized(only, exclude)
        try:
            return self.cost(path)
        finally:
            path.unlink()


def measure(
    probe: Probe, source: ModelFile, bench: Bench, metric: str, drop_max: float, say: Say
) -> Sensitivity:
    """Each layer alone, all together, and the proposal.

    Raises:
        UsageError, ModelError: the model has nothing that can be quantized.
    """
    ranked = layers(probe, source, bench, say)
    _, loss_all = probe.cost_of()
    names = [one.name for one in ranked]
    exclude, loss = propose(names, loss_all, drop_max, _loss_without(probe))
    return Sensitivity(tuple(ranked), probe.samples, metric, loss_all, drop_max, exclude, loss)


def layers(probe: Probe, source: ModelFile, bench: Bench, say: Say) -> list[Layer]:
    """Each layer that can be quantized, the most sensitive first.

    Raises:
        UsageError, ModelError: the model has nothing that can be quantized.
    """
    full = probe.quantized()
    nodes = quantizable(source.path, full)
    shares, own = macs_shares(source.path), _own(source.path, full, nodes, bench)
    full.unlink()
    found = []
    for number, (name, operator) in enumerate(nodes, 1):
        say(f"layer {number} of {len(nodes)}: {name}")
        try:
            path = probe.quantized(only=[name])
            noise, loss = probe.cost(path)
            alone = _own(source.path, path, [(name, operator)], bench)
            path.unlink()
        except EdgeError:
            continue  # it is quantized only together with its neighbours
        three = (alone, own, shares)
        found.append(Layer(name, operator, noise, loss, *(one.get(name, 0.0) for one in three)))
    return sorted(found, key=lambda one: (one.sqnr_db, one.name))


def _loss_without(probe: Probe) -> Callable[[Sequence[str]], float]:
    def loss(exclude: Sequence[str]) -> float:
        return probe.cost_of(exclude=exclude)[1]

    return loss


def propose(
    ranked: Sequence[str],
    loss_all: float,
    drop_max: float,
    loss_without: Callable[[Sequence[str]], float],
) -> tuple[tuple[str, ...], float]:
    """The fewest of the ranked names to leave out so that the loss keeps the budget.

    Doubles first, then halves the gap: a few trials, and the loss falls with the number left out to
    within noise.
    """
    if loss_all <= drop_max or not ranked:
        return (), loss_all
    known: dict[int, float] = {}

    def loss(count: int) -> float:
        if count not in known:
            known[count] = loss_without(ranked[:count])
        return known[count]

    count = 1
    most = len(ranked) - 1  # leaving all out is the float model
    while count < most and loss(count) > drop_max:
        count = min(count * 2, most)
    if most < 1 or loss(count) > drop_max:
        return tuple(ranked), 0.0
    low = count // 2
    while count - low > 1:
        middle = (count + low) // 2
        low, count = (low, middle) if loss(middle) <= drop_max else (middle, count)
    return tuple(ranked[:count]), loss(count)


def sqnr_db(want: Array, got: Array) -> float:
    """10 log10 of signal power over noise power, at most SQNR_DB_MAX."""
    return _decibels(*_powers(want, got))


def _powers(want: Array, got: Array) -> tuple[float, float]:
    """(of the signal, of the noise), summed over all values."""
    wide = want.astype(np.float64)
    return float((wide**2).sum()), float(((wide - got) ** 2).sum())


def _decibels(signal: float, noise: float) -> float:
    if signal == 0 or noise == 0:
        return SQNR_DB_MAX
    return min(10 * math.log10(signal / noise), SQNR_DB_MAX)


def quantizable(source: Path, full: Path) -> list[tuple[str, str]]:
    """(name, operator) of the source's nodes whose inputs are integers in the quantized model."""
    graph = onnx_door.load(full).graph
    made = {out: node.op_type for node in graph.node for out in node.output}
    inside = {
        node.name
        for node in graph.node
        if any(made.get(name) == "DequantizeLinear" for name in node.input)
    }
    nodes = onnx_door.load(source).graph.node
    return [(node.name, node.op_type) for node in nodes if node.name and node.name in inside]


def macs_shares(path: Path) -> dict[str, float]:
    """Each node's share of the model's multiplications."""
    counts = work.by_node(path)
    total = max(sum(counts.values()), 1)
    return {name: count / total for name, count in counts.items()}


def _own(
    source: Path, full: Path, nodes: Sequence[tuple[str, str]], bench: Bench
) -> dict[str, float]:
    """How much each node's own output suffers when everything before it is quantized too."""
    seen = _seen_at(source, full, [name for name, _ in nodes])
    feeds = {name: array[:ROWS] for name, array in bench.calibration.items()}
    wants = onnxruntime_door.activations(source, feeds, bench, {a for a, _ in seen.values()})
    gots = onnxruntime_door.activations(full, feeds, bench, {b for _, b in seen.values()})
    powers: dict[str, tuple[float, float]] = {}
    for want, got in zip(wants, gots, strict=True):
        for name, (a, b) in seen.items():
            if a in want and b in got and want[a].shape == got[b].shape:
                signal, noise = powers.get(name, (0.0, 0.0))
                more = _powers(want[a], got[b])
                powers[name] = signal + more[0], noise + more[1]
    return {name: _decibels(*both) for name, both in powers.items()}


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


class Question(NamedTuple):
    """What a user asks: the arguments of `edge-quantize sensitivity`. 0, None: the default."""

    model: Path
    data: str
    calibration: str = ""
    drop_max: float | None = None
    samples: int = 0
    method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"


def of_model(question: Question, say: Say) -> Sensitivity:
    """The cleaned-up model's layers: what an exclude list after the pass `clean` speaks of.

    Raises:
        EdgeError: what is wrong with the model or the data.
    """
    given = models.read(question.model)
    if given.format != ONNX:
        raise UsageError(
            f"sensitivity is measured on ONNX models, not {given.format}",
            where=str(question.model),
        )
    told = Data(path=question.data, calibration=question.calibration)
    whole = datasets.load(told, given.inputs)
    own = datasets.load(told, given.inputs, told.calibration) if told.calibration else None
    count = question.samples or SAMPLES_DEFAULT
    split = datasets.split(whole, own, Calibration().samples, 0, count, 0)
    for line in (*split.notes, *(f"{one.fault}: {one.text}" for one in split.findings)):
        say(line)
    judged = judging.judged(
        Evaluation(), given.outputs, split.evaluation.labels, None, split.evaluation.where
    )
    metric, samples = judged.metric, split.evaluation.labelled(judged.labels)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(
            split.calibration.feeds, given.inputs, given.outputs, given.batch_axis, 0, say
        )
        Clean().apply(given.path, folder / "clean.onnx", bench)
        source = models.read(folder / "clean.onnx")
        how = StaticInt8(method=question.method)
        probe = Probe(source, bench, samples, metric, judged.output, how, folder)
        drop_max = metric.drop_max if question.drop_max is None else question.drop_max
        return measure(probe, source, bench, judged.name, drop_max, say)
