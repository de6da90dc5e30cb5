"""Tries what the service must not be able to do; runs under the service's own settings.

Prints one JSON object: attempt -> "ok", or the name of the error.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path


def write(path: str) -> None:
    file = Path(path) / "edge-probe"
    file.write_text("x")
    file.unlink()


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def signal_init() -> None:
    os.kill(1, 0)


def executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write /etc": lambda: write("/etc"),
    "write /usr": lambda: write("/usr"),
    "write /opt/edge-runtime": lambda: write("/opt/edge-runtime"),
    "write /var/lib": lambda: write("/var/lib"),
    "write /run": lambda: write("/run"),
    "write /run/edge-runtime": lambda: write("/run/edge-runtime"),
    "write /dev/shm": lambda: write("/dev/shm"),
    "write /root": lambda: write("/root"),
    "list /root": lambda: list(Path("/root").iterdir()),
    "list /home": lambda: list(Path("/home").iterdir()),
    "read /etc/shadow": lambda: Path("/etc/shadow").read_bytes(),
    "write /sys": lambda: os.truncate("/sys/kernel/mm/transparent_hugepage/enabled", 0),
    "open an internet socket": lambda: socket.socket(socket.AF_INET),
    "open a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "signal init": signal_init,
    "make memory executable": executable_memory,
    "be root": lambda: os.setuid(0),
    "change its root": lambda: os.chroot("/tmp"),
    # What it needs:
    "write its state": lambda: write("/var/lib/edge-runtime"),
    "write the models' sockets": lambda: write("/run/edge-runtime/models"),
    "write /tmp": lambda: write("/tmp"),
    "open a unix socket": lambda: socket.socket(socket.AF_UNIX),
    "make a memfd": lambda: os.close(os.memfd_create("probe")),
    "set its processors": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "be nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, 5),
    "read /proc/cpuinfo": lambda: Path("/proc/cpuinfo").read_text(),
    "read /proc/vmstat": lambda: Path("/proc/vmstat").read_text(),
    "list the processors": lambda: list(Path("/sys/devices/system/cpu").iterdir()),
    "read the configuration": lambda: Path(
        os.environ["CREDENTIALS_DIRECTORY"], "config.yaml"
    ).read_text(),
}

report: dict[str, object] = {name: outcome(attempt) for name, attempt in ATTEMPTS.items()}
report["visible processes of others"] = sum(
    1 for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.stat().st_uid == 0
)
json.dump(report, sys.stdout)
