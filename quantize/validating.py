"""Samples by which a pass may choose: neither those that calibrate it nor those that judge it.

Law of this file: it takes samples apart and says what an answer is worth; what follows from that is
a pass's business. Choosing by what judges would make the verdict too good, so a sample of the
evaluation set, or an exact copy of one, is never among them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.backends import backend
from edge_runtime.errors import UsageError
from quantize import datasets, evaluating, foreign, judging, scores, scratch
from quantize.datasets import Dataset, Split
from quantize.evaluating import Judge
from quantize.passes import Feeds, Validation
from quantize.recipe import Evaluation, Variant
from quantize.scores import Metric

Array = np.ndarray[Any, Any]

# A thousand samples tell a loss of top-1 to half a point; more cost time at every step back.
SAMPLES_MAX = 1000
SAMPLES_MIN = 16  # fewer say nothing of a mean
ROWS = 32
# Of the budget: the verdict wants the upper bound of the loss under it, not the loss.
DROP_SHARE = 0.5


class _Parts(NamedTuple):
    calibration: Dataset
    samples: Dataset


def validation(
    judge: Judge, metric: str, split: Split, function: Callable[..., Array] | None, variant: Variant
) -> Validation:
    """What a pass of this variant may choose by.

    Args:
        metric: name of the judge's metric; without labels, and where it needs them, the float
            model's answers stand for the truth.

    Raises:
        UsageError: too few samples.
    """
    calibration, samples = _apart(split, judge.recipe.seed)
    name, how, labels = _metric(judge, metric, samples, function)
    drop_max = evaluating.drop_max(judge) if name == metric else how.drop_max
    feeds = samples.feeds

    def answers(path: Path, places: Array) -> Feeds:
        part = {name: array[places] for name, array in feeds.items()}
        return _answers(judge, variant, path, part)

    def score(mine: Feeds, want: Feeds) -> Array:
        return how.score(mine[judge.output], labels, want[judge.output])

    key = scratch.key(
        datasets.fingerprint(calibration)["sha256"],
        datasets.fingerprint(samples)["sha256"],
        None if labels is None else scratch.key(labels.tolist()),
        [name, judge.recipe.evaluation, drop_max, judge.output],
        foreign.code_sha256(judge.recipe.evaluation.callable, "evaluation.callable"),
        [variant.backend, backend(variant.backend).version(), judge.options(variant)],
    )
    return Validation(
        calibration.feeds, feeds, answers, score, judge.output, DROP_SHARE * drop_max, name, key
    )


def _apart(split: Split, seed: int) -> _Parts:
    """What is spare of the calibration data; where there is little, half of what calibrates."""
    spare = _fresh(split) if split.spare is not None else None
    if spare is not None and len(spare) >= min(len(split.calibration), SAMPLES_MAX):
        return _Parts(split.calibration, datasets.some(spare, SAMPLES_MAX, seed))
    count = len(split.calibration)
    if count < 2 * SAMPLES_MIN:
        raise UsageError(
            f"{count} samples to calibrate with are too few to hold some apart",
            where=split.calibration.where,
            expected=f"{2 * SAMPLES_MIN} at least",
            remedy="give more calibration data, or another pass",
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    mine, others = np.sort(order[: count // 2]), np.sort(order[count // 2 :])
    return _Parts(split.calibration.take(mine), split.calibration.take(others))


def _fresh(split: Split) -> Dataset | None:
    """The spare samples that the evaluation set does not hold too, nor others of their groups."""
    assert split.spare is not None
    spare, judging_ones = datasets.known(split.spare), datasets.known(split.evaluation)
    assert spare.facts is not None and judging_ones.facts is not None
    same = np.isin(spare.facts.digests[:, 0], judging_ones.facts.digests[:, 0])
    gone = same if spare.groups is None else np.isin(spare.groups, spare.groups[same])
    return None if gone.all() else spare.take(np.flatnonzero(~gone))


def _metric(
    judge: Judge, name: str, samples: Dataset, function: Callable[..., Array] | None
) -> tuple[str, Metric, Array | None]:
    if samples.labels is None:
        if not judge.metric.needs_labels:
            return name, judge.metric, None
        outputs = {spec.name: spec for spec in judge.source.outputs}
        name, _ = judging.unlabelled(outputs[judge.output], None)
        return name, scores.metric(name), None
    given = judge.recipe.evaluation
    wish = Evaluation(name, given.k, given.callable, judge.output)
    found = judging.judged(wish, judge.source.outputs, samples.labels, function, samples.where)
    return name, found.metric, found.labels


def _answers(judge: Judge, variant: Variant, path: Path, feeds: Feeds) -> Feeds:
    model = backend(variant.backend).load(path, judge.options(variant))
    rows = ROWS if judge.source.batch_axis == 0 else 1
    parts = [
        {name: np.array(array) for name, array in model.run(feed).items()}
        for feed in datasets.batches(feeds, rows, judge.source.inputs)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
