"""Every variant on its real backend: how right, how fast, how large; and what is shipped.

Law of this file: the order of steps. Answers come from a served worker (`served`), times from the
backend's own bound run (`latency`), scores from `scores`, the decision from `verdict`. A variant
that fails a step keeps the reason; the run goes on.
"""

from __future__ import annotations

import lzma
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_runtime.errors import EdgeError, ModelError
from quantize import (
    causes,
    datasets,
    latency,
    models,
    onnxruntime_door,
    scores,
    served,
    verdict,
)
from quantize.building import Built
from quantize.datasets import Dataset
from quantize.latency import Timed
from quantize.models import ModelFile
from quantize.passes import Say
from quantize.pruning import work
from quantize.recipe import Recipe, Variant
from quantize.results import Evaluated
from quantize.scores import Metric
from quantize.served import Candidate, Daemon, Served

Array = np.ndarray[Any, Any]

# How a backend calls its number of threads: the same for all that are compared.
THREADS_OPTION = {"onnxruntime": "threads", "openvino": "threads", "litert": "threads"}
# Compressed size is that of what travels; a higher preset takes minutes for per cents.
LZMA_PRESET = 3
# LZMA takes 0.7 s a megabyte: of a larger file so many pieces, evenly spread, stand for the whole.
PACKED_BYTES_MAX, PACKED_PIECES = 8 << 20, 16


class Judge:
    """What all variants are measured with."""

    def __init__(
        self, recipe: Recipe, source: ModelFile, data: Dataset, metric: Metric, output: str
    ) -> None:
        self.recipe = recipe
        self.source = source
        self.data = data
        self.metric = metric
        self.output = output

    def options(self, variant: Variant) -> dict[str, Any]:
        """The variant's options with the recipe's number of threads."""
        key = THREADS_OPTION.get(variant.backend)
        return {key: self.recipe.threads, **variant.options} if key else dict(variant.options)


def evaluate(
    judge: Judge, built: Sequence[Built], say: Say
) -> tuple[list[Evaluated], dict[str, Array]]:
    """All variants, measured and judged, and the answers of the first: the float model, reference.

    Raises:
        ModelError: the float model is not served.
    """
    with served.daemon() as daemon:
        answers = {one.variant.name: _ask(judge, daemon, one, say) for one in built}
    reference = answers[built[0].variant.name]
    if isinstance(reference, str):
        raise ModelError(f"the float model itself is not served: {reference}")
    _check_numbers(judge, reference.outputs[judge.output])
    say("measuring latency")
    with tempfile.TemporaryDirectory() as folder:
        times = _times(judge, built, answers, Path(folder))
    found = [_joined(judge, one, built, answers, times) for one in built]
    first = found[0]
    judged = [
        msgspec.structs.replace(
            one,
            refusal=verdict.refusal(
                one, first, judge.recipe.budgets, drop_max(judge), len(judge.data)
            ),
            notes=(*one.notes, *causes.beside(one, first)),
        )
        for one in found
    ]
    return _needed(judged), reference.outputs


def _check_numbers(judge: Judge, answers: Array) -> None:
    """Raises: ModelError where the float model's own answers are no numbers: nothing equals them"""
    bad = int(not_numbers(answers).sum())
    if bad:
        raise ModelError(
            f"the float model answers NaN (no number) to {bad} of {len(answers)} samples in output"
            f" {judge.output!r}",
            where=judge.data.where,
            remedy="see that inputs are scaled as in training, and leave such samples out",
        )


def not_numbers(answers: Array) -> Array:
    """Which samples' answers hold a NaN [samples]."""
    if answers.dtype.kind != "f":
        return np.zeros(len(answers), bool)
    return np.asarray(np.isnan(answers.reshape(len(answers), -1)).any(axis=1))


def _needed(judged: list[Evaluated]) -> list[Evaluated]:
    """Each backend ships what nothing else of its own replaces; of equals the first stays."""
    kept: list[Evaluated] = []
    for one in judged:
        rivals = [each for each in kept if not each.refusal]
        if not one.refusal and not one.is_float:
            one = msgspec.structs.replace(one, refusal=verdict.dominated(one, rivals))
        kept.append(one)
    return kept


def drop_max(judge: Judge) -> float:
    """The loss that is allowed, in the metric's unit."""
    stated = judge.recipe.budgets.drop_max
    return judge.metric.drop_max if stated is None else stated


def _ask(judge: Judge, daemon: Daemon, one: Built, say: Say) -> Served | str:
    if one.path is None:
        return one.refusal
    say(f"asking {one.variant.name} for {len(judge.data)} answers")
    try:
        return daemon.answers(candidate(judge, one), judge.data.inputs)
    except EdgeError as error:
        return f"{one.variant.backend} does not serve it: {error}"


def candidate(judge: Judge, one: Built) -> Candidate:
    """The variant as the private daemon is given it."""
    assert one.path is not None
    own = models.read(one.path)
    return Candidate(
        one.variant.name,
        one.path,
        one.variant.backend,
        judge.options(one.variant),
        own.inputs,
        own.outputs,
        own.batch_axis if judge.source.batch_axis == 0 else None,
    )


def _times(
    judge: Judge, built: Sequence[Built], answers: dict[str, Served | str], folder: Path
) -> dict[str, Timed | str]:
    """Of those that are served, and of the float model on every backend that one of them uses."""
    sample = next(datasets.batches(judge.data.inputs, 1, judge.source.inputs))
    served_ones = [one for one in built if isinstance(answers[one.variant.name], Served)]
    jobs = [_job(judge, one.variant, one.path) for one in served_ones]
    known = {one.variant.backend for one in served_ones if one.variant.is_float}
    for backend in {one.variant.backend for one in served_ones} - known:
        plain = Variant(_float_on(backend), backend)
        jobs.append(_job(judge, plain, judge.source.on(backend).path))
    return latency.measure(jobs, sample, judge.recipe.evaluation.rounds, folder)


def _job(judge: Judge, variant: Variant, path: Path | None) -> latency.Job:
    return latency.Job(variant.name, str(path), variant.backend, judge.options(variant))


def _float_on(backend: str) -> str:
    return f".float.{backend}"  # no variant's name begins with a dot


def _speedup(
    one: Built, built: Sequence[Built], times: dict[str, Timed | str], mine: Timed
) -> float:
    """Against the float model on the same backend, or, where none loads it, the reference's."""
    plain = [each.variant for each in built if each.variant.is_float]
    same = [each.name for each in plain if each.backend == one.variant.backend]
    for name in (*same, _float_on(one.variant.backend), built[0].variant.name):
        other = times.get(name)
        if isinstance(other, Timed):
            return latency.ratio(other, mine)
    return 0.0


def _joined(
    judge: Judge,
    one: Built,
    built: Sequence[Built],
    answers: dict[str, Served | str],
    times: dict[str, Timed | str],
) -> Evaluated:
    """Everything that is known of a variant; what is missing is its refusal."""
    variant, got = one.variant, answers[one.variant.name]
    options, path = judge.options(variant), str(one.path or "")
    found = Evaluated(variant.name, variant.backend, "", one.precision, options, path, one.steps)
    if isinstance(got, str):
        return msgspec.structs.replace(found, refusal=got or "there is no file")
    found = msgspec.structs.replace(
        found,
        backend_version=got.backend_version,
        size_bytes=Path(found.path).stat().st_size,
        packed_bytes=packed_size(Path(found.path)),
        memory_bytes=got.memory_bytes,
        macs=_macs(Path(found.path)),
        placement=got.placement,
        **_scored(judge, got, answers[built[0].variant.name]),
    )
    if found.refusal:
        return found
    time = times.get(variant.name, "no time")
    if isinstance(time, str):
        return msgspec.structs.replace(found, refusal=f"not measured: {time}")
    found = msgspec.structs.replace(
        found,
        p50_ms=time.p50_ms,
        p95_ms=time.p95_ms,
        spread_ms=time.spread_ms,
        load_ms=time.load_ms,
        speedup=_speedup(one, built, times, time),
    )
    return msgspec.structs.replace(found, notes=causes.notes(found, Path(found.path)))


def _macs(path: Path) -> int:
    """See Evaluated.macs. A file that does not state its sizes is asked again when folded."""
    if path.suffix != ".onnx":
        return 0
    found = work.macs(path)
    if found:
        return found
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        try:
            onnxruntime_door.optimize(path, folded)
        except EdgeError:
            return 0  # another backend's model: how much work it is stays unknown
        return work.macs(folded)


def packed_size(path: Path) -> int:
    """Bytes of the file when compressed; of one over PACKED_BYTES_MAX an estimate."""
    whole = path.stat().st_size
    with path.open("rb") as file:
        if whole <= PACKED_BYTES_MAX:
            return _compressed_size(file.read())
        size = PACKED_BYTES_MAX // PACKED_PIECES
        pieces = []
        for piece in range(PACKED_PIECES):
            file.seek((whole - size) * piece // (PACKED_PIECES - 1))
            pieces.append(file.read(size))
    return round(_compressed_size(b"".join(pieces)) * whole / PACKED_BYTES_MAX)


def _compressed_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=LZMA_PRESET))


def _scored(judge: Judge, got: Served, reference: Served | str) -> dict[str, Any]:
    assert isinstance(reference, Served)
    want = reference.outputs[judge.output]
    for name, answers in got.outputs.items():  # the judged one and those beside it
        bad = not_numbers(answers)
        if name in reference.outputs:
            bad &= ~not_numbers(reference.outputs[name])
        if bad.any():
            said = f"NaN (no number) for {int(bad.sum())} of {len(want)} samples in {name!r}"
            return {"refusal": f"{verdict.WORSE}: {said}"}
    confidence, seed = judge.recipe.budgets.confidence, judge.recipe.evaluation.seed
    groups, is_share = judge.data.groups, judge.metric.is_share
    mine = judge.metric.score(got.outputs[judge.output], judge.data.labels, want)
    theirs = judge.metric.score(want, judge.data.labels, want)
    return {
        "score": scores.interval(mine, confidence, seed, groups, is_share=is_share),
        "against": scores.difference(theirs, mine, confidence, seed, groups, is_share=is_share),
    }


def machine() -> dict[str, Any]:
    """What it was measured on: processor, its instructions that matter here, cores."""
    return {
        "machine": platform.machine(),
        "processor": causes.processor_name(),
        "features": sorted(causes.processor_features()),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
