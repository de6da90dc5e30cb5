"""Probes of real libraries, and of libraries that fail in each of the ways that we have met."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from edge_runtime.backends import BACKENDS, diagnosis, probe, probing, tiny
from edge_runtime.backends.diagnosis import Diagnosis, Outcome, Processor
from edge_runtime.bundle.lint import BACKEND_FORMATS

PI_4 = Processor(
    "aarch64", "Cortex-A72", frozenset({"fp", "asimd", "evtstrm", "crc32", "cpuid"})
)  # its /proc/cpuinfo, which has neither LSE atomics nor a dot product


def tried(
    name: str,
    options: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    timeout_s: float = 30,
) -> Diagnosis:
    outcome = probing.probe(name, options, timeout_s=timeout_s, environment=environment)
    return diagnosis.diagnose(outcome, Processor("x86_64", "Test CPU", frozenset({"avx"})))


def fault(action: str, **more: object) -> dict[str, object]:
    return {"faults": [{"action": action, **more}]}


def fake(directory: Path, package: str, code: str) -> dict[str, str]:
    """An environment in which `package` is this code."""
    (directory / package).mkdir(parents=True)
    (directory / package / "__init__.py").write_text(code)
    here = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": f"{directory}:{here}"}


# --- the models -----------------------------------------------------------------------------------


def test_the_carried_models_are_those_that_the_script_makes() -> None:
    from tests.doctor import models

    assert tiny.MODELS["onnx"]() == models.onnx_model()
    pytest.importorskip("flatbuffers", reason="flatbuffers writes .tflite files")
    pytest.importorskip("ai_edge_litert", reason="LiteRT brings the schema of .tflite files")
    assert tiny.MODELS["tflite"]() == models.tflite_model()


def test_the_known_answer_is_what_the_onnx_specification_says() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(tiny.MODELS["onnx"]())
    onnx.checker.check_model(model, full_check=True)
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.array([tiny.INPUT], np.float32)})
    assert y.tolist() == [tiny.answer()]
    assert 0 < sum(value > 0 for value in tiny.answer()) < tiny.WIDTH  # the relu has work to do


def test_every_backend_has_a_tiny_model_of_a_format_that_it_takes() -> None:
    for name in BACKENDS:
        rows = [row for row in probe.PROBES.values() if row.backend == name]
        assert rows, f"{name} has no row in PROBES"
        assert all(row.model in BACKEND_FORMATS[name] for row in rows)


# --- what is installed ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", probe.names())
def test_what_is_installed_gives_the_right_answer(name: str) -> None:
    found = tried(name)
    if found.cause == "missing_package":
        pytest.skip(found.summary)
    assert found.cause == "ok", found
    assert "right answer on" in found.summary


def test_the_answer_is_one_document_whatever_a_library_prints(tmp_path: Path) -> None:
    noisy = "print('hello from a library')\nimport os\nos.write(1, b'and from its C part')\n"
    environment = fake(tmp_path, "onnxruntime", noisy + "raise ImportError('odd')\n")
    outcome = probing.probe("onnxruntime", environment=environment)
    assert outcome.answer is not None
    assert "hello from a library" in outcome.stderr and "C part" in outcome.stderr


# --- what goes wrong ------------------------------------------------------------------------------

KILLS = "import os, signal\nos.kill(os.getpid(), signal.{})\n"
RAISES = "raise ImportError({!r})\n"
IMPORTS = [
    # a fake library, the cause, a word of the summary, a word of the remedy
    (KILLS.format("SIGILL"), "illegal_instruction", "no SSE4.1", "another version"),
    (KILLS.format("SIGSEGV"), "crashed", "SIGSEGV", "another version"),
    (KILLS.format("SIGABRT"), "crashed", "at import", "another version"),
    (KILLS.format("SIGKILL"), "killed", "memory ran out", "free memory"),
    ("import os\nos._exit(3)\n", "no_answer", "exit code 3", "again"),
    (
        "import nowhere_to_be_found\n",
        "missing_package",
        "needs nowhere_to_be_found",
        "pip install",
    ),
    (
        RAISES.format("libcudnn.so.9: cannot open shared object file: No such file or directory"),
        "missing_library",
        "libcudnn.so.9",
        "install cuDNN",
    ),
    (
        RAISES.format("/lib/libc.so.6: version `GLIBC_2.38' not found (required by x.so)"),
        "wrong_build",
        "GLIBC_2.38",
        "older",
    ),
    (RAISES.format("x.so: wrong ELF class: ELFCLASS32"), "wrong_build", "x86_64", "reinstall"),
    (
        RAISES.format("numpy.core.multiarray failed to import"),
        "numpy_clash",
        "another major version",
        "--upgrade",
    ),
]


@pytest.mark.parametrize(
    ("code", "cause", "says", "remedy"), IMPORTS, ids=[f"{row[1]}-{row[2]}" for row in IMPORTS]
)
def test_a_library_that_fails_at_import_is_told_apart(
    code: str, cause: str, says: str, remedy: str, tmp_path: Path
) -> None:
    found = tried("onnxruntime", environment=fake(tmp_path, "onnxruntime", code))
    assert (found.cause, says in found.summary, remedy in found.remedy) == (cause, True, True), (
        found
    )
    assert not found.works


def test_a_library_that_is_not_there_names_the_extra(tmp_path: Path) -> None:
    gone = "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')"
    found = tried("onnxruntime", environment=fake(tmp_path, "onnxruntime", gone))
    assert found.cause == "missing_package"
    assert found.remedy == "pip install 'edge-runtime[onnxruntime]'"


@pytest.mark.parametrize(
    ("options", "cause", "says"),
    [
        (fault("wrong"), "wrong_answer", "off"),
        (fault("segv"), "crashed", "first run"),
        (fault("ill"), "illegal_instruction", "first run"),
        (fault("abort", at="load"), "crashed", "while it loads"),
        (fault("raise"), "failed", "first run"),
        (fault("wrong", first_run=4), "wrong_answer", "off"),
        ({"no_such_option": 1}, "refused_options", "no_such_option"),
    ],
)
def test_a_library_that_fails_at_work_is_told_apart(
    options: dict[str, object], cause: str, says: str
) -> None:
    found = tried("reference", options)
    assert found.cause == cause, found
    assert says in found.summary


def test_a_hang_is_ended_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "grandchild"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(marker)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    began_s = time.monotonic()
    found = tried("onnxruntime", environment=fake(tmp_path, "onnxruntime", code), timeout_s=1.5)
    assert time.monotonic() - began_s < 5
    assert found.cause == "hang"
    assert "at import" in found.summary
    pid = int(marker.read_text())
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline_s:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break  # dead; its new parent has not looked yet
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_provider_that_is_not_there_says_so() -> None:
    pytest.importorskip("onnxruntime", reason="asks onnxruntime for a provider that it lacks")
    found = tried("onnxruntime", {"providers": ["QNNExecutionProvider"]})
    assert found.cause == "missing_provider", found
    assert "QNN" in found.summary and found.remedy


def test_the_document_names_every_cause() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "doctor.md").read_text()
    assert [cause for cause in get_args(diagnosis.Cause) if f"`{cause}`" not in page] == []


# --- verdicts that need no process ----------------------------------------------------------------


def answered(**more: object) -> Outcome:
    given = {"name": "onnxruntime", "step": "done", "version": "1.21.0", "difference": 0.0, **more}
    return Outcome(
        name="onnxruntime",
        exit_code=0,
        step="done",
        answer=probe.Answer(**given),  # type: ignore[arg-type]
    )


def test_an_illegal_instruction_names_what_the_processor_lacks() -> None:
    found = diagnosis.diagnose(Outcome(name="onnxruntime", exit_code=-4, step="import"), PI_4)
    assert "Cortex-A72 has no LSE atomics" in found.summary
    assert "dot product" in found.summary and "Advanced SIMD" not in found.summary


def test_an_unknown_processor_is_said_to_be_unknown() -> None:
    found = diagnosis.diagnose(Outcome(name="onnxruntime", exit_code=-4), Processor("riscv64"))
    assert "not known" in found.summary


def test_falling_back_to_the_cpu_is_no_success() -> None:
    on_cpu = answered(placement=(probe.Placement("CPU", "CPUExecutionProvider", 2),))
    found = diagnosis.diagnose(on_cpu, PI_4, diagnosis.Wanted(device_class="npu"))
    assert found.cause == "not_on_accelerator"
    on_npu = answered(placement=(probe.Placement("NPU", "QNN", 2),))
    assert diagnosis.diagnose(on_npu, PI_4, diagnosis.Wanted(device_class="npu")).cause == "ok"


def test_a_version_that_the_profile_locks_out_still_works() -> None:
    found = diagnosis.diagnose(answered(), PI_4, diagnosis.Wanted(locked="!=1.21.0"))
    assert found.cause == "version_locked"
    assert found.works
    assert found.remedy == "pip install 'onnxruntime!=1.21.0'"


def test_not_a_number_is_wrong() -> None:
    assert diagnosis.diagnose(answered(difference=sys.float_info.max), PI_4).cause == "wrong_answer"
    assert diagnosis.diagnose(answered(difference=None), PI_4).cause == "wrong_answer"


def test_tflite_runtime_with_numpy_2_is_recognised_by_what_it_really_raises() -> None:
    """The texts are those of tflite-runtime 2.14.0 with numpy 2.4.6, at the first Interpreter."""
    causes = (
        probe.Cause("SystemError", "<built-in method CreateWrapperFromBuffer of PyCapsule object>"),
        probe.Cause("ImportError", "numpy.core.multiarray failed to import"),
    )
    document = {"code": "backend_failed", "message": "SystemError: returned a result with an error"}
    answer = probe.Answer(
        name="tflite-runtime", step="load", numpy="2.4.6", error=document, causes=causes
    )
    outcome = Outcome(name="tflite-runtime", exit_code=0, step="load", answer=answer)
    found = diagnosis.diagnose(outcome, PI_4)
    assert found.cause == "numpy_clash"
    assert "numpy 2.4.6" in found.summary and "numpy<2" in found.remedy


def test_tflite_runtime_with_numpy_2_names_the_clash_and_both_ways_out(tmp_path: Path) -> None:
    if int(np.__version__.partition(".")[0]) < 2:
        pytest.skip("numpy 1 is installed, which tflite-runtime works with")
    environment = fake(tmp_path, "tflite_runtime", "__version__ = '2.14.0'\n")
    (tmp_path / "tflite_runtime" / "interpreter.py").write_text(
        "class Interpreter:\n"
        "    def __init__(self, **_):\n"
        "        raise ImportError('numpy.core.multiarray failed to import')\n"
        "OpResolverType = load_delegate = None\n"
    )
    found = tried("tflite-runtime", environment=environment)
    assert found.cause == "numpy_clash", found
    assert f"numpy {np.__version__}" in found.summary
    assert "numpy<2" in found.remedy and "ai-edge-litert" in found.remedy


def test_a_checkout_that_is_not_installed_is_no_fault_of_the_library() -> None:
    words = [sys.executable, "-S", "-P", "-m", "edge_runtime.backends.probe", "reference"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PATH": ""}, timeout=30
    )
    outcome = Outcome(name="reference", exit_code=done.returncode, stderr=done.stderr)
    found = diagnosis.diagnose(outcome, PI_4)
    assert found.cause == "no_answer" and "PYTHONPATH" in found.remedy, found


def test_openvinos_auto_that_goes_to_the_cpu_is_noticed() -> None:
    pytest.importorskip("openvino", reason="asks OpenVINO for an NPU first")
    if Path("/dev/accel/accel0").exists():
        pytest.skip("this machine may have an NPU")
    options = {"device": "AUTO:NPU,CPU"}
    outcome = probing.probe("openvino", options)
    found = diagnosis.diagnose(outcome, PI_4, diagnosis.Wanted("npu", options))
    assert found.cause == "not_on_accelerator", found
    assert "NPU was asked for" in found.summary


def test_a_wrong_command_line_is_refused() -> None:
    for words in (["nobody"], ["reference", "--options", "{"], ["reference", "--options", "[]"]):
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime.backends.probe", *words],
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stderr and done.stdout == b""


def test_the_program_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime.backends.probe", "reference"],
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)["difference"] == 0.0
