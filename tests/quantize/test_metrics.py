"""Each metric against an implementation of its own: brute force, and scikit-learn where it is."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.tensors import TensorSpec
from quantize import foreign, judging, looking, meaning, models, scores, trials, workflow
from quantize.building import chains
from quantize.datasets import Dataset
from quantize.meaning import EMBEDDING, SCORES, Look
from quantize.recipe import Data, Evaluation, Recipe, Variant
from tests.quantize.test_faults import network

Array = np.ndarray[Any, Any]
RNG = np.random.Generator(np.random.PCG64(0))
LOGITS = RNG.normal(0, 2, (40, 6)).astype(np.float32)
NOISY = LOGITS + RNG.normal(0, 0.5, LOGITS.shape).astype(np.float32)
WANTED = (RNG.random((40, 6)) < 0.3).astype(int)
WANTED[0] = 0  # nothing to be found


def softmax(logits: Array) -> Array:
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def test_f1_is_twice_what_is_right_over_what_is_said_and_what_is_wanted() -> None:
    for row, score in enumerate(scores.f1(LOGITS, WANTED, LOGITS)):
        said = {column for column in range(6) if LOGITS[row, column] > 0}
        want = {column for column in range(6) if WANTED[row, column]}
        expected = 2 * len(said & want) / (len(said) + len(want)) if said or want else 1.0
        assert score == pytest.approx(expected)


def test_a_variant_whose_probabilities_pass_1_is_read_as_the_float_model_is() -> None:
    chances = 1 / (1 + np.exp(-LOGITS))
    rounded = chances.copy()
    rounded[3, 2] = 1.0004  # the step of an int8 output
    assert scores.f1(rounded, WANTED, chances).tolist() == scores.f1(LOGITS, WANTED).tolist()


def test_f1_and_precision_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    right = scores.f1(LOGITS, WANTED).mean()
    assert right == pytest.approx(
        metrics.f1_score(WANTED, LOGITS > 0, average="samples", zero_division=1.0)
    )
    ranked = scores.average_precision(LOGITS, WANTED).mean()
    assert ranked == pytest.approx(metrics.label_ranking_average_precision_score(WANTED, LOGITS))


def test_average_precision_is_the_mean_precision_at_each_true_column() -> None:
    for row, score in enumerate(scores.average_precision(LOGITS, WANTED)):
        order = sorted(range(6), key=lambda column: -LOGITS[row, column])
        at = [place for place, column in enumerate(order, 1) if WANTED[row, column]]
        precisions = [number / place for number, place in enumerate(at, 1)]
        assert score == pytest.approx(np.mean(precisions) if precisions else 1.0)


def test_peak_signal_to_noise_is_in_decibels_of_the_labels_range() -> None:
    want = RNG.random((5, 3, 4, 4)) * 255
    got = want + RNG.normal(0, 2, want.shape)
    peak = want.max() - want.min()
    for row, score in enumerate(scores.psnr(got, want, got)):
        error = sum((a - b) ** 2 for a, b in zip(got[row].flat, want[row].flat, strict=True)) / 48
        assert score == pytest.approx(10 * math.log10(peak**2 / error))
    assert scores.psnr(want, want, got).tolist() == [100.0] * 5


def test_divergence_is_of_the_softmax_or_of_answers_that_are_distributions_already() -> None:
    p, q = softmax(LOGITS), softmax(NOISY)
    by_hand = [
        -sum(a * math.log(a / b) for a, b in zip(*two, strict=True))
        for two in zip(p, q, strict=True)
    ]
    assert scores.negative_kl(NOISY, None, LOGITS) == pytest.approx(by_hand, rel=1e-4)
    assert scores.negative_kl(q, None, p) == pytest.approx(by_hand, rel=1e-4)
    assert scores.negative_kl(p, None, p) == pytest.approx(0, abs=1e-9)
    none = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    assert scores.negative_kl(none[0], None, none[1])[0] == pytest.approx(
        -0.5 * math.log(0.5) - 0.5 * math.log(0.5 / scores.LEAST), rel=1e-3
    )


def test_squares_and_cosine_are_what_they_are_called() -> None:
    square = [-np.mean((a - b) ** 2) for a, b in zip(NOISY, LOGITS, strict=True)]
    assert scores.negative_mse(NOISY, None, LOGITS) == pytest.approx(square, rel=1e-5)
    assert scores.negative_mse(NOISY, LOGITS, NOISY) == pytest.approx(square, rel=1e-5)
    cosine = [
        np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b))
        for a, b in zip(NOISY, LOGITS, strict=True)
    ]
    assert scores.cosine(NOISY, None, LOGITS) == pytest.approx(cosine, rel=1e-5)


def test_a_metric_of_words_is_a_function_of_the_users() -> None:
    def errors(outputs: Array, labels: Array) -> Array:
        """-WER of texts as numbers of words; 0 ends a text."""
        return np.array([-float((a != b).mean()) for a, b in zip(outputs, labels, strict=True)])

    metric = scores.metric("wer", function=errors)
    want = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    got = np.array([[3, 1, 4, 4], [5, 9, 2, 6]])
    assert metric.score(got, want, got).tolist() == [-0.25, 0.0]


# --- what an output without labels holds ----------------------------------------------------------

UNIT = LOGITS / np.linalg.norm(LOGITS, axis=1, keepdims=True)
SURE = np.eye(6)[np.arange(40) % 6]  # saturated: of length 1, and sums to 1


@pytest.mark.parametrize(
    ("name", "operator", "answers", "kind", "is_sure"),
    [
        ("y", "", softmax(LOGITS), SCORES, True),
        ("y", "", SURE, SCORES, True),
        ("y", "", UNIT, EMBEDDING, True),
        ("y", "", np.abs(UNIT), EMBEDDING, True),
        ("logits", "Div", UNIT, EMBEDDING, True),  # what is seen counts more than a name
        ("y", "Softmax", None, SCORES, True),
        ("logits", "Gemm", LOGITS, SCORES, True),
        ("class_scores", "", LOGITS, SCORES, True),
        ("sentence_embedding", "Gemm", LOGITS, EMBEDDING, True),
        ("last_hidden", "LayerNormalization", LOGITS, EMBEDDING, True),
        ("y", "GlobalAveragePool", np.abs(LOGITS), EMBEDDING, False),
        ("y", "ReduceMean", LOGITS, EMBEDDING, False),
        ("y", "Gemm", LOGITS, SCORES, False),
        ("y", "", LOGITS, SCORES, False),
        ("y", "", UNIT[:1], SCORES, False),  # one answer proves nothing
    ],
)
def test_what_an_output_holds_is_seen_or_named_or_guessed_aloud(
    name: str, operator: str, answers: Array | None, kind: str, is_sure: bool
) -> None:
    found = meaning.meaning(name, Look(operator, answers))
    assert (found.kind, found.is_sure) == (kind, is_sure)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("fashion_mnist/fp32.onnx", "agreement"),
        ("fashion_mnist/fp32.tflite", "agreement"),
        ("silero_vad/silero_vad_16k.onnx", "nmse"),
        ("basic_pitch/nmp.onnx", "cosine"),
    ],
)
def test_models_of_ours_are_judged_by_what_they_answer(path: str, expected: str) -> None:
    source = models.read(Path("examples") / path)
    inputs = {
        spec.name: RNG.normal(size=(4, *(spec.shape[1:] if spec.shape[0] < 2 else spec.shape)))
        for spec in source.inputs
    }
    data = Dataset({key: one.astype(np.float32) for key, one in inputs.items()}, None, "noise")
    found = judging.judged(
        Evaluation(), source.outputs, None, None, "", looking.looks(source, data)
    )
    assert found.name == expected
    assert not found.note or found.note.startswith(f"only output {found.output!r} is judged")


def test_a_guess_is_told_with_what_would_change_it() -> None:
    for operator, name, other in (("Gemm", "agreement", "cosine"), ("Div", "cosine", "agreement")):
        found = judging.judged(
            Evaluation(),
            (TensorSpec("y", "FP32", (-1, 6)),),
            None,
            look=lambda _, operator=operator: Look(operator, LOGITS),  # type: ignore[misc]
        )
        assert found.name == name and f"the metric is {other}" in found.note


# --- the code of a metric is part of what a trial is called ---------------------------------------

METRIC = "import numpy as np\ndef right(outputs, labels):\n    return np.zeros(len(outputs)) + {}\n"


def test_a_trial_judged_by_other_code_is_another_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given_metric.py").write_text(METRIC.format(0))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "given_metric", raising=False)
    (tmp_path / "colour.onnx").write_bytes(network())
    shape = models.read(tmp_path / "colour.onnx").inputs[0].shape[1:]
    x = RNG.random((30, *shape)).astype(np.float32)

    def key(**more: Any) -> str:
        np.savez(tmp_path / "data.npz", x=x, y=np.zeros(30), **more)
        ready = workflow.prepare(
            Recipe(
                "colour",
                str(tmp_path / "colour.onnx"),
                Data(str(tmp_path / "data.npz")),
                evaluation=Evaluation("callable", callable="given_metric:right"),
                variants=(Variant("fp32"),),
            )
        )
        return trials.key(ready, chains([Variant("fp32")], ready.source)[0])

    first = key()
    assert key() == first
    assert key(groups=np.arange(30) // 2) != first
    (tmp_path / "given_metric.py").write_text(METRIC.format(1))
    assert key() != first
    assert foreign.code_sha256("", "nowhere") == ""
