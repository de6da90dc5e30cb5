"""`edge-runtime profile detect | list | show | check` on recorded machines."""

from __future__ import annotations

import json
import pwd
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.cli import main
from tests.profiles.boards import (
    CORAL_USB,
    IMX8MP_EVK,
    PI_5,
    ROCK_5B,
    Board,
    lay_out,
    with_files,
)


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> str:
        assert main(["profile", *map(str, words)]) == code
        printed = self._capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.out + printed.err

    def json(self, *words: object, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def profile(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def recorded(board: Board, root: Path) -> list[str]:
    return ["--root", str(lay_out(board, root)), "--arch", board.arch]


def test_detect_names_board_addons_and_reasons(profile: Run, tmp_path: Path) -> None:
    where = recorded(with_files(PI_5, CORAL_USB), tmp_path)
    text = profile("detect", *where)
    assert "profile:      raspberry-pi-5 (Raspberry Pi 5, 500 and Compute Module 5)" in text
    assert "because the device tree has 'raspberrypi,5-model-b'" in text
    assert "add-on:       coral-usb" in text
    assert "Raspberry Pi 5 Model B Rev 1.0; 4 cores, 4040 MiB" in text
    document = profile.json("detect", *where)
    assert document["profile"]["name"] == "raspberry-pi-5"
    assert document["accelerators"] == ["edgetpu-usb"]
    assert document["machine"]["compatible"] == ["raspberrypi,5-model-b", "brcm,bcm2712"]


def test_detect_of_an_unknown_machine_says_so_with_its_own_exit_code(
    profile: Run, tmp_path: Path
) -> None:
    text = profile("detect", "--root", tmp_path, "--arch", "riscv64", code=3)
    assert "no profile fits this machine (riscv64)" in text


def test_list_marks_the_one_that_fits(profile: Run, tmp_path: Path) -> None:
    lines = profile("list", *recorded(ROCK_5B, tmp_path)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["rk3588"]
    rows = profile.json("list", *recorded(ROCK_5B, tmp_path))["profiles"]
    assert [row["name"] for row in rows if row["here"]] == ["rk3588"]


def test_show_says_for_each_value_whose_it_is_and_from_where(profile: Run) -> None:
    values = {row["path"]: row for row in profile.json("show", "raspberry-pi-5")["values"]}
    assert values["match.arch"]["file"] == "built in: generic-aarch64.yaml"
    assert values["match.compatible"]["file"] == "built in: raspberry-pi-5.yaml"
    assert values["match.compatible"]["source"].startswith("linux")
    assert values["memory.share"]["value"] == 0.7
    text = profile("show", "raspberry-pi-5")
    assert "from built in: raspberry-pi-5.yaml, then built in: generic-aarch64.yaml" in text
    assert "left out: workers: threads were not measured" in text


def test_show_of_an_unknown_profile_names_the_nearest(profile: Run) -> None:
    assert "did you mean 'rk3588'?" in profile("show", "rk3688", code=2)


def test_an_own_file_with_a_typo_is_named(profile: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntitle: t\nextends: rk3588\nworkers: {cpu_set: 0-3}\n")
    text = profile("show", path, code=2)
    assert f"{path}: workers.cpu_set" in text and "did you mean 'cpuset'?" in text


def test_check_passes_on_the_right_board_and_fails_on_a_closed_node(
    profile: Run, tmp_path: Path
) -> None:
    where = recorded(IMX8MP_EVK, tmp_path)
    nobody = pwd.getpwnam("nobody").pw_name
    (tmp_path / "dev/galcore").chmod(0o666)
    text = profile("check", "--user", nobody, *where)
    assert "pass  accelerators.npu" in text and "pass  clusters: 4 cores" in text
    (tmp_path / "dev/galcore").chmod(0o660)
    text = profile("check", "--user", nobody, *where, code=2)
    assert "fail  accelerators.npu.nodes" in text
    assert "usermod -aG video nobody" in text
    findings = profile.json("check", "--user", nobody, *where, code=2)
    assert findings["state"] == "fail" and findings["user"] == nobody


def test_check_against_another_boards_profile_fails(profile: Run, tmp_path: Path) -> None:
    text = profile("check", "rk3588", *recorded(PI_5, tmp_path), code=2)
    assert "fail  workers.cpuset: core 4 is not there" in text
    assert "warn  match: this machine (Raspberry Pi 5 Model B Rev 1.0)" in text


def test_check_compares_locks_with_what_is_installed(profile: Run, tmp_path: Path) -> None:
    path = tmp_path / "locked.yaml"
    path.write_text('name: locked\ntitle: t\nbackends: [{backend: onnxruntime, versions: "<1"}]\n')
    text = profile("check", path, code=2)
    assert "fail  backends[0].versions: onnxruntime 1." in text and "is not within <1" in text


def test_a_warning_has_its_own_exit_code(profile: Run, tmp_path: Path) -> None:
    files = {name: text for name, text in IMX8MP_EVK.files.items() if "galcore" not in name}
    text = profile("check", *recorded(IMX8MP_EVK._replace(files=files), tmp_path), code=1)
    assert "warn  accelerators.npu" in text and "modprobe galcore" in text


def test_an_unknown_user_is_told(profile: Run) -> None:
    assert "there is no user" in profile("check", "--user", "no-such-user", code=3)


def test_check_of_this_machine_runs_as_anybody(profile: Run) -> None:
    document = profile.json("check")
    assert document["state"] in ("pass", "warn")
