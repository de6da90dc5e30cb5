"""Bytes at an offset: the one way that `bundle/` reads files.

Law of this file: the only place in `bundle/` that opens files for reading. Reads name their offset
(`pread`), so a descriptor that another process holds too may be moved by it without effect, and a
file that shrinks while it is read gives an error, never short data.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edge_runtime import digests
from edge_runtime.errors import BundleError, NotFoundError, StorageError

CHUNK_BYTES = 1024 * 1024  # large enough for the disk, small beside a worker


class Source:
    """Immutable view of `size` bytes. May be used from several threads.

    `read_at` gives exactly the bytes asked for, or raises.
    """

    def __init__(
        self, size: int, read: Callable[[int, int], bytes], where: str, start: int = 0
    ) -> None:
        self.size = size
        self.where = where
        self._read = read
        self._start = start

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`.

        Raises:
            BundleError: they lie outside the source, or the file has shrunk meanwhile.
            StorageError: the disk failed.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BundleError(
                f"needs {size} bytes at offset {offset}, but has {self.size} in all",
                where=self.where,
                remedy="the file is cut off; fetch it again",
            )
        try:
            data = self._read(self._start + offset, size)
        except OSError as e:
            raise StorageError(f"cannot be read: {e.strerror}", where=self.where) from e
        if len(data) != size:
            raise BundleError("became shorter while it was read", where=self.where)
        return data

    def slice(self, offset: int, size: int, where: str) -> Source:
        """A part of it as a source of its own."""
        assert 0 <= offset <= offset + size <= self.size
        return Source(size, self._read, where, self._start + offset)

    def chunks(self) -> Iterator[bytes]:
        """All bytes in order, CHUNK_BYTES at a time."""
        for offset in range(0, self.size, CHUNK_BYTES):
            yield self.read_at(offset, min(CHUNK_BYTES, self.size - offset))

    def verified_chunks(self, sha256: str) -> Iterator[bytes]:
        """All bytes in order; the last chunk is held back until the hash is right.

        Raises:
            BundleError: the bytes have another sha256.
        """
        digest = digests.sha256(self.size)
        held: bytes | None = None
        for chunk in self.chunks():
            if held is not None:
                yield held
            digest.update(chunk)
            held = chunk
        if digest.hexdigest() != sha256:
            raise BundleError(
                f"has sha256 {digest.hexdigest()}",
                where=self.where,
                expected=sha256,
                remedy="the content is damaged; fetch it again",
            )
        if held is not None:
            yield held

    def sha256(self) -> str:
        """Hash of all bytes, as 64 hex digits."""
        digest = digests.sha256(self.size)
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def from_bytes(data: bytes, where: str = "bytes") -> Source:
    """A source over memory."""
    return Source(len(data), lambda offset, size: data[offset : offset + size], where)


def from_fd(fd: int, where: str) -> Source:
    """A source over an open regular file; the caller keeps it open meanwhile.

    Raises:
        BundleError: the descriptor is no regular file.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BundleError("is not a regular file", where=where, expected="a file")
    return Source(status.st_size, lambda offset, size: _pread(fd, size, offset), where)


def from_path(path: Path) -> Source:
    """A source over a regular file that is opened anew for each read.

    A bundle may have thousands of blobs, which must not hold thousands of descriptors.

    Raises:
        BundleError: it is a symbolic link or no regular file.
        NotFoundError: there is no such file.
        StorageError: it cannot be opened.
    """

    def read(offset: int, size: int) -> bytes:
        fd = open_regular(path)
        try:
            return _pread(fd, size, offset)
        finally:
            os.close(fd)

    fd = open_regular(path)
    try:
        return Source(os.fstat(fd).st_size, read, str(path))
    finally:
        os.close(fd)


def from_file(file: BinaryIO, where: str) -> Source:
    """A source over a seekable binary file object; for one thread."""

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return Source(file.seek(0, os.SEEK_END), read, where)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file that is not reached by a symbolic link; the caller closes it.

    Raises:
        BundleError: it is a link or no regular file.
        NotFoundError: there is no such file.
        StorageError: it cannot be opened.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as e:
        raise NotFoundError("no such file", where=str(path)) from e
    except OSError as e:
        if path.is_symlink():
            raise BundleError("is a symbolic link", where=str(path), expected="a file") from e
        raise StorageError(f"cannot be opened: {e.strerror}", where=str(path)) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BundleError("is not a regular file", where=str(path), expected="a file")
    return fd


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`pread` until all is there or the file ends."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
