"""What of this machine a decision about variants rests on, as far as it can be read without asking
a library.

Law of this file: reads of /proc and of the names of installed packages, a few words out; what
cannot be read is "". No library is imported: a package's version is in the name of its directory.
The facts are read once: a library that is replaced under a running daemon is not used by it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edge_runtime import __version__, digests
from edge_runtime.backends import PACKAGES
from edge_runtime.daemon.board import Board

if TYPE_CHECKING:
    from edge_runtime.serving.selection import Runnable

PROC = Path("/proc")
_SUFFIX = ".dist-info"
# Fields of /proc/cpuinfo that tell processors apart, on x86 and Arm.
_PROCESSOR = ("model name", "CPU implementer", "CPU part", "Hardware", "flags", "Features")


class Machine(NamedTuple):
    """What the choices of all models share.

    Attributes:
        facts: about the machine itself.
        packages: installed packages with their versions ("onnxruntime-1.32.0").
        order: which variants are preferred here, best first: (backend, class of device).
        runnable: which cannot run here.
        turn: held while a model's variants are measured: two at a time would measure each other.
    """

    facts: Mapping[str, str]
    packages: Sequence[str]
    order: tuple[tuple[str, str], ...]
    runnable: Runnable
    turn: asyncio.Lock

    def fingerprint(self, backends: Iterable[str]) -> dict[str, str]:
        """The facts, and the versions of what these backends load."""
        versions = {
            f"backend {name}": " ".join(_installed(self.packages, PACKAGES.get(name, ())))
            for name in backends
        }
        return {**self.facts, **versions}


def look(board: Board) -> Machine:
    """This machine, now, as its profile has it."""
    return Machine(
        {**read_facts(PROC), "profile": _describe(board)},
        read_packages(sys.path),
        tuple((one.backend, one.device_class) for one in board.order),
        board.runnable,
        asyncio.Lock(),
    )


def read_facts(proc: Path) -> dict[str, str]:
    """Processor, cores and kernel; the kernel's release stands for its drivers."""
    fields: dict[str, str] = {}
    for line in _lines(proc / "cpuinfo"):
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    identity = "\n".join(f"{key}={fields.get(key, '')}" for key in _PROCESSOR)
    name = fields.get("model name") or fields.get("CPU part") or ""
    digest = digests.sha256_hex(identity.encode())[:8]
    return {
        "edge-runtime": __version__,
        "processor": f"{os.uname().machine} {name} {digest}",
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": " ".join(_lines(proc / "sys" / "kernel" / "osrelease")),
    }


def read_packages(search: Iterable[str]) -> tuple[str, ...]:
    """The installed packages on a search path."""
    found = set()
    for directory in search:
        try:
            names = [entry.name for entry in Path(directory).iterdir()]
        except OSError:
            continue  # an archive, or not there
        found |= {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}
    return tuple(sorted(found))


def _installed(packages: Iterable[str], wanted: tuple[str, ...]) -> list[str]:
    """Those whose name begins with one of `wanted`, plug-ins of it included."""
    return [one for one in packages if one.lower().replace("-", "_").startswith(wanted)]


def _describe(board: Board) -> str:
    """The profile by name, and by what it says about backends."""
    choices = msgspec.json.encode((board.order, board.threads, board.workers))
    return f"{board.name or 'none'} {digests.sha256_hex(choices)[:8]}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
