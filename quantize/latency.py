"""How long a run takes: every variant in one process, in turn, round after round.

Law of this file: run as `python -m quantize.latency` with the variants as JSON on stdin, it times
what a worker does (the backend's own bound run) and prints JSON; imported, it gives the function
that starts that process. A library that dies costs its variant, not the caller. Interleaving makes
a noisy machine hit all variants alike; what is compared are medians of the same rounds.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_runtime import tensors
from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError, ModelError
from edge_runtime.serving import sandbox
from edge_runtime.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# A round runs a variant until so much time has passed, and at least RUNS_MIN times.
ROUND_S = 0.02
RUNS_MIN = 3
RUNS_MAX = 500
WARMUP_RUNS = 5
# After so long no further round begins: a model of a second a run would take half an hour with ten
# variants, and a median needs no thirty rounds where a run is long.
ROUNDS_S_MAX = 90.0
ROUNDS_LEAST = 5
PROCESS_S_MAX = 900.0


class Timed(msgspec.Struct, frozen=True):
    """Milliseconds of one run at batch 1.

    Attributes:
        p50_ms, p95_ms: over all runs. spread_ms: half the range of the middle half of the rounds'
            medians. rounds_ms: each round's median, for ratios of the same rounds.
    """

    p50_ms: float
    p95_ms: float
    spread_ms: float
    rounds_ms: tuple[float, ...]
    load_ms: float
    version: str


class Job(msgspec.Struct, frozen=True):
    """One variant to be timed."""

    name: str
    path: str
    backend: str
    options: dict[str, Any]


class Order(msgspec.Struct, frozen=True):
    """What the process is told: variants, names of inputs, and a sample of each (an .npz)."""

    jobs: tuple[Job, ...]
    names: tuple[str, ...]
    sample: str
    rounds: int


def measure(
    jobs: Sequence[Job], sample: dict[str, Array], rounds: int, folder: Path
) -> dict[str, Timed | str]:
    """Times by variant; a text instead says why there are none.

    If the process dies, each variant is measured alone, so that only the guilty one has none.

    Args:
        sample: one input by name, with its batch axis of 1.
    """
    found = _measured(jobs, sample, rounds, folder)
    if isinstance(found, dict):
        return found
    if len(jobs) == 1:
        return {jobs[0].name: found}
    alone = [_measured([job], sample, rounds, folder) for job in jobs]
    return {
        job.name: one if isinstance(one, str) else one[job.name]
        for job, one in zip(jobs, alone, strict=True)
    }


def ratio(reference: Timed, variant: Timed) -> float:
    """How many times faster the variant is: the median of the rounds' ratios."""
    pairs = zip(reference.rounds_ms, variant.rounds_ms, strict=False)
    return statistics.median(a / b for a, b in pairs if b > 0)


def _measured(
    jobs: Sequence[Job], sample: dict[str, Array], rounds: int, folder: Path
) -> dict[str, Timed | str] | str:
    path = folder / "sample.npz"
    np.savez(path, *sample.values())  # named arr_0, arr_1, ...
    order = Order(tuple(jobs), tuple(sample), str(path), rounds)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "quantize.latency"],
            input=msgspec.json.encode(order),
            capture_output=True,
            timeout=PROCESS_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"measuring took longer than {PROCESS_S_MAX:g} s"
    if done.returncode != 0:
        return f"the process that measured ended with {done.returncode}"
    lines = done.stdout.decode().strip().splitlines()
    said = json.loads(lines[-1])
    return {
        name: one if isinstance(one, str) else msgspec.convert(one, Timed)
        for name, one in said.items()
    }


# --- in the process -------------------------------------------------------------------------------


def _run(order: Order) -> dict[str, Any]:
    with np.load(order.sample, allow_pickle=False) as archive:
        sample = {name: archive[f"arr_{index}"] for index, name in enumerate(order.names)}
    runs: dict[str, Callable[[], Any]] = {}
    said: dict[str, Any] = {}
    loads: dict[str, tuple[float, str]] = {}
    for job in order.jobs:
        try:
            runs[job.name], loads[job.name] = _loaded(job, sample)
        except EdgeError as error:
            said[job.name] = str(error)
    times = _rounds(runs, order.rounds, time.monotonic)
    return said | {name: _timed(rounds, *loads[name]) for name, rounds in times.items()}


def _rounds(
    runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[list[float]]]:
    """Milliseconds by variant and round; fewer rounds where a model is so slow that they last."""
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    began_s = clock()
    for number in range(rounds):
        if number >= ROUNDS_LEAST and clock() - began_s > ROUNDS_S_MAX:
            break
        names = list(runs)
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(_round(runs[name]))
    return times


def _loaded(job: Job, sample: dict[str, Array]) -> tuple[Callable[[], Any], tuple[float, str]]:
    library = backend(job.backend)
    version = library.version()
    began_ns = time.perf_counter_ns()
    model = library.load(Path(job.path), job.options)
    load_ms = (time.perf_counter_ns() - began_ns) / 1e6
    arrays = list(sample.values())
    if set(sample) == {spec.name for spec in model.inputs}:  # else in the order they have
        arrays = [sample[spec.name] for spec in model.inputs]
    inputs = {spec.name: _fitted(a, spec) for spec, a in zip(model.inputs, arrays, strict=True)}
    outputs = model.run(inputs)
    free: dict[str, Array | None] = {name: np.empty_like(array) for name, array in outputs.items()}
    run = model.bind(inputs, free)
    for _ in range(WARMUP_RUNS):
        run()
    return run, (load_ms, version)


def _fitted(array: Array, spec: TensorSpec) -> Array:
    if not tensors.shape_matches(array.shape, spec.shape):
        raise ModelError(
            f"input {spec.name!r} takes {list(spec.shape)}", expected=str(list(array.shape))
        )
    return np.asarray(array, order="C")  # ascontiguousarray gives an axis to what has none


def _round(run: Callable[[], Any]) -> list[float]:
    run()  # the other variants emptied the caches
    times_ms: list[float] = []
    until_ns = time.perf_counter_ns() + round(ROUND_S * 1e9)
    while len(times_ms) < RUNS_MIN or (
        time.perf_counter_ns() < until_ns and len(times_ms) < RUNS_MAX
    ):
        began_ns = time.perf_counter_ns()
        run()
        times_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return times_ms


def _timed(rounds: list[list[float]], load_ms: float, version: str) -> dict[str, Any]:
    every = sorted(time_ms for one in rounds for time_ms in one)
    medians = [statistics.median(one) for one in rounds]
    quartiles = statistics.quantiles(medians, n=4)
    return {
        "p50_ms": statistics.median(every),
        "p95_ms": every[min(len(every) - 1, round(0.95 * len(every)))],
        "spread_ms": (quartiles[2] - quartiles[0]) / 2,
        "rounds_ms": medians,
        "load_ms": load_ms,
        "version": version,
    }


if __name__ == "__main__":
    sandbox.die_with_parent(signal.SIGKILL)
    result = _run(msgspec.json.decode(sys.stdin.buffer.read(), type=Order))
    print(json.dumps(result))
