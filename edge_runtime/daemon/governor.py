"""The governor: holds the device back while it is hot or short of memory, and lets it go again.

Law of this file: the driver of `serving.governing`. A look reads the sensors, has both ladders
decide, tells of a step, and then sees to it that what holds on the present steps is so: also for a
worker that came since, and again for one that was missed. So nothing here remembers what it did,
and a look that is late or fails costs nothing but time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import msgspec

from device_profiles.ladder import Ladder, cores
from edge_runtime.clock import Clock
from edge_runtime.config import GovernorConfig
from edge_runtime.daemon import affinity
from edge_runtime.daemon.affinity import Affinity
from edge_runtime.daemon.deployment import Deployment
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.sensors import NOTHING, Reading, Sensors
from edge_runtime.errors import EdgeError
from edge_runtime.events import Events, Level
from edge_runtime.metrics import Sample
from edge_runtime.serving import channel, governing
from edge_runtime.serving.governing import Cause, Limits, Move, Relief, Sensor, State, Timing

# Throttling comes and goes with every look: it is told of again only after so long without.
THROTTLE_QUIET_S = 60.0

LadderName = Literal["heat", "memory"]


class Rungs(NamedTuple):
    """A ladder as it is decided on, and where it stands."""

    rungs: tuple[governing.Rung, ...]
    timing: Timing
    state: State = State()
    reason: str = ""  # of the newest step
    moved_wall_s: float | None = None


class Governor:
    """Of one daemon.

    Args:
        ladder: of the profile, unless the configuration has one.
    """

    def __init__(
        self,
        config: GovernorConfig,
        ladder: Ladder,
        deployments: Callable[[], Iterable[Deployment]],
        events: Events,
        clock: Clock,
    ) -> None:
        self._config = config
        self._ladder = config.ladder or ladder
        self._deployments = deployments
        self._events = events
        self._clock = clock
        patterns = [zone.type for zone in self._ladder.zones] or ["*"]
        self._sensors = Sensors(config.root, patterns)
        self._reading = NOTHING
        self._zones: dict[str, Sensor] = {}
        self._odd: frozenset[str] = frozenset()  # zones that were said to stick or to be silent
        self._throttled_s: float | None = None
        self._affinity = Affinity()
        self._heat = Rungs(
            governing.heat_rungs(self._ladder), Timing(self._ladder.down_s, self._ladder.up_s)
        )
        self._memory = Rungs(
            governing.memory_rungs(
                config.memory_pressure_percent, refuse=config.memory_refuse_priority_below > 0
            )
            if config.memory_pressure_percent
            else (),
            Timing(config.memory_down_s, config.memory_up_s),
        )

    # -- looking -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for ever."""
        self._introduce(self._sensors.read(self._now_s()))
        while True:
            try:
                self.look()
            except (EdgeError, OSError) as error:  # the next look does it all again
                self._events.emit("governor_failed", str(error), level="error")
            await asyncio.sleep(self._config.interval_s)

    def _now_s(self) -> float:
        return self._clock.monotonic_ns() / 1e9

    def look(self) -> None:
        """Read, decide, act: once."""
        now_s = self._now_s()
        self._reading = reading = self._sensors.read(now_s)
        self._zones = governing.watch(self._zones, self._celsius(reading), now_s)
        self._tell_of_sensors(now_s)
        self._tell_of_throttling(now_s)
        self._heat = self._step("heat", self._heat, self._hot(now_s), now_s)
        short = self._short()
        self._memory = self._step("memory", self._memory, short, now_s)
        self._hold()
        if short is not None and governing.lasts(self._memory.state, short, self._memory.rungs):
            self._relieve(now_s)

    def _celsius(self, reading: Reading) -> dict[str, float | None]:
        return {
            zone: governing.celsius(raw, self._offset_c(zone))
            for zone, raw in reading.zones.items()
        }

    def _offset_c(self, name: str) -> float:
        label = name.partition("#")[0]
        known = (zone.offset_c for zone in self._ladder.zones if fnmatchcase(label, zone.type))
        return next(known, 0.0)

    def _hot(self, now_s: float) -> float | None:
        hottest_c = governing.hottest(self._zones, now_s)
        return governing.heat(self._ladder, hottest_c, bool(self._reading.throttled))

    def _short(self) -> float | None:
        reading = self._reading
        return governing.shortage(
            reading.pressure.get("memory"),
            reading.available_ratio,
            reading.struck,
            self._config.memory_pressure_percent,
        )

    def _step(self, ladder: LadderName, rungs: Rungs, value: float | None, now_s: float) -> Rungs:
        state, move = governing.decide(rungs.state, value, rungs.rungs, rungs.timing, now_s)
        rungs = rungs._replace(state=state)
        if move is None:
            return rungs
        reason = self._why(ladder, move, now_s)
        text = f"{ladder}: step {move.step} of {len(rungs.rungs)}"
        holds = ", ".join(self._given_up(ladder, move.step)) or "nothing is given up"
        self._events.emit(
            "governor_step",
            f"{text} ({self._evidence(ladder, move, value)}): {holds}",
            level="warning" if move.down else "info",
            ladder=ladder,
            direction="down" if move.down else "up",
            reason=reason,
            step=move.step,
        )
        return rungs._replace(reason=reason, moved_wall_s=self._clock.wall_s())

    def _why(self, ladder: LadderName, move: Move, now_s: float) -> str:
        """The step's reason, one of a few words."""
        if move.cause is Cause.BLIND:
            return "no_reading"
        if ladder == "memory":
            return "pressure" if move.down else "calm"
        if not move.down:
            return "cooler"
        hottest_c = governing.hottest(self._zones, now_s)
        enter_c = self._ladder.steps[move.step - 1].enter_c
        return "heat" if hottest_c is not None and hottest_c >= enter_c else "throttled"

    # -- acting ------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """What holds because of heat."""
        return governing.limits(self._ladder, self._heat.state.step)

    @property
    def reliefs(self) -> tuple[Relief, ...]:
        """What holds because memory is short."""
        return governing.reliefs(self._memory.state.step)

    def _hold(self) -> None:
        """Every model and worker is told what holds, and has the cores that it may have."""
        order, deployments = self._order(), list(self._deployments())
        for deployment in deployments:
            deployment.slim(self.limits.smaller)
        workers = [worker for one in deployments for worker, _ in one.workers()]
        for worker in workers:
            worker.restrain(order)
        allowed = cores(self.limits.cpus) & affinity.available()
        if allowed:
            self._affinity.confine([one.pid for one in workers if one.pid and one.alive], allowed)
        else:
            self._affinity.release()

    def _order(self) -> channel.Restrain:
        limits, why = self.limits, []
        priority_min = limits.priority_min
        if limits.run_share < 1 or priority_min:
            why.append(f"the device is hot (step {self._heat.state.step})")
        if Relief.REFUSE in self.reliefs:
            why.append("the device is short of memory")
            priority_min = max(priority_min, self._config.memory_refuse_priority_below)
        return channel.Restrain(limits.run_share, priority_min, " and ".join(why))

    def _relieve(self, now_s: float) -> None:
        """Unload what may go, on the present step: all that is warm, and one idle model a look."""
        idle: list[tuple[int, Deployment]] = []
        for deployment in self._deployments():
            residents = [one for one in deployment.residents() if one.movable and not one.leaving]
            if any(one.warm for one in residents):
                deployment.cool()
            idle += [(one.last_used_ns, deployment) for one in residents if self._idle(one, now_s)]
        if Relief.IDLE in self.reliefs and idle:
            _, longest = min(idle, key=lambda pair: pair[0])
            longest.sleep("memory is short and nobody asked for it")

    def _idle(self, resident: Resident, now_s: float) -> bool:
        unused_s = now_s - resident.last_used_ns / 1e9
        return not resident.warm and unused_s >= self._config.memory_idle_s

    # -- telling -----------------------------------------------------------------------------------

    def _introduce(self, reading: Reading) -> None:
        """Once, at the start: what is watched, and what of the ladder is not on this machine."""
        steps = self._ladder.steps
        zones = ", ".join(reading.zones) or "no thermal zone"
        memory = "no memory" if reading.available_ratio is None else "available memory"
        memory = "memory pressure" if "memory" in reading.pressure else memory
        ladder = f"{len(steps)} steps" if steps else "no ladder"
        self._events.emit("governor_began", f"watches {zones} ({ladder}) and {memory}")
        if steps and not reading.zones:
            wanted = " or ".join(zone.type for zone in self._ladder.zones)
            self._warn(f"there is no thermal zone {wanted}: the ladder waits for throttling only")
        for number, step in enumerate(steps, start=1):
            if step.cpus and not cores(step.cpus) & affinity.available():
                self._warn(f"step {number} has no effect on cores: {step.cpus} are not ours")

    def _warn(self, message: str) -> None:
        self._events.emit("ladder_does_not_fit", message, level="warning")

    def _tell_of_sensors(self, now_s: float) -> None:
        """Zones that stick or are silent: once each, and once when they are back."""
        odd = {
            zone: "cannot be read"
            if one.celsius is None
            else f"has read {one.celsius:g} C for {governing.STUCK_S / 60:.0f} minutes"
            for zone, one in self._zones.items()
            if one.celsius is None or governing.stuck(one, now_s)
        }
        for zone in odd.keys() - self._odd:
            message = f"thermal zone {zone} {odd[zone]}"
            level: Level = "warning" if self._ladder.steps else "info"  # else nothing hangs on it
            self._events.emit("sensor_odd", message, level=level, zone=zone)
        for zone in self._odd - odd.keys():
            self._events.emit("sensor_well", f"thermal zone {zone} reads again", zone=zone)
        self._odd = frozenset(odd)

    def _tell_of_throttling(self, now_s: float) -> None:
        throttled = self._reading.throttled
        if not throttled:
            return
        before_s, self._throttled_s = self._throttled_s, now_s
        if before_s is None or now_s - before_s >= THROTTLE_QUIET_S:
            message = f"the device slows itself down: {', '.join(throttled)}"
            self._events.emit("throttled", message, level="warning")

    def _evidence(self, ladder: LadderName, move: Move, value: float | None) -> str:
        if value is None:
            return f"nothing could be read for {governing.BLIND_S:g} s"
        if ladder == "memory":
            struck = ", the memory limit was met" if self._reading.struck else ""
            available = self._reading.available_ratio
            if available is not None:
                return f"{available:.1%} of the memory is available{struck}"
            return f"pressure {value:.1f} %{struck}"
        slowed = f", {', '.join(self._reading.throttled)}" if self._reading.throttled else ""
        zones = {zone: one.celsius for zone, one in self._zones.items() if one.celsius is not None}
        if not zones:
            return f"no temperature{slowed}"
        zone = max(zones, key=lambda name: zones[name])
        return f"{zones[zone]:.1f} C at {zone}{slowed}"

    def _given_up(self, ladder: LadderName, step: int) -> Iterator[str]:
        """What holds on a step, in words."""
        if ladder == "memory":
            yield from governing.reliefs(step)
            return
        limits = governing.limits(self._ladder, step)
        if limits.run_share < 1:
            yield f"models run {limits.run_share:.0%} of the time"
        if limits.cpus:
            yield f"on cores {limits.cpus}"
        if limits.smaller:
            yield "smaller variants"
        if limits.priority_min:
            yield f"priorities below {limits.priority_min} are refused"

    def describe(self) -> dict[str, Any]:
        """For `status`, `top` and `why`."""
        reading = self._reading
        return {
            "temperature_c": {zone: one.celsius for zone, one in self._zones.items()},
            "odd_zones": sorted(self._odd),
            "throttled": list(reading.throttled),
            "notes": list(reading.notes),
            "clock_limit_share": reading.clock_share,
            "pressure_percent": reading.pressure,
            "memory_available_ratio": reading.available_ratio,
            "heat": self._describe("heat", self._heat) | {"limits": self.limits._asdict()},
            "memory": self._describe("memory", self._memory),
            "ladder": msgspec.to_builtins(self._ladder),
        }

    def _describe(self, name: LadderName, rungs: Rungs) -> dict[str, Any]:
        return {
            "step": rungs.state.step,
            "steps": len(rungs.rungs),
            "given_up": list(self._given_up(name, rungs.state.step)),
            "reason": rungs.reason,
            "since_wall_s": rungs.moved_wall_s,
        }

    def samples(self) -> Iterator[Sample]:
        """For Prometheus."""
        reading = self._reading
        for zone, one in self._zones.items():
            if one.celsius is not None:
                yield Sample("edge_temperature_celsius", (zone,), one.celsius)
        yield Sample("edge_throttled", (), int(bool(reading.throttled)))
        if reading.clock_share is not None:
            yield Sample("edge_clock_limit_ratio", (), reading.clock_share)
        for resource, percent in reading.pressure.items():
            yield Sample("edge_pressure_ratio", (resource,), percent / 100)
        yield Sample("edge_governor_step", ("heat",), self._heat.state.step)
        yield Sample("edge_governor_step", ("memory",), self._memory.state.step)
