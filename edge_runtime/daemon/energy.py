"""The energy that the processor counts (RAPL, /sys/class/powercap).

Law of this file: one counter read, differences made. Where it is missing or not ours to read (the
kernel shows it to root only) there is no reading, never an error.

Source: kernel documentation power/powercap/powercap; energy_uj counts microjoules of a package and
begins at 0 again after max_energy_range_uj.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")


class Reading(NamedTuple):
    """Sum of all packages; `range_uj` of one of them."""

    used_uj: int
    range_uj: int


def read_uj(powercap: Path = POWERCAP) -> Reading | None:
    """What all packages have used so far; None: not known."""
    try:
        zones = [
            zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1
        ]
        used = [int((zone / "energy_uj").read_text()) for zone in zones]
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
    except (OSError, ValueError):
        return None
    return Reading(sum(used), ranges[0]) if used else None


def used_uj(before: Reading | None, after: Reading | None) -> float | None:
    """The difference; None: not known. A counter that began again is seen by its going down."""
    if before is None or after is None:
        return None
    used = after.used_uj - before.used_uj
    return float(used if used >= 0 else used + after.range_uj)
