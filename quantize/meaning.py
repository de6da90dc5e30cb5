"""What an output [N, C] without labels holds: scores of classes, or an embedding.

Law of this file: pure. Of scores counts where the largest lies, of an embedding the direction; a
metric that is meant for the other says little. What cannot be told is taken for scores, and that is
said: agreement of the largest value refuses a good embedding sooner than cosine, which hardly sees
that two close classes changed places, lets wrong classes pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

SCORES, EMBEDDING = "scores of classes", "an embedding"
# Float32 sums of a thousand values are exact to five digits; float16's to three.
TOLERANCE = 5e-3
# What the output's name says, and the operator that it comes from; the first that fits counts.
NAMES = {
    "logit": SCORES,
    "prob": SCORES,
    "softmax": SCORES,
    "score": SCORES,
    "class": SCORES,
    "embed": EMBEDDING,
    "feature": EMBEDDING,
    "pool": EMBEDDING,
    "hidden": EMBEDDING,
    "vector": EMBEDDING,
}
OPERATORS = {
    "Softmax": (SCORES, True),
    "LogSoftmax": (SCORES, True),
    "Sigmoid": (SCORES, True),
    "LpNormalization": (EMBEDDING, True),
    "Gemm": (SCORES, False),  # or the last projection of an encoder
    "MatMul": (SCORES, False),
    "Conv": (SCORES, False),
    "GlobalAveragePool": (EMBEDDING, False),
    "ReduceMean": (EMBEDDING, False),
    "ReduceSum": (EMBEDDING, False),
    "Div": (EMBEDDING, False),  # by a length, or by the number of tokens
    "LayerNormalization": (EMBEDDING, False),
    "BatchNormalization": (EMBEDDING, False),
    "Tanh": (EMBEDDING, False),
}


class Look(NamedTuple):
    """What is seen of an output: the operator it comes from (empty: unknown), and answers."""

    operator: str
    answers: Array | None


class Meaning(NamedTuple):
    """What it is taken for, whether that is certain, and why."""

    kind: str
    is_sure: bool
    why: str


def meaning(name: str, look: Look) -> Meaning:
    """What the output of that name holds. Answers are [samples, C]; C is more than 1."""
    seen = _of_values(look.answers)
    if seen is not None:
        return seen
    kind, is_sure = OPERATORS.get(look.operator, ("", False))
    if is_sure:
        return Meaning(kind, True, f"it comes from {look.operator}")
    named = next((kind for word, kind in NAMES.items() if word in name.lower()), "")
    if named:
        return Meaning(named, True, "so it is called")
    if kind:
        return Meaning(kind, False, f"it comes from {look.operator}")
    return Meaning(SCORES, False, "nothing says otherwise")


def _of_values(answers: Array | None) -> Meaning | None:
    """What the answers themselves prove; rows that sum to 1 first: a sure one has length 1 too."""
    if answers is None or len(answers) < 2 or not np.isfinite(answers).all():
        return None
    flat = answers.reshape(len(answers), -1).astype(np.float64)
    if flat.min() >= 0 and np.allclose(flat.sum(axis=1), 1, atol=TOLERANCE):
        return Meaning(SCORES, True, "each answer is positive and sums to 1")
    if np.allclose(np.linalg.norm(flat, axis=1), 1, atol=TOLERANCE):
        return Meaning(EMBEDDING, True, "each answer has length 1")
    return None
