"""Runs: a request, what running one or a batch of them gives, and the threads that do it.

Law of this file: it calls the model and nothing else; no socket, no queue of admitted requests, no
verdict about a client. Whatever a model raises is an outcome here.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import NamedTuple

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import EdgeError, InternalError, OverloadedError
from edge_runtime.serving import page
from edge_runtime.serving.batching import Batch
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.plan import Plan, Slot


class Request:
    """One admitted request. `prefix` and `header` are kept only while its body is on its way."""

    __slots__ = (
        "cache_key",
        "connection",
        "deadline_ns",
        "filled",
        "header",
        "plan",
        "prefix",
        "priority",
        "read_ns",
        "request_id",
        "slot",
    )

    def __init__(
        self,
        owner: Connection,
        plan: Plan,
        slot: Slot,
        request_id: int,
        deadline_ns: int,
        priority: int,
        read_ns: int,
    ) -> None:
        self.connection = owner
        self.plan = plan
        self.slot: Slot | None = slot
        self.request_id = request_id
        self.deadline_ns = deadline_ns
        self.priority = priority
        self.read_ns = read_ns
        self.filled = 0
        self.prefix = b""
        self.header = b""
        self.cache_key: tuple[int, bytes] | None = None


# The answer's frame or the error.
Outcome = tuple[memoryview | None, EdgeError | None]


class Done(NamedTuple):
    """A run that ended.

    Attributes:
        batch: the memory it was given, free again; None: none.
        together: the requests ran as one; false although there is a batch: the batch failed.
        began_ns: CLOCK_MONOTONIC.
        run_ns: all of it.
    """

    requests: list[Request]
    outcomes: list[Outcome]
    batch: Batch | None
    together: bool
    began_ns: int
    run_ns: int


class Runners:
    """A few threads that run requests; the loop gives and collects."""

    def __init__(self, count: int, status: memoryview) -> None:
        assert 0 < count <= page.RUNNERS_MAX
        self.count = count
        self.idle = count
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._status = status
        self._todo: SimpleQueue[tuple[list[Request], Batch | None]] = SimpleQueue()
        self._done: deque[Done] = deque()
        for index in range(count):
            threading.Thread(target=self._run, args=(index,), daemon=True).start()

    def start(self, requests: list[Request], batch: Batch | None) -> None:
        """Give work to an idle runner (the caller has seen `idle` > 0)."""
        self.idle -= 1
        self._todo.put((requests, batch))

    def finished(self) -> list[Done]:
        """What has been run since the last call."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            pass  # collected by an earlier call of the same turn
        done = []
        while self._done:
            done.append(self._done.popleft())
        self.idle += len(done)
        return done

    def _run(self, index: int) -> None:
        word = page.RUN_BEGAN + index
        while True:
            self._run_one(word, *self._todo.get())

    def _run_one(self, word: int, requests: list[Request], batch: Batch | None) -> None:
        """A call of its own: a resting runner must not hold its last request's memory."""
        self._done.append(execute(requests, batch, self._status, word))
        os.eventfd_write(self.wake_fd, 1)


def execute(requests: list[Request], batch: Batch | None, status: memoryview, word: int) -> Done:
    """Run requests, as one batch or one by one; a batch that fails is run one by one, so that a
    request which the model cannot take fails alone. Never raises.

    Args:
        status, word: where the page tells when the model was called, each time anew: a hang is a
            call that does not return, not many that do.
    """
    slots = [request.slot for request in requests if request.slot is not None]
    began_ns = _monotonic_ns()
    together = batch is not None and _run_together(batch, slots, status, word)
    outcomes: list[Outcome] = []
    for slot in slots:
        if together:
            outcomes.append((slot.frame, None))
            continue
        status[word] = _monotonic_ns()
        try:
            outcomes.append((slot.respond(), None))
        except Exception as failure:  # noqa: BLE001 - a worker must live; the client is told
            outcomes.append((None, edge_error(failure)))
    status[word] = 0
    return Done(requests, outcomes, batch, together, began_ns, _monotonic_ns() - began_ns)


def _run_together(batch: Batch, slots: list[Slot], status: memoryview, word: int) -> bool:
    status[word] = _monotonic_ns()
    try:
        batch.run(slots)
    except Exception:  # noqa: BLE001 - each request then gets its own verdict
        return False
    return True


def edge_error(failure: Exception) -> EdgeError:
    """What the client is told of whatever a model raised."""
    if isinstance(failure, EdgeError):
        return failure
    if isinstance(failure, MemoryError):
        return OverloadedError("not enough memory for this request now", retry_after_s=0.1)
    return InternalError(f"{type(failure).__name__}: {failure}")
