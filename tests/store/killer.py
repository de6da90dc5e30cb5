"""Kill -9 at every system call: run as `python -m tests.store.killer DIRECTORY`, prints JSON.

A child does a life of the store under ptrace; before the kernel acts on its n-th system call, the
child is killed. Then a fresh store must see old or new. n goes up until the child lives through it.

A program of its own, because the children are forked: from a warm, single-threaded parent, a child
costs milliseconds, where a new interpreter under strace would cost a quarter of a second.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from edge_runtime.store import Store
from tests.store import world
from tests.store.world import NAME, View

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
NOT_POSSIBLE = 77

_SYSCALL_STOP = signal.SIGTRAP | 0x80

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def prepare(store: Store) -> None:
    for version in (1, 2):
        world.install(store, version)
        world.activate(store, version)


LIFE: tuple[Callable[[Store], object], ...] = (
    lambda store: world.install(store, 3),
    lambda store: world.activate(store, 3),
    lambda store: store.rollback(NAME),
    lambda store: store.settle(NAME),
    lambda store: world.switch(store, 3),
    lambda store: store.remove(NAME, 1),
    lambda store: store.deactivate(NAME),
    lambda store: world.activate(store, 2),
    lambda store: store.collect_garbage(byte_budget=0),
)


def ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace({request}) is not allowed here")


def traced_child(root: Path) -> int:
    """Fork a child that waits, traced, and then lives."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            with world.opened(root) as store:
                for act in LIFE:
                    act(store)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("the child could not be traced")
    ptrace(_SETOPTIONS, pid, _TRACESYSGOOD | _EXITKILL)
    return pid


def lives_past(root: Path, nth: int) -> bool:
    """Run a child and kill it at its n-th system call; whether it ended before that."""
    pid = traced_child(root)
    calls = 0
    entering = True
    forward = 0
    while True:
        ptrace(_SYSCALL, pid, forward)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
            return True
        assert os.WIFSTOPPED(status), f"the child died by itself: {status}"
        forward = 0
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            forward = os.WSTOPSIG(status)
            continue
        calls += entering
        entering = not entering
        if calls == nth:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False


def views_of_a_life(root: Path) -> list[View]:
    with world.opened(root) as store:
        views = [world.view(store)]
        for act in LIFE:
            act(store)
            views.append(world.view(store))
    return views


def stage(found: View, views: list[View]) -> int:
    """Between which two acts the child was killed."""
    for index, (old, new) in enumerate(itertools.pairwise(views)):
        try:
            world.check_between(found, old, new)
        except AssertionError:
            continue
        return index
    raise AssertionError(f"{found} is at no stage of {views}")


def main() -> None:
    base = Path(sys.argv[1])
    # One core: handing over to the child and back is then a switch, not the waking of another core.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with world.opened(base / "before") as store:
        prepare(store)
    root = base / "copy"
    shutil.copytree(base / "before", root)
    views = views_of_a_life(root)
    seen: set[View] = set()
    for nth in itertools.count(1):
        shutil.rmtree(root)
        shutil.copytree(base / "before", root)
        try:
            lived = lives_past(root, nth)
        except OSError as e:
            print(e, file=sys.stderr)
            sys.exit(NOT_POSSIBLE)
        found = world.seen(root)
        world.check_tidy(root)
        if lived:
            assert found == views[-1]
            break
        stage(found, views)
        seen.add(found)
        with world.opened(root) as store:  # a retry of the whole update succeeds from anywhere
            world.install(store, 3)
            world.activate(store, 3)
            assert world.view(store).active == 3
    states = set(views[:-1])
    print(json.dumps({"points": nth - 1, "states": len(states), "states_seen": len(states & seen)}))


if __name__ == "__main__":
    main()
