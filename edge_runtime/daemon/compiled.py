"""Compiled models on disk: kept for the next load, the oldest given up for new ones.

Law of this file: files under one directory, one sub-directory per artifact. Nothing in it is worth
more than the time to compile it again: whatever goes wrong is an event and never an error, and the
store's budget comes first. What is in a file is the workers' business (serving.compiled).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import EdgeError, StorageError
from edge_runtime.events import Events
from edge_runtime.files import TEMPORARY_PREFIX, Files, discard, temporary
from edge_runtime.serving import channel, compiled
from edge_runtime.store import Store
from edge_runtime.wire import sockets

CHUNK_BYTES = 1 << 20


class CompiledModels:
    """The directory, as the event loop sees it."""

    def __init__(
        self, files: Files, root: Path, bytes_max: int, reserve_bytes: int, events: Events
    ) -> None:
        self._files = files
        self._root = root
        self._bytes_max = bytes_max
        self._reserve_bytes = reserve_bytes
        self._events = events
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def directory(self, artifact_sha256: str) -> Path | None:
        """Where the blobs of an artifact are; None: none are kept."""
        return self._root / artifact_sha256 if self._bytes_max else None

    def keep(self, model: str, artifact_sha256: str, told: channel.Compiled, fd: int) -> None:
        """Keep what a worker has compiled; returns at once, `fd` is ours from now on."""
        task = asyncio.get_running_loop().create_task(self._keep(model, artifact_sha256, told, fd))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, model: str, artifact: str, told: channel.Compiled, fd: int) -> None:
        try:
            async with self._turn:
                await asyncio.to_thread(self._write, artifact, told, fd)
        except EdgeError as error:
            self._events.emit(
                "compiled_not_kept", f"{model}: {error}", level="warning", model=model
            )
        else:
            self._events.emit(
                "compiled_kept",
                f"{model}: what was compiled is kept for the next load ({told.size} bytes)",
                model=model,
                size_bytes=told.size,
            )
        finally:
            sockets.close_fds([fd])

    def _write(self, artifact: str, told: channel.Compiled, fd: int) -> None:
        """Write one file and make it durable. Raises: StorageError."""
        size_max = min(self._bytes_max, compiled.BYTES_MAX)
        if not compiled.is_name(told.name) or not 0 < told.size <= size_max:
            raise StorageError(
                f"{told.name!r} of {told.size} bytes is not kept",
                expected=f"at most {size_max} bytes (store.compiled_bytes_max)",
            )
        if self._files.free_bytes(self._root.parent) < told.size + self._reserve_bytes:
            raise StorageError("too little room on the disk to keep it", where=str(self._root))
        for directory in (self._root, self._root / artifact):
            if self._files.entry(directory) is None:
                self._files.mkdir(directory)
                self._files.sync_directory(directory.parent)
        path = self._root / artifact / told.name
        self._make_room(told.size, path)
        prepared = temporary(path)
        try:
            self._files.write(prepared, _chunks(fd, told.size))
            self._files.sync(prepared)
            self._files.rename(prepared, path)
        except BaseException:
            discard(self._files, prepared)
            raise
        self._files.sync_directory(path.parent)

    def _make_room(self, size: int, coming: Path) -> None:
        """The oldest files go until the new one fits."""
        there = [(path, size) for path, size in self._survey() if path != coming]
        total = sum(size for _, size in there)
        for path, freed in there:
            if total + size <= self._bytes_max:
                return
            self._files.unlink(path)
            total -= freed

    def _survey(self) -> list[tuple[Path, int]]:
        """Every file with its size, oldest first."""
        found = []
        for directory in self._directories():
            for name in self._files.names(directory):
                with contextlib.suppress(OSError):
                    facts = (directory / name).stat()
                    found.append((facts.st_mtime_ns, directory / name, facts.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    def _directories(self) -> list[Path]:
        if self._files.entry(self._root) is None:
            return []
        return [self._root / name for name in self._files.names(self._root)]

    def tidy(self, store: Store) -> None:
        """Remove what belongs to no installed artifact, and what a power cut left half written.

        The directory is there from then on: who is confined to it at his start finds later what is
        kept later. Never raises: what cannot be done now may be at the next start.
        """
        with contextlib.suppress(EdgeError):
            if self._bytes_max and self._files.entry(self._root) is None:
                self._files.mkdir(self._root)
            for directory in self._directories():
                gone = not _is_installed(store, directory.name)
                for name in self._files.names(directory):
                    if gone or name.startswith(TEMPORARY_PREFIX):
                        self._files.unlink(directory / name)
                if gone:
                    self._files.rmdir(directory)


def _is_installed(store: Store, artifact_sha256: str) -> bool:
    try:
        return store.blob_path(artifact_sha256).exists()
    except EdgeError:
        return False


def _chunks(fd: int, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a memfd. Raises: StorageError: it has fewer, or is no file."""
    offset = 0
    while offset < size:
        try:
            chunk = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
        except OSError as e:
            raise StorageError(f"it cannot be read: {e.strerror}") from e
        if not chunk:
            raise StorageError(f"it has {offset} bytes instead of {size}")
        yield chunk
        offset += len(chunk)
