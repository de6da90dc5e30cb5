"""Two outcomes, or two models on the same data, side by side.

Law of this file: values; models are asked through `served`, times come from `latency`. What is
compared with a paired test was answered for the same samples; two outcomes keep no answers, so
their scores are compared by their intervals, and times only where the machine was the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import (
    automatic,
    datasets,
    evaluating,
    judging,
    latency,
    looking,
    models,
    origins,
    scores,
    served,
)
from quantize.datasets import Dataset
from quantize.latency import Timed
from quantize.models import ModelFile
from quantize.recipe import Data, Evaluation
from quantize.results import Evaluated, Outcome
from quantize.scores import Difference, Interval
from quantize.served import Candidate, Served
from quantize.targets import is_here

Array = np.ndarray[Any, Any]


class Pair(NamedTuple):
    """A variant in two outcomes; None where one of them has none.

    `changed`: scores differ by more than both intervals allow. `speedup`: first / second latency; 0
    where the machines differ or a time is missing.
    """

    name: str
    first: Evaluated | None
    second: Evaluated | None
    changed: bool
    speedup: float


class Side(msgspec.Struct, frozen=True):
    """One of two models."""

    path: str
    backend: str
    score: Interval
    p50_ms: float
    size_bytes: int


class Compared(msgspec.Struct, frozen=True):
    """Two models on the same samples: what the second loses against the first."""

    metric: str
    samples: int
    confidence: float
    first: Side
    second: Side
    loss: Difference
    speedup: float
    groups: int = 0  # that the samples are in; 0: each is its own
    notes: tuple[str, ...] = ()


def outcomes(first: Outcome, second: Outcome) -> tuple[list[Pair], list[str]]:
    """Variants by name in the first's order, and why figures are not comparable."""
    cautions = list(_cautions(first, second))
    same_machine = _machine(first) == _machine(second)
    mine, theirs = ({one.name: one for one in each.evaluated} for each in (first, second))
    names = dict.fromkeys([*mine, *theirs])
    return [_pair(name, mine.get(name), theirs.get(name), same_machine) for name in names], cautions


def _pair(name: str, first: Evaluated | None, second: Evaluated | None, same_machine: bool) -> Pair:
    if first is None or second is None:
        return Pair(name, first, second, False, 0.0)
    changed = bool(
        first.score
        and second.score
        and (first.score.low > second.score.high or second.score.low > first.score.high)
    )
    timed = same_machine and first.p50_ms and second.p50_ms
    return Pair(name, first, second, changed, first.p50_ms / second.p50_ms if timed else 0.0)


def _machine(outcome: Outcome) -> tuple[Any, ...]:
    return tuple(outcome.machine.get(key) for key in ("machine", "processor", "cores"))


def _cautions(first: Outcome, second: Outcome) -> list[str]:
    said = []
    if first.metric != second.metric:
        said.append(f"metrics differ: {first.metric} and {second.metric}; scores say nothing")
    if first.evaluation.get("sha256") != second.evaluation.get("sha256"):
        said.append("they were judged on different samples")
    if _machine(first) != _machine(second):
        said.append("they were measured on different machines; times are not compared")
    if first.source_sha256 != second.source_sha256:
        said.append("they began with different models")
    return said


# --- two models -----------------------------------------------------------------------------------


def model_files(
    paths: tuple[Path, Path],
    data: str,
    evaluation: Evaluation,
    confidence: float,
    threads: int,
    say: Callable[[str], None],
) -> Compared:
    """Ask both for every sample and test what the second loses. Of torch: what it exports.

    Args:
        data: where samples are; of images the first model's input says how they come.

    Raises:
        EdgeError: a model or the data are wrong, or their signatures differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [origins.file_of(path, Data(data), Path(folder), say) for path in paths]
        sides = [models.read(path) for path in files]
        told = automatic.data(data, "", sides[0])
        return _compared(paths, sides, told, evaluation, confidence, threads, say)


def _compared(
    paths: tuple[Path, Path],
    sides: list[ModelFile],
    data: Data,
    evaluation: Evaluation,
    confidence: float,
    threads: int,
    say: Callable[[str], None],
) -> Compared:
    if len(sides[0].inputs) != len(sides[1].inputs):
        raise UsageError(
            f"takes {len(sides[1].inputs)} inputs",
            where=str(paths[1]),
            expected=f"{len(sides[0].inputs)}, as {paths[0].name}",
        )
    if len(sides[0].outputs) != len(sides[1].outputs):
        raise UsageError(
            f"answers with {len(sides[1].outputs)} outputs",
            where=str(paths[1]),
            expected=f"{len(sides[0].outputs)}, as {paths[0].name}",
        )
    whole = datasets.load(data, sides[0].inputs)
    whole = datasets.some(whole, evaluation.samples, evaluation.seed)
    datasets.enough(whole)
    ours, theirs = sides[0].outputs, sides[1].outputs
    judged = judging.judged(
        evaluation, ours, whole.labels, None, whole.where, looking.looks(sides[0], whole)
    )
    candidates = [_candidate(f"side-{n}", one, threads) for n, one in enumerate(sides)]
    with served.daemon() as daemon:
        got = [_answers(daemon, one, whole, say) for one in candidates]
    other = _paired_names(ours, theirs)[judged.output]
    main = [got[0].outputs[judged.output], got[1].outputs[other]]
    points = [judged.metric.score(one, judged.labels, main[0]) for one in main]
    is_share, seed = judged.metric.is_share, evaluation.seed
    say("measuring latency")
    times = _times(candidates, whole)
    found = [
        Side(
            str(path),
            f"{one.backend} {answer.backend_version}",
            scores.interval(each, confidence, seed, whole.groups, is_share=is_share),
            time.p50_ms,
            one.path.stat().st_size,
        )
        for path, one, answer, each, time in zip(paths, candidates, got, points, times, strict=True)
    ]
    loss = scores.difference(
        points[0], points[1], confidence, seed, whole.groups, is_share=is_share
    )
    speedup = latency.ratio(times[0], times[1])
    groups = 0 if whole.groups is None else whole.units
    faults = [f"{one.fault}: {one.text}" for one in datasets.repeated(whole)]
    notes = (*faults, *whole.notes, *([judged.note] if judged.note else []))
    return Compared(
        judged.name, len(whole), confidence, found[0], found[1], loss, speedup, groups, notes
    )


def _candidate(name: str, one: ModelFile, threads: int) -> Candidate:
    backend = models.BACKENDS[one.format]
    if not is_here(backend):
        raise UsageError(
            f"{backend} is not installed",
            where=str(one.path),
            remedy=f"pip install 'edge-runtime[{backend}]'",
        )
    options = {evaluating.THREADS_OPTION[backend]: threads}
    return Candidate(name, one.path, backend, options, one.inputs, one.outputs, one.batch_axis)


def _answers(
    daemon: served.Daemon, one: Candidate, data: Dataset, say: Callable[[str], None]
) -> Served:
    say(f"asking {one.path.name} for {len(data)} answers")
    names = _paired_names(data.inputs, one.inputs)
    return daemon.answers(one, {names[name]: array for name, array in data.inputs.items()})


def _paired_names(
    first: Iterable[TensorSpec | str], second: Sequence[TensorSpec]
) -> dict[str, str]:
    """The second model's tensor for each of the first's: of its name, else in its place."""
    ours = [one if isinstance(one, str) else one.name for one in first]
    theirs = [spec.name for spec in second]
    return dict(zip(ours, ours if set(ours) == set(theirs) else theirs, strict=True))


def _times(candidates: list[Candidate], data: Dataset) -> list[Timed]:
    sample = next(datasets.batches(data.inputs, 1, candidates[0].inputs))
    jobs = [latency.Job(one.name, str(one.path), one.backend, one.options) for one in candidates]
    with tempfile.TemporaryDirectory() as folder:
        found = latency.measure(jobs, sample, Evaluation().rounds, Path(folder))
    times = []
    for one in candidates:
        time = found[one.name]
        if isinstance(time, str):
            raise ModelError(f"not measured: {time}", where=str(one.path))
        times.append(time)
    return times
