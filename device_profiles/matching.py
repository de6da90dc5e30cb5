"""Which profile fits a machine, and why.

Law of this file: pure; a machine and profiles in, a verdict with its reasons out.

A profile matches if every rule it has holds. Of several, the one whose rules say most about the
machine wins: each rule has a weight, and the most specific entry of a device tree's `compatible`
(the board) weighs more than the last (the chip). What extends a matching profile has its rules and
more, or is somebody's own file: on equal weight the longer chain wins, then the name, so that the
verdict never depends on the order of a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from device_profiles.loading import Resolved
from device_profiles.schema import Machine, Match

# In words, for whoever must tell it.
FALLBACK = "none of the profiles fits this machine"


class Reason(NamedTuple):
    """What a rule found."""

    rule: str  # match.compatible
    text: str  # "rockchip,rk3588" is in the device tree
    weight: int


class Matched(NamedTuple):
    """A profile that fits."""

    resolved: Resolved
    reasons: tuple[Reason, ...]

    @property
    def weight(self) -> int:
        return sum(reason.weight for reason in self.reasons)


class Verdict(NamedTuple):
    """Which board, which add-ons, and who else would have fitted, best first."""

    board: Matched | None
    addons: tuple[Matched, ...]
    others: tuple[Matched, ...]


def choose(machine: Machine, profiles: Iterable[Resolved]) -> Verdict:
    """The board profile that says most about this machine, and every add-on that is there."""
    fitting = [
        Matched(one, reasons)
        for one in profiles
        if (reasons := reasons_for(machine, one.profile.match)) is not None
    ]
    boards = sorted((one for one in fitting if one.resolved.profile.kind == "board"), key=_rank)
    addons = sorted((one for one in fitting if one.resolved.profile.kind == "addon"), key=_rank)
    return Verdict(boards[0] if boards else None, tuple(addons), tuple(boards[1:]))


def reasons_for(machine: Machine, match: Match) -> tuple[Reason, ...] | None:
    """Why a machine matches; None: it does not. A profile without rules matches nothing: it is
    there to be extended or asked for by name.
    """
    reasons = []
    for rule, look in _RULES.items():
        if getattr(match, rule):
            reason = look(machine, match)
            if reason is None:
                return None
            reasons.append(reason)
    return tuple(reasons) or None


def _rank(matched: Matched) -> tuple[int, int, str]:
    resolved = matched.resolved
    return (-matched.weight, -len(resolved.files), resolved.profile.name)


# --- rules: a machine and a match in, the reason out, or None -----------------------------------


def _any(values: Iterable[str], patterns: Iterable[str]) -> tuple[int, str] | None:
    """The first value that one of the patterns fits, with its place."""
    patterns = tuple(patterns)
    for place, value in enumerate(values):
        if any(fnmatchcase(value, pattern) for pattern in patterns):
            return place, value
    return None


def _arch(machine: Machine, match: Match) -> Reason | None:
    hit = _any((machine.arch,), match.arch)
    return hit and Reason("match.arch", f"the processor is {hit[1]}", 1)


def _compatible(machine: Machine, match: Match) -> Reason | None:
    hit = _any(machine.compatible, match.compatible)
    if hit is None:
        return None
    # Entries go from the board to the chip: the chip alone still says more than anything below.
    return Reason("match.compatible", f"the device tree has {hit[1]!r}", max(100 - hit[0], 60))


def _dmi(machine: Machine, match: Match) -> Reason | None:
    for name, patterns in match.dmi.items():
        if _any((machine.dmi.get(name, ""),), patterns) is None:
            return None
    said = ", ".join(f"{name} is {machine.dmi[name]!r}" for name in match.dmi)
    return Reason("match.dmi", said, 40 * len(match.dmi))


def _cpu_models(machine: Machine, match: Match) -> Reason | None:
    hit = _any((machine.cpu_model,), match.cpu_models)
    return hit and Reason("match.cpu_models", f"the processor is {hit[1]!r}", 30)


def _cpu_parts(machine: Machine, match: Match) -> Reason | None:
    hit = _any((one.part for one in machine.clusters), match.cpu_parts)
    return hit and Reason("match.cpu_parts", f"a core is of part {hit[1]}", 10)


def _cpu_flags(machine: Machine, match: Match) -> Reason | None:
    if not set(match.cpu_flags) <= set(machine.cpu_flags):
        return None
    flags = ", ".join(match.cpu_flags)
    return Reason("match.cpu_flags", f"the processor has {flags}", 2 * len(match.cpu_flags))


def _pci(machine: Machine, match: Match) -> Reason | None:
    hit = _any(machine.pci, match.pci)
    return hit and Reason("match.pci", f"there is a PCI device {hit[1]}", 20)


def _usb(machine: Machine, match: Match) -> Reason | None:
    hit = _any(machine.usb, match.usb)
    return hit and Reason("match.usb", f"there is a USB device {hit[1]}", 20)


def _memory_min(machine: Machine, match: Match) -> Reason | None:
    if machine.memory_bytes < match.memory_bytes_min:
        return None
    return Reason("match.memory_bytes_min", f"it has {machine.memory_bytes >> 20} MiB", 2)


def _memory_max(machine: Machine, match: Match) -> Reason | None:
    if not 0 < machine.memory_bytes <= match.memory_bytes_max:
        return None
    return Reason("match.memory_bytes_max", f"it has {machine.memory_bytes >> 20} MiB", 2)


_RULES: dict[str, Callable[[Machine, Match], Reason | None]] = {
    "arch": _arch,
    "compatible": _compatible,
    "dmi": _dmi,
    "cpu_models": _cpu_models,
    "cpu_parts": _cpu_parts,
    "cpu_flags": _cpu_flags,
    "pci": _pci,
    "usb": _usb,
    "memory_bytes_min": _memory_min,
    "memory_bytes_max": _memory_max,
}
