"""The cores that running processes may use: fewer for a while, then as before.

Law of this file: it sets and gives back; who and which cores is the governor's. Every thread is
set, because a process has no mask of its own, and gets back what itself had: libraries pin their
threads. A process or thread that ends meanwhile is no error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

Cores = frozenset[int]


class Affinity:
    """What was taken from whom."""

    def __init__(self) -> None:
        self._before: dict[int, dict[int, Cores]] = {}  # pid -> thread -> its cores before

    def confine(self, pids: Iterable[int], cores: Cores) -> None:
        """Have these processes use `cores` only, and those confined before but not named none of
        our business any more. Called again, it finds threads that came meanwhile.

        A thread keeps those of its cores that are among `cores`; with none in common it moves.
        """
        named = set(pids)
        for pid in self._before.keys() - named:
            del self._before[pid]
        for pid in named:
            before = self._before.setdefault(pid, {})
            process_had = before.get(pid)  # None: not confined yet
            threads = _threads(pid)
            for ended in before.keys() - {pid, *threads}:  # its number may be another's one day
                del before[ended]
            for thread in threads:
                has = _get(thread)
                if has is not None:
                    had = before.setdefault(thread, process_had or has)
                    wanted = had & cores or cores
                    if wanted != has:
                        _set(thread, wanted)

    def release(self) -> None:
        """Give everything back. A thread that came meanwhile gets what its process had."""
        for pid, before in self._before.items():
            for thread in _threads(pid) if before else ():
                had = before.get(thread) or before.get(pid)
                if had is not None:
                    _set(thread, had)
        self._before.clear()


def available() -> Cores:
    """The cores that this process may use, and so its children at most."""
    return frozenset(os.sched_getaffinity(0))


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - names only
    except OSError:
        return []


def _get(thread: int) -> Cores | None:
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError:
        return None


def _set(thread: int, cores: Cores) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except OSError:
        pass  # it has ended, or its cpuset has none of these cores: then it stays where it is
