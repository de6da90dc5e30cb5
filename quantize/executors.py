"""Independent jobs, where they run, and what happens when one is lost.

Law of this file: the retry policy (`run`), the same for every executor, and the executor of this
machine. A job is a function by name and plain values; it runs in a process of its own, so that a
library that dies costs one attempt. Run as `python -m quantize.executors OUT` it is that process:
the job as JSON on stdin, what it said as JSON in the file OUT.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import msgspec

from edge_runtime.errors import EdgeError, StorageError, UsageError
from edge_runtime.serving import sandbox

# A job that dies so often is its own fault, not the machine's: a library that crashes on a model.
ATTEMPTS_MAX = 3
# One candidate of a large network on a slow machine; a job that hangs must not hang the search.
JOB_S_MAX = 3600.0


class Job(msgspec.Struct, frozen=True):
    """`function` is "module:function"; it takes `order` and returns plain values (JSON)."""

    key: str
    function: str
    order: dict[str, Any]


class Said(msgspec.Struct, frozen=True):
    """What a job answered, or why it refused; a refusal is not tried again by `run`.

    `passing`: the refusal says more of this machine's hour (memory, disk) than of the job.
    """

    result: Any = None
    refusal: str = ""
    passing: bool = False


class Done(msgspec.Struct, frozen=True):
    """The end of a job."""

    key: str
    said: Said
    attempts: int


class Executor(Protocol):
    """Runs at most `workers` jobs at a time."""

    workers: int

    def submit(self, job: Job) -> None:
        """Start it; fewer than `workers` are running."""

    def wait(self, timeout_s: float) -> list[tuple[str, Said | str]]:
        """(key, answer) of those that ended, or (key, how it was lost); empty: none in time."""

    def cancel(self, key: str) -> None:
        """End it; `wait` does not name it any more."""

    def close(self) -> None:
        """End all. `with` does it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class _Running(NamedTuple):
    job: Job
    attempt: int
    deadline_s: float


def run(
    executor: Executor,
    jobs: Sequence[Job],
    job_s_max: float = JOB_S_MAX,
    now_s: Callable[[], float] = time.monotonic,
    may_begin: Callable[[], bool] = lambda: True,
    tick: Callable[[], None] = lambda: None,
    tick_s: float = JOB_S_MAX,
    attempts_max: int = ATTEMPTS_MAX,
) -> Iterator[Done]:
    """Every job's end, in the order of ending. A lost job is tried `attempts_max` times in all.

    Jobs that have not begun when `may_begin` says no are left out. `tick` is called after every
    wait, and a wait is no longer than `tick_s`.
    Whoever stops reading early must close the executor.
    """
    waiting = deque((job, 1) for job in jobs)
    running: dict[str, _Running] = {}
    while waiting or running:
        while waiting and len(running) < executor.workers:
            if not may_begin():
                waiting.clear()
                break
            job, attempt = waiting.popleft()
            running[job.key] = _Running(job, attempt, now_s() + job_s_max)
            executor.submit(job)
        if not running:
            return
        first_s = min(one.deadline_s for one in running.values())
        ended = executor.wait(min(max(first_s - now_s(), 0.0), tick_s))
        tick()
        for key, said in ended:
            one = running.pop(key)
            if isinstance(said, Said):
                yield Done(key, said, one.attempt)
            elif one.attempt < attempts_max:
                waiting.append((one.job, one.attempt + 1))
            else:
                lost = f"lost {one.attempt} times: " if one.attempt > 1 else ""
                yield Done(key, Said(refusal=f"{lost}{said}", passing=True), one.attempt)
        for key in [key for key, one in running.items() if one.deadline_s <= now_s()]:
            executor.cancel(key)
            refusal = f"took longer than {job_s_max:g} s"
            yield Done(key, Said(refusal=refusal), running.pop(key).attempt)


def call(job: Job) -> Said:
    """Do the job here. Every failure is an answer; only a death of the process is not."""
    module, _, name = job.function.partition(":")
    try:
        return Said(getattr(importlib.import_module(module), name)(job.order))
    except EdgeError as error:
        return Said(refusal=str(error), passing=isinstance(error, StorageError))
    except Exception as error:  # noqa: BLE001 - the job's end must be known where it was asked for
        return Said(refusal=f"unexpected {type(error).__name__}: {error}", passing=True)


def call_json(job: bytes) -> bytes:
    """`call` for those who move bytes."""
    return msgspec.json.encode(call(msgspec.json.decode(job, type=Job)))


# --- this machine ---------------------------------------------------------------------------------


class _Process(NamedTuple):
    process: subprocess.Popen[bytes]
    pidfd: int
    out: Path
    log: Path


class LocalExecutor:
    """A process per job; one at a time where nothing else is said, for jobs take all they get."""

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers or 1
        self._folder = tempfile.TemporaryDirectory(prefix="edge-q-jobs-")
        self._running: dict[str, _Process] = {}
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """See Executor."""
        assert job.key not in self._running, "a key per job"
        self._count += 1
        stem = Path(self._folder.name) / f"job{self._count}"
        order, out, log = (stem.with_suffix(end) for end in (".order", ".said", ".log"))
        order.write_bytes(msgspec.json.encode(job))
        with order.open("rb") as stdin, log.open("wb") as sink:
            command = [sys.executable, "-m", "quantize.executors", str(out)]
            process = subprocess.Popen(
                command, stdin=stdin, stdout=sink, stderr=sink, process_group=0
            )
        self._running[job.key] = _Process(process, os.pidfd_open(process.pid), out, log)

    def wait(self, timeout_s: float) -> list[tuple[str, Said | str]]:
        """See Executor."""
        poll = select.poll()
        keys = {one.pidfd: key for key, one in self._running.items()}
        for pidfd in keys:
            poll.register(pidfd, select.POLLIN)
        return [(keys[fd], self._ended(keys[fd])) for fd, _ in poll.poll(timeout_s * 1000)]

    def cancel(self, key: str) -> None:
        """See Executor."""
        _end(self._running.pop(key))

    def close(self) -> None:
        """See Executor."""
        for key in list(self._running):
            self.cancel(key)
        self._folder.cleanup()

    def _ended(self, key: str) -> Said | str:
        one = self._running.pop(key)
        code = _end(one)
        if code == 0 and one.out.exists():
            return msgspec.json.decode(one.out.read_bytes(), type=Said)
        last = one.log.read_text(errors="replace").strip().splitlines()[-1:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f" ({last[0][:200]})" if last else "")


def _end(one: _Process) -> int:
    """The exit code of a job that has ended or now does, with whatever processes it began: a
    training's loaders of data among them. Its number is its group's until it is waited for."""
    os.killpg(one.process.pid, signal.SIGKILL)
    os.close(one.pidfd)
    return one.process.wait()


# name -> "module:class"; each takes the number of workers (0: what it thinks right).
EXECUTORS = {"local": "quantize.executors:LocalExecutor", "ray": "quantize.ray_door:RayExecutor"}


def executor(name: str, workers: int = 0) -> Executor:
    """The executor of that name.

    Raises:
        UsageError: unknown, or its library is not installed.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor {name!r}", expected="one of " + ", ".join(EXECUTORS))
    module, _, kind = EXECUTORS[name].partition(":")
    found: Executor = getattr(importlib.import_module(module), kind)(workers)
    return found


def _main() -> None:
    sandbox.die_with_parent(signal.SIGKILL)
    out = Path(sys.argv[1])
    draft = out.with_suffix(".draft")
    draft.write_bytes(call_json(sys.stdin.buffer.read()))
    draft.replace(out)


if __name__ == "__main__":
    _main()
