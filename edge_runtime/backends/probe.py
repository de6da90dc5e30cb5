"""Tries one backend by running a tiny model: `python -m edge_runtime.backends.probe NAME`.

Law of this file: it is a program of its own, because a library may end the process that imports it;
whoever starts it (`probing.py`) judges by how it ended. It prints one JSON document (`Answer`) on
stdout, whatever the library writes there; on stderr a line before each step (`STEP`), the last of
which says where a process died. It judges nothing: `diagnosis.py` does.

Exit code: 0 when there is an answer, also when the answer is an error; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_runtime.backends import BACKENDS, backend, tiny
from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import BackendError, EdgeError, UsageError, did_you_mean

STEP = "edge-probe: "  # how a step is announced on stderr
RUNS = 5  # the first one is paid once (lazy kernels); the fastest of the others is reported
CAUSES_MAX = 4  # of a chain of exceptions; the deepest say most, and chains are short


class Probe(NamedTuple):
    """What is tried under a name."""

    backend: str  # of BACKENDS
    model: str  # of tiny.MODELS
    library: str  # what pip calls it; empty: nothing to install
    extra: str = ""  # of edge-runtime, that brings it
    hidden: tuple[str, ...] = ()  # packages that the backend must not find: the other library's


# One backend may stand on either of two libraries; each is tried on its own.
PROBES: dict[str, Probe] = {
    "onnxruntime": Probe("onnxruntime", "onnx", "onnxruntime", "onnxruntime"),
    "openvino": Probe("openvino", "onnx", "openvino", "openvino"),
    "litert": Probe("litert", "tflite", "ai-edge-litert", "litert", ("tflite_runtime",)),
    "tflite-runtime": Probe("litert", "tflite", "tflite-runtime", "tflite", ("ai_edge_litert",)),
    "reference": Probe("reference", "reference", ""),
}


class Cause(msgspec.Struct, frozen=True):
    """One exception of a chain, outermost first."""

    type: str
    message: str
    name: str = ""  # of an ImportError: the module


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe prints."""

    name: str
    step: str  # the last one: STEPS
    version: str = ""
    numpy: str = ""
    import_s: float = 0.0
    load_s: float = 0.0
    run_s: float = 0.0
    placement: tuple[Placement, ...] = ()
    difference: float | None = None  # the largest from the right answer; None: there is no answer
    error: dict[str, Any] | None = None  # EdgeError.document()
    causes: tuple[Cause, ...] = ()


STEPS = ("import", "load", "run", "done")


def names() -> list[str]:
    """Everything that can be tried: each backend of the table, by each of its libraries."""
    known = [name for name, probe in PROBES.items() if probe.backend in BACKENDS]
    return known + [name for name in BACKENDS if name not in PROBES]


def main(words: list[str]) -> int:
    """Try, and print the answer."""
    sys_stdout = _own_stdout()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is an answer, not a case
    faulthandler.enable()
    try:
        name, options = _arguments(words)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    answer = _Attempt(name).made(options)
    with os.fdopen(sys_stdout, "wb") as out:
        out.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.flush()  # to stderr by now: a pipe is written to in blocks
    sys.stderr.flush()
    os._exit(0)  # what a library does at exit is not what was asked


class _Attempt:
    """One try; what is known of it when a step fails stays known."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[str, Any] = {}
        self._step = ""

    def made(self, options: dict[str, Any]) -> Answer:
        """Take all steps, or as many as can be taken."""
        try:
            self._try(options)
            self._begin("done")
        except EdgeError as error:
            self._failed(error, error)
        except Exception as error:  # noqa: BLE001 - foreign code raises anything, and that is an answer
            self._failed(BackendError(f"{type(error).__name__}: {error}"), error)
        numpy = sys.modules.get("numpy")
        self._known["numpy"] = str(getattr(numpy, "__version__", ""))
        return Answer(name=self._name, step=self._step, **self._known)

    def _try(self, options: dict[str, Any]) -> None:
        probe = PROBES.get(self._name)
        if probe is None:
            raise UsageError(
                f"there is no tiny model for {self._name!r}",
                expected="one of " + ", ".join(PROBES),
                remedy=did_you_mean(self._name, PROBES),
            )
        for module in probe.hidden:
            sys.modules[module] = None  # type: ignore[assignment]  # importing it fails
        self._begin("import")
        library = backend(probe.backend)
        self._known["version"] = library.version()
        self._finish("import_s")
        import numpy as np

        self._begin("load")
        model = library.load(_artifact(tiny.MODELS[probe.model]()), options)
        self._known["placement"] = tuple(model.placement)
        self._finish("load_s")
        self._begin("run")
        (given,), (wanted,) = model.inputs, model.outputs
        x = np.array([tiny.INPUT], np.float32)
        times_s, difference = [], 0.0
        for _ in range(RUNS):
            began_s = time.perf_counter()
            y = model.run({given.name: x})[wanted.name]
            times_s.append(time.perf_counter() - began_s)
            found = float(np.abs(y.reshape(-1) - np.array(tiny.answer())).max())
            # Not a number is as wrong as can be, and JSON cannot say it.
            difference = max(difference, found if math.isfinite(found) else sys.float_info.max)
        self._known["difference"] = difference
        self._known["run_s"] = min(times_s[1:])

    def _begin(self, step: str) -> None:
        self._step, self._began_s = step, time.perf_counter()
        print(STEP + step, file=sys.stderr, flush=True)

    def _finish(self, key: str) -> None:
        self._known[key] = time.perf_counter() - self._began_s

    def _failed(self, error: EdgeError, raised: BaseException) -> None:
        self._known["error"] = error.document()
        self._known["causes"] = tuple(_chain(raised))[:CAUSES_MAX]


def _chain(error: BaseException | None) -> list[Cause]:
    causes: list[Cause] = []
    while error is not None and len(causes) < 16:
        name = str(getattr(error, "name", None) or "") if isinstance(error, ImportError) else ""
        causes.append(Cause(type(error).__name__, str(error)[:600], name))
        error = error.__cause__ or error.__context__
    return causes


def _artifact(data: bytes) -> Path:
    """The model as a file that needs no disk: /tmp may be full, and that is another check."""
    fd = os.memfd_create("tiny-model")
    os.write(fd, data)
    return Path(f"/proc/self/fd/{fd}")


def _own_stdout() -> int:
    """A descriptor of stdout for the answer; what anybody else prints goes to stderr."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


def _arguments(words: list[str]) -> tuple[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="edge_runtime.backends.probe")
    parser.add_argument("name", choices=names(), metavar="NAME")
    parser.add_argument("--options", default="{}", metavar="JSON", help="as in a variant")
    parsed = parser.parse_args(words)
    try:
        options = json.loads(parsed.options)
    except ValueError as error:
        raise UsageError(f"is not JSON: {error}", where="--options") from error
    if not isinstance(options, dict):
        raise UsageError("is not a JSON object", where="--options", expected='{"threads": 2}')
    return parsed.name, options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
