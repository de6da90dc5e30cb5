"""What a worker cannot do, and what it is given."""

from __future__ import annotations

import errno
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import EdgeError
from tests.daemon.odd.odd_burglar import WIDTH, attempts
from tests.daemon.world import Daemon, filled, infer_frame, running, until

MIB = 1 << 20
# What an attempt that needs no right of root and harms nobody must manage without the sandbox.
HARMLESS = ("write a file", "unlink", "unix socket", "execute", "kill the daemon")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    config = {
        "models": {
            "loose": {"sandbox": False},
            "placed": {
                "cpuset": "0",
                "nice": 7,
                "open_files_max": 128,
                "memory_bytes_max": 512 * MIB,
            },
            "crowded": {"open_files_max": 64},
        }
    }
    with running(config, odd_backends=True) as started:
        yield started


def break_out(daemon: Daemon, name: str, den: Path, leave: tuple[str, ...] = ()) -> dict[str, int]:
    """What each attempt gave: 0 it worked, or an errno."""
    daemon.add("victim")
    den.chmod(0o777)
    blob = next(p for p in (daemon.state_dir / "blobs").rglob("*") if p.is_file())
    ours = [str(blob), str(daemon.root / "config.yaml"), f"/proc/{daemon.pid}/environ"]
    options = {
        "files": ["/etc/passwd", *ours],
        "write": str(den),
        "pid": daemon.pid,
        "leave": list(leave),
    }
    daemon.add(name, backend="burglar", width=WIDTH, options=options)
    (den / "keep").touch()  # after the warm-up, which tries everything, too
    with daemon.client() as client:
        codes = client.infer(name, {"x": filled(1, width=WIDTH)})["y"][0]
    names = [one for one, _ in attempts(options)]
    return dict(zip(names, codes.astype(int).tolist(), strict=False))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the burglar knows x86_64's numbers")
def test_a_worker_cannot_get_out(daemon, tmp_path):
    found = break_out(daemon, "burglar", tmp_path)
    worker = daemon.worker("burglar")
    print(worker["sandbox"], found)
    measures = " ".join(worker["sandbox"])
    has_landlock = "no landlock" not in measures
    for what, code in found.items():
        is_file = what.startswith(("read", "list", "write", "make", "unlink"))
        if is_file and not has_landlock:
            continue  # this kernel has no landlock; `ps` says so, which is checked below
        assert code in (errno.EPERM, errno.EACCES), (what, code)
    assert len(found) == 18
    assert "seccomp (" in measures and ("landlock (ABI" in measures or "no landlock" in measures)
    assert daemon.process.poll() is None


def test_without_the_sandbox_the_same_attempts_succeed_so_the_test_can_fail(daemon, tmp_path):
    # They would stop the daemon, or slow it down.
    leave = ("trace the daemon", "queue a signal", "pin the daemon to a core")
    found = break_out(daemon, "loose", tmp_path, leave)
    assert daemon.worker("loose")["sandbox"] == ["off by configuration"]
    assert {what: found[what] for what in HARMLESS} == dict.fromkeys(HARMLESS, 0)


def test_a_worker_has_the_cores_niceness_and_limits_of_its_configuration(daemon):
    daemon.add("placed")
    pid = daemon.worker("placed")["pid"]
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["Cpus_allowed_list"] == "0"
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    nice = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])
    assert nice == 7 + os.nice(0)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (128, 128)
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
    data, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
    assert data == hard and 512 * MIB < data < 1024 * MIB
    assert status["Name"] == "edge:placed"


def test_a_worker_inherits_no_descriptor_of_the_daemon_or_its_template(daemon):
    daemon.add("victim")
    daemon.add("alone", 1)
    daemon.add("alone", 2, scale=3.0)
    pid = daemon.worker("alone")["pid"]
    links = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    beyond = {fd: link for fd, link in links.items() if fd > 2}
    sockets = [link for link in beyond.values() if link.startswith("socket:")]
    assert len(sockets) == 1  # its channel
    assert not [link for link in beyond.values() if str(daemon.root) in link]
    kinds = {link.split(":")[0] for link in beyond.values()}
    assert kinds <= {"socket", "anon_inode", "/memfd"}, beyond


def test_a_worker_inherits_nothing_that_the_daemon_was_started_with(make_daemon):
    daemon = make_daemon()
    daemon.start(prefix=["sh", "-c", 'exec 9</etc/hostname; exec "$@"', "sh"])
    daemon.add("alone")

    def holds(pid: int) -> bool:
        links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        return "/etc/hostname" in links

    assert holds(daemon.pid)  # the test can fail
    assert not holds(daemon.control("ps")["templates"][0]["pid"])
    assert not holds(daemon.worker("alone")["pid"])


def test_more_connections_than_a_worker_may_open_cost_connections_and_not_the_worker(daemon):
    daemon.add("crowded")
    pid = daemon.worker("crowded")["pid"]
    raws = [daemon.raw() for _ in range(90)]
    try:
        for number, raw in enumerate(raws):
            raw.send(infer_frame("crowded", request_id=number))
        served = 0
        for raw in raws:
            try:
                served += raw.value()[1] == 7.0
            except (ConnectionError, EdgeError):
                continue
        print(f"{served} of {len(raws)} connections served with 64 descriptors")
        assert 30 < served < 64
    finally:
        for raw in raws:
            raw.sock.close()
    assert daemon.infer("crowded") == 7.0
    assert daemon.worker("crowded")["pid"] == pid
    until(lambda: daemon.worker("crowded")["connections"] == 0)


def test_regions_beyond_what_a_worker_may_open_are_refused_and_the_tensor_travels(daemon):
    daemon.add("crowded")
    pid = daemon.worker("crowded")["pid"]
    clients = [daemon.client() for _ in range(30)]
    try:
        for client in clients:
            assert client.infer("crowded", {"x": filled(3)})["y"][0, 0] == 7.0
        x = np.full((5000, 16), 3, np.float32)
        for client in clients:  # and a region each: 60 descriptors where some 50 are left
            assert (client.infer("crowded", {"x": x})["y"] == 7.0).all()
    finally:
        for client in clients:
            client.close()
    assert daemon.worker("crowded")["pid"] == pid


def test_models_of_the_same_backend_run_in_processes_of_their_own(daemon):
    daemon.add("victim")
    daemon.add("other")
    one, other = daemon.worker("victim"), daemon.worker("other")
    assert one["pid"] != other["pid"]
    parents = [
        int(Path(f"/proc/{w['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        for w in (one, other)
    ]
    assert parents == [daemon.pid, daemon.pid]
