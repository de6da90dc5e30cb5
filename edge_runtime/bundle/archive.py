"""The bundle as files: a directory, or one file with the same content.

Law of this file: the byte layout of a bundle, and the I/O to read and write it. It knows nothing of
models. A `.bundle` is a plain USTAR archive (POSIX.1-1988) in the only form that we write:
`model.yaml`, then `blobs/<sha256>` in order of sha256, owner and time 0, mode 0644, nothing else.

Because the manifest names every blob with its size, it determines where every byte of the archive
must be. So the reader does not interpret tar headers: it works out the one right header for each
place and compares. Links, devices, `..`, sparse files, duplicates, hidden or trailing bytes and
every other trick of the format are then the same error, and the same content is the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from edge_runtime.bundle import document, source
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.bundle.source import Source
from edge_runtime.errors import BundleError, ConflictError, NotFoundError, StorageError

BLOCK = 512
END = bytes(2 * BLOCK)
# The largest size that a USTAR header can state is 8 GiB - 1, and no edge model comes near it.
BUNDLE_BYTES_MAX = 8 * 1024**3

BLOBS_DIRECTORY = "blobs"

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Blobs = Iterator[tuple[str, int, Iterator[bytes]]]


class Bundle:
    """An open bundle: its manifest is checked, its blobs are there in the right size.

    Blobs are hashed while they are read. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, manifest_bytes: bytes, manifest: Manifest, blobs: Mapping[str, Source], where: str
    ) -> None:
        self.manifest_bytes = manifest_bytes
        self.manifest = manifest
        self.where = where
        self.size_bytes = len(manifest_bytes) + sum(blob.size for blob in blobs.values())
        self._blobs = blobs
        self._closing = contextlib.ExitStack()

    def blobs(self) -> Blobs:
        """(sha256, size in bytes, chunks) of every blob in order of sha256.

        The chunks raise a BundleError before the last one if the hash is wrong.
        """
        for sha256, blob in self._blobs.items():
            yield sha256, blob.size, blob.verified_chunks(sha256)

    def blob(self, sha256: str) -> Source:
        """Random access to one blob, not verified.

        Raises:
            NotFoundError: the bundle has no such blob.
        """
        if sha256 not in self._blobs:
            raise NotFoundError(f"no blob {sha256}", where=self.where)
        return self._blobs[sha256]

    def read(self, sha256: str) -> bytes:
        """One blob, verified, in memory: for goldens, not for models.

        Raises:
            NotFoundError: the bundle has no such blob.
            BundleError: its content has another hash.
        """
        return b"".join(self.blob(sha256).verified_chunks(sha256))

    def verify(self) -> None:
        """Read and hash everything.

        Raises:
            BundleError: a blob has another hash than its name.
        """
        for _, _, chunks in self.blobs():
            for _ in chunks:
                pass

    def close_with(self, callback: Callable[[], None]) -> None:
        """Have something called when the bundle is closed."""
        self._closing.callback(callback)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_bundle(
    path_or_file: Path | str | int | BinaryIO,
    *,
    where: str = "",
    bundle_bytes_max: int = BUNDLE_BYTES_MAX,
) -> Bundle:
    """Open a bundle and check all but the hashes of its blobs.

    Args:
        path_or_file: a `.bundle` file, a bundle directory, a descriptor of a regular file (read
            with `pread`, stays the caller's) or a seekable binary file object.
        where: name of it for errors; by default the path.
        bundle_bytes_max: larger bundles are refused; the default is all that the format can hold.

    Raises:
        BundleError: it is no bundle, damaged, or larger than allowed.
        NotFoundError: no such path.
        StorageError: it cannot be read.
    """
    is_path = isinstance(path_or_file, str | Path)
    where = where or (str(path_or_file) if is_path else "bundle")
    with _storage_errors(where, "read"):
        return _open(path_or_file, where, bundle_bytes_max)


def _open(path_or_file: Path | str | int | BinaryIO, where: str, bundle_bytes_max: int) -> Bundle:
    if isinstance(path_or_file, int):
        return _open_archive(source.from_fd(path_or_file, where), bundle_bytes_max)
    if not isinstance(path_or_file, str | Path):
        return _open_archive(source.from_file(path_or_file, where), bundle_bytes_max)
    path = Path(path_or_file)
    if path.is_dir():
        return _open_directory(path, bundle_bytes_max)
    fd = source.open_regular(path.resolve())
    try:
        bundle = _open_archive(source.from_fd(fd, where), bundle_bytes_max)
    except BaseException:
        os.close(fd)
        raise
    bundle.close_with(lambda: os.close(fd))
    return bundle


# --- the archive's layout (values only) ----------------------------------------------------------


class Member(NamedTuple):
    """A file in the archive and where its header begins."""

    name: str
    size: int
    offset: int

    @property
    def data_offset(self) -> int:
        return self.offset + BLOCK

    @property
    def end(self) -> int:
        return self.data_offset + _padded(self.size)


def layout(manifest_size: int, blob_sizes: Mapping[str, int]) -> list[Member]:
    """The members of the archive, in order; it ends with END after the last one."""
    members = [Member(manifests.FILE_NAME, manifest_size, 0)]
    for sha256 in sorted(blob_sizes):
        name = f"{BLOBS_DIRECTORY}/{sha256}"
        members.append(Member(name, blob_sizes[sha256], members[-1].end))
    return members


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file with mode 0644 and all else 0 (512 bytes)."""
    assert len(name) < 100 and 0 <= size < BUNDLE_BYTES_MAX
    fields = (
        name.encode().ljust(100, b"\0")
        + b"0000644\0"  # mode
        + b"0000000\0" * 2  # uid, gid
        + b"%011o\0" % size
        + b"%011o\0" % 0  # mtime
        + b" " * 8  # the checksum, taken as spaces while it is computed
        + b"0"  # regular file
        + bytes(100)  # link target
        + b"ustar\x0000"
        + bytes(64)  # names of user and group
        + b"0000000\0" * 2  # device numbers
    ).ljust(BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# --- reading -------------------------------------------------------------------------------------


def _open_archive(archive: Source, bundle_bytes_max: int) -> Bundle:
    _check_total(archive.size, bundle_bytes_max, archive.where)
    manifest_size = _manifest_size(archive)
    manifest_source = archive.slice(BLOCK, manifest_size, f"{archive.where}: {manifests.FILE_NAME}")
    manifest_bytes = manifest_source.read_at(0, manifest_size)
    manifest = manifests.parse(manifest_bytes, manifest_source.where)
    sizes = {sha256: blob.size for sha256, blob in manifests.blobs(manifest).items()}
    _check_total(sum(sizes.values()), bundle_bytes_max, archive.where)
    members = layout(manifest_size, sizes)
    _check_archive(archive, members)
    blobs = {
        sha256: archive.slice(member.data_offset, member.size, f"{archive.where}: {member.name}")
        for sha256, member in zip(sorted(sizes), members[1:], strict=True)
    }
    return Bundle(manifest_bytes, manifest, blobs, archive.where)


def _check_total(size_bytes: int, size_bytes_max: int, where: str) -> None:
    if size_bytes >= min(size_bytes_max, BUNDLE_BYTES_MAX):
        raise BundleError(
            f"has {size_bytes} bytes",
            where=where,
            expected=f"fewer than {min(size_bytes_max, BUNDLE_BYTES_MAX)} bytes",
        )


def _manifest_size(archive: Source) -> int:
    """The size in the first header, which must be that of `model.yaml`."""
    first = archive.read_at(0, min(BLOCK, archive.size))
    digits = first[124:135]
    size = int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
    if not 0 <= size <= document.SIZE_BYTES_MAX or first != header(manifests.FILE_NAME, size):
        raise BundleError(
            "does not begin as a bundle does",
            where=archive.where,
            expected=f"{manifests.FILE_NAME} of at most {document.SIZE_BYTES_MAX} bytes, "
            "packed by edge-runtime",
            remedy="a directory is packed by `edge-runtime bundle pack`",
        )
    if archive.size < BLOCK + _padded(size) + len(END):
        raise BundleError(
            f"ends after {archive.size} bytes, inside {manifests.FILE_NAME} or before the end mark",
            where=archive.where,
            remedy="the file is cut off; fetch it again",
        )
    return size


def _check_archive(archive: Source, members: list[Member]) -> None:
    """Every byte that is not content must be what `layout` and `header` say."""
    end = members[-1].end + len(END)
    if archive.size != end:
        what = "cut off" if archive.size < end else "longer than its content"
        raise BundleError(
            f"is {what}: {archive.size} bytes",
            where=archive.where,
            expected=f"{end} bytes, from the manifest",
            remedy="fetch it again",
        )
    for member, following in zip(members, [*members[1:], None], strict=True):
        hidden = member.data_offset + member.size
        mark = header(following.name, following.size) if following else END
        want = bytes(member.end - hidden) + mark
        if archive.read_at(hidden, len(want)) != want:
            raise _mark_error(archive, member, following)


def _mark_error(archive: Source, member: Member, following: Member | None) -> BundleError:
    found = archive.read_at(member.end, 100).rstrip(b"\0")
    expected = f"{following.name} of {following.size} bytes" if following else "the end mark"
    return BundleError(
        f"after {member.name} comes {found!r}, hidden bytes or another header",
        where=f"{archive.where}: offset {member.end}",
        expected=expected + " with owner, time and all else 0",
    )


def _open_directory(path: Path, bundle_bytes_max: int) -> Bundle:
    manifest_source = source.from_path(path / manifests.FILE_NAME)
    size = min(manifest_source.size, document.SIZE_BYTES_MAX + 1)  # parse refuses one too many
    manifest_bytes = manifest_source.read_at(0, size)
    manifest = manifests.parse(manifest_bytes, manifest_source.where)
    wanted = manifests.blobs(manifest)
    _check_total(sum(blob.size for blob in wanted.values()), bundle_bytes_max, str(path))
    _check_names(path, {manifests.FILE_NAME, BLOBS_DIRECTORY})
    _check_names(path / BLOBS_DIRECTORY, set(wanted))
    blobs = {sha256: source.from_path(path / BLOBS_DIRECTORY / sha256) for sha256 in wanted}
    for sha256, blob in blobs.items():
        _check_size(blob, wanted[sha256].size)
    return Bundle(manifest_bytes, manifest, blobs, str(path))


def _check_size(blob: Source, size: int) -> None:
    if blob.size != size:
        raise BundleError(
            f"has {blob.size} bytes", where=blob.where, expected=f"{size} bytes, from the manifest"
        )


def _check_names(directory: Path, wanted: set[str]) -> None:
    """The directory holds these names and no others."""
    if directory.is_symlink() or not directory.is_dir():
        raise BundleError("is not a directory", where=str(directory))
    found = {entry.name for entry in directory.iterdir()}
    for name in sorted(wanted - found):
        raise BundleError("is missing", where=str(directory / name))
    for name in sorted(found - wanted):
        raise BundleError(
            f"{name!r} is not part of the bundle",
            where=str(directory),
            expected="only what the manifest names",
            remedy="move it away",
        )


# --- writing -------------------------------------------------------------------------------------


def pack(bundle: Bundle, out_path: Path, progress: Progress | None = None) -> str:
    """Write a bundle as one file, atomically; the same content gives the same bytes.

    Args:
        bundle: an open bundle, for example of a directory, or `compose`d.
        out_path: the file to write; one that exists is replaced when all is well.

    Returns:
        sha256 of the file.

    Raises:
        BundleError: a blob has another hash than its name.
        StorageError: the file cannot be written; nothing is left behind.
    """
    with _storage_errors(str(out_path), "written"):
        part = _part_of(out_path)
        part.unlink(missing_ok=True)
        try:
            with part.open("xb") as out:
                _write_archive(bundle, out, progress)
                out.flush()
                os.fsync(out.fileno())
            part.replace(out_path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_directory(out_path.parent)
    with open_bundle(out_path):
        pass
    return source.from_path(out_path).sha256()


def compose(manifest: Manifest, blobs: Mapping[str, Source]) -> Bundle:
    """A bundle of a manifest and the sources of all its blobs, by sha256.

    Raises:
        BundleError: the manifest is wrong, or a blob has another size than it says.
    """
    manifest_bytes = manifests.dump(manifest)
    checked = manifests.parse(manifest_bytes)
    wanted = manifests.blobs(checked)
    sources = {sha256: blobs[sha256] for sha256 in wanted}
    for sha256, blob in sources.items():
        _check_size(blob, wanted[sha256].size)
    return Bundle(manifest_bytes, checked, sources, "bundle")


def extract(bundle: Bundle, directory: Path, progress: Progress | None = None) -> None:
    """Write a bundle as a directory, atomically.

    Args:
        bundle: an open bundle; every blob is verified.
        directory: must not exist, or be empty.

    Raises:
        ConflictError: the directory has content.
        BundleError: a blob has another hash than its name.
        StorageError: it cannot be written; nothing is left behind.
    """
    with _storage_errors(str(directory), "written"):
        if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
            raise ConflictError("is not a directory", where=str(directory))
        if directory.is_dir() and any(directory.iterdir()):
            raise ConflictError(
                "is not empty", where=str(directory), remedy="name a directory that does not exist"
            )
        part = _part_of(directory.absolute())
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            _write_directory(bundle, part, progress)
            part.replace(directory)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _sync_directory(directory.absolute().parent)


def _write_archive(bundle: Bundle, out: BinaryIO, progress: Progress | None) -> None:
    count = _counter(bundle, progress)
    out.write(header(manifests.FILE_NAME, len(bundle.manifest_bytes)))
    out.write(_with_padding(bundle.manifest_bytes))
    count(len(bundle.manifest_bytes))
    for sha256, size, chunks in bundle.blobs():
        out.write(header(f"{BLOBS_DIRECTORY}/{sha256}", size))
        for chunk in chunks:
            out.write(chunk)
            count(len(chunk))
        out.write(bytes(_padded(size) - size))
    out.write(END)


def _with_padding(data: bytes) -> bytes:
    return data.ljust(_padded(len(data)), b"\0")


def _write_directory(bundle: Bundle, directory: Path, progress: Progress | None) -> None:
    count = _counter(bundle, progress)
    (directory / BLOBS_DIRECTORY).mkdir()
    _write_file(directory / manifests.FILE_NAME, iter([bundle.manifest_bytes]), count)
    for sha256, _, chunks in bundle.blobs():
        _write_file(directory / BLOBS_DIRECTORY / sha256, chunks, count)
    _sync_directory(directory / BLOBS_DIRECTORY)
    _sync_directory(directory)


def _write_file(path: Path, chunks: Iterator[bytes], count: Callable[[int], None]) -> None:
    with path.open("xb") as out:
        for chunk in chunks:
            out.write(chunk)
            count(len(chunk))
        out.flush()
        os.fsync(out.fileno())


def _counter(bundle: Bundle, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, bundle.size_bytes)

    return count


def _part_of(path: Path) -> Path:
    """Where it is written first: beside it, so that the rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _storage_errors(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        where = str(e.filename) if e.filename else where
        raise StorageError(f"cannot be {what}: {e.strerror}", where=where) from e
