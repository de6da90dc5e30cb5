"""What is thought of what was seen: values in, verdicts out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.backends.diagnosis import Diagnosis
from edge_runtime.cli import doctor, health
from edge_runtime.cli.health import Check, Finding, Unknown, facts, reach, verdicts
from edge_runtime.cli.health.facts import Clock, Kernel, Limits, Memory, Software, Space, Swap, Sync
from edge_runtime.cli.health.reach import Daemon, Owner, Socket

GIB, MIB = 1 << 30, 1 << 20
NOW_S = 1_795_000_000.0  # November 2026
DISK = Space("/var/lib", "ext4", 16 * GIB, 8 * GIB, 10_000, False)
MEMORY = Memory(False, 4 * GIB, 2 * GIB, 4 * GIB, True, 0)
KERNEL = Kernel("6.6.1", "aarch64", 4, True, True, True)
LIMITS = Limits(True, 8192, 8192, 8 * MIB, 1000)
PYTHON = Software("3.11.2", 64, "aarch64", "glibc 2.36", ())
SOCKET = Socket("/run/edge-runtime/infer.sock", "answers", "", 0.0004)
REFUSED = Owner("root", "edge-runtime", "0660")


def with_models(*models: tuple[str, str, str]) -> tuple[Socket, Daemon]:
    return SOCKET, Daemon(7, "auto", models)


@pytest.mark.parametrize(
    ("judge", "fact", "verdict", "says"),
    [
        (verdicts.year, Clock(NOW_S, True, True), "pass", "2026"),
        (verdicts.year, Clock(0.0, None, False), "fail", "no battery clock"),
        (verdicts.year, Clock(9e9, True, True), "fail", "2255"),
        (verdicts.synchronised, Clock(NOW_S, True, True), "pass", "right"),
        (verdicts.synchronised, Clock(NOW_S, False, True), "warn", "nobody"),
        (verdicts.synchronised, Clock(NOW_S, None, True), "unknown", "not known"),
        (verdicts.room, DISK, "pass", "8.0 GiB of 16.0 GiB"),
        (verdicts.room, DISK._replace(read_only=True), "fail", "read-only"),
        (verdicts.room, DISK._replace(files_free=3), "fail", "3 files"),
        (verdicts.room, DISK._replace(files_free=None), "pass", "free"),
        (verdicts.room, DISK._replace(free_bytes=63 * MIB), "fail", "nothing can be installed"),
        (verdicts.room, DISK._replace(free_bytes=700 * MIB), "warn", "700 MiB"),
        (verdicts.file_system, DISK, "pass", "ext4"),
        (verdicts.file_system, DISK._replace(kind="tmpfs"), "warn", "gone after a restart"),
        (verdicts.file_system, DISK._replace(kind="vfat"), "warn", "power cut"),
        (verdicts.file_system, DISK._replace(kind="nfs4"), "warn", "network"),
        (verdicts.file_system, DISK._replace(kind=""), "unknown", "not known"),
        (verdicts.sync_time, Sync("/var", 0.004), "pass", "4.0 ms"),
        (verdicts.sync_time, Sync("/var", 0.3), "warn", "slow"),
        (verdicts.sync_time, Sync("/var", 2.5), "fail", "worn"),
        (verdicts.open_files, LIMITS, "pass", "the daemon may open 8192"),
        (verdicts.open_files, LIMITS._replace(of_daemon=False), "pass", "started here"),
        (verdicts.open_files, LIMITS._replace(files_soft=256), "warn", "too few"),
        (verdicts.open_files, LIMITS._replace(files_hard=512, files_soft=512), "warn", "too few"),
        (verdicts.open_files, LIMITS._replace(files_soft=-1, files_hard=-1), "pass", "any number"),
        (verdicts.locked_memory, LIMITS, "pass", "8.0 MiB"),
        (verdicts.landlock, KERNEL, "pass", "version 4"),
        (verdicts.landlock, KERNEL._replace(landlock_abi=0), "warn", "6.6.1"),
        (verdicts.landlock, KERNEL._replace(landlock_abi=None), "unknown", "not known"),
        (verdicts.seccomp, KERNEL, "pass", "no network"),
        (verdicts.seccomp, KERNEL._replace(seccomp=False), "warn", "can use the network"),
        (verdicts.seccomp, KERNEL._replace(arch="riscv64"), "warn", "riscv64"),
        (verdicts.sealed_memory, KERNEL, "pass", "memfd"),
        (verdicts.sealed_memory, KERNEL._replace(memfd=False), "fail", "sealed"),
        (verdicts.pressure, KERNEL, "pass", "/proc/pressure"),
        (verdicts.pressure, KERNEL._replace(pressure=False), "warn", "no pressure"),
        (verdicts.available, MEMORY, "pass", "2.0 GiB of 4.0 GiB"),
        (verdicts.available, MEMORY._replace(available_bytes=90 * MIB), "warn", "one small model"),
        (verdicts.available, MEMORY._replace(total_bytes=0), "unknown", "not known"),
        (verdicts.cgroup, MEMORY, "pass", "no group"),
        (verdicts.cgroup, MEMORY._replace(limit_bytes=512 * MIB), "pass", "512 MiB of 4.0 GiB"),
        (verdicts.cgroup, MEMORY._replace(controller=False), "warn", "do nothing"),
        (verdicts.oom_kills, MEMORY, "pass", "nothing"),
        (verdicts.oom_kills, MEMORY._replace(oom_kills=3), "warn", "3 processes"),
        (verdicts.swap, (), "pass", "none"),
        (verdicts.swap, (Swap("/dev/zram0", "partition", GIB),), "pass", "zram0"),
        (verdicts.swap, (Swap("/dev/mmcblk0p3", "partition", GIB),), "warn", "wears"),
        (verdicts.swap, (Swap("/var/swap", "file", 100 * MIB),), "warn", "wears"),
        (verdicts.python, PYTHON, "pass", "Python 3.11.2"),
        (verdicts.python, PYTHON._replace(bits=32), "fail", "64-bit kernel"),
        (verdicts.python, PYTHON._replace(libc=""), "warn", "glibc only"),
        (verdicts.packages, PYTHON, "pass", "twice"),
        (verdicts.packages, PYTHON._replace(doubles=("a and b",)), "warn", "a and b"),
        (verdicts.infer_socket, SOCKET, "pass", "0.4 ms"),
        (verdicts.infer_socket, SOCKET._replace(state="absent"), "skip", "no daemon"),
        (verdicts.infer_socket, SOCKET._replace(state="refused"), "fail", "nobody listens"),
        (verdicts.infer_socket, SOCKET._replace(state="silent"), "fail", "no answer"),
        (
            verdicts.infer_socket,
            SOCKET._replace(state="forbidden", owner=REFUSED),
            "fail",
            "mode 0660",
        ),
        (verdicts.control_socket, (SOCKET._replace(state="forbidden"), None), "skip", "root"),
        (verdicts.control_socket, with_models(), "pass", "pid 7"),
        (verdicts.models, with_models(), "pass", "none is installed"),
        (verdicts.models, with_models(("a", "ready", ""), ("b", "idle", "")), "pass", "1 of 2"),
        (verdicts.models, with_models(("a", "failed", "its golden differs")), "fail", "golden"),
        (verdicts.models, with_models(("a", "loading", "")), "warn", "a is loading"),
        (verdicts.models, (SOCKET._replace(state="forbidden"), None), "unknown", "not known"),
        (verdicts.models, (SOCKET._replace(state="absent"), None), "skip", "no daemon"),
        (verdicts.backend, Diagnosis("missing_package", "not installed", "pip"), "skip", "not"),
        (verdicts.backend, Diagnosis("hang", "hangs", "restart"), "fail", "hangs"),
    ],
)
def test_each_fact_has_its_verdict(judge: Any, fact: Any, verdict: str, says: str) -> None:
    found: Finding = judge(fact)
    assert (found.verdict, says in found.summary) == (verdict, True), found
    if verdict == "fail" or (verdict == "warn" and "riscv64" not in says):
        assert found.remedy, found


def test_what_could_not_be_seen_is_said_with_its_reason() -> None:
    assert verdicts.known(verdicts.room)(Unknown("the disk is gone")) == Finding(
        "unknown", "not known: the disk is gone"
    )


def test_who_may_not_use_the_socket_is_told_which_group_to_join() -> None:
    found = verdicts.infer_socket(SOCKET._replace(state="forbidden", owner=REFUSED))
    assert "usermod -aG edge-runtime" in found.remedy


def test_without_a_real_backend_nothing_can_serve() -> None:
    works, gone = Diagnosis("ok", "1"), Diagnosis("missing_package", "x is not installed")
    assert verdicts.any_backend([("reference", works), ("litert", gone)]).verdict == "fail"
    assert verdicts.any_backend([("litert", works)]).verdict == "pass"


# --- the report -----------------------------------------------------------------------------------

PASS = Check("clock", "date", "pass", "says 2026-11-23", "never shown")
WARN = Check("clock", "synchronised", "warn", "nobody keeps it right", "set it")
FAIL = Check("disk", "space", "fail", "full", "delete")
SKIP = Check("disk", "sync", "skip", "no disk")


@pytest.mark.parametrize(
    ("checks", "overall", "code"),
    [
        ([PASS, SKIP], "pass", 0),
        ([PASS, WARN], "warn", 1),
        ([WARN, FAIL, PASS], "fail", 2),
        ([], "pass", 0),
    ],
)
def test_the_exit_code_is_that_of_the_worst(checks: list[Check], overall: str, code: int) -> None:
    assert (health.overall(checks), health.exit_code(checks)) == (overall, code)


def test_the_report_reads_like_one() -> None:
    text = doctor.text([PASS, WARN, FAIL], 1.23, colours=False)
    assert text.splitlines() == [
        "clock",
        "  ok    date          says 2026-11-23",
        "  warn  synchronised  nobody keeps it right",
        "                      do: set it",
        "",
        "disk",
        "  FAIL  space         full",
        "                      do: delete",
        "",
        "fail: 1 passed, 1 warnings, 1 failed, 0 do not apply, 0 not known (1.2 s)",
    ]


def test_colours_are_for_terminals_and_text_of_others_drives_none() -> None:
    assert "\x1b[1;31mFAIL" in doctor.text([FAIL], 0, colours=True)
    hostile = Check("disk", "space", "fail", "\x1b[2Jgone", "\x07do")
    assert "\x1b" not in doctor.text([hostile], 0, colours=False)


# --- a few facts ----------------------------------------------------------------------------------


def test_the_limits_of_a_process_are_read_from_its_table() -> None:
    table = "Max open files            1024                 524288               files\n"
    assert facts._limit(table, "Max open files") == (1024, 524288)
    assert facts._limit("Max processes  unlimited  unlimited  processes", "Max processes") == (
        -1,
        -1,
    )
    assert facts._limit("", "Max processes") == (-1, -1)


def test_packages_that_are_in_each_others_way_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    installed = ["onnxruntime-1.32.0", "onnxruntime_openvino-1.30.0", "half-1.0", "half-2.0"]
    for name in installed:
        directory = tmp_path / f"{name}.dist-info"
        directory.mkdir()
        project, _, version = name.partition("-")
        (directory / "METADATA").write_text(f"Name: {project}\nVersion: {version}\n")
        (directory / "RECORD").write_text("onnxruntime/__init__.py,,\n" if "onnx" in name else "")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert sorted(facts._doubles()) == ["half 1.0 and 2.0", "onnxruntime and onnxruntime-openvino"]


def test_a_name_without_a_user_is_its_number() -> None:
    assert reach.group(4_000_000_000) == "4000000000"
