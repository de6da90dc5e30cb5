"""What a worker gives up before it loads foreign code.

Law of this file: the door to prctl, seccomp, landlock and rlimits, by ctypes alone. Each measure is
applied where the kernel has it and named in the list that `apply` returns, so that `ps` and `why`
can say what really protects; a measure that the kernel lacks is named with a leading "no ".

Sources: landlock(7) and seccomp(2) of the Linux man-pages; include/uapi/linux/{landlock,seccomp,
filter,audit}.h for the numbers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

_RET_ALLOW = 0x7FFF0000
_RET_ERRNO_EPERM = 0x00050001
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06
_FIRST_ARGUMENT = 16  # offset of args[0] in struct seccomp_data; both machines are little-endian

# Calls that a worker never needs after its library is imported: no network, no other program, no
# other process, no kernel doors. (x86_64 number, aarch64 number); None: the architecture has no
# such call.
DENIED_CALLS: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # Where a worker runs is the configuration's business and the governor's. OpenVINO sets its
    # threads' cores anew at each run, to all of the machine's, and gets on without.
    "sched_setaffinity": (203, 122),
}
# Calls that a worker needs for itself, and that reach the daemon and every other worker too, for
# all run as one user: the first argument must be 0 or the worker's own process id. (A CPU limit
# set on the daemon would be its end.)
OWN_PROCESS_CALLS: dict[str, tuple[int, int]] = {"tgkill": (234, 131), "prlimit64": (302, 261)}
# The same by a detour: who is sent the signal of a descriptor, and which one. Refused when the
# second argument is one of these.
DENIED_OPERATIONS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "fcntl": ((72, 25), (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
}
_AUDIT_ARCH = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32_BIT = 0x40000000  # x86_64 processes may also call by the x32 numbers: all refused

_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_FS_EXECUTE = 1 << 0
_FS_WRITE_FILE = 1 << 1
_FS_READ_FILE = 1 << 2
_FS_READ_DIR = 1 << 3
_FS_IOCTL_DEVICE = 1 << 15  # from ABI 5 on; before it, an open device takes any ioctl
# How many file-system rights each landlock ABI knows (bits from 0).
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


class SandboxError(OSError):
    """A measure that the kernel has could not be applied."""


def _prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> None:
    arguments = [ctypes.c_ulong(value) for value in (a, b, c, d)]
    if _libc.prctl(option, *arguments) != 0:
        code = ctypes.get_errno()
        raise SandboxError(code, f"prctl({option}): {os.strerror(code)}")


def set_name(name: str) -> None:
    """The process name in `ps` and `top` (15 bytes)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(PR_SET_NAME, buffer, 0, 0, 0)


def become_subreaper() -> None:
    """Orphaned descendants become this process's children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int) -> None:
    """This process gets the signal when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, signal_number)


def no_new_privileges() -> None:
    """No set-user-id, no file capabilities; also the precondition of the other two measures."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_limits(memory_bytes_max: int, open_files_max: int) -> None:
    """Resource limits of this process.

    `memory_bytes_max` (0: none) is on top of what the process has now and counts private writable
    memory (RLIMIT_DATA): an allocation over it fails in the worker, which then reports it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = open_files_max if hard == resource.RLIM_INFINITY else min(open_files_max, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    if memory_bytes_max:
        limit = _data_bytes() + memory_bytes_max
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def filter_program(machine: str, pid: int, allowed: Collection[str] = ()) -> bytes | None:
    """The seccomp program (struct sock_filter[]) for a machine and the process that will install
    it, or None where the machine's numbers are not known.

    `allowed`: names of DENIED_CALLS that are not refused.

    Refused calls answer EPERM rather than kill: a library that merely tries gets an error it can
    report.
    """
    if machine not in _AUDIT_ARCH:
        return None
    arch, column = _AUDIT_ARCH[machine]
    denied = [pair[column] for name, pair in DENIED_CALLS.items() if name not in allowed]
    numbers = [number for number in denied if number is not None]
    checks = [(_JUMP_EQUAL, number) for number in numbers]
    if machine == "x86_64":
        checks.insert(0, (_JUMP_AT_LEAST, _X32_BIT))
    by_argument = _argument_checks(column, pid)
    program = [
        (_LOAD_WORD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 0, len(by_argument) + len(checks) + 2, arch),  # another one's calls: refused
        (_LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        *by_argument,
    ]
    for index, (code, number) in enumerate(checks):
        program.append((code, len(checks) - index, 0, number))
    program += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_ERRNO_EPERM)]
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def _argument_checks(column: int, pid: int) -> list[tuple[int, int, int, int]]:
    """Steps for the calls that are judged by an argument: each of them ends in a verdict.

    Low words of arguments suffice: the kernel takes process ids and operations as 32 bits.
    """
    steps: list[tuple[int, int, int, int]] = []
    for pair in OWN_PROCESS_CALLS.values():
        steps += [
            (_JUMP_EQUAL, 0, 5, pair[column]),
            (_LOAD_WORD, 0, 0, _FIRST_ARGUMENT),
            (_JUMP_EQUAL, 1, 0, 0),
            (_JUMP_EQUAL, 0, 1, pid),
            (_RETURN, 0, 0, _RET_ALLOW),
            (_RETURN, 0, 0, _RET_ERRNO_EPERM),
        ]
    for pair, operations in DENIED_OPERATIONS.values():
        count = len(operations)
        steps += [(_JUMP_EQUAL, 0, count + 3, pair[column])]
        steps += [(_LOAD_WORD, 0, 0, _FIRST_ARGUMENT + 8)]
        steps += [(_JUMP_EQUAL, count - at, 0, value) for at, value in enumerate(operations)]
        steps += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_ERRNO_EPERM)]
    return steps


def deny_calls(allowed: Collection[str] = ()) -> str:
    """Install the filter for this thread and all it will start; returns what it did."""
    program = filter_program(platform.machine(), os.getpid(), allowed)
    if program is None:
        return f"no seccomp ({platform.machine()})"
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog {unsigned short len; struct sock_filter *filter;}: pointer-aligned
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    try:
        _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(holder))
    except SandboxError as error:
        return f"no seccomp ({error.strerror})"
    refused = len(DENIED_CALLS) + len(OWN_PROCESS_CALLS) + len(DENIED_OPERATIONS) - len(allowed)
    return f"seccomp ({refused} calls)"


def landlock_abi() -> int:
    """The version of landlock that this kernel has; 0: none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)))


def restrict_files(readable: Iterable[Path], devices: Iterable[Path] = ()) -> str:
    """Only these files, or directories with all beneath, can be opened: `readable` for reading,
    `devices` for writing and ioctl too.
    """
    abi = landlock_abi()
    if abi < 1:
        return "no landlock"
    handled_fs = (1 << _FS_BITS.get(abi, 16)) - 1
    handled_net = 3 if abi >= 4 else 0  # bind and connect TCP: no rule allows any
    scoped = 3 if abi >= 6 else 0  # abstract unix sockets and signals of others
    attributes = struct.pack("<QQQ", handled_fs, handled_net, scoped)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    buffer = ctypes.create_string_buffer(attributes, 24)
    ruleset = _libc.syscall(_LANDLOCK_CREATE_RULESET, buffer, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return f"no landlock ({os.strerror(ctypes.get_errno())})"
    try:
        for path in readable:
            _allow(ruleset, path, _FS_READ_FILE | _FS_EXECUTE)
        for path in devices:
            _allow(ruleset, path, (_FS_READ_FILE | _FS_WRITE_FILE | _FS_IOCTL_DEVICE) & handled_fs)
        if _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            return f"no landlock ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(ruleset)
    return f"landlock (ABI {abi})"


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine: nothing to allow
    try:
        if path.is_dir():
            rights |= _FS_READ_DIR
        rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, fd), 12)
        _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def system_paths() -> list[Path]:
    """What any library may read: programs, libraries, and what the kernel says of the processor."""
    names = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/opt"]
    names += ["/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/sys", "/sys/devices/system"]
    names += ["/sys/fs/cgroup", "/dev/null", "/dev/zero", "/dev/urandom"]
    names += [sys.prefix, sys.base_prefix, *sys.path]
    here = Path(__file__).resolve().parents[1]
    return [Path(name) for name in dict.fromkeys(names) if name] + [here]


def driver_paths() -> list[Path]:
    """What an accelerator's library reads besides: how it finds its device."""
    return [Path(name) for name in ("/sys/class", "/sys/bus", "/sys/dev", "/sys/devices")]


def apply(
    readable: Iterable[Path], devices: Iterable[Path] = (), allowed: Collection[str] = ()
) -> list[str]:
    """All measures, for this thread and all it starts. Applied again by a thread, they add up.

    Args:
        readable: files beside `system_paths()`.
        devices: nodes of the accelerator that the model runs on; with one, `driver_paths()` too.
        allowed: names of DENIED_CALLS that threads to come need before they apply all measures.
    """
    no_new_privileges()
    nodes = [*devices]
    paths = [*system_paths(), *readable, *(driver_paths() if nodes else ())]
    measures = ["no-new-privileges", restrict_files(paths, nodes), deny_calls(allowed)]
    return [*measures, *(f"may use {node}" for node in nodes)]
