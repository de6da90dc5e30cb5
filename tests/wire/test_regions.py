"""Shared memory: what a client may hand over, and what is refused."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from pathlib import Path

import pytest

from edge_runtime.errors import RequestError, StorageError, TooLargeError
from edge_runtime.wire import regions

SIZE = 8192


def memfd(size: int, seals: int, flags: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_created_region_is_accepted_and_both_ends_see_the_same_bytes():
    fd = regions.create_region(SIZE)
    assert not os.get_inheritable(fd)
    theirs = regions.adopt_region(os.dup(fd), SIZE)
    ours = regions.map_region(fd, SIZE)
    os.close(fd)
    ours[:5] = b"hello"
    assert theirs.memory[:5] == b"hello" and theirs.writable and theirs.size_bytes == SIZE


def test_a_created_region_cannot_be_shrunk_grown_or_resealed():
    fd = regions.create_region(SIZE)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


@pytest.mark.parametrize(
    "seals",
    [
        0,
        fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_SHRINK,
        fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL,
    ],
)
def test_an_unsealed_memfd_is_refused(seals):
    fd = memfd(SIZE, seals)
    with pytest.raises(RequestError, match="seals"):
        regions.check_region(fd, SIZE)
    os.close(fd)


def test_a_memfd_sealed_only_against_shrinking_and_resealing_is_enough():
    fd = memfd(SIZE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    assert regions.check_region(fd, SIZE) == (SIZE, True)
    os.close(fd)


def test_a_shrunk_memfd_is_refused():
    fd = memfd(SIZE, 0)
    os.ftruncate(fd, 100)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    with pytest.raises(RequestError, match="100 bytes"):
        regions.check_region(fd, SIZE)
    os.close(fd)


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, 0x10])
def test_a_write_sealed_memfd_is_an_input_only(seal):
    fd = memfd(SIZE, seal | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    region = regions.adopt_region(fd, SIZE)
    assert not region.writable
    with pytest.raises(TypeError):
        region.memory[0:1] = b"x"


def test_files_pipes_and_sockets_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    for fd in (os.open(path, os.O_RDWR), *os.pipe()):
        with pytest.raises(RequestError, match="not a memfd"):
            regions.check_region(fd, SIZE)
        os.close(fd)


def test_a_huge_page_memfd_is_refused():
    try:
        fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    with pytest.raises(RequestError, match="not an ordinary memfd"):
        regions.check_region(fd, 0)
    os.close(fd)


def test_a_region_over_the_limit_is_too_large():
    fd = regions.create_region(SIZE)
    with pytest.raises(TooLargeError):
        regions.check_region(fd, SIZE, byte_size_max=SIZE - 1)
    os.close(fd)


def test_adopting_closes_the_descriptor_on_every_path(tmp_path):
    before = open_fds()
    with pytest.raises(RequestError):
        regions.adopt_region(memfd(SIZE, 0), SIZE)
    with pytest.raises(TooLargeError):
        regions.adopt_region(regions.create_region(SIZE), 1 << 39)
    with pytest.raises(RequestError):
        regions.adopt_region(os.open(tmp_path, os.O_RDONLY), SIZE)
    regions.adopt_region(regions.create_region(SIZE), SIZE).memory.close()
    assert open_fds() == before


def test_a_size_the_kernel_refuses_leaks_nothing():
    before = open_fds()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(StorageError):
            regions.create_region(SIZE + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_fds() == before


def test_a_mapping_outlives_its_descriptor():
    fd = regions.create_region(mmap.PAGESIZE)
    memory = regions.map_region(fd, mmap.PAGESIZE)
    os.close(fd)
    memory[0:1] = b"x"
    assert memory[0:1] == b"x"
