"""The driver on a played machine, time as an argument: what it tells, and what workers are told."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from device_profiles.ladder import Ladder, Step, Zone
from edge_runtime.clock import ManualClock
from edge_runtime.config import GovernorConfig
from edge_runtime.daemon.governor import Governor
from edge_runtime.daemon.residency import Resident
from edge_runtime.events import Event, Events
from edge_runtime.serving import governing
from edge_runtime.serving.channel import Restrain

from .machine import Machine

LADDER = Ladder(
    zones=(Zone("cpu-thermal"),),
    steps=(Step(enter_c=70, run_share=0.5), Step(enter_c=80, refuse_priority_below=5)),
)
FREE = Restrain()


class Worker(SimpleNamespace):
    """What the governor sees of a WorkerProcess."""

    def __init__(self) -> None:
        super().__init__(pid=0, alive=True, orders=[])

    def restrain(self, order: Restrain) -> None:
        if order != (self.orders[-1] if self.orders else FREE):
            self.orders.append(order)


class Model:
    """What it sees of a Deployment."""

    def __init__(self, name: str, clock: ManualClock) -> None:
        self.name, self.clock = name, clock
        self.worker: Worker | None = Worker()
        self.warm: Worker | None = None
        self.last_used_ns = clock.monotonic_ns()
        self.slimmed = False
        self.log: list[str] = []

    def workers(self) -> list[tuple[Worker, str]]:
        each = ((self.worker, "active"), (self.warm, "warm"))
        return [(worker, role) for worker, role in each if worker]

    def residents(self) -> list[Resident]:
        return [
            Resident(self.name, role == "warm", 1, self.last_used_ns, movable=True)
            for _, role in self.workers()
        ]

    def cool(self) -> None:
        self.warm = None
        self.log.append("cool")

    def slim(self, wanted: bool) -> None:
        if wanted != self.slimmed:
            self.slimmed = wanted
            self.log.append("smaller" if wanted else "best")

    def sleep(self, reason: str) -> None:
        self.worker = None
        self.log.append(reason)


class World:
    """A machine, a governor and a clock."""

    def __init__(self, root: Path) -> None:
        self.machine = Machine(root)
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.models = [Model("a", self.clock), Model("b", self.clock)]

    def govern(self, ladder: Ladder = LADDER, **config: Any) -> Governor:
        return Governor(
            GovernorConfig(root=str(self.machine.root), **config),
            ladder,
            lambda: self.models,  # type: ignore[arg-type, return-value]
            Events(SimpleNamespace(write=self.events.append), self.clock),
            self.clock,
        )

    def look(self, governor: Governor, times: int = 1) -> None:
        for _ in range(times):
            self.clock.advance_s(2)
            governor.look()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [dict(event.fields) for event in self.events if event.name == name]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)


def test_a_recorded_hot_episode_goes_down_and_up_once_each(world: World) -> None:
    """Half an hour up to 88 C and back, noise of +-1.5 C: every step told, counted and obeyed."""
    governor, rng = world.govern(), random.Random(4)
    share_seen = set()
    for second in range(0, 1800, 2):
        celsius = 45 + 43 * math.sin(math.pi * second / 1800)
        world.machine.zone(0, "cpu-thermal", celsius + rng.uniform(-1.5, 1.5))
        world.look(governor)
        share_seen.add(governor.limits.run_share)
    for _ in range(100):
        world.look(governor)
    steps = world.named("governor_step")
    assert [(one["direction"], one["step"], one["reason"]) for one in steps] == [
        ("down", 1, "heat"),
        ("down", 2, "heat"),
        ("up", 1, "cooler"),
        ("up", 0, "cooler"),
    ]
    assert share_seen == {1.0, 0.5}
    orders = world.models[0].worker.orders
    assert [(one.run_share, one.priority_min) for one in orders] == [
        (0.5, 0),
        (0.5, 5),
        (0.5, 0),
        (1.0, 0),
    ]
    assert "step 2" in orders[1].reason
    assert governor.describe()["heat"]["given_up"] == []


def test_models_are_asked_for_smaller_variants_and_back(world: World) -> None:
    step = Step(enter_c=70, variant="smaller")
    governor = world.govern(Ladder(zones=(Zone("cpu-thermal"),), steps=(step,)))
    world.machine.zone(0, "cpu-thermal", 75)
    world.look(governor, 5)
    world.machine.zone(0, "cpu-thermal", 50)
    world.look(governor, 40)
    assert world.models[0].log == ["smaller", "best"]
    assert "smaller variants" in world.events[0].message


def test_a_worker_that_comes_later_is_told_at_the_next_look(world: World) -> None:
    governor = world.govern()
    world.machine.zone(0, "cpu-thermal", 75)
    world.look(governor, 5)
    world.models.append(Model("late", world.clock))
    world.look(governor)
    assert [one.run_share for one in world.models[-1].worker.orders] == [0.5]


def test_without_a_zone_it_says_so_and_watches_memory_only(world: World) -> None:
    governor = world.govern()
    with pytest.raises(TimeoutError):  # it looks for ever
        asyncio.run(asyncio.wait_for(governor.run(), 0.05))
    world.look(governor, 500)
    assert governor.describe()["temperature_c"] == {}
    assert [event.message for event in world.events] == [
        "watches no thermal zone (2 steps) and memory pressure",
        "there is no thermal zone cpu-thermal: the ladder waits for throttling only",
    ]


def test_cores_that_the_machine_does_not_have_are_said_at_the_start(world: World) -> None:
    ladder = Ladder(zones=(Zone("*"),), steps=(Step(enter_c=70, cpus="4000-4001"),))
    world.machine.zone(0, "cpu-thermal", 75)
    governor = world.govern(ladder)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(governor.run(), 0.05))
    assert "4000-4001 are not ours" in world.events[-1].message
    world.look(governor, 5)
    assert governor.limits.cpus == "4000-4001"


def test_a_device_that_throttles_itself_goes_to_the_first_step_and_no_further(world: World) -> None:
    governor = world.govern()
    world.machine.zone(0, "cpu-thermal", 60)
    world.machine.firmware(0x4)
    world.look(governor, 300)
    assert [one["reason"] for one in world.named("governor_step")] == ["throttled"]
    assert len(world.named("throttled")) == 1
    world.machine.firmware(0x40000)
    world.look(governor, 40)
    assert governor.limits == governing.Limits()


def test_sensors_that_stick_or_fall_silent_are_told_once_each(world: World) -> None:
    governor = world.govern()
    world.machine.zone(0, "cpu-thermal", 50)
    world.look(governor, 1000)
    assert world.named("sensor_odd") == [{"zone": "cpu-thermal"}]
    world.machine.zone(0, "cpu-thermal", 51)
    world.look(governor)
    assert len(world.named("sensor_well")) == 1
    world.machine.zone(0, "cpu-thermal", "-274000")
    world.look(governor, 50)
    assert len(world.named("sensor_odd")) == 2
    assert governor.describe()["temperature_c"] == {"cpu-thermal": None}


def test_memory_that_is_short_costs_warm_versions_then_idle_models(world: World) -> None:
    a, b = world.models
    governor = world.govern(memory_refuse_priority_below=3)
    a.warm, b.warm = Worker(), Worker()
    world.machine.pressure(memory=30)
    world.look(governor, 3)
    assert a.log == b.log == ["cool"]
    a.last_used_ns = world.clock.monotonic_ns() - 40_000_000_000
    world.look(governor, 5)
    assert a.worker is None
    assert b.worker is not None  # asked for lately
    assert b.worker.orders == []
    world.look(governor, 5)
    assert [one.priority_min for one in b.worker.orders] == [3]
    assert [one["step"] for one in world.named("governor_step")] == [1, 2, 3]
    world.machine.pressure(memory=0)
    world.look(governor, 100)
    assert b.worker is not None  # the pressure is over: nothing more is unloaded for it
    assert b.worker.orders[-1] == FREE
    assert [one["reason"] for one in world.named("governor_step")][3:] == ["calm"] * 3


def test_a_kernel_without_pressure_is_watched_by_its_available_memory(world: World) -> None:
    a, b = world.models
    a.warm = b.warm = Worker()
    governor = world.govern()
    (world.machine.root / "proc/pressure/memory").unlink()
    world.machine.write("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 30 kB\n")
    world.look(governor, 4)
    assert a.log == b.log == ["cool"]
    assert "3.0% of the memory is available" in world.events[-1].message
    world.machine.write("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 300 kB\n")
    world.look(governor, 40)
    assert [one["reason"] for one in world.named("governor_step")] == ["pressure", "calm"]


def test_models_that_nobody_asks_for_go_one_at_a_time_the_longest_unused_first(
    world: World,
) -> None:
    a, b = world.models
    governor = world.govern(memory_idle_s=5)
    b.last_used_ns -= 10_000_000_000
    world.machine.pressure(memory=30)
    world.look(governor, 8)
    assert b.worker is None
    assert a.worker is not None
    world.look(governor)
    assert a.worker is None


def test_a_cgroup_at_its_limit_is_a_step_even_without_pressure(world: World) -> None:
    governor = world.govern()
    for count in range(8):
        world.machine.cgroup(memory=0, high=count)
        world.look(governor)
    (step,) = world.named("governor_step")[:1]
    assert step["reason"] == "pressure"


def test_a_threshold_of_zero_watches_no_memory(world: World) -> None:
    governor = world.govern(memory_pressure_percent=0)
    world.machine.pressure(memory=100)
    world.look(governor, 100)
    assert world.named("governor_step") == []


def test_every_figure_has_a_metric(world: World) -> None:
    governor = world.govern()
    world.machine.zone(0, "cpu-thermal", 75)
    world.machine.clock(1, 2)
    world.look(governor, 4)
    samples = {(one.name, *one.labels): one.value for one in governor.samples()}
    assert samples == {
        ("edge_temperature_celsius", "cpu-thermal"): 75.0,
        ("edge_throttled",): 0,
        ("edge_clock_limit_ratio",): 0.5,
        ("edge_pressure_ratio", "memory"): 0.0,
        ("edge_governor_step", "heat"): 1,
        ("edge_governor_step", "memory"): 0,
    }


Act = Callable[[World], None]
ACTS: list[Act] = [
    lambda world: world.machine.zone(0, "cpu-thermal", "banana"),
    lambda world: world.machine.zone(0, "cpu-thermal", "127000"),
    lambda world: world.machine.zone(0, "cpu-thermal", "0"),
    lambda world: (world.machine.root / "sys/class/thermal/thermal_zone0/temp").unlink(),
]


@pytest.mark.parametrize("act", ACTS)
def test_a_sensor_that_fails_on_a_step_leaves_the_step_and_later_gives_it_back(
    world: World, act: Act
) -> None:
    governor = world.govern()
    world.machine.zone(0, "cpu-thermal", 75)
    world.look(governor, 5)
    act(world)
    world.look(governor, 140)
    assert governor.limits.run_share == 0.5
    world.look(governor, 20)
    assert governor.limits.run_share == 1.0
    assert world.named("governor_step")[-1]["reason"] == "no_reading"
