"""`edge-runtime bundle ...` as users run it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cli
from edge_runtime.bundle import archive
from edge_runtime.cli import measuring, private
from tests.bundle.conftest import linear, linear_int8, saved
from tests.daemon.world import running

MIB = 1 << 20


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in a directory of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    saved(linear(), tmp_path / "fp32.onnx")
    saved(linear_int8(), tmp_path / "int8.onnx")

    def command(*words: str) -> tuple[int, str, str]:
        code = cli.main(["bundle", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


CREATE = ("create", "fp32.onnx", "int8.onnx", "--name", "tiny", "-o", "tiny.bundle")


def test_create_inspect_lint_extract_and_pack_work_together(run):
    code, out, err = run(*CREATE, "--label", "1.0", "--version", "2")
    assert code == 0
    assert "tiny@2 (1.0)" in out
    assert "int8" in out
    assert "recording golden 1 of 3 with fp32" in err
    code, out, _ = run("inspect", "tiny.bundle")
    assert code == 0
    assert "batch axis 0" in out
    code, out, _ = run("lint", "tiny.bundle")
    assert (code, out) == (0, "ok\n")
    assert run("extract", "tiny.bundle", "directory")[0] == 0
    assert run("pack", "directory", "-o", "again.bundle")[0] == 0
    assert Path("again.bundle").read_bytes() == Path("tiny.bundle").read_bytes()


def test_the_memory_that_is_stated_was_measured_and_holds(run):
    assert run(*CREATE)[0] == 0
    before = Path("tiny.bundle").read_bytes()
    code, out, err = run(*CREATE, "--measure", "--label", "9")
    assert code == 0, err
    assert "fp32 takes" in out and "int8 takes" in out
    assert "measuring the memory of fp32" in err
    with archive.open_bundle(Path("tiny.bundle")) as bundle:
        bundle.verify()
        stated_bytes = bundle.manifest.budgets.memory_bytes
        assert bundle.manifest.label == "9" and len(bundle.manifest.goldens) == 3
    assert 4 * MIB < stated_bytes < 64 * MIB and stated_bytes % MIB == 0
    assert out.rstrip().endswith(hashlib.sha256(Path("tiny.bundle").read_bytes()).hexdigest())
    with running() as daemon:  # which refuses what takes more than is stated
        daemon.install(Path("tiny.bundle").resolve())
        assert daemon.worker("tiny")["private_bytes"] < stated_bytes
    assert run(*CREATE)[0] == 0
    assert Path("tiny.bundle").read_bytes() == before  # without --measure, nothing is stated


def test_what_cannot_be_measured_is_said_and_nothing_is_stated(run, monkeypatch):
    monkeypatch.setattr(private.sys, "executable", "/bin/false")
    code, out, _ = run(*CREATE, "--measure")
    assert code == 0
    assert "fp32: its memory was not measured" in out and "did not start" in out
    with archive.open_bundle(Path("tiny.bundle")) as bundle:
        assert bundle.manifest.budgets.memory_bytes == 0


def test_a_budget_has_room_for_other_devices() -> None:
    def stated(*private_bytes: int) -> int:
        return measuring.budget_bytes([measuring.Measured("v", one) for one in private_bytes])

    assert stated(100 * MIB) == 154 * MIB
    assert stated(MIB, 3 * MIB + 1) == 9 * MIB  # the largest, rounded up
    assert stated(0) == stated() == 0


def test_json_is_the_whole_of_stdout(run):
    def answer(*words: str) -> Any:
        code, out, err = run(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    made = answer(*CREATE)
    assert made["sha256"]
    assert made["batch_axis"] == 0
    described = answer("inspect", "tiny.bundle")
    assert [variant["name"] for variant in described["variants"]] == ["fp32", "int8"]
    assert answer("lint", "tiny.bundle") == {"ok": True, "findings": []}
    assert answer("lint", "fp32.onnx") == {"ok": True, "findings": []}
    assert answer("extract", "tiny.bundle", "d")["directory"] == "d"
    assert answer("pack", "d", "-o", "x.bundle")["sha256"] == made["sha256"]


def test_everything_the_user_says_is_in_the_manifest(run):
    Path("labels.txt").write_text("shirt\nboot\n\nbag\nähm\n")
    code, _, err = run(
        *CREATE,
        *("--labels", "labels.txt", "--activation", "softmax", "--top-k", "2", "--goldens", "1"),
        *("--preprocess", "color=L", "layout=NHW", "width=8", "mean=0.5", "std=0.25"),
        *("--shape", "input=1,16", "--seed", "9"),
    )
    assert (code, "error" in err) == (0, False)
    with archive.open_bundle("tiny.bundle") as bundle:
        step, after = bundle.manifest.preprocess, bundle.manifest.postprocess
        assert len(bundle.manifest.goldens) == 1
    assert step is not None
    assert after is not None
    assert (step.color, step.layout, step.width, step.mean, step.std) == (
        "L",
        "NHW",
        8,
        (0.5,),
        (0.25,),
    )
    assert (after.labels, after.top_k, after.activation) == (
        ("shirt", "boot", "bag", "ähm"),
        2,
        "softmax",
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("create", "missing.onnx", "--name", "x", "-o", "x.bundle"), 3, "no such file"),
        (("create", "fp32.onnx", "--name", "X!", "-o", "x.bundle"), 4, "is not a name"),
        (("create", "fp32.onnx", "--name", "x", "-o", "no/dir/x.bundle"), 9, "cannot be written"),
        (("create", "fp32.onnx", "-o", "x.bundle"), 2, "--name"),
        ((*CREATE, "--goldens", "x"), 2, "whole number"),
        ((*CREATE, "--goldens", "1001"), 2, "at most 1000"),
        ((*CREATE, "--shape", "input"), 2, "input=1,3,64,64"),
        ((*CREATE, "--shape", "input=1,x"), 2, "input=1,3,64,64"),
        ((*CREATE, "--preprocess", "colour=L"), 2, "did you mean 'color'?"),
        ((*CREATE, "--preprocess", "width=wide"), 2, "wrong value"),
        ((*CREATE, "--labels", "missing.txt"), 3, "no such file"),
        ((*CREATE, "--labels", "int8.onnx"), 2, "not UTF-8"),
        ((*CREATE, "--samples", "fp32.onnx"), 4, "cannot be read"),
        (("inspect", "fp32.onnx"), 4, "does not begin as a bundle does"),
        (("inspect", "missing.bundle"), 3, "no such file"),
        (("extract", "fp32.onnx", "d"), 4, "does not begin as a bundle does"),
        (("pack", ".", "-o", "x.bundle"), 3, "model.yaml"),
        (("lint", "missing.onnx"), 3, "no such file"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_mistakes_have_their_exit_code_and_say_what_is_wrong(run, words, code, message):
    got, _, err = run(*words)
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_lint_of_a_bad_model_prints_the_findings_and_exits_with_4(run):
    Path("bad.onnx").write_bytes(b"\x80\x04\x95 not a model")
    code, out, _ = run("lint", "bad.onnx")
    assert code == 4
    assert out.splitlines()[-1] == "refused"
    assert "pickle" in out
    code, out, _ = run("lint", "bad.onnx", "--json")
    assert code == 4
    assert json.loads(out)["ok"] is False


def test_lint_of_a_bundle_reads_every_byte(run):
    run(*CREATE)
    data = bytearray(Path("tiny.bundle").read_bytes())
    data[-1600] ^= 1
    Path("tiny.bundle").write_bytes(data)
    assert run("lint", "tiny.bundle")[0] == 4


def test_extract_refuses_a_directory_with_content(run):
    run(*CREATE)
    Path("full").mkdir()
    Path("full/file").write_text("x")
    code, _, err = run("extract", "tiny.bundle", "full")
    assert code == 10
    assert "not empty" in err


def test_a_label_cannot_drive_the_terminal(run):
    assert run(*CREATE, "--label", "a\x1b[2Jb")[0] == 4


def test_the_module_runs_and_looking_loads_no_numpy(run, tmp_path):
    run(*CREATE)
    code = (
        "import sys; from edge_runtime import cli; "
        "code = cli.main(['bundle', 'inspect', 'tiny.bundle']); "
        "sys.exit(code or ('numpy' in sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert child.returncode == 0
