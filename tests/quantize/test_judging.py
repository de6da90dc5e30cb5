"""Which metric judges which output: no metric may call every variant right."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import clusters, judging, results, scores, verdict
from quantize.recipe import Budgets, Evaluation
from tests.quantize import outcomes

CLASSES = TensorSpec("p", "FP32", (-1, 10))
ONE = TensorSpec("v", "FP32", (-1, 1))
FIELD = TensorSpec("f", "FP32", (-1, 8, 3))
NUMBER = TensorSpec("label", "INT64", (-1,))
LABELS = np.arange(20) % 10


def name(spec: TensorSpec, labels: np.ndarray | None) -> str:
    return judging.judged(Evaluation(), (spec,), labels).name


@pytest.mark.parametrize(
    ("spec", "labels", "expected"),
    [
        (CLASSES, None, "agreement"),
        (ONE, None, "nmse"),  # the largest of one value always agrees
        (FIELD, None, "cosine"),
        (NUMBER, None, "agreement"),
        (CLASSES, LABELS, "top1"),
        (CLASSES, LABELS.astype(np.float64), "top1"),
        (CLASSES, np.eye(10)[LABELS], "top1"),
        (CLASSES, (np.arange(200).reshape(20, 10) % 3 == 0), "f1"),
        (CLASSES, np.linspace(0, 1, 200).reshape(20, 10), "nmse"),
        (ONE, LABELS % 2, "f1"),
        (ONE, np.linspace(-3, 40, 20), "nmse"),
        (FIELD, np.arange(480).reshape(20, 8, 3) % 2, "f1"),
        (FIELD, np.linspace(0, 1, 480).reshape(20, 8, 3), "nmse"),
    ],
)
def test_the_metric_follows_the_output_and_the_labels(
    spec: TensorSpec, labels: np.ndarray | None, expected: str
) -> None:
    assert name(spec, labels) == expected


def test_one_hot_labels_are_read_as_classes() -> None:
    found = judging.judged(Evaluation(), (CLASSES,), np.eye(10)[LABELS])
    assert found.labels is not None and found.labels.tolist() == LABELS.tolist()
    assert found.metric.score(np.eye(10)[LABELS], found.labels, LABELS).mean() == 1


@pytest.mark.parametrize(
    ("spec", "labels", "metric", "says"),
    [
        (CLASSES, LABELS + 1, "auto", "labels reach from 1 to 10"),
        (CLASSES, LABELS - 1, "auto", "labels reach from -1 to 8"),
        (CLASSES, np.array(["a"] * 20), "auto", "labels have dtype"),
        (CLASSES, LABELS + 0.5, "top1", "no classes"),
        (CLASSES, np.ones((20, 10)), "top1", "not one class a sample"),
        (ONE, LABELS % 2, "top1", "always right"),
        (CLASSES, LABELS, "mse", "value by value"),  # numpy would broadcast it in silence
        (FIELD, LABELS, "auto", "do not say which metric"),
    ],
)
def test_labels_that_cannot_judge_are_refused_before_any_work(
    spec: TensorSpec, labels: np.ndarray, metric: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        judging.judged(Evaluation(metric), (spec,), labels)


def test_more_largest_values_than_there_are_classes_to_miss_are_refused() -> None:
    for k in (10, 11):
        with pytest.raises(UsageError, match="every answer would be right"):
            judging.judged(Evaluation("topk", k=k), (CLASSES,), LABELS)
    assert judging.judged(Evaluation("topk", k=9), (CLASSES,), LABELS).name == "topk"


def test_the_output_that_holds_scores_is_judged_not_the_class_number_before_it() -> None:
    found = judging.judged(Evaluation(), (NUMBER, CLASSES), LABELS)
    assert found.output == "p" and "'p'" in found.note
    assert judging.judged(Evaluation(output="label"), (NUMBER, CLASSES), LABELS).output == "label"
    with pytest.raises(ModelError, match="no output"):
        judging.judged(Evaluation(output="q"), (NUMBER, CLASSES), LABELS)


def test_class_numbers_are_compared_as_numbers() -> None:
    want = np.array([3, 1, 4])
    assert scores.agreement(np.array([3, 1, 5]), None, want).tolist() == [1, 1, 0]
    assert scores.top1(np.array([[3], [1], [5]]), want).tolist() == [1, 1, 0]


def test_an_answer_that_is_no_number_is_never_right() -> None:
    answers = np.array([[np.nan, 1.0], [1.0, 0.0]])
    assert scores.top1(answers, np.array([0, 0])).tolist() == [0, 1]
    assert scores.in_top(np.c_[answers, answers], np.array([0, 0]), 2).tolist() == [0, 1]
    assert scores.agreement(answers, None, np.array([[1.0, 0.0], [1.0, 0.0]])).tolist() == [0, 1]


def test_the_error_as_a_share_of_variance_has_no_unit() -> None:
    values = np.random.Generator(np.random.PCG64(0)).normal(size=(500, 1))
    noisy = values + 0.1 * values.std() * np.where(np.arange(500) % 2, 1, -1)[:, None]
    for scale in (1.0, 1000.0):
        score = scores.negative_nmse(noisy * scale, None, values * scale).mean()
        assert score == pytest.approx(-0.01, rel=0.02)


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_the_bound_of_a_loss_holds_as_often_as_it_says(share: float) -> None:
    """Tango's bound; the usual error bars held in 87 of 100 sets where 95 were promised."""
    rng = np.random.Generator(np.random.PCG64(0))
    lost = rng.binomial(200, share, 4000)
    bounds = {int(n): scores.paired_bound(int(n), 0, 200, 0.95) for n in np.unique(lost)}
    held = np.mean([bounds[int(n)] >= share for n in lost])
    assert held >= 0.93  # counts are whole: it cannot hold exactly as often


@pytest.mark.parametrize(("worse", "better", "count"), [(0, 0, 200), (5, 2, 500), (30, 10, 3000)])
def test_as_many_samples_as_are_said_to_be_enough_prove_it_and_fewer_do_not(
    worse: int, better: int, count: int
) -> None:
    reference, variant = np.ones(count), np.ones(count)
    variant[:worse], reference[worse : worse + better] = 0, 0
    lost = scores.difference(reference, variant, 0.95)
    assert lost.drop <= 0.01 < lost.bound
    enough = scores.samples_enough(lost, count, 0.01, 0.95)

    def bound(samples: float) -> float:
        times = samples / count
        return scores.paired_bound(worse * times, better * times, samples, 0.95)

    assert bound(enough) <= 0.01 < bound(enough * 0.98)


def test_a_loss_that_is_the_whole_budget_is_proven_by_no_number_of_samples() -> None:
    lost = scores.Difference(0.01, 0.0, 0.02, 0.018, 0.1, 2, 1)
    assert scores.samples_enough(lost, 100, 0.01, 0.95) == 0
    near = scores.Difference(0.00999, 0.0, 0.02, 0.018, 0.1, 60, 41)
    assert scores.samples_enough(near, 100, 0.01, 0.95) == 0


def test_scores_that_are_no_shares_need_samples_by_the_square() -> None:
    lost = scores.Difference(0.002, 0.0, 0.02, 0.018, 0.1, 70, 30)
    assert scores.samples_enough(lost, 100, 0.01, 0.95) == pytest.approx(400, abs=1)


def test_paired_bounds_mirror_and_meet_their_ends() -> None:
    assert scores.paired_bound(7, 3, 100, 0.95) == pytest.approx(
        -scores.paired_bound(3, 7, 100, 0.05), abs=1e-6
    )
    assert scores.paired_bound(0, 0, 200, 0.95) == pytest.approx(2.7055 / 202.7055, abs=1e-4)
    assert scores.paired_bound(200, 0, 200, 0.95) == pytest.approx(1.0, abs=1e-6)


def test_a_callable_metric_that_fails_or_returns_something_else_is_named() -> None:
    outputs = np.zeros((4, 2))
    for function, says in (
        (lambda out, labels: 1 / 0, "ZeroDivisionError"),
        (lambda out, labels: 1.0, r"returned \[\]"),
        (lambda out, labels: np.full(4, np.nan), "no numbers"),
    ):
        with pytest.raises(UsageError, match=says):
            scores.metric("callable", function=function).score(outputs, None, outputs)


@pytest.mark.parametrize("datatype", [np.int8, np.uint8, np.float32])
def test_the_smallest_integer_is_not_among_the_largest(datatype: type) -> None:
    least = np.iinfo(datatype).min if datatype is not np.float32 else 0
    answers = np.array([[least, 5, 9, 1]], datatype)
    hits = [scores.in_top(answers, np.array([label]), 2).tolist() for label in range(4)]
    assert hits == [[0], [1], [1], [0]]


@pytest.mark.parametrize("name", ["kl", "mse", "nmse", "cosine"])
def test_equal_answers_lose_nothing_by_an_error_metric_however_few(name: str) -> None:
    answers = np.random.Generator(np.random.PCG64(0)).normal(size=(20, 10)).astype(np.float32)
    metric = scores.metric(name)
    each = metric.score(answers, None, answers)
    lost = scores.difference(each, each, 0.95, is_share=metric.is_share)
    assert lost.drop == lost.bound == 0
    value = scores.interval(each, 0.95, is_share=metric.is_share)
    assert value.low == pytest.approx(value.high)


def test_equal_hits_of_few_samples_prove_little() -> None:
    hits = np.zeros(20), np.ones(20)
    assert scores.metric("top1").is_share and scores.metric("agreement").is_share
    assert all(scores.difference(one, one, 0.95).bound > 0.1 for one in hits)
    assert scores.difference(hits[1], hits[1], 0.95, is_share=False).bound > 0.1  # a callable's


def test_labels_that_are_missing_are_counted() -> None:
    labels = np.where(LABELS == 3, np.nan, LABELS.astype(float))
    bad = int((LABELS == 3).sum())
    for spec in (CLASSES, ONE):
        with pytest.raises(UsageError, match=f"for {bad} of {len(LABELS)}"):
            judging.judged(Evaluation(), (spec,), labels)


def test_outputs_that_nothing_judges_are_said() -> None:
    found = judging.judged(Evaluation(), (CLASSES, ONE), LABELS)
    assert found.note == f"only output {CLASSES.name!r} is judged, not {ONE.name!r}"
    assert judging.judged(Evaluation(), (CLASSES,), LABELS).note == ""


@pytest.mark.parametrize("count", [50, 200])
def test_the_bound_of_skew_losses_holds_nearly_as_often_as_it_says(count: int) -> None:
    """Most are small, few are large, as of a divergence: Student held in 88 to 93 of 100."""
    rng = np.random.Generator(np.random.PCG64(1))
    sets = rng.chisquare(1, (300, count))
    bounds = [clusters.mean_bound(one, None, 0.95) for one in sets]
    assert np.mean(np.array(bounds) >= 1.0) >= 0.93


def test_shares_that_are_not_lost_on_few_samples_prove_as_little_as_hits() -> None:
    half = np.full(50, 0.5)
    groups = np.arange(50) // 5
    for given in (None, groups):
        assert 0.04 < scores.difference(half, half, 0.95, groups=given).bound < 0.07
    found = scores.difference(half, half, 0.95)
    assert found.low == pytest.approx(-found.high)
    assert scores.difference(half, half, 0.95, is_share=False).bound == 0


@pytest.mark.parametrize(("share", "said"), [(0.95, "95%"), (0.995, "99.5%"), (0.9999, "99.99%")])
def test_a_confidence_is_not_rounded_up_to_certainty(share: float, said: str) -> None:
    assert results.percent(share) == said


def test_a_small_loss_is_told_with_digits_enough() -> None:
    reference = outcomes.variant("fp32", 0.9, 1.0, 1)
    lost = scores.Difference(0.000141, 0.0, 0.0002, 0.0002, 0.5, 9, 7)
    one = msgspec.structs.replace(outcomes.variant("int8", 0.9, 1.0, 1), against=lost)
    said = verdict.refusal(one, reference, Budgets(), 0.0001, 800)
    assert "a loss of 0.000141 where 0.0001 is allowed" in said
