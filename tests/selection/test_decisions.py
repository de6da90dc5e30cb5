"""The record of a decision: it survives, it vanishes with its generation, and never is an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.daemon.selecting import Selector
from edge_runtime.errors import NotFoundError, StorageError
from edge_runtime.files import SystemFiles
from edge_runtime.store import Store, records
from edge_runtime.store.decisions import Decision, Left, Tried
from tests.store import world
from tests.store.world import NAME, Fault, WatchedFiles

TRIED = Tried("int8", "onnxruntime", "chosen", "2 times less", "1.32", True, 3, 0.2, 1.5, 0.01, 500)
DECISION = Decision(
    NAME,
    1,
    {"kernel": "6.1"},
    "latency",
    ("int8",),
    (TRIED,),
    left=(Left("fp32", "x", "hang", 2.0),),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state", SystemFiles(), ManualClock())
    opened.open()
    world.install(opened, 1)
    yield opened
    opened.close()


def record(store: Store) -> Path:
    (found,) = store._disk.root.rglob("decision")
    return found


def test_it_is_read_back_and_survives_a_restart(store: Store) -> None:
    assert store.decision(NAME, 1) is None
    store.keep_decision(DECISION)
    assert store.decision(NAME, 1) == DECISION
    store.close()
    store.open()
    assert store.decision(NAME, 1) == DECISION


@pytest.mark.parametrize("at", [0, 10, -3])
def test_a_damaged_one_is_no_decision(store: Store, at: int) -> None:
    store.keep_decision(DECISION)
    data = bytearray(record(store).read_bytes())
    data[at] ^= 1
    for damaged in (bytes(data), bytes(data[:at]), b""):
        record(store).chmod(0o644)
        record(store).write_bytes(damaged)
        assert store.decision(NAME, 1) is None
    store.keep_decision(DECISION)
    assert store.decision(NAME, 1) == DECISION


def test_another_programs_and_another_generations_are_no_decision(store: Store) -> None:
    store.keep_decision(DECISION)
    another = msgspec.structs.replace(DECISION, generation=7)
    for other in (msgspec.defstruct("Newer", [("future", int)])(1), another):
        record(store).write_bytes(records.encode(other))
        assert store.decision(NAME, 1) is None


def test_it_vanishes_with_its_generation_and_none_is_kept_of_what_is_not_installed(
    store: Store,
) -> None:
    store.keep_decision(DECISION)
    store.remove(NAME, 1)
    assert not list(store._disk.root.rglob("decision"))
    with pytest.raises(NotFoundError):
        store.keep_decision(DECISION)


def test_a_generation_with_a_decision_verifies_and_is_found_again_at_open(store: Store) -> None:
    store.keep_decision(DECISION)
    store.close()
    recovery = store.open()
    assert not any(getattr(recovery, field) for field in recovery.__struct_fields__)
    assert not store.verify(NAME, 1).damaged


@pytest.mark.parametrize("mode", Fault.MODES)
def test_whatever_step_fails_the_old_or_the_new_decision_is_read_and_the_store_is_whole(
    tmp_path: Path, mode: str
) -> None:
    new = msgspec.structs.replace(DECISION, order=("fp32",), took_s=2.0)
    for nth in itertools.count(1):
        root = tmp_path / f"{mode}{nth}"
        fault = Fault(nth, mode)
        with world.opened(root) as store:
            world.install(store, 1)
            store.keep_decision(DECISION)
        with world.opened(root, WatchedFiles(fault.around)) as store:
            fault.armed = True
            with contextlib.suppress(StorageError):
                store.keep_decision(new)
            fault.armed = False
        with world.opened(root) as store:
            assert store.decision(NAME, 1) in (DECISION, new)
            assert not store.verify(NAME, 1).damaged
            store.keep_decision(new)
            assert store.decision(NAME, 1) == new
        if not fault.fired:
            break
    assert nth > 1  # at least one step was spoiled


def test_of_a_generation_that_was_removed_nothing_is_remembered() -> None:
    class Shelf:
        async def read(self, _step: object) -> Decision:
            return DECISION

    parts: Any = SimpleNamespace(name=NAME, shelf=Shelf())
    anything: Any = None
    selector = Selector(parts, anything, anything)
    assert asyncio.run(selector.decision(1)) == DECISION and selector.describe(1)
    selector.forget(1)
    assert selector.describe(1) is None and selector.left(1) == []
