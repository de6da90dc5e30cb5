"""Shared memory by sealed memfd: make one, check one, map one.

Law of this file: the only place that trusts a file descriptor from a client, and says why it may.
No names in any file system, no sizes that can change: F_SEAL_SHRINK means that a read of the
mapping never raises SIGBUS because the other side cut the file, F_SEAL_SEAL that nobody changes the
seals.
See memfd_create(2), fcntl(2) "File Sealing".
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
from typing import NamedTuple

from edge_runtime.errors import RequestError, StorageError, TooLargeError

# Bytes of one region: two hundred camera images of 1.2 MB. Pages are charged to whoever touches
# them first: for inputs that is the client. Hit: TooLargeError.
REGION_SIZE_MAX = 256 * 1024 * 1024

_SEALS_NEEDED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>; not in Python 3.11's fcntl
_SEALS_AGAINST_WRITING = fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE


class RegionInfo(NamedTuple):
    """A checked region: `writable` is false for a write-sealed one, which can only be an input."""

    size_bytes: int
    writable: bool


class Region(NamedTuple):
    """A mapped region; closing `memory` (or dropping the last view of it) unmaps it."""

    memory: mmap.mmap
    size_bytes: int
    writable: bool


def create_region(byte_size: int, name: str = "edge-region") -> int:
    """A sealed memfd of `byte_size` zero bytes (close-on-exec). The caller closes it.

    Raises:
        StorageError: the kernel refuses (no memory, too many files).
    """
    assert byte_size > 0
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise StorageError(f"cannot create shared memory: {e.strerror}", where=name) from e
    try:
        os.ftruncate(fd, byte_size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS_NEEDED | fcntl.F_SEAL_GROW)
    except OSError as e:
        os.close(fd)
        message = f"cannot size shared memory to {byte_size} bytes: {e.strerror}"
        raise StorageError(message, where=name) from e
    return fd


def check_region(fd: int, byte_size: int, *, byte_size_max: int = REGION_SIZE_MAX) -> RegionInfo:
    """Whether a received descriptor may be mapped as a region of `byte_size` bytes.

    Raises:
        RequestError: not a memfd, on huge pages, not sealed, or smaller than byte_size.
        TooLargeError: byte_size is over the limit.
    """
    if byte_size > byte_size_max:
        raise TooLargeError(f"region of {byte_size} bytes", expected=f"<= {byte_size_max} bytes")
    seals = _seals_of(fd)
    missing = _SEALS_NEEDED & ~seals
    if missing:
        raise RequestError(
            f"the region's memfd has seals {seals:#x}",
            expected="F_SEAL_SHRINK and F_SEAL_SEAL at least",
            remedy="size it with ftruncate, then add the seals, then send it",
        )
    status = os.fstat(fd)
    if status.st_dev != _memfd_device():
        # Huge pages are a scarce pool: a page that is not there at the first touch is a SIGBUS.
        raise RequestError(
            "the region's descriptor is not an ordinary memfd",
            expected="memfd_create without MFD_HUGETLB",
        )
    if status.st_size < byte_size:
        raise RequestError(
            f"the region's memfd has {status.st_size} bytes", expected=f">= {byte_size} bytes"
        )
    return RegionInfo(byte_size, not seals & _SEALS_AGAINST_WRITING)


def map_region(fd: int, byte_size: int, *, writable: bool = True) -> mmap.mmap:
    """Map the first `byte_size` bytes, shared. The mapping outlives `fd`.

    Raises:
        StorageError: the kernel refuses.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, byte_size, flags=mmap.MAP_SHARED, prot=protection)
    except (OSError, ValueError) as e:
        raise StorageError(f"cannot map {byte_size} bytes of shared memory: {e}") from e


def adopt_region(fd: int, byte_size: int, *, byte_size_max: int = REGION_SIZE_MAX) -> Region:
    """Check and map a received descriptor, and close it whatever happens.

    Raises:
        RequestError, TooLargeError, StorageError: as check_region and map_region.
    """
    try:
        info = check_region(fd, byte_size, byte_size_max=byte_size_max)
        memory = map_region(fd, byte_size, writable=info.writable)
    finally:
        os.close(fd)
    return Region(memory, byte_size, info.writable)


def _seals_of(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:  # EINVAL: this file has no seals
        raise RequestError(
            "the region's descriptor is not a memfd", expected="memfd_create(MFD_ALLOW_SEALING)"
        ) from e


@functools.cache
def _memfd_device() -> int:
    """The device number of the kernel's own tmpfs, where every ordinary memfd lives.

    A huge-page memfd is on another one, and so is a file on a mounted tmpfs.
    """
    fd = os.memfd_create("edge-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
