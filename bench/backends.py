"""Each backend against plain calls of its own library: what serving adds, and that answers agree.

Law of this file: the table CASES, and one child for each side of a row: `python -m bench.backends
ORDER` calls the library as its documentation shows, or the daemon, on the same input. Both sides
run on one core, one thread, in interleaved rounds.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench import proc
from bench.child import WARMUP_CALLS, Child, timed
from bench.daemon import Daemon
from bench.scenario import BenchError, Latency, Result, Setting
from bench.summary import Figure, Target, per_round, quantile, spread
from edge_runtime.backends import backend
from edge_runtime.client import Client

FASHION_MNIST = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist"
ALLOWED_US = 60.0  # what a call may cost beyond 5 % of the library's own
DIFFERENCE_MAX = 1e-5  # of answers: the daemon may run a batch size or a layout of its own choice
CREATE_TIMEOUT_S = 120.0

# A call without arguments that answers with the first output.
Call = Callable[[], Any]


class Case(NamedTuple):
    """A file on a backend; `library`: the module without which it is left out."""

    backend: str
    library: str
    file: str


CASES: Mapping[str, Case] = {
    "ort-fp32": Case("onnxruntime", "onnxruntime", "fp32.onnx"),
    "ort-int8": Case("onnxruntime", "onnxruntime", "int8.onnx"),
    "openvino-fp32": Case("openvino", "openvino", "fp32.onnx"),
    "openvino-int8": Case("openvino", "openvino", "int8.onnx"),
    "litert-fp32": Case("litert", "ai_edge_litert", "fp32.tflite"),
    "litert-int8": Case("litert", "ai_edge_litert", "static.tflite"),
}


class Order(msgspec.Struct, frozen=True):
    """What a child is to measure: `peer` is "library" or "edge", `socket` the daemon's."""

    peer: str
    core: int
    case: str
    socket: str


# --- the libraries, called as their documentation shows -------------------------------------------


def _onnxruntime(path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    feed = {given.name: image(given.shape)}
    return lambda: session.run(None, feed)[0]


def _openvino(path: Path) -> Call:
    import openvino

    told = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", told)
    shape = [1 if size.is_dynamic else size.get_length() for size in compiled.input().partial_shape]
    given = image(shape)
    return lambda: compiled(given)[0]


def _litert(path: Path) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    x = image(given["shape"])

    def call() -> Any:
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(wanted["index"])

    return call


LIBRARIES: Mapping[str, Callable[[Path], Call]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": _litert,
}


def image(shape: Any) -> np.ndarray[Any, Any]:
    """The same numbers for everybody; free sizes (names, -1) are 1."""
    sizes = [size if isinstance(size, int | np.integer) and size > 0 else 1 for size in shape]
    return np.random.default_rng(0).random(sizes, dtype=np.float32)


def _edge(order: Order) -> Call:
    client = Client(order.socket)
    (given,) = client.metadata(order.case)["inputs"]
    feed = {given["name"]: image(given["shape"])}
    return lambda: next(iter(client.infer(order.case, feed).values()))


def main(order_json: str) -> None:
    """Serve measurements until stdin ends; "answer" asks for the output."""
    order = msgspec.json.decode(order_json, type=Order)
    os.sched_setaffinity(0, {order.core})
    case = CASES[order.case]
    if order.peer == "library":
        backend(case.backend).version()  # our doors keep libraries from reporting to their makers
        call = LIBRARIES[case.backend](FASHION_MNIST / case.file)
    else:
        call = _edge(order)
    timed(call, WARMUP_CALLS)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = line.strip()
        told = call().reshape(-1).tolist() if asked == "answer" else timed(call, int(asked))
        print(msgspec.json.encode(told).decode(), flush=True)


# --- the scenario ---------------------------------------------------------------------------------


def measure(setting: Setting) -> Result:
    """All rows whose library is installed. Raises BenchError."""
    results = []
    missing = []
    for name, case in CASES.items():
        if find_spec(case.library) is None:
            missing.append(case.library)
            continue
        setting.say(f"backends: {name}")
        results.append(_measure(name, case, setting))
    if not results:
        raise BenchError("no backend's library is installed")
    whole = Result(
        [figure for one in results for figure in one.figures],
        [latency for one in results for latency in one.latencies],
        {peer: values for one in results for peer, values in one.samples.items()},
    )
    remark = f"not installed: {', '.join(dict.fromkeys(missing))}" if missing else ""
    return dataclasses.replace(whole, remark=remark)


def _measure(name: str, case: Case, setting: Setting) -> Result:
    core = proc.cores()[0]
    rounds, calls = (3, 10) if setting.quick else (40, 100)
    config = f"models:\n  {name}:\n    cpuset: '{core}'\n"
    with Daemon(setting.directory / name, config) as daemon, ExitStack() as stack:
        daemon.install(_bundle(name, case, setting.directory / name))
        children = {}
        for peer in ("library", "edge"):
            order = Order(peer, core, name, str(daemon.infer_socket))
            children[peer] = stack.enter_context(Child(order, "bench.backends"))
            children[peer].wait_until_ready()
        answers = {peer: np.array(child.ask("answer")) for peer, child in children.items()}
        times = _rounds(children, rounds, calls)
    return _result(name, times, float(np.abs(answers["edge"] - answers["library"]).max()))


def _bundle(name: str, case: Case, directory: Path) -> Path:
    path = directory / f"{name}.bundle"
    command = [sys.executable, "-m", "edge_runtime", "bundle", "create", "--name", name]
    command += [f"{case.backend}={FASHION_MNIST / case.file}", "-o", str(path), "--goldens", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CREATE_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchError(f"no bundle of {name}: {done.stderr.strip()}")
    return path


def _rounds(children: Mapping[str, Child], rounds: int, calls: int) -> dict[str, list[list[int]]]:
    """Nanoseconds: peer -> round -> call; nobody always comes first."""
    rng = random.Random(0)
    times: dict[str, list[list[int]]] = {peer: [] for peer in children}
    order = list(children)
    for _ in range(rounds):
        rng.shuffle(order)
        for peer in order:
            times[peer].append(children[peer].measure(calls))
    return times


def _result(name: str, times: Mapping[str, list[list[int]]], difference: float) -> Result:
    p50_us = {peer: [quantile(one, 0.5) / 1e3 for one in each] for peer, each in times.items()}
    figures = [
        Figure(
            f"{name}: (served - {ALLOWED_US:g} us) / in process",
            per_round(p50_us, lambda us: (us["edge"] - ALLOWED_US) / us["library"]),
            "x",
            Target(1.05),
        ),
        Figure(f"{name}: added", per_round(p50_us, lambda us: us["edge"] - us["library"]), "us"),
        Figure(f"{name}: answers differ by", spread([difference]), "", Target(DIFFERENCE_MAX)),
    ]
    latencies = []
    for peer, label in (("library", "in process"), ("edge", "served")):
        every_us = [ns / 1e3 for one in times[peer] for ns in one]
        tail = quantile(every_us, 0.95), quantile(every_us, 0.99)
        spread_us = spread(p50_us[peer])
        latencies.append(Latency(f"{name}-{peer}", f"{name}, {label}", spread_us, *tail))
    return Result(figures, latencies, {f"{name}-{peer}": values for peer, values in p50_us.items()})


if __name__ == "__main__":
    main(sys.argv[1])
