"""A full disk refuses what is new and keeps what is old."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import StorageError
from tests.daemon.world import affine, bundle, packed_document, until

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    directory = tmp_path / "disk"
    directory.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(directory)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def large(daemon, name: str, version: int, size: int) -> Path:
    """A bundle whose artifact has `size` bytes: a document with room at its end."""
    data = json.dumps(affine(scale=float(version))).encode().ljust(size)
    return packed_document(daemon.bundles, name, version, data)


@pytest.mark.root
def test_an_install_on_a_full_disk_is_a_storage_error_and_the_old_version_serves(
    make_daemon, small_disk
):
    config = {"store": {"free_bytes_min": 0}}
    daemon = make_daemon(config, state_dir=small_disk / "state").start()
    daemon.install(large(daemon, "full", 1, MIB))
    used = files(small_disk)
    for _ in range(3):
        with pytest.raises(StorageError) as caught:
            daemon.install(large(daemon, "full", 2, 4 * MIB))
        assert caught.value.remedy or caught.value.expected
        assert files(small_disk) == used
        assert daemon.infer("full") == 4.0
    # Also when the space is gone between the check and the writing.
    hog = small_disk / "hog"
    hog.write_bytes(bytes(MIB + 900_000))
    with pytest.raises(StorageError):
        daemon.add("full", 3)
        daemon.install(large(daemon, "full", 2, MIB // 2))
    hog.unlink()
    daemon.stop()
    daemon.start()
    until(lambda: daemon.ready("full"))
    assert daemon.install(large(daemon, "full", 4, MIB // 2))["version"] == 4


def files(directory: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(path), path.stat().st_size) for path in directory.rglob("*") if path.is_file()
    )


def test_an_install_leaves_the_rest_of_the_machine_its_space(make_daemon):
    status = os.statvfs("/tmp")
    more_than_there_is = status.f_bavail * status.f_frsize * 2
    daemon = make_daemon({"store": {"free_bytes_min": more_than_there_is}}).start()
    with pytest.raises(StorageError) as caught:
        daemon.install(bundle(daemon.bundles, "greedy"))
    assert "bytes" in str(caught.value)
    assert daemon.control("models")["models"] == []


def test_a_budget_removes_the_oldest_and_never_what_serves(make_daemon):
    daemon = make_daemon({"store": {"byte_budget": 3 * MIB}}).start()
    for version in range(1, 6):
        daemon.install(large(daemon, "many", version, MIB))
        assert daemon.infer("many") == 3.0 * version + 1
    installed = daemon.model("many")["installed"]
    assert installed[-2:] == [4, 5] and 1 not in installed
    assert daemon.control("rollback", name="many")["version"] == 4


def test_a_switch_that_is_seen_on_disk_but_not_synced_is_what_serves(make_daemon, tmp_path):
    """What a restart finds and what serves now must be the same."""
    order = tmp_path / "no-sync"
    paths = [str(Path(__file__).parent / "failing"), os.environ.get("PYTHONPATH", "")]
    environment = {"EDGE_TEST_NO_SYNC": str(order), "PYTHONPATH": os.pathsep.join(paths)}
    daemon = make_daemon(environment=environment).start()
    for version in (1, 2):
        daemon.install(bundle(daemon.bundles, "half", version, scale=float(version)))
    order.touch()
    assert daemon.control("rollback", name="half")["version"] == 1
    assert not order.exists() and daemon.infer("half") == 4.0
    assert daemon.events("switch_not_synced", model="half")
    order.touch()
    daemon.control("activate", name="half", version=2)
    assert not order.exists() and daemon.infer("half") == 7.0
    daemon.kill()
    daemon.gone()
    daemon.start()
    until(lambda: daemon.ready("half"))
    assert daemon.infer("half") == 7.0 and daemon.model("half")["previous"]["version"] == 1
