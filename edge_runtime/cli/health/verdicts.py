"""What is to be thought of what was seen.

Law of this file: pure; a fact in, a `Finding` out. Every bound has its reason beside it, and every
warning or failure says what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from edge_runtime.backends.diagnosis import Cause, Diagnosis
from edge_runtime.cli import output
from edge_runtime.cli.health import Finding, Unknown, Verdict
from edge_runtime.cli.health.facts import Clock, Kernel, Limits, Memory, Software, Space, Swap, Sync
from edge_runtime.cli.health.reach import Daemon, Socket

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# This program did not exist before, and a board will not live so long: a clock outside is not set.
YEAR_MIN, YEAR_MAX = 2026, 2100
# `store.free_bytes_min`: below it the daemon refuses installs.
FREE_BYTES_MIN = 64 * MIB
FREE_SHARE_LOW, FREE_BYTES_LOW = 0.10, GIB
FILES_FREE_MIN = 100  # a generation takes some ten
# Good eMMC and SD cards sync in 2 to 20 ms; an install syncs some twenty times, a switch three.
SYNC_S_SLOW, SYNC_S_BAD = 0.05, 1.0
# limits.connections_max (256) and some for the rest; workers.open_files_max.
FILES_SOFT_MIN, FILES_HARD_MIN = 320, 1024
# The daemon, one template and one small worker.
AVAILABLE_BYTES_MIN = 128 * MIB
LANDLOCK_FROM = "Linux 5.13"


def known(judge: Callable[[Any], Finding]) -> Callable[[Any], Finding]:
    """A judgement that is not asked about what could not be seen."""

    def judged(fact: Any) -> Finding:
        if isinstance(fact, Unknown):
            return Finding("unknown", f"not known: {fact.why}")
        return judge(fact)

    return judged


# --- clock --------------------------------------------------------------------------------------


def year(fact: Clock) -> Finding:
    """Certificates, signatures and `why` need a date that can be true."""
    shown = time.gmtime(fact.wall_s)
    text = f"{shown.tm_year}-{shown.tm_mon:02}-{shown.tm_mday:02}"
    if YEAR_MIN <= shown.tm_year <= YEAR_MAX:
        return Finding("pass", f"says {text}")
    battery = "" if fact.battery else "; this board has no battery clock, so each start begins so"
    return Finding(
        "fail",
        f"says {text}, which cannot be: it was never set{battery}",
        "let it be set from the network (`timedatectl set-ntp true`) or by hand (`date --set`)",
    )


def synchronised(fact: Clock) -> Finding:
    """A clock that nobody corrects runs away by seconds a day."""
    if fact.synchronised is None:
        return Finding("unknown", "not known: neither systemd nor the kernel says")
    if fact.synchronised:
        return Finding("pass", "is kept right from outside")
    return Finding(
        "warn",
        "nobody keeps it right: no time daemon tells the kernel so",
        "`timedatectl set-ntp true`, or install systemd-timesyncd or chrony; without a network, "
        "a battery clock",
    )


# --- disk ---------------------------------------------------------------------------------------

_VOLATILE = {"tmpfs", "ramfs", "squashfs"}
# File systems that cannot replace a file in one step and then sync its directory.
_UNSAFE = {"vfat", "exfat", "msdos", "ntfs", "ntfs3", "fuseblk"}
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "sshfs", "fuse.sshfs"}


def room(fact: Space) -> Finding:
    """Models need space, and each file an inode."""
    free = f"{output.size(fact.free_bytes)} of {output.size(fact.size_bytes)} free"
    if fact.read_only:
        return Finding(
            "fail",
            f"{fact.path} is on a read-only file system",
            "mount it writable; a file system that turned read-only by itself is damaged (`dmesg`)",
        )
    if fact.files_free is not None and fact.files_free < FILES_FREE_MIN:
        return Finding(
            "fail",
            f"{fact.files_free} files can still be made on {fact.path} ({free})",
            "delete small files; the file system has no room for their names",
        )
    if fact.free_bytes < FREE_BYTES_MIN:
        return Finding(
            "fail",
            f"{free} on {fact.path}: nothing can be installed",
            "`edge-runtime gc` deletes old versions; store.byte_budget bounds them",
        )
    if fact.free_bytes < min(FREE_BYTES_LOW, FREE_SHARE_LOW * fact.size_bytes):
        return Finding("warn", f"{free} on {fact.path}", "`edge-runtime gc`, or a larger disk")
    return Finding("pass", f"{free} on {fact.path}")


def file_system(fact: Space) -> Finding:
    """Not every file system keeps what it was told to keep."""
    if not fact.kind:
        return Finding("unknown", "not known: a recorded tree cannot tell")
    if fact.kind in _VOLATILE:
        return Finding(
            "warn",
            f"{fact.path} is on {fact.kind}: what is installed is gone after a restart",
            "give another directory: `edge-runtime serve --state-dir DIR`",
        )
    if fact.kind in _UNSAFE | _REMOTE:
        why = "a power cut can damage it" if fact.kind in _UNSAFE else "it goes with the network"
        return Finding(
            "warn", f"{fact.path} is on {fact.kind}: {why}", "use a local ext4, f2fs, btrfs or xfs"
        )
    return Finding("pass", f"{fact.path} is on {fact.kind}")


def sync_time(fact: Sync) -> Finding:
    """How long it takes until a small file is safe."""
    seconds = fact.median_s
    shown = f"a small file in {fact.path} is safe after {output.duration(seconds)}"
    if seconds <= SYNC_S_SLOW:
        return Finding("pass", shown)
    remedy = "serving does not wait for it, but installs and switches do; a better card or eMMC"
    if seconds <= SYNC_S_BAD:
        return Finding("warn", f"{shown}: slow", remedy)
    return Finding("fail", f"{shown}: a worn card answers so", "replace it; " + remedy)


# --- limits -------------------------------------------------------------------------------------


def open_files(fact: Limits) -> Finding:
    """Each connection, model and shared region is a descriptor."""
    whose = "the daemon" if fact.of_daemon else "a daemon started here"
    soft, hard = (_limit(value) for value in (fact.files_soft, fact.files_hard))
    text = f"{whose} may open {soft} files" + (f" (at most {hard})" if hard != soft else "")
    if _less(fact.files_soft, FILES_SOFT_MIN) or _less(fact.files_hard, FILES_HARD_MIN):
        return Finding(
            "warn",
            f"{text}: too few for limits.connections_max and workers.open_files_max",
            "LimitNOFILE=8192 in the unit, or `ulimit -n 8192` before `edge-runtime serve`",
        )
    return Finding("pass", text)


def locked_memory(fact: Limits) -> Finding:
    """Drivers of some accelerators pin memory; serving itself does not."""
    shown = "any amount of" if fact.locked_bytes < 0 else output.size(fact.locked_bytes) + " of"
    return Finding(
        "pass",
        f"{shown} memory may be pinned; serving pins none, some GPU and NPU drivers do",
    )


def _limit(value: int) -> str:
    return "any number of" if value < 0 else str(value)


def _less(value: int, least: int) -> bool:
    return 0 <= value < least


# --- kernel -------------------------------------------------------------------------------------


def landlock(fact: Kernel) -> Finding:
    """What keeps a worker from other files."""
    if fact.landlock_abi is None:
        return Finding("unknown", "not known: a recorded tree cannot tell")
    if fact.landlock_abi > 0:
        return Finding("pass", f"version {fact.landlock_abi}: a worker opens its own files only")
    return Finding(
        "warn",
        f"this kernel ({fact.release}) has none: a model's library can read what the daemon can",
        f"{LANDLOCK_FROM} or newer with CONFIG_SECURITY_LANDLOCK and `lsm=landlock,...`",
    )


def seccomp(fact: Kernel) -> Finding:
    """What keeps a worker from the network and from other processes."""
    if not fact.seccomp:
        return Finding(
            "warn",
            "this kernel has no filter of calls: a model's library can use the network",
            "a kernel with CONFIG_SECCOMP_FILTER",
        )
    if fact.arch and fact.arch not in ("x86_64", "aarch64"):
        return Finding(
            "warn", f"the call numbers of {fact.arch} are not known to us: workers are not filtered"
        )
    return Finding("pass", "a worker has no network and starts nothing")


def sealed_memory(fact: Kernel) -> Finding:
    """How large tensors reach a worker without a copy."""
    if fact.memfd is None:
        return Finding("unknown", "not known: a recorded tree cannot tell")
    if fact.memfd:
        return Finding("pass", "memfd with seals: large tensors travel without a copy")
    return Finding(
        "fail", "this kernel gives no memory that can be sealed", "Linux 3.17 or newer (memfd)"
    )


def pressure(fact: Kernel) -> Finding:
    """What tells that memory or processor are short before they are out."""
    if fact.pressure:
        return Finding("pass", "pressure is reported (/proc/pressure)")
    return Finding(
        "warn",
        "the kernel reports no pressure: shortage is noticed when it is there",
        "`psi=1` on the kernel's command line (Raspberry Pi: /boot/firmware/cmdline.txt)",
    )


# --- memory -------------------------------------------------------------------------------------


def available(fact: Memory) -> Finding:
    """What models can have."""
    if not fact.total_bytes:
        return Finding("unknown", "not known: /proc/meminfo does not say")
    free, total = output.size(fact.available_bytes), output.size(fact.total_bytes)
    if fact.available_bytes < AVAILABLE_BYTES_MIN:
        return Finding(
            "warn",
            f"{free} of {total} available: one small model",
            "stop what is not needed; memory.budget_bytes bounds what models take",
        )
    return Finding("pass", f"{free} of {total} available")


def cgroup(fact: Memory) -> Finding:
    """A limit above us ends workers, not the machine."""
    if not fact.controller:
        return Finding(
            "warn",
            "the kernel does not count memory per group: MemoryMax and container limits do nothing",
            "Raspberry Pi: add `cgroup_enable=memory` to /boot/firmware/cmdline.txt and restart",
        )
    whose = "the daemon" if fact.of_daemon else "this session"
    if 0 < fact.limit_bytes < fact.total_bytes:
        limit, total = output.size(fact.limit_bytes), output.size(fact.total_bytes)
        return Finding("pass", f"the group of {whose} allows {limit} of {total}")
    return Finding("pass", f"no group above {whose} limits memory")


def oom_kills(fact: Memory) -> Finding:
    """What the kernel had to end."""
    if not fact.oom_kills:
        return Finding("pass", "nothing was ended for want of memory since the machine started")
    return Finding(
        "warn",
        f"{fact.oom_kills} processes were ended for want of memory since the machine started",
        "`dmesg | grep -i oom` names them; smaller models, or a smaller memory.budget_bytes",
    )


def swap(fact: tuple[Swap, ...]) -> Finding:
    """Swap on a card wears it out; zram does not."""
    if not fact:
        return Finding("pass", "none: a model that does not fit is refused or ended")
    text = ", ".join(f"{one.device} ({output.size(one.size_bytes)})" for one in fact)
    worn = [one for one in fact if "mmcblk" in one.device or one.kind == "file"]
    if worn:
        return Finding(
            "warn",
            f"{text}: swapping wears a card out and makes answers wait",
            "use zram (package zram-tools or systemd-zram-generator) and `swapoff` the card",
        )
    return Finding("pass", text)


# --- software -----------------------------------------------------------------------------------


def python(fact: Software) -> Finding:
    """Wheels are built for a processor, a C library and a Python."""
    text = f"Python {fact.python}, {fact.bits} bit, {fact.libc or 'no glibc'}"
    if fact.bits == 32 and fact.arch in ("aarch64", "x86_64"):
        return Finding(
            "fail",
            f"{text} on a 64-bit kernel: no backend has wheels for it",
            "install the 64-bit system",
        )
    if not fact.libc.startswith("glibc"):
        return Finding(
            "warn", f"{text}: most backends have wheels for glibc only", "use a glibc system"
        )
    return Finding("pass", text)


def packages(fact: Software) -> Finding:
    """Two packages with the same files: nobody knows which one is imported."""
    if not fact.doubles:
        return Finding("pass", "no package is there twice")
    return Finding(
        "warn",
        "in each other's way: " + "; ".join(fact.doubles),
        "pip uninstall all of them, then install the one that is wanted",
    )


# --- daemon -------------------------------------------------------------------------------------


def infer_socket(fact: Socket) -> Finding:
    """Whether applications get answers."""
    match fact.state:
        case "answers":
            return Finding("pass", f"answers in {output.duration(fact.answer_s)} ({fact.path})")
        case "absent":
            return Finding("skip", f"no daemon runs here: there is no {fact.path}")
        case "refused":
            return Finding(
                "fail",
                f"nobody listens behind {fact.path}: the daemon has ended",
                "`journalctl -u edge-runtime` says why; `systemctl restart edge-runtime`",
            )
        case "forbidden":
            return Finding(
                "fail",
                f"this user may not use {fact.path} (owner {fact.owner.user}, "
                f"group {fact.owner.group}, mode {fact.owner.mode})",
                f"sudo usermod -aG {fact.owner.group or 'edge-runtime'} $USER, and log in again; "
                "access.infer in the configuration can keep a user out too",
            )
    return Finding(
        "fail",
        f"no answer from {fact.path}: {fact.detail}",
        "`systemctl restart edge-runtime`, and report it with `journalctl -u edge-runtime`",
    )


def control_socket(fact: tuple[Socket, Daemon | None]) -> Finding:
    """Whether this user may change what serves."""
    socket, daemon = fact
    if socket.state == "forbidden":
        return Finding("skip", "is for root and the daemon's user, as it should be")
    if socket.state == "answers" and daemon:
        return Finding("pass", f"answers in {output.duration(socket.answer_s)} (pid {daemon.pid})")
    return infer_socket(socket)


_MODEL_STATES: dict[str, Verdict] = dict.fromkeys(("ready", "idle", "stopped"), "pass")
_MODEL_STATES["loading"] = "warn"  # minutes where a device compiles; any other state is a failure


def models(fact: tuple[Socket, Daemon | None]) -> Finding:
    """Whether everything that is installed serves."""
    socket, daemon = fact
    if daemon is None:
        if socket.state == "forbidden":
            return Finding("unknown", "not known: only root and the daemon's user may ask")
        return Finding("skip", "no daemon says")
    bad = [one for one in daemon.models if _MODEL_STATES.get(one[1]) != "pass"]
    if bad:
        text = "; ".join(": ".join(filter(None, (f"{n} is {s}", why))) for n, s, why in bad)
        loading = all(_MODEL_STATES.get(state) == "warn" for _, state, _ in bad)
        remedy = f"`edge-runtime why {bad[0][0]}` tells the story"
        return Finding("warn" if loading else "fail", text, remedy)
    if not daemon.models:
        return Finding("pass", "none is installed")
    ready = sum(state == "ready" for _, state, _ in daemon.models)
    return Finding("pass", f"{ready} of {len(daemon.models)} loaded, none in trouble")


# --- backends -----------------------------------------------------------------------------------

_CAUSES: dict[Cause, Verdict] = {
    "ok": "pass",
    "version_locked": "warn",
    "not_on_accelerator": "warn",  # some devices run only what was made for them
    "missing_package": "skip",
}


def backend(fact: Diagnosis) -> Finding:
    """A probe's diagnosis; what is not installed is not in trouble."""
    return Finding(_CAUSES.get(fact.cause, "fail"), fact.summary, fact.remedy)


def any_backend(facts: list[tuple[str, Diagnosis]]) -> Finding:
    """Without one that works there is nothing to serve with. The reference one is for tests."""
    working = [name for name, found in facts if found.works and name != "reference"]
    if working:
        return Finding("pass", "models can run on " + ", ".join(working))
    return Finding(
        "fail",
        "no backend works: no model can run",
        "pip install 'edge-runtime[onnxruntime]' (or openvino, litert)",
    )
