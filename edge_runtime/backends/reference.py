"""The reference backend: small models in numpy, with latency and faults on order.

Law of this file: it needs numpy only, is deterministic, and does to its own process whatever a bad
model, wheel or driver can do, when told to. It is the public testing kit: users test their own
integration with it (docs/backends.md), and we test the supervisor with it. It is not for speed.

An artifact is a JSON document (`*.reference.json`), see `Artifact`. `behaviour` in it, or the same
keys as options of the variant (which win), say how slow the model is and how it fails.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import msgspec
import numpy as np

from edge_runtime.backends import checks
from edge_runtime.backends import options as typed
from edge_runtime.backends.protocol import Placement
from edge_runtime.clock import Clock, SystemClock
from edge_runtime.errors import BackendError, RequestError, did_you_mean
from edge_runtime.tensors import DATATYPES, TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

FORMAT = "edge-runtime-reference"
# A toy's size: 16 MiB of JSON is some million weights; larger ones can be given by seed and shape.
ARTIFACT_SIZE_MAX = 16 * 1024 * 1024

Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=3_600_000)]  # an hour is "for ever" in a test


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that goes wrong.

    Attributes:
        action: see ACTIONS.
        at: while loading, or in a run.
        first_run: the first run of this process it happens in, counted from 1.
        last_run: the last one; none: it goes on.
        on_value: only in runs that have this number in an input.
        size_mb: for `allocate`: how much is kept for good, each time.
        exit_code: for `exit`.
    """

    action: Literal[
        "raise", "memory_error", "exit", "segv", "ill", "abort", "hang", "spin", "allocate", "wrong"
    ]
    at: Literal["load", "run"] = "run"
    first_run: Annotated[int, msgspec.Meta(ge=1)] = 1
    last_run: int | None = None
    on_value: float | None = None
    size_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`variants[n].options` of this backend, and `behaviour` of an artifact.

    Attributes:
        load_ms, run_ms: time added to a load and to each run.
        busy: spend it on the processor instead of sleeping.
        concurrent: what the loaded model says of itself.
        device_node: a file that stands for an accelerator: the model is placed there, and like the
            driver of a real one this backend refuses a node that another process has open.
        faults: in the order in which they are tried.
    """

    load_ms: Milliseconds = 0.0
    run_ms: Milliseconds = 0.0
    busy: bool = False
    concurrent: bool = True
    device_node: str = ""
    faults: tuple[Fault, ...] = ()


class Seeded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights from a seed: standard normal FP32, scaled by 1/sqrt(first dimension)."""

    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    shape: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]


Weights = Seeded | list[Any]


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: `output = op(*inputs)`, with the parameters that the op uses (see OPS)."""

    op: str
    inputs: tuple[str, ...]
    output: str
    weights: Weights | None = None
    bias: Weights | None = None
    scale: float = 1.0
    offset: float = 0.0
    axis: int = -1


class Artifact(msgspec.Struct, frozen=True):
    """The document of a model. Nodes run in order; outputs are checked against what they give."""

    format: Literal["edge-runtime-reference"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    behaviour: Behaviour = Behaviour()


def tiny(width: int = 16, classes: int = 4, seed: int = 0, **behaviour: Any) -> dict[str, Any]:
    """The document of a classifier: "input" FP32 [N, width] -> "output" FP32 [N, classes].

    Write it with `json.dumps` to a file; `behaviour` takes the fields of Behaviour.
    """
    return {
        "format": FORMAT,
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, width]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, classes]}],
        "nodes": [
            {
                "op": "matmul",
                "inputs": ["input"],
                "output": "output",
                "weights": {"seed": seed, "shape": [width, classes]},
            }
        ],
        "behaviour": behaviour,
    }


class Reference:
    """numpy as a backend. `sleep` and `clock` are arguments so that a test need not wait."""

    name = "reference"
    fork_safe = True

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, clock: Clock | None = None
    ) -> None:
        self._sleep = sleep
        self._clock = clock or SystemClock()

    def version(self) -> str:
        """numpy's version: it is what computes."""
        return str(np.__version__)

    def load(self, artifact: Path, options: Mapping[str, Any]) -> ReferenceModel:
        """See protocol.Backend.load; faults `at: load` happen here."""
        document = _read(artifact)
        typed.decode(Behaviour, options)  # before the merge, so that an error names an option
        behaviour = typed.decode(Behaviour, {**msgspec.to_builtins(document.behaviour), **options})
        graph = compile_graph(document, where=str(artifact))
        trouble = _Trouble(behaviour, self._sleep, self._clock)
        device = _open_node(Path(behaviour.device_node)) if behaviour.device_node else "CPU"
        trouble.at_load()
        return ReferenceModel(graph, trouble, device)


class ReferenceModel:
    """A loaded document. Runs count from 1 over all threads and bindings."""

    keeps_state = False
    facts: Mapping[str, Any] = {}

    def __init__(self, graph: _Graph, trouble: _Trouble, device: str) -> None:
        self.placement = (Placement(device, "numpy"),)
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.concurrent = trouble.behaviour.concurrent
        self._graph = graph
        self._trouble = trouble

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See protocol.Model.run."""
        checks.check_inputs(self.inputs, inputs)
        return self._run(inputs)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """See protocol.Model.bind. Inputs are read in place; outputs are computed, then copied."""
        checks.check_binding(self.inputs, self.outputs, inputs, outputs)
        arrays, wanted = dict(inputs), dict(outputs)

        def run_bound() -> dict[str, Array]:
            results = self._run(arrays)
            return {name: _deliver(name, results[name], out) for name, out in wanted.items()}

        return run_bound

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        is_wrong = self._trouble.at_run(inputs)
        results = _evaluate(self._graph, inputs)
        return {name: _spoil(array) for name, array in results.items()} if is_wrong else results


def _deliver(name: str, result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    checks.check_given(name, result, out)
    out[...] = result
    return out


# --- the computation: steps are functions of arrays, weights and a node's parameters ---


class _Step(NamedTuple):
    op: Callable[[_Step, list[Array]], Array]
    node: Node
    weights: Array | None
    bias: Array | None


class _Graph(NamedTuple):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[_Step, ...]


def _identity(_: _Step, arrays: list[Array]) -> Array:
    return arrays[0].copy()  # outputs are the caller's: never a view of an input


def _affine(step: _Step, arrays: list[Array]) -> Array:
    return (arrays[0] * step.node.scale + step.node.offset).astype(arrays[0].dtype)


def _add(_: _Step, arrays: list[Array]) -> Array:
    return np.asarray(sum(arrays[1:], start=arrays[0].copy()))


def _matmul(step: _Step, arrays: list[Array]) -> Array:
    assert step.weights is not None
    product = arrays[0] @ step.weights
    return product if step.bias is None else product + step.bias


def _relu(_: _Step, arrays: list[Array]) -> Array:
    return np.maximum(arrays[0], 0)


def _flatten(_: _Step, arrays: list[Array]) -> Array:
    return arrays[0].reshape(len(arrays[0]), math.prod(arrays[0].shape[1:])).copy()


def _softmax(step: _Step, arrays: list[Array]) -> Array:
    axis = step.node.axis
    powers = np.exp(arrays[0] - arrays[0].max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _argmax(step: _Step, arrays: list[Array]) -> Array:
    return np.asarray(arrays[0].argmax(axis=step.node.axis), dtype=np.int64)


OPS: dict[str, Callable[[_Step, list[Array]], Array]] = {
    "identity": _identity,
    "affine": _affine,  # x * scale + offset, in the datatype of x
    "add": _add,  # of all inputs
    "matmul": _matmul,  # x @ weights + bias
    "relu": _relu,
    "flatten": _flatten,  # [N, ...] -> [N, product]
    "softmax": _softmax,  # over axis
    "argmax": _argmax,  # over axis, INT64
}


def _evaluate(graph: _Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    values = dict(inputs)
    for step in graph.steps:
        values[step.node.output] = step.op(step, [values[name] for name in step.node.inputs])
    return {spec.name: values[spec.name] for spec in graph.outputs}


def _spoil(array: Array) -> Array:
    """Another answer of the same shape and datatype, far outside any sensible tolerance."""
    if array.dtype.kind in "SUO":
        return array[::-1].copy()
    return ~array if array.dtype.kind == "b" else (array + 1).astype(array.dtype)


# --- the document ---


def _read(artifact: Path) -> Artifact:
    try:
        with artifact.open("rb") as file:
            data = file.read(ARTIFACT_SIZE_MAX + 1)
    except OSError as e:
        raise BackendError(f"cannot be read: {e.strerror}", where=str(artifact)) from e
    if len(data) > ARTIFACT_SIZE_MAX:
        raise BackendError(
            "a reference model this large", where=str(artifact), expected=f"<= {ARTIFACT_SIZE_MAX}"
        )
    return decode(data, str(artifact))


def decode(data: bytes, where: str) -> Artifact:
    """The document in the bytes of an artifact. Raises: BackendError."""
    try:
        return msgspec.json.decode(data, type=Artifact)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BackendError(f"not a reference model: {e}", where=where) from e


def compile_graph(document: Artifact, where: str) -> _Graph:
    """The document as steps, tried once with zeros (free dimensions: 1).

    Raises:
        BackendError: an unknown op or tensor, weights that do not fit, or outputs that differ from
            what the document promises.
    """
    steps = tuple(_step(node, f"{where}: nodes[{i}]") for i, node in enumerate(document.nodes))
    graph = _Graph(document.inputs, document.outputs, steps)
    try:
        zeros = {
            spec.name: np.zeros([abs(dim) for dim in spec.shape], DATATYPES[spec.datatype][0])
            for spec in document.inputs
        }
        results = _evaluate(graph, zeros)
        for spec in document.outputs:
            checks.check_array("output", spec, results[spec.name])
    except (KeyError, ValueError, TypeError, IndexError) as e:
        raise BackendError(f"the model does not compute: {e!r}", where=where) from e
    except RequestError as e:
        raise BackendError(f"the model breaks its promise: {e}", where=where) from e
    return graph


def _step(node: Node, where: str) -> _Step:
    if node.op not in OPS:
        raise BackendError(
            f"unknown op {node.op!r}",
            where=where,
            expected="one of " + ", ".join(OPS),
            remedy=did_you_mean(node.op, list(OPS)),
        )
    if (node.weights is None) == (node.op == "matmul"):
        raise BackendError(f"op {node.op!r} and weights", where=where, expected="both for matmul")
    return _Step(OPS[node.op], node, _array(node.weights, where), _array(node.bias, where))


def _array(weights: Weights | None, where: str) -> Array | None:
    if weights is None:
        return None
    try:
        if isinstance(weights, Seeded):
            # RandomState: numpy promises that its streams never change, and goldens depend on it.
            normal = np.random.RandomState(weights.seed).standard_normal(weights.shape)
            return (normal / math.sqrt(weights.shape[0])).astype(np.float32)
        return np.array(weights, dtype=np.float32)
    except (ValueError, TypeError, IndexError, MemoryError) as e:
        raise BackendError(f"weights that are no array: {e}", where=where) from e


# --- the accelerator that is none ---


_nodes: dict[Path, int] = {}  # open in this process, until its end, for all its models
_nodes_guard = threading.Lock()


def _open_node(path: Path) -> str:
    """Have a device node open; the name of the device. Raises: BackendError."""
    with _nodes_guard:
        if path not in _nodes:
            _nodes[path] = _open_alone(path)
    return path.name.upper()


def _open_alone(path: Path) -> int:
    """A descriptor of a node that no other process has open. Raises: BackendError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise BackendError(f"the device cannot be opened: {e.strerror}", where=str(path)) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise BackendError("the device is in use by another process", where=str(path)) from e
    return fd


# --- the trouble: what a bad model, wheel or driver does to its process ---


class _Trouble:
    """Delays and faults of one loaded model; `kept` is the memory it never gives back."""

    def __init__(self, behaviour: Behaviour, sleep: Callable[[float], None], clock: Clock) -> None:
        self.behaviour = behaviour
        self.sleep = sleep
        self.kept: list[bytearray] = []
        self._clock = clock
        self._runs = itertools.count(1)  # next() on it is atomic

    def at_load(self) -> None:
        self._delay(self.behaviour.load_ms)
        for fault in self.behaviour.faults:
            if fault.at == "load":
                ACTIONS[fault.action](self, fault)

    def at_run(self, inputs: Mapping[str, Array]) -> bool:
        """Whether this run's answer is to be wrong; other faults have happened on return."""
        number = next(self._runs)
        self._delay(self.behaviour.run_ms)
        due = [fault for fault in self.behaviour.faults if _is_due(fault, number, inputs)]
        for fault in due:
            ACTIONS[fault.action](self, fault)
        return any(fault.action == "wrong" for fault in due)

    def _delay(self, milliseconds: float) -> None:
        if milliseconds and not self.behaviour.busy:
            self.sleep(milliseconds / 1e3)
        elif milliseconds:
            until_ns = self._clock.monotonic_ns() + round(milliseconds * 1e6)
            while self._clock.monotonic_ns() < until_ns:
                pass


def _is_due(fault: Fault, run: int, inputs: Mapping[str, Array]) -> bool:
    if fault.at != "run" or run < fault.first_run:
        return False
    if fault.last_run is not None and run > fault.last_run:
        return False
    return fault.on_value is None or any(
        bool((array == fault.on_value).any()) for array in inputs.values()
    )


def _raise(_: _Trouble, fault: Fault) -> NoReturn:
    raise BackendError(f"fault on order: raise at {fault.at}")


def _memory_error(_: _Trouble, fault: Fault) -> NoReturn:
    raise MemoryError(f"fault on order: memory_error at {fault.at}")


def _exit(_: _Trouble, fault: Fault) -> NoReturn:
    os._exit(fault.exit_code)


def _signal(number: signal.Signals) -> Callable[[_Trouble, Fault], None]:
    return lambda _trouble, _fault: signal.raise_signal(number)


def _abort(_: _Trouble, __: Fault) -> NoReturn:
    os.abort()


def _hang(trouble: _Trouble, _: Fault) -> NoReturn:
    while True:
        trouble.sleep(3600.0)


def _spin(_: _Trouble, __: Fault) -> NoReturn:
    while True:
        pass


def _allocate(trouble: _Trouble, fault: Fault) -> None:
    # Zeroed memory would not be touched, and untouched memory is not resident.
    trouble.kept.append(bytearray(b"\1") * (fault.size_mb * 1_000_000))


def _wrong(_: _Trouble, __: Fault) -> None:
    pass  # the answer is changed after the run, see ReferenceModel._run


ACTIONS: dict[str, Callable[[_Trouble, Fault], None]] = {
    "raise": _raise,  # as a library that refuses
    "memory_error": _memory_error,  # as numpy does when it gets no memory
    "exit": _exit,  # without a word, as libraries that call exit()
    "segv": _signal(signal.SIGSEGV),
    "ill": _signal(signal.SIGILL),  # as a wheel built for another processor
    "abort": _abort,  # as a failed assertion in C++
    "hang": _hang,  # sleeps for ever: a lost interrupt
    "spin": _spin,  # burns the processor for ever
    "allocate": _allocate,  # a leak; with a memory limit, the OOM killer
    "wrong": _wrong,  # other numbers, no error
}
