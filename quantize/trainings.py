"""The trainings that trials begin with: each is done once, whoever needs it.

Law of this file: a chain up to its last `fine_tune` is a training. Its result lies in the work
folder under the name that `building` gives to it, so every trial behind it finds it, also those of
a later command. A training is a job of its own, before the trials: no two trials train the same,
and one that fails refuses all that need it. What the function prints is kept in LOG and told on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.cli import output
from edge_runtime.errors import ModelError
from quantize import building, executors, moves, scratch, trials, workflow
from quantize.executors import Executor, Job
from quantize.passes import Say
from quantize.recipe import Recipe, Variant
from quantize.workflow import Prepared

LOG = ".training.log"  # behind the key, in the work folder
TELL_S = 1.0  # between two looks at what is printed
TRAINS = "fine_tune"


class Training(NamedTuple):
    """`key`: of the trained model in the work folder. `variant`: the chain that ends with it."""

    key: str
    variant: Variant


class Untrained(NamedTuple):
    """`reason`: why there is no trained model; empty: the time left was too short to begin."""

    reason: str


def is_trained(variant: Variant) -> bool:
    """Whether a training is a part of it."""
    return any(step["use"] == TRAINS for step in variant.passes)


def of(ready: Prepared, variant: Variant) -> Training | None:
    """What must be trained before the variant can be built; None: nothing."""
    if not is_trained(variant):
        return None
    count = max(n for n, step in enumerate(variant.passes, 1) if step["use"] == TRAINS)
    alone = Variant("training", passes=variant.passes[:count])
    (chain,) = building.chains([alone], ready.source)
    keys = building.keys(chain, ready.source, ready.split.calibration, ready.recipe.seed)
    return Training(keys[-1], alone)


class Trainings:
    """Those of a search.

    Args:
        left_s: seconds in which trials may still begin.
    """

    def __init__(
        self,
        recipe: Recipe,
        kept: scratch.Scratch,
        executor: Executor,
        say: Say,
        left_s: Callable[[], float],
    ) -> None:
        self._recipe, self._kept, self._executor = recipe, kept, executor
        self._say, self._left_s = say, left_s
        self._refusals: dict[str, str] = {}
        self._longest_s = 0.0

    def made(self, wanted: Sequence[Training]) -> dict[str, Untrained]:
        """Train what is not there yet. Of each that is still not there, why, by its key.

        None begins when less time is left than the longest one took: what is trained can be tried.
        """
        every = {one.key: one for one in wanted if not self._is_made(one.key)}
        new = [one for one in every.values() if one.key not in self._refusals]
        if new:
            self._train(new)
        missing = [key for key in every if not self._is_made(key)]
        for one in new:
            if one.key in missing and one.key not in self._refusals:
                self._say(
                    f"{moves.pruning_label(one.variant)} is left out: too little time to train"
                )
        return {key: Untrained(self._refusals.get(key, "")) for key in missing}

    def _is_made(self, key: str) -> bool:
        return any(path.suffix == ".onnx" for path in self._kept.folder.glob(f"{key}.*"))

    def _train(self, new: Sequence[Training]) -> None:
        words = {one.key: moves.pruning_label(one.variant) for one in new}
        expected = f", about {output.duration(self._longest_s)} each" if self._longest_s else ""
        left = output.duration(max(self._left_s(), 0.0))
        self._say(f"training {', '.join(words.values())}{expected}; {left} left")
        log = _Logs(self._kept.folder, words, self._say)
        jobs = [
            Job(
                one.key,
                "quantize.trainings:train",
                trials.order(self._recipe, one.variant, self._kept.folder) | {"key": one.key},
            )
            for one in new
        ]
        for done in executors.run(
            self._executor,
            jobs,
            job_s_max=max(executors.JOB_S_MAX, self._left_s()),
            may_begin=lambda: self._left_s() > self._longest_s,
            tick=log.tell,
            tick_s=TELL_S,
        ):
            log.tell()
            if done.said.refusal:
                self._refusals[done.key] = done.said.refusal
                self._say(f"{words[done.key]} was not trained: {done.said.refusal}")
            else:
                took_s = float(done.said.result)
                self._longest_s = max(self._longest_s, took_s)
                self._say(f"{words[done.key]}: trained in {output.duration(took_s)}")


def train(given: dict[str, Any]) -> float:
    """Build a variant that ends with its training; the seconds it took. The job of an executor.

    Raises:
        ModelError: it cannot be built; says what the user's function raised.
    """
    began_s = time.monotonic()
    ready, kept, chain = trials.opened(given)
    with (kept.folder / f"{given['key']}{LOG}").open("w", buffering=1) as log:
        built = workflow.build(ready, chain, kept, lambda line: print(line, file=log))
    if built.path is None:
        raise ModelError(built.refusal)
    return time.monotonic() - began_s


class _Logs:
    """What trainings printed, as far as it was not told yet."""

    def __init__(self, folder: Path, words: dict[str, str], say: Say) -> None:
        self._paths = {folder / f"{key}{LOG}": text for key, text in words.items()}
        self._told = dict.fromkeys(self._paths, 0)
        self._say = say
        for path in self._paths:  # of a training that was cut off
            path.unlink(missing_ok=True)

    def tell(self) -> None:
        """Say the new whole lines."""
        for path, words in self._paths.items():
            if not path.exists():
                continue
            if path.stat().st_size < self._told[path]:
                self._told[path] = 0  # it was lost and begins anew
            with path.open("rb") as file:
                file.seek(self._told[path])
                data = file.read()
            new = data[: data.rfind(b"\n") + 1]
            self._told[path] += len(new)
            for line in new.decode(errors="replace").splitlines():
                self._say(f"{words}: {line}")
