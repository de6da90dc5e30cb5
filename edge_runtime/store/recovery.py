"""Recovery: what opening a store clears up, repairs and reports.

Law of this file: it runs before anything else touches the store, and it never stops at a bad model
or a disk that cannot be written: what can serve must serve. It removes what interrupted work left
(temporary names) and what is of no use (a generation without a record that the switch does not
name); it repairs a switch slot from the other one; everything else it only reports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge_runtime.errors import EdgeError
from edge_runtime.store import generations
from edge_runtime.store.disk import SLOTS, Disk
from edge_runtime.store.generations import Switch


class Recovery(msgspec.Struct, frozen=True):
    """What `Store.open` found and did; every entry is a sentence or a path, for the log."""

    removed: tuple[str, ...] = ()  # leftovers of interrupted work
    repaired: tuple[str, ...] = ()  # models whose switch slots were made equal again
    damaged: tuple[str, ...] = ()  # records that no interruption explains: the medium or a hand
    problems: tuple[str, ...] = ()  # what could not be read, removed or repaired; open went on


def recover(disk: Disk) -> Recovery:
    """Clear up, repair, report. Raises StorageError only when the layout cannot be listed."""
    notes = _Notes()
    _clear(disk, disk.blobs.directory, notes)
    for name in disk.files.names(disk.models):
        if generations.NAME.fullmatch(name):
            with notes.going_on(disk.model(name)):
                _recover_model(disk, name, notes)
        else:
            notes.problems.append(f"{disk.models / name}: not the name of a model; ignored")
    return notes.recovery()


def _recover_model(disk: Disk, name: str, notes: _Notes) -> None:
    _clear(disk, disk.model(name), notes)
    switch = _recover_switch(disk, name, notes)
    _clear(disk, disk.generations(name), notes)
    for number in disk.numbers(name):
        with notes.going_on(disk.generation(name, number)):
            if disk.read_generation(name, number) is None:
                _recover_generation(disk, switch, number, notes)


def _recover_switch(disk: Disk, name: str, notes: _Notes) -> Switch:
    slots = disk.slots(name)
    for slot in SLOTS:
        path = disk.model(name) / slot
        if slots[slot] is None and disk.files.entry(path) is not None:
            notes.damaged.append(f"{path}: torn or altered")
    switch = generations.winner(*slots.values())
    if switch is None:
        return Switch(name)
    if len(set(slots.values())) > 1:
        with notes.going_on(disk.model(name)):
            disk.write_switch(switch)
            notes.repaired.append(name)
    return switch


def _recover_generation(disk: Disk, switch: Switch, number: int, notes: _Notes) -> None:
    """One whose record is gone, torn or altered."""
    path = disk.generation(switch.name, number)
    if generations.is_protected(switch, number):
        notes.damaged.append(f"{path}: its record is torn or altered; install the bundle again")
        return
    disk.unpublish(switch.name, number)
    notes.removed.append(str(path))


def _clear(disk: Disk, directory: Path, notes: _Notes) -> None:
    for path in disk.temporaries(directory):
        with notes.going_on(path):
            disk.remove_leftover(path)
            notes.removed.append(str(path))


class _Notes:
    """A Recovery in the making."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.repaired: list[str] = []
        self.damaged: list[str] = []
        self.problems: list[str] = []

    @contextlib.contextmanager
    def going_on(self, path: Path) -> Iterator[None]:
        """Note an error and go on."""
        try:
            yield
        except EdgeError as e:
            self.problems.append(f"{path}: {e}")

    def recovery(self) -> Recovery:
        return Recovery(
            tuple(self.removed), tuple(self.repaired), tuple(self.damaged), tuple(self.problems)
        )
