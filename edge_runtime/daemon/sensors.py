"""What the machine says of its heat, its clocks and its memory.

Law of this file: reads beneath /sys and /proc, values out; nothing is judged and nothing is kept
but where things are. The root is an argument, so that recorded machines can be played. Whatever is
missing, unreadable or not a number is absent: no reading, never an error.

Sources: kernel documentation driver-api/thermal/sysfs-api, admin-guide/pm/cpufreq, accounting/psi,
admin-guide/cgroup-v2; arch/x86/kernel/cpu/mce/therm_throt.c; of the Raspberry Pi
drivers/firmware/raspberrypi.c and the table of bits of `vcgencmd get_throttled`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

# Where sensors are is looked up so often: a driver that is loaded late is found within it.
SEARCH_S = 60.0
# Files of sysfs hold a page at most; ours a number or a few lines.
FILE_BYTES_MAX = 4096

# Bits of the Raspberry Pi's get_throttled that are about now.
FIRMWARE_BITS = {
    0: "under-voltage",
    1: "frequency capped by firmware",
    2: "throttled by firmware",
    3: "soft temperature limit of firmware",
}
# Of these, what heat does. Too little voltage is a matter for a better power supply.
FIRMWARE_HEAT = (2, 3)
# Cooling devices that take computing time away; a fan does not.
SLOWING = ("cpufreq-*", "thermal-cpufreq-*", "thermal-devfreq-*", "Processor", "intel_powerclamp")
RESOURCES = ("cpu", "memory", "io")
# Counters of a cgroup's memory.events that say that it ran into its limits. (`max` also counts the
# page cache being trimmed, which is everyday life.)
STRUCK = ("high", "oom", "oom_kill")


class Places(NamedTuple):
    """Paths of what this machine has."""

    zones: dict[str, str]  # name -> file with thousandths of a degree
    coolers: dict[str, str]  # name -> file with its state; 0: at rest
    counters: tuple[str, ...]  # files that count throttling since boot
    firmware: tuple[str, ...]  # files with the firmware's bits, in hexadecimal
    clocks: tuple[tuple[str, str], ...]  # (limit in kHz, the hardware's maximum) of each policy
    pressure: tuple[tuple[str, str], ...]  # (resource, file)
    events: tuple[str, ...]  # memory.events of our cgroup


class Reading(NamedTuple):
    """One look."""

    zones: dict[str, int | None]  # thousandths of a degree Celsius; None: cannot be read now
    throttled: tuple[str, ...]  # who slows the machine down because of heat, now
    notes: tuple[str, ...]  # what else limits it: voltage, clocks
    pressure: dict[str, float]  # PSI some avg10 in percent: cpu, memory, io; the worse of
    # machine and cgroup
    struck: bool  # our cgroup ran into its memory limit since the last look
    clock_share: float | None  # lowest limit of a processor's clock, of what its hardware can do
    available_ratio: float | None  # of the machine's memory; asked where there is no pressure only


NOTHING = Reading({}, (), (), {}, False, None, None)


class Sensors:
    """The sensors of a machine.

    Args:
        root: where /sys and /proc are: "/".
        patterns: shell patterns of the types of zones to read.
    """

    def __init__(self, root: str, patterns: Sequence[str]) -> None:
        self._root = root.rstrip("/")
        self._patterns = tuple(patterns)
        self._searched_s: float | None = None
        self._places = Places({}, {}, (), (), (), (), ())
        self._counts: dict[str, int] = {}

    def read(self, now_s: float) -> Reading:
        """Look at everything. What counts since boot is compared with the last look."""
        if self._searched_s is None or now_s - self._searched_s >= SEARCH_S:
            self._searched_s = now_s
            self._places = self._merged(search(self._root, self._patterns))
        places = self._places
        bits = _bits(places.firmware)
        throttled = [f"cooling device {name}" for name, path in places.coolers.items() if _is(path)]
        throttled += [FIRMWARE_BITS[bit] for bit in FIRMWARE_HEAT if bits >> bit & 1]
        if self._grown("throttling", sum(_number(path) or 0 for path in places.counters)):
            throttled.append("thermal throttling counted by the processor")
        pressure = _pressure(places.pressure)
        notes = [FIRMWARE_BITS[bit] for bit in (0, 1) if bits >> bit & 1]
        return Reading(
            {name: _number(path) for name, path in places.zones.items()},
            tuple(throttled),
            tuple(notes),
            pressure,
            self._grown("struck", sum(_events(path) for path in places.events)),
            _clock_share(places.clocks),
            None if "memory" in pressure else _available(f"{self._root}/proc/meminfo"),
        )

    def _merged(self, found: Places) -> Places:
        """A zone that has gone keeps its place: its absence is a reading, too."""
        return found._replace(zones=self._places.zones | found.zones)

    def _grown(self, name: str, count: int) -> bool:
        before = self._counts.get(name, count)
        self._counts[name] = count
        return count > before


def search(root: str, patterns: Sequence[str]) -> Places:
    """Where things are beneath `root`. Never raises."""
    thermal = f"{root}/sys/class/thermal"
    cpus = f"{root}/sys/devices/system/cpu"
    policies = [f"{cpus}/cpufreq/{name}" for name in _names(f"{cpus}/cpufreq")]
    platform = f"{root}/sys/devices/platform"
    firmware = [
        f"{platform}/{soc}/{node}/get_throttled"
        for soc in _names(platform)
        if soc == "soc" or soc.startswith("soc@")
        for node in _names(f"{platform}/{soc}")
        if node.endswith("firmware")
    ]
    counters = [
        f"{cpus}/{cpu}/thermal_throttle/{kind}_throttle_count"
        for cpu in _names(cpus)
        if cpu[3:].isdigit()
        for kind in ("core", "package")
    ]
    groups = list(_cgroups(root))
    types = {name: _text(f"{thermal}/{name}/type") for name in _names(thermal)}
    return Places(
        _zones(thermal, types, "thermal_zone", "temp", patterns),
        _zones(thermal, types, "cooling_device", "cur_state", SLOWING),
        tuple(path for path in counters if _number(path) is not None),
        tuple(path for path in firmware if _text(path)),
        tuple((f"{one}/scaling_max_freq", f"{one}/cpuinfo_max_freq") for one in policies),
        (
            *((one, f"{root}/proc/pressure/{one}") for one in RESOURCES),
            *((one, f"{group}/{one}.pressure") for group in groups for one in RESOURCES),
        ),
        tuple(f"{group}/memory.events" for group in groups),
    )


def _zones(
    directory: str, types: dict[str, str], kind: str, file: str, patterns: Sequence[str]
) -> dict[str, str]:
    """Files of the zones or devices of certain types; several of one type get a number."""
    places: dict[str, str] = {}
    for name, label in types.items():
        if not name.startswith(kind) or not any(fnmatchcase(label, one) for one in patterns):
            continue
        unique, count = label, 1
        while unique in places:
            count += 1
            unique = f"{label}#{count}"
        places[unique] = f"{directory}/{name}/{file}"
    return places


def _cgroups(root: str) -> Iterable[str]:
    """The directory of our own cgroup of version 2, if it is not the root (which has no limits)."""
    for line in _text(f"{root}/proc/self/cgroup").splitlines():
        number, _, path = line.partition("::")
        if number == "0" and path not in ("", "/") and ".." not in path:
            yield f"{root}/sys/fs/cgroup{path}"


# --- files ----------------------------------------------------------------------------------------


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names only, of directories that may be many
    except OSError:
        return []


def _text(path: str) -> str:
    """A file's text; empty: missing, unreadable, or not text."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, FILE_BYTES_MAX).decode("ascii", "replace").strip()
    except OSError:  # a sensor that is asleep answers EAGAIN, one that is broken EIO
        return ""
    finally:
        os.close(fd)


def _number(path: str, base: int = 10) -> int | None:
    try:
        return int(_text(path), base)
    except ValueError:
        return None


def _is(path: str) -> bool:
    return (_number(path) or 0) > 0


def _bits(paths: Sequence[str]) -> int:
    bits = 0
    for path in paths:
        bits |= max(_number(path, 16) or 0, 0)
    return bits


def _events(path: str) -> int:
    """How often a cgroup ran into its memory limits."""
    pairs = (line.split() for line in _text(path).splitlines())
    return sum(
        int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in STRUCK and pair[1].isdigit()
    )


def _pressure(places: Sequence[tuple[str, str]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for resource, path in places:
        share = _avg10(path)
        if share is not None:
            found[resource] = max(share, found.get(resource, 0.0))
    return found


def _avg10(path: str) -> float | None:
    """Of `some avg10=1.50 ...`: the percentage of the last 10 s in which a task waited."""
    line = _text(path).partition("\n")[0].split()
    if len(line) < 2 or line[0] != "some" or not line[1].startswith("avg10="):
        return None
    try:
        value = float(line[1][6:])
    except ValueError:
        return None
    return value if 0 <= value <= 100 else None


def _available(path: str) -> float | None:
    """MemAvailable of MemTotal."""
    fields = {line[0]: line[1] for line in map(str.split, _text(path).splitlines()) if line[1:]}
    total, free = fields.get("MemTotal:", ""), fields.get("MemAvailable:", "")
    if not (total.isdigit() and free.isdigit() and 0 < int(total) >= int(free)):
        return None
    return int(free) / int(total)


def _clock_share(clocks: Sequence[tuple[str, str]]) -> float | None:
    shares = [
        limit / most
        for limit, most in ((_number(limit), _number(most)) for limit, most in clocks)
        if limit and most and 0 < limit <= most
    ]
    return min(shares, default=None)
