"""What the kernel says about memory, its own counters included.

Law of this file: reads of /proc, values out; a process that is gone has zeros. The root of /proc
is an argument so that recorded machines can be tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes of one process."""

    rss_bytes: int  # resident, shared pages counted in full
    pss_bytes: int  # resident, shared pages divided by their users
    private_bytes: int  # what its end gives back


def of(pid: int, proc: Path = PROC) -> Memory:
    """The memory of a process, from smaps_rollup."""
    fields = _fields(proc / str(pid) / "smaps_rollup")
    private = fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)
    return Memory(fields.get("Rss", 0), fields.get("Pss", 0), private)


def limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS, pid: int = 0) -> int:
    """The memory that a process (0: this one) and its children may have: the machine's, or the
    least that a cgroup above it allows. 0: not known.
    """
    total = _fields(proc / "meminfo", skip=0).get("MemTotal", 0)
    limits = [total] if total else []
    for line in _lines(proc / str(pid or "self") / "cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for mount, knob in _knobs(controllers):
            # In a container the path may be the host's: then only the nearest one to the root is.
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                limits += _numbers(Path(cgroups, mount, *parts[:depth], knob))
    return min(limits, default=0)


def _knobs(controllers: str) -> tuple[tuple[str, str], ...]:
    """(directory of the hierarchy, file with its limit) for a line of /proc/self/cgroup."""
    if controllers == "":  # version 2, by itself or beside version 1
        return ((".", "memory.max"), ("unified", "memory.max"))
    if "memory" in controllers.split(","):
        return (("memory", "memory.limit_in_bytes"),)
    return ()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> list[int]:
    """The number in a file; nothing for "max" or where there is no such file."""
    return [int(line) for line in _lines(path) if _is_number(line)]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def oom_kills(proc: Path = PROC) -> int:
    """Kernel out-of-memory kills since boot (/proc/vmstat)."""
    try:
        for line in (proc / "vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and _is_number(count):
                return int(count)
    except OSError:
        pass  # a container may hide it; then no death is called out-of-memory
    return 0


def _fields(path: Path, skip: int = 1) -> dict[str, int]:
    """Fields in kB of a file of /proc, in bytes; `skip`: lines of heading."""
    parts = [line.split() for line in _lines(path)[skip:]]
    return {
        part[0].rstrip(":"): int(part[1]) * 1024
        for part in parts
        if len(part) >= 2 and _is_number(part[1])
    }
