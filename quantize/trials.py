"""One candidate of a search: how it is tried, and how trials are remembered.

Law of this file: `attempt` is a job of an executor: it builds and judges one variant and does not
know why. Latency is not measured here: jobs may run side by side. The journal is a file of lines,
each a finished trial; a line that was cut off (power, a full disk) is as if it had not been tried.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.backends import backend
from edge_runtime.errors import ModelError, UsageError
from quantize import (
    building,
    causes,
    clusters,
    datasets,
    foreign,
    litert_door,
    onnx_door,
    passes,
    scratch,
    tflite_ops,
    workflow,
)
from quantize.evaluating import Judge
from quantize.pruning import work
from quantize.recipe import Recipe, Variant
from quantize.workflow import Prepared

Array = np.ndarray[Any, Any]

ROWS = 32
# What a multiplication in float costs beside one of integers, to order trials without a clock.
FLOAT_COST = 4


class Found(msgspec.Struct, frozen=True):
    """What a job found out.

    Attributes:
        loss: of the metric against the float model on the trial's samples; error: its standard
            error. work: multiplications, those in float counted FLOAT_COST times; 0: not known.
    """

    path: str
    loss: float
    error: float
    size_bytes: int
    work: int


class Trial(msgspec.Struct, frozen=True):
    """A finished trial, as it stands in the journal.

    Attributes:
        key: says what was tried on what; number: its place in the order.
        time: milliseconds of a run / those of the float model on the same backend, same rounds;
            0: not measured, and then there is a refusal.
        again: the next command tries it once more, for what refused it may have passed (memory, a
            full disk, a training that failed).
    """

    key: str
    number: int
    variant: Variant
    why: str
    found: Found | None = None
    p50_ms: float = 0.0
    time: float = 0.0
    attempts: int = 1
    refusal: str = ""
    again: bool = False


class Order(msgspec.Struct, frozen=True):
    """What a job is told: a recipe with the one variant, and the work folder."""

    recipe: Recipe
    folder: str


def order(recipe: Recipe, variant: Variant, folder: Path) -> dict[str, Any]:
    """The order for `attempt`, as plain values."""
    mine = alone(recipe, (variant,))
    told: dict[str, Any] = msgspec.to_builtins(Order(mine, str(folder)))
    return told


def alone(recipe: Recipe, variants: tuple[Variant, ...]) -> Recipe:
    """The recipe of a trial: other variants, fewer samples, no search."""
    assert recipe.search is not None
    most, wanted = recipe.search.samples, recipe.evaluation.samples
    samples = min(most, wanted) if most and wanted else most or wanted
    return msgspec.structs.replace(
        recipe,
        variants=variants,
        search=None,
        evaluation=msgspec.structs.replace(recipe.evaluation, samples=samples),
    )


def key(ready: Prepared, chain: building.Chain) -> str:
    """Of everything that decides a trial's result: libraries too, and the processor, for a folder
    may come from a machine on which other things are fast."""
    return scratch.key(
        context(ready),
        [causes.processor_name(), sorted(causes.processor_features())],
        chain.variant.backend,
        chain.variant.options,
        backend(chain.variant.backend).version(),
        [[passes.describe(one), one.versions()] for one in chain.passes],
        _validation_key(ready, chain),
    )


def _validation_key(ready: Prepared, chain: building.Chain) -> str:
    """Of what a pass may choose by; empty: none does, or there is too little, which refuses it."""
    if not any(map(passes.validates, chain.passes)):
        return ""
    try:
        return workflow.validation(ready, chain)().key
    except UsageError:
        return ""


def context(ready: Prepared) -> str:
    """Of what all trials of a search have in common."""
    recipe, data = ready.recipe, ready.split.evaluation
    labels, groups = data.labels, data.groups
    return scratch.key(
        [scratch.file_sha256(one.path) for one in (ready.source, *ready.source.also.values())],
        datasets.fingerprint(ready.split.calibration)["sha256"],
        datasets.fingerprint(ready.split.evaluation)["sha256"],
        None if labels is None else scratch.key(labels.tolist()),
        None if groups is None else scratch.key(groups.tolist()),
        foreign.code_sha256(recipe.evaluation.callable, "evaluation.callable"),
        [ready.metric, recipe.evaluation, recipe.seed, recipe.threads],
    )


class Opened(NamedTuple):
    """An order that is being carried out: `chain` of its variant."""

    ready: Prepared
    kept: scratch.Scratch
    chain: building.Chain


def opened(given: dict[str, Any]) -> Opened:
    """What an executor's job was given (see `order`; a job may be told more), read.

    Raises:
        EdgeError: what is wrong with recipe, model or data.
    """
    told = msgspec.convert(given, Order)
    kept = scratch.Scratch(Path(told.folder))
    ready = workflow.prepare(told.recipe)
    chain = next(one for one in ready.chains if one.variant == told.recipe.variants[0])
    return Opened(ready, kept, chain)


def attempt(given: dict[str, Any]) -> dict[str, Any]:
    """Build and judge a variant. The job of an executor.

    Raises:
        EdgeError: it cannot be built, or its backend refuses it.
    """
    ready, kept, chain = opened(given)
    built = workflow.build(ready, chain, kept, _silent)
    if built.path is None:
        raise ModelError(built.refusal)
    mine = answers(ready.judge, chain.variant, built.path)
    lost = scores_of(ready, reference(ready, kept)) - scores_of(ready, mine, reference(ready, kept))
    found = Found(
        str(built.path),
        float(lost.mean()),
        clusters.standard_error(lost, ready.split.evaluation.groups),
        built.path.stat().st_size,
        work_of(built.path),
    )
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def scores_of(ready: Prepared, mine: Array, want: Array | None = None) -> Array:
    """One score per sample."""
    judge = ready.judge
    return judge.metric.score(mine, judge.data.labels, mine if want is None else want)


def reference(ready: Prepared, kept: scratch.Scratch) -> Array:
    """The float model's answers; computed by the first trial."""
    first = ready.chains[0].variant
    float_on = first if first.is_float else Variant("float", first.backend)
    path = ready.source.on(first.backend).path

    def make(draft: Path) -> None:
        with draft.open("wb") as file:
            np.save(file, answers(ready.judge, float_on, path), allow_pickle=False)

    version = backend(float_on.backend).version()
    name = scratch.key("reference", context(ready), float_on.backend, float_on.options, version)
    return np.asarray(np.load(kept.made(name, ".npy", make), allow_pickle=False))


def answers(judge: Judge, variant: Variant, path: Path) -> Array:
    """The judged output for every sample, in this process. Raises: EdgeError."""
    model = backend(variant.backend).load(path, judge.options(variant))
    rows = ROWS if judge.source.on(variant.backend).batch_axis == 0 else 1
    parts = [
        np.array(model.run(feed)[judge.output])
        for feed in datasets.batches(judge.data.inputs, rows, judge.source.inputs)
    ]
    return np.concatenate(parts)


def work_of(path: Path) -> int:
    """See Found.work."""
    if path.suffix == ".tflite":
        return tflite_ops.work(litert_door.graph(path), FLOAT_COST)
    if path.suffix != ".onnx":
        return 0
    graph = onnx_door.load(path).graph
    made = {out: node.op_type for node in graph.node for out in node.output}
    integer = {
        node.name or node.output[0]
        for node in graph.node
        if node.op_type in _INTEGER or "DequantizeLinear" in map(made.get, node.input[:1])
    }
    return sum(
        count * (1 if name in integer else FLOAT_COST) for name, count in work.by_node(path).items()
    )


_INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")


def _silent(_: str) -> None:
    """A job has nobody to tell."""


class Journal:
    """The finished trials of all searches that worked in one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Trial] = {}
        if not path.exists():
            return
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another search may be at work here
            found, whole = _whole_lines(file.read())
            file.truncate(whole)
        self._known = {one.key: one for one in found}

    def get(self, key: str) -> Trial | None:
        """The trial of that key, if it was finished and is not to be tried again."""
        found = self._known.get(key)
        return None if found is None or found.again else found

    def add(self, trial: Trial) -> None:
        """Append a line, on disk before this returns."""
        self._known[trial.key] = trial
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(msgspec.json.encode(trial) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Trial]:
    """The trials of a journal, in their order; one that is being written is left as it is."""
    last = {one.key: one for one in _whole_lines(path.read_bytes())[0]}
    return sorted(last.values(), key=lambda one: one.number)


def _whole_lines(data: bytes) -> tuple[list[Trial], int]:
    """The trials, and up to which byte lines are whole. A whole line that is no trial of ours (of
    another version's, or one that was cut off and written on) is passed over."""
    whole = data.rfind(b"\n") + 1
    found: list[Trial] = []
    for line in data[:whole].split(b"\n"):
        with contextlib.suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=Trial))
    return found, whole
