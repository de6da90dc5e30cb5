"""What the machine says: clock, disk, limits, kernel, memory, software.

Law of this file: reads only (the disk's speed needs one small file, which it removes), everything
below `World.root`; values out, no verdict. What only the running kernel can tell, a recorded tree
cannot: it is then `Unknown`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from edge_runtime.cli.health import Unknown
from edge_runtime.daemon import memory
from edge_runtime.serving import sandbox

RECORDED = Unknown("a recorded tree cannot tell")
SYNCS = 7  # the median of so few is steady enough to tell 1 ms from 100
SYNC_SIZE_BYTES = 4096
SYNC_S_MAX = 3.0  # a card that takes seconds for one fsync has shown what it is


class World(NamedTuple):
    """What is examined. Paths are as they would be without `root`."""

    root: Path
    state_dir: Path
    run_dir: Path
    daemon_pid: int = 0  # 0: none is known
    profile: str = ""  # the daemon's, as its configuration names it

    @property
    def live(self) -> bool:
        """Whether this is the machine that we run on."""
        return self.root == Path("/")

    def at(self, path: str | Path) -> Path:
        """Where a path of the examined machine is found."""
        return self.root / str(path).lstrip("/")


def _text(path: Path) -> str | Unknown:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return Unknown(f"{path} cannot be read: {error.strerror}")


def _number(text: str) -> int:
    """A number of the kernel's; -1 for "unlimited" and for whatever is none."""
    word = text.strip()
    return int(word) if word.isascii() and word.isdigit() else -1


# --- clock --------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """The wall clock; `synchronised` None: nobody says."""

    wall_s: float
    synchronised: bool | None
    battery: bool  # a clock that goes on without power


# What the first fields of struct timex need not be known for: `status` is the fifth (x86 and arm,
# 64 bit: modes int, then offset, freq, maxerror, esterror long, status int). adjtimex(2).
_TIMEX_BYTES = 256
_STATUS_OFFSET = {8: 40, 4: 20}
_STA_UNSYNC = 0x40


def clock(world: World) -> Clock:
    """The clock, and who keeps it."""
    marked = world.at("run/systemd/timesync/synchronized").exists()
    synchronised = True if marked else _kernel_synchronised() if world.live else None
    return Clock(time.time(), synchronised, any(world.at("sys/class/rtc").glob("rtc*")))


def _kernel_synchronised() -> bool | None:
    """Whether some daemon (chrony, ntpd, timesyncd) tells the kernel that the clock is right."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    offset = _STATUS_OFFSET[ctypes.sizeof(ctypes.c_long)]
    if ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    return not int.from_bytes(timex.raw[offset : offset + 4], sys.byteorder) & _STA_UNSYNC


# --- disk ---------------------------------------------------------------------------------------


class Space(NamedTuple):
    """The file system of the state directory. `files_free` None: it does not count files."""

    path: str  # the nearest directory that exists
    kind: str  # ext4, tmpfs, ...; empty: not known
    size_bytes: int
    free_bytes: int
    files_free: int | None
    read_only: bool


def space(world: World) -> Space | Unknown:
    """Space where models are kept."""
    path = _nearest(world.at(world.state_dir))
    try:
        found = os.statvfs(path)
    except OSError as error:
        return Unknown(f"{path}: {error.strerror}")
    return Space(
        str(path),
        _kind_of_mount(path) if world.live else "",
        found.f_frsize * found.f_blocks,
        found.f_frsize * found.f_bavail,
        found.f_favail if found.f_files else None,
        bool(found.f_flag & os.ST_RDONLY),
    )


class Sync(NamedTuple):
    """How long writing and fsyncing a small file took."""

    path: str
    median_s: float


def sync(world: World) -> Sync | Unknown:
    """Write and fsync in the state directory, or in the nearest one above it that exists."""
    path = _nearest(world.at(world.state_dir))
    times_s: list[float] = []
    began_s = time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".edge-doctor-") as file:
            while len(times_s) < SYNCS and time.monotonic() - began_s < SYNC_S_MAX:
                before_s = time.monotonic()
                file.write(os.urandom(SYNC_SIZE_BYTES))
                file.flush()
                os.fsync(file.fileno())
                times_s.append(time.monotonic() - before_s)
    except OSError as error:
        return Unknown(f"{path} cannot be written as this user: {error.strerror}")
    return Sync(str(path), statistics.median(times_s))


def _nearest(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _kind_of_mount(path: Path) -> str:
    """The file system's type, by the longest mount point above the path."""
    text, here = _text(Path("/proc/self/mounts")), path.resolve()
    best, kind = -1, ""
    for line in text.splitlines() if isinstance(text, str) else ():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(fields[1].encode().decode("unicode_escape"))  # \040 is a blank
        if here.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


# --- limits -------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Resource limits of a process; -1: none."""

    of_daemon: bool  # else those of this command: what a daemon started here would get
    files_soft: int
    files_hard: int
    locked_bytes: int
    processes: int


def limits(world: World) -> Limits | Unknown:
    """The daemon's limits; without one, our own."""
    whose = str(world.daemon_pid) if world.daemon_pid else "self"
    text = _text(world.at(f"proc/{whose}/limits"))
    if isinstance(text, Unknown):
        return text
    files = _limit(text, "Max open files")
    locked = _limit(text, "Max locked memory")
    processes = _limit(text, "Max processes")
    return Limits(bool(world.daemon_pid), *files, locked[0], processes[0])


def _limit(text: str, name: str) -> tuple[int, int]:
    """Soft and hard, from a line such as `Max open files  1024  4096  files`."""
    for line in text.splitlines():
        if line.startswith(name):
            soft, hard = (*line[len(name) :].split(), "", "")[:2]
            return _number(soft), _number(hard)
    return -1, -1


# --- kernel -------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """Kernel features that the daemon uses. None: not known."""

    release: str
    arch: str
    landlock_abi: int | None  # 0: none
    seccomp: bool | None
    memfd: bool | None  # sealed, as tensors travel
    pressure: bool  # PSI


def kernel(world: World) -> Kernel:
    """What this kernel can do."""
    release = _text(world.at("proc/sys/kernel/osrelease"))
    actions = _text(world.at("proc/sys/kernel/seccomp/actions_avail"))
    return Kernel(
        release.strip() if isinstance(release, str) else "",
        platform.machine() if world.live else "",
        sandbox.landlock_abi() if world.live else None,
        isinstance(actions, str) and "errno" in actions,
        _sealed_memory() if world.live else None,
        isinstance(_text(world.at("proc/pressure/memory")), str),
    )


def _sealed_memory() -> bool:
    import fcntl

    try:
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


# --- memory -------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Memory in bytes."""

    of_daemon: bool  # whose limit it is; else that of this session
    total_bytes: int
    available_bytes: int
    limit_bytes: int  # the least that a cgroup above it allows, or total; 0: not known
    controller: bool  # the kernel counts memory per cgroup
    oom_kills: int


class Swap(NamedTuple):
    """One line of /proc/swaps."""

    device: str
    kind: str  # partition, file
    size_bytes: int


def memory_of(world: World) -> Memory | Unknown:
    """What there is, and what of it we may use."""
    text = _text(world.at("proc/meminfo"))
    if isinstance(text, Unknown):
        return text
    fields = {line.partition(":")[0]: line.partition(":")[2] for line in text.splitlines()}
    total, available = (
        max(0, _number(fields.get(name, "").removesuffix("kB"))) * 1024
        for name in ("MemTotal", "MemAvailable")
    )
    proc, cgroups = world.at("proc"), world.at("sys/fs/cgroup")
    controllers = _text(cgroups / "cgroup.controllers")
    counted = "memory" in controllers.split() if isinstance(controllers, str) else False
    return Memory(
        bool(world.daemon_pid),
        total,
        available,
        memory.limit_bytes(proc, cgroups, world.daemon_pid),
        counted or (cgroups / "memory").is_dir(),
        memory.oom_kills(proc),
    )


def swaps(world: World) -> tuple[Swap, ...] | Unknown:
    """Where memory is moved to when there is too little."""
    text = _text(world.at("proc/swaps"))
    if isinstance(text, Unknown):
        return text
    rows = [line.split() for line in text.splitlines()[1:]]
    return tuple(
        Swap(row[0], row[1], max(0, _number(row[2])) * 1024) for row in rows if len(row) >= 3
    )


# --- software -----------------------------------------------------------------------------------


class Software(NamedTuple):
    """Python and what is installed beside us."""

    python: str
    bits: int  # of this Python
    arch: str  # of the kernel
    libc: str  # "glibc 2.36"; empty: another one
    doubles: tuple[str, ...]  # distributions that are there twice, or hide one another


def software(world: World) -> Software | Unknown:
    """The Python environment of this command; the service has its own."""
    if not world.live:
        return RECORDED
    return Software(
        platform.python_version(),
        64 if sys.maxsize > 1 << 32 else 32,
        platform.machine(),
        " ".join(platform.libc_ver()).strip(),
        tuple(_doubles()),
    )


# Distributions that bring a module of the same name: the last one installed is what is imported.
_SAME_MODULE = {"onnxruntime/__init__.py": "onnxruntime", "openvino/__init__.py": "openvino"}


def _doubles() -> list[str]:
    """Half-finished upgrades, and packages that overwrite each other's files."""
    from importlib import metadata

    versions: dict[str, set[str]] = {}
    owners: dict[str, set[str]] = {}
    for one in metadata.distributions():
        name = (one.metadata["Name"] or "").lower().replace("_", "-")
        versions.setdefault(name, set()).add(one.version)
        for file, prefix in _SAME_MODULE.items():
            if name.startswith(prefix) and one.locate_file(file) in map(
                one.locate_file, one.files or ()
            ):
                owners.setdefault(file, set()).add(name)
    found = [f"{n} {' and '.join(sorted(v))}" for n, v in versions.items() if len(v) > 1]
    return found + [" and ".join(sorted(names)) for names in owners.values() if len(names) > 1]
