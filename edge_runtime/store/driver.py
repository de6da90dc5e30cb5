"""The store: carries out the rules of `generations.py` through `Files`.

Law of this file: order of steps, nothing else. What is installed, serves or may go is decided in
`generations.py`; how a blob, record or slot is made is in `blobs.py`, `records.py` and `disk.py`;
the order of removing is in `removal.py`. Two orders make every interruption harmless:

1. blobs, then the generation that names them, then the switch that names the generation; each is on
   the medium before the next is begun (also what an earlier, interrupted call left merely visible);
2. a generation appears by one rename of its whole directory, and disappears by another.

The layout on disk is in docs/store.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime import digests
from edge_runtime.clock import Clock
from edge_runtime.errors import (
    BundleError,
    ConflictError,
    NotFoundError,
    StorageError,
    TooLargeError,
)
from edge_runtime.files import Files, discard, temporary, write_atomic
from edge_runtime.store import decisions, generations, records, recovery, removal
from edge_runtime.store.blobs import Advance
from edge_runtime.store.decisions import Decision
from edge_runtime.store.disk import Disk
from edge_runtime.store.generations import BlobRef, Generation, Switch
from edge_runtime.store.records import DamagedError
from edge_runtime.store.recovery import Recovery
from edge_runtime.store.removal import Freed

# A manifest is text for people and programs; goldens and artifacts are blobs.
MANIFEST_SIZE_MAX = 16 * 1024 * 1024

# Kept free by `install`: room for the records of switching and for the log, so that a disk filled
# by models can still roll back.
RESERVE_BYTES = 1024 * 1024
_BLOCK_BYTES = 4096  # what a file may waste at its end

# Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


class BlobSource(NamedTuple):
    """A blob to install. `chunks` is iterated once, and not at all when the blob is there."""

    sha256: str
    size_bytes: int
    chunks: Iterable[bytes]


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
    time, but that during an `install` another thread may read, switch and settle. Nothing is
    cached: every answer is read from disk. After a StorageError from a call that
    changes something, the change stands or not, never half (`current` and `generations` tell), and
    the same call may be made again.
    """

    def __init__(
        self,
        root: Path,
        files: Files,
        clock: Clock,
        byte_budget: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        """`reserve_bytes`: what an install must leave free on the disk."""
        self._directory = Disk(files, root)
        self._clock = clock
        self._byte_budget = byte_budget
        self._reserve_bytes = max(reserve_bytes, RESERVE_BYTES)
        self._unlock: Callable[[], None] | None = None
        # Models whose directories this process has synced since they last changed.
        self._chained: set[str] = set()
        self._installing = ""  # the model of which a version is being installed
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
        disk = self._directory
        disk.make_directory(disk.root)
        try:
            self._unlock = disk.files.lock(disk.root / "lock")
        except ConflictError as e:
            raise ConflictError(
                "another daemon uses this state directory",
                where=str(disk.root),
                remedy="stop it, or give this one another --state-dir",
            ) from e
        try:
            disk.make_directory(disk.models)
            disk.make_directory(disk.blobs.directory)
            return recovery.recover(disk)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock; harmless when not open."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def interrupt(self) -> None:
        """Have an install or verification under way in another thread give up soon, for good."""
        self._directory.blobs.interrupted = True

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
            UnavailableError: it was interrupted.
            StorageError: no room (nothing was written then), or a step failed.
        """
        sources = [BlobSource(*blob) for blob in blobs]
        generation = self._plan(name, version, manifest, sources)
        advance = _Meter(sum(blob.size_bytes for blob in generation.blobs), progress)
        missing = self._missing(generation, advance)
        self._check_room(generation, missing)
        self._installing = name  # before: a switch that goes on beside it sees one of the two
        self._chained.discard(name)
        try:
            self._bring_in(generation, manifest, missing, sources, advance)
            self._disk.sync_chain(name)
            self._chained.add(name)
        finally:
            self._installing = ""
        self._installs += 1
        return generation

    def _bring_in(
        self,
        generation: Generation,
        manifest: bytes,
        missing: list[BlobRef],
        sources: list[BlobSource],
        advance: Advance,
    ) -> None:
        """Blobs, then the generation; if that fails, neither."""
        self._disk.make_directory(self._disk.generations(generation.name))
        added = [blob for blob in missing if self._disk.blobs.size_bytes(blob.sha256) is None]
        try:
            self._add_blobs(missing, sources, advance)
            self._publish(generation, manifest)
        except BaseException:
            self._withdraw(generation, added)
            raise

    def _plan(
        self, name: str, version: int, manifest: bytes, sources: list[BlobSource]
    ) -> Generation:
        """The generation that this install makes, or the one that it repeats."""
        generations.check_name(name)
        generations.check_version(version)
        _check_size("manifest", len(manifest), MANIFEST_SIZE_MAX)
        refs = generations.blob_refs((source.sha256, source.size_bytes) for source in sources)
        digest = digests.sha256_hex(manifest)
        numbers = self._disk.numbers(name)
        own = [self._disk.read_generation(name, number) for number in numbers]
        known = generations.installed(filter(None, own), name, version, digest)
        if known is not None:
            return known
        generation = Generation(
            name=name,
            number=generations.next_number(self._disk.switch(name), numbers),
            version=version,
            manifest_sha256=digest,
            manifest_size_bytes=len(manifest),
            blobs=refs,
            installed_wall_s=self._clock.wall_s(),
            order=generations.next_order(self._disk.survey().generations),
        )
        _check_size("list of blobs", len(records.encode(generation)), records.RECORD_SIZE_MAX)
        return generation

    def _missing(self, generation: Generation, advance: Advance) -> list[BlobRef]:
        """The blobs that are not there or not intact; those that are count as progress."""
        missing = []
        for blob in generation.blobs:
            if self._disk.blobs.is_intact(blob):
                advance(blob.size_bytes)
            else:
                missing.append(blob)
        return missing

    def _check_room(self, generation: Generation, missing: list[BlobRef]) -> None:
        free_bytes = self._disk.files.free_bytes(self._disk.root)
        need_bytes = generation.manifest_size_bytes
        need_bytes += sum(blob.size_bytes + _BLOCK_BYTES for blob in missing)
        if missing and free_bytes < need_bytes + self._reserve_bytes:
            raise StorageError(
                f"{generation.name}@{generation.version} needs {need_bytes} bytes and"
                f" {self._reserve_bytes} must stay free; {free_bytes} are free",
                where=str(self._disk.root),
                remedy="remove versions that are not needed, or free space",
            )

    def _add_blobs(
        self, missing: list[BlobRef], sources: list[BlobSource], advance: Advance
    ) -> None:
        chunks = {source.sha256: source.chunks for source in sources}
        for blob in missing:
            if blob.sha256 not in chunks:  # repeated with fewer blobs than the first time
                raise BundleError("the bundle lacks a blob", where=blob.sha256)
            self._disk.blobs.add(blob, chunks[blob.sha256], advance)
            self._written_bytes += blob.size_bytes
        self._disk.blobs.sync()

    def _publish(self, generation: Generation, manifest: bytes) -> None:
        """Make the generation's directory appear, whole and durable; repair it when it is there."""
        target = self._disk.generation(generation.name, generation.number)
        if self._disk.files.entry(target) is not None:
            if not self._has_manifest(generation):
                write_atomic(self._disk.files, target / "model.yaml", manifest)
            return
        prepared = temporary(target)
        self._disk.remove_tree(prepared)
        self._disk.files.mkdir(prepared)
        write_atomic(self._disk.files, prepared / "model.yaml", manifest)
        write_atomic(self._disk.files, prepared / "record", records.encode(generation))
        self._disk.files.rename(prepared, target)

    def _withdraw(self, generation: Generation, added: list[BlobRef]) -> None:
        """Take back what a failed install wrote, as far as the disk lets us.

        A blob that another generation had lost stays: that one may serve by now.
        """
        target = self._disk.generation(generation.name, generation.number)
        with contextlib.suppress(StorageError, NotFoundError):
            if self._disk.files.entry(target) is None:
                self._disk.remove_tree(temporary(target))
                known = self._disk.survey().generations
                for sha256 in generations.unreferenced((blob.sha256 for blob in added), known):
                    discard(self._disk.files, self._disk.blobs.path(sha256))

    # -- switching

    def activate(self, name: str, generation: int, reason: str = "activated") -> Switch:
        """Make an installed generation the one that serves; durable on return. See `settle`.

        Args:
            generation: its number.
            reason: for `why`.

        Raises:
            NotFoundError: no such model or generation.
            StorageError: it is damaged, or a step failed.
        """
        self._require_complete(name, generation)
        switch = self._disk.switch(name)
        return self._commit(
            generations.activated(
                switch,
                generation,
                self._clock.wall_s(),
                reason,
                active_is_damaged=self._is_damaged(name, switch.active),
            )
        )

    def rollback(self, name: str, reason: str = "rolled back") -> Switch:
        """Make the previous generation the one that serves; `previous` is empty afterwards.

        Raises:
            NotFoundError: no such model.
            ConflictError: there is no previous generation.
            StorageError: the previous generation is damaged, or a step failed.
        """
        switch = generations.rolled_back(self.current(name), self._clock.wall_s(), reason)
        assert switch.active is not None
        self._require_complete(name, switch.active)
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

    def _require_complete(self, name: str, number: int) -> None:
        """Everything is there with its size; hashing it all is what `verify` is for."""
        generation = self.generation(name, number)
        self.read_manifest(generation)
        for blob in generation.blobs:
            self._disk.blobs.require(blob)

    def _is_damaged(self, name: str, number: int | None) -> bool:
        """Whether it is known to be; of what cannot be read just now it is not known."""
        if number is None:
            return False
        try:
            self._require_complete(name, number)
        except (DamagedError, NotFoundError):
            return True
        except StorageError:
            return False
        return False

    def settle(self, name: str) -> None:
        """Make both slots hold what `activate`, `rollback` or `deactivate` decided.

        They return when one slot has it, which is the switch: whoever waits for it need not wait
        for the copy. Without this call `open`, a removal, or the same call again makes it.

        Raises:
            StorageError: a step failed; the switch stands all the same.
        """
        self._disk.write_switch(self._disk.switch(generations.check_name(name)))

    def _commit(self, switch: Switch) -> Switch:
        """One slot, durable on return."""
        self._chain(switch.name)
        if self._disk.switch(switch.name) == switch:
            # Nothing new; or it was written by a call that failed, so that only a copy is sure to
            # be on the medium.
            self._disk.write_switch(switch)
        else:
            self._disk.turn_switch(switch)
            self._switches += 1
        return switch

    def _chain(self, name: str) -> None:
        """Sync what an earlier, interrupted call left only visible.

        An install that goes on meanwhile may leave something behind still: then the next call does
        it again.
        """
        if name not in self._chained:
            self._disk.sync_chain(name)
            if name != self._installing:
                self._chained.add(name)

    # -- asking

    def models(self) -> tuple[str, ...]:
        """The names of all models with a generation, sorted."""
        return tuple(name for name in self._disk.names() if self._disk.numbers(name))

    def current(self, name: str) -> Switch:
        """What serves; `active` is None for a model that never was activated or is unloaded.

        Raises:
            NotFoundError: no such model.
            StorageError: the record is another version's.
        """
        if not self._disk.numbers(generations.check_name(name)):
            raise NotFoundError(f"no model {name!r} is installed", remedy="install a bundle of it")
        return self._disk.switch(name)

    def generations(self, name: str) -> tuple[Generation, ...]:
        """The intact generations of a model, by number; empty for an unknown model."""
        return self._disk.loaded(name)

    def generation(self, name: str, number: int) -> Generation:
        """One generation by its number.

        Raises:
            NotFoundError: it is not installed.
            DamagedError: it is, and its record is torn or altered.
            StorageError: its record cannot be read, or is another program version's.
        """
        if number not in self._disk.numbers(generations.check_name(name)):
            raise NotFoundError(f"no generation {number}", where=name)
        generation = self._disk.read_generation(name, number)
        if generation is None:
            raise DamagedError(
                "the generation's record is torn or altered",
                where=str(self._disk.generation(name, number)),
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
            DamagedError: missing or altered.
            StorageError: it cannot be read.
        """
        path = self._disk.manifest(generation)
        try:
            manifest = self._disk.files.read(path, MANIFEST_SIZE_MAX)
        except NotFoundError as e:
            raise DamagedError("manifest is missing", where=str(path)) from e
        if digests.sha256_hex(manifest) != generation.manifest_sha256:
            raise DamagedError(
                "manifest is not the one that was installed",
                where=str(path),
                remedy="install the bundle again to repair it",
            )
        return manifest

    def blob_path(self, sha256: str, size_bytes: int | None = None) -> Path:
        """Where a blob's bytes are. Read-only for everyone; it may be replaced by an equal file.

        Raises:
            NotFoundError: there is no such blob.
            DamagedError: it has another size than `size_bytes`.
        """
        found = self._disk.blobs.size_bytes(sha256)
        if found is None:
            raise NotFoundError("no such blob", where=sha256, remedy="install the bundle again")
        return self._disk.blobs.require(
            BlobRef(sha256, found if size_bytes is None else size_bytes)
        )

    def decision(self, name: str, number: int) -> Decision | None:
        """Which variant of a generation serves here; None: it has to be found out (again)."""
        return decisions.read(self._disk, name, number)

    def keep_decision(self, decision: Decision) -> None:
        """Keep what was decided beside its generation; durable on return.

        Raises:
            NotFoundError: the generation is not installed (any more).
            StorageError: a step failed.
        """
        decisions.write(self._disk, decision)

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
                if not self._disk.blobs.is_intact(blob, advance):
                    damaged.append(f"blob {blob.sha256}: missing or altered")
            except StorageError as e:
                damaged.append(str(e))
        return Verification(generation, generation.size_bytes, tuple(damaged))

    def statistics(self) -> StoreStatistics:
        """Sizes are read from disk: some milliseconds."""
        known = self._disk.survey().generations
        return StoreStatistics(
            models=len({generation.name for generation in known}),
            generations=len(known),
            used_bytes=generations.used_bytes(known),
            free_bytes=self._disk.files.free_bytes(self._disk.root),
            byte_budget=self._byte_budget,
            installs=self._installs,
            switches=self._switches,
            written_bytes=self._written_bytes,
            freed_bytes=self._freed_bytes,
        )

    # -- removing

    def remove(self, name: str, version: int) -> Freed:
        """Remove a version, and every blob that nothing names.

        Raises:
            NotFoundError: it is not installed.
            ConflictError: it is active or previous.
            StorageError: a step failed.
        """
        generation = self.find(name, version)
        generations.check_removable(self._disk.switch(name), generation)
        return self._count(removal.drop(self._disk, self._disk.survey(), (generation,)))

    def collect_garbage(
        self, byte_budget: int | None = None, keep: Mapping[str, Container[int]] | None = None
    ) -> Freed:
        """Drop what the budget has no room for, oldest first, then blobs that nothing names.

        Also what failed calls could not clear away.

        The active and previous generations of all models stay, whatever the budget.

        Args:
            byte_budget: instead of the store's own.
            keep: by model name, numbers of generations that stay as well.

        Raises:
            StorageError: a step failed; what was dropped until then stays dropped.
        """
        for leftover in self._disk.leftovers():
            self._disk.remove_leftover(leftover)
        survey = self._disk.survey()
        # Needs no room, so that a full disk can be relieved; dropping a generation may need some.
        strays = self._count(removal.drop_blobs(self._disk, survey))
        budget = self._byte_budget if byte_budget is None else byte_budget
        switches = {name: self._disk.switch(name) for name in self._disk.names()}
        doomed = generations.garbage(survey.generations, switches, budget, keep or {})
        freed = self._count(removal.drop(self._disk, survey, doomed))
        return removal.together(strays, freed)

    def _count(self, freed: Freed) -> Freed:
        self._freed_bytes += freed.size_bytes
        return freed

    @property
    def _disk(self) -> Disk:
        assert self._unlock is not None, "the store is not open"
        return self._directory

    def _has_manifest(self, generation: Generation) -> bool:
        try:
            self.read_manifest(generation)
        except StorageError:
            return False
        return True


def _check_size(what: str, size_bytes: int, size_max: int) -> None:
    if size_bytes > size_max:
        raise TooLargeError(
            f"{what} takes {size_bytes} bytes", expected=f"at most {size_max} bytes"
        )


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
