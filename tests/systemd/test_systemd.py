"""The four interfaces to systemd against sockets of our own; the real one is in test_booted.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import systemd
from edge_runtime.errors import UsageError


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_gets_the_state(tmp_path: Path, abstract: bool) -> None:
    name = f"@edge-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if abstract else name)
        manager.settimeout(5)
        assert systemd.notify("READY=1\nSTATUS=serving", {"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1\nSTATUS=serving"


@pytest.mark.parametrize(
    "socket_name", [None, "", "relative", "/nowhere/notify", "@nobody-listens"]
)
def test_no_manager_is_no_error(socket_name: str | None) -> None:
    environ = {} if socket_name is None else {"NOTIFY_SOCKET": socket_name}
    assert systemd.notify("READY=1", environ) is False


def test_a_manager_that_does_not_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "NOTIFY_TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path := str(tmp_path / "notify"))
        sent = (systemd.notify("WATCHDOG=1", {"NOTIFY_SOCKET": path}) for _ in range(2000))
        assert next(sent) and not all(sent)


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "7"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_PID": "7"}, None),
    ],
)
def test_the_watchdog_is_due_at_half_its_time(
    environ: dict[str, str], interval_s: float | None
) -> None:
    assert systemd.watchdog_interval_s(environ, 7) == interval_s


@pytest.mark.parametrize("wrong", ["", "x", "-5", "1.5", "²"])
def test_a_wrong_number_names_its_variable(wrong: str) -> None:
    with pytest.raises(UsageError, match="WATCHDOG_USEC"):
        systemd.watchdog_interval_s({"WATCHDOG_USEC": wrong}, 7)


def passed(names: str, count: int, pid: int = 7) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "X": "1"}


@pytest.mark.parametrize("environ", [{}, passed("infer", 1, pid=8)])
def test_sockets_of_another_process_are_not_ours(environ: dict[str, str]) -> None:
    assert systemd.listen_sockets(environ, 7) == {}


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        (passed("infer", 2), "2 sockets but 1 names"),
        (passed("a:b", 65), "at most 64"),
        (passed("infer", 1) | {"LISTEN_FDS": "one"}, "LISTEN_FDS: 'one' is not a number"),
    ],
)
def test_a_malformed_environment_is_refused(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        systemd.listen_sockets(environ, 7)


CHILD = """
import os, socket, sys
from edge_runtime import systemd
kinds, names = sys.argv[1].split(","), sys.argv[2]
made = []
for kind in kinds:
    family, type = {"inet": (socket.AF_INET, socket.SOCK_STREAM),
                    "datagram": (socket.AF_UNIX, socket.SOCK_DGRAM)}.get(
        kind, (socket.AF_UNIX, socket.SOCK_STREAM))
    s = socket.socket(family, type)
    if kind in ("inet", "unix"):
        s.bind(("127.0.0.1", 0) if kind == "inet" else f"\\0edge-{os.getpid()}-{len(made)}")
        s.listen()
    if kind == "file":
        s.close()
    made.append(os.open("/dev/null", os.O_RDONLY) if kind == "file" else s.detach())
assert made == list(range(3, 3 + len(made))), made
environ = {"LISTEN_PID": "7", "LISTEN_FDS": str(len(made)), "LISTEN_FDNAMES": names, "X": "1"}
[os.set_inheritable(number, True) for number in made]
found = systemd.listen_sockets(environ, 7)
print(list(found), [s.fileno() for s in found.values()], environ,
      any(os.get_inheritable(s.fileno()) for s in found.values()))
"""


def activated(kinds: str, names: str) -> subprocess.CompletedProcess[str]:
    """listen_sockets in a process of its own, whose descriptors from 3 on are those named."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, kinds, names], capture_output=True, text=True, timeout=20
    )


def test_passed_sockets_come_by_name_private_and_once() -> None:
    result = activated("unix,unix", "infer:control")
    assert result.stdout == "['infer', 'control'] [3, 4] {'X': '1'} False\n", result.stderr


@pytest.mark.parametrize(
    ("kinds", "names", "complaint"),
    [
        ("unix,inet", "infer:control", "socket 'control': it is AF_INET SOCK_STREAM"),
        ("datagram", "infer", "AF_UNIX SOCK_DGRAM, not listening"),
        ("idle", "infer", "it is AF_UNIX SOCK_STREAM, not listening"),
        ("file", "infer", "is not a socket"),
        ("unix,unix", "infer:infer", "two sockets are named 'infer'"),
    ],
)
def test_a_wrong_socket_is_refused_by_name(kinds: str, names: str, complaint: str) -> None:
    assert complaint in activated(kinds, names).stderr
