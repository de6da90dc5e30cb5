"""The door to OpenVINO.

Law of this file: the only one that imports openvino, and it imports it when a version or a load is
asked for, not before. Every exception of the library becomes ours here, once. Nothing is compiled,
and so no thread started, before `load`: a template may call `version()` and `prepare()`, and fork.

Source of what is relied on: the API documentation of OpenVINO 2026 (Core, CompiledModel,
InferRequest, Tensor; "Device properties"); tried with 2026.4.1. Traps that are met on purpose:
- the package reports its import and its use to its maker, by default and from a thread: it is kept
  from importing the part that does;
- on processors with bf16 units fp32 models run in bf16 by default: the precision is always stated;
- AUTO hides which device failed and why, and may move to the CPU later, at any run: AUTO is done
  here, one device after the other, and the reasons are kept;
- a tensor bound to an output of free shape that turns out larger is left as it was, without an
  error: such an output is bound only after a run has shown its shape, and only if that shape
  follows from the shapes of the inputs.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from edge_runtime.backends import checks, heap
from edge_runtime.backends import options as typed
from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import BackendError, EdgeError, UsageError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# More than any board we know has cores; a larger number is a typing error.
Count = Annotated[int, msgspec.Meta(ge=1, le=256)]
Dimension = Annotated[int, msgspec.Meta(ge=-1)]
_ONE = r"(CPU|NPU(\.\d+)?|GPU(\.\d+){0,2})"
_DEVICE = re.compile(rf"{_ONE}|AUTO|(AUTO|HETERO):{_ONE}(,{_ONE})*")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`variants[n].options` of this backend.

    Attributes:
        device: CPU, GPU, GPU.1, NPU; AUTO:NPU,CPU: the first of them that can; AUTO: of all the
            machine has (GPU, NPU, CPU); HETERO:NPU,CPU: each node on the first that can run it.
        precision: that the device computes in. default: f32 on CPU and GPU, f16 on NPUs, which have
            no other; model: as the model says, node by node. Quantized parts stay integers.
        streams: runs at a time, each with `threads`. 1: they take turns.
        threads: of one run, on the CPU. 1: a worker shares the box with other workers.
        hint: what the device is tuned for where it has a choice. A worker runs one request or one
            batch at a time: latency.
        stateful: what a model with a state of its own remembers. reset: nothing, each run begins
            anew; keep: one state for the worker, so for all clients of the model together.
        shapes: fixes the shapes of inputs by name ({"input": [1, 3, 224, 224]}; -1 stays free), as
            NPUs need it.
    """

    device: str = "CPU"
    precision: Literal["default", "f32", "f16", "bf16", "model"] = "default"
    streams: Count = 1
    threads: Count = 1
    hint: Literal["latency", "throughput"] = "latency"
    stateful: Literal["reset", "keep"] = "reset"
    shapes: dict[str, list[Dimension]] = {}


_AUTO_ORDER = ("GPU", "NPU", "CPU")
_DEFAULT_PRECISIONS = {"CPU": "f32", "GPU": "f32", "NPU": "f16"}
# Options that only some devices have: their property in the library. An option that was given and
# that no device in question has is an error.
_PROPERTIES = {
    "streams": "NUM_STREAMS",
    "threads": "INFERENCE_NUM_THREADS",
}

# The library's element types -> OIP datatype.
_DATATYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
    "bf16": "BF16",
}
# Nodes of a compiled model that compute nothing.
_NOT_WORK = frozenset({"Input", "Output", "Const", "Parameter", "Result", "Constant"})

_TFLITE_MAGIC = b"TFL3"  # file identifier at byte 4, from the TFLite schema
_ERROR_SIZE_MAX = 600  # characters of a library's message: it may quote whole graphs
_REFUSAL_SIZE_MAX = 200  # of one in a placement, which `models` prints
_NOISE = re.compile(
    r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \w+:"
)
_NOTHING: dict[Any, Any] = {}  # no input beside those that are bound


class OpenVino:
    """OpenVINO as a backend."""

    name = "openvino"
    fork_safe = True  # no thread exists before the first compilation

    def __init__(self) -> None:
        self._core: Any = None  # keeps the CPU's plug-in in memory, for forks to share

    def version(self) -> str:
        """Imports the library. Raises: BackendError."""
        return str(_library().__version__).partition("-")[0]

    def prepare(self) -> None:
        """Load the CPU's plug-in, 64 MB of code: forks share what it relocates and builds, 9 MiB.

        Raises: BackendError.
        """
        core = _library().Core()
        try:
            core.get_versions("CPU")
        except _foreign() as e:
            raise _failure("prepare", e) from e
        self._core = core

    def load(self, artifact: Path, options: Mapping[str, Any]) -> OpenVinoModel:
        """One .onnx or .tflite file, compiled. Raises: UsageError, BackendError."""
        chosen = typed.decode(Options, options)
        _check_device(chosen.device)
        core = _library().Core()
        model = _read(artifact)
        _fix_shapes(model, chosen.shapes)
        _check_given(core, chosen, options)
        loaded = OpenVinoModel(model, *_compile(core, model, chosen), chosen)
        heap.give_back()
        return loaded


class OpenVinoModel:
    """A compiled model. Each binding has a request of its own; `run` borrows one.

    With one stream runs take turns, so several threads bring nothing: `concurrent` is false. A kept
    state lives in one request, which all bindings share; `run` always begins with the initial
    state, so that goldens do not disturb it.
    """

    facts: Mapping[str, Any] = {}

    def __init__(
        self, model: Any, compiled: Any, placement: tuple[Placement, ...], options: Options
    ) -> None:
        self.inputs = tuple(_spec("input", port) for port in compiled.inputs)
        self.outputs = tuple(_spec("output", port) for port in compiled.outputs)
        self.placement = placement
        self.concurrent = options.streams > 1
        self._compiled = compiled
        self._input_indexes = {spec.name: index for index, spec in enumerate(self.inputs)}
        self._output_indexes = {spec.name: index for index, spec in enumerate(self.outputs)}
        self._bindable = _bindable(model, self.outputs)
        self._bfloat16 = {s.name for s in (*self.inputs, *self.outputs) if s.datatype == "BF16"}
        self._idle: list[Any] = [self._request()]
        self._resets = bool(self._idle[0].query_state())
        self._kept = self._request() if self._resets and options.stateful == "keep" else None
        self.keeps_state = self._kept is not None
        self._turn = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See protocol.Model.run."""
        checks.check_inputs(self.inputs, inputs)
        whole = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            request = self._idle.pop()
        except IndexError:  # another thread has it
            request = self._request()
        try:
            self._set_inputs(request, whole)
            self._infer(request, self._resets)
            return {spec.name: self._output(request, spec.name).copy() for spec in self.outputs}
        except _foreign() as e:
            raise _failure("run", e) from e
        finally:
            self._idle.append(request)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """See protocol.Model.bind. Outputs whose shape depends on data are copied at each run."""
        checks.check_binding(self.inputs, self.outputs, inputs, outputs)
        given = dict(inputs)
        bound = {name: array for name, array in outputs.items() if array is not None}
        if self._kept is not None:
            return self._bind_kept(given, bound, list(outputs))
        try:
            request = self._request()
            self._set_inputs(request, given)
        except _foreign() as e:
            raise _failure("bind", e) from e
        return self._bind_own(request, given, bound, list(outputs))

    def _bind_own(
        self, request: Any, inputs: dict[str, Array], bound: dict[str, Array], wanted: list[str]
    ) -> Callable[[], dict[str, Array]]:
        direct = {name: array for name, array in bound.items() if name in self._bindable}
        loose = [name for name in wanted if name not in direct]
        resets, foreign = self._resets, _foreign()
        infer = _library_infer()
        first = True

        # `inputs` is an argument to keep the arrays alive: the library holds bare pointers.
        def run(_alive: dict[str, Array] = inputs) -> dict[str, Array]:
            nonlocal first
            try:
                if resets:
                    request.reset_state()
                infer(request, _NOTHING, True, False)
                if first:
                    results = self._collect(request, bound, wanted)
                    self._set_outputs(request, direct)
                    first = False
                    return results
                if not loose:
                    return direct
                return direct | self._collect(request, bound, loose)
            except foreign as e:
                raise _failure("run", e) from e

        return run

    def _bind_kept(
        self, inputs: dict[str, Array], bound: dict[str, Array], wanted: list[str]
    ) -> Callable[[], dict[str, Array]]:
        request = self._kept

        def run() -> dict[str, Array]:
            with self._turn:
                try:
                    self._set_inputs(request, inputs)
                    self._infer(request, reset=False)
                    results = self._collect(request, bound, wanted)
                except _foreign() as e:
                    raise _failure("run", e) from e
                # The request is another binding's next.
                return {
                    name: array if name in bound else array.copy()
                    for name, array in results.items()
                }

        return run

    def _request(self) -> Any:
        return self._compiled.create_infer_request()

    def _infer(self, request: Any, reset: bool) -> None:
        if reset:
            request.reset_state()
        _library_infer()(request, _NOTHING, True, False)

    def _set_inputs(self, request: Any, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            tensor = _tensor(array, name in self._bfloat16)
            request.set_input_tensor(self._input_indexes[name], tensor)

    def _set_outputs(self, request: Any, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            tensor = _tensor(array, name in self._bfloat16)
            request.set_output_tensor(self._output_indexes[name], tensor)

    def _collect(
        self, request: Any, bound: dict[str, Array], wanted: Sequence[str]
    ) -> dict[str, Array]:
        """The outputs of a run that wrote into the library's own memory.

        All shapes are compared before anything is written.

        Raises:
            RequestError: a bound array has another shape than the model gave.
        """
        results = {name: self._output(request, name) for name in wanted}
        for name, array in bound.items():
            if name in results:
                checks.check_given(name, results[name], array)
        for name in results.keys() & bound.keys():
            bound[name][...] = results[name]
            results[name] = bound[name]
        return results

    def _output(self, request: Any, name: str) -> Array:
        array: Array = request.get_output_tensor(self._output_indexes[name]).data
        return array.view(np.uint16) if name in self._bfloat16 else array


# --- the library ---------------------------------------------------------------------------------


@functools.cache
def _library() -> Any:
    # The package sends an event to its maker when it is imported, from a thread, and leaves a file
    # with an id in the home directory. An appliance sends nothing that its owner did not ask for;
    # and what is forked must not have threads. `tools.ovc` is the model converter, the part that
    # sends; without it openvino is whole, and smaller.
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None
    converter = modules.setdefault("openvino.tools.ovc", None)
    try:
        import openvino
        import openvino.frontend
    except (ImportError, OSError) as e:  # OSError: a shared object that does not load
        raise BackendError(
            f"openvino does not import: {e}",
            expected=f"a wheel for {platform.machine()} and Python {platform.python_version()}",
            remedy="pip install 'edge-runtime[openvino]'",
        ) from e
    finally:
        if converter is None:  # a builder's tools may want it later
            del modules["openvino.tools.ovc"]
    return openvino


@functools.cache
def _library_infer() -> Callable[[Any, dict[Any, Any], bool, bool], Any]:
    """`InferRequest.infer` without its wrapper in Python: a third of a small model's run."""
    _library()
    from openvino import _pyopenvino

    native = getattr(_pyopenvino, "InferRequest")  # noqa: B009 - for mypy: it has no stubs here
    return native.infer  # type: ignore[no-any-return]


@functools.cache
def _foreign() -> tuple[type[Exception], ...]:
    """What the library raises: its front ends have classes of their own."""
    library = _library()
    own = [kind for kind in vars(library.frontend).values() if isinstance(kind, type)]
    return (
        *(kind for kind in own if issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        TypeError,
        MemoryError,  # std::bad_alloc
    )


def _brief(error: Exception) -> str:
    """The message without the places in the library's source that it passed."""
    return " ".join(_NOISE.sub(" ", str(error)).split())[:_ERROR_SIZE_MAX]


def _failure(doing: str, error: Exception) -> EdgeError:
    return BackendError(f"openvino failed to {doing}: {_brief(error)}")


# --- loading -------------------------------------------------------------------------------------


def _read(artifact: Path) -> Any:
    """The model, read by the front end that its first bytes call for and by no other.

    (`Core.read_model` lets seven parsers try, some of which write to stderr.)
    """
    refusal = functools.partial(
        BackendError, where=str(artifact), expected="an ONNX or TFLite model"
    )
    try:
        with artifact.open("rb") as file:
            head = file.read(8)
    except OSError as e:
        raise BackendError(f"cannot be read: {e.strerror}", where=str(artifact)) from e
    framework = "tflite" if head[4:] == _TFLITE_MAGIC else "onnx"
    library = _library()
    try:
        front_end = library.frontend.FrontEndManager().load_by_framework(framework)
        model = front_end.convert(front_end.load(str(artifact)))
    except _foreign() as e:
        raise refusal(f"openvino refuses the artifact: {_brief(e)}") from e
    if not model.inputs or not model.outputs:  # what the ONNX front end makes of an empty file
        raise refusal("the artifact has no inputs or no outputs")
    return model


def _fix_shapes(model: Any, shapes: Mapping[str, list[int]]) -> None:
    """Give inputs the shapes of the options. Raises: UsageError."""
    if not shapes:
        return
    ports = {_name(port): port for port in model.inputs}
    for name in shapes:
        if name not in ports:
            raise UsageError(
                f"the model has no input {name!r}",
                where=f"options.shapes.{name}",
                expected="one of " + ", ".join(map(repr, ports)),
                remedy=did_you_mean(name, list(ports)),
            )
    partial = _library().PartialShape
    try:
        model.reshape({ports[name]: partial(shape) for name, shape in shapes.items()})
    except _foreign() as e:
        raise UsageError(
            f"the model does not take these shapes: {_brief(e)}", where="options.shapes"
        ) from e


def _check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"{device!r} is no device",
            where="options.device",
            expected="CPU, GPU, GPU.1, NPU, AUTO, or a list such as AUTO:NPU,CPU or HETERO:GPU,CPU",
        )


def _check_given(core: Any, chosen: Options, given: Mapping[str, Any]) -> None:
    """No option that was given is without effect. Raises: UsageError."""
    devices = _devices(core, chosen.device)
    for option, name in _PROPERTIES.items():
        if option in given and not any(name in _supported(core, one) for one in devices):
            raise UsageError(
                f"{chosen.device} has no such option",
                where=f"options.{option}",
                remedy=f"leave {option} out",
            )


def _devices(core: Any, device: str) -> list[str]:
    """The devices that a device string names, in order of preference."""
    kind, _, names = device.rpartition(":")
    if device != "AUTO":
        return names.split(",") if kind else [device]
    there = list(core.available_devices)
    return [name for family in _AUTO_ORDER for name in there if name.partition(".")[0] == family]


def _supported(core: Any, device: str) -> frozenset[str]:
    """The properties that a device takes; none where its driver is missing."""
    try:
        return frozenset(core.get_property(device, "SUPPORTED_PROPERTIES"))
    except _foreign():
        return frozenset()


def _compile(core: Any, model: Any, options: Options) -> tuple[Any, tuple[Placement, ...]]:
    """The compiled model and where it runs.

    Raises:
        BackendError: no device takes it; each says why.
    """
    if options.device.startswith("HETERO"):
        return _compile_hetero(core, model, options)
    refusals: list[str] = []
    for device in _devices(core, options.device):
        try:
            compiled = core.compile_model(model, device, _properties(core, device, options))
            return compiled, (_placement(compiled, device, refusals),)
        except _foreign() as e:
            refusals.append(f"{device}: {_brief(e)}")
    raise _refused(options, refusals)


def _compile_hetero(core: Any, model: Any, options: Options) -> tuple[Any, tuple[Placement, ...]]:
    try:
        for device in _devices(core, options.device):
            core.set_property(device, _properties(core, device, options))
        compiled = core.compile_model(model, options.device)
        places = core.query_model(model, options.device)
    except _foreign() as e:
        raise _refused(options, [_brief(e)]) from e
    work = {op.get_friendly_name() for op in model.get_ops() if op.get_type_name() not in _NOT_WORK}
    counts = Counter(place for name, place in places.items() if name in work)
    return compiled, tuple(
        Placement(device.partition(".")[0], f"{device} of {options.device}", nodes)
        for device, nodes in counts.most_common()
    )


def _refused(options: Options, refusals: Sequence[str]) -> BackendError:
    return BackendError(
        f"openvino cannot compile for {options.device}: " + "; ".join(refusals),
        where="options.device",
        remedy="install the device's driver, or choose another device",
    )


def _properties(core: Any, device: str, options: Options) -> dict[str, Any]:
    """What the device is told; of the options that not all devices have, those that it has."""
    supported = _supported(core, device)
    told: dict[str, Any] = {"PERFORMANCE_HINT": options.hint.upper()}
    told |= _precision(device, options.precision)
    some = {
        "NUM_STREAMS": options.streams,
        "INFERENCE_NUM_THREADS": options.streams * options.threads,
        "ENABLE_CPU_PINNING": False,  # the worker's cpuset says where it runs
    }
    return told | {name: value for name, value in some.items() if name in supported}


def _precision(device: str, precision: str) -> dict[str, str]:
    if precision == "model":
        return {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "dynamic"}
    if precision == "default":
        precision = _DEFAULT_PRECISIONS[device.partition(".")[0]]
    return {"INFERENCE_PRECISION_HINT": precision}


def _placement(compiled: Any, device: str, refusals: Sequence[str]) -> Placement:
    """The device that executes, by its own word, and what was tried before it."""
    executes = ",".join(compiled.get_property("EXECUTION_DEVICES"))
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    detail = f"{executes or device}, {precision}"
    if refusals:
        detail += "; refused by " + "; ".join(text[:_REFUSAL_SIZE_MAX] for text in refusals)
    return Placement((executes or device).partition(".")[0], detail, _node_count(compiled))


def _node_count(compiled: Any) -> int:
    try:
        ops = compiled.get_runtime_model().get_ops()
    except _foreign():  # not every device shows what it made of the model
        return 0
    return sum(_layer(op) not in _NOT_WORK for op in ops)


def _layer(op: Any) -> str:
    info = op.get_rt_info()
    return str(info["layerType"].value if "layerType" in info else op.get_type_name())


# --- tensors -------------------------------------------------------------------------------------


def _name(port: Any) -> str:
    """The name of a model's input or output; a tensor may have several.

    The graph's own name of it stands in the node ("y/sink_port_0" for an output); else the first of
    the tensor's names in the alphabet, so that it is always the same.
    """
    names = sorted(port.get_names())
    own = str(port.get_node().get_friendly_name()).partition("/sink_port_")[0]
    if own in names or not names:
        return own
    return str(names[0])


def _spec(role: str, port: Any) -> TensorSpec:
    name, kind = _name(port), str(port.get_element_type().get_type_name())
    shape = port.get_partial_shape()
    if kind not in _DATATYPES or shape.rank.is_dynamic:
        what = kind if kind not in _DATATYPES else "tensor of unknown rank"
        raise BackendError(
            f"{role} {name!r} is a {what}",
            expected="tensors of numbers or truth values, with a known number of dimensions",
        )
    dims = tuple(-1 if dim.is_dynamic else dim.get_length() for dim in shape)
    return TensorSpec(name, _DATATYPES[kind], dims)


def _bindable(model: Any, outputs: tuple[TensorSpec, ...]) -> frozenset[str]:
    """The outputs whose shapes are fixed, or follow from the shapes of the inputs."""
    fixed = frozenset(spec.name for spec in outputs if -1 not in spec.shape)
    if len(fixed) == len(outputs):
        return fixed
    for size in (1, 2):  # free dimensions may be bound to others: one of the two may be impossible
        trial = model.clone()
        try:
            trial.reshape({port: _with_size(port, size) for port in trial.inputs})
        except _foreign():
            continue
        static = {_name(port) for port in trial.outputs if port.get_partial_shape().is_static}
        return fixed | static
    return fixed


def _with_size(port: Any, size: int) -> Any:
    dims = [size if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
    return _library().PartialShape(dims)


def _tensor(array: Array, is_bfloat16: bool) -> Any:
    """The array's own memory as the library's tensor; the caller keeps the array alive."""
    library = _library()
    memory = _writeable(array)
    if is_bfloat16:
        return library.Tensor(memory.view(np.uint16), list(array.shape), library.Type.bf16)
    return library.Tensor(memory, shared_memory=True)


def _writeable(array: Array) -> Array:
    """The same memory as an array that numpy calls writeable: the library takes no other, although
    it only reads its inputs.
    """
    if array.flags.writeable:
        return array
    if not array.nbytes:
        return array.copy()
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    whole: Array = np.ctypeslib.as_array(memory)
    return whole.view(array.dtype).reshape(array.shape)
