"""Runners: who has run takes what is next, and nothing is lost between two runs."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.serving import page
from edge_runtime.serving.running import Done, Runners, Work

from .rig import ANSWER_S_MAX, Gate, NumpyModel, Rig, infer
from .rig import _LastRequest as LastRequest


def work(name: str) -> Work:
    """A request whose answer is its name."""
    slot: Any = SimpleNamespace(respond=lambda: memoryview(name.encode()))
    request: Any = SimpleNamespace(slot=slot)
    return [request], None


class Ended:
    """What was run, and what each runner is given next."""

    def __init__(self, *then: Work | Exception) -> None:
        self.then = list(then)
        self.names: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, done: Done) -> Work | None:
        response = done.outcomes[0][0]
        assert response is not None
        self.names.append(bytes(response).decode())
        self.threads.add(threading.get_ident())
        following = self.then.pop(0) if self.then else None
        if isinstance(following, Exception):
            raise following
        return following


@contextlib.contextmanager
def runners(count: int, ran: Ended) -> Iterator[Runners]:
    before = set(threading.enumerate())
    made = Runners(count, memoryview(bytearray(page.PAGE_SIZE)).cast("Q"), ran)
    threads = set(threading.enumerate()) - before
    yield made
    hook, threading.excepthook = threading.excepthook, threading.__excepthook__
    for _ in threads:
        made._todo.put(([LastRequest()], None))  # type: ignore[list-item]
    for thread in threads:
        thread.join(ANSWER_S_MAX)
    threading.excepthook = hook
    os.close(made.wake_fd)


def rested(made: Runners) -> None:
    """Wait until a runner says that it has come to rest."""
    ready, _, _ = select.select([made.wake_fd], [], [], ANSWER_S_MAX)
    assert ready


def test_a_runner_goes_on_with_what_is_next_and_wakes_the_loop_when_it_rests() -> None:
    ran = Ended(work("b"), work("c"))
    with runners(2, ran) as made:
        with made.lock:
            made.start(work("a"))
            assert made.idle == 1
        rested(made)
        made.collect()
        assert ran.names == ["a", "b", "c"] and len(ran.threads) == 1
        assert made.idle == 2
        with pytest.raises(BlockingIOError):
            os.eventfd_read(made.wake_fd)


def test_while_the_loop_has_the_lock_no_runner_answers() -> None:
    ran = Ended()
    with runners(1, ran) as made:
        with made.lock:
            made.start(work("a"))
            ready, _, _ = select.select([made.wake_fd], [], [], 0.05)
            assert not ready and not ran.names
        rested(made)
        assert ran.names == ["a"]


def test_a_fault_between_two_runs_is_raised_in_the_loop() -> None:
    with runners(1, Ended(ZeroDivisionError("ours"))) as made:
        with made.lock:
            made.start(work("a"))
        rested(made)
        with pytest.raises(ZeroDivisionError):
            made.collect()


def test_requests_that_waited_run_while_the_loop_sleeps() -> None:
    """The loop's own thread stands still: what waits is answered all the same."""
    gate = Gate()
    rig = Rig(NumpyModel(gate), runners=1)
    with contextlib.closing(rig):
        client = rig.client()
        client.sock.send(b"".join(infer(float(n), n) for n in range(5)))
        rig.stepper.stalled = True  # settle() comes back although a runner is busy
        rig.settle()
        gate.open.set()
        client.sock.setblocking(True)
        client.sock.settimeout(ANSWER_S_MAX)
        while len(client._got) < 5:
            client._reader.feed(client.sock.recv(1 << 16))
            while (frame := client._reader.next_frame()) is not None:
                client._got.append(frame)  # type: ignore[arg-type]
        client.sock.setblocking(False)
        client._got.clear()
        rig.stepper.stalled = False
        assert rig.status[page.REQUESTS] == 5
