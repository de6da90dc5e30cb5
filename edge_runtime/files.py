"""The one door to the file system, sockets apart.

Law of this file: a method of `Files` is one step that can fail, so that a test can wrap it and fail
the n-th. An OSError becomes a StorageError here, once, with what to do about it. No policy: which
files exist, what they mean and in what order they are written is decided by the callers; the one
recipe that lives here is `write_atomic`.

Nothing is durable until it was asked for: `sync` for a file's bytes, `sync_directory` for its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from edge_runtime.errors import ConflictError, NotFoundError, StorageError

# Large enough that hashing, not calls, takes the time; small beside the daemon's 30 MB.
CHUNK_SIZE_BYTES = 1024 * 1024

TEMPORARY_PREFIX = ".tmp-"

_FILE_MODE = 0o640
_DIRECTORY_MODE = 0o750

# errno -> (what is wrong, what to do).
_REMEDIES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free space or remove versions that are not needed"),
    errno.EDQUOT: ("the disk quota is used up", "raise the quota or remove versions"),
    errno.EROFS: (
        "the file system is read-only",
        "remount it writable; a kernel that did this by itself has found errors (see dmesg)",
    ),
    errno.EIO: ("the device reports an input/output error", "check dmesg; replace the medium"),
    errno.EACCES: ("permission denied", "give the daemon's user access to this path"),
    errno.EPERM: ("operation not permitted", "give the daemon's user access to this path"),
    errno.EMFILE: ("too many open files", "raise LimitNOFILE of the service"),
    errno.ENFILE: ("too many open files in the system", "close other programs"),
    errno.ENAMETOOLONG: ("the path is too long", "use a shorter state directory"),
}


class Entry(NamedTuple):
    """What a path is."""

    is_directory: bool
    size_bytes: int


class Files(Protocol):
    """The steps. Every method raises StorageError when the system refuses."""

    def entry(self, path: Path) -> Entry | None:
        """What is at `path`, links not followed; None when nothing is."""

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted. Raises NotFoundError when there is none."""

    def read(self, path: Path, size_max: int) -> bytes:
        """A whole small file. Raises NotFoundError; StorageError when over `size_max` bytes."""

    def chunks(self, path: Path) -> Iterator[bytes]:
        """A file in pieces of at most CHUNK_SIZE_BYTES. Raises NotFoundError at the first piece."""

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Make the file, or empty the one that is there, and write; not durable before `sync`.

        What `chunks` raises passes through as it is; the file is then left as far as it came.
        """

    def sync(self, path: Path) -> None:
        """The file's bytes are on the medium, and the next read comes from there."""

    def sync_directory(self, path: Path) -> None:
        """The names in the directory are on the medium."""

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; replaces a file (or an empty directory) at `target`."""

    def unlink(self, path: Path) -> None:
        """Remove a file."""

    def mkdir(self, path: Path) -> None:
        """Make one directory; its parent exists and it does not."""

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""

    def free_bytes(self, path: Path) -> int:
        """What an unprivileged user may still write on that file system, in bytes."""

    def lock(self, path: Path) -> Callable[[], None]:
        """Lock a file (made when missing) against other processes; the answer unlocks.

        The lock ends with the process. A forked child that never execs shares it.

        Raises:
            ConflictError: another process holds it.
        """


@contextlib.contextmanager
def _door(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise NotFoundError(f"cannot {action}: there is no such file", where=str(path)) from e
    except OSError as e:
        raise _storage_error(action, path, e) from e


def _storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """The StorageError that an OSError becomes."""
    number = error.errno or 0
    reason, remedy = _REMEDIES.get(number, (os.strerror(number) if number else str(error), ""))
    name = errno.errorcode.get(number, "OSError")
    return StorageError(f"cannot {action}: {reason} ({name})", where=str(path), remedy=remedy)


class SystemFiles:
    """The machine's file system. No state: any thread may call."""

    def entry(self, path: Path) -> Entry | None:
        try:
            with _door("stat", path):
                status = path.lstat()
        except NotFoundError:
            return None
        return Entry(stat.S_ISDIR(status.st_mode), status.st_size)

    def names(self, path: Path) -> list[str]:
        with _door("list", path):
            return sorted(os.listdir(path))  # noqa: PTH208 - names are wanted, not paths

    def read(self, path: Path, size_max: int) -> bytes:
        data = bytearray()
        for chunk in self.chunks(path):
            data += chunk
            if len(data) > size_max:
                raise StorageError(
                    f"file is larger than {size_max} bytes",
                    where=str(path),
                    remedy="it is not what was written there; install the bundle again",
                )
        return bytes(data)

    def chunks(self, path: Path) -> Iterator[bytes]:
        with _door("read", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # A read of 1 MiB for a record of 300 bytes makes the C heap creep: 3 KiB a call.
            with _door("stat", path):
                size_bytes = min(os.fstat(descriptor).st_size + 1, CHUNK_SIZE_BYTES)
            while True:
                with _door("read", path):
                    chunk = os.read(descriptor, size_bytes)
                if not chunk:
                    return
                yield chunk
        finally:
            os.close(descriptor)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with _door("create", path):
            descriptor = os.open(path, flags, _FILE_MODE)
        try:
            for chunk in chunks:
                with _door("write", path):
                    _write_all(descriptor, chunk)
        finally:
            with _door("close", path):
                os.close(descriptor)

    def sync(self, path: Path) -> None:
        with _door("fsync", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
                # Clean pages are dropped, so that reading back asks the medium and not the cache.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        with _door("fsync directory", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        with _door(f"rename to {target.name}", source):
            source.replace(target)

    def unlink(self, path: Path) -> None:
        with _door("remove", path):
            path.unlink()

    def mkdir(self, path: Path) -> None:
        with _door("make directory", path):
            path.mkdir(mode=_DIRECTORY_MODE)

    def rmdir(self, path: Path) -> None:
        with _door("remove directory", path):
            path.rmdir()

    def free_bytes(self, path: Path) -> int:
        with _door("ask free space", path):
            status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def lock(self, path: Path) -> Callable[[], None]:
        with _door("open lock", path):
            # Read-only, so that a store on a disk that went read-only can still be opened.
            flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, _FILE_MODE)
        try:
            with _door("lock", path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except StorageError as e:
            os.close(descriptor)
            if isinstance(e.__cause__, BlockingIOError):
                raise ConflictError("locked by another process", where=str(path)) from e
            raise
        return lambda: os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def temporary(path: Path) -> Path:
    """The name under which `path` is prepared: same directory, so that the rename is atomic."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def write_atomic(files: Files, path: Path, data: bytes) -> None:
    """Replace a small file so that it is old or new at every moment, and durable on return.

    Args:
        path: in a directory that exists; one writer at a time (the temporary name is fixed).

    Raises:
        StorageError: a step failed. Before the rename the old file stands; when only the
            directory's fsync failed, the new one is seen but might not survive a power cut.
    """
    prepared = temporary(path)
    try:
        files.write(prepared, (data,))
        files.sync(prepared)
        if files.read(prepared, len(data)) != data:
            raise StorageError(
                "read back other bytes than were written",
                where=str(prepared),
                remedy="the medium is failing: replace it",
            )
        files.rename(prepared, path)
    except BaseException:
        discard(files, prepared)
        raise
    files.sync_directory(path.parent)


def discard(files: Files, path: Path) -> None:
    """Unlink a temporary file if it is there; a failure is left to the owner's next clean-up."""
    with contextlib.suppress(StorageError, NotFoundError):
        files.unlink(path)
