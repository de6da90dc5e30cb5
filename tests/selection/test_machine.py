"""What a decision rests on, read from recorded machines; energy from a made-up counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.daemon import energy, machine
from edge_runtime.daemon.board import Board, Line
from edge_runtime.daemon.energy import Reading

X86 = """processor : 0
model name : AMD EPYC 9R14
flags : fpu avx512_vnni

processor : 1
model name : AMD EPYC 9R14
flags : fpu avx512_vnni
"""
ARM = """processor : 0
Features : fp asimd asimddp
CPU implementer : 0x41
CPU part : 0xd0b
"""


def proc(directory: Path, cpuinfo: str) -> Path:
    (directory / "cpuinfo").write_text(cpuinfo)
    kernel = directory / "sys" / "kernel"
    kernel.mkdir(parents=True, exist_ok=True)
    (kernel / "osrelease").write_text("6.6.31+rpt-rpi-2712\n")
    return directory


def test_processor_and_kernel_are_told_apart(tmp_path: Path) -> None:
    amd = machine.read_facts(proc(tmp_path, X86))
    arm = machine.read_facts(proc(tmp_path, ARM))
    assert "AMD EPYC 9R14" in amd["processor"] and "0xd0b" in arm["processor"]
    assert amd["kernel"] == "6.6.31+rpt-rpi-2712"
    fewer = machine.read_facts(proc(tmp_path, X86.replace(" avx512_vnni", "")))
    assert fewer["processor"] != amd["processor"]  # the same name, without its fast instructions


def test_a_machine_that_tells_nothing_has_facts_too(tmp_path: Path) -> None:
    assert machine.read_facts(tmp_path / "nowhere")["kernel"] == ""


def test_a_backends_packages_and_plug_ins_are_in_its_fingerprint_and_others_are_not(
    tmp_path: Path,
) -> None:
    for name in ("onnxruntime-1.32.0", "onnxruntime_qnn-2.7.0", "numpy-2.4.6", "requests-2.31"):
        (tmp_path / f"{name}.dist-info").mkdir()
    (tmp_path / "onnxruntime").mkdir()
    packages = machine.read_packages([str(tmp_path), "/nowhere.zip", ""])
    here = machine.look(Board())._replace(packages=packages)
    found = here.fingerprint(["onnxruntime", "some-other"])
    assert found["backend onnxruntime"] == "numpy-2.4.6 onnxruntime-1.32.0 onnxruntime_qnn-2.7.0"
    assert found["backend some-other"] == ""
    assert "requests" not in str(found)


def test_another_profile_or_other_options_in_it_are_another_machine() -> None:
    boards = [
        Board(),
        Board(name="pi5"),
        Board(name="pi5", order=(Line("openvino"),)),
        Board(name="pi5", order=(Line("openvino", options={"streams": 2}),)),
        Board(name="pi5", threads=4),
    ]
    assert len({machine.look(one).facts["profile"] for one in boards}) == len(boards)


# --- energy ---------------------------------------------------------------------------------------


def powercap(directory: Path, *used: int) -> Path:
    for number, uj in enumerate(used):
        for zone in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):
            (directory / zone).mkdir(exist_ok=True)
            (directory / zone / "energy_uj").write_text(f"{uj}\n")
            (directory / zone / "max_energy_range_uj").write_text("1000\n")
    return directory


def test_packages_are_added_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    assert energy.read_uj(powercap(tmp_path, 300, 200)) == Reading(500, 1000)


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [
        (Reading(100, 1000), Reading(150, 1000), 50.0),
        (Reading(990, 1000), Reading(20, 1000), 30.0),  # it began again
        (None, Reading(1, 1000), None),
        (Reading(1, 1000), None, None),
    ],
)
def test_a_difference_survives_the_counters_overflow_and_is_none_without_a_reading(
    before: Reading | None, after: Reading | None, used: float | None
) -> None:
    assert energy.used_uj(before, after) == used


def test_without_a_counter_or_with_nonsense_there_is_no_reading(tmp_path: Path) -> None:
    assert energy.read_uj(tmp_path) is None
    zone = powercap(tmp_path, 1) / "intel-rapl:0"
    (zone / "energy_uj").write_text("what?")
    assert energy.read_uj(tmp_path) is None
