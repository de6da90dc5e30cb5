"""What the kernel says about processes and the machine.

Law of this file: reads of /proc and of installed versions; values out.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = ("edge-runtime", "onnxruntime", "numpy", "msgspec")
_LIBRARIES = ("numpy", "onnxruntime")


class Memory(NamedTuple):
    """Bytes of one process, from smaps_rollup."""

    rss: int  # resident, shared pages counted in full
    pss: int  # resident, shared pages divided by their users
    private: int  # what its end gives back


def memory(pid: int | str = "self") -> Memory:
    """The memory of a process."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        fields[name.rstrip(":")] = int(size) * 1024
    return Memory(fields["Rss"], fields["Pss"], fields["Private_Clean"] + fields["Private_Dirty"])


def libraries(pid: int) -> list[str]:
    """Which of the libraries that the daemon must not import are mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name in _LIBRARIES if f"/{name}/" in maps]


def cores() -> list[int]:
    """The processors we may use."""
    return sorted(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    return {
        "cpu": _cpu(),
        "cores": len(cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.machine()
