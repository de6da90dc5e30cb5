"""Looking at a machine, comparing it with a profile, and version locks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles import checking, loading, probe
from device_profiles.checking import Finding, User
from device_profiles.schema import Machine
from device_profiles.versions import satisfies
from tests.profiles.boards import (
    CORAL_M2,
    CORAL_USB,
    IMX8MP_EVK,
    PI_5,
    PI_ZERO_2,
    ROCK_5B,
    Board,
    lay_out,
    with_files,
)

EDGE = User("edge", 900, frozenset({900, 44}))


def findings(
    board: Board, root: Path, profile: str, user: User | None = None
) -> dict[str, Finding]:
    lay_out(board, root)
    machine = probe.describe(root, board.arch)
    resolved = loading.load(profile)
    seen = {
        name: checking.look(one, machine, root)
        for name, one in resolved.profile.accelerators.items()
    }
    return {one.what: one for one in checking.compare(resolved, machine, seen, user)}


def test_a_big_little_board_has_its_clusters(tmp_path: Path) -> None:
    machine = probe.describe(lay_out(ROCK_5B, tmp_path), "aarch64")
    assert [(one.cpus, one.part) for one in machine.clusters] == [
        ("0-3", "0x41:0xd05"),
        ("4-7", "0x41:0xd0b"),
    ]
    assert machine.cpu_count == 8
    assert machine.title == "Radxa ROCK 5B"
    assert machine.compatible == ("radxa,rock-5b", "rockchip,rk3588")
    assert machine.memory_bytes == 8108240 * 1024
    assert "bigcore0-thermal" in machine.zones and "rocket" in machine.modules
    assert "asimd" in machine.cpu_flags


def test_the_last_paragraph_of_a_pi_is_no_core(tmp_path: Path) -> None:
    assert probe.describe(lay_out(PI_5, tmp_path)).cpu_count == 4


def test_a_usb_device_has_its_node(tmp_path: Path) -> None:
    machine = probe.describe(lay_out(with_files(PI_5, CORAL_USB), tmp_path))
    assert machine.usb == {"18d1:9302": ("/dev/bus/usb/002/004",)}


def test_an_empty_root_is_a_machine_of_which_nothing_is_known(tmp_path: Path) -> None:
    assert probe.describe(tmp_path) == Machine()
    assert probe.describe(tmp_path / "missing") == Machine()


def test_files_that_are_directories_or_nonsense_are_absent(tmp_path: Path) -> None:
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/device-tree/compatible"):
        (tmp_path / name).mkdir(parents=True)
    board = Board(
        "",
        {
            "sys/bus/pci/devices/0000:00:00.0/vendor": "\0\0",
            "sys/bus/usb/devices/1-1/idVendor": "abcd",
            "sys/class/thermal/thermal_zone0/type": "",
        },
        "",
    )
    assert probe.describe(lay_out(board, tmp_path)) == Machine()


@given(st.binary(max_size=300))
def test_no_content_of_a_file_makes_the_probe_fail(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/device-tree/compatible"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    probe.describe(root)


def test_a_node_that_the_daemon_may_not_open_names_the_group_to_join(tmp_path: Path) -> None:
    root = lay_out(IMX8MP_EVK, tmp_path)
    (root / "dev/galcore").chmod(0o660)
    found = findings(IMX8MP_EVK, tmp_path, "imx8mp", EDGE)["accelerators.npu.nodes"]
    assert found.state == "fail"
    assert "edge may not open /dev/galcore (mode 0660)" in found.text
    assert found.remedy == "usermod -aG video edge, then restart the daemon"


def test_a_node_open_to_others_is_fine(tmp_path: Path) -> None:
    (lay_out(IMX8MP_EVK, tmp_path) / "dev/galcore").chmod(0o666)
    assert findings(IMX8MP_EVK, tmp_path, "imx8mp", EDGE)["accelerators.npu"].state == "pass"


def test_a_missing_accelerator_is_a_warning_that_names_its_driver(tmp_path: Path) -> None:
    files = {name: text for name, text in IMX8MP_EVK.files.items() if "galcore" not in name}
    found = findings(IMX8MP_EVK._replace(files=files), tmp_path, "imx8mp")["accelerators.npu"]
    assert found.state == "warn" and "modprobe galcore" in found.remedy


def test_the_nodes_of_another_driver_are_not_the_npu(tmp_path: Path) -> None:
    """/dev/accel/accel0 alone may be anything; it must be bound to rocket."""
    files = {name: text for name, text in ROCK_5B.files.items() if "drivers/rocket" not in name}
    found = findings(ROCK_5B._replace(files=files), tmp_path, "rk3588")["accelerators.npu"]
    assert found.state == "warn"


def test_a_profile_of_another_board_is_noticed(tmp_path: Path) -> None:
    found = findings(PI_ZERO_2, tmp_path, "rk3588")
    assert found["match"].state == "warn" and "Raspberry Pi Zero 2 W" in found["match"].text
    assert found["workers.cpuset"].state == "fail" and "core 4" in found["workers.cpuset"].text
    assert found["thermal.zones"].state == "warn"
    assert "cpu-thermal" in found["thermal.zones"].remedy


def test_a_driver_outside_of_its_lock_fails(tmp_path: Path) -> None:
    own = tmp_path / "profiles"
    own.mkdir()
    (own / "locked.yaml").write_text(
        "name: locked\ntitle: t\nextends: coral-m2\nkind: addon\n"
        'accelerators: {edgetpu-pcie: {driver: {versions: ">=2"}}}\n'
    )
    root = lay_out(with_files(PI_5, CORAL_M2), tmp_path / "root")
    machine = probe.describe(root, "aarch64")
    resolved = loading.load("locked", [own, loading.BUILT_IN])
    seen = {
        name: checking.look(one, machine, root)
        for name, one in resolved.profile.accelerators.items()
    }
    assert seen["edgetpu-pcie"].driver_version == "1.1.4"
    found = {one.what: one for one in checking.compare(resolved, machine, seen)}
    assert found["accelerators.edgetpu-pcie.driver.versions"].state == "fail"
    assert checking.available(resolved.profile, seen) == {"edgetpu-pcie"}


def test_backend_locks_are_compared_with_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "locked.yaml").write_text(
        'name: locked\ntitle: t\nbackends: [{backend: onnxruntime, versions: ">=1.20,<1.30"},'
        ' {backend: litert, versions: ">=2"}]\n'
    )
    profile = loading.load("locked", [tmp_path]).profile
    assert [one.state for one in checking.versions(profile, {"onnxruntime": "1.32.0"})] == ["fail"]
    assert [one.state for one in checking.versions(profile, {"onnxruntime": "1.22.1"})] == ["pass"]


@pytest.mark.parametrize(
    ("version", "lock", "kept"),
    [
        ("1.20.3", ">=1.20,<2", True),
        ("2.0", ">=1.20,<2", False),
        ("1.20", "==1.20.0", True),
        ("1.9", ">=1.10", False),
        ("v0.9.8", ">=0.9.6", True),
        ("RKNPU driver: v0.9.3", ">=0.9.6", False),
        ("", ">=1", False),
        ("unknown", ">=1", False),
        ("anything", "", True),
        ("535.104.05", ">535,!=535.100", True),
    ],
)
def test_a_version_keeps_its_lock_or_not(version: str, lock: str, kept: bool) -> None:
    assert satisfies(version, lock) is kept
