"""Power cuts on a disk that promises nothing but fsync: every combination of what it may keep."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import StorageError
from edge_runtime.store import Store
from tests.store import world
from tests.store.strict import StrictDisk
from tests.store.world import CHANGES, NAME, Step, View, WatchedFiles

NOTHING = View(None, None, frozenset())


class Rig:
    """A life of the store on a strict disk."""

    def __init__(self, base: Path, leave_out: Callable[[Step], bool] = lambda step: False) -> None:
        self._live = base / "live"
        self._live.mkdir()
        self._fallen = base / "fallen"
        self._disk = StrictDisk(self._live)
        self._leave_out = leave_out
        self._refuse = ("", "")
        self._refuse_left = 0
        self._seen: dict[tuple[View, ...], set[frozenset[tuple[str, bytes | None]]]] = {}
        self.allowed: tuple[View, ...] = (NOTHING,)  # from the last durable state to the aim
        self.points = 0

    def around(self, step: Step, do: Callable[[], Any]) -> Any:
        if (step.verb, step.path.name) == self._refuse:
            self._refuse_left -= 1
            if self._refuse_left == 0:
                raise StorageError(f"injected into {step.verb}")
        if self._leave_out(step):
            return None
        if step.verb not in CHANGES:
            return do()
        answer = self._disk.follow(step, do)
        self.cut()
        return answer

    def cut(self) -> None:
        """Every outcome of a power cut now is old or new; equal outcomes are looked at once."""
        seen = self._seen.setdefault(self.allowed, set())
        for tree in self._disk.outcomes():
            outcome = frozenset(tree.items())
            if outcome not in seen:
                seen.add(outcome)
                self.points += 1
                self._materialise(tree)
                check_among(world.seen(self._fallen / "state"), self.allowed)

    def _materialise(self, tree: dict[str, bytes | None]) -> None:
        shutil.rmtree(self._fallen, ignore_errors=True)
        self._fallen.mkdir()
        for path, data in sorted(tree.items()):
            if data is None:
                (self._fallen / path).mkdir()
            else:
                (self._fallen / path).write_bytes(data)

    def live(self, acts: list[Callable[[Store], object]]) -> None:
        with world.opened(self._live / "state", WatchedFiles(self.around)) as store:
            for act in acts:
                self.allowed += (self._foresee(act),)
                act(store)
                self.allowed = self.allowed[-1:]
                self.cut()

    def _foresee(self, act: Callable[[Store], object]) -> View:
        """What the act leads to, tried on a copy of what is seen now."""
        copy = self._fallen.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._live / "state", copy)
        with world.opened(copy) as store:
            act(store)
            return world.view(store)

    def refuse(self, verb: str, name: str, nth: int = 1) -> None:
        """The n-th such step from now on will fail."""
        self._refuse = (verb, name)
        self._refuse_left = nth

    def interrupt(self, act: Callable[[Store], object], verb: str, name: str, nth: int = 1) -> None:
        """Do an act of which one step is refused."""
        with world.opened(self._live / "state", WatchedFiles(self.around)) as store:
            self.allowed += (self._foresee(act),)
            self.refuse(verb, name, nth)
            with pytest.raises(StorageError, match="injected"):
                act(store)


def check_among(found: View, allowed: tuple[View, ...]) -> None:
    """What is found is one of these states or between two that follow each other."""
    pairs = list(itertools.pairwise(allowed)) or [(allowed[0], allowed[0])]
    for old, new in pairs[:-1]:
        with contextlib.suppress(AssertionError):
            world.check_between(found, old, new)
            return
    world.check_between(found, *pairs[-1])


LIFE: list[Callable[[Store], object]] = [
    lambda store: world.install(store, 1),
    lambda store: world.activate(store, 1),
    lambda store: world.install(store, 2),
    lambda store: world.activate(store, 2),
    lambda store: store.rollback(NAME),
    lambda store: store.settle(NAME),
    lambda store: store.remove(NAME, 2),
    lambda store: store.deactivate(NAME),
    lambda store: store.collect_garbage(byte_budget=0),
]


def test_whatever_the_disk_kept_it_is_old_or_new_and_new_after_the_call(
    fast_path: Path, record_points: Callable[[str, int], None]
) -> None:
    rig = Rig(fast_path)
    rig.live(LIFE)
    assert rig.points > 100
    record_points("power cuts on a disk that promises nothing but fsync", rig.points)


def activate_what_is_there(store: Store) -> None:
    store.activate(NAME, store.generations(NAME)[-1].number)


@pytest.mark.parametrize("directory", ["generations", NAME, "models", "state", "blobs"])
def test_what_an_interrupted_install_made_visible_is_synced_before_it_serves(
    fast_path: Path, directory: str, record_points: Callable[[str, int], None]
) -> None:
    rig = Rig(fast_path)
    rig.live(LIFE[:2])
    rig.interrupt(lambda store: world.install(store, 2), "sync_directory", directory)
    rig.live([activate_what_is_there])
    assert rig.allowed[-1].active == (1 if directory == "blobs" else 2)
    record_points("power cuts on a disk that promises nothing but fsync", rig.points)


@pytest.mark.parametrize(
    "relieve",
    [lambda store: store.collect_garbage(), lambda store: store.remove("other", 9)],
    ids=["garbage collection", "removing another model"],
)
def test_blobs_go_only_when_the_absence_of_their_generation_is_synced(
    fast_path: Path, relieve: Callable[[Store], object]
) -> None:
    rig = Rig(fast_path)
    others = [lambda store: world.install(store, 3), lambda store: world.install(store, 9, "other")]
    rig.live([*LIFE[:4], *others])
    rig.interrupt(lambda store: store.remove(NAME, 3), "sync_directory", "generations", nth=2)
    rig.refuse("sync_directory", "generations")  # recovery cannot sync it either
    rig.live([relieve])
    assert rig.allowed[-1].installed == {1, 2}


def test_a_generation_goes_only_when_the_switch_away_from_it_is_synced(fast_path: Path) -> None:
    """The switch is seen but not synced, and recovery could not sync it either."""
    rig = Rig(fast_path)
    rig.live([*LIFE[:4], lambda store: world.install(store, 3)])
    rig.interrupt(lambda store: world.activate(store, 3), "sync_directory", NAME, nth=2)
    rig.refuse("sync_directory", NAME)
    rig.live([lambda store: store.remove(NAME, 1)])
    assert rig.allowed[-1] == View(3, 2, frozenset({2, 3}))


# Every fsync that the store makes in a life, by what it is for; each is needed for something.
SYNCS = [
    ("sync", r"\.tmp-model\.yaml"),
    ("sync", r"\.tmp-record"),
    ("sync", r"\.tmp-switch\.[ab]"),
    ("sync", r"\.tmp-[0-9a-f]{64}"),
    ("sync_directory", "blobs"),
    ("sync_directory", "generations"),
    ("sync_directory", r"\.tmp-[0-9]{6}"),
    ("sync_directory", NAME),
    ("sync_directory", "models"),
    ("sync_directory", "state"),
]


@pytest.mark.parametrize(("verb", "pattern"), SYNCS)
def test_a_store_that_forgets_one_fsync_is_caught(fast_path: Path, verb: str, pattern: str) -> None:
    left_out: list[Step] = []

    def leave_out(step: Step) -> bool:
        if step.verb == verb and re.fullmatch(pattern, step.path.name):
            left_out.append(step)
            return True
        return False

    with pytest.raises((AssertionError, StorageError)):
        Rig(fast_path, leave_out).live(LIFE)
    assert left_out
