"""`edge-runtime doctor` on this machine, on recorded ones, beside daemons, and as other users."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.backends.probing import probe
from edge_runtime.cli import main
from edge_runtime.cli.health import Unknown, examination, facts
from edge_runtime.cli.health.facts import World
from tests.daemon.world import Daemon, running, until
from tests.profiles.boards import BOARDS, CORE_ULTRA, ROCK_5B, lay_out

NOBODY = 65534


def report(checks: list[Any]) -> dict[str, Any]:
    return {f"{check.group}/{check.name}": check for check in checks}


def as_nobody(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The lines that `look` finds in a child process of another user.

    A fork and not a program: where Python lies in a home directory, others cannot start it; nor can
    they import, so it is done once before.
    """
    look()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write_fd, msgspec.json.encode(look()))
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return dict(json.loads(answer))


def examined(root: Path, run_dir: Path | None = None) -> dict[str, Any]:
    world = World(root, Path("/var/lib/edge-runtime"), run_dir or Path("/run/edge-runtime"))
    return report(examination.examine(world))


def doctor(*words: str, **more: Any) -> tuple[int, dict[str, Any]]:
    """The command as users run it: its exit code and its lines by name."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "doctor", "--json", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )
    assert "Traceback" not in done.stderr, done.stderr
    answer = json.loads(done.stdout)
    return done.returncode, {f"{one['group']}/{one['name']}": one for one in answer["checks"]}


# --- this machine ---------------------------------------------------------------------------------


def test_this_machine_is_examined_in_five_seconds(tmp_path: Path) -> None:
    began_s = time.monotonic()
    code, lines = doctor("--state-dir", str(tmp_path), "--run-dir", str(tmp_path / "none"))
    took_s = time.monotonic() - began_s
    print(f"doctor took {took_s:.1f} s")
    assert took_s < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert {line["group"] for line in lines.values()} == set(examination.GROUPS)
    verdicts = {line["verdict"] for line in lines.values()}
    assert code == (2 if "fail" in verdicts else 1 if "warn" in verdicts else 0)
    assert not [line for line in lines.values() if "looking failed" in line["summary"]]
    assert lines["backends/any"]["verdict"] == "pass"
    assert lines["backends/onnxruntime"]["verdict"] == "pass"
    assert lines["disk/sync"]["verdict"] in ("pass", "warn"), lines["disk/sync"]
    assert list(tmp_path.iterdir()) == []  # nothing is left of it
    assert lines["kernel/shared memory"]["verdict"] == "pass"
    assert lines["daemon/infer socket"]["verdict"] == "skip"


def test_the_report_is_coloured_on_a_terminal_only(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edge_runtime", "doctor", "--root", str(tmp_path)]
    piped = subprocess.run(words, capture_output=True, timeout=60, check=False).stdout
    assert b"\x1b" not in piped and b"profile" in piped
    controller, terminal = pty.openpty()
    try:
        process = subprocess.Popen(words, stdout=terminal)
        shown = b""
        while b"not known (" not in shown:
            shown += os.read(controller, 4096)
        process.wait(30)
    finally:
        os.close(controller)
        os.close(terminal)
    assert b"\x1b[" in shown


# --- recorded machines ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOARDS)
def test_a_recorded_board_is_examined_without_trouble(name: str, tmp_path: Path) -> None:
    lines = examined(lay_out(BOARDS[name], tmp_path))
    assert not [line for line in lines.values() if "looking failed" in line.summary]
    assert lines["backends/any"].verdict == "unknown"
    assert lines["kernel/landlock"].verdict == "unknown"


def test_an_empty_tree_is_a_machine_of_which_nothing_is_known(tmp_path: Path) -> None:
    lines = examined(tmp_path)
    assert not [line for line in lines.values() if "looking failed" in line.summary]
    assert lines["memory/available"].verdict == "unknown"
    assert "No such file" in lines["memory/available"].summary
    assert {line.verdict for line in lines.values()} <= {"unknown", "skip", "pass", "warn"}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(
            ["meminfo", "swaps", "self/limits", "self/cgroup", "vmstat", "cpuinfo", "mounts"]
        ),
        st.text(max_size=200)
        | st.sampled_from(["MemTotal:", "Max open files a b", "x 1\ny", "a:"]),
    )
)
def test_nonsense_in_proc_is_not_known_or_believed_but_never_a_crash(
    files: dict[str, str],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name, text in files.items():
            path = root / "proc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, errors="replace")
        for row in examination.LOOKS:
            fact = row.look(World(root, Path("/state"), Path("/run")))
            for name, judge in row.lines:
                found = judge(fact) if not isinstance(fact, Unknown) else None
                assert found is None or found.summary, name


def test_a_look_that_does_not_return_costs_its_own_lines_only() -> None:
    never = threading.Event()
    began_s = time.monotonic()
    found = examination.Task(never.wait).wait(0.1)
    assert time.monotonic() - began_s < 5
    row = examination.LOOKS[0]
    assert [line.verdict for line in examination._lines(row, found)] == ["unknown"]
    failed = examination.Task(lambda: 1 // 0).wait(5)
    assert "ZeroDivisionError" in failed.why


def test_a_tree_with_a_memory_limit_and_a_card_for_swap(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal:  2000000 kB\nMemAvailable:  90000 kB\n",
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/mmcblk0p3 partition 99996 0 -2\n",
        "proc/vmstat": "oom_kill 2\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
        "sys/fs/cgroup/user.slice/memory.max": "536870912\n",
        "proc/self/limits": "Max open files            256       512       files\n",
        "proc/sys/kernel/seccomp/actions_avail": "kill_process kill_thread trap errno allow\n",
        "run/systemd/timesync/synchronized": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = examined(tmp_path)
    verdicts = {name: line.verdict for name, line in lines.items()}
    assert verdicts["memory/available"] == "warn"
    assert "512 MiB" in lines["memory/group limit"].summary
    assert verdicts["memory/swap"] == verdicts["memory/out of memory"] == "warn"
    assert verdicts["limits/open files"] == "warn"
    assert verdicts["clock/synchronised"] == verdicts["kernel/seccomp"] == "pass"
    assert verdicts["kernel/pressure"] == "warn"


# --- accelerators ---------------------------------------------------------------------------------


def test_an_npu_is_found_with_its_profile_and_what_would_be_tried_on_it(tmp_path: Path) -> None:
    from edge_runtime.cli.health import hardware

    root = lay_out(CORE_ULTRA._replace(arch=""), tmp_path)
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/arch").write_text("x86_64\n")
    board = hardware.look(World(root, Path("/state"), Path("/run")))
    lines = report(hardware.checks(board))
    assert "intel-core-ultra" in lines["profile/in force"].summary
    assert lines["accelerators/npu"].verdict == "pass"
    attempts = hardware.attempts(board)
    assert ("openvino", "npu") in [(one.probe, one.device_class) for one in attempts]
    processor = hardware.processor(board.detected.machine)
    assert processor.model == "Intel(R) Core(TM) Ultra 7 155H" and "avx2" in processor.flags


def test_an_accelerator_that_the_profile_does_not_know_is_named(tmp_path: Path) -> None:
    files = {name: text for name, text in CORE_ULTRA.files.items() if "cpuinfo" not in name}
    root = lay_out(CORE_ULTRA._replace(files=files), tmp_path)
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/arch").write_text("x86_64\n")
    found = examined(root)["accelerators//dev/accel/accel0"]
    assert found.verdict == "skip"
    assert "intel-core-ultra" in found.remedy


def test_the_profile_that_the_daemon_uses_is_the_one_that_is_examined(tmp_path: Path) -> None:
    from edge_runtime.cli.health import hardware

    root = lay_out(CORE_ULTRA, tmp_path)
    world = World(root, Path("/state"), Path("/run"), profile="raspberry-pi-5")
    lines = report(hardware.checks(hardware.look(world)))
    assert "as the configuration says" in lines["profile/in force"].summary
    assert lines["profile/match"].verdict == "warn"
    gone = hardware.look(world._replace(profile="no-such-board"))
    found = report(hardware.checks(gone))["profile/files"]
    assert found.verdict == "warn" and "no-such-board" in found.summary


def test_a_version_outside_of_the_profiles_lock_is_named_with_what_to_install(
    tmp_path: Path,
) -> None:
    from edge_runtime.cli.health import hardware

    own = tmp_path / "etc/edge-runtime/profiles"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "name: mine\ntitle: A board of mine\nbackends:\n"
        "  - {backend: reference, versions: '<1.0'}\n"
        "  - {backend: onnxruntime, versions: '<1.0'}\n"
        "  - {backend: onnxruntime, versions: '>=1.20'}\n"
        "sources: {backends: 'choice: a test'}\n"
    )
    world = World(tmp_path, Path("/state"), Path("/run"), profile="mine")
    board = hardware.look(world)
    assert hardware.broken_lock(board.detected, "onnxruntime", "1.32.0") == ""
    assert hardware.broken_lock(board.detected, "onnxruntime", "1.19.2") == "<1.0"
    assert hardware.broken_lock(board.detected, "onnxruntime", "1.19.2", "npu") == ""
    assert hardware.broken_lock(board.detected, "openvino", "1.19.2") == ""
    found = examination._diagnosed(
        hardware.Attempt("reference", "reference"), probe("reference"), board
    )
    assert found.cause == "version_locked"
    assert "asks for <1.0" in found.summary


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_node_that_this_user_may_not_open_names_the_group(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        root = Path(directory)
        root.chmod(0o755)
        lay_out(ROCK_5B, root)
        (root / "proc/sys/kernel").mkdir(parents=True)
        (root / "proc/sys/kernel/arch").write_text("aarch64\n")
        node = root / "dev/accel/accel0"
        node.chmod(0o660)
        lines = as_nobody(lambda: examined(root))
        (line,) = [one for one in lines.values() if one["verdict"] == "fail"]
        assert line["group"] == "accelerators"
        assert "may not open /dev/accel/accel0" in line["summary"]
        assert "usermod -aG" in line["remedy"] or "udev rule" in line["remedy"]
        node.chmod(0o666)
        lines = as_nobody(lambda: examined(root))
        assert not [one for one in lines.values() if one["verdict"] == "fail"]


# --- daemons --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as one:
        one.add("good")
        yield one


def of(daemon: Daemon) -> dict[str, Any]:
    world = World(Path("/"), daemon.state_dir, daemon.run_dir)
    control = examination.reach.control_socket(world)
    world = examination._beside(world, control)
    rows = [
        (row, row.look(world)) for row in examination.LOOKS if row.group in ("daemon", "limits")
    ]
    lines = [line for row, fact in rows for line in examination._lines(row, fact)]
    lines += [line for row in examination.CONTROL for line in examination._lines(row, control)]
    return report(lines)


def test_a_daemon_that_is_well_passes(daemon: Daemon) -> None:
    lines = of(daemon)
    assert {line.verdict for line in lines.values()} == {"pass"}, lines
    assert f"pid {daemon.pid}" in lines["daemon/control socket"].summary
    assert "1 of 1 loaded" in lines["daemon/models"].summary
    assert "the daemon may open" in lines["limits/open files"].summary


def test_the_daemons_user_and_groups_are_those_of_its_process(daemon: Daemon) -> None:
    from edge_runtime.cli.health import hardware

    user = hardware.user_of(World(Path("/"), Path("/state"), Path("/run")), daemon.pid)
    assert user is not None
    assert user.uid == os.geteuid() and os.getegid() in user.gids


def test_a_daemon_that_does_not_answer_is_told_apart_from_one_that_is_gone() -> None:
    one = Daemon().start()
    try:
        os.kill(one.pid, signal.SIGSTOP)
        lines = of(one)
        os.kill(one.pid, signal.SIGCONT)
        assert lines["daemon/infer socket"].verdict == "fail"
        assert "no answer" in lines["daemon/infer socket"].summary
        one.kill()
        lines = of(one)
        assert "nobody listens" in lines["daemon/infer socket"].summary
        assert lines["daemon/infer socket"].verdict == "fail"
        assert "started here" in lines["limits/open files"].summary
    finally:
        one.kill()
        one.remove()


def test_a_model_that_failed_is_named_with_its_reason() -> None:
    # After the second death it is not tried again while we look.
    restart = {"backoff_initial_s": 60, "backoff_max_s": 60, "deaths_max": 2, "window_s": 60}
    with running({"workers": {"restart": restart}}) as one:
        one.add("sick")

        def failing() -> Any:
            for worker in one.control("ps")["workers"]:
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(worker["pid"], signal.SIGKILL)
            found = of(one)["daemon/models"]
            return found if found.verdict == "fail" else None

        found = until(failing, "a failed model")
        assert found.summary.startswith(("sick is failed: ", "sick is backoff: "))
        assert "edge-runtime why sick" in found.remedy


def test_something_else_behind_the_socket_is_no_daemon(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{directory}/infer.sock")
        listener.listen()

        def talk_nonsense() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)
            connection.close()

        threading.Thread(target=talk_nonsense, daemon=True).start()
        world = World(Path("/"), Path("/state"), Path(directory))
        found = examination.reach.infer_socket(world)
        listener.close()
        assert found.state == "silent"


def test_a_relative_run_directory_is_below_the_current_one(daemon: Daemon) -> None:
    _, lines = doctor("--run-dir", "run", "--state-dir", "state", cwd=daemon.root)
    assert lines["daemon/infer socket"]["verdict"] == "pass", lines["daemon/infer socket"]


# --- other users ----------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_any_user_may_ask_and_is_told_what_it_may_not_see(daemon: Daemon) -> None:
    infer = daemon.run_dir / "infer.sock"
    infer.chmod(0o660)
    try:
        lines = as_nobody(lambda: of(daemon))
    finally:
        infer.chmod(0o666)
    assert lines["daemon/infer socket"]["verdict"] == "fail"
    assert "group root" in lines["daemon/infer socket"]["summary"]
    assert lines["daemon/control socket"]["verdict"] == "skip"
    assert lines["daemon/models"]["verdict"] == "unknown"
    lines = as_nobody(lambda: of(daemon))
    assert lines["daemon/infer socket"]["verdict"] == "pass"


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_read_only_file_system_and_one_without_names(tmp_path: Path) -> None:
    def mounted(options: str) -> tuple[str, str]:
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path)]
        if subprocess.run(words, check=False, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount")
        try:
            fact = facts.space(World(Path("/"), tmp_path, Path("/run")))
            (row,) = [row for row in examination.LOOKS if row.look is facts.space]
            room, kind = examination._lines(row, fact)
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
        assert kind.verdict == "warn" and "tmpfs" in kind.summary
        return room.verdict, room.summary

    assert mounted("ro")[0] == "fail"
    assert mounted("nr_inodes=20,size=4g")[1].startswith("19 files")
    assert "nothing can be installed" in mounted("size=1m")[1]


# --- the command line -----------------------------------------------------------------------------


def test_the_command_needs_no_numpy_of_its_own() -> None:
    code = (
        "import sys\n"
        "from edge_runtime.cli.health import examination\n"
        "print([name for name in ('numpy', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wrong_option_is_refused_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rot", "/"]) == 2
    assert "--rot" in capsys.readouterr().err


def test_the_time_for_a_probe_is_bounded_by_the_option() -> None:
    outcome = probe("reference", {"faults": [{"action": "hang"}]}, timeout_s=0.8)
    assert outcome.exit_code is None and outcome.waited_s == 0.8
