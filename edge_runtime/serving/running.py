"""Runs: a request, what running one or a batch of them gives, and the threads that do it.

Law of this file: it calls the model, and between two runs what it is given to call; no socket, no
queue of admitted requests, no verdict about a client. Whatever a model raises is an outcome here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
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


# Requests to run, and the memory to run them in as one; None: one by one.
Work = tuple[list[Request], Batch | None]


class Runners:
    """A few threads that run requests.

    A runner that has run something tells so and takes what is next itself: to hand the answer to
    the loop and wait for new work would leave its processor idle for as long as the loop needs to
    wake. So the loop's state belongs to whoever holds `lock`: the loop, unless it sleeps; a runner
    between two runs.

    Attributes:
        idle: of `count`, those without work.
        wake_fd: readable when a runner has come to rest.
        failure: what a runner met between two runs: a fault of ours, which ends the worker.
    """

    def __init__(self, count: int, status: memoryview, ran: Callable[[Done], Work | None]) -> None:
        """See above.

        Args:
            ran: called with the lock after a run; gives the next work, None: rest.
        """
        assert 0 < count <= page.RUNNERS_MAX
        self.count = count
        self.idle = count
        self.lock = threading.Lock()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.failure: BaseException | None = None
        self._status = status
        self._ran = ran
        self._todo: SimpleQueue[Work | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, work: Work) -> None:
        """Give work to an idle runner (the caller has the lock and has seen `idle` > 0)."""
        self.idle -= 1
        self._todo.put(work)

    def collect(self) -> None:
        """`wake_fd` was readable. Raises what a runner met."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            pass  # collected by an earlier call of the same turn
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the threads, when their runs under way have ended; the caller has not the lock, and
        gives them no more work.
        """
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.wake_fd)

    def _run(self, index: int) -> None:
        word = page.RUN_BEGAN + index
        while (work := self._todo.get()) is not None:
            while work is not None:
                # A call of its own: a resting runner must not hold its last request's memory.
                work = self._run_one(word, *work)

    def _run_one(self, word: int, requests: list[Request], batch: Batch | None) -> Work | None:
        done = execute(requests, batch, self._status, word)
        work = None
        with self.lock:
            try:
                work = self._ran(done)
            except Exception as failure:  # noqa: BLE001 - raised in the loop
                self.failure = failure
            if work is None:
                self.idle += 1
        if work is None:  # the loop may have waited for this
            os.eventfd_write(self.wake_fd, 1)
        return work


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
