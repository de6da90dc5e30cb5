"""OpenVINO as a backend: models read, bound and run.

Law of this file: it knows models and tensors; devices are `openvino_devices`' business, and the
library comes in by the door, `openvino_library`. Nothing is compiled, and so no thread started,
before `load`: a template may call `version()` and `prepare()`, and fork.

Source of what is relied on: the API documentation of OpenVINO 2026 (Core, CompiledModel,
InferRequest, Tensor); tried with 2026.4.1. A trap that is met on purpose: a tensor bound to an
output of free shape that turns out larger is left as it was, without an error. Such an output is
bound only after a run has shown its shape, and only if that shape follows from the shapes of the
inputs.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.backends import checks, heap, openvino_devices
from edge_runtime.backends import options as typed
from edge_runtime.backends.openvino_devices import Options
from edge_runtime.backends.openvino_library import brief, failure, foreign, library
from edge_runtime.backends.protocol import BlobCache, Placement
from edge_runtime.errors import BackendError, UsageError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

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
# OpenVINO IR as one file: magic, bytes of the graph, bytes of the weights; then both, the weights
# at a multiple of 64 (bundle.openvino_ir makes and lints it).
_IR_HEADER = struct.Struct("<8sQQ")
_IR_MAGIC = b"EDGE-IR1"
_IR_ALIGNMENT = 64
_TFLITE_MAGIC = b"TFL3"  # file identifier at byte 4, from the TFLite schema


class OpenVino:
    """OpenVINO as a backend."""

    name = "openvino"
    fork_safe = True  # no thread exists before the first compilation

    def __init__(self) -> None:
        self.cache: BlobCache | None = None
        self._core: Any = None  # keeps the CPU's plug-in in memory, for forks to share

    def version(self) -> str:
        """Imports the library. Raises: BackendError."""
        return str(library().__version__).partition("-")[0]

    def prepare(self) -> None:
        """Load the CPU's plug-in, 64 MB of code: forks share what it relocates and builds, 9 MiB.

        Raises: BackendError.
        """
        core = library().Core()
        try:
            core.get_versions("CPU")
        except foreign() as e:
            raise failure("prepare", e) from e
        self._core = core

    def load(self, artifact: Path, options: Mapping[str, Any]) -> OpenVinoModel:
        """One .onnx, .tflite or packed IR file, compiled. Raises: UsageError, BackendError."""
        chosen = typed.decode(Options, options)
        openvino_devices.check_device(chosen.device)
        core = library().Core()
        model = read(artifact)
        _fix_shapes(model, chosen.shapes)
        openvino_devices.check_given(core, chosen, options)
        compiled, places = openvino_devices.compiled_for(core, model, chosen, self.cache)
        loaded = OpenVinoModel(model, compiled, places, chosen)
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
        self._run_request = openvino_devices.way_to_run(compiled)
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
        whole = {name: np.asarray(array, order="C") for name, array in inputs.items()}
        try:
            request = self._idle.pop()
        except IndexError:  # another thread has it
            request = self._request()
        try:
            self._set_inputs(request, whole)
            self._infer(request, self._resets)
            return {spec.name: self._output(request, spec.name).copy() for spec in self.outputs}
        except foreign() as e:
            raise failure("run", e) from e
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
        except foreign() as e:
            raise failure("bind", e) from e
        return self._bind_own(request, given, bound, list(outputs))

    def _bind_own(
        self, request: Any, inputs: dict[str, Array], bound: dict[str, Array], wanted: list[str]
    ) -> Callable[[], dict[str, Array]]:
        direct = {name: array for name, array in bound.items() if name in self._bindable}
        loose = [name for name in wanted if name not in direct]
        resets, errors = self._resets, foreign()
        run_request = self._run_request
        first = True

        # `inputs` is an argument to keep the arrays alive: the library holds bare pointers.
        def run(_alive: dict[str, Array] = inputs) -> dict[str, Array]:
            nonlocal first
            try:
                if resets:
                    request.reset_state()
                run_request(request)
                if first:
                    results = self._collect(request, bound, wanted)
                    self._set_outputs(request, direct)
                    first = False
                    return results
                if not loose:
                    return direct
                return direct | self._collect(request, bound, loose)
            except errors as e:
                raise failure("run", e) from e

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
                except foreign() as e:
                    raise failure("run", e) from e
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
        self._run_request(request)

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


# --- loading -------------------------------------------------------------------------------------


def read(artifact: Path) -> Any:
    """The model, read by the front end that its first bytes call for and by no other.

    (`Core.read_model` lets seven parsers try, some of which write to stderr.)
    """
    refusal = functools.partial(
        BackendError, where=str(artifact), expected="an ONNX or TFLite model, or a packed IR"
    )
    try:
        with artifact.open("rb") as file:
            head = file.read(8)
    except OSError as e:
        raise BackendError(f"cannot be read: {e.strerror}", where=str(artifact)) from e
    try:
        if head == _IR_MAGIC:
            return library().Core().read_model(*_unpacked(artifact))
        framework = "tflite" if head[4:] == _TFLITE_MAGIC else "onnx"
        front_end = library().frontend.FrontEndManager().load_by_framework(framework)
        model = front_end.convert(front_end.load(str(artifact)))
    except foreign() as e:
        raise refusal(f"openvino refuses the artifact: {brief(e)}") from e
    if not model.inputs or not model.outputs:  # what the ONNX front end makes of an empty file
        raise refusal("the artifact has no inputs or no outputs")
    return model


def _unpacked(artifact: Path) -> tuple[bytes, bytes]:
    """Graph and weights of a packed IR. Raises: ValueError: it is cut off."""
    data = artifact.read_bytes()
    if len(data) < _IR_HEADER.size:
        raise ValueError("cut off")
    _, xml_bytes, weights_bytes = _IR_HEADER.unpack_from(data)
    start = _IR_HEADER.size + xml_bytes
    start += -start % _IR_ALIGNMENT
    if len(data) != start + weights_bytes:
        raise ValueError("cut off")
    return data[_IR_HEADER.size : _IR_HEADER.size + xml_bytes], data[start:]


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
    partial = library().PartialShape
    try:
        model.reshape({ports[name]: partial(shape) for name, shape in shapes.items()})
    except foreign() as e:
        raise UsageError(
            f"the model does not take these shapes: {brief(e)}", where="options.shapes"
        ) from e


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
        except foreign():
            continue
        static = {_name(port) for port in trial.outputs if port.get_partial_shape().is_static}
        return fixed | static
    return fixed


def _with_size(port: Any, size: int) -> Any:
    dims = [size if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
    return library().PartialShape(dims)


def _tensor(array: Array, is_bfloat16: bool) -> Any:
    """The array's own memory as the library's tensor; the caller keeps the array alive."""
    openvino = library()
    memory = _writeable(array)
    if is_bfloat16:
        return openvino.Tensor(memory.view(np.uint16), list(array.shape), openvino.Type.bf16)
    return openvino.Tensor(memory, shared_memory=True)


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
