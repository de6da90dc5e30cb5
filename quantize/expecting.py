"""How long a run will take: one measured run of the float model, scaled.

Law of this file: it measures a few runs and multiplies; the factors are what passes and steps took
in runs of ours, in units of one run of the float model. A plan, not a promise: within a factor of
two for models of 0.1 ms to 50 ms a run.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from edge_runtime.backends import backend
from quantize import datasets, latency
from quantize.workflow import Prepared

RUNS = 5
# Start of the daemon, the first worker of a backend, packing and proving: measured once.
FIXED_S = 4.0
SERVE_S = 0.8  # installing, loading and unloading one variant
# A request by socket beside the run itself, in milliseconds of one sample.
REQUEST_MS = 0.05
# Runs of the float model per calibration sample, by pass; other passes take seconds at most.
RUNS_PER_SAMPLE = {"static_int8": 4.0, "nncf_int8": 4.0, "nncf_accuracy": 20.0, "tflite_int8": 10.0}
PASS_S = {"nncf_int8": 3.0, "nncf_accuracy": 6.0, "clean": 0.1}
PASS_DEFAULT_S = 0.5
HISTOGRAM_FACTOR = 3.0  # methods that keep counts, not only ranges
OBSERVED_RUNS = 4.0  # two looks at each of two sets, outputs of all layers copied


class Expected(NamedTuple):
    """Seconds in all, and by variant in the plan's order; `run_ms` of the float model."""

    seconds: float
    by_variant: tuple[float, ...]
    run_ms: float


def expect(ready: Prepared) -> Expected:
    """What `workflow.run` would take here.

    Raises:
        EdgeError: the float model does not load or run.
    """
    run_ms = _run_ms(ready)
    by_variant = tuple(_variant_s(ready, index, run_ms) for index in range(len(ready.chains)))
    observed = OBSERVED_RUNS * 2 * min(512, len(ready.split.evaluation)) * run_ms / 1e3
    return Expected(FIXED_S + observed + sum(by_variant), by_variant, run_ms)


def _run_ms(ready: Prepared) -> float:
    """The median of RUNS runs at batch 1 after one that warms up."""
    variant = ready.chains[0].variant
    path = ready.source.on(variant.backend).path
    model = backend(variant.backend).load(path, ready.judge.options(variant))
    sample = next(datasets.batches(ready.split.evaluation.inputs, 1, ready.source.inputs))
    model.run(sample)
    times_ms = []
    for _ in range(RUNS):
        began_ns = time.perf_counter_ns()
        model.run(sample)
        times_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return float(np.median(times_ms))


def _variant_s(ready: Prepared, index: int, run_ms: float) -> float:
    made = sum(_pass_s(step, len(ready.split.calibration), run_ms) for step in _steps(ready, index))
    asked = len(ready.split.evaluation) * (run_ms + REQUEST_MS) / 1e3
    round_s = max(latency.ROUND_S, (latency.RUNS_MIN + 1) * run_ms / 1e3)
    return made + SERVE_S + asked + ready.recipe.evaluation.rounds * round_s


def _steps(ready: Prepared, index: int) -> tuple[dict[str, object], ...]:
    return ready.chains[index].variant.passes


def _pass_s(step: dict[str, object], samples: int, run_ms: float) -> float:
    name = str(step["use"])
    factor = HISTOGRAM_FACTOR if step.get("method", "minmax") != "minmax" else 1.0
    runs = RUNS_PER_SAMPLE.get(name, 0.0) * factor * samples
    return PASS_S.get(name, PASS_DEFAULT_S) + runs * run_ms / 1e3
