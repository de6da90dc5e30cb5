"""The bundle as a file and as a directory: what is not exactly right is refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from edge_runtime.bundle import archive, source
from edge_runtime.bundle import document as documents
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.archive import BLOCK
from edge_runtime.errors import BundleError, ConflictError, NotFoundError, StorageError
from tests.bundle.conftest import bundle_of, document


def contents(bundle: archive.Bundle) -> dict[str, bytes]:
    return {sha256: b"".join(chunks) for sha256, _, chunks in bundle.blobs()}


def opened(data: bytes) -> archive.Bundle:
    return archive.open_bundle(io.BytesIO(data), where="x.bundle")


def test_a_bundle_is_the_same_from_path_descriptor_file_object_and_directory(packed, tmp_path):
    fd = os.open(packed, os.O_RDONLY)
    os.lseek(fd, 100, os.SEEK_SET)  # where another process left it does not matter
    with archive.open_bundle(packed) as first:
        archive.extract(first, tmp_path / "directory")
        want = (first.manifest_bytes, first.manifest, contents(first))
    for given in (str(packed), fd, packed.open("rb"), tmp_path / "directory"):
        with archive.open_bundle(given) as bundle:
            bundle.verify()
            assert (bundle.manifest_bytes, bundle.manifest, contents(bundle)) == want
    assert os.lseek(fd, 0, os.SEEK_CUR) == 100
    os.close(fd)


def test_the_same_content_is_the_same_bytes_in_either_form(packed, tmp_path):
    with archive.open_bundle(packed) as bundle:
        archive.extract(bundle, tmp_path / "directory")
    with archive.open_bundle(tmp_path / "directory") as bundle:
        sha256 = archive.pack(bundle, tmp_path / "again.bundle")
    assert (tmp_path / "again.bundle").read_bytes() == packed.read_bytes()
    assert sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_tar_programs_and_tarfile_read_it(packed, tmp_path):
    with tarfile.open(packed) as tar:
        members = tar.getmembers()
        assert [member.mtime + member.uid + member.gid for member in members] == [0] * len(members)
        tar.extractall(tmp_path / "directory", filter="data")
    with archive.open_bundle(tmp_path / "directory") as bundle:
        bundle.verify()
    listed = subprocess.run(["tar", "-tf", packed], check=True, capture_output=True, text=True)
    assert listed.stdout.split()[0] == "model.yaml"
    assert listed.stdout.split()[1:] == sorted(listed.stdout.split()[1:])
    assert listed.stderr == ""


def test_no_descriptor_is_left_open(packed, tmp_path):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a number, not paths
    with archive.open_bundle(packed) as bundle:
        archive.extract(bundle, tmp_path / "d")
    with archive.open_bundle(tmp_path / "d") as bundle:
        bundle.verify()
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(BundleError):
        archive.open_bundle(packed)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- archives that are not right -----------------------------------------------------------------


def test_every_length_but_the_right_one_is_refused(packed):
    data = packed.read_bytes()
    lengths = [*range(0, len(data), 97), len(data) - 1, len(data) - BLOCK]
    for length in lengths:
        with pytest.raises(BundleError):
            opened(data[:length])
    for tail in (b"\0", bytes(BLOCK), bytes(10240), b"x"):
        with pytest.raises(BundleError, match="longer than its content"):
            opened(data + tail)


def test_every_flipped_byte_is_noticed_when_opened_or_read(packed):
    data = packed.read_bytes()
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 0x20
        with contextlib.suppress(BundleError):
            with opened(bytes(damaged)) as bundle:
                bundle.verify()
                # What stays is a change inside the manifest that is still a right manifest.
                assert BLOCK <= offset < BLOCK + len(bundle.manifest_bytes)


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


MANIFEST = documents.dump(document())
BLOB = b"artifact"
BLOB_NAME = "blobs/" + hashlib.sha256(BLOB).hexdigest()


@pytest.mark.parametrize(
    "members",
    [
        [(member("../model.yaml"), MANIFEST)],
        [(member("/model.yaml"), MANIFEST)],
        [(member("./model.yaml"), MANIFEST)],
        [(member(BLOB_NAME), BLOB), (member("model.yaml"), MANIFEST)],
        [(member("model.yaml", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")],
        [(member("model.yaml", type=tarfile.LNKTYPE, linkname="x"), b"")],
        [(member("model.yaml", type=tarfile.CHRTYPE), b"")],
        [(member("model.yaml", type=tarfile.FIFOTYPE), b"")],
        [(member("model.yaml", type=tarfile.DIRTYPE), b"")],
        [(member("model.yaml", type=tarfile.GNUTYPE_SPARSE), MANIFEST)],
        [(member("model.yaml", uid=1000), MANIFEST)],
        [(member("model.yaml", mode=0o4755), MANIFEST)],
        [(member("model.yaml", mtime=1), MANIFEST)],
        [(member("model.yaml", uname="root"), MANIFEST)],
        [(member("model.yaml"), MANIFEST), (member("../../etc/passwd"), BLOB)],
        [(member("model.yaml"), MANIFEST), (member(BLOB_NAME, type=tarfile.SYMTYPE), BLOB)],
        [(member("model.yaml"), MANIFEST), (member(BLOB_NAME), BLOB), (member(BLOB_NAME), BLOB)],
        [(member("model.yaml"), MANIFEST), (member("model.yaml"), MANIFEST)],
        [(member("model.yaml"), MANIFEST), (member("extra"), b"x")],
        [(member("model.yaml"), MANIFEST)],
        [(member("model.yaml"), b"x" * (documents.SIZE_BYTES_MAX + 1))],
    ],
)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_trick_of_the_tar_format_is_refused(members, format):
    with pytest.raises(BundleError):
        opened(tar_of(*members, format=format))


@pytest.mark.parametrize("data", [b"", b"PK\3\4", bytes(10240), os.urandom(5000), b"x" * 511])
def test_a_file_that_is_no_bundle_is_refused(data):
    with pytest.raises(BundleError):
        opened(data)


def test_bytes_hidden_in_the_padding_are_refused(packed):
    data = bytearray(packed.read_bytes())
    padding = BLOCK + len(MANIFEST)
    assert data[padding] == 0
    data[padding] = 1
    with pytest.raises(BundleError, match="hidden bytes"):
        opened(bytes(data))


def test_a_damaged_blob_is_refused_before_its_last_chunk(packed):
    data = bytearray(packed.read_bytes())
    place = data.index(BLOB, BLOCK + len(MANIFEST))
    data[place] ^= 1
    with opened(bytes(data)) as bundle:
        sha256 = hashlib.sha256(BLOB).hexdigest()
        with pytest.raises(BundleError, match="has sha256"):
            bundle.read(sha256)
        chunks = bundle.blob(sha256).verified_chunks(sha256)
        with pytest.raises(BundleError):
            next(chunks)


def test_a_file_that_shrinks_while_it_is_read_is_refused(packed):
    with archive.open_bundle(packed) as bundle:
        os.truncate(packed, 600)
        with pytest.raises(BundleError, match="became shorter"):
            bundle.verify()


def test_sizes_have_a_limit(packed):
    size = packed.stat().st_size
    archive.open_bundle(packed, bundle_bytes_max=size + 1).close()
    with pytest.raises(BundleError, match=f"fewer than {size}"):
        archive.open_bundle(packed, bundle_bytes_max=size)


def test_a_manifest_that_claims_terabytes_is_refused_without_reading_them():
    artifact = {"sha256": "a" * 64, "size": 1 << 50}
    variants = [{"name": "a", "backend": "onnxruntime", "artifact": artifact}]
    huge = documents.dump(document(variants=variants, goldens=[]))
    data = archive.header("model.yaml", len(huge)) + huge + bytes(-len(huge) % BLOCK + 4096)
    with pytest.raises(BundleError, match="fewer than"):
        opened(data)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BundleError, match="not a regular file"):
        archive.open_bundle(tmp_path / "fifo")  # and does not wait for a writer
    read_end, write_end = os.pipe()
    with pytest.raises(BundleError, match="not a regular file"):
        archive.open_bundle(read_end)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(NotFoundError):
        archive.open_bundle(tmp_path / "missing.bundle")


def test_what_the_system_refuses_to_read_is_a_storage_error(packed):
    fd = os.open(packed, os.O_WRONLY)
    with pytest.raises(StorageError, match="cannot be read"):
        archive.open_bundle(fd)
    os.close(fd)
    with pytest.raises(StorageError, match="cannot be read"):
        archive.open_bundle(fd)  # closed
    with pytest.raises(StorageError, match="cannot be read"):
        archive.open_bundle("x" * 5000)


# --- directories ---------------------------------------------------------------------------------


@pytest.fixture
def directory(packed, tmp_path) -> Path:
    with archive.open_bundle(packed) as bundle:
        archive.extract(bundle, tmp_path / "directory")
    return tmp_path / "directory"


def test_a_directory_with_anything_more_or_less_is_refused(directory):
    blob = directory / BLOB_NAME
    (directory / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"notes\.txt"):
        archive.open_bundle(directory)
    (directory / "notes.txt").unlink()
    (directory / "blobs" / ("0" * 64)).write_text("x")
    with pytest.raises(BundleError, match="not part of the bundle"):
        archive.open_bundle(directory)
    (directory / "blobs" / ("0" * 64)).unlink()
    blob.unlink()
    with pytest.raises(BundleError, match="is missing"):
        archive.open_bundle(directory)
    blob.write_bytes(BLOB + b"x")
    with pytest.raises(BundleError, match="from the manifest"):
        archive.open_bundle(directory)


def test_links_in_a_directory_are_refused(directory, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(BLOB)
    blob = directory / BLOB_NAME
    blob.unlink()
    blob.symlink_to(outside)
    with pytest.raises(BundleError, match="symbolic link"):
        archive.open_bundle(directory)
    blob.unlink()
    (directory / "blobs").rename(tmp_path / "elsewhere")
    (directory / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="not a directory"):
        archive.open_bundle(directory)


def test_a_blob_that_becomes_a_link_after_opening_is_refused(directory, tmp_path):
    (tmp_path / "outside").write_bytes(BLOB)
    with archive.open_bundle(directory) as bundle:
        (directory / BLOB_NAME).unlink()
        (directory / BLOB_NAME).symlink_to(tmp_path / "outside")
        with pytest.raises(BundleError, match="symbolic link"):
            bundle.verify()


# --- writing -------------------------------------------------------------------------------------


def test_extracting_needs_an_empty_place(packed, tmp_path):
    with archive.open_bundle(packed) as bundle:
        (tmp_path / "empty").mkdir()
        archive.extract(bundle, tmp_path / "empty")
        with pytest.raises(ConflictError, match="not empty"):
            archive.extract(bundle, tmp_path / "empty")
        with pytest.raises(ConflictError, match="not a directory"):
            archive.extract(bundle, packed)


def test_a_failed_write_leaves_what_was_there(packed, tmp_path):
    damaged = bytearray(packed.read_bytes())
    damaged[damaged.index(BLOB, BLOCK + len(MANIFEST))] ^= 1
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.bundle").write_bytes(b"old")
    with opened(bytes(damaged)) as bundle:
        with pytest.raises(BundleError):
            archive.pack(bundle, target / "old.bundle")
        with pytest.raises(BundleError):
            archive.extract(bundle, target / "directory")
        with pytest.raises(StorageError):
            archive.pack(bundle, tmp_path / "missing" / "x.bundle")
        with pytest.raises(StorageError):
            archive.extract(bundle, tmp_path / "missing" / "x")
    assert [entry.name for entry in target.iterdir()] == ["old.bundle"]
    assert (target / "old.bundle").read_bytes() == b"old"


def test_progress_ends_at_the_size_of_the_bundle(tmp_path):
    seen: list[tuple[int, int]] = []
    with bundle_of(b"x" * 3_000_000) as bundle:
        archive.pack(bundle, tmp_path / "x.bundle", lambda *now: seen.append(now))
        assert seen[-1] == (bundle.size_bytes, bundle.size_bytes)
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_composing_checks_the_sizes_of_blobs():
    manifest = manifests.from_document(document())
    sources = {sha256: source.from_bytes(b"wrong size") for sha256 in manifests.blobs(manifest)}
    with pytest.raises(BundleError, match="from the manifest"):
        archive.compose(manifest, sources)
