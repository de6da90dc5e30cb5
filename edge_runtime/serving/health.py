"""Verdicts about workers: why did it die, and what now?

Law of this file: pure. Exit status, counters and times in, verdict out. Who waits, kills, restarts
or switches generations is the supervisor.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from edge_runtime.errors import GoldenError

SIGNAL_HINTS: dict[int, str] = {
    signal.SIGILL: "the library uses an instruction that this processor does not have",
    signal.SIGSEGV: "the library or a driver accessed memory it does not have",
    signal.SIGBUS: "memory behind a mapping was gone",
    signal.SIGABRT: "the library gave up",
    signal.SIGFPE: "the library divided by zero",
    signal.SIGSYS: "the sandbox forbids a system call that the library made",
}


class Cause(StrEnum):
    """Why a process is gone."""

    STOPPED = "stopped"  # we asked for it
    EXITED = "exited"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out_of_memory"
    HANG = "hang"
    FAILED = "failed"  # it said why before it went
    GOLDEN = "golden"  # it found that it gives wrong answers, and went
    NEIGHBOUR = "neighbour"  # another worker of the same process was the end of it


class Death(NamedTuple):
    """A verdict on one exit."""

    cause: Cause
    detail: str


def classify(
    status: int,
    *,
    stopping: bool,
    hung_for_s: float | None,
    oom_kills: int,
    failure: str = "",
    failure_code: str = "",
) -> Death:
    """Why a process ended.

    Args:
        status: as `os.waitpid` gives it.
        stopping: we had asked it to stop.
        hung_for_s: we killed it because a run had not returned for this long.
        oom_kills: kernel out-of-memory kills counted between its start and its end.
        failure: what it said itself before it exited.
        failure_code: the code of that error.
    """
    if failure:
        wrong = failure_code == GoldenError.code
        return Death(Cause.GOLDEN if wrong else Cause.FAILED, failure)
    if hung_for_s is not None:
        return Death(Cause.HANG, f"a run did not return for {hung_for_s:.1f} s and was killed")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in list(signal.Signals) else str(number)
        if number == signal.SIGKILL and oom_kills:
            return Death(Cause.OUT_OF_MEMORY, "killed by the kernel: out of memory")
        if stopping:
            return Death(Cause.STOPPED, f"stopped ({name})")
        hint = SIGNAL_HINTS.get(number, "")
        return Death(Cause.SIGNAL, f"killed by {name}" + (f": {hint}" if hint else ""))
    code = os.waitstatus_to_exitcode(status)
    if stopping and code == 0:
        return Death(Cause.STOPPED, "stopped")
    return Death(Cause.EXITED, f"exited with code {code}")


class Resident(NamedTuple):
    """A worker in a process with others, at the end of that process.

    Attributes:
        hung: we killed the process because of it.
        uses_device: it was its turn on the device that they share.
        loading: it was not ready yet.
    """

    hung: bool
    uses_device: bool
    loading: bool


def suspects(residents: Sequence[Resident]) -> list[bool]:
    """Of each worker whether it may have been the end of the process that it shared.

    Who did nothing at that moment did not; if nobody did anything, anybody may have.
    """
    for signs in (
        [one.hung for one in residents],
        [one.uses_device or one.loading for one in residents],
    ):
        if any(signs):
            return signs
    return [True] * len(residents)


class RestartPolicy(NamedTuple):
    """When to try again, and when to stop believing in a generation."""

    backoff_initial_s: float = 0.1
    backoff_max_s: float = 30.0
    deaths_max: int = 5
    window_s: float = 60.0


class Verdict(NamedTuple):
    """What to do about a death: restart when, and whether to stop believing in the generation."""

    restart_after_s: float
    give_up: bool


def recent(deaths_ns: Sequence[int], now_ns: int, window_s: float) -> int:
    """How many of these deaths (CLOCK_MONOTONIC) count still."""
    horizon_ns = now_ns - round(window_s * 1e9)
    return sum(at_ns >= horizon_ns for at_ns in deaths_ns)


def after_death(deaths_ns: Sequence[int], now_ns: int, policy: RestartPolicy) -> Verdict:
    """What to do after the newest of `deaths_ns` (CLOCK_MONOTONIC).

    The first restart is at once, because most deaths are single; from the second inside the window
    on the wait doubles. `deaths_max` deaths inside the window are the end of the generation.
    """
    deaths = recent(deaths_ns, now_ns, policy.window_s)
    doublings = min(max(deaths - 2, 0), 30)  # 30: beyond any sensible back-off, keeps 2**n small
    wait_s = min(policy.backoff_initial_s * 2**doublings, policy.backoff_max_s)
    wait_s = wait_s if deaths > 1 else 0.0
    return Verdict(wait_s, deaths >= policy.deaths_max)
