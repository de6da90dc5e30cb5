"""Time, as an argument.

Law of this file: it is the only place that reads a clock. Deadlines and durations use
`monotonic_ns` (CLOCK_MONOTONIC, which every process of the host shares, so that a client's deadline
means the same to a worker); `wall_s` is for people and records only and may jump.
"""

from __future__ import annotations

import time
from typing import Protocol

# For loops that cannot afford a method call per request (0.1 us): the same clock as SystemClock's.
monotonic_ns = time.monotonic_ns


def suspended_ns() -> int:
    """For how long this machine has been suspended since it booted: CLOCK_BOOTTIME counts that
    time, CLOCK_MONOTONIC does not. (A paused virtual machine or container is not seen.)
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()


class Clock(Protocol):
    """What a part that needs time is given."""

    def monotonic_ns(self) -> int:
        """Nanoseconds of CLOCK_MONOTONIC."""

    def wall_s(self) -> float:
        """Seconds since 1970, as the machine believes; may jump either way."""


class SystemClock:
    """The machine's clock."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves when told to: for tests and simulations."""

    def __init__(self, monotonic_ns: int = 1_000_000_000, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_ns = monotonic_ns
        self._wall_s = wall_s

    def monotonic_ns(self) -> int:
        return self._monotonic_ns

    def wall_s(self) -> float:
        return self._wall_s

    def advance_s(self, seconds: float) -> None:
        self._monotonic_ns += round(seconds * 1e9)
        self._wall_s += seconds
