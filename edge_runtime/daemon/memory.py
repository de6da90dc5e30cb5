"""What the kernel says about memory, its own counters included.

Law of this file: reads of /proc, values out; a process that is gone has zeros. The root of /proc
is an argument so that recorded machines can be tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


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


def oom_kills(proc: Path = PROC) -> int:
    """Kernel out-of-memory kills since boot (/proc/vmstat)."""
    try:
        for line in (proc / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass  # a container may hide it; then no death is called out-of-memory
    return 0


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()[1:]
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {part[0].rstrip(":"): int(part[1]) * 1024 for part in parts if len(part) >= 2}
