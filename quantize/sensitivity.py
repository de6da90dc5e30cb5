"""Which layers suffer from integers: each alone, all together, and what to leave float.

Law of this file: it quantizes one node at a time with ranges that were found once, and looks at the
answers in this process; the final word on a variant is `evaluating`'s. Everything is by seed and
order; time only decides whether there is enough of it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.backends import backend
from edge_runtime.cli import output
from edge_runtime.errors import EdgeError, ModelError
from quantize import automatic, datasets, judging, looking, models, noise, origins, probes
from quantize.models import ModelFile
from quantize.passes import ONNX, Bench, Say
from quantize.passes.graph import Clean
from quantize.probes import Parts
from quantize.recipe import Calibration, Data, Evaluation
from quantize.scores import Metric

Array = np.ndarray[Any, Any]

# Samples that each layer is judged with: enough to rank layers; the proposal is judged with all.
SAMPLES_DEFAULT = 512
ROWS = 64
LAYERS_TIMED = 2  # after so many it is known how long all take


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
            loss then. Without need it is empty; if nothing helps it holds all layers. notes: of the
            data and of how they were judged.
    """

    layers: tuple[Layer, ...]
    samples: int
    metric: str
    loss_all: float
    drop_max: float
    exclude: tuple[str, ...]
    loss_excluded: float
    notes: tuple[str, ...] = ()


class Probe:
    """Quantizes any set of nodes of one model and says what that costs."""

    def __init__(
        self,
        source: ModelFile,
        parts: Parts,
        data: datasets.Dataset,
        metric: Metric,
        output: str,
        folder: Path,
    ) -> None:
        self.parts = parts
        self._source, self._data = source, data
        self._metric, self._output, self._folder = metric, output, folder
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
        out = self._folder / f"probe{self._count}{self.parts.suffix}"
        self.parts.write(out, only, exclude)
        return out

    def answers(self, path: Path) -> Array:
        """The main output for every sample."""
        model = backend(self.parts.backend).load(path, {"threads": 1})
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
        return noise.sqnr_db(self._reference, got), float((self._scores - mine).mean())

    def cost_of(self, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[float, float]:
        """`cost` of `quantized`; nothing stays on disk. Raises: ModelError."""
        path = self.quantized(only, exclude)
        try:
            return self.cost(path)
        finally:
            path.unlink()


def measure(probe: Probe, metric: str, drop_max: float, say: Say) -> Sensitivity:
    """Each layer alone, all together, and the proposal.

    Raises:
        UsageError, ModelError: the model has nothing that can be quantized.
    """
    ranked = layers(probe, say)
    _, loss_all = probe.cost_of()
    names = [one.name for one in ranked]
    exclude, loss = propose(names, loss_all, drop_max, _loss_without(probe))
    return Sensitivity(tuple(ranked), probe.samples, metric, loss_all, drop_max, exclude, loss)


def layers(
    probe: Probe,
    say: Say,
    most_s: float = math.inf,
    now_s: Callable[[], float] = time.monotonic,
) -> list[Layer]:
    """Each layer that can be quantized, the most sensitive first.

    Raises:
        UsageError, ModelError: the model has nothing that can be quantized, or the first of its
            layers show that all take longer than `most_s`.
    """
    began_s = now_s()
    full = probe.quantized()
    nodes = probe.parts.nodes(full)
    shares, own = probe.parts.shares(), probe.parts.noise(full, nodes)
    full.unlink()
    found, first_s, expected = [], now_s(), ""
    for number, (name, operator) in enumerate(nodes, 1):
        say(f"layer {number} of {len(nodes)}{expected}: {name}")
        try:
            path = probe.quantized(only=[name])
            answer, loss = probe.cost(path)
            alone = probe.parts.noise(path, [(name, operator)])
            path.unlink()
            three = (alone, own, shares)
            rest = (one.get(name, 0.0) for one in three)
            found.append(Layer(name, operator, answer, loss, *rest))
        except EdgeError:
            pass  # it is quantized only together with its neighbours
        left_s = (now_s() - first_s) / number * (len(nodes) - number)
        expected = f", about {output.duration(left_s)} left"
        if number == LAYERS_TIMED and now_s() - began_s + left_s > most_s:
            raise ModelError(
                f"{len(nodes)} layers would take {output.duration(now_s() - began_s + left_s)},"
                f" and {output.duration(most_s)} may be spent on them"
            )
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


class Question(NamedTuple):
    """What a user asks: the arguments of `edge-quantize sensitivity`. 0, None: the default."""

    model: Path
    data: str
    calibration: str = ""
    drop_max: float | None = None
    samples: int = 0
    method: probes.Method = ""


def of_model(question: Question, say: Say) -> Sensitivity:
    """The layers of a model; of ONNX, which torch exports too, those after the pass `clean`.

    Raises:
        EdgeError: what is wrong with the model or the data.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary), Data(question.data)
        given = models.read(origins.file_of(question.model, data, folder, say))
        return _of_file(given, question, folder, say)


def _of_file(given: ModelFile, question: Question, folder: Path, say: Say) -> Sensitivity:
    told = automatic.data(question.data, question.calibration, given)
    whole = datasets.load(told, given.inputs)
    own = datasets.load(told, given.inputs, told.calibration) if told.calibration else None
    count = question.samples or SAMPLES_DEFAULT
    split = datasets.split(whole, own, Calibration().samples, 0, count, 0)
    judged = judging.judged(
        Evaluation(),
        given.outputs,
        split.evaluation.labels,
        None,
        split.evaluation.where,
        looking.looks(given, split.evaluation),
    )
    metric, samples = judged.metric, split.evaluation.labelled(judged.labels)
    bench = Bench(split.calibration.feeds, given.inputs, given.outputs, given.batch_axis, 0, say)
    source = cleaned(given, bench, folder)
    parts = probes.parts(source, bench, question.method, folder)
    probe = Probe(source, parts, samples, metric, judged.output, folder)
    drop_max = metric.drop_max if question.drop_max is None else question.drop_max
    found = measure(probe, judged.name, drop_max, say)
    faults = [f"{one.fault}: {one.text}" for one in split.findings]
    notes = (*faults, *split.notes, *([judged.note] if judged.note else []))
    return msgspec.structs.replace(found, notes=notes)


def cleaned(given: ModelFile, bench: Bench, folder: Path) -> ModelFile:
    """An ONNX model after the pass `clean`, others as they are: of its nodes exclude lists speak.

    Raises:
        ModelError: it cannot be cleaned up.
    """
    if given.format != ONNX:
        return given
    Clean().apply(given.path, folder / "clean.onnx", bench)
    return models.read(folder / "clean.onnx")
