"""One run: recipe in, outcome, report and bundle out.

Law of this file: the ordered list of steps; each step is another file's. Everything that can be
wrong with the recipe, the model or the data is found before the first pass works.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.bundle.create import Created
from edge_runtime.errors import EdgeError
from quantize import (
    building,
    datasets,
    evaluating,
    foreign,
    judging,
    looking,
    models,
    observing,
    onnxruntime_door,
    origins,
    packing,
    scratch,
    targets,
    validating,
    verdict,
)
from quantize.building import Built, Chain
from quantize.datasets import Dataset, Split
from quantize.evaluating import Judge
from quantize.models import ModelFile
from quantize.passes import Say, Validation
from quantize.recipe import Recipe, Variant
from quantize.results import Outcome

Array = np.ndarray[Any, Any]

REFERENCE = "fp32"  # what the float model is called when the recipe has no variant without passes


class Prepared(NamedTuple):
    """A run that is known to make sense."""

    recipe: Recipe
    source: ModelFile
    split: Split
    chains: tuple[Chain, ...]
    judge: Judge
    metric: str


class Finished(NamedTuple):
    """What a run leaves. `failed`: why the bundle that should have been written was not."""

    outcome: Outcome
    built: tuple[Built, ...]
    created: Created | None
    failed: EdgeError | None = None


def prepare(given: Recipe) -> Prepared:
    """Read model and data and decode every pass; nothing is computed yet.

    Raises:
        EdgeError: what is wrong with recipe, model or data.
    """
    elsewhere = targets.notes(given.targets)
    source = origins.read(given)
    ready = msgspec.structs.replace(given, variants=with_reference(given.variants, source))
    chains = tuple(building.chains(ready.variants, source))
    whole = datasets.load(ready.data, source.inputs)
    own = (
        datasets.load(ready.data, source.inputs, ready.data.calibration)
        if ready.data.calibration
        else None
    )
    split = datasets.split(
        whole,
        own,
        ready.calibration.samples,
        ready.calibration.seed,
        ready.evaluation.samples,
        ready.evaluation.seed,
    )
    judged = judging.judged(
        ready.evaluation,
        source.outputs,
        split.evaluation.labels,
        _function(ready),
        split.evaluation.where,
        looking.looks(source, split.evaluation),
    )
    said = [judged.note] if judged.note else []
    notes = (*whole.notes, *split.notes, *said, *elsewhere)
    split = split._replace(evaluation=split.evaluation.labelled(judged.labels), notes=notes)
    judge = Judge(ready, source, split.evaluation, judged.metric, judged.output)
    return Prepared(ready, source, split, chains, judge, judged.name)


def run(ready: Prepared, folder: Path, out: Path | None, say: Say) -> Finished:
    """Build, measure, judge and, with `out`, pack.

    Args:
        folder: where intermediate models are kept; a second run with the same recipe reuses them.
        out: the bundle to write; it is not where nothing but the float model passed.

    Raises:
        EdgeError: the float model fails.
    """
    began_s = time.monotonic()
    kept = scratch.Scratch(folder)
    built = [build(ready, one, kept, say) for one in ready.chains]
    evaluated, answers = evaluating.evaluate(ready.judge, built, say)
    output = ready.judge.output
    observed = observing.observe(ready.source, ready.split, built, answers, output, say)
    outcome = Outcome(
        name=ready.recipe.name,
        metric=ready.metric,
        samples=len(ready.split.evaluation),
        groups=_groups(ready.split.evaluation),
        confidence=ready.recipe.budgets.confidence,
        drop_max=evaluating.drop_max(ready.judge),
        reference=built[0].variant.name,
        evaluated=tuple(verdict.explained(one, observed.findings) for one in evaluated),
        calibration=datasets.fingerprint(ready.split.calibration),
        machine=evaluating.machine() | {"libraries": onnxruntime_door.versions()},
        recipe=msgspec.to_builtins(ready.recipe),
        source_sha256=scratch.file_sha256(ready.source.path),
        seconds=time.monotonic() - began_s,
        notes=(*_told(ready.recipe), *ready.recipe.notes, *ready.split.notes),
        evaluation=datasets.fingerprint(ready.split.evaluation),
        findings=(*ready.split.findings, *observed.findings),
        activations=observed.activations,
    )
    created = None
    if out is not None and outcome.has_gain:
        say(f"packing {len(outcome.shipped)} variants")
        data = ready.split.evaluation
        try:
            created = packing.pack(ready.recipe, outcome, data, answers, output, out)
        except EdgeError as error:  # what was measured is not lost with it
            return Finished(outcome, tuple(built), None, error)
    return Finished(outcome, tuple(built), created)


def build(ready: Prepared, chain: Chain, kept: scratch.Scratch, say: Say) -> Built:
    """One of the run's variants as a file; see building.build."""
    return building.build(
        chain,
        ready.source,
        ready.split.calibration,
        ready.recipe.seed,
        kept,
        say,
        validation(ready, chain),
    )


def validation(ready: Prepared, chain: Chain) -> Callable[[], Validation]:
    """What passes that choose by answers are given; see validating.validation."""
    function = _function(ready.recipe)
    return functools.partial(
        validating.validation, ready.judge, ready.metric, ready.split, function, chain.variant
    )


def with_reference(variants: tuple[Variant, ...], source: ModelFile) -> tuple[Variant, ...]:
    """The float model first: one that the recipe names, or one of our own.

    One that computes in fewer bits (option `precision`) is a variant, not what others are held to.
    """
    plain = [one for one in variants if one.is_float]
    if plain:
        return (plain[0], *(one for one in variants if one is not plain[0]))
    backend = variants[0].backend if variants else models.BACKENDS[source.format]
    return (Variant(REFERENCE, backend), *variants)


def _groups(data: Dataset) -> int:
    return 0 if data.groups is None else data.units


def _told(given: Recipe) -> tuple[str, ...]:
    return origins.told(given.origin) if given.origin else ()


def _function(given: Recipe) -> Callable[..., Array] | None:
    text = given.evaluation.callable
    if not text:
        return None
    return foreign.function(text, "evaluation.callable")
