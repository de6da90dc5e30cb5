"""Ways for a worker's loop to wait.

Law of this file: it waits; for what, for how long and what then is the loop's.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from edge_runtime.clock import monotonic_ns as _monotonic_ns

SELECT_FDS = 1024  # FD_SETSIZE of the C library
Poll = Callable[[float], list[tuple[int, int]]]
P = ParamSpec("P")
T = TypeVar("T")


def unlocked(sleep: Callable[P, T], lock: threading.Lock) -> Callable[P, T]:
    """`sleep`, during which others may have the lock that the caller has."""

    def unlocked(*arguments: P.args, **options: P.kwargs) -> T:
        lock.release()
        try:
            return sleep(*arguments, **options)
        finally:
            lock.acquire()

    return unlocked


def spinning(poll: Poll, spin_ns: int) -> Poll:
    """`poll` that looks again and again for so long before it sleeps."""

    def look(wait_s: float) -> list[tuple[int, int]]:
        if wait_s > 0:
            until_ns = _monotonic_ns() + spin_ns
            while _monotonic_ns() < until_ns:
                if ready := poll(0):
                    return ready
        return poll(wait_s)

    return look


def doze(fd: int, seconds: float) -> None:
    """Sleep until the descriptor is readable: to the microsecond, where `epoll` rounds up to a
    millisecond and would sleep through a short window. (The loop's epoll is among a process's first
    descriptors, but in a process with others it may be beyond what select takes.)
    """
    if fd < SELECT_FDS:
        select.select((fd,), (), (), seconds)
    else:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1e3)
