"""What a worker may not do: the filter read by an interpreter, and the real thing in a process."""

from __future__ import annotations

import errno
import json
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.serving import sandbox
from edge_runtime.serving.host import SETTLING_CALLS

ALLOW = 0x7FFF0000
EPERM = 0x00050000 | errno.EPERM
# AUDIT_ARCH_* of <linux/audit.h>
X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}
COLUMN = {"x86_64": 0, "aarch64": 1}
# What a worker lives on: (x86_64, aarch64).
NEEDED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "futex": (202, 98),
    "clone": (56, 220),
    "clone3": (435, 435),
    "recvmsg": (47, 212),
    "sendmsg": (46, 211),
    "epoll_pwait": (281, 22),
    "memfd_create": (319, 279),
    "exit_group": (231, 94),
    "openat": (257, 56),  # landlock decides which
}


PID = 4711  # of the process that installs the filter


def run_filter(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """Interpret a classic BPF program as seccomp does (Documentation/userspace-api/seccomp_filter).

    Returns its verdict. Raises for an instruction it does not know or a jump out of the program:
    the kernel would refuse such a filter.
    """
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    for _ in range(4096):
        code, if_true, if_false, k = steps[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            assert k % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += if_true if accumulator == k else if_false
        elif code == 0x35:  # BPF_JMP | BPF_JGE | BPF_K
            at += if_true if accumulator >= k else if_false
        elif code == 0x06:  # BPF_RET | BPF_K
            return int(k)
        else:
            raise AssertionError(f"unknown instruction {code:#x}")
    raise AssertionError("the program does not end")


def program(machine: str) -> bytes:
    found = sandbox.filter_program(machine, PID)
    assert found is not None and len(found) % 8 == 0
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_denied_calls_answer_eperm_and_needed_ones_are_let_through(machine: str) -> None:
    code, arch, column = program(machine), MACHINES[machine], COLUMN[machine]
    for name, numbers in sandbox.DENIED_CALLS.items():
        if numbers[column] is not None:
            assert run_filter(code, arch, numbers[column]) == EPERM, name
    for name, needed in NEEDED.items():
        assert run_filter(code, arch, needed[column]) == ALLOW, name


@pytest.mark.parametrize("machine", MACHINES)
@given(number=st.integers(0, 0x3FFFFFFF))
def test_exactly_the_denied_numbers_are_refused(machine: str, number: int) -> None:
    column = COLUMN[machine]
    denied = number in {numbers[column] for numbers in sandbox.DENIED_CALLS.values()}
    assert run_filter(program(machine), MACHINES[machine], number) == (EPERM if denied else ALLOW)


@pytest.mark.parametrize("machine", MACHINES)
@given(other=st.integers(0, 0xFFFFFFFF), high=st.integers(0, 0xFFFFFFFF))
def test_signals_and_limits_reach_no_process_but_its_own(
    machine: str, other: int, high: int
) -> None:
    code, arch, column = program(machine), MACHINES[machine], COLUMN[machine]
    for name, numbers in sandbox.OWN_PROCESS_CALLS.items():
        for pid in (0, PID):
            assert run_filter(code, arch, numbers[column], pid) == ALLOW, name
        verdict = ALLOW if other in (0, PID) else EPERM
        assert run_filter(code, arch, numbers[column], high << 32 | other) == verdict, name


@pytest.mark.parametrize("machine", MACHINES)
@given(operation=st.integers(0, 0xFFFFFFFF))
def test_a_descriptor_cannot_be_made_to_signal_another_process(
    machine: str, operation: int
) -> None:
    code, arch, column = program(machine), MACHINES[machine], COLUMN[machine]
    for name, (numbers, operations) in sandbox.DENIED_OPERATIONS.items():
        for refused in operations:
            assert run_filter(code, arch, numbers[column], 7, refused) == EPERM, name
        verdict = EPERM if operation in operations else ALLOW
        assert run_filter(code, arch, numbers[column], 7, operation) == verdict, name


@pytest.mark.parametrize("machine", MACHINES)
@given(number=st.integers(0, 0xFFFFFFFF))
def test_calls_of_any_other_architecture_are_refused(machine: str, number: int) -> None:
    for arch in {X86_64, I386, AARCH64, ARM, 0} - {MACHINES[machine]}:
        assert run_filter(program(machine), arch, number) == EPERM


@given(number=st.integers(0x40000000, 0xFFFFFFFF))
def test_x32_calls_are_refused(number: int) -> None:
    assert run_filter(program("x86_64"), X86_64, number) == EPERM


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert sandbox.filter_program("riscv64", PID) is None


@pytest.mark.parametrize("machine", MACHINES)
def test_what_a_host_leaves_to_its_workers_is_all_that_it_allows(machine: str) -> None:
    column = COLUMN[machine]
    left = sandbox.filter_program(machine, PID, SETTLING_CALLS)
    assert left is not None
    for name, numbers in sandbox.DENIED_CALLS.items():
        if numbers[column] is not None:
            verdict = run_filter(left, MACHINES[machine], numbers[column])
            assert verdict == (ALLOW if name in SETTLING_CALLS else EPERM), name


def test_no_number_stands_twice() -> None:
    for column in (0, 1):
        numbers = [n[column] for n in sandbox.DENIED_CALLS.values() if n[column] is not None]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0),
        ("/usr/include/asm-generic/unistd.h", 1),  # what aarch64 uses
    ],
)
def test_the_numbers_are_those_of_the_kernels_headers(header: str, column: int) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed (linux-libc-dev)")
    text = Path(header).read_text()
    known = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    wanted = {**sandbox.DENIED_CALLS, **sandbox.OWN_PROCESS_CALLS, **NEEDED}
    wanted |= {name: numbers for name, (numbers, _) in sandbox.DENIED_OPERATIONS.items()}
    for name, numbers in wanted.items():
        if name in known:
            assert numbers[column] == known[name], name
    assert len(wanted.keys() & known.keys()) > 40


# --- the real thing -------------------------------------------------------------------------------

# /dev/full takes any write with ENOSPC, and knows no ioctl: ENOTTY.
DEVICES = """
import errno, fcntl, os, sys
from pathlib import Path
from edge_runtime.serving import sandbox

sandbox.apply([], map(Path, sys.argv[1:]))
for node in ("/dev/full", "/dev/random"):
    try:
        fd = os.open(node, os.O_RDWR)
    except OSError as error:
        print(errno.errorcode[error.errno])
        continue
    try:
        fcntl.ioctl(fd, 0x5401)
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize(
    ("devices", "says"), [(["/dev/full"], ["ENOTTY", "EACCES"]), ([], ["EACCES", "EACCES"])]
)
def test_only_the_accelerators_own_node_can_be_used(devices: list[str], says: list[str]):
    if not sandbox.landlock_abi():
        pytest.skip("this kernel has no landlock")
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, *devices], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split() == says, done.stderr


# A host and two of its workers: each opens both files, and tries to place and rank itself again.
HOST = """
import os, sys, threading
from pathlib import Path
from edge_runtime.serving import sandbox
from edge_runtime.serving.host import SETTLING_CALLS

directory = Path(sys.argv[1])
sandbox.apply([directory], allowed=SETTLING_CALLS)

def tried(act, *arguments):
    try:
        act(*arguments)
        return "yes"
    except OSError:
        return "no"

def opens():
    return [tried(open, directory / name) for name in ("a", "b", "../outside")]

def worker(name):
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.nice(1)
    sandbox.apply([directory / name])
    print(*opens(), tried(os.sched_setaffinity, 0, [0]), tried(os.nice, 1))

for name in "ab":
    thread = threading.Thread(target=worker, args=(name,))
    thread.start()
    thread.join()
print(*opens())
"""


def test_each_worker_of_a_host_reads_its_own_files_only(tmp_path: Path) -> None:
    if not sandbox.landlock_abi():
        pytest.skip("this kernel has no landlock")
    directory = tmp_path / "blobs"
    directory.mkdir()
    for path in (directory / "a", directory / "b", tmp_path / "outside"):
        path.touch()
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(directory)], capture_output=True, text=True, timeout=30
    )
    lines = done.stdout.splitlines()
    assert lines == ["yes no no no no", "no yes no no no", "yes yes no"], done.stderr


PROBE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, sys, threading
from pathlib import Path
from edge_runtime.serving import sandbox

mine, other, out = map(Path, sys.argv[1:4])
parent = os.getppid()
measures = sandbox.apply([mine])
tries = {
    "socket": lambda: socket.socket(),
    "inet": lambda: socket.socket(socket.AF_INET),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(parent, 0),
    "tgkill": lambda: libc("tgkill", parent, parent, 0),
    "prlimit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1000, 1000)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
    "owner": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
    "ioctl owner": lambda: fcntl.ioctl(socket.socketpair()[0], 0x8901, struct.pack("i", parent)),
    "own limit": lambda: resource.prlimit(0, resource.RLIMIT_CPU),
    "own tgkill": lambda: libc("tgkill", os.getpid(), threading.get_native_id(), 0),
    "pidfd": lambda: os.pidfd_open(parent),
    "unshare": lambda: libc("unshare", 0x10000000),
    "ptrace": lambda: libc("ptrace", 0, 0, 0, 0),
    "chroot": lambda: os.chroot("/"),
    "read mine": lambda: mine.read_bytes(),
    "write mine": lambda: mine.write_bytes(b"x"),
    "read other": lambda: other.read_bytes(),
    "create": lambda: out.write_bytes(b"x"),
    "remove": lambda: mine.unlink(),
    "list home": lambda: list(Path("/home").iterdir()),
    "read library": lambda: Path(os.__file__).read_bytes(),
    "read meminfo": lambda: Path("/proc/meminfo").read_bytes(),
    "memfd": lambda: os.close(os.memfd_create("x")),
    "pair": lambda: socket.socketpair(),
    "thread": lambda: threads(),
}

def libc(name, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def threads():
    seen = []
    def inside():
        try:
            socket.socket()
        except PermissionError:
            seen.append(True)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen, "a later thread is not confined"

found = {}
for name, act in tries.items():
    try:
        act()
        found[name] = ""
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(("NoNewPrivs", "Seccomp:")):
        found[line.split(":")[0]] = line.split()[1]
print(json.dumps([measures, found]))
"""


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """What a sandboxed process says that it could do."""
    directory = tmp_path_factory.mktemp("sandbox")
    (directory / "mine").write_bytes(b"weights")
    (directory / "other").write_bytes(b"secret")
    names = [str(directory / name) for name in ("mine", "other", "out")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE), *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measures, found = json.loads(done.stdout)
    assert (directory / "mine").read_bytes() == b"weights"
    assert not (directory / "out").exists() or "no landlock" in " ".join(measures)
    return measures, found


def test_a_confined_process_may_still_do_what_a_worker_needs(
    confined: tuple[list[str], dict[str, str]],
) -> None:
    _, found = confined
    allowed = ["read mine", "read library", "read meminfo", "memfd", "pair", "thread"]
    allowed += ["own limit", "own tgkill"]
    assert {name: found[name] for name in allowed} == dict.fromkeys(allowed, "")
    assert found["NoNewPrivs"] == "1"


def test_a_confined_process_has_no_network_no_programs_and_no_other_processes(
    confined: tuple[list[str], dict[str, str]],
) -> None:
    measures, found = confined
    if not any(measure.startswith("seccomp") for measure in measures):
        pytest.skip(f"this kernel has no seccomp filters: {measures}")
    refused = ["socket", "inet", "execve", "kill", "pidfd", "unshare", "ptrace", "chroot"]
    refused += ["tgkill", "prlimit", "priority", "owner", "ioctl owner"]
    assert {name: found[name] for name in refused} == dict.fromkeys(refused, "EPERM")
    assert found["Seccomp"] == "2"


def test_a_confined_process_reads_its_model_and_writes_nothing(
    confined: tuple[list[str], dict[str, str]],
) -> None:
    measures, found = confined
    if not any(measure.startswith("landlock") for measure in measures):
        pytest.skip(f"this kernel has no landlock: {measures}")
    refused = ["write mine", "read other", "create", "remove", "list home"]
    assert {name: found[name] for name in refused} == dict.fromkeys(refused, "EACCES")


LIMITS = """
import resource
from edge_runtime.serving import sandbox
sandbox.set_limits(64 * 1024 * 1024, 100)
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)
kept = bytearray(32 * 1024 * 1024)
try:
    more = bytearray(64 * 1024 * 1024)
except MemoryError:
    print("refused")
"""


def test_memory_over_its_limit_is_an_error_inside_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
