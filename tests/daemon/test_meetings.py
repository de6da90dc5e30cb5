"""Things that happen to one model at the same time: whatever meets, some right version serves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.world import QUICK_RESTART, Daemon, bundle, until


class Disk:
    """A daemon whose disk waits or fails when it is told to."""

    def __init__(self, daemon: Daemon, root: Path) -> None:
        self.daemon, self._slow, self.failing = daemon, root / "slow", root / "no-sync"

    def during(self, command: str, act: Callable[[], Any], **arguments: Any) -> dict[str, Any]:
        """Have `act` happen while a command waits for its switch to be on the disk; its answer."""
        answers: list[dict[str, Any]] = []
        asked = threading.Thread(
            target=lambda: answers.append(self.daemon.control(command, **arguments))
        )
        waits = self._slow.with_suffix(".waits")
        waits.unlink(missing_ok=True)
        self._slow.touch()
        try:
            asked.start()
            until(waits.exists, f"the switch of {command}")
            act()
        finally:
            self._slow.unlink()
        asked.join(20)
        return answers[0]

    def kill(self, pid: int) -> None:
        """Kill a worker, and wait until the daemon knows."""
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.daemon.events("worker_died", pid=pid), f"the death of {pid}")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    root = tmp_path_factory.mktemp("disk")
    paths = [str(Path(__file__).parent / "failing"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "EDGE_TEST_NO_SYNC": str(root / "no-sync"),
        "EDGE_TEST_SLOW_SYNC": str(root / "slow"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    daemon = Daemon({"workers": {"restart": QUICK_RESTART}}, environment=environment)
    try:
        daemon.start()
        yield Disk(daemon, root)
        daemon.stop()
    finally:
        daemon.remove()


def two_versions(daemon: Daemon, name: str) -> None:
    """Version 1, which serves, answers 4 to 3; version 2 answers 7."""
    daemon.add(name, 1, scale=1.0)
    daemon.install(bundle(daemon.bundles, name, 2), activate=False)


def test_a_new_version_that_dies_while_the_disk_is_told_of_it_is_started_again(disk: Disk) -> None:
    daemon = disk.daemon
    two_versions(daemon, "newborn")

    def kill() -> None:
        disk.kill(daemon.events("worker_ready", model="newborn", version=2)[0]["fields"]["pid"])

    assert disk.during("activate", kill, name="newborn", version=2)["version"] == 2
    assert daemon.infer("newborn") == 7.0
    assert daemon.model("newborn")["restarts"] == 1


@pytest.mark.parametrize("both", [False, True])
def test_the_warm_version_that_dies_while_it_takes_over_is_started_again(
    disk: Disk, both: bool
) -> None:
    daemon, name = disk.daemon, f"warm-{both:d}"
    two_versions(daemon, name)
    daemon.control("activate", name=name, version=2)
    pids = [daemon.worker(name, "warm")["pid"]] + [daemon.worker(name)["pid"]] * both

    def kill() -> None:
        for pid in pids:
            disk.kill(pid)

    assert disk.during("rollback", kill, name=name)["version"] == 1
    assert daemon.infer(name) == 4.0
    assert daemon.worker(name)["pid"] not in pids


def test_a_worker_that_dies_while_its_model_is_unloaded_does_not_come_back(disk: Disk) -> None:
    daemon = disk.daemon
    two_versions(daemon, "going")
    pid = daemon.worker("going")["pid"]
    disk.during("unload", lambda: disk.kill(pid), name="going")
    until(lambda: not [one for one in workers(daemon) if one["model"] == "going"])
    model = daemon.model("going")
    assert (model["state"], model["active"], model["restarts"]) == ("stopped", None, 0)


def test_an_unload_that_is_seen_on_disk_but_not_synced_holds(disk: Disk) -> None:
    daemon = disk.daemon
    two_versions(daemon, "half-gone")
    disk.failing.touch()
    assert daemon.control("unload", name="half-gone")["version"] == 1
    assert not disk.failing.exists()
    assert daemon.events("switch_not_synced", model="half-gone")
    model = daemon.model("half-gone")
    assert (model["state"], model["active"]) == ("stopped", None)


def test_a_version_whose_record_has_rotted_leaves_the_place_to_the_previous_one(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon().start()
    two_versions(daemon, "rotten")
    daemon.control("activate", name="rotten", version=2)
    daemon.stop()
    record = daemon.state_dir / "models" / "rotten" / "generations" / "000002" / "record"
    record.write_bytes(b"rotten")
    daemon.start()
    until(lambda: daemon.ready("rotten"))
    assert daemon.infer("rotten") == 4.0
    until(lambda: daemon.events("fell_back", model="rotten"))  # after it serves
    assert daemon.model("rotten")["active"]["version"] == 1


def workers(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.control("ps")["workers"]
    return found


def test_a_command_does_not_wait_for_a_selection_in_the_background(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon({"selection": {"policy": "off"}}).start()
    slow = [(label, {"run_ms": 150}) for label in ("a", "b")]
    daemon.add("chooser", 1, golden_off=0.0, variants=slow)
    daemon.stop()
    policy = {"policy": "latency", "time_max_s": 60.0}
    again = make_daemon({"selection": policy}, state_dir=daemon.state_dir).start()
    until(lambda: len(again.events("worker_ready", model="chooser")) == 3, "a selection")
    assert again.control("unload", name="chooser")["version"] == 1
    until(lambda: len(again.relatives()) == 2, "the end of all workers")
    assert not again.events("variant_selected")
    again.stop()


def test_the_collection_of_garbage_spares_the_candidate(
    make_daemon: Callable[..., Daemon],
) -> None:
    first = make_daemon().start()
    two_versions(first, "tried")
    first.stop()
    daemon = make_daemon({"store": {"byte_budget": 1}}, state_dir=first.state_dir).start()
    until(lambda: daemon.ready("tried"))
    daemon.control("shadow", name="tried", version=2)
    daemon.control("gc")
    assert daemon.model("tried")["installed"] == [1, 2]
    assert daemon.control("promote", name="tried")["version"] == 2
