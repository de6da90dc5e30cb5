"""The store's directory: where everything is, reading it, the few steps with several parts.

Law of this file: paths and records of one state directory, through `Files`. It decides nothing:
what a record means is in `generations.py`, in which order things are done in `driver.py` and
`recovery.py`. Nothing is cached: every answer is read from disk. The layout is in docs/store.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from edge_runtime.errors import NotFoundError, StorageError
from edge_runtime.files import TEMPORARY_PREFIX, Files, temporary, write_atomic
from edge_runtime.store import generations, records
from edge_runtime.store.blobs import Blobs
from edge_runtime.store.generations import Generation, Switch

SLOTS = ("switch.a", "switch.b")

_Record = TypeVar("_Record", bound=msgspec.Struct)


class Survey(NamedTuple):
    """Every generation that is there."""

    generations: tuple[Generation, ...]
    unreadable: tuple[Path, ...]  # damaged ones: what they are and need is not known


class Disk:
    """One state directory. One thread at a time; the caller holds the lock."""

    def __init__(self, files: Files, root: Path) -> None:
        self.files = files
        self.root = root
        self.models = root / "models"
        self.blobs = Blobs(files, root / "blobs")

    # -- where things are

    def model(self, name: str) -> Path:
        return self.models / generations.check_name(name)

    def generations(self, name: str) -> Path:
        return self.model(name) / "generations"

    def generation(self, name: str, number: int) -> Path:
        return self.generations(name) / f"{number:06d}"

    def record(self, name: str, number: int) -> Path:
        return self.generation(name, number) / "record"

    def manifest(self, generation: Generation) -> Path:
        return self.generation(generation.name, generation.number) / "model.yaml"

    # -- what is there

    def names(self) -> list[str]:
        """Every model with a directory, also when nothing of it is installed any more."""
        names = [n for n in self.files.names(self.models) if generations.NAME.fullmatch(n)]
        entries = {name: self.files.entry(self.models / name) for name in names}
        return [name for name, entry in entries.items() if entry and entry.is_directory]

    def numbers(self, name: str) -> list[int]:
        """The numbers of all generations of a model, also of damaged ones; ascending."""
        try:
            names = self.files.names(self.generations(name))
        except NotFoundError:
            return []
        return sorted(int(n) for n in names if generations.NUMBER.fullmatch(n))

    def read_generation(self, name: str, number: int) -> Generation | None:
        """The generation, or None when its record is missing, torn, altered or another one's.

        Raises:
            StorageError: the record cannot be read, or is another program version's.
        """
        generation = self._read_record(self.record(name, number), Generation)
        if generation is None or (generation.name, generation.number) != (name, number):
            return None
        return generation

    def load(self, name: str, number: int) -> Generation | None:
        """As `read_generation`, but None for every trouble: one record must not hide the others."""
        try:
            return self.read_generation(name, number)
        except StorageError:
            return None  # `open` reported it, and `Store.generation` says it again when asked

    def loaded(self, name: str) -> tuple[Generation, ...]:
        """The intact generations of one model, by number."""
        every = (self.load(name, number) for number in self.numbers(name))
        return tuple(generation for generation in every if generation is not None)

    def survey(self) -> Survey:
        """All models' generations, read once: what is decided together must be read together."""
        known: list[Generation] = []
        unreadable: list[Path] = []
        for name in self.names():
            for number in self.numbers(name):
                generation = self.load(name, number)
                if generation is None:
                    unreadable.append(self.generation(name, number))
                else:
                    known.append(generation)
        return Survey(tuple(known), tuple(unreadable))

    def temporaries(self, directory: Path) -> list[Path]:
        """What unfinished steps left in a directory."""
        try:
            names = self.files.names(directory)
        except NotFoundError:
            return []
        return [directory / name for name in names if name.startswith(TEMPORARY_PREFIX)]

    def leftovers(self) -> list[Path]:
        """What unfinished steps left anywhere."""
        directories = [self.blobs.directory]
        for name in self.names():
            directories += (self.model(name), self.generations(name))
        return [path for directory in directories for path in self.temporaries(directory)]

    def slots(self, name: str) -> dict[str, Switch | None]:
        """The switch record in each slot; None for a slot that is missing, torn or another's.

        Raises:
            StorageError: a slot cannot be read, or is another program version's.
        """
        slots: dict[str, Switch | None] = {}
        for slot in SLOTS:
            switch = self._read_record(self.model(name) / slot, Switch)
            slots[slot] = switch if switch is not None and switch.name == name else None
        return slots

    def switch(self, name: str) -> Switch:
        """The switch record that counts; an empty one when there is none. Raises as `slots`."""
        return generations.winner(*self.slots(name).values()) or Switch(name)

    def _read_record(self, path: Path, kind: type[_Record]) -> _Record | None:
        try:
            return records.decode(self.files.read(path, records.RECORD_SIZE_MAX), kind)
        except NotFoundError:
            return None

    # -- steps with more than one part

    def turn_switch(self, switch: Switch) -> None:
        """The slot that does not count: its rename is the switch. The other one keeps what was.

        Until `write_switch` has made them equal, the loss of the newer slot, and nothing less,
        would lead back to the switch before.
        """
        slots = self.slots(switch.name)
        older = min(SLOTS, key=lambda slot: _sequence(slots[slot]))
        write_atomic(self.files, self.model(switch.name) / older, records.encode(switch))

    def write_switch(self, switch: Switch) -> None:
        """Both slots, the one that does not count first: its rename is the switch.

        The second is the copy that makes the loss of either harmless. A slot that holds the record
        is left alone.
        """
        slots = self.slots(switch.name)
        data = records.encode(switch)
        for slot in sorted(SLOTS, key=lambda slot: _sequence(slots[slot])):
            if slots[slot] != switch:
                write_atomic(self.files, self.model(switch.name) / slot, data)

    def unpublish(self, name: str, number: int) -> None:
        """Make the generation's directory vanish at once and for good, then take it apart."""
        path = self.generation(name, number)
        doomed = temporary(path)
        self.remove_tree(doomed)
        self.files.rename(path, doomed)
        self.remove_leftover(doomed)

    def remove_leftover(self, path: Path) -> None:
        """Take apart what bears a temporary name.

        That it no longer bears its real name must be on the medium first, or a power cut could
        bring half of it back under that name.
        """
        self.files.sync_directory(path.parent)
        self.remove_tree(path)

    def make_directory(self, path: Path) -> None:
        """The directory and what is above it, durable when made."""
        if self.files.entry(path) is None:
            self.make_directory(path.parent)
            self.files.mkdir(path)
            self.files.sync_directory(path.parent)

    def sync_chain(self, name: str) -> None:
        """Every name from the root to a model's generations is on the medium.

        Also names that an earlier call made and was interrupted before it could sync them.
        """
        self.blobs.sync()
        for path in (self.generations(name), self.model(name), self.models, self.root):
            self.files.sync_directory(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a file or directory with all that is in it; harmless when there is none."""
        entry = self.files.entry(path)
        if entry is None:
            return
        if not entry.is_directory:
            self.files.unlink(path)
            return
        for name in self.files.names(path):
            self.remove_tree(path / name)
        self.files.rmdir(path)


def _sequence(slot: Switch | None) -> int:
    """How new a slot is; a torn one is older than any."""
    return -1 if slot is None else slot.sequence
