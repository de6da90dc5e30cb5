"""Bytes that change by themselves: the other slot wins, everything else is noticed and repaired."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import BundleError
from edge_runtime.files import SystemFiles
from edge_runtime.store import DamagedError, Recovery, Store
from tests.store import world
from tests.store.world import NAME


@pytest.fixture
def filled(root: Path) -> Path:
    """Version 2 serves, version 1 is previous."""
    with world.opened(root) as store:
        for version in (1, 2):
            world.install(store, version)
            world.activate(store, version)
    return root


def recovery_of(root: Path) -> Recovery:
    store = Store(root, SystemFiles(), ManualClock())
    try:
        return store.open()
    finally:
        store.close()


def rotten(data: bytes) -> Iterator[bytes]:
    """Every truncation, and one flipped bit in every byte."""
    yield from (data[:length] for length in range(len(data)))
    rng = random.Random(7)
    for index in range(len(data)):
        yield data[:index] + bytes([data[index] ^ (1 << rng.randrange(8))]) + data[index + 1 :]


@pytest.mark.parametrize("slot", ["switch.a", "switch.b"])
def test_a_rotten_or_torn_slot_never_wins_and_is_repaired(
    filled: Path, slot: str, record_points: Callable[[str, int], None]
) -> None:
    path = filled / "models" / NAME / slot
    good = path.read_bytes()
    variants = list(rotten(good))
    for data in variants:
        path.write_bytes(data)
        recovery = recovery_of(filled)
        assert recovery.damaged == (f"{path}: torn or altered",)
        assert recovery.repaired == (NAME,)
        assert path.read_bytes() == good
    record_points("rotten switch slots", len(variants))


def test_rot_of_the_newest_slot_before_its_copy_is_made_gives_the_older_state(filled: Path) -> None:
    with world.opened(filled) as store:
        older = (filled / "models" / NAME / "switch.b").read_bytes()
        store.rollback(NAME)
    assert (filled / "models" / NAME / "switch.b").read_bytes() == older
    world.truncate_to_half(filled / "models" / NAME / "switch.a")
    assert world.seen(filled)[:2] == (2, 1)


def test_when_both_slots_are_lost_nothing_serves_and_it_is_said(filled: Path) -> None:
    for slot in ("switch.a", "switch.b"):
        (filled / "models" / NAME / slot).write_bytes(b"")
    assert len(recovery_of(filled).damaged) == 2
    with world.opened(filled) as store:
        assert store.current(NAME).active is None
        assert len(store.generations(NAME)) == 2
        world.activate(store, 2)
        assert store.current(NAME).active == 2


def test_a_slot_of_another_model_does_not_count(filled: Path) -> None:
    with world.opened(filled) as store:
        world.install(store, 7, "other")
        world.activate(store, 7, "other")
    for slot in ("switch.a", "switch.b"):
        stranger = (filled / "models" / "other" / slot).read_bytes()
        (filled / "models" / NAME / slot).write_bytes(stranger)
    with world.opened(filled) as store:
        assert store.current(NAME).active is None


def test_a_rotten_record_of_what_serves_is_kept_reported_and_replaced(filled: Path) -> None:
    generation = filled / "models" / NAME / "generations" / "000002"
    world.truncate_to_half(generation / "record")
    assert "000002" in recovery_of(filled).damaged[0]
    with world.opened(filled) as store:
        assert store.current(NAME).active == 2
        with pytest.raises(DamagedError, match="torn or altered"):
            store.generation(NAME, 2)
        world.install(store, 2)
        world.activate(store, 2)
        assert store.find(NAME, 2).number == 3
        assert store.rollback(NAME).active == 1, "a rollback leads to something whole"


@pytest.mark.parametrize("version", [1, 2])
def test_a_rotten_blob_is_reported_and_repaired_by_installing_again(
    filled: Path, version: int
) -> None:
    with world.opened(filled) as store:
        blob = store.find(NAME, version).blobs[1]
        path = store.blob_path(blob.sha256)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        assert blob.sha256 in store.verify(NAME, version).damaged[0]
        assert not store.verify(NAME, 3 - version).damaged
        with pytest.raises(BundleError, match="lacks a blob"):
            store.install(NAME, version, world.manifest(version), [])
        world.install(store, version)
        assert not store.verify(NAME, version).damaged


def test_a_rotten_manifest_is_refused_and_repaired_by_installing_again(filled: Path) -> None:
    with world.opened(filled) as store:
        generation = store.find(NAME, 2)
        path = filled / "models" / NAME / "generations" / "000002" / "model.yaml"
        path.write_bytes(world.manifest(2).replace(b"2", b"3"))
        with pytest.raises(DamagedError, match="not the one that was installed"):
            store.read_manifest(generation)
        assert store.verify(NAME, 2).damaged == ("model.yaml: missing or altered",)
        world.install(store, 2)
        assert store.read_manifest(generation) == world.manifest(2)
