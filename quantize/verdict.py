"""Whether a variant may be shipped: its figures against the budgets, and the reason in words.

Law of this file: pure. The first reason found is the one told, the gravest first: wrong answers,
then memory and size, then "it is no faster". A figure that is missing refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quantize import checks, scores
from quantize.recipe import Budgets
from quantize.results import Evaluated, Finding, percent
from quantize.scores import Difference

# Two medians of interleaved rounds differ by so much through chance on a machine of two shared
# cores (half the spread of repeated runs of the same model): below it "slower" is not claimed.
NOISE = 0.03
WORSE, UNPROVEN = "answers are worse", "not proven right"
# Passes that read ranges of the calibration set, and so inherit its faults.
CALIBRATED = frozenset({"static_int8", "nncf_int8", "nncf_accuracy", "tflite_int8"})


def refusal(
    one: Evaluated, reference: Evaluated, budgets: Budgets, drop_max: float, samples: int
) -> str:
    """Why the variant is not shipped; empty if it is. `samples`: that judged."""
    if one.refusal:
        return one.refusal
    if one.name == reference.name:
        return ""
    return (
        _wrong(one, reference, budgets, drop_max, samples)
        or _too_large(one, budgets)
        or _too_slow(one, budgets)
    )


def explained(one: Evaluated, findings: Sequence[Finding]) -> Evaluated:
    """The variant with what is wrong with the data after a refusal for its answers."""
    if not one.refusal.startswith((WORSE, UNPROVEN)):
        return one
    if not any(step["use"] in CALIBRATED for step in one.steps):
        return one
    because = checks.reason(findings, one.name)
    if not because:
        return one
    return msgspec.structs.replace(one, refusal=f"{one.refusal}; likely because of {because}")


def dominated(one: Evaluated, others: Sequence[Evaluated]) -> str:
    """Why a variant is not needed beside the others on its backend; empty if it is.

    Another is as right (to within what is measurable), as fast, and as small, compressed too.
    """
    for other in others:
        if other.name != one.name and other.backend == one.backend and _as_good(other, one):
            return f"{other.name} is as good, as far as can be told: answers, speed, size"
    return ""


def _as_good(other: Evaluated, one: Evaluated) -> bool:
    assert other.score is not None and one.score is not None
    as_right = other.score.high >= one.score.value
    as_fast = other.p50_ms <= one.p50_ms * (1 + NOISE)
    as_small = other.size_bytes <= one.size_bytes * (1 + NOISE)
    packs_as_small = other.packed_bytes <= one.packed_bytes * (1 + NOISE)
    return as_right and as_fast and as_small and packs_as_small


def _wrong(
    one: Evaluated, reference: Evaluated, budgets: Budgets, drop_max: float, samples: int
) -> str:
    lost = one.against
    if lost is None or one.score is None or reference.score is None:
        return "its answers were not judged"
    figures = (
        f"{one.score.value:.4f} instead of {reference.score.value:.4f} on {one.backend}"
        f" {one.backend_version}"
    )
    if not lost.drop <= drop_max:  # not a number is no proof
        return f"{WORSE}: {figures}, a loss of {_figure(lost.drop)} where {drop_max:g} is allowed"
    if not lost.bound <= drop_max:
        return (
            f"{UNPROVEN}: {figures}; at {percent(budgets.confidence)} confidence it may lose"
            f" {_figure(lost.bound)}, allowed is {drop_max:g};"
            f" {_enough(lost, samples, drop_max, budgets.confidence)}"
        )
    return ""


def _figure(value: float) -> str:
    """A loss with digits enough to be compared with a small budget."""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"


def _enough(lost: Difference, samples: int, drop_max: float, confidence: float) -> str:
    """How many samples would do, in words."""
    count = enough(lost, samples, drop_max, confidence)
    if not count:
        return f"{samples} samples judged, and no number of them is likely to prove it"
    return f"{samples} samples judged, about {count} like these would prove it"


def enough(lost: Difference, samples: int, drop_max: float, confidence: float) -> int:
    """scores.samples_enough, rounded up to two digits: it is a guess."""
    count = scores.samples_enough(lost, samples, drop_max, confidence)
    unit: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit


def _too_large(one: Evaluated, budgets: Budgets) -> str:
    if budgets.size_bytes_max and one.size_bytes > budgets.size_bytes_max:
        return f"its file has {one.size_bytes} bytes, allowed are {budgets.size_bytes_max}"
    if budgets.memory_bytes_max and one.memory_bytes > budgets.memory_bytes_max:
        return (
            f"it takes {one.memory_bytes} bytes of memory, allowed are {budgets.memory_bytes_max}"
        )
    return ""


def _too_slow(one: Evaluated, budgets: Budgets) -> str:
    if not one.p50_ms:
        return "its latency was not measured"
    if budgets.latency_ms_max and one.p50_ms > budgets.latency_ms_max:
        return f"a run takes {one.p50_ms:.3f} ms, allowed are {budgets.latency_ms_max:g}"
    if budgets.speedup_min and one.speedup < budgets.speedup_min * (1 - NOISE):
        because = "; ".join(note for note in one.notes if note.startswith("slower:"))
        return (
            f"it is not faster: {one.speedup:.2f} times the float model's speed, at least"
            f" {budgets.speedup_min:g} is wanted" + (f" ({because})" if because else "")
        )
    return ""
