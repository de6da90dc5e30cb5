"""Compiled models through a real daemon: kept, used again, repaired, given up, never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_runtime.bundle.manifest import Variant
from tests.backends.contract import openvino
from tests.daemon.world import NO_BLOB, Daemon, onnx_bundle, running, until

openvino()
pytest.importorskip("onnx", reason="onnx is not installed")


def keeping(**options: Any) -> list[Variant]:
    return [Variant("v", "openvino", NO_BLOB, "fp32", options={"compiled": "keep", **options})]


def blobs(daemon: Daemon) -> list[Path]:
    return sorted((daemon.state_dir / "compiled").glob("*/*.blob"))


def kept(daemon: Daemon, count: int) -> list[Path]:
    until(lambda: len(daemon.events("compiled_kept")) >= count, f"{count} blobs kept")
    return blobs(daemon)


def reload(daemon: Daemon, name: str) -> None:
    daemon.control("unload", name=name)
    daemon.control("activate", name=name, version=1)
    assert daemon.infer(name) == 6.0


def test_a_second_load_and_a_second_daemon_compile_nothing():
    with running() as daemon:
        daemon.install(onnx_bundle(daemon.bundles, "once", variants=keeping()))
        (path,) = kept(daemon, 1)
        before = path.stat().st_mtime_ns
        reload(daemon, "once")
        daemon.stop()
        daemon.start()
        until(lambda: daemon.ready("once"), "ready")
        assert daemon.infer("once") == 6.0
        assert blobs(daemon) == [path] and path.stat().st_mtime_ns == before
        assert len(daemon.events("compiled_kept")) == 1


@pytest.mark.parametrize("damage", [b"", b"\xff" * 5000])
def test_a_rotten_file_is_compiled_again_and_replaced(damage: bytes):
    with running() as daemon:
        daemon.install(onnx_bundle(daemon.bundles, "rot", variants=keeping()))
        (path,) = kept(daemon, 1)
        whole = path.stat().st_size
        path.write_bytes(damage)
        reload(daemon, "rot")
        kept(daemon, 2)
        assert path.stat().st_size == whole


def test_what_belongs_to_no_installed_model_is_removed_at_the_next_start():
    with running() as daemon:
        daemon.install(onnx_bundle(daemon.bundles, "gone", variants=keeping()))
        kept(daemon, 1)
        daemon.control("unload", name="gone")
        daemon.control("remove", name="gone", version=1)
        daemon.stop()
        daemon.start()
        assert blobs(daemon) == [] and not list((daemon.state_dir / "compiled").iterdir())


def test_the_oldest_go_for_new_ones():
    with running({"store": {"compiled_bytes_max": 9000}}) as daemon:
        for number in (1, 2, 3):
            path = onnx_bundle(
                daemon.bundles, f"m{number}", scale=2.0, width=number * 2 + 10, variants=keeping()
            )
            daemon.install(path)
            kept(daemon, number)
        assert 0 < sum(path.stat().st_size for path in blobs(daemon)) <= 9000
        assert len(blobs(daemon)) < 3


def test_a_budget_of_nothing_keeps_nothing():
    with running({"store": {"compiled_bytes_max": 0}}) as daemon:
        daemon.install(onnx_bundle(daemon.bundles, "none", variants=keeping()))
        reload(daemon, "none")
        assert not (daemon.state_dir / "compiled").exists()
        assert not daemon.events("compiled_kept")
