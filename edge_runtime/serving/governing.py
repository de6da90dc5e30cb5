"""When to give something up, and when to take it back: the governor's decisions.

Law of this file: pure. Readings, state and time in; state and verdict out. Who reads sensors is
`daemon.sensors`, who acts is `daemon.governor`.

Heat and shortage of memory are one problem: a value, rungs with two thresholds each, and a step
that moves by one. Four rules keep it calm:

1. A rung is left at a lower value than it is entered at; between the two nothing happens.
2. A step down needs `CONFIRMATIONS` readings in a row, and the time `down_s` since any step.
3. A step up needs every reading of `up_s` to be below; the time begins anew with each step.
4. When the value comes straight back after a step up, what the step gave back was too much: the
   next step up waits twice as long, up to `PATIENCE_MAX` times `up_s`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from device_profiles.ladder import Ladder

# One reading may be a glitch of the sensor; three in a row are not.
CONFIRMATIONS = 3
# A device that heats up again at once after each step up is tried every 8 x 60 s, not every minute.
PATIENCE_MAX = 8
# Without any reading for so long a step is taken back: hardware and kernel protect themselves, and
# a device must not stay slow for ever because a sensor is gone.
BLIND_S = 300.0
# Outside of this no sensor of a working board reads (degrees Celsius). -274 is below absolute zero,
# 127 the largest of a signed byte.
SENSIBLE_C = (-40.0, 125.0)
# Nearer to zero than this is a driver that has nothing to say (0), or that reports whole degrees
# where the kernel wants thousandths (127): neither is a temperature.
NOTHING_C = 1.0
# The same value to the last digit for so long: a sensor that sticks. At rest in a steady room one
# that knows whole degrees may do so for minutes.
STUCK_S = 1800.0
# Another sensor that moved so far meanwhile proves it (degrees Celsius).
MOVED_C = 5.0


# --- one step at a time ---------------------------------------------------------------------------


class Rung(NamedTuple):
    """Thresholds of a step, in the unit of the value."""

    enter: float  # at or above: taken
    leave: float  # below: left


class Timing(NamedTuple):
    """Seconds between steps."""

    down_s: float
    up_s: float


class Cause(StrEnum):
    """Why a step was taken."""

    ABOVE = "above"
    BELOW = "below"
    BLIND = "blind"  # nothing could be read for long


class State(NamedTuple):
    """What is remembered between two readings. Times are of one clock, in seconds."""

    step: int = 0  # 0: nothing is given up
    moved_s: float | None = None  # the last step, either way
    above: int = 0  # readings in a row that ask for a step down
    below_s: float | None = None  # since when every reading asks for a step up
    blind_s: float | None = None  # since when there is no reading
    raised_s: float | None = None  # the last step up, until the next one down
    patience: int = 1


class Move(NamedTuple):
    """A step taken."""

    down: bool
    step: int  # now
    cause: Cause


def decide(
    state: State, value: float | None, rungs: Sequence[Rung], timing: Timing, now_s: float
) -> tuple[State, Move | None]:
    """The next state, and the step taken, if one is.

    Args:
        value: the reading; None: there is none.
        rungs: from the first step down on; at most one step is taken however far the value is.
    """
    if value is None:
        return _blind(state, now_s)
    step = state.step
    wants_down = step < len(rungs) and value >= rungs[step].enter
    wants_up = step > 0 and value < rungs[step - 1].leave
    state = state._replace(
        blind_s=None,
        above=state.above + 1 if wants_down else 0,
        below_s=(now_s if state.below_s is None else state.below_s) if wants_up else None,
    )
    if wants_down and state.above >= CONFIRMATIONS and _passed(state.moved_s, timing.down_s, now_s):
        return _down(state, timing, now_s)
    if wants_up:
        wait_s = timing.up_s * state.patience
        if _passed(state.below_s, wait_s, now_s) and _passed(state.moved_s, wait_s, now_s):
            return _up(state, Cause.BELOW, now_s)
    return state, None


def lasts(state: State, value: float, rungs: Sequence[Rung]) -> bool:
    """Whether what the present step was taken for goes on: more is given up only then."""
    return state.step > 0 and value >= rungs[state.step - 1].leave


def _passed(since_s: float | None, wait_s: float, now_s: float) -> bool:
    return since_s is None or now_s - since_s >= wait_s


def _down(state: State, timing: Timing, now_s: float) -> tuple[State, Move]:
    relapsed = state.raised_s is not None and not _passed(
        state.raised_s, timing.up_s * state.patience, now_s
    )
    patience = state.patience
    if state.raised_s is not None:  # the first of several steps down after a step up
        patience = min(patience * 2, PATIENCE_MAX) if relapsed else 1
    step = state.step + 1
    return State(step, now_s, patience=patience), Move(True, step, Cause.ABOVE)


def _up(state: State, cause: Cause, now_s: float) -> tuple[State, Move]:
    step = state.step - 1
    after = State(step, now_s, raised_s=now_s, patience=state.patience, blind_s=state.blind_s)
    return after, Move(False, step, cause)


def _blind(state: State, now_s: float) -> tuple[State, Move | None]:
    blind_s = now_s if state.blind_s is None else state.blind_s
    state = state._replace(above=0, below_s=None, blind_s=blind_s)
    due = _passed(blind_s, BLIND_S, now_s) and _passed(state.moved_s, BLIND_S, now_s)
    return _up(state, Cause.BLIND, now_s) if due and state.step else (state, None)


# --- heat -----------------------------------------------------------------------------------------


def celsius(raw: int | None, offset_c: float = 0.0) -> float | None:
    """The temperature of a sysfs reading (thousandths of a degree); None: that is none."""
    if raw is None:
        return None
    value = raw / 1000
    if abs(value) < NOTHING_C or not SENSIBLE_C[0] <= value <= SENSIBLE_C[1]:
        return None
    return value + offset_c


class Sensor(NamedTuple):
    """What is remembered of a zone."""

    celsius: float | None  # now
    since_s: float  # for how long it has read the same
    low_c: float  # of the hottest sensible zone since then
    high_c: float


def watch(
    before: Mapping[str, Sensor], readings: Mapping[str, float | None], now_s: float
) -> dict[str, Sensor]:
    """Every zone's memory after new readings."""
    sensors = {}
    for zone, value in readings.items():
        others = [c for name, c in readings.items() if name != zone and c is not None]
        old = before.get(zone)
        if old is None or value is None or old.celsius != value:
            high_c = max(others, default=0.0)
            sensors[zone] = Sensor(value, now_s, high_c, high_c)
        else:
            low_c, high_c = old.low_c, old.high_c
            if others:
                low_c, high_c = min(low_c, *others), max(high_c, *others)
            sensors[zone] = old._replace(low_c=low_c, high_c=high_c)
    return sensors


def stuck(sensor: Sensor, now_s: float) -> bool:
    """Whether a sensor has read the same for so long that it is to be said."""
    return sensor.celsius is not None and now_s - sensor.since_s >= STUCK_S


def hottest(sensors: Mapping[str, Sensor], now_s: float) -> float | None:
    """The temperature that decides, in degrees Celsius; None: no sensor reads.

    One that sticks while another moved is not believed. Alone, or among steady ones, it is.
    """
    return max(
        (
            one.celsius
            for one in sensors.values()
            if one.celsius is not None
            and not (stuck(one, now_s) and one.high_c - one.low_c >= MOVED_C)
        ),
        default=None,
    )


def heat(ladder: Ladder, hottest_c: float | None, throttled: bool) -> float | None:
    """The value that decides. A device that throttles itself is at least as hot as step 1, whatever
    its sensors say.
    """
    if not throttled or not ladder.steps:
        return hottest_c
    return max(ladder.steps[0].enter_c, hottest_c if hottest_c is not None else -273.15)


def heat_rungs(ladder: Ladder) -> tuple[Rung, ...]:
    """Thresholds in degrees Celsius."""
    return tuple(Rung(step.enter_c, step.left_below_c) for step in ladder.steps)


def slimmed(
    variants: Sequence[str], sizes: Mapping[str, int], slower: Container[str] = ()
) -> list[str]:
    """The variants in the order in which they are to serve on a step that says "smaller".

    The next smaller one than the best comes first; the others stay as they are, for when it fails.

    Args:
        variants: that may serve, best first.
        sizes: bytes of their artifacts.
        slower: of them, those that take longer for the same answer: they would heat more.
    """
    smaller = [
        name for name in variants[1:] if sizes[name] < sizes[variants[0]] and name not in slower
    ]
    if not smaller:
        return list(variants)
    following = max(smaller, key=lambda name: sizes[name])
    return [following, *(name for name in variants if name != following)]


# --- memory ---------------------------------------------------------------------------------------

# Where the kernel tells no pressure, less of the machine's memory than this is a shortage: the page
# cache that programs run from is being thrown away. From the second on it is over.
AVAILABLE_SHORT, AVAILABLE_CALM = 0.05, 0.10


class Relief(StrEnum):
    """What is given up for memory, one more with each step."""

    WARM = "warm previous versions are unloaded"
    IDLE = "models that nobody asks for are unloaded"
    REFUSE = "requests of low priority are refused"


def memory_rungs(pressure_percent: float, *, refuse: bool) -> tuple[Rung, ...]:
    """One threshold for all steps: a pressure that lasts takes them one after the other."""
    steps = len(Relief) if refuse else len(Relief) - 1
    return (Rung(pressure_percent, pressure_percent / 2),) * steps


def reliefs(step: int) -> tuple[Relief, ...]:
    """What a step means; with it goes all of the steps before it."""
    return tuple(Relief)[:step]


def shortage(
    pressure_percent: float | None,
    available_ratio: float | None,
    struck: bool,
    threshold_percent: float,
) -> float | None:
    """The value that decides, in percent of the time; None: unknown.

    Args:
        pressure_percent: PSI some avg10; None: the kernel does not tell. Then what is available
            stands for it: short of memory, calm, or in between, where nothing moves.
        available_ratio: of the machine's memory, 0 to 1.
        struck: our cgroup ran into its limits since the last reading.
    """
    value = pressure_percent
    if value is None and available_ratio is not None:
        if available_ratio < AVAILABLE_SHORT:
            value = threshold_percent
        else:
            value = 0.0 if available_ratio > AVAILABLE_CALM else 0.75 * threshold_percent
    return max(threshold_percent, value or 0.0) if struck else value


# --- what holds -----------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What holds on a step of the heat ladder. The defaults: nothing is given up."""

    run_share: float = 1.0
    cpus: str = ""
    smaller: bool = False
    priority_min: int = 0


def limits(ladder: Ladder, step: int) -> Limits:
    """What steps 1 to `step` say together: the strictest; of cores, the deepest step's."""
    taken = ladder.steps[:step]
    return Limits(
        min((one.run_share for one in taken), default=1.0),
        next((one.cpus for one in reversed(taken) if one.cpus), ""),
        any(one.variant == "smaller" for one in taken),
        max((one.refuse_priority_below for one in taken), default=0),
    )
