"""What the keepers of one model know of it together: what is to serve, how that stands.

Law of this file: values and a lock. What is written here was decided elsewhere: `active` by
`deployment` alone, `state` by whoever changes what serves; all of it under the lock, but for what a
death, a rest or the end of the daemon does at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

from edge_runtime.daemon.parts import Parts
from edge_runtime.errors import EdgeError
from edge_runtime.store import Generation


class Post:
    """Of one model.

    Attributes:
        active: the generation that is to serve; None: not known yet (the daemon starts), or none.
        state: stopped, loading, ready, idle, backoff or failed.
        reason: how it came to that.
        restarts: of its worker, since the daemon started.
        lock: changes of the model take turns; who holds it counts as busy.
        switching: the task that is between disk and memory just now, which nobody cancels.
        closing: the daemon stops.
    """

    def __init__(self, parts: Parts) -> None:
        self.active: Generation | None = None
        self.state = "stopped"
        self.reason = ""
        self.restarts = 0
        self.lock = asyncio.Lock()
        self.switching: asyncio.Task[Any] | None = None
        self.closing = False
        self._parts = parts

    @property
    def spared(self) -> asyncio.Task[Any] | None:
        """The task that must not be cancelled now: disk and memory would differ."""
        return None if self.closing else self.switching

    def stand(self, state: str, reason: str) -> None:
        """How it stands from now on, and why."""
        self.state, self.reason = state, reason

    def fail(self, error: EdgeError) -> None:
        """It cannot serve, because of this."""
        self.stand("failed", str(error))
        self._parts.emit("model_failed", str(error), level="error", code=error.code)
