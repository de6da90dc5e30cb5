"""A real daemon on a played machine: requests are held back at a step, and served again after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import Blob, Manifest, Variant
from edge_runtime.bundle.source import from_bytes
from edge_runtime.errors import ThrottledError
from edge_runtime.tensors import TensorSpec
from tests.daemon.world import WIDTH, Daemon, affine, filled, running, until

from .machine import Machine

FIRST_CORE = min(os.sched_getaffinity(0))
LADDER = {
    "zones": [{"type": "cpu-thermal"}],
    "steps": [
        {"enter_c": 70, "run_share": 0.05, "cpus": str(FIRST_CORE)},
        {"enter_c": 80, "refuse_priority_below": 5},
    ],
    "down_s": 0.2,
    "up_s": 0.4,
}


class Played:
    """A daemon, and the machine that it sees."""

    def __init__(self, daemon: Daemon, machine: Machine) -> None:
        self.daemon, self.machine = daemon, machine

    def heat(self) -> dict[str, Any]:
        return dict(self.daemon.control("status")["device"]["heat"])

    def at(self, celsius: float, step: int) -> None:
        """Be so hot until that step is taken."""
        self.machine.zone(0, "cpu-thermal", celsius)
        until(lambda: self.heat()["step"] == step, f"step {step} at {celsius} C")

    def cli(self, *words: str) -> str:
        command = [sys.executable, "-m", "edge_runtime", *words]
        return subprocess.run(
            [*command, "--run-dir", str(self.daemon.run_dir)],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout


@contextlib.contextmanager
def played(root: Path, more: dict[str, Any] | None = None, **governor: Any) -> Iterator[Played]:
    machine = Machine(root)
    machine.zone(0, "cpu-thermal", 45)
    config = {"interval_s": 0.05, "root": str(root), "ladder": LADDER, **governor}
    with running({"governor": config, "workers": {"runners": 0}, **(more or {})}) as daemon:
        yield Played(daemon, machine)


def cores(pid: int) -> set[frozenset[int]]:
    """The cores of each of its threads."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.add(frozenset(os.sched_getaffinity(int(thread.name))))
    return found


def test_a_hot_device_holds_back_says_why_and_lets_go(tmp_path: Path) -> None:
    with played(tmp_path) as world:
        daemon = world.daemon
        daemon.add("m")
        pid = daemon.worker("m")["pid"]
        before = cores(pid)
        assert daemon.infer("m") == 7.0

        world.at(75, 1)
        until(lambda: cores(pid) == {frozenset({FIRST_CORE})}, "one core")
        world.at(85, 2)

        def refusal() -> ThrottledError | None:
            with daemon.impatient() as client:
                try:
                    client.infer("m", {"x": filled(3.0)})
                except ThrottledError as error:
                    return error
            return None

        error = until(refusal, "a refusal")
        assert "hot" in error.message
        assert error.retry_after_s == 1.0
        with daemon.impatient() as client:  # what matters goes on
            assert client.infer("m", {"x": filled(3.0)}, priority=5)["y"][0, 0] == 7.0

        why = world.cli("why", "m")
        assert "held back by heat: step 2 of 2 (heat)" in why
        assert re.search(r"step 1 of 2 \(7\d\.0 C at cpu-thermal\): models run 5% of the time", why)
        assert "held back by heat" in world.cli("status")
        assert "cpu-thermal 85.0 C" in world.cli("top", "--once", "--interval", "0.1")

        world.at(50, 0)
        until(lambda: cores(pid) == before, "all cores")
        assert daemon.infer("m") == 7.0
        text = daemon.control("metrics")["text"]
        for direction, reason in (("down", "heat"), ("up", "cooler")):
            line = f'ladder="heat",direction="{direction}",reason="{reason}"}} 2'
            assert f"edge_governor_steps_total{{{line}" in text
        assert 'edge_temperature_celsius{zone="cpu-thermal"} 50.0' in text
        assert re.search(r"edge_held_back_total\{.*\} [1-9]", text)
        assert [one["fields"]["step"] for one in daemon.events("governor_step")] == [1, 2, 1, 0]


def test_the_ladder_comes_from_the_profile(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.zone(0, "cpu-thermal", 77)
    governor = {"interval_s": 0.05, "root": str(tmp_path)}
    with running({"governor": governor, "profile": "raspberry-pi-4"}) as daemon:
        world = Played(daemon, machine)
        until(lambda: world.heat()["step"] == 1, "the first step of a Raspberry Pi 4")
        assert world.heat()["given_up"] == ["models run 75% of the time"]


def sized_bundle(directory: Path, name: str, sizes: dict[str, int]) -> Path:
    """The affine model in variants whose artifacts have so many bytes."""
    blobs, variants = {}, []
    for label, size_bytes in sizes.items():
        data = json.dumps(affine()).encode().ljust(size_bytes)
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data), f"{label}.reference.json")
        blobs[blob.sha256] = from_bytes(data)
        variants.append(Variant(label, "reference", blob, label))
    manifest = Manifest(
        schema=1,
        name=name,
        version=1,
        inputs=(TensorSpec("x", "FP32", (-1, WIDTH)),),
        outputs=(TensorSpec("y", "FP32", (-1, WIDTH)),),
        batch_axis=0,
        variants=tuple(variants),
    )
    path = directory / f"{name}.bundle"
    archive.pack(archive.compose(manifest, blobs), path)
    return path


def test_a_smaller_variant_serves_while_it_is_hot_and_no_request_is_lost(tmp_path: Path) -> None:
    ladder = LADDER | {"steps": [{"enter_c": 70, "variant": "smaller"}]}
    config: dict[str, Any] = {"selection": {"policy": "off"}}
    with played(tmp_path / "root", config, ladder=ladder) as world:
        daemon = world.daemon
        sizes = {"fp32": 4000, "fp16": 2000, "int8": 1000}
        daemon.install(sized_bundle(daemon.bundles, "m", sizes))
        assert daemon.worker("m")["variant"] == "fp32"
        with daemon.impatient() as client:
            for celsius, variant in ((75, "fp16"), (50, "fp32"), (75, "fp16")):
                world.machine.zone(0, "cpu-thermal", celsius)

                def changed(variant: str = variant) -> bool:
                    assert client.infer("m", {"x": filled(3.0)})["y"][0, 0] == 7.0
                    return bool(daemon.worker("m").get("variant") == variant)

                until(changed, variant)
        until(lambda: len(daemon.events("variant_changed")) == 3, "three changes")
        assert "fp16 serves instead of fp32: the device is hot" in world.cli("why", "m")


def test_at_a_share_of_the_time_a_busy_model_answers_that_share(tmp_path: Path) -> None:
    """A client that does as it is told gets every answer, but the model runs 5 % of the time."""
    with played(tmp_path) as world:
        world.daemon.add("slow", options={"run_ms": 10})
        world.at(75, 1)
        with world.daemon.client() as client:
            began_s = time.monotonic()
            for _ in range(10):
                assert client.infer("slow", {"x": filled(1.0)})["y"][0, 0] == 3.0
            took_s = time.monotonic() - began_s
        # 100 ms of runs less the burst of 12.5 ms, at a twentieth of the time
        assert took_s > 1.2


def test_a_model_that_is_loaded_while_it_is_hot_is_held_back_too(tmp_path: Path) -> None:
    with played(tmp_path) as world:
        world.at(85, 2)
        world.daemon.add("late")

        def refused() -> bool:
            with world.daemon.impatient() as client:
                try:
                    client.infer("late", {"x": filled(3.0)})
                except ThrottledError:
                    return True
            return False

        until(refused, "a refusal")


def test_memory_that_is_short_unloads_and_loads_again_when_asked(tmp_path: Path) -> None:
    with played(tmp_path, memory_down_s=0.2, memory_up_s=0.4, memory_idle_s=0.3) as world:
        daemon = world.daemon
        daemon.add("m", 1)
        daemon.add("m", 2, scale=3.0)
        assert daemon.worker("m", "warm")
        world.machine.pressure(memory=40)
        until(lambda: daemon.model("m")["state"] == "idle", "an idle model")
        assert not daemon.worker("m", "warm")
        world.machine.pressure(memory=0)
        until(lambda: daemon.control("status")["device"]["memory"]["step"] == 0, "calm")
        assert daemon.infer("m") == 10.0


def test_without_a_thermal_zone_it_says_so_once_and_serves(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    (tmp_path / "empty").mkdir()
    daemon = make_daemon({"governor": {"interval_s": 0.05, "root": str(tmp_path / "empty")}})
    daemon.start()
    daemon.add("m")
    assert daemon.infer("m") == 7.0
    (event,) = daemon.events("governor_began")
    assert event["message"] == "watches no thermal zone (no ladder) and no memory"
    daemon.stop()


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def make(config: dict[str, Any]) -> Daemon:
        made.append(Daemon(config))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def test_a_governor_that_is_off_reads_and_does_nothing(tmp_path: Path) -> None:
    with played(tmp_path, enabled=False) as world:
        world.machine.zone(0, "cpu-thermal", 100)
        world.daemon.add("m")
        assert world.daemon.infer("m") == 7.0
        assert world.daemon.control("status")["device"] is None
        assert "edge_governor_step" not in world.daemon.control("metrics")["text"]
