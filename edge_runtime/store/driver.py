"""The store: carries out the rules of `generations.py` through `Files`.

Law of this file: order of steps, nothing else. What is installed, serves or may go is decided in
`generations.py`; how a blob or record is made is in `blobs.py`, `records.py` and `files.py`. Three
orders make every interruption harmless:

1. blobs, then the generation that names them, then the switch that names the generation; each is on
   the medium before the next is begun (also what an earlier, interrupted call left merely visible);
2. a generation appears and disappears by one rename of its whole directory;
3. before anything is removed, both slots of the switch are on the medium and agree that it is free.

The layout on disk is in docs/store.md.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from edge_runtime.clock import Clock
from edge_runtime.errors import (
    ConflictError,
    EdgeError,
    NotFoundError,
    StorageError,
    TooLargeError,
)
from edge_runtime.files import TEMPORARY_PREFIX, Files, discard, temporary, write_atomic
from edge_runtime.store import generations, records
from edge_runtime.store.blobs import Advance, Blobs
from edge_runtime.store.generations import BlobRef, Generation, Switch

# A manifest is text for people and programs; goldens and artifacts are blobs.
MANIFEST_SIZE_MAX = 16 * 1024 * 1024

# Kept free by `install`: room for the records of switching and for the log, so that a disk filled
# by models can still roll back.
RESERVE_BYTES = 1024 * 1024
_BLOCK_BYTES = 4096  # what a file may waste at its end

SLOTS = ("switch.a", "switch.b")

_Record = TypeVar("_Record", bound=msgspec.Struct)

# Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


class BlobSource(NamedTuple):
    """A blob to install. `chunks` is iterated once, and not at all when the blob is there."""

    sha256: str
    size_bytes: int
    chunks: Iterable[bytes]


class Recovery(msgspec.Struct, frozen=True):
    """What `Store.open` found and did; every entry is a sentence or a path, for the log."""

    removed: tuple[str, ...] = ()  # leftovers of interrupted work
    repaired: tuple[str, ...] = ()  # switch slots written again from the other one
    damaged: tuple[str, ...] = ()  # records that no interruption explains: the medium or a hand
    problems: tuple[str, ...] = ()  # what could not be read, removed or repaired; open goes on


class Freed(msgspec.Struct, frozen=True):
    """What a removal gave back."""

    size_bytes: int = 0
    generations: tuple[Generation, ...] = ()
    blobs: tuple[str, ...] = ()  # SHA-256
    # Not empty: why unreferenced blobs were kept.
    held_back: str = ""


class Verification(msgspec.Struct, frozen=True):
    """What re-hashing a generation found; nothing in `damaged` means all is well."""

    generation: Generation
    size_bytes: int
    damaged: tuple[str, ...] = ()  # sentences


class StoreStatistics(msgspec.Struct, frozen=True):
    """Sizes now, and counts since `open`."""

    models: int
    generations: int
    used_bytes: int
    free_bytes: int
    byte_budget: int | None
    installs: int
    switches: int
    written_bytes: int
    freed_bytes: int


class Store:
    """Installed models on disk.

    One process owns a root, by lock, between `open` and `close`; calls come from one thread at a
    time. Nothing is cached: every answer is read from disk. After a StorageError from a call that
    changes something, the change stands or not, never half (`current` and `generations` tell), and
    the same call may be made again.
    """

    def __init__(
        self, root: Path, files: Files, clock: Clock, byte_budget: int | None = None
    ) -> None:
        self._root = root
        self._files = files
        self._clock = clock
        self._byte_budget = byte_budget
        self._models = root / "models"
        self._blobs = Blobs(files, root / "blobs")
        self._unlock: Callable[[], None] | None = None
        self._installs = self._switches = self._written_bytes = self._freed_bytes = 0

    # -- opening

    def open(self) -> Recovery:
        """Lock the root, make the layout, clear up after interruptions.

        A damaged model or a disk that cannot be written does not keep the others from serving: what
        could not be done is in the report.

        Raises:
            ConflictError: another daemon has the root open.
            StorageError: the layout is not there and cannot be made.
        """
        assert self._unlock is None, "the store is open"
        self._make_directory(self._root)
        try:
            self._unlock = self._files.lock(self._root / "lock")
        except ConflictError as e:
            raise ConflictError(
                "another daemon uses this state directory",
                where=str(self._root),
                remedy="stop it, or give this one another --state-dir",
            ) from e
        try:
            self._make_directory(self._models)
            self._make_directory(self._blobs.directory)
            return self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock; harmless when not open."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _recover(self) -> Recovery:
        notes = _Notes()
        self._clear(self._blobs.directory, notes)
        for name in self._files.names(self._models):
            if generations.NAME.fullmatch(name):
                with notes.going_on(self._models / name):
                    self._recover_model(name, notes)
            else:
                notes.problems.append(f"{self._models / name}: not a model's directory; ignored")
        return notes.recovery()

    def _recover_model(self, name: str, notes: _Notes) -> None:
        self._clear(self._model(name), notes)
        slots = self._slots(name)
        notes.damaged += [
            f"{self._model(name) / slot}: torn or altered"
            for slot, switch in slots.items()
            if switch is None and self._files.entry(self._model(name) / slot) is not None
        ]
        switch = generations.winner(*slots.values())
        if switch is not None and len(set(slots.values())) > 1:
            with notes.going_on(self._model(name)):
                self._write_switch(switch)
                notes.repaired.append(name)
        if self._files.entry(self._generations(name)) is None:
            return
        self._clear(self._generations(name), notes)
        for number in self._numbers(name):
            with notes.going_on(self._generation(name, number)):
                if self._read_generation(name, number) is None:
                    self._recover_generation(name, number, switch, notes)

    def _recover_generation(
        self, name: str, number: int, switch: Switch | None, notes: _Notes
    ) -> None:
        """Without a good record it is of no use, and stays only when the switch names it."""
        path = self._generation(name, number)
        if switch is not None and generations.is_protected(switch, number):
            notes.damaged.append(f"{path}: its record is torn or altered; install it again")
            return
        self._unpublish(name, number)
        notes.removed.append(str(path))

    def _clear(self, directory: Path, notes: _Notes) -> None:
        for name in self._files.names(directory):
            if name.startswith(TEMPORARY_PREFIX):
                with notes.going_on(directory / name):
                    self._remove_tree(directory / name)
                    notes.removed.append(str(directory / name))

    # -- installing

    def install(
        self,
        name: str,
        version: int,
        manifest: bytes,
        blobs: Iterable[tuple[str, int, Iterable[bytes]]],
        progress: Progress | None = None,
    ) -> Generation:
        """Put a version on disk; it does not serve until it is activated.

        Installing the same again changes nothing but repairs what is damaged. A failed install
        leaves what was there, and its own blobs only where the disk refused to remove them (they
        are garbage then).

        Args:
            blobs: as BlobSource; every blob that the manifest names.
            progress: told of every chunk, also of those that were there and are only verified.

        Raises:
            RequestError: the name or version is not one.
            TooLargeError: the manifest is over MANIFEST_SIZE_MAX, or there are too many blobs.
            BundleError: a blob is not what its digest and size say.
            ConflictError: the version is installed with other content.
            StorageError: no room (nothing was written then), or a step failed.
        """
        sources = [BlobSource(*blob) for blob in blobs]
        generation = self._plan(name, version, manifest, sources)
        advance = _Meter(sum(blob.size_bytes for blob in generation.blobs), progress)
        missing = self._missing(generation, advance)
        self._check_room(generation, missing)
        self._make_directory(self._generations(name))
        added = [b.sha256 for b in missing if self._files.entry(self._blobs.path(b.sha256)) is None]
        try:
            self._add_blobs(missing, sources, advance)
            self._publish(generation, manifest)
        except BaseException:
            self._withdraw(generation, added)
            raise
        self._sync_chain(name)
        self._installs += 1
        return generation

    def _plan(
        self, name: str, version: int, manifest: bytes, sources: list[BlobSource]
    ) -> Generation:
        """The generation that this install makes, or the one that it repeats."""
        generations.check_name(name)
        generations.check_version(version)
        if len(manifest) > MANIFEST_SIZE_MAX:
            raise TooLargeError(
                f"manifest of {len(manifest)} bytes",
                where=f"{name}@{version}",
                expected=f"at most {MANIFEST_SIZE_MAX} bytes",
            )
        refs = generations.blob_refs((source.sha256, source.size_bytes) for source in sources)
        digest = hashlib.sha256(manifest).hexdigest()
        every = self._all_generations()
        own = [generation for generation in every if generation.name == name]
        known = generations.installed(own, name, version, digest)
        if known is not None:
            return known
        generation = Generation(
            name=name,
            number=generations.next_number(self._switch(name), self._numbers(name)),
            version=version,
            manifest_sha256=digest,
            manifest_size_bytes=len(manifest),
            blobs=refs,
            installed_wall_s=self._clock.wall_s(),
            order=max((other.order for other in every), default=0) + 1,
        )
        if len(records.encode(generation)) > records.RECORD_SIZE_MAX:
            raise TooLargeError(f"{len(refs)} blobs are too many", where=f"{name}@{version}")
        return generation

    def _missing(self, generation: Generation, advance: Advance) -> list[BlobRef]:
        """The blobs that are not there or not intact; those that are count as progress."""
        missing = []
        for blob in generation.blobs:
            if self._blobs.is_intact(blob):
                advance(blob.size_bytes)
            else:
                missing.append(blob)
        return missing

    def _check_room(self, generation: Generation, missing: list[BlobRef]) -> None:
        free_bytes = self._files.free_bytes(self._root)
        need_bytes = generation.manifest_size_bytes + RESERVE_BYTES
        need_bytes += sum(blob.size_bytes + _BLOCK_BYTES for blob in missing)
        if missing and free_bytes < need_bytes:
            raise StorageError(
                f"{generation.name}@{generation.version} needs {need_bytes} bytes,"
                f" {free_bytes} are free",
                where=str(self._root),
                remedy="remove versions that are not needed, or free space",
            )

    def _add_blobs(
        self, missing: list[BlobRef], sources: list[BlobSource], advance: Advance
    ) -> None:
        chunks = {source.sha256: source.chunks for source in sources}
        for blob in missing:
            self._blobs.add(blob, chunks[blob.sha256], advance)
            self._written_bytes += blob.size_bytes
        self._blobs.sync()

    def _publish(self, generation: Generation, manifest: bytes) -> None:
        """Make the generation's directory appear, whole and durable; repair it when it is there."""
        target = self._generation(generation.name, generation.number)
        if self._files.entry(target) is not None:
            if not self._has_manifest(generation):
                write_atomic(self._files, target / "model.yaml", manifest)
            return
        prepared = temporary(target)
        self._remove_tree(prepared)
        self._files.mkdir(prepared)
        write_atomic(self._files, prepared / "model.yaml", manifest)
        write_atomic(self._files, prepared / "record", records.encode(generation))
        self._files.rename(prepared, target)

    def _withdraw(self, generation: Generation, added: list[str]) -> None:
        """Take back what a failed install wrote, as far as the disk lets us."""
        target = self._generation(generation.name, generation.number)
        with contextlib.suppress(StorageError, NotFoundError):
            if self._files.entry(target) is None:
                self._remove_tree(temporary(target))
                for sha256 in added:
                    discard(self._files, self._blobs.path(sha256))

    # -- switching

    def activate(self, name: str, generation: int, reason: str = "activated") -> Switch:
        """Make an installed generation the one that serves; durable on return.

        Args:
            generation: its number.
            reason: for `why`.

        Raises:
            NotFoundError: no such model or generation.
            StorageError: it is damaged, or a step failed.
        """
        self._require_complete(self.generation(name, generation))
        switch = self._switch(name)
        now_s = self._clock.wall_s()
        return self._commit(generations.activated(switch, generation, now_s, reason))

    def rollback(self, name: str, reason: str = "rolled back") -> Switch:
        """Make the previous generation the one that serves; `previous` is empty afterwards.

        Raises:
            NotFoundError: no such model.
            ConflictError: there is no previous generation.
            StorageError: the previous generation is damaged, or a step failed.
        """
        switch = generations.rolled_back(self.current(name), self._clock.wall_s(), reason)
        assert switch.active is not None
        self._require_complete(self.generation(name, switch.active))
        return self._commit(switch)

    def deactivate(self, name: str, reason: str = "unloaded") -> Switch:
        """Nothing of the model serves, also after a restart, until it is activated again.

        Raises:
            NotFoundError: no such model.
            StorageError: a step failed.
        """
        return self._commit(
            generations.deactivated(self.current(name), self._clock.wall_s(), reason)
        )

    def _require_complete(self, generation: Generation) -> None:
        """Everything is there with its size; hashing it all is what `verify` is for."""
        if not self._has_manifest(generation):
            raise StorageError(
                "manifest is missing or altered",
                where=str(self._manifest(generation)),
                remedy="install the bundle again to repair it",
            )
        for blob in generation.blobs:
            self._blobs.require(blob)

    def _commit(self, switch: Switch) -> Switch:
        self._sync_chain(switch.name)
        if set(self._slots(switch.name).values()) != {switch}:
            self._write_switch(switch)
            self._switches += 1
        return switch

    def _write_switch(self, switch: Switch) -> None:
        """Both slots, the one that does not count first: its rename is the switch.

        The second is the copy that makes the loss of either harmless.
        """
        slots = self._slots(switch.name)
        newest = generations.winner(*slots.values())
        data = records.encode(switch)
        for slot in sorted(SLOTS, key=lambda slot: slots[slot] == newest):
            if slots[slot] != switch:
                write_atomic(self._files, self._model(switch.name) / slot, data)

    # -- asking

    def models(self) -> tuple[str, ...]:
        """The names of all models with a generation, sorted."""
        return tuple(name for name in self._names() if self._numbers(name))

    def current(self, name: str) -> Switch:
        """What serves; `active` is None for a model that never was activated or is unloaded.

        Raises:
            NotFoundError: no such model.
            StorageError: the record is another version's.
        """
        if not self._numbers(generations.check_name(name)):
            raise NotFoundError(f"no model {name!r} is installed", remedy="install a bundle of it")
        return self._switch(name)

    def generations(self, name: str) -> tuple[Generation, ...]:
        """The intact generations of a model, by number; empty for an unknown model."""
        loaded = (self._load(name, number) for number in self._numbers(name))
        return tuple(generation for generation in loaded if generation is not None)

    def generation(self, name: str, number: int) -> Generation:
        """One generation by its number.

        Raises:
            NotFoundError: it is not installed.
            StorageError: it is, and its record is damaged.
        """
        if number not in self._numbers(generations.check_name(name)):
            raise NotFoundError(f"no generation {number}", where=name)
        generation = self._read_generation(name, number)
        if generation is None:
            raise StorageError(
                "the generation's record is torn or altered",
                where=str(self._generation(name, number)),
                remedy="install the bundle again",
            )
        return generation

    def find(self, name: str, version: int) -> Generation:
        """One generation by its version.

        Raises:
            NotFoundError: it is not installed.
        """
        known = self.generations(name)
        for generation in known:
            if generation.version == version:
                return generation
        versions = ", ".join(str(generation.version) for generation in known) or "none"
        raise NotFoundError(f"version {version} is not installed", where=name, expected=versions)

    def read_manifest(self, generation: Generation) -> bytes:
        """The bytes of model.yaml, verified.

        Raises:
            StorageError: missing, altered or unreadable.
        """
        path = self._manifest(generation)
        try:
            manifest = self._files.read(path, MANIFEST_SIZE_MAX)
        except NotFoundError as e:
            raise StorageError("manifest is missing", where=str(path)) from e
        if hashlib.sha256(manifest).hexdigest() != generation.manifest_sha256:
            raise StorageError(
                "manifest is not the one that was installed",
                where=str(path),
                remedy="install the bundle again to repair it",
            )
        return manifest

    def blob_path(self, sha256: str, size_bytes: int | None = None) -> Path:
        """Where a blob's bytes are. Read-only for everyone; it may be replaced by an equal file.

        Raises:
            NotFoundError: there is no such blob.
            StorageError: it has another size than `size_bytes`.
        """
        path = self._blobs.path(sha256)
        entry = self._files.entry(path)
        if entry is None:
            raise NotFoundError("no such blob", where=str(path), remedy="install the bundle again")
        return path if size_bytes is None else self._blobs.require(BlobRef(sha256, size_bytes))

    def verify(self, name: str, version: int, progress: Progress | None = None) -> Verification:
        """Hash a generation again, from disk.

        Raises:
            NotFoundError: it is not installed.
        """
        generation = self.find(name, version)
        advance = _Meter(sum(blob.size_bytes for blob in generation.blobs), progress)
        damaged = [] if self._has_manifest(generation) else ["model.yaml: missing or altered"]
        for blob in generation.blobs:
            try:
                if not self._blobs.is_intact(blob, advance):
                    damaged.append(f"blob {blob.sha256}: missing or altered")
            except StorageError as e:
                damaged.append(str(e))
        return Verification(generation, generation.size_bytes, tuple(damaged))

    def statistics(self) -> StoreStatistics:
        """Sizes are read from disk: some milliseconds."""
        known = self._all_generations()
        return StoreStatistics(
            models=len({generation.name for generation in known}),
            generations=len(known),
            used_bytes=generations.used_bytes(known),
            free_bytes=self._files.free_bytes(self._root),
            byte_budget=self._byte_budget,
            installs=self._installs,
            switches=self._switches,
            written_bytes=self._written_bytes,
            freed_bytes=self._freed_bytes,
        )

    # -- removing

    def remove(self, name: str, version: int) -> Freed:
        """Remove a version and the blobs that no other one names.

        Raises:
            NotFoundError: it is not installed.
            ConflictError: it is active or previous.
            StorageError: a step failed.
        """
        generation = self.find(name, version)
        generations.check_removable(self._switch(name), generation)
        own = {blob.sha256 for blob in generation.blobs}
        return self._drop((generation,), only=own)

    def collect_garbage(self, byte_budget: int | None = None) -> Freed:
        """Drop what the budget has no room for, oldest first, and blobs that nothing names.

        The active and previous generations of all models stay, whatever the budget.

        Args:
            byte_budget: instead of the store's own.

        Raises:
            StorageError: a step failed; what was dropped until then stays dropped.
        """
        budget = self._byte_budget if byte_budget is None else byte_budget
        switches = {name: self._switch(name) for name in self._names()}
        return self._drop(generations.garbage(self._all_generations(), switches, budget))

    def _drop(self, doomed: tuple[Generation, ...], only: set[str] | None = None) -> Freed:
        """Remove generations, then blobs without a name (`only`: none but these)."""
        for name in {generation.name for generation in doomed}:
            self._sync_chain(name)
            remembering = generations.remembering(self._switch(name), self._numbers(name))
            self._write_switch(remembering)
        for generation in doomed:
            self._unpublish(generation.name, generation.number)
        freed = sum(generation.manifest_size_bytes for generation in doomed)
        blobs: list[str] = []
        held_back = self._unreadable()
        if not held_back:
            present = self._blobs.present()
            free = generations.unreferenced(present, self._all_generations())
            blobs += (sha256 for sha256 in free if only is None or sha256 in only)
            freed += sum(self._blobs.drop(sha256) for sha256 in blobs)
            self._blobs.sync()
        self._freed_bytes += freed
        return Freed(freed, doomed, tuple(blobs), held_back)

    def _unreadable(self) -> str:
        """Why it is not known which blobs are needed; empty when it is."""
        for name in self._names():
            for number in self._numbers(name):
                if self._load(name, number) is None:
                    return f"{self._generation(name, number)} is damaged: its blobs are not known"
        return ""

    def _unpublish(self, name: str, number: int) -> None:
        """Make the generation's directory vanish at once and for good, then take it apart."""
        path = self._generation(name, number)
        doomed = temporary(path)
        self._remove_tree(doomed)
        self._files.rename(path, doomed)
        self._files.sync_directory(path.parent)
        self._remove_tree(doomed)

    # -- the disk

    def _model(self, name: str) -> Path:
        return self._models / generations.check_name(name)

    def _generations(self, name: str) -> Path:
        return self._model(name) / "generations"

    def _generation(self, name: str, number: int) -> Path:
        return self._generations(name) / f"{number:06d}"

    def _manifest(self, generation: Generation) -> Path:
        return self._generation(generation.name, generation.number) / "model.yaml"

    def _names(self) -> list[str]:
        assert self._unlock is not None, "the store is not open"
        names = [n for n in self._files.names(self._models) if generations.NAME.fullmatch(n)]
        entries = {name: self._files.entry(self._models / name) for name in names}
        return [name for name, entry in entries.items() if entry and entry.is_directory]

    def _numbers(self, name: str) -> list[int]:
        """The numbers of all generations of a model, also of damaged ones."""
        assert self._unlock is not None, "the store is not open"
        try:
            names = self._files.names(self._generations(name))
        except NotFoundError:
            return []
        return sorted(int(n) for n in names if generations.NUMBER.fullmatch(n))

    def _load(self, name: str, number: int) -> Generation | None:
        """The generation, or None when it cannot be had, for whatever reason."""
        try:
            return self._read_generation(name, number)
        except StorageError:
            return None  # `open` reported it; one bad record must not hide the others

    def _read_generation(self, name: str, number: int) -> Generation | None:
        """The generation, or None when its record is missing, torn, altered or of another one."""
        path = self._generation(name, number) / "record"
        generation = self._read_record(path, Generation)
        if generation is None or (generation.name, generation.number) != (name, number):
            return None
        return generation

    def _all_generations(self) -> list[Generation]:
        return [generation for name in self._names() for generation in self.generations(name)]

    def _slots(self, name: str) -> dict[str, Switch | None]:
        """The switch record in each slot; None for a slot that is missing, torn or another's."""
        slots = {s: self._read_record(self._model(name) / s, Switch) for s in SLOTS}
        return {
            s: switch if switch and switch.name == name else None for s, switch in slots.items()
        }

    def _switch(self, name: str) -> Switch:
        return generations.winner(*self._slots(name).values()) or Switch(name)

    def _read_record(self, path: Path, kind: type[_Record]) -> _Record | None:
        try:
            return records.decode(self._files.read(path, records.RECORD_SIZE_MAX), kind)
        except NotFoundError:
            return None

    def _has_manifest(self, generation: Generation) -> bool:
        try:
            self.read_manifest(generation)
        except StorageError:
            return False
        return True

    def _make_directory(self, path: Path) -> None:
        if self._files.entry(path) is None:
            self._make_directory(path.parent)
            self._files.mkdir(path)
            self._files.sync_directory(path.parent)

    def _sync_chain(self, name: str) -> None:
        """Every name from the root to a model's generations is on the medium.

        Also names that an earlier call made and was interrupted before it could sync them.
        """
        self._blobs.sync()
        for path in (self._generations(name), self._model(name), self._models, self._root):
            self._files.sync_directory(path)

    def _remove_tree(self, path: Path) -> None:
        entry = self._files.entry(path)
        if entry is None:
            return
        if not entry.is_directory:
            self._files.unlink(path)
            return
        for name in self._files.names(path):
            self._remove_tree(path / name)
        self._files.rmdir(path)


class _Meter:
    """An Advance that adds up for a Progress."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._progress = progress

    def __call__(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


class _Notes:
    """A Recovery in the making."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.repaired: list[str] = []
        self.damaged: list[str] = []
        self.problems: list[str] = []

    @contextlib.contextmanager
    def going_on(self, path: Path) -> Iterator[None]:
        """One bad model, or a disk that cannot be written, must not keep the rest from serving."""
        try:
            yield
        except EdgeError as e:
            self.problems.append(f"{path}: {e}")

    def recovery(self) -> Recovery:
        return Recovery(
            tuple(self.removed), tuple(self.repaired), tuple(self.damaged), tuple(self.problems)
        )
