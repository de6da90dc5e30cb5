"""Children of the supervisor that end, grandchildren that it has adopted included.

Law of this file: only here is `waitpid` called. Who is told of an end has asked for it by number.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


class Reaper:
    """Collects every child that ends, adopted grandchildren included."""

    def __init__(self) -> None:
        self._waiting: dict[int, Callable[[int], None]] = {}
        self._early: dict[int, int] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen for SIGCHLD."""
        loop.add_signal_handler(signal.SIGCHLD, self.collect)

    def watch(self, pid: int, ended: Callable[[int], None]) -> None:
        """Have `ended(status)` called once when `pid` has ended, even if it already has."""
        if pid in self._early:
            ended(self._early.pop(pid))
        else:
            self._waiting[pid] = ended

    def end(self, pid: int) -> None:
        """Kill a child that nobody watches; not one that has ended: its number may be another's."""
        if self._early.pop(pid, None) is None:
            self._waiting[pid] = lambda _: None
            os.kill(pid, signal.SIGKILL)

    def collect(self) -> None:
        """Wait for every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            ended = self._waiting.pop(pid, None)
            if ended is not None:
                ended(status)
            else:  # ended before we were told its number
                self._early[pid] = status
                while len(self._early) > 64:
                    self._early.pop(next(iter(self._early)))
