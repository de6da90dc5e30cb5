"""The door to the file system: what each step promises, and what its failures become."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import files as module
from edge_runtime.errors import ConflictError, NotFoundError, StorageError
from edge_runtime.files import CHUNK_SIZE_BYTES, Entry, Files, SystemFiles, write_atomic


@pytest.fixture
def files() -> Files:
    return SystemFiles()


def test_what_is_written_is_read(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, [b"one", b"", b"two"])
    files.sync(path)
    files.sync_directory(tmp_path)
    assert files.read(path, 6) == b"onetwo"
    assert files.entry(path) == Entry(False, 6)
    assert files.names(tmp_path) == ["a"]
    files.write(path, [b"x"])
    assert files.read(path, 6) == b"x"


def test_a_large_file_comes_in_pieces(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, [bytes(CHUNK_SIZE_BYTES), b"rest"])
    assert [len(chunk) for chunk in files.chunks(path)] == [CHUNK_SIZE_BYTES, 4]


def test_a_file_over_its_limit_is_refused(files: Files, tmp_path: Path) -> None:
    files.write(tmp_path / "a", [b"1234"])
    with pytest.raises(StorageError, match="larger than 3 bytes"):
        files.read(tmp_path / "a", 3)


def test_directories_come_and_go(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "d"
    files.mkdir(path)
    entry = files.entry(path)
    assert entry is not None
    assert entry.is_directory
    files.rename(path, tmp_path / "e")
    files.rmdir(tmp_path / "e")
    assert files.entry(tmp_path / "e") is None


def test_nothing_is_made_readable_for_everyone(files: Files, tmp_path: Path) -> None:
    files.write(tmp_path / "a", [b""])
    files.mkdir(tmp_path / "d")
    assert (tmp_path / "a").stat().st_mode & 0o007 == 0
    assert (tmp_path / "d").stat().st_mode & 0o007 == 0


def test_links_are_not_followed(files: Files, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"secret")
    link = tmp_path / "link"
    link.symlink_to(target)
    for call in (
        lambda: files.read(link, 10),
        lambda: files.write(link, [b"x"]),
        lambda: files.lock(link),
    ):
        with pytest.raises(StorageError):
            call()
    assert target.read_bytes() == b"secret"
    assert files.entry(link) == Entry(False, len(os.fspath(target)))


def test_free_space_is_what_the_system_says(files: Files, tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free_bytes = files.free_bytes(tmp_path)
    assert 0 < free_bytes <= status.f_blocks * status.f_frsize


MISSING: list[Callable[[Files, Path], object]] = [
    lambda files, path: files.names(path),
    lambda files, path: files.read(path, 1),
    lambda files, path: next(files.chunks(path)),
    lambda files, path: files.sync(path),
    lambda files, path: files.sync_directory(path),
    lambda files, path: files.rename(path, path.with_name("other")),
    lambda files, path: files.unlink(path),
    lambda files, path: files.rmdir(path),
    lambda files, path: files.mkdir(path / "below"),
    lambda files, path: files.write(path / "below", [b""]),
    lambda files, path: files.free_bytes(path),
    lambda files, path: files.lock(path / "below"),
]


@pytest.mark.parametrize("call", MISSING)
def test_what_is_not_there_is_not_found(
    files: Files, tmp_path: Path, call: Callable[[Files, Path], object]
) -> None:
    with pytest.raises(NotFoundError) as caught:
        call(files, tmp_path / "missing")
    assert "missing" in caught.value.where
    assert isinstance(caught.value.__cause__, FileNotFoundError)


REFUSED: list[Callable[[Files, Path], object]] = [
    lambda files, path: files.names(path),  # a file where a directory was meant
    lambda files, path: files.entry(path / "below"),
    lambda files, path: files.sync_directory(path),
    lambda files, path: files.rmdir(path),
    lambda files, path: files.mkdir(path),
    lambda files, path: files.unlink(path.parent),
    lambda files, path: files.write(path.parent, [b""]),
    lambda files, path: files.read(path.parent, 1),
]


@pytest.mark.parametrize("call", REFUSED)
def test_what_the_system_refuses_is_a_storage_error(
    files: Files, tmp_path: Path, call: Callable[[Files, Path], object]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        call(files, path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.where


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "input/output"),
        (errno.EACCES, "permission denied"),
        (errno.EMFILE, "too many open files"),
    ],
)
def test_a_known_trouble_comes_with_a_remedy(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StorageError, match=words) as caught:
        files.write(tmp_path / "a", [b"x"])
    assert errno.errorcode[number] in str(caught.value)
    assert caught.value.remedy


def test_an_unknown_trouble_says_what_the_system_said() -> None:
    error = module._storage_error("write", Path("/x"), OSError(errno.EBADF, "?"))
    assert "Bad file descriptor (EBADF)" in str(error)
    assert "odd" in str(module._storage_error("write", Path("/x"), OSError("odd")))


def test_a_write_that_the_system_cuts_short_goes_on_and_a_limit_is_reported(
    tmp_path: Path,
) -> None:
    """A file-size limit of 5000 bytes makes the kernel take the first 5000 and then refuse."""
    path = tmp_path / "a"

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            SystemFiles().write(path, [bytes(4000), bytes(4000)])
        except StorageError as e:
            os._exit(7 if "EFBIG" in str(e) else 1)
        os._exit(2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert process.exitcode == 7
    assert path.stat().st_size == 5000


def test_an_error_of_the_source_passes_through(files: Files, tmp_path: Path) -> None:
    def source() -> Iterator[bytes]:
        yield b"a"
        raise ConnectionResetError("the network")

    with pytest.raises(ConnectionResetError):
        files.write(tmp_path / "a", source())


def test_descriptors_are_given_back(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "a"
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    write_atomic(files, path, b"data")
    next(chunks := files.chunks(path))
    del chunks
    files.lock(tmp_path / "lock")()
    for call in (MISSING, REFUSED):
        for step in call:
            with pytest.raises((StorageError, NotFoundError)):
                step(files, tmp_path / "missing" if call is MISSING else path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


class TestLock:
    def test_it_is_exclusive_until_it_is_given_back(self, files: Files, tmp_path: Path) -> None:
        unlock = files.lock(tmp_path / "lock")
        with pytest.raises(ConflictError, match="locked by another process"):
            files.lock(tmp_path / "lock")
        unlock()
        files.lock(tmp_path / "lock")()

    def test_it_ends_with_its_process(self, files: Files, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        ours, theirs = multiprocessing.Pipe()

        def child() -> None:
            SystemFiles().lock(path)
            theirs.send("locked")
            theirs.recv()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        assert ours.poll(10)
        ours.recv()
        with pytest.raises(ConflictError):
            files.lock(path)
        process.kill()
        process.join(10)
        files.lock(path)()


class Failing(SystemFiles):
    """Fails one kind of step."""

    def __init__(self, verb: str) -> None:
        def refuse(*_: Any) -> Any:
            raise StorageError(f"injected into {verb}")

        setattr(self, verb, refuse)


class TestWriteAtomic:
    def test_it_replaces_and_leaves_nothing_else(self, files: Files, tmp_path: Path) -> None:
        write_atomic(files, tmp_path / "a", b"old")
        write_atomic(files, tmp_path / "a", b"new")
        assert files.names(tmp_path) == ["a"]
        assert files.read(tmp_path / "a", 3) == b"new"

    @pytest.mark.parametrize("verb", ["write", "sync", "read", "rename"])
    def test_a_step_that_fails_leaves_the_old_file(
        self, files: Files, tmp_path: Path, verb: str
    ) -> None:
        write_atomic(files, tmp_path / "a", b"old")
        with pytest.raises(StorageError, match=f"injected into {verb}"):
            write_atomic(Failing(verb), tmp_path / "a", b"new")
        assert files.read(tmp_path / "a", 3) == b"old"
        assert files.names(tmp_path) == ["a"]

    def test_a_medium_that_lies_is_noticed(self, files: Files, tmp_path: Path) -> None:
        class Lying(SystemFiles):
            def read(self, path: Path, size_max: int) -> bytes:
                return super().read(path, size_max)[:-1] + b"?"

        write_atomic(files, tmp_path / "a", b"old")
        with pytest.raises(StorageError, match="read back other bytes"):
            write_atomic(Lying(), tmp_path / "a", b"new")
        assert files.read(tmp_path / "a", 3) == b"old"

    def test_a_clean_up_that_fails_does_not_hide_the_reason(self, tmp_path: Path) -> None:
        both = Failing("rename")
        both.unlink = Failing("unlink").unlink  # type: ignore[method-assign]
        with pytest.raises(StorageError, match="injected into rename"):
            write_atomic(both, tmp_path / "a", b"new")
