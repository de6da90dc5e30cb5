"""The search: what the single settings of the libraries can do, and what lies beyond them.

Law of this file: the order of steps and the limits. What to try is decided in `moves`, a trial is
made in `trials`, where it runs is an executor's business; time is measured here, one batch alone on
this machine. Every batch's trials are lines of `trials.jsonl` in the work folder before the next
begins, so whoever comes back there goes on. The same seed tries the same in the same order.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.backends import backend as library_of
from edge_runtime.cli import output
from edge_runtime.errors import UsageError
from quantize import (
    automatic,
    building,
    datasets,
    evaluating,
    executors,
    kernels,
    latency,
    litert_door,
    models,
    moves,
    pareto,
    probes,
    results,
    scratch,
    sensitivity,
    targets,
    tflite_ops,
    torch_door,
    trainings,
    trials,
    verdict,
    workflow,
)
from quantize.executors import Done, Executor, Job
from quantize.latency import Timed
from quantize.moves import Facts, Idea
from quantize.passes import ONNX, TFLITE, Bench, Say
from quantize.passes.pruning import makers
from quantize.recipe import Budgets, Recipe, Search, Variant
from quantize.results import Outcome
from quantize.trials import Found, Journal, Trial
from quantize.workflow import Prepared

JOURNAL = "trials.jsonl"
# Trials between two looks at the front, and of one measurement of latency. Not the number of
# workers: what is tried next may not depend on the machine.
BATCH = 4
# Multiplications that a layer's sensitivity may cost: half a second of one core.
MACS_PER_LAYER = 20e9
SAMPLES_MIN = 32
# Of the time that is left, for finding the sensitive layers: trials are to follow from them.
LAYERS_SHARE = 0.5
# Costs that differ by less mean nothing: loss counts always, time is noisy, size is exact.
MARGINS = (0.0, verdict.NOISE, 0.01)


class Searched(NamedTuple):
    """What a search leaves.

    Attributes:
        recipe: the given one with the finalists among its variants, to be run as usual.
        finalists: the front of each backend. trials: all, in order; also those of earlier runs.
        layers: the most sensitive first; empty if they were not measured.
    """

    recipe: Recipe
    finalists: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    layers: tuple[sensitivity.Layer, ...] = ()


class Clock(NamedTuple):
    """How long the search may begin trials."""

    now_s: Callable[[], float]
    began_s: float
    most_s: float

    @property
    def left_s(self) -> float:
        return self.began_s + self.most_s - self.now_s()


def search(
    recipe: Recipe,
    folder: Path,
    executor: Executor,
    say: Say,
    now_s: Callable[[], float] = time.monotonic,
) -> Searched:
    """Try until time or trials are used up, and name the finalists.

    Args:
        folder: intermediate models and the journal; on a cluster, seen by all its machines.

    Raises:
        UsageError: nothing can be tried. EdgeError: what is wrong with recipe, model or data.
    """
    assert recipe.search is not None
    clock = Clock(now_s, now_s(), recipe.search.time_s_max)
    ready = workflow.prepare(trials.alone(recipe, recipe.variants))
    _check(recipe.search, ready)
    run = _Run(ready, recipe, recipe.search, folder, executor, say, clock)
    for ideas in _rounds(run):
        run.work_off(ideas)
        if run.over:
            break
    finalists = chosen(run.found, recipe, evaluating.drop_max(ready.judge))
    return Searched(_with(recipe, finalists, run), finalists, tuple(run.found), run.layers)


def _check(limits: Search, ready: Prepared) -> None:
    """Raises: UsageError for what would end the search in its middle, or do nothing in it."""
    if limits.ratios and ready.source.format != ONNX:
        raise UsageError(
            f"channels of {ready.source.format} models cannot be pruned",
            where="search.ratios",
            remedy="leave it out, or search with the ONNX model that it was made of",
        )
    if limits.train:
        torch_door.library()
        torch_door.code_sha256(limits.train, "search.train")


class _Run:
    """The state of a search: what was found so far."""

    def __init__(
        self,
        ready: Prepared,
        recipe: Recipe,
        limits: Search,
        folder: Path,
        executor: Executor,
        say: Say,
        clock: Clock,
    ) -> None:
        self.ready, self.recipe, self.limits = ready, recipe, limits
        self.executor, self.say, self.clock = executor, say, clock
        self.kept = scratch.Scratch(folder.resolve())
        self.journal = Journal(self.kept.folder / JOURNAL)
        self.found: list[Trial] = []
        self.layers: tuple[sensitivity.Layer, ...] = ()
        self.notes: list[str] = []
        self._tried: set[str] = set()
        self._trainings = trainings.Trainings(
            recipe, self.kept, executor, say, lambda: self.clock.left_s
        )

    @property
    def over(self) -> bool:
        return self.clock.left_s <= 0 or len(self.found) >= self.limits.trials_max

    def work_off(self, ideas: Sequence[Idea]) -> None:
        """Try those that are new, in batches."""
        fresh = list(self._fresh(ideas))
        for first in range(0, len(fresh), BATCH):
            if self.over:
                break
            room = self.limits.trials_max - len(self.found)
            self._batch(fresh[first : first + min(BATCH, room)])

    def _fresh(self, ideas: Sequence[Idea]) -> Iterator[tuple[str, Idea]]:
        for idea in ideas:
            named = msgspec.structs.replace(idea.variant, name="candidate")
            (chain,) = building.chains([named], self.ready.source)
            key = trials.key(self.ready, chain)
            if key not in self._tried:
                self._tried.add(key)
                yield key, idea

    def _batch(self, batch: Sequence[tuple[str, Idea]]) -> None:
        """Trials from the journal, and the others as jobs; then their latency, alone."""
        first = len(self.found) + 1
        planned = [
            Trial(key, number, _named(idea.variant, number), idea.why)
            for number, (key, idea) in enumerate(batch, first)
        ]
        remembered = {one.key: self.journal.get(one.key) for one in planned}
        able, untrained = self._trained([one for one in planned if not remembered[one.key]])
        made = {one.key: one for one in self._tried_out(able)}
        failed = {one.key: one for one in untrained}
        for one in planned:
            old = remembered[one.key]
            trial = made.get(one.key) or failed.get(one.key)
            if old is not None:
                trial = msgspec.structs.replace(
                    old, number=one.number, variant=one.variant, why=one.why
                )
            if trial is not None:
                self.found.append(trial)
                if old is None:
                    self.journal.add(trial)

    def _trained(self, planned: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
        """Those that can be tried now, and those whose training failed; without those for whose
        training the time is too short."""
        needed = {one.key: trainings.of(self.ready, one.variant) for one in planned}
        missing = self._trainings.made([one for one in needed.values() if one])
        able, refused = [], []
        for one in planned:
            training = needed[one.key]
            why = missing.get(training.key) if training else None
            if why is None:
                able.append(one)
            elif why.reason:
                refused.append(msgspec.structs.replace(one, refusal=why.reason, again=True))
        return able, refused

    def _tried_out(self, planned: Sequence[Trial]) -> list[Trial]:
        """A batch that may begin ends, also if training took the time that was left."""
        jobs = [
            Job(
                one.key,
                "quantize.trials:attempt",
                trials.order(self.recipe, one.variant, self.kept.folder),
            )
            for one in planned
        ]
        by_key = {one.key: one for one in planned}
        trained = any(trainings.is_trained(one.variant) for one in planned)
        ended = []
        done: Done
        for done in executors.run(
            self.executor,
            jobs,
            now_s=self.clock.now_s,
            may_begin=lambda: trained or self.clock.left_s > 0,
        ):
            ended.append(_ended(by_key[done.key], done))
            self._tell(ended[-1])
        return _timed(self.ready, sorted(ended, key=lambda one: one.number), self.limits.rounds)

    def _tell(self, one: Trial) -> None:
        what = f"loss {one.found.loss:.4f}" if one.found else f"refused: {one.refusal}"
        left = output.duration(max(self.clock.left_s, 0.0))
        self.say(
            f"trial {one.number} of at most {self.limits.trials_max}, {left} left:"
            f" {one.variant.name}: {what}"
        )


def _rounds(run: _Run) -> Iterator[list[Idea]]:
    """What to try, round by round; each is decided when those before it are finished."""
    backends = _backends(run.recipe, run.ready)
    facts = _facts(run)
    shots = moves.single_shots(facts, backends, targets.can_import)
    if not shots:
        raise UsageError(
            f"nothing to search: no quantizer for {facts.format}"
            f" on {', '.join(backends) or 'any backend that is installed'}",
            where="search.backends",
            remedy="pip install 'edge-runtime[quantize]'",
        )
    yield shots
    yield moves.for_speed(facts, run.found, run.limits)
    facts = _with_layers(run, facts)
    for stage in moves.STAGES[1:]:
        yield stage(facts, run.found, run.limits)
    barren = 0
    for number in range(run.limits.trials_max):
        before = len(run.found)
        yield moves.neighbours(facts, run.found, run.limits, run.recipe.seed * 100_003 + number)
        barren = barren + 1 if len(run.found) == before else 0
        if barren == BARREN_MAX:
            return


# Rounds without anything new after which everything near the front is known.
BARREN_MAX = 5


def _backends(recipe: Recipe, ready: Prepared) -> list[str]:
    assert recipe.search is not None
    named = list(recipe.search.backends)
    if not named:
        named = [one.backend for one in ready.recipe.variants]
        named += [one for target in recipe.targets for one in targets.backends(target)]
    unknown = [one for one in recipe.search.backends if not targets.is_here(one)]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)} cannot be measured here: not installed",
            where="search.backends",
            expected="some of " + ", ".join(targets.MODULES),
        )
    return [one for one in dict.fromkeys(named) if targets.is_here(one)]


# --- what is known of the model -------------------------------------------------------------------


def _facts(run: _Run) -> Facts:
    source = run.ready.source
    if source.format == TFLITE:
        graph = litert_door.graph(source.path)
        return Facts(
            TFLITE,
            frozenset(one.kind for one in graph.operators),
            tflite_ops.slow(graph),
            four=tflite_ops.of_kinds(graph, tflite_ops.FOUR_BITS),
            connected=tflite_ops.of_kinds(graph, {"FULLY_CONNECTED"}),
        )
    if source.format != ONNX:
        return Facts(source.format, frozenset(), also=tuple(source.also))
    clean = _clean(run.ready, run.kept)
    operators = frozenset(automatic.operators(source))
    channels = makers(clean) if run.limits.ratios else ()
    return Facts(ONNX, operators, kernels.slow(clean), also=tuple(source.also), channels=channels)


def _clean(ready: Prepared, kept: scratch.Scratch) -> Path:
    """The cleaned-up model: that is what lists of nodes speak of. Raises: UsageError."""
    variant = Variant("clean", passes=(moves.CLEAN,))
    (chain,) = building.chains([variant], ready.source)
    built = workflow.build(ready, chain, kept, lambda _: None)
    if built.path is None:
        raise UsageError(built.refusal, where="clean")
    return built.path


def _with_layers(run: _Run, facts: Facts) -> Facts:
    """The facts with the layers by sensitivity; that is a job too, done once per work folder."""
    if run.clock.left_s <= 0:
        return facts
    version = library_of(models.BACKENDS[facts.format]).version()
    name = scratch.key("layers", trials.context(run.ready), version)
    given = trials.order(run.recipe, Variant("layers"), run.kept.folder)
    most_s = run.clock.left_s * LAYERS_SHARE
    job = Job(name, "quantize.search:rank_layers", given | {"key": name, "most_s": most_s})
    run.say("finding the sensitive layers")
    for done in executors.run(run.executor, [job], job_s_max=run.clock.left_s):
        if done.said.refusal:
            run.notes.append(f"sensitive layers were not looked for: {done.said.refusal}")
            run.say(run.notes[-1])
            return facts
        run.layers = msgspec.convert(done.said.result, tuple[sensitivity.Layer, ...])
        return facts._replace(layers=tuple(one.name for one in run.layers))
    return facts


def rank_layers(given: dict[str, Any]) -> list[dict[str, Any]]:
    """sensitivity.Layer of each, the most sensitive first. The job of an executor."""
    ready, kept, _ = trials.opened(given)

    def make(draft: Path) -> None:
        draft.write_bytes(msgspec.json.encode(_ranked(ready, kept, given["most_s"])))

    path = kept.made(given["key"], ".layers.json", make)
    return msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])


def _ranked(ready: Prepared, kept: scratch.Scratch, most_s: float) -> list[sensitivity.Layer]:
    source = ready.source
    if source.format == ONNX:
        source = models.read(_clean(ready, kept))
    bench = Bench(
        ready.split.calibration.feeds,
        source.inputs,
        source.outputs,
        source.batch_axis,
        ready.recipe.seed,
        lambda _: None,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts = probes.parts(source, bench, "", Path(folder))
        count = int(max(MACS_PER_LAYER / max(parts.work, 1), SAMPLES_MIN))
        count = min(count, len(ready.split.evaluation), sensitivity.SAMPLES_DEFAULT)
        data = ready.split.evaluation.take(np.arange(count))
        judge = ready.judge
        probe = sensitivity.Probe(source, parts, data, judge.metric, judge.output, Path(folder))
        return sensitivity.layers(probe, lambda _: None, most_s)


# --- trials ---------------------------------------------------------------------------------------


def _named(variant: Variant, number: int) -> Variant:
    return msgspec.structs.replace(variant, name=f"s{number:02d}-{moves.label(variant)}"[:64])


def _ended(planned: Trial, done: Done) -> Trial:
    if done.said.refusal:
        return msgspec.structs.replace(
            planned,
            refusal=done.said.refusal,
            attempts=done.attempts,
            again=done.said.passing,
        )
    found = msgspec.convert(done.said.result, Found)
    return msgspec.structs.replace(planned, found=found, attempts=done.attempts)


def _timed(ready: Prepared, ended: Sequence[Trial], rounds: int) -> list[Trial]:
    """The trials with their times beside the float model's of their backend, in turn."""
    backends = dict.fromkeys(one.variant.backend for one in ended if one.found)
    times: dict[str, Timed | str] = {}
    floats: dict[str, Timed | str] = {}
    sample = next(datasets.batches(ready.judge.data.inputs, 1, ready.source.inputs))
    for backend in backends:
        plain = Variant(f".float.{backend}", backend)
        jobs = [_job(ready, plain, ready.source.on(backend).path)]
        jobs += [
            _job(ready, one.variant, Path(one.found.path))
            for one in ended
            if one.found and one.variant.backend == backend
        ]
        with tempfile.TemporaryDirectory() as folder:
            measured = latency.measure(jobs, sample, rounds, Path(folder))
        floats[backend] = measured.pop(plain.name)
        times |= measured
    return [
        _with_time(one, times[one.variant.name], floats[one.variant.backend]) if one.found else one
        for one in ended
    ]


def _with_time(one: Trial, mine: Timed | str, plain: Timed | str) -> Trial:
    if isinstance(mine, str) or isinstance(plain, str):
        why = mine if isinstance(mine, str) else plain
        return msgspec.structs.replace(one, refusal=f"not measured: {why}", again=True)
    return msgspec.structs.replace(one, p50_ms=mine.p50_ms, time=1 / latency.ratio(plain, mine))


def _job(ready: Prepared, variant: Variant, path: Path) -> latency.Job:
    options = ready.judge.options(variant)
    return latency.Job(variant.name, str(path), variant.backend, options)


# --- the end --------------------------------------------------------------------------------------


def chosen(found: Sequence[Trial], recipe: Recipe, drop_max: float) -> tuple[Trial, ...]:
    """Of each backend the finalists: the front of those that keep the budgets, `keep` at most."""
    assert recipe.search is not None
    return front([one for one in found if fits(one, recipe.budgets, drop_max)], recipe.search.keep)


def front(found: Sequence[Trial], most: int | None = None) -> tuple[Trial, ...]:
    """Of each backend at most so many trials that none beats in loss, time and size."""
    kept: list[Trial] = []
    for backend in dict.fromkeys(one.variant.backend for one in found):
        mine = [
            one for one in found if one.variant.backend == backend and one.found and not one.refusal
        ]
        points = [costs(one) for one in mine]
        thin = pareto.thinned(points, MARGINS)
        kept += [mine[index] for index in pareto.by_turns(points, thin)[:most]]
    return tuple(sorted(kept, key=lambda one: one.number))


def fits(one: Trial, budgets: Budgets, drop_max: float) -> bool:
    """Whether it can pass the budgets at all; the verdict itself is made with all samples."""
    if one.found is None or one.refusal:
        return False
    fast = not budgets.speedup_min or one.time * budgets.speedup_min <= 1 + verdict.NOISE
    small = not budgets.size_bytes_max or one.found.size_bytes <= budgets.size_bytes_max
    return fast and small and one.found.loss <= drop_max


def costs(one: Trial) -> pareto.Costs:
    """(loss, time, size) of a trial that was measured."""
    assert one.found is not None
    return one.found.loss, one.time, float(one.found.size_bytes)


def _with(recipe: Recipe, finalists: Sequence[Trial], run: _Run) -> Recipe:
    known = [(one.backend, one.passes) for one in recipe.variants]
    variants = [one.variant for one in finalists]
    new = [one for one in variants if (one.backend, one.passes) not in known]
    taken = {one.name for one in recipe.variants}  # finalists of an earlier search among them
    new = [_apart(one, taken) for one in new]
    refused = sum(1 for one in run.found if one.refusal)
    note = (
        f"searched: {len(run.found)} trials ({refused} refused), each judged with"
        f" {len(run.ready.split.evaluation)} samples; the finalists with all, so what chance gave"
        " to the best of many trials is only partly taken back"
    )
    return msgspec.structs.replace(
        recipe, variants=(*recipe.variants, *new), notes=(*recipe.notes, note, *run.notes)
    )


def _apart(variant: Variant, taken: set[str]) -> Variant:
    """The variant under a name that is not taken; numbers of trials keep finalists apart."""
    name, number = variant.name, 1
    while name in taken:
        number += 1
        name = f"{variant.name[:60]}-{number}"
    return msgspec.structs.replace(variant, name=name)


def explained(outcome: Outcome, found: Searched) -> Outcome:
    """The outcome of the run that followed, with what the search knows of the layers."""
    layers = tuple(
        results.Layer(
            one.name,
            one.operator,
            _relative(one.alone_sqnr_db),
            one.loss,
            _relative(one.own_sqnr_db),
        )
        for one in found.layers
    )
    return msgspec.structs.replace(outcome, layers=layers)


def _relative(sqnr_db: float) -> float:
    """The norm of the noise / the norm of the signal; 0 dB stands for "not known"."""
    return float(10 ** (-sqnr_db / 20)) if sqnr_db else 0.0
