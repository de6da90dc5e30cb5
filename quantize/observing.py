"""What quantized tensors hold: the float model run over both sets, beside the variants' ranges.

Law of this file: it runs and counts; what the figures mean is decided in `checks`. Extremes are
kept by sample, because what counts is how many samples leave a range; they are of every value,
histograms of a bounded number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantize import checks, clusters, litert_door, onnx_door, onnxruntime_door, ranges, tflite_ops
from quantize.building import Built
from quantize.datasets import Dataset, Split
from quantize.models import ModelFile
from quantize.passes import ONNX, TFLITE, Bench, Feeds, Say
from quantize.ranges import Histogram
from quantize.results import Activation, Clipping, Finding
from quantize.rows import thinned

Array = np.ndarray[Any, Any]

SAMPLES_MAX = 512  # of each set: a share of 1 % is then known to half a point
VALUES_MAX = 1 << 16  # counted per tensor and sample; of larger ones every k-th
ROW_VALUES_MAX = 1 << 20  # of an input in one run: bounds the memory of all layers' outputs
ROWS_MAX = 32
SHOWN_BINS = 64  # of a histogram in an outcome


class Seen(NamedTuple):
    """Of one tensor over one set: extremes by sample [samples], and counts."""

    low: Array
    high: Array
    histogram: Histogram


class Observed(NamedTuple):
    """What was found."""

    activations: tuple[Activation, ...]
    findings: tuple[Finding, ...]


def observe(
    source: ModelFile,
    split: Split,
    built: Sequence[Built],
    answers: Mapping[str, Array],
    output: str,
    say: Say,
) -> Observed:
    """Tensors that a variant quantizes, and every check of `checks`.

    Args:
        answers: the float model's for the evaluation samples. output: the one that is judged.
    """
    groups = split.calibration.groups, split.evaluation.groups
    found = checks.inputs(split.calibration.inputs, split.evaluation.inputs, groups)
    kept = _ranges(source, built)
    activations: tuple[Activation, ...] = ()
    if source.format in _LOOKING and kept:
        say("looking at what quantized tensors hold")
        activations = _activations(source, split, kept)
    if not found:  # else the rest follows from it
        found = _of_ranges(activations, split)
    makers = {one.variant.name: str(one.steps[-1]["use"]) for one in built if one.steps}
    found += checks.clipped(activations, makers)
    found += _of_labels(split.evaluation, answers[output])
    found += _of_classes(source, split, answers[output], output)
    return Observed(activations, tuple(found))


def _of_ranges(activations: Sequence[Activation], split: Split) -> list[Finding]:
    # Views of one photograph show its ranges once.
    used, judged = (
        min(len(one), SAMPLES_MAX)
        if one.groups is None
        else clusters.count(one.groups[:SAMPLES_MAX])
        for one in (split.calibration, split.evaluation)
    )
    return checks.few(len(split.calibration)) or checks.beyond(activations, used, judged)


def _of_labels(data: Dataset, answers: Array) -> list[Finding]:
    given = _classes(data)
    if given is None or answers.ndim != 2 or answers.shape[1] < 2:
        return []
    return checks.labels(answers, given)


def _of_classes(source: ModelFile, split: Split, answers: Array, output: str) -> list[Finding]:
    """By the labels of both sets, or by what the float model says of both."""
    mine, given = _classes(split.calibration), _classes(split.evaluation)
    if mine is None or given is None:
        if source.format not in _LOOKING or answers.ndim != 2 or answers.shape[1] < 2:
            return []
        runs = _values(source, _first(split.calibration), {output})
        mine = np.concatenate([values[output].argmax(axis=1) for _, values in runs])
        given = answers.argmax(axis=1)
    return checks.missing_classes(mine, given)


def _classes(data: Dataset) -> Array | None:
    """One class a sample; None where labels are missing or say something else."""
    given = data.labels
    if given is None or given.dtype.kind not in "iu" or given.size != len(given):
        return None
    return given.reshape(-1)


def _ranges(source: ModelFile, built: Sequence[Built]) -> dict[str, dict[str, tuple[float, float]]]:
    """By tensor and variant."""
    kept: dict[str, dict[str, tuple[float, float]]] = {}
    for one in built:
        if one.path is not None and one.path.suffix in _RANGES and one.steps:
            for tensor, span in _RANGES[one.path.suffix](one.path, source.path).items():
                kept.setdefault(tensor, {})[one.variant.name] = span
    return kept


def _activations(
    source: ModelFile, split: Split, kept: dict[str, dict[str, tuple[float, float]]]
) -> tuple[Activation, ...]:
    sets = [_first(one) for one in (split.calibration, split.evaluation)]
    limits = [_extremes(source, one, set(kept)) for one in sets]
    edges = {
        name: (
            min(0.0, *(float(each[name][0].min()) for each in limits)),
            max(0.0, *(float(each[name][1].max()) for each in limits)),
        )
        for name in limits[0]
    }
    counts = [_counts(source, one, set(kept), edges) for one in sets]
    calibration, evaluation = (
        {name: Seen(*each[name], counted[name]) for name in edges}
        for each, counted in zip(limits, counts, strict=True)
    )
    order = [name for name in kept if name in edges]
    return tuple(_activation(name, calibration[name], evaluation[name], kept) for name in order)


def _activation(
    name: str,
    calibration: Seen,
    evaluation: Seen,
    kept: dict[str, dict[str, tuple[float, float]]],
) -> Activation:
    seen = float(calibration.low.min()), float(calibration.high.max())
    outside = (evaluation.low < seen[0]) | (evaluation.high > seen[1])
    clippings = {
        variant: Clipping(
            low,
            high,
            ranges.saturated(calibration.histogram, low, high),
            ranges.saturated(evaluation.histogram, low, high),
        )
        for variant, (low, high) in kept[name].items()
    }
    return Activation(
        name,
        calibration.histogram.low,
        calibration.histogram.high,
        _coarse(calibration.histogram),
        _coarse(evaluation.histogram),
        seen,
        float(outside.mean()),
        clippings,
    )


def _coarse(histogram: Histogram) -> tuple[int, ...]:
    return tuple(int(one) for one in histogram.counts.reshape(SHOWN_BINS, -1).sum(axis=1))


def _extremes(source: ModelFile, feeds: Feeds, wanted: set[str]) -> dict[str, tuple[Array, Array]]:
    """By tensor its smallest and largest value of each sample."""
    found: dict[str, list[tuple[Array, Array]]] = {}
    for rows, values in _values(source, feeds, wanted):
        for name, value in values.items():
            # A tensor that mixes the samples of a batch counts as one.
            flat = value.reshape(rows if value.size % rows == 0 else 1, -1)
            found.setdefault(name, []).append((flat.min(axis=1), flat.max(axis=1)))
    return {
        name: (np.concatenate([one[0] for one in each]), np.concatenate([one[1] for one in each]))
        for name, each in found.items()
    }


def _counts(
    source: ModelFile, feeds: Feeds, wanted: set[str], edges: Mapping[str, tuple[float, float]]
) -> dict[str, Histogram]:
    found: dict[str, Histogram] = {}
    for count, values in _values(source, feeds, wanted):
        for name, value in values.items():
            flat = thinned(value, count * VALUES_MAX)
            found[name] = ranges.counted(found.get(name), flat, *edges[name])
    return found


def _values(source: ModelFile, feeds: Feeds, wanted: set[str]) -> Iterator[tuple[int, Feeds]]:
    """The tensors of some samples at a time, inputs among them, and how many samples."""
    bench = Bench(feeds, source.inputs, source.outputs, source.batch_axis, 0, lambda what: None)
    largest = max(array[0].size for array in feeds.values())
    rows = min(max(ROW_VALUES_MAX // max(largest, 1), 1), ROWS_MAX)
    given = {name for name in feeds if name in wanted}
    runs = _LOOKING[source.format](source.path, feeds, bench, wanted - set(feeds), rows)
    step = rows if source.batch_axis == 0 else 1
    for index, values in enumerate(runs):
        own = {name: feeds[name][index * step : (index + 1) * step] for name in given}
        count = len(next(iter(feeds.values()))[index * step : (index + 1) * step])
        yield count, {name: _numbers(one) for name, one in (own | values).items() if one.size}


def _numbers(value: Array) -> Array:
    """Infinities and NaNs, which no integer stands for, as 0, which every range holds."""
    if np.isfinite([value.min(), value.max()]).all():
        return value
    return np.where(np.isfinite(value), value, 0).astype(value.dtype)


def _onnx_ranges(path: Path, source: Path) -> dict[str, tuple[float, float]]:
    """A range before a Relu or Clip cuts off what that leaves; both together are the narrower."""
    made = onnx_door.load(path)
    limited = onnx_door.limited(onnx_door.load(source), made) if source.suffix == ".onnx" else {}
    found: dict[str, tuple[float, float]] = {}
    for tensor, (low, high) in onnx_door.quantized_ranges(made).items():
        name = limited.get(tensor, tensor)
        least, most = found.get(name, (low, high))
        found[name] = max(least, low), min(most, high)
    return found


def _tflite_ranges(path: Path, _: Path) -> dict[str, tuple[float, float]]:
    return tflite_ops.ranges(litert_door.graph(path))


# By the format of the float model: runs of it that show all tensors.
_LOOKING: dict[str, Callable[[Path, Feeds, Bench, set[str], int], Iterable[Feeds]]] = {
    ONNX: onnxruntime_door.activations,
    TFLITE: litert_door.activations,
}
# By the ending of a quantized file: what its tensors can say.
_RANGES = {".onnx": _onnx_ranges, ".tflite": _tflite_ranges}


def _first(data: Dataset) -> Feeds:
    return {name: np.asarray(array[:SAMPLES_MAX]) for name, array in data.inputs.items()}
