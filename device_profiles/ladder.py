"""The thermal part of a profile: which sensors matter, and what is given up when they get hot.

Law of this file: values and what makes them valid; no I/O, and nothing of edge_runtime. What a step
does to running workers is `edge_runtime.daemon.governor`'s, when it is taken is
`edge_runtime.serving.governing`'s.

A ladder is read from the top: step 0 is the device as it is, unlimited; step 1 is the first entry
of `steps`, and so on. On step n everything holds that steps 1 to n say, the strictest of each, so
a deeper step never gives anything back.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# A step is left this much below its threshold unless it says otherwise: twice what sensors of
# boards were seen to jitter (+-1.5 C), and about what one step of cooling fan or clock is worth.
HYSTERESIS_C = 5.0
# Less than the jitter of a sensor (3 C from peak to peak) and a device in steady heat would flap.
HYSTERESIS_C_MIN = 3.5
STEPS_MAX = 8
_CPUSET = r"^([0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*)?$"


def _number(ge: float, le: float, unit: str, reason: str) -> Meta:
    return Meta(ge=ge, le=le, description=reason, extra={"unit": unit})


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is given up from a temperature on. A field at its default gives nothing up.

    Raises:
        ValueError: `leave_c` is not far enough below `enter_c`, a range of `cpus` goes downwards,
            or the step gives nothing up.
    """

    enter_c: Annotated[float, _number(20, 120, "degrees Celsius", "as hot as this: one step down")]
    leave_c: Annotated[
        float | None,
        Meta(description=f"colder than this: back; default: {HYSTERESIS_C:g} below enter_c"),
    ] = None
    run_share: Annotated[
        float,
        _number(
            0.01,
            1,
            "of the time",
            "each model may run for this share of the time; above it requests are refused with "
            "the time to come back: heat follows the time that is computed",
        ),
    ] = 1.0
    cpus: Annotated[
        str,
        Meta(
            pattern=_CPUSET,
            description='cores that models may use, such as "0-3"; empty: as configured',
        ),
    ] = ""
    variant: Annotated[
        Literal["", "smaller"],
        Meta(description="smaller: each model changes to its next smaller variant, if it has one"),
    ] = ""
    refuse_priority_below: Annotated[
        int, _number(0, 255, "priority", "requests of a lower priority are refused; 0: none")
    ] = 0

    def __post_init__(self) -> None:
        if self.leave_c is not None and self.leave_c > self.enter_c - HYSTERESIS_C_MIN:
            raise ValueError(
                f"leave_c {self.leave_c:g} is not {HYSTERESIS_C_MIN:g} or more below "
                f"enter_c {self.enter_c:g}: the jitter of a sensor would flap it"
            )
        cores(self.cpus)
        nothing = (self.run_share, self.cpus, self.variant, self.refuse_priority_below)
        if nothing == (1.0, "", "", 0):
            raise ValueError("the step gives nothing up")

    @property
    def left_below_c(self) -> float:
        """The temperature below which the step is left."""
        return self.enter_c - HYSTERESIS_C if self.leave_c is None else self.leave_c


class Zone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sensor by the kernel's name of it: /sys/class/thermal/thermal_zone*/type.

    Attributes:
        type: a shell pattern, such as `cpu-thermal` or `soc*`; the number of a zone changes from
            boot to boot, its type does not.
    """

    type: Annotated[str, Meta(min_length=1, max_length=64)]
    offset_c: Annotated[
        float,
        _number(-50, 50, "degrees Celsius", "added to a reading, for a sensor known to be off"),
    ] = 0.0


class Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sensors and steps. The hottest of the zones decides. Without steps they are only shown.

    Raises:
        ValueError: the thresholds do not rise from step to step, or steps have no sensor.
    """

    zones: Annotated[tuple[Zone, ...], Meta(max_length=64)] = ()
    steps: Annotated[tuple[Step, ...], Meta(max_length=STEPS_MAX)] = ()
    down_s: Annotated[
        float,
        _number(
            0.1, 3600, "s", "between a step and the next one down: what it did must show first"
        ),
    ] = 10.0
    up_s: Annotated[
        float,
        _number(
            0.1,
            3600,
            "s",
            "colder for so long: one step up; doubled, up to eight times, each time that the "
            "heat comes straight back",
        ),
    ] = 60.0

    def __post_init__(self) -> None:
        if self.steps and not self.zones:
            raise ValueError("steps need zones: without a sensor none is ever taken")
        for upper, lower in zip(self.steps, self.steps[1:], strict=False):
            if lower.enter_c <= upper.enter_c or lower.left_below_c < upper.left_below_c:
                raise ValueError(
                    f"steps must get hotter downwards: {lower.enter_c:g} C comes after "
                    f"{upper.enter_c:g} C"
                )


def cores(cpuset: str) -> frozenset[int]:
    """The cores of a cpuset: `0-1,3` are 0, 1 and 3.

    Raises:
        ValueError: it is not a cpuset.
    """
    if not re.fullmatch(_CPUSET, cpuset):
        raise ValueError(f"{cpuset!r} is not a list of cores such as '0-3,6'")
    found: set[int] = set()
    for part in cpuset.split(",") if cpuset else ():
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"{part!r} of {cpuset!r} goes downwards")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
