"""How right answers are: metrics, confidence intervals and paired tests.

Law of this file: arrays in, numbers out; no model, no file, no clock, randomness is a seed. A score
is one number per sample, larger is better, so that two variants can be compared sample by sample.

Sources: Wilson 1927 (interval of a share); McNemar 1947, exact binomial form (two classifiers on
the same samples); Efron 1979 (bootstrap). For samples that belong together see `clusters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.errors import UsageError
from quantize import clusters, meaning

Array = np.ndarray[Any, Any]

# A probability of a softmax in float32 that is smaller is noise.
LEAST = 1e-9
BOOTSTRAP_ROUNDS = 1000
DRAWN_AT_ONCE = 1 << 18
ENOUGH_TIMES = 1000.0  # more samples than so many times those that there are is no advice


class Interval(msgspec.Struct, frozen=True):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


class Difference(msgspec.Struct, frozen=True):
    """What a variant loses against the reference, on the same samples.

    Attributes:
        drop: mean of reference - variant; negative: the variant is better.
        low, high: two-sided interval of it.
        bound: one-sided upper bound of it at the same confidence.
        p_value: of "no difference"; McNemar's exact test where scores are 0 or 1, else a sign test;
            of groups where samples belong together.
        worse, better: samples on which the variant is worse, better.
    """

    drop: float
    low: float
    high: float
    bound: float
    p_value: float
    worse: int
    better: int


class Metric(NamedTuple):
    """How a metric reads answers.

    Attributes:
        score: (outputs, labels or None, the float model's outputs) -> one score per sample.
        drop_max: the default budget.
        unit: what one unit of it is, for people.
        needs_labels: false: it compares with the float model.
    """

    score: Callable[[Array, Array | None, Array], Array]
    drop_max: float
    unit: str
    needs_labels: bool

    @property
    def is_share(self) -> bool:
        """Whether a score lies in 0..1, so that 0 is a sample lost and no error of none."""
        return self.unit == "share"


def metric(name: str, k: int = 5, function: Callable[..., Array] | None = None) -> Metric:
    """The metric of that name (recipe.METRICS without auto).

    Raises:
        UsageError: there is none, or it needs a function.
    """
    if name in ("callable", "wer"):
        if function is None:
            raise UsageError(f"metric {name!r} needs a function", where="evaluation.callable")
        given = function
        return Metric(lambda out, labels, _: _called(given, out, labels), 0.01, "score", True)
    if name == "topk":
        return Metric(lambda out, labels, _: in_top(out, labels, k), 0.01, "share", True)
    if name not in _METRICS:
        raise UsageError(f"unknown metric {name!r}", expected="one of " + ", ".join(_METRICS))
    return _METRICS[name]


def _called(function: Callable[..., Array], outputs: Array, labels: Array | None) -> Array:
    """The scores of a user's function. Raises: UsageError if it fails or gives something else."""
    try:
        found = _floats(function(outputs, labels))
    except Exception as e:
        raise UsageError(
            f"failed: {type(e).__name__}: {e}",
            where="evaluation.callable",
            expected="a function of (outputs, labels)",
        ) from e
    if found.shape != (len(outputs),) or not np.isfinite(found).all():
        raise UsageError(
            f"returned {list(found.shape)}" + ("" if found.size == 0 else ", or no numbers"),
            where="evaluation.callable",
            expected=f"one finite score for each of {len(outputs)} samples, larger is better",
        )
    return found


# --- scores ---------------------------------------------------------------------------------------


def top1(outputs: Array, labels: Array | None, _: Array | None = None) -> Array:
    """1 where the largest value is the label's. outputs [N, classes], labels integers [N]."""
    assert labels is not None
    return _floats(classes(outputs) == labels.reshape(len(outputs), -1)[:, 0])


def classes(outputs: Array) -> Array:
    """The class of each sample [N]: where its largest value is, or the integer that it holds.

    -1 where a value is no number: such an answer is of no class, and equals no label.
    """
    flat = outputs.reshape(len(outputs), -1)
    if flat.shape[1] == 1 and flat.dtype.kind in "iu":
        return np.asarray(flat[:, 0])
    return np.where(np.isnan(flat).any(axis=1), -1, flat.argmax(axis=1))


def in_top(outputs: Array, labels: Array | None, k: int) -> Array:
    """1 where the label is among the k largest values."""
    assert labels is not None
    if k == 1:
        return top1(outputs, labels)
    flat = outputs.reshape(len(outputs), -1)
    # Floats first: minus the smallest of an int8 or uint8 is itself.
    best = np.argpartition(-_rows(outputs), min(k, flat.shape[1] - 1), axis=1)[:, :k]
    hit = (best == labels.reshape(len(flat), -1)[:, :1]).any(axis=1)
    return _floats(hit & (classes(outputs) >= 0))


def agreement(outputs: Array, _: Array | None, reference: Array) -> Array:
    """1 where the largest value stands where the float model has it."""
    return _floats(classes(outputs) == classes(reference))


def cosine(outputs: Array, _: Array | None, reference: Array) -> Array:
    """Cosine of the angle to the float model's answer; 1 for two zeros."""
    mine, want = _rows(outputs), _rows(reference)
    norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(want, axis=1)
    dots = (mine * want).sum(axis=1)
    both_zero = (np.abs(mine).max(axis=1) == 0) & (np.abs(want).max(axis=1) == 0)
    return np.where(both_zero, 1.0, dots / np.where(norms == 0, 1.0, norms))


def negative_kl(outputs: Array, _: Array | None, reference: Array) -> Array:
    """-KL(float || variant) in nats.

    Of the softmax of both, or of the answers themselves where the float model's are distributions
    already (not negative, each sums to 1); a probability of less than LEAST counts as that.
    """
    want, mine = _rows(reference), _rows(outputs)
    if want.min() >= 0 and np.allclose(want.sum(axis=1), 1, atol=meaning.TOLERANCE):
        want, mine = (np.log(np.maximum(one, LEAST)) for one in (want, mine))
    want, mine = _log_softmax(want), _log_softmax(mine)
    return _floats(-(np.exp(want) * (want - mine)).sum(axis=1))


def negative_mse(outputs: Array, labels: Array | None, reference: Array) -> Array:
    """Minus the mean squared distance to the labels, or to the float model where there are none."""
    target = reference if labels is None else labels
    return _floats(-((_rows(outputs) - _rows(target)) ** 2).mean(axis=1))


def negative_nmse(outputs: Array, labels: Array | None, reference: Array) -> Array:
    """Minus the squared error as a share of the variance of the labels (or the float model).

    The mean is R^2 - 1. It has no unit, so that one budget fits degrees and volts alike.
    """
    target = _rows(reference if labels is None else labels)
    variance = max(float(((target - target.mean(axis=0)) ** 2).mean()), 1e-30)
    return _floats(-((_rows(outputs) - target) ** 2).mean(axis=1) / variance)


def psnr(outputs: Array, labels: Array | None, reference: Array) -> Array:
    """Peak signal to noise in dB against the labels (or float model), peak = their range.

    At most 100 dB, so that equal answers have a finite score.
    """
    target = _rows(reference if labels is None else labels)
    peak = max(float(target.max() - target.min()), 1e-12)
    error = ((_rows(outputs) - target) ** 2).mean(axis=1)
    return _floats(np.minimum(10 * np.log10(peak**2 / np.maximum(error, 1e-30)), 100.0))


def f1(outputs: Array, labels: Array | None, reference: Array | None = None) -> Array:
    """F1 by sample of many-label answers against 0/1 labels [N, C]; nothing said or wanted: 1.

    A column is said where its value is over 0.5, or over 0 where the float model's are logits (some
    are not in 0..1). The mean over samples is the "samples" average, not the "micro" nor the
    "macro" one; with one column it is the share that is right.
    """
    assert labels is not None
    scale = outputs if reference is None else reference
    said = _rows(outputs) > (0.5 if scale.min() >= 0 and scale.max() <= 1 else 0.0)
    want = _rows(labels) > 0.5
    if want.shape[1] == 1:
        return _floats((said[:, :1] == want).all(axis=1))
    both = (said & want).sum(axis=1)
    total = said.sum(axis=1) + want.sum(axis=1)
    return np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1))


def average_precision(outputs: Array, labels: Array | None, _: Array | None = None) -> Array:
    """Average precision by sample: how high the true columns of 0/1 labels [N, C] are ranked.

    It is that of many-label classification and of search; boxes of a detector are not matched (a
    callable may). Of equal values the first column counts as higher; without a true one: 1.
    """
    assert labels is not None
    values, want = _rows(outputs), _rows(labels) > 0.5
    order = np.argsort(-values, axis=1, kind="stable")
    hits = np.take_along_axis(want, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    count = hits.sum(axis=1)
    return np.where(count == 0, 1.0, (precision * hits).sum(axis=1) / np.maximum(count, 1))


_METRICS: dict[str, Metric] = {
    "top1": Metric(top1, 0.01, "share", True),
    "f1": Metric(f1, 0.01, "share", True),
    "map": Metric(average_precision, 0.01, "share", True),
    "mse": Metric(negative_mse, 1e-3, "square", False),
    "nmse": Metric(negative_nmse, 0.01, "share of variance", False),
    "psnr": Metric(psnr, 1.0, "dB", False),
    "agreement": Metric(agreement, 0.05, "share", False),
    "kl": Metric(negative_kl, 0.05, "nat", False),
    "cosine": Metric(cosine, 0.02, "cosine", False),
}


def _floats(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)


def _rows(array: Array) -> Array:
    return array.reshape(len(array), -1).astype(np.float64)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return _floats(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


# --- intervals and tests --------------------------------------------------------------------------


def interval(
    scores: Array,
    confidence: float,
    seed: int = 0,
    groups: Array | None = None,
    *,
    is_share: bool = True,
) -> Interval:
    """The mean score: Wilson's interval where scores are 0 or 1, else the wider of two (`_means`).

    Args:
        groups: [samples], which belong together (`clusters`); None: each sample is its own.
        is_share: Metric.is_share. Without it zeros alone are errors of none, not hits and misses.
    """
    count, value = float(len(scores)), float(scores.mean())
    quantiles = (0.5 - confidence / 2, 0.5 + confidence / 2)
    if _is_binary(scores, is_share):
        if groups is not None:
            count = clusters.effective(scores, groups, quantiles[1])
        z = NormalDist().inv_cdf(quantiles[1])
        centre = (value + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count)
        half *= math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
        return Interval(value, centre - half, centre + half)
    low, high = _means(scores, quantiles, seed, groups)
    return Interval(value, low, high)


def difference(
    reference: Array,
    variant: Array,
    confidence: float,
    seed: int = 0,
    groups: Array | None = None,
    *,
    is_share: bool = True,
) -> Difference:
    """What the variant loses, from scores of the same samples in the same order.

    Args:
        groups, is_share: as of `interval`. With groups the test counts those that lose.
    """
    assert reference.shape == variant.shape, "paired scores"
    lost = reference - variant
    worse, better = int((lost > 0).sum()), int((lost < 0).sum())
    quantiles = (0.5 - confidence / 2, 0.5 + confidence / 2, confidence)
    if _is_binary(np.concatenate([reference, variant]), is_share):
        low, high, bound = (_paired(lost, q, groups) for q in quantiles)
    else:
        low, high, bound = _means(lost, quantiles, seed, groups)
        if is_share:
            farther = (min, low), (max, high), (max, bound)
            low, high, bound = (
                one(found, _one_more(lost, q, groups))
                for (one, found), q in zip(farther, quantiles, strict=True)
            )
    by_group = clusters.sums(lost, groups).values
    p_value = sign_test(int((by_group > 0).sum()), int((by_group < 0).sum()))
    return Difference(float(lost.mean()), low, high, bound, p_value, worse, better)


def _paired(lost: Array, quantile: float, groups: Array | None) -> float:
    """`paired_bound` of losses of -1, 0 and 1, counted as so many independent ones as there are."""
    count, worse, better = len(lost), int((lost > 0).sum()), int((lost < 0).sum())
    if groups is None:
        return paired_bound(worse, better, count, quantile)
    known = clusters.effective(lost, groups, max(quantile, 1 - quantile))
    share = known / count
    return paired_bound(worse * share, better * share, known, quantile)


def paired_bound(worse: float, better: float, count: float, quantile: float) -> float:
    """The difference of two paired shares, (worse - better) / count, at this quantile of doubt.

    Tango's score bound (Statistics in Medicine 17, 1998): the difference at which what was seen
    is as unlikely as the quantile says. The usual error bars prove too much where few samples
    differ: without one in 200 they exclude a loss of 1 %, which one set in seven hides.
    """
    z = NormalDist().inv_cdf(quantile)
    low, high = -1.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        # Larger differences make what was seen smaller than expected: the statistic falls.
        low, high = (middle, high) if _tango(worse, better, count, middle) > -z else (low, middle)
    return (low + high) / 2


def samples_enough(lost: Difference, count: int, drop_max: float, confidence: float) -> int:
    """How many samples would bring `lost.bound` to drop_max, if more of them lose as these did.

    0: none would (the loss itself is as large), or more than ENOUGH_TIMES as many. Scores of 0 and
    1 by Tango's bound, with as few independent samples as give the bound that was found (groups);
    others by the square root of their number.
    """
    if not (lost.drop < drop_max < lost.bound < math.inf):
        return 0
    times = ((lost.bound - lost.drop) / (drop_max - lost.drop)) ** 2
    if abs(lost.drop * count - (lost.worse - lost.better)) < 1e-6 * count:  # scores of 0 and 1
        times = _times(lost, count, drop_max, confidence) / _times(
            lost, count, lost.bound, confidence
        )
    return math.ceil(count * times) if times <= ENOUGH_TIMES else 0


def _times(lost: Difference, count: int, bound: float, confidence: float) -> float:
    """So many times the samples that were seen have this bound; 1 / ENOUGH_TIMES at the least."""
    low, high = 1 / ENOUGH_TIMES, ENOUGH_TIMES * 1.1
    while high - low > 1e-3 * high:
        middle = math.sqrt(low * high)
        seen = (lost.worse * middle, lost.better * middle, count * middle)
        low, high = (middle, high) if paired_bound(*seen, confidence) > bound else (low, middle)
    return high


def _tango(worse: float, better: float, count: float, difference: float) -> float:
    """How many deviations `worse - better` lies above what `difference` lets expect."""
    b = -worse - better + (2 * count - worse + better) * difference
    c = -better * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
    variance = count * (2 * share + difference * (1 - difference))
    return (worse - better - count * difference) / math.sqrt(max(variance, 1e-12))


def sign_test(worse: int, better: int) -> float:
    """Two-sided exact p-value of `worse` against `better` under a fair coin (McNemar, exact)."""
    count, fewer = worse + better, min(worse, better)
    if count == 0 or worse == better:
        return 1.0
    # In logarithms: a binomial coefficient of thousands is no float.
    logs = [
        math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1)
        for i in range(fewer + 1)
    ]
    top = max(logs)
    tail = math.exp(top - count * math.log(2)) * sum(math.exp(one - top) for one in logs)
    return min(1.0, 2 * tail)


def _one_more(lost: Array, quantile: float, groups: Array | None) -> float:
    """The bound if one sample more were lost (or won) wholly: what was not seen is not proven away.

    As sure as Tango's where nothing differs; of errors without a largest one nobody can say it.
    """
    names = None if groups is None else np.append(groups, groups.max() + 1)
    more = np.append(lost, math.copysign(1, quantile - 0.5))
    return clusters.mean_bound(more, names, quantile, is_skew=False)


def _is_binary(scores: Array, is_share: bool) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all()) and (is_share or bool(scores.any()))


def _means(
    values: Array, quantiles: tuple[float, ...], seed: int, groups: Array | None
) -> tuple[float, ...]:
    """The mean at these quantiles of doubt: the farther of `mean_bound` and a bootstrap's.

    The bootstrap follows the skew of many samples, and is too narrow with few (its 95 % held in
    91 of 100 sets of 5 or 10). Groups are drawn whole.
    """
    by_group = clusters.sums(values, groups)
    number = len(by_group.values)
    rng = np.random.Generator(np.random.PCG64(seed))
    step = max(DRAWN_AT_ONCE // number, 1)
    means = np.concatenate(
        [
            by_group.values[drawn].sum(axis=1) / by_group.counts[drawn].sum(axis=1)
            for first in range(0, BOOTSTRAP_ROUNDS, step)
            for drawn in [rng.integers(0, number, (min(step, BOOTSTRAP_ROUNDS - first), number))]
        ]
    )
    farther = {True: max, False: min}
    return tuple(
        float(farther[q > 0.5](np.quantile(means, q), clusters.mean_bound(values, groups, q)))
        for q in quantiles
    )
