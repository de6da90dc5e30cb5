"""What is wrong with the data of a run, by name: found before anybody wonders about lost accuracy.

Law of this file: pure; arrays and counts in, findings out. Every threshold is a probability or has
its reason beside it, so that clean data raise no alarm. A quantizer believes its calibration set:
each fault here leaves the float model right and its int8 variants wrong, or wrong for other inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from quantize import rows
from quantize.results import Activation, Finding
from quantize.rows import Samples

Array = np.ndarray[Any, Any]

CHANNEL_ORDER, SCALE, CLIPPED = "channel-order", "scale", "clipped-ranges"
TRUNCATED, LABELS = "truncated-calibration", "labels"
OVERLAP, DUPLICATES = "overlap", "duplicates"

# Chance of a false alarm of each test, before it is divided by the number of tensors tried.
ALARM = 1e-6
# Channel orders are compared by a chi-square of at most a dozen terms: chance reaches 50 once in a
# million runs. The other order must fit so many times better: another lamp also moves channels.
ORDER_CHI2_MIN, ORDER_FACTOR = 50.0, 4.0
CHANNELS_MAX = 6  # 720 orders; a tensor with more is no image and no sensor of six axes
# Largest values of two draws of the same data differ by less; 0..255 against 0..1 by 255, and
# 0..1 against (x - mean) / std by 2 with negative values where there were none.
SCALE_FACTOR = 4.0
NEGATIVE_SHARE = 0.05
# Percentile 99.99 cuts off 0.01 % by intent, and what a range of least error cut off in our models
# was less; 1 % of a tensor's values flattened to its ends is a mistake.
CLIPPED_SHARE = 0.01
# One new sample in n + 1 leaves the range of n samples: with fewer than 50 that is 2 % per tensor.
SAMPLES_MIN = 50
# A class that should be there so often is missing by chance once in a million.
EXPECTED_MIN = -float(np.log(ALARM))
# The float model right on so much less than its own answers, renamed, could be: labels are renamed.
RENAMED_FACTOR = 0.5
PER_CLASS_MIN = 5
# Below it what copies add to the certainty of an interval is less than its own rounding.
DUPLICATES_SHARE = 0.01
# Scale and order are seen in so many samples, evenly spread: their means are known to 2 %.
LOOKED_AT_MAX = 2000
VALUES_MAX = 1_000_000
# The deviation of fewer groups is too rough for a chi-square.
GROUPS_MIN = 10
NAMED = 3  # of many tensors or classes, so many are named


def inputs(
    calibration: Mapping[str, Samples],
    evaluation: Mapping[str, Samples],
    groups: tuple[Array | None, Array | None] = (None, None),
) -> list[Finding]:
    """Scale and channel order of each input; [samples, ...] each.

    Args:
        groups: of both sets, see datasets.Dataset.
    """
    found: list[Finding] = []
    for name, given in calibration.items():
        if given.dtype.kind not in "fiu" or not rows.size_bytes(given):
            continue
        pair = given, evaluation[name]
        mine, other = (rows.spread(one, LOOKED_AT_MAX) for one in pair)
        looked = [
            None if group is None else rows.spread(group, len(seen))
            for group, seen in zip(groups, (mine, other), strict=True)
        ]
        found += [*_scale(name, mine, other)] or [*_channel_order(name, (mine, other), looked)]
    return found


def _scale(name: str, mine: Array, other: Array) -> Iterator[Finding]:
    large, want = _largest(mine), _largest(other)
    if large > SCALE_FACTOR * want or want > SCALE_FACTOR * large:
        yield Finding(
            SCALE,
            f"input {name!r} of the calibration set reaches {large:.3g}, of the evaluation set"
            f" {want:.3g}: scale both alike (0..255 against 0..1 is the usual mistake)",
        )
        return
    below = [float((one < 0).mean()) for one in (mine, other)]
    if min(below) == 0 and max(below) > NEGATIVE_SHARE:
        without, having = (
            ("evaluation", "calibration") if below[0] else ("calibration", "evaluation")
        )
        yield Finding(
            SCALE,
            f"{max(below):.0%} of input {name!r} are negative in the {having} set, none in the"
            f" {without} set: mean and deviation were taken off one of them only",
        )


def _largest(array: Array) -> float:
    """The size that one value in a thousand reaches: one odd pixel is no scale.

    Zeros do not count: where nearly all are, as in one-hot rows, the others say how large it is.
    """
    few = np.abs(rows.thinned(array, VALUES_MAX).astype(np.float64))
    few = few[few > 0]
    return float(np.quantile(few, 0.999)) if len(few) else 0.0


def _channel_order(
    name: str, pair: tuple[Array, Array], groups: Sequence[Array | None]
) -> Iterator[Finding]:
    shape = pair[0].shape
    axis = channel_axis(shape)
    if axis is None:
        return
    ours, theirs = (
        _by_group(_by_channel(one, axis), group) for one, group in zip(pair, groups, strict=True)
    )
    least = [2 if group is None else GROUPS_MIN for group in groups]
    if len(ours) < least[0] or len(theirs) < least[1]:
        return
    count = shape[axis]
    misfit = {order: _misfit(ours, theirs, order) for order in itertools.permutations(range(count))}
    given = misfit.pop(tuple(range(count)))
    best = min(misfit, key=lambda order: misfit[order])
    if given > ORDER_CHI2_MIN and given > ORDER_FACTOR * misfit[best]:
        yield Finding(
            CHANNEL_ORDER,
            f"channels of input {name!r} look swapped in the calibration set: taken as"
            f" {list(best)} they fit the evaluation set, as given they do not (misfit"
            f" {misfit[best]:.3g} against {given:.3g}); RGB and BGR?",
        )


def channel_axis(shape: Sequence[int]) -> int | None:
    """Which axis of [samples, ...] holds a few channels: the second, else the last."""
    if len(shape) < 3:
        return None
    return next((axis for axis in (1, len(shape) - 1) if 2 <= shape[axis] <= CHANNELS_MAX), None)


def _by_channel(array: Array, axis: int) -> Array:
    """Per sample and channel: mean, and deviation, without what all channels share.

    Returns:
        [samples, 2, channels]
    """
    by_channel = np.moveaxis(array, axis, 1)
    flat = by_channel.reshape(*by_channel.shape[:2], -1)
    sums = [one(flat, axis=2, dtype=np.float64) for one in (np.mean, np.std)]
    both = np.stack(sums, axis=1)
    return np.asarray(both - both.mean(axis=2, keepdims=True))


def _by_group(values: Array, groups: Array | None) -> Array:
    """A mean for each group: a hundred frames of one video are one lamp. [groups, ...]"""
    if groups is None:
        return values
    codes = np.unique(groups, return_inverse=True)[1].reshape(-1)
    found = np.zeros((codes.max() + 1, *values.shape[1:]))
    np.add.at(found, codes, values)
    return found / np.bincount(codes).reshape(-1, *[1] * (values.ndim - 1))


def _misfit(mine: Array, other: Array, order: tuple[int, ...]) -> float:
    """Squared differences of the sets' means in units of their standard errors, summed."""
    mine = mine[:, :, list(order)]
    error = mine.var(axis=0) / len(mine) + other.var(axis=0) / len(other)
    lost = (mine.mean(axis=0) - other.mean(axis=0)) ** 2
    return float((lost / np.maximum(error, 1e-12)).sum())


# --- which samples --------------------------------------------------------------------------------


def overlap(same: int, gone: int, samples: int) -> list[Finding]:
    """Samples that calibrate and would judge too.

    Args:
        same: evaluation samples that are exact copies. gone: those and the others of their groups.
    """
    if not same:
        return []
    whose = "" if same == gone else f"; with the others of their groups {gone}"
    return [
        Finding(
            OVERLAP,
            f"{same} of {samples} evaluation samples are in the calibration set too{whose}: they"
            " were left out, because a quantizer has seen them; calibrate with other data",
        )
    ]


def duplicates(copies: int, samples: int) -> list[Finding]:
    """Evaluation samples that are exact copies of others."""
    if copies <= DUPLICATES_SHARE * samples:
        return []
    return [
        Finding(
            DUPLICATES,
            f"{copies} of {samples} evaluation samples are copies of others: intervals and the test"
            " count them and are too sure; remove them, or give `groups`",
        )
    ]


# --- ranges ---------------------------------------------------------------------------------------


def few(samples: int) -> list[Finding]:
    """Whether the calibration set is too small to know ranges."""
    if samples >= SAMPLES_MIN:
        return []
    return [
        Finding(
            TRUNCATED,
            f"the calibration set has {samples} samples: of each tensor one new sample in"
            f" {samples + 1} leaves the range they show; give {SAMPLES_MIN} or more",
        )
    ]


def beyond(activations: Sequence[Activation], samples: int, judged: int) -> list[Finding]:
    """Whether evaluation samples leave the calibrated ranges more often than chance explains.

    Args:
        samples, judged: that showed the range, that were looked at; groups where there are some.
    """
    alarm = ALARM / max(len(activations), 1)
    worst = sorted(
        (
            one
            for one in activations
            if leaving(round(one.beyond * judged), judged, samples) < alarm
        ),
        key=lambda one: -one.beyond,
    )
    if not worst:
        return []
    named = ", ".join(f"{one.name} {one.beyond:.0%}" for one in worst[:NAMED])
    return [
        Finding(
            TRUNCATED,
            f"the calibration set does not show what the evaluation set holds: of {len(worst)}"
            f" tensors more samples leave the calibrated range than one in {samples + 1} ({named})",
        )
    ]


def leaving(count: int, judged: int, samples: int) -> float:
    """The chance that `count` or more of `judged` new samples leave the range of so many samples.

    If both are drawn alike the share outside has a Beta(2, samples - 1) distribution, whatever that
    of the values (Wilks 1941), and the count a beta-binomial one; ties only make it rarer.
    """
    if count < 1 or samples < 2:
        return 1.0
    ways = math.lgamma(judged + 1) + math.lgamma(samples + 1) - math.lgamma(samples - 1)
    ways -= math.lgamma(judged + samples + 1)
    logs = [
        math.log(out + 1)
        + math.lgamma(judged - out + samples - 1)
        - math.lgamma(judged - out + 1)
        + ways
        for out in range(count, judged + 1)
    ]
    return min(math.fsum(map(math.exp, logs)), 1.0)


REMEDY = "raise the percentile, or use minmax"
# NNCF has no percentile: it keeps the average of the samples' extremes.
_OF_NNCF = "say ranges: minmax (NNCF keeps the average of the samples' extremes)"
REMEDIES = {"nncf_int8": _OF_NNCF, "nncf_accuracy": _OF_NNCF}


def clipped(
    activations: Sequence[Activation], makers: Mapping[str, str] | None = None
) -> list[Finding]:
    """Ranges that cut off what the calibration set itself shows, by variant.

    `makers`: by variant the pass that chose its ranges, for the remedy.
    """
    variants = dict.fromkeys(name for one in activations for name in one.clippings)
    found = []
    for variant in variants:
        cut = [(one, one.clippings[variant]) for one in activations if variant in one.clippings]
        cut = [(one, how) for one, how in cut if how.calibration > CLIPPED_SHARE]
        if cut:
            cut.sort(key=lambda pair: -pair[1].calibration)
            named = "; ".join(
                f"{one.name}: {how.evaluation:.1%} of values outside {how.low:.3g}..{how.high:.3g}"
                for one, how in cut[:NAMED]
            )
            found.append(
                Finding(
                    CLIPPED,
                    f"{variant}: ranges of {len(cut)} tensors are clipped ({named});"
                    f" {REMEDIES.get((makers or {}).get(variant, ''), REMEDY)}",
                )
            )
    return found


# --- classes --------------------------------------------------------------------------------------


def missing_classes(calibration: Array, evaluation: Array) -> list[Finding]:
    """Classes that the calibration set should hold and does not; one class by sample each."""
    classes, counts = np.unique(evaluation, return_counts=True)
    expected = counts / len(evaluation) * len(calibration)
    here = np.isin(classes, calibration)
    gone = classes[(expected >= EXPECTED_MIN) & ~here]
    if not len(gone):
        return []
    named = ", ".join(str(one) for one in gone[: 2 * NAMED])
    return [
        Finding(
            TRUNCATED,
            f"{len(gone)} of {len(classes)} classes are missing in the calibration set ({named}):"
            " ranges of what only they excite may be too small",
        )
    ]


def labels(answers: Array, given: Array) -> list[Finding]:
    """Labels that do not fit the float model.

    Args:
        answers: its outputs [samples, classes]. given: [samples], integers.
    """
    classes, said = answers.shape[1], answers.argmax(axis=1)
    if given.min() < 0 or given.max() >= classes:
        return [
            Finding(
                LABELS,
                f"labels reach from {given.min()} to {given.max()}, the model has {classes}"
                f" classes: 0 to {classes - 1}",
            )
        ]
    right = float((said == given).mean())
    names, usual, mapped = _renamed(said, given)
    guess = max(float((given == one).mean()) for one in names)
    if len(given) >= PER_CLASS_MIN * len(names) and len(names) > 1:
        # Naming a class after its most frequent answer fits chance too, the more the fewer samples.
        chance = guess + 3 / np.sqrt(len(given) / len(names))
        if right < RENAMED_FACTOR * mapped and mapped > chance:
            moved = [f"{a} is answered {b}" for a, b in zip(names, usual, strict=True) if a != b]
            return [
                Finding(
                    LABELS,
                    f"labels look renamed: the float model is right on {right:.0%}, with other"
                    f" names for the classes on {mapped:.0%} ({', '.join(moved[:NAMED])})",
                )
            ]
    luck = _right_by_chance(said, given, classes)
    error = float(np.sqrt(luck * (1 - luck) / len(given)))
    if right <= luck + 3 * error and len(given) >= SAMPLES_MIN and len(names) > 1:
        return [
            Finding(
                LABELS,
                f"the float model itself is right on {right:.1%} of the samples, answers that have"
                f" nothing to do with the labels are on {luck:.1%}: labels or the scale of inputs"
                " do not belong to this model",
            )
        ]
    return []


def _right_by_chance(said: Array, given: Array, classes: int) -> float:
    """Agreement of independent answers with the same shares of classes (Cohen 1960)."""
    shares = [np.bincount(one, minlength=classes) / len(one) for one in (said, given)]
    return float((shares[0] * shares[1]).sum())


def _renamed(said: Array, given: Array) -> tuple[list[int], list[int], float]:
    """Classes, what each is most often answered with, and the share right if named so."""
    names = [int(one) for one in np.unique(given)]
    usual = [int(np.bincount(said[given == one]).argmax()) for one in names]
    hits = sum(
        int((said[given == one] == answer).sum()) for one, answer in zip(names, usual, strict=True)
    )
    distinct = len(set(usual)) / len(names)  # everything answered alike is no renaming
    return names, usual, hits / len(given) * distinct


# These make figures wrong, not answers.
_NO_REASON = frozenset({LABELS, OVERLAP, DUPLICATES})


def reason(findings: Sequence[Finding], variant: str) -> str:
    """What of the data may explain that a variant answers wrongly; empty if nothing does."""
    mine = [
        one
        for one in findings
        if one.fault not in _NO_REASON
        and (one.fault != CLIPPED or one.text.startswith(f"{variant}:"))
    ]
    return "; ".join(f"{one.fault}: {one.text.removeprefix(f'{variant}: ')}" for one in mine)
