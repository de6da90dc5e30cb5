"""Every step of every operation fails once, and again, and for good: old or new, never neither."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import EdgeError
from edge_runtime.store import Store
from tests.store import world
from tests.store.world import Fault, View, WatchedFiles


class Arena:
    """One operation, tried again and again on copies of the state that it starts from."""

    def __init__(self, path: Path, operation: str) -> None:
        self._path = path
        self._act = world.OPERATIONS[operation].act
        self._before = path / "before"
        with world.opened(self._before) as store:
            world.OPERATIONS[operation].prepare(store)
            self.old = world.view(store)
        with world.opened(self.copy()) as store:
            self._act(store)
            self.new = world.view(store)

    def copy(self) -> Path:
        root = self._path / "copy"
        if root.exists():
            shutil.rmtree(root)
        shutil.copytree(self._before, root)
        return root

    def interrupt(self, nth: int, mode: str, live: bool = False) -> bool:
        """One fault point, and what must hold after it; False when the fault never came."""
        root = self.copy()
        fault = Fault(nth, mode)
        with world.opened(root, WatchedFiles(fault.around)) as store:
            fault.armed = True  # opening has its own test
            try:
                self._act(store)
            except EdgeError:
                assert fault.fired
            if live:
                fault.armed = False
                self._retry(store)
        found = world.seen(root)
        world.check_between(found, self.old, self.new)
        if live:
            assert found == self.new
        with world.opened(root) as store:
            self._retry(store)
        world.check_tidy(root)
        return fault.fired

    def _retry(self, store: Store) -> None:
        self._act(store)
        assert world.view(store) == self.new


@pytest.mark.parametrize("mode", Fault.MODES)
@pytest.mark.parametrize("operation", world.OPERATIONS)
def test_every_step_that_fails_leaves_old_or_new_and_a_retry_succeeds(
    operation: str,
    mode: str,
    fast_path: Path,
    record_points: Callable[[str, int], None],
) -> None:
    arena = Arena(fast_path, operation)
    points = next(n for n in itertools.count(1) if not arena.interrupt(n, mode)) - 1
    record_points("the n-th step fails", points)
    if operation in ("install", "activate"):
        assert points >= 2, "the faults did not reach the operation"


@pytest.mark.parametrize("operation", world.OPERATIONS)
def test_a_store_that_saw_a_fault_goes_on_without_being_opened_again(
    operation: str, fast_path: Path, record_points: Callable[[str, int], None]
) -> None:
    arena = Arena(fast_path, operation)
    points = next(n for n in itertools.count(1) if not arena.interrupt(n, "once", live=True)) - 1
    record_points("the n-th step fails, the same process goes on", points)


def test_every_step_of_opening_may_fail_and_the_next_opening_recovers(
    fast_path: Path, record_points: Callable[[str, int], None]
) -> None:
    arena = Arena(fast_path, "install")
    tries = 0
    for mode in ("once", "after", "dead"):
        for nth in itertools.count(1):
            root = arena.copy()
            (root / "blobs" / ".tmp-left").write_bytes(b"over")
            (root / "models" / world.NAME / "switch.b").write_bytes(b"")
            fault = Fault(nth, mode)
            fault.armed = True
            store = Store(root, WatchedFiles(fault.around), ManualClock())
            try:
                store.open()
            except EdgeError:
                assert fault.fired
            store.close()
            assert world.seen(root) == arena.old
            world.check_tidy(root)
            if not fault.fired:
                break
            tries += 1
    record_points("the n-th step of opening fails", tries)


def test_the_fault_loop_notices_a_store_that_forgets_what_served(fast_path: Path) -> None:
    """The proof can fail: a store whose slots are lost half-way is neither old nor new."""
    arena = Arena(fast_path, "activate")
    root = arena.copy()
    for slot in ("switch.a", "switch.b"):
        (root / "models" / world.NAME / slot).unlink()
    with pytest.raises(AssertionError, match="neither"):
        world.check_between(world.seen(root), arena.old, arena.new)


def test_the_view_notices_a_generation_that_is_not_whole(fast_path: Path) -> None:
    arena = Arena(fast_path, "activate")
    root = arena.copy()
    next(path for path in (root / "blobs").iterdir() if path.stat().st_size > 2000).unlink()
    with pytest.raises(AssertionError, match="missing or altered"):
        world.seen(root)


def test_views_between_old_and_new_may_lack_only_what_goes() -> None:
    old, new = View(3, 2, frozenset({1, 2, 3})), View(3, 2, frozenset({2, 3}))
    world.check_between(old, old, new)
    world.check_between(new, old, new)
    with pytest.raises(AssertionError):
        world.check_between(View(3, 2, frozenset({3})), old, new)
