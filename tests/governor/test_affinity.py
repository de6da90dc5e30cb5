"""Cores of running processes: taken, kept, given back thread by thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.daemon.affinity import Affinity

CORES = sorted(os.sched_getaffinity(0))
# A thread that pins itself, as libraries do; then one more for each line that is read.
PROGRAM = """
import os, sys, threading
def stay():
    print(threading.get_native_id(), flush=True)
    threading.Event().wait()
def pinned():
    os.sched_setaffinity(0, {%d})
    stay()
threading.Thread(target=pinned, daemon=True).start()
for line in sys.stdin:
    threading.Thread(target=stay, daemon=True).start()
"""


class Process:
    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM % CORES[-1]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid
        assert self.popen.stdout is not None
        self.pinned = int(self.popen.stdout.readline())

    def another_thread(self) -> int:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return int(self.popen.stdout.readline())


@pytest.fixture
def process() -> Iterator[Process]:
    started = Process()
    yield started
    started.popen.kill()
    started.popen.communicate()


def of(thread: int) -> list[int]:
    return sorted(os.sched_getaffinity(thread))


@pytest.mark.skipif(len(CORES) < 2, reason="one core only: nothing to take away")
def test_every_thread_is_confined_and_gets_its_own_cores_back(process: Process) -> None:
    affinity, first = Affinity(), frozenset(CORES[:1])
    affinity.confine([process.pid], first)
    assert of(process.pid) == of(process.pinned) == CORES[:1]
    late = process.another_thread()
    assert of(late) == CORES[:1]
    affinity.confine([process.pid], first)
    affinity.release()
    assert of(process.pid) == of(late) == CORES
    assert of(process.pinned) == CORES[-1:]


@pytest.mark.skipif(len(CORES) < 2, reason="one core only: nothing to take away")
def test_a_step_up_to_more_cores_widens_what_was_confined(process: Process) -> None:
    affinity = Affinity()
    affinity.confine([process.pid], frozenset(CORES[:1]))
    affinity.confine([process.pid], frozenset(CORES))
    assert of(process.pid) == CORES
    assert of(process.pinned) == CORES[-1:]


def test_a_process_that_is_gone_or_cores_that_are_not_there_are_no_error(process: Process) -> None:
    affinity = Affinity()
    affinity.confine([process.pid], frozenset({4000}))
    assert of(process.pid) == CORES
    process.popen.kill()
    process.popen.wait()
    affinity.confine([process.pid], frozenset(CORES[:1]))
    affinity.release()


def test_a_thread_that_has_ended_is_forgotten_as_its_number_may_come_back() -> None:
    affinity, pid, go = Affinity(), os.getpid(), threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    affinity.confine([pid], frozenset(CORES))
    assert thread.native_id in affinity._before[pid]
    go.set()
    thread.join()
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{pid}/task/{thread.native_id}").exists():
        assert time.monotonic() < deadline_s
    affinity.confine([pid], frozenset(CORES))
    assert thread.native_id not in affinity._before[pid]
    assert pid in affinity._before[pid]
