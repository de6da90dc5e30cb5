"""Blobs: files named by the SHA-256 of their bytes.

Law of this file: a blob gets its name only after its bytes were hashed on the way in, synced, and
hashed again on the way back. Who needs a blob, and when it may go, is not known here. The names are
durable after `sync`, which the caller owes before anything refers to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from edge_runtime import digests
from edge_runtime.errors import BundleError, NotFoundError, StorageError, UnavailableError
from edge_runtime.files import Files, discard, temporary
from edge_runtime.store import generations
from edge_runtime.store.generations import BlobRef
from edge_runtime.store.records import DamagedError

# Told how many bytes were just hashed or written.
Advance = Callable[[int], None]


def ignore(_size_bytes: int) -> None:
    """An Advance for callers that show no progress."""


class Blobs:
    """The directory of blobs. One thread at a time."""

    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self.directory = directory
        self.interrupted = False  # set by another thread: whoever hashes or writes gives up

    def path(self, sha256: str) -> Path:
        """Where the blob is or would be."""
        return self.directory / generations.check_sha256(sha256)

    def present(self) -> dict[str, int]:
        """Every blob's size in bytes, by SHA-256; not hashed."""
        names = [n for n in self._files.names(self.directory) if generations.SHA256.fullmatch(n)]
        sizes = {name: self.size_bytes(name) for name in names}
        return {name: size for name, size in sizes.items() if size is not None}

    def size_bytes(self, sha256: str) -> int | None:
        """The blob's size; None when it is not there."""
        entry = self._files.entry(self.path(sha256))
        return None if entry is None else entry.size_bytes

    def require(self, blob: BlobRef) -> Path:
        """The blob's path when it is there with its size; not hashed.

        Raises:
            DamagedError: missing or of another size.
        """
        path = self.path(blob.sha256)
        found = self.size_bytes(blob.sha256)
        if found != blob.size_bytes:
            raise DamagedError(
                "blob is missing" if found is None else f"blob has {found} bytes",
                where=str(path),
                expected=f"{blob.size_bytes} bytes",
                remedy="install the bundle again to repair it",
            )
        return path

    def is_intact(self, blob: BlobRef, advance: Advance = ignore) -> bool:
        """Whether the blob is there and its bytes hash to its name."""
        try:
            return self._has(self.path(blob.sha256), blob, advance)
        except NotFoundError:
            return False

    def add(self, blob: BlobRef, chunks: Iterable[bytes], advance: Advance = ignore) -> None:
        """Write a blob, replacing what bears its name.

        Raises:
            UnavailableError: interrupted; nothing is left.
            BundleError: the chunks are not this blob; nothing is left.
            StorageError: a step failed, or the medium gave other bytes back; nothing is left.
        """
        path = self.path(blob.sha256)
        prepared = temporary(path)
        try:
            self._files.write(prepared, _checked(blob, self._until_interrupted(chunks), advance))
            self._files.sync(prepared)
            if not self._has(prepared, blob, ignore):
                raise StorageError(
                    "read back other bytes than were written",
                    where=str(prepared),
                    remedy="the medium is failing: replace it",
                )
            self._files.rename(prepared, path)
        except BaseException:
            discard(self._files, prepared)
            raise

    def drop(self, sha256: str) -> int:
        """Remove a blob; the bytes freed."""
        size_bytes = self.size_bytes(sha256)
        if size_bytes is None:
            return 0
        self._files.unlink(self.path(sha256))
        return size_bytes

    def sync(self) -> None:
        """Every blob's name is on the medium."""
        self._files.sync_directory(self.directory)

    def _has(self, path: Path, blob: BlobRef, advance: Advance) -> bool:
        """Whether a file has a blob's bytes."""
        hasher = digests.sha256(blob.size_bytes)
        size_bytes = 0
        for chunk in self._until_interrupted(self._files.chunks(path)):
            hasher.update(chunk)
            size_bytes += len(chunk)
            advance(len(chunk))
        return (hasher.hexdigest(), size_bytes) == (blob.sha256, blob.size_bytes)

    def _until_interrupted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self.interrupted:
                raise UnavailableError("interrupted: the daemon stops", remedy="install it again")
            yield chunk


def _checked(blob: BlobRef, chunks: Iterable[bytes], advance: Advance) -> Iterator[bytes]:
    """The chunks again, hashed on the way; endless and short data end in a BundleError."""
    hasher = digests.sha256(blob.size_bytes)
    size_bytes = 0
    for chunk in chunks:
        size_bytes += len(chunk)
        if size_bytes > blob.size_bytes:
            raise BundleError(
                "artifact is longer than stated",
                where=blob.sha256,
                expected=f"{blob.size_bytes} bytes",
            )
        hasher.update(chunk)
        yield chunk
        advance(len(chunk))
    if size_bytes != blob.size_bytes:
        raise BundleError(
            f"artifact ends after {size_bytes} bytes",
            where=blob.sha256,
            expected=f"{blob.size_bytes} bytes",
        )
    if hasher.hexdigest() != blob.sha256:
        raise BundleError(
            f"artifact has SHA-256 {hasher.hexdigest()}", where=blob.sha256, expected=blob.sha256
        )
