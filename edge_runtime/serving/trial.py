"""A trial: two pages of counts about a candidate beside the serving version, and what they say.

Law of this file: the layout of the pages, and from their words to a report; values only, no numpy.
One page is written by the serving worker, one by the candidate, and both belong to the supervisor,
so that a death of either takes no count along. A worker never reads what the other one wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edge_runtime import metrics
from edge_runtime.serving import page

# --- the serving worker's page ---
SEEN = 0  # answers of runs: what the sample is taken from
SHOWN = 1  # passed to the candidate with their inputs
DROPPED_FULL = 2  # of the sample: the candidate lags behind
DROPPED_LARGE = 3  # of the sample: larger than half of the queue
SKIPPED = 4  # of the sample: cannot be shown (an output overwrites an input)
CHOSEN = 8  # requests that the share gives to the candidate
ANSWERED = 9  # by it
HELD = 10  # not passed on: it has enough to do
TOO_SLOW = 11  # taken back after waiting
REFUSED = 12  # it answered with an error
LOST = 13  # it was gone
ROUND_TRIP = 64  # histogram: passed on to answered

# --- the candidate's page ---
COMPARED = 0
DISAGREED = 1
ERRORS = 2  # its runs that failed, and requests that it does not understand
OUTPUT = 16  # .. + OUTPUTS_MAX * OUTPUT_WORDS
OUTPUTS_MAX = 16  # in the order of the manifest; the others count for DISAGREED only
OUTPUT_WORDS = 10
# Words of an output; the last three are FP64.
COUNT, UNLIKE, OUTSIDE, ROWS, AGREED, COSINES, MAX_ABS, COSINE_MIN, COSINE_SUM = range(9)
STABLE_RUN = OUTPUT + OUTPUTS_MAX * OUTPUT_WORDS  # histogram: of the same requests, run alone
CANDIDATE_RUN = STABLE_RUN + metrics.WORDS
TEXT = CANDIDATE_RUN + metrics.WORDS  # the newest error, UTF-8, zero at its end
TEXT_BYTES_MAX = 240
assert TEXT * 8 + TEXT_BYTES_MAX < page.PAGE_SIZE

# Metric, its last label, the page (0: the serving worker's, 1: the candidate's), the word.
_COUNTERS: tuple[tuple[str, tuple[str, ...], int, int], ...] = (
    ("edge_trial_shown_total", (), 0, SHOWN),
    ("edge_trial_dropped_total", ("full",), 0, DROPPED_FULL),
    ("edge_trial_dropped_total", ("large",), 0, DROPPED_LARGE),
    ("edge_trial_dropped_total", ("skipped",), 0, SKIPPED),
    ("edge_trial_compared_total", (), 1, COMPARED),
    ("edge_trial_disagreed_total", (), 1, DISAGREED),
    ("edge_trial_errors_total", (), 1, ERRORS),
    ("edge_trial_requests_total", ("answered",), 0, ANSWERED),
    ("edge_trial_requests_total", ("held",), 0, HELD),
    ("edge_trial_requests_total", ("too_slow",), 0, TOO_SLOW),
    ("edge_trial_requests_total", ("refused",), 0, REFUSED),
    ("edge_trial_requests_total", ("lost",), 0, LOST),
)
_HISTOGRAMS: tuple[tuple[str, tuple[str, ...], int, int], ...] = (
    ("edge_trial_run_duration_seconds", ("stable",), 1, STABLE_RUN),
    ("edge_trial_run_duration_seconds", ("candidate",), 1, CANDIDATE_RUN),
    ("edge_trial_round_trip_seconds", (), 0, ROUND_TRIP),
)


def numbers(words: memoryview) -> memoryview[float]:
    """The same page as FP64."""
    return words.cast("B").cast("d")


def write_text(words: memoryview, text: str) -> None:
    """Put an error's text on the page."""
    data = text.encode()[:TEXT_BYTES_MAX].ljust(TEXT_BYTES_MAX, b"\0")
    words.cast("B")[TEXT * 8 : TEXT * 8 + TEXT_BYTES_MAX] = data


def report(stable: memoryview, candidate: memoryview, outputs: Sequence[str]) -> dict[str, Any]:
    """What both pages say; keys are documented in docs/shadow.md.

    Args:
        outputs: names, in the order of the candidate's manifest.
    """
    return {"shadow": _shadow(stable, candidate, outputs), "split": _split(stable)}


def samples(
    stable: memoryview, candidate: memoryview, labels: tuple[str, ...]
) -> Iterator[metrics.Sample]:
    """The counts of both pages for Prometheus; `labels`: the values of metrics.TRIAL."""
    pages = stable, candidate
    for name, more, page_number, word in _COUNTERS:
        yield metrics.Sample(name, (*labels, *more), pages[page_number][word])
    for name, more, page_number, word in _HISTOGRAMS:
        histogram = pages[page_number][word : word + metrics.WORDS].tolist()
        yield metrics.Sample(name, (*labels, *more), histogram)


def _shadow(stable: memoryview, candidate: memoryview, outputs: Sequence[str]) -> dict[str, Any]:
    dropped = stable[DROPPED_FULL] + stable[DROPPED_LARGE] + stable[SKIPPED]
    compared = candidate[COMPARED]
    return {
        "seen": stable[SEEN],
        "sampled": stable[SHOWN] + dropped,
        "compared": compared,
        "waiting": max(stable[SHOWN] - compared - candidate[ERRORS], 0),
        "dropped": dropped,
        "dropped_full": stable[DROPPED_FULL],
        "dropped_large": stable[DROPPED_LARGE],
        "skipped": stable[SKIPPED],
        "errors": candidate[ERRORS],
        "last_error": _text(candidate),
        "disagreed": candidate[DISAGREED],
        "disagreement": candidate[DISAGREED] / compared if compared else None,
        "outputs": {
            name: _output(candidate, OUTPUT + index * OUTPUT_WORDS)
            for index, name in enumerate(outputs[:OUTPUTS_MAX])
        },
        "stable_run": _latency(candidate, STABLE_RUN),
        "candidate_run": _latency(candidate, CANDIDATE_RUN),
    }


def _output(words: memoryview, at: int) -> dict[str, Any]:
    reals = numbers(words)
    rows, cosines = words[at + ROWS], words[at + COSINES]
    return {
        "count": words[at + COUNT],
        "unlike": words[at + UNLIKE],
        "outside_tolerance": words[at + OUTSIDE],
        "top1_agreement": words[at + AGREED] / rows if rows else None,
        "max_abs": reals[at + MAX_ABS],
        "cosine_min": reals[at + COSINE_MIN] if cosines else None,
        "cosine_mean": reals[at + COSINE_SUM] / cosines if cosines else None,
    }


def _split(stable: memoryview) -> dict[str, Any]:
    return {
        "chosen": stable[CHOSEN],
        "answered": stable[ANSWERED],
        "held": stable[HELD],
        "too_slow": stable[TOO_SLOW],
        "refused": stable[REFUSED],
        "lost": stable[LOST],
        "round_trip": _latency(stable, ROUND_TRIP),
    }


def _latency(words: memoryview, at: int) -> dict[str, Any]:
    histogram = words[at : at + metrics.WORDS].tolist()
    p50, p99 = (metrics.quantile_s(histogram, share) for share in (0.5, 0.99))
    return {
        "count": metrics.count(histogram),
        "p50_ms": None if p50 is None else p50 * 1e3,
        "p99_ms": None if p99 is None else p99 * 1e3,
    }


def _text(words: memoryview) -> str:
    data = words.tobytes()[TEXT * 8 : TEXT * 8 + TEXT_BYTES_MAX]
    return data.partition(b"\0")[0].decode(errors="replace")
