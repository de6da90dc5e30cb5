"""Loads one variant and runs it when told to: `python -m edge_runtime.serving.timing`.

Law of this file: a program of its own, because a library may end the process that imports it, and
so that several of them can be measured in turns. One JSON line in (`Job`), one out (`Loaded`); then
for each line with a number of runs, one out (`Turn`). It ends when its input does. What the library
writes to stdout goes to stderr. It chooses nothing: `edge_runtime.cli.learning` does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edge_runtime.backends import backend
from edge_runtime.backends.protocol import Model
from edge_runtime.errors import EdgeError
from edge_runtime.serving.spec import GoldenPair
from edge_runtime.tensors import TensorSpec

WARMUP_RUNS = 3  # what is paid once is not a run's time
# A free dimension is measured as one row, as most requests are.
FREE_DIMENSION = 1


class Job(msgspec.Struct, frozen=True):
    """What to load, and what to run it on: the first golden, or zeros."""

    backend: str
    artifact: str
    options: dict[str, Any] = {}
    inputs: tuple[TensorSpec, ...] = ()
    goldens: tuple[GoldenPair, ...] = ()
    rtol: float = 1e-3
    atol: float = 1e-4


class Loaded(msgspec.Struct, frozen=True):
    """What came of it."""

    error: str = ""  # why it is not measured; "": it is
    version: str = ""  # of the library
    device: str = ""  # where it runs
    run_ns: int = 0  # a first impression, for the number of runs of a turn
    private_bytes: int = 0  # of this process, with the library, after a run


class Turn(msgspec.Struct, frozen=True):
    """The median of some runs."""

    run_ns: int
    private_bytes: int


def main() -> int:
    """Serve one job until the input ends; 0, whatever came of it."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library's chatter is no answer
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        run, loaded = _load(job)
    except (EdgeError, OSError) as error:
        _say(answers, Loaded(error=str(error)))
        return 0
    _say(answers, loaded)
    for line in sys.stdin.buffer:
        _say(answers, Turn(_median_ns(run, int(line)), _private_bytes()))
    return 0


def _load(job: Job) -> tuple[Callable[[], Any], Loaded]:
    from edge_runtime.serving import goldens

    library = backend(job.backend)
    version = library.version()
    model = library.load(Path(job.artifact), job.options)
    goldens.check(model.run, job.goldens, job.rtol, job.atol)
    run = model.bind(_feed(job), {one.name: None for one in model.outputs})
    for _ in range(WARMUP_RUNS):
        run()
    return run, Loaded(
        version=version,
        device=_device(model),
        run_ns=_median_ns(run, 1),
        private_bytes=_private_bytes(),
    )


def _feed(job: Job) -> dict[str, Any]:
    import numpy as np

    from edge_runtime.serving import goldens

    if job.goldens:
        recorded = goldens.inputs_of(job.goldens[0])
        return {name: np.asarray(array, order="C") for name, array in recorded.items()}
    return {one.name: _zeros(one) for one in job.inputs}


def _zeros(spec: TensorSpec) -> Any:
    from edge_runtime import tensors

    shape = tuple(FREE_DIMENSION if size < 0 else size for size in spec.shape)
    return tensors.from_bytes(bytes(tensors.byte_size(spec.datatype, shape)), spec.datatype, shape)


def _device(model: Model) -> str:
    return ", ".join(dict.fromkeys(one.device for one in model.placement)) or "not known"


def _median_ns(run: Callable[[], Any], runs: int) -> int:
    times = []
    for _ in range(max(runs, 1)):
        began_ns = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - began_ns)
    return sorted(times)[len(times) // 2]


def _private_bytes() -> int:
    """What the end of this process gives back; 0: the kernel does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    fields = [line.split() for line in lines if line.startswith("Private_")]
    return sum(int(field[1]) for field in fields) * 1024


def _say(answers: BinaryIO, answer: msgspec.Struct) -> None:
    answers.write(msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
