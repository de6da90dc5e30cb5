"""The profile in a real daemon: beneath the configuration, above the defaults, told and gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_profiles.detection import detect
from edge_runtime.daemon import board as boards
from edge_runtime.daemon.board import Board, Line
from edge_runtime.errors import UsageError
from tests.daemon.world import Daemon, serve_command
from tests.profiles.boards import CORAL_USB, PI_5, ROCK_5B, lay_out, with_files
from tests.profiles.boards import Board as Recorded

PROFILE = """
name: mine
title: a board for this test
workers: {cpuset: "0", runners: 0, threads: 3}
memory: {budget_bytes: 300 MiB}
backends: [{backend: onnxruntime, options: {spinning: true}}, {backend: reference}]
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture
def running(profile: Path) -> Iterator[Daemon]:
    daemon = Daemon({"profile": str(profile), "workers": {"runners": 1}})
    try:
        yield daemon.start()
    finally:
        daemon.stop()


def test_the_profile_gives_what_the_configuration_leaves_open(
    running: Daemon, profile: Path
) -> None:
    answer: dict[str, Any] = running.control("config")
    workers = answer["config"]["workers"]
    assert workers["cpuset"] == "0", "the profile's"
    assert workers["runners"] == 1, "the configuration wins"
    assert answer["profile"]["name"] == "mine"
    assert answer["profile"]["origins"]["workers.cpuset"] == str(profile)
    assert f"device profile mine: the configuration says profile: {profile}" in running.log()

    running.add("affine")
    assert running.infer("affine") == 7.0
    (worker,) = running.control("ps")["workers"]
    allowed = Path(f"/proc/{worker['pid']}/status").read_text().partition("Cpus_allowed_list:")[2]
    assert allowed.split()[0] == "0"


def test_status_and_config_show_say_which_profile_holds(running: Daemon) -> None:
    shown = _edge(running, "config", "show")
    assert "+ marks what the device profile mine says" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["+", "workers.cpuset", "0"] in [row[:3] for row in rows]
    assert ["*", "workers.runners", "1"] in [row[:3] for row in rows]
    assert "board: a board for this test (profile mine)" in _edge(running, "status")


@pytest.mark.parametrize(
    ("named", "said"),
    [("rasberry-pi-5", "did you mean 'raspberry-pi-5'?"), ("./missing.yaml", "cannot be read")],
)
def test_a_profile_that_is_not_there_stops_the_start_with_a_remedy(
    tmp_path: Path, named: str, said: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"profile: {named}\n")
    done = subprocess.run(
        serve_command(tmp_path / "state", tmp_path / "run", "--config", str(config)),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_child_that_looks_leaves_nothing_behind() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    board = boards.start("auto").board()
    assert board.name and board.reasons and board.order
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert boards.start("none").board() == Board()
    with pytest.raises(UsageError, match="no profile 'nonsense'"):
        boards.start("nonsense").board()


def test_a_child_that_hangs_does_not_keep_the_daemon_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boards, "_look", lambda wanted: os.read(os.pipe()[0], 1))
    board = boards.start("auto").board(timeout_s=0.1)
    assert board.name == "" and "no profile is in force" in board.problems[0]


def test_a_child_that_dies_is_told() -> None:
    def die(wanted: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boards, "_look", die)
        board = boards.start("auto").board()
    assert "no profile is in force" in board.problems[0]


# --- from a detection to a board ------------------------------------------------------------------


def board_of(recorded: Recorded, root: Path, cpus: int = 8) -> Board:
    detected = detect(root=lay_out(recorded, root), arch=recorded.arch)
    return boards.describe(detected, "auto", set(range(cpus)))


def test_big_little_boards_use_their_big_cores(tmp_path: Path) -> None:
    board = board_of(ROCK_5B, tmp_path)
    assert board.name == "rk3588"
    assert board.beneath == {"workers": {"cpuset": "4-7"}}
    assert board.ladder.zones[0].type == "bigcore*-thermal" and board.ladder.steps
    assert board.reasons[1:] == ("the device tree has 'rockchip,rk3588'",)


def test_cores_that_are_kept_from_us_are_not_asked_for(tmp_path: Path) -> None:
    board = board_of(ROCK_5B, tmp_path, cpus=4)
    assert board.beneath == {}
    assert "cores 4-7 are not all there" in board.problems[0]


def test_an_exclusive_accelerator_is_told_and_comes_first(tmp_path: Path) -> None:
    board = board_of(with_files(PI_5, CORAL_USB), tmp_path)
    assert board.addons == ("coral-usb",) and board.exclusive == ("edgetpu",)
    assert board.order[0] == Line("litert", "edgetpu")
    assert board.runnable("litert", "edgetpu") == ""
    # The stick gets another node when its firmware is loaded: the whole bus.
    assert board.devices == {"edgetpu": ("/dev/bus/usb",)}


def test_a_backend_without_its_device_cannot_run(tmp_path: Path) -> None:
    files = {name: text for name, text in CORAL_USB.items() if not name.startswith("dev/")}
    board = board_of(with_files(PI_5, files), tmp_path)
    assert board.runnable("litert", "edgetpu") == "Edge TPU on USB: not there"
    assert board.runnable("litert", "cpu") == ""
    assert board.runnable("something", "else") == ""
    assert board.devices == {}


def test_options_of_the_variant_stand_over_those_of_the_profile() -> None:
    board = Board(
        threads=2,
        order=(
            Line("onnxruntime", "cpu", {"spinning": True, "threads": 3}),
            Line("openvino", "npu", {"device": "NPU"}),
        ),
    )
    assert board.options("litert", "cpu", {}) == {"threads": 2}
    assert board.options("onnxruntime", "cpu", {}) == {"threads": 3, "spinning": True}
    assert board.options("onnxruntime", "cpu", {"threads": 1}) == {"threads": 1, "spinning": True}
    assert board.options("openvino", "npu", {}) == {"device": "NPU"}
    assert board.options("openvino", "npu", {"device": "AUTO"}) == {"device": "AUTO"}
    assert board.options("reference", "cpu", {"run_ms": 1}) == {"run_ms": 1}


def test_threads_are_given_to_the_backends_that_take_them() -> None:
    """The table of the daemon, which imports no backend, is what the backends say."""
    import importlib

    from edge_runtime.backends import BACKENDS

    takes = set()
    for name, place in BACKENDS.items():
        module = importlib.import_module(place.partition(":")[0])
        if any("threads" in getattr(one, "__struct_fields__", ()) for one in vars(module).values()):
            takes.add(name)
    assert takes == boards.TAKES_THREADS & set(BACKENDS)


@pytest.mark.parametrize(
    ("share", "bytes_", "limit", "budget"),
    [
        (None, None, 1000, 700),
        (0.5, None, 1000, 500),
        (None, 300, 1000, 300),
        (0.5, 600, 1000, 500),
        (None, 300, 0, 300),
        (None, None, 0, 0),
    ],
)
def test_the_memory_budget_is_the_smaller_of_share_and_bytes(
    share: float | None, bytes_: int | None, limit: int, budget: int
) -> None:
    assert Board(memory_share=share, memory_bytes=bytes_).budget_bytes(limit) == budget


def _edge(daemon: Daemon, *words: str) -> str:
    command = [sys.executable, "-m", "edge_runtime", "--run-dir", str(daemon.run_dir), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout
