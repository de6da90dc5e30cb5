"""What the end of a probe means, and what to do about it.

Law of this file: pure. How a probe ended and what the processor can do go in, a verdict with its
remedy comes out. Each way to fail has a rule of its own in RULES, tried in that order; a rule that
does not apply returns None. The texts of foreign libraries that are recognised stand in the tables
below with where they come from.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from edge_runtime.backends.placement import fallen_back
from edge_runtime.backends.probe import PROBES, Answer, Probe

# The tiny models' answers are small integers, which every float format holds: any difference is
# wrong; this much is for an accelerator that computes in steps of its own.
TOLERANCE = 1e-3

Cause = Literal[
    "ok",
    "missing_package",
    "numpy_clash",
    "illegal_instruction",
    "crashed",
    "killed",
    "hang",
    "missing_library",
    "wrong_build",
    "missing_provider",
    "no_permission",
    "refused_options",
    "failed",
    "wrong_answer",
    "not_on_accelerator",
    "version_locked",
    "no_answer",
]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a probe ended.

    Attributes:
        exit_code: negative: the signal that ended it; None: it was stopped after `waited_s`.
        step: the last one that it began.
        stderr: the end of what it and its library wrote there.
    """

    name: str
    exit_code: int | None
    waited_s: float = 0.0
    step: str = ""
    answer: Answer | None = None
    stderr: str = ""


class Processor(msgspec.Struct, frozen=True):
    """What /proc/cpuinfo says."""

    arch: str = ""  # uname's machine
    model: str = ""
    flags: frozenset[str] = frozenset()


class Wanted(msgspec.Struct, frozen=True):
    """What was expected of a probe beyond a right answer.

    Attributes:
        device_class: "cpu", or where it had to run.
        options: with which it was probed.
        locked: the version lock that the library does not satisfy; empty: it does, or has none.
    """

    device_class: str = "cpu"
    options: Mapping[str, Any] = {}
    locked: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """What is the matter, in a sentence, and what to do."""

    cause: Cause
    summary: str
    remedy: str = ""

    @property
    def works(self) -> bool:
        """Whether the backend can serve: a version that was locked out answered rightly."""
        return self.cause in ("ok", "version_locked")


def diagnose(outcome: Outcome, processor: Processor, wanted: Wanted | None = None) -> Diagnosis:
    """The first rule that applies."""
    for rule in RULES:
        found = rule(outcome, processor, wanted or Wanted())
        if found is not None:
            return found
    raise AssertionError("the last rule always applies")


def probe_of(name: str) -> Probe:
    """What is tried under a name; a name without a row stands for itself."""
    return PROBES.get(name) or Probe(name, "", name)


# --- the words of others ------------------------------------------------------------------------

# numpy 2 with a module built for numpy 1 (numpy's own notice; what tflite-runtime 2.14 raises at
# the first Interpreter; what our backend makes of it); numpy 1 with a module built for numpy 2.
_CLASH = (
    "compiled using NumPy 1.x",
    "_ARRAY_API not found",
    "core.multiarray failed to import",
    "numpy.core._multiarray_umath failed to import",
    "numpy.dtype size changed",
    "does not work with numpy",
)
# The dynamic linker's messages (glibc, elf/dl-load.c and elf/dl-version.c).
_NO_LIBRARY = re.compile(r"(lib[\w.+-]+): cannot open shared object file")
_OTHER_BUILD = {
    "GLIBC": re.compile(r"version [`']?((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)'? not found"),
    "ELF": re.compile(r"(wrong ELF class|invalid ELF header|Exec format error)"),
}
_NO_PERMISSION = re.compile(r"permission denied|operation not permitted|EACCES", re.IGNORECASE)
_NO_PROVIDER = re.compile(r"no provider|not registered|device with .* name is not|no available dev")
_PACKAGES = {"onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime"}

# Who brings a shared library: the beginning of its name -> what to do.
_BRINGS = {
    "libcuda": "install the NVIDIA driver",
    "libcudnn": "install cuDNN of the version that this wheel was built with",
    "libcublas": "install CUDA of the version that this wheel was built with",
    "libnvinfer": "install TensorRT of the version that this wheel was built with",
    "libedgetpu": "install the Coral runtime (package libedgetpu1-std)",
    "libOpenCL": "install an OpenCL driver (package ocl-icd-libopencl1 and the GPU's own)",
    "libze": "install the Level Zero driver of the GPU or NPU (Intel: intel-level-zero-npu)",
    "libQnn": "install the Qualcomm AI Runtime of this wheel's version",
    "librknn": "install Rockchip's librknnrt of the kernel driver's version",
    "libgomp": "install the package libgomp1",
}

# Instruction sets in the order in which processors got them: cpuinfo's word -> its usual name.
# Wheels pick kernels at run time, so that a wheel needs one of them by mistake only; the list says
# which ones it can have been.
_INSTRUCTION_SETS = {
    "x86_64": {
        "sse4_1": "SSE4.1",
        "sse4_2": "SSE4.2",
        "popcnt": "POPCNT",
        "avx": "AVX",
        "f16c": "F16C",
        "fma": "FMA",
        "avx2": "AVX2",
        "avx512f": "AVX-512",
    },
    "aarch64": {
        "asimd": "Advanced SIMD",
        "crc32": "CRC32",
        "atomics": "LSE atomics (Armv8.1)",
        "asimdhp": "half precision (Armv8.2)",
        "asimddp": "dot product (Armv8.2)",
        "i8mm": "int8 matrix multiply (Armv8.6)",
        "sve": "SVE",
    },
}
_LACKING_MAX = 4  # the oldest ones are the likely ones


# --- the rules ----------------------------------------------------------------------------------


def _numpy_clash(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    if outcome.exit_code == 0 and not _error(outcome):
        return None  # a notice that did no harm
    if not any(text in _said(outcome) for text in _CLASH):
        return None
    library = probe_of(outcome.name).library
    version = outcome.answer.numpy if outcome.answer else ""
    which = f"numpy {version}" if version else "this numpy"
    return Diagnosis(
        "numpy_clash",
        f"{library} imports, but cannot work with {which}: it was built for another major version",
        "pip install 'numpy<2' in this environment (openvino, onnxruntime and LiteRT work with it "
        f"too), or remove {library} and install ai-edge-litert"
        if library == "tflite-runtime"
        else f"pip install --upgrade {library} numpy, so that both are of one age",
    )


def _hang(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    if outcome.exit_code is not None:
        return None
    return Diagnosis(
        "hang",
        f"hangs: no answer {_at(outcome)} after {outcome.waited_s:g} s; it was stopped",
        "a driver that does not answer often needs a restart of the machine; if the machine is "
        "merely slow, give more time: `edge-runtime doctor --timeout 120`",
    )


def _illegal_instruction(outcome: Outcome, processor: Processor, _: Wanted) -> Diagnosis | None:
    if outcome.exit_code != -signal.SIGILL:
        return None
    library = probe_of(outcome.name).library or outcome.name
    known = _INSTRUCTION_SETS.get(processor.arch, {})
    lacking = [name for word, name in known.items() if word not in processor.flags][:_LACKING_MAX]
    who = processor.model or "this processor"
    if not processor.flags:
        which = "which instruction sets the processor has is not known"
    elif lacking:
        which = f"{who} has no " + ", ".join(lacking)
    else:
        which = f"{who} has every instruction set that we know of"
    return Diagnosis(
        "illegal_instruction",
        f"ends {_at(outcome)} with an illegal instruction (SIGILL): {which}",
        f"install another version of {library} (an older wheel often works; "
        "`edge-runtime profile show` names versions that are known to), or use another backend",
    )


def _signal(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    if outcome.exit_code is None or outcome.exit_code >= 0:
        return None
    number = -outcome.exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return Diagnosis(
            "killed",
            f"was killed {_at(outcome)} (SIGKILL), most likely because memory ran out",
            "free memory or raise the memory limit of this session; `dmesg` names what was killed",
        )
    library = probe_of(outcome.name).library or outcome.name
    return Diagnosis(
        "crashed",
        f"crashes {_at(outcome)} ({name}){_last_file(outcome.stderr)}",
        f"install another version of {library}; if an accelerator's driver is in use, install the "
        "version that belongs to it",
    )


def _no_answer(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    if outcome.answer is not None:
        return None
    if "No module named 'edge_runtime" in outcome.stderr:
        return Diagnosis(
            "no_answer",
            "was not tried: a program started by this Python does not find edge_runtime",
            "pip install edge-runtime, or name the checkout in PYTHONPATH; workers need it too",
        )
    last = (outcome.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
    return Diagnosis(
        "no_answer",
        f"ended {_at(outcome)} with exit code {outcome.exit_code} and no answer: {last}",
        "install the library again (pip install --force-reinstall)",
    )


def _missing_package(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    assert outcome.answer is not None
    if not _error(outcome):
        return None
    missing = [c.name.partition(".")[0] for c in outcome.answer.causes if _is_missing(c.type)]
    if not missing:
        return None
    row = probe_of(outcome.name)
    if missing[0] in _PACKAGES:
        remedy = f"pip install 'edge-runtime[{row.extra}]'" if row.extra else "install it"
        return Diagnosis("missing_package", f"{row.library} is not installed", remedy)
    return Diagnosis(
        "missing_package",
        f"{row.library or outcome.name} needs {missing[0]}, which is not installed",
        f"pip install 'edge-runtime[{row.extra or missing[0]}]'",
    )


def _missing_library(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis | None:
    found = _NO_LIBRARY.search(_said(outcome)) if _error(outcome) else None
    if found is None:
        return None
    name = found[1]
    brings = next((text for start, text in _BRINGS.items() if name.startswith(start)), "")
    return Diagnosis(
        "missing_library",
        f"the shared library {name} is missing",
        brings or f"install the system package or the driver that brings {name}",
    )


def _wrong_build(outcome: Outcome, processor: Processor, _: Wanted) -> Diagnosis | None:
    if not _error(outcome):
        return None
    said, library = _said(outcome), probe_of(outcome.name).library or outcome.name
    if found := _OTHER_BUILD["GLIBC"].search(said):
        return Diagnosis(
            "wrong_build",
            f"{library} was built for a newer system: {found[1]} is missing",
            f"install an older {library}, or a newer system",
        )
    if found := _OTHER_BUILD["ELF"].search(said):
        return Diagnosis(
            "wrong_build",
            f"{library} was built for another processor than {processor.arch or 'this one'}: "
            + found[1],
            f"pip install --force-reinstall {library} on this machine",
        )
    return None


def _refused(outcome: Outcome, _: Processor, wanted: Wanted) -> Diagnosis | None:
    """What the backend itself explained, sorted by what the user can do."""
    error = _error(outcome)
    if not error:
        return None
    said = " ".join([error, *(c.message for c in outcome.answer.causes)]) if outcome.answer else ""
    document = (outcome.answer.error if outcome.answer else None) or {}
    remedy = str(document.get("remedy", ""))
    if _NO_PERMISSION.search(said):
        return Diagnosis(
            "no_permission",
            f"may not use its device: {error}",
            "see the device nodes below for the group to join",
        )
    if _NO_PROVIDER.search(said):
        return Diagnosis(
            "missing_provider",
            error,
            remedy or f"install the driver and the build of the library for {wanted.device_class}",
        )
    if document.get("code") == "invalid_config":
        return Diagnosis("refused_options", error, remedy or "correct the options")
    return Diagnosis("failed", f"failed {_at(outcome)}: {error}", remedy)


def _wrong_answer(outcome: Outcome, _: Processor, wanted: Wanted) -> Diagnosis | None:
    assert outcome.answer is not None
    difference = outcome.answer.difference
    if difference is not None and difference <= TOLERANCE:
        return None
    library = probe_of(outcome.name).library or outcome.name
    on = "" if wanted.device_class == "cpu" else f" on the {wanted.device_class}"
    off = "no answer at all" if difference is None else f"{difference:.3g} off"
    return Diagnosis(
        "wrong_answer",
        f"gives wrong answers{on}: a tiny model's answer is {off}",
        f"do not serve with it; install another version of {library}",
    )


def _not_on_accelerator(outcome: Outcome, _: Processor, wanted: Wanted) -> Diagnosis | None:
    assert outcome.answer is not None
    found = fallen_back(wanted.device_class, wanted.options, outcome.answer.placement)
    if found is None:
        return None
    return Diagnosis(
        "not_on_accelerator",
        f"answers rightly and without an error, but {found.reason}",
        "check the driver and its firmware (`dmesg`), and that the library has its plug-in",
    )


def _version_locked(outcome: Outcome, _: Processor, wanted: Wanted) -> Diagnosis | None:
    assert outcome.answer is not None
    if not wanted.locked:
        return None
    library = probe_of(outcome.name).library
    return Diagnosis(
        "version_locked",
        f"{outcome.answer.version} works here, but this machine's profile asks for {wanted.locked}",
        f"pip install '{library}{wanted.locked}'",
    )


def _ok(outcome: Outcome, _: Processor, __: Wanted) -> Diagnosis:
    answer = outcome.answer
    assert answer is not None
    devices = ", ".join(dict.fromkeys(place.device for place in answer.placement)) or "the CPU"
    return Diagnosis(
        "ok",
        f"{answer.version} gives the right answer on {devices} "
        f"(import {answer.import_s:.2f} s, load {answer.load_s * 1e3:.1f} ms, "
        f"run {answer.run_s * 1e6:.0f} us)",
    )


RULES: tuple[Callable[[Outcome, Processor, Wanted], Diagnosis | None], ...] = (
    _numpy_clash,
    _hang,
    _illegal_instruction,
    _signal,
    _no_answer,
    _missing_package,
    _missing_library,
    _wrong_build,
    _refused,
    _wrong_answer,
    _not_on_accelerator,
    _version_locked,
    _ok,
)


# --- helpers ------------------------------------------------------------------------------------

_DOING = {"import": "at import", "load": "while it loads a tiny model", "run": "at its first run"}


def _at(outcome: Outcome) -> str:
    return _DOING.get(outcome.step, "before it began" if not outcome.step else "at its end")


def _error(outcome: Outcome) -> str:
    document = outcome.answer.error if outcome.answer else None
    return str(document.get("message", "an error without words")) if document else ""


def _said(outcome: Outcome) -> str:
    """All its words: the error, the exceptions behind it, and stderr."""
    causes = [cause.message for cause in outcome.answer.causes] if outcome.answer else []
    return "\n".join([_error(outcome), *causes, outcome.stderr])


def _is_missing(exception: str) -> bool:
    return exception == "ModuleNotFoundError"


def _last_file(stderr: str) -> str:
    """The innermost Python line of faulthandler's report, if there is one."""
    found = re.search(r'most recent call first\):\s+File "([^"]+)", line (\d+)', stderr)
    return f" in {found[1]}:{found[2]}" if found else ""
