"""Runs: a request, what running one or a batch of them gives, and the threads that do it.

Law of this file: it calls the model and nothing else; no socket, no queue of admitted requests, no
verdict about a client. Whatever a model raises is an outcome here.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue

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


# (-priority, turn, order, request)
Waiting = tuple[int, int, int, Request]
# The answer's frame or the error.
Outcome = tuple[memoryview | None, EdgeError | None]
# Requests of one run, their batch, their outcomes, the run's nanoseconds, when it began.
Done = tuple[list[Request], Batch | None, list[Outcome], int, int]


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
        self._status[word] = began_ns = _monotonic_ns()
        outcomes = execute(requests, batch)
        self._status[word] = 0
        self._done.append((requests, batch, outcomes, _monotonic_ns() - began_ns, began_ns))
        os.eventfd_write(self.wake_fd, 1)


def execute(requests: list[Request], batch: Batch | None) -> list[Outcome]:
    """Run requests, as one batch or one by one; a batch that fails is run one by one, so that a
    request which the model cannot take fails alone. Never raises.
    """
    slots = [request.slot for request in requests if request.slot is not None]
    if batch is not None:
        try:
            batch.run(slots)
            return [(slot.frame, None) for slot in slots]
        except Exception:  # noqa: BLE001, S110 - each request gets its own verdict below
            pass
    outcomes: list[Outcome] = []
    for slot in slots:
        try:
            outcomes.append((slot.respond(), None))
        except Exception as failure:  # noqa: BLE001 - a worker must live; the client is told
            outcomes.append((None, edge_error(failure)))
    return outcomes


def edge_error(failure: Exception) -> EdgeError:
    """What the client is told of whatever a model raised."""
    if isinstance(failure, EdgeError):
        return failure
    if isinstance(failure, MemoryError):
        return OverloadedError("not enough memory for this request now", retry_after_s=0.1)
    return InternalError(f"{type(failure).__name__}: {failure}")
