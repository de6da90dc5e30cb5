"""The door to onnxruntime.

Law of this file: the only one that imports onnxruntime, and it imports it when a version or a load
is asked for, not before. Every exception of the library becomes ours here, once. Before `load` it
makes no thread, and no session but the one that `prepare` throws away: a template may call
`version()` and `prepare()` and fork (it counts its threads, see `serving.template`).

Source of what is relied on: onnxruntime's Python API documentation (InferenceSession, IOBinding)
and `onnxruntime_session_options_config_keys.h`; tried with 1.32. Four traps are met on purpose:
- passing RunOptions with a log level costs 25 us a run, so no RunOptions are passed;
- an IOBinding whose output was allocated by the library keeps that memory, and the next run fails
  if the output then has another shape, so such outputs are bound anew before each run;
- `InferenceSession.run` goes to the CPU by itself when a provider fails at run time: disabled;
- a node that was left in float between quantized ones is quantized as the session loads, its
  weights with one scale for all channels: disabled (DISABLED_OPTIMIZERS).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from edge_runtime.backends import checks, heap, providers
from edge_runtime.backends import options as typed
from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import BackendError, EdgeError, RequestError, UsageError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# More threads than any board we know has cores; a larger number is a typing error.
Threads = Annotated[int, msgspec.Meta(ge=1, le=256)]
Dimension = Annotated[int, msgspec.Meta(ge=1)]

CPU = "CPUExecutionProvider"
# What would compute something else than the file says. EfficientNet-Lite0 in int8 with depthwise
# convolutions in float, as its maker wanted, gave other classes than float for 23 % of photographs.
DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An execution provider with the options that its own documentation names.

    Attributes:
        library: of a provider that is a plug-in: the file, an absolute path. Not needed for those
            in providers.PLUGINS, whose packages are looked for.
    """

    name: str
    options: dict[str, str] = {}
    library: str = ""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`variants[n].options` of this backend.

    Attributes:
        threads: of one run (intra-op). 1: a worker shares the box with other workers, and for small
            models a second thread costs more than it brings; a profile may raise it.
        inter_op_threads: nodes in parallel; used only with `execution_mode: parallel`.
        execution_mode: order of nodes.
        graph_level: graph optimizations. `all` costs load time only.
        providers: in order of preference; what none of them takes runs on the CPU.
        cpu_fallback: false: a node that no asked-for provider takes is a load error.
        memory_arena: keep freed buffers for the next run. False leaves them to the C library.
        spinning: threads burn their core while they wait for work. False: an edge box has better
            uses for its cores and its watts.
        dimensions: fixes free dimensions by their name in the model ("N": 1).
    """

    threads: Threads = 1
    inter_op_threads: Threads = 1
    execution_mode: Literal["sequential", "parallel"] = "sequential"
    graph_level: Literal["disabled", "basic", "extended", "all"] = "all"
    providers: tuple[str | Provider, ...] = (CPU,)
    cpu_fallback: bool = True
    memory_arena: bool = True
    spinning: bool = False
    dimensions: dict[str, Dimension] = {}


_GRAPH_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_EXECUTION_MODES = {"sequential": "ORT_SEQUENTIAL", "parallel": "ORT_PARALLEL"}

# The library's element types -> OIP datatype.
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
_BFLOAT16_ELEMENT_TYPE = 16  # TensorProto.BFLOAT16 of the ONNX specification: not in numpy

# y = x, [1] FP32, opset 13: what `prepare` loads. Built with onnx.helper; as small as a model gets.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x02\x10\r"
)

_RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"  # older libraries ignore it
_ERROR_SIZE_MAX = 600  # characters of a library's message: it may quote whole graphs


class OnnxRuntime:
    """onnxruntime as a backend."""

    name = "onnxruntime"
    fork_safe = True  # no thread exists before the first session that asks for some

    def version(self) -> str:
        """Imports the library. Raises: BackendError."""
        return str(_library().__version__)

    def prepare(self) -> None:
        """A session with one thread, run once and dropped: the first of a process makes 2 MiB of
        tables and allocators that forks then share. Raises: BackendError.
        """
        given = np.zeros(1, np.float32)
        try:
            _session(_IDENTITY, Options()).run(None, {"x": given})
        except _foreign() as e:
            raise _failure("prepare", e) from e
        heap.give_back()

    def load(self, artifact: Path, options: Mapping[str, Any]) -> OnnxModel:
        """One .onnx or .ort file as a session of its own. Raises: UsageError, BackendError."""
        chosen = typed.decode(Options, options)
        _check_providers(chosen)
        if chosen.dimensions:
            _check_dimensions(artifact, chosen.dimensions)
        model = OnnxModel(_session(artifact, chosen), list(map(_as_provider, chosen.providers)))
        heap.give_back()
        return model


class OnnxModel:
    """A session. `run` may be called from several threads, and so may bindings, each from one."""

    concurrent = True
    keeps_state = False
    facts: Mapping[str, Any] = {}

    def __init__(self, session: Any, chosen: Sequence[Provider] = ()) -> None:
        self._session = session
        self.inputs = _specs("input", session.get_inputs())
        self.outputs = _specs("output", session.get_outputs())
        self.placement = _placement(session, chosen)
        self._output_names = [spec.name for spec in self.outputs]
        datatypes = {spec.datatype for spec in (*self.inputs, *self.outputs)}
        self._has_text = "BYTES" in datatypes
        self._has_bfloat16 = "BF16" in datatypes

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See protocol.Model.run."""
        checks.check_inputs(self.inputs, inputs)
        if self._has_bfloat16 and not self._has_text:  # run() takes no bfloat16, a binding does
            whole = {name: np.asarray(array, order="C") for name, array in inputs.items()}
            return self._bind_memory(whole, dict.fromkeys(self._output_names))()
        return self._run(inputs, self._output_names)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """See protocol.Model.bind. Text (BYTES) has no fixed memory: it is copied at each run."""
        checks.check_binding(self.inputs, self.outputs, inputs, outputs)
        bind = self._bind_text if self._has_text else self._bind_memory
        return bind(dict(inputs), dict(outputs))

    def _run(self, inputs: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
        feed = {
            spec.name: _to_text(inputs[spec.name])
            if spec.datatype == "BYTES"
            else inputs[spec.name]
            for spec in self.inputs
        }
        try:
            arrays = self._session.run(names, feed)
        except _foreign() as e:
            raise _failure("run", e) from e
        return {name: _from_text(array) for name, array in zip(names, arrays, strict=True)}

    def _bind_text(
        self, inputs: dict[str, Array], outputs: dict[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        names = list(outputs)

        def run_and_copy() -> dict[str, Array]:
            results = self._run(inputs, names)
            for name, array in outputs.items():
                if array is not None:
                    checks.check_given(name, results[name], array)
                    array[...] = results[name]
                    results[name] = array
            return results

        return run_and_copy

    def _bind_memory(
        self, inputs: dict[str, Array], outputs: dict[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        session, foreign = self._session, _foreign()
        binding = session.io_binding()
        bfloat16 = {spec.name for spec in (*self.inputs, *self.outputs) if spec.datatype == "BF16"}
        bound = {name: array for name, array in outputs.items() if array is not None}
        free = [name for name, array in outputs.items() if array is None]
        try:
            for name, array in inputs.items():
                binding.bind_input(name, *_memory(array, name in bfloat16))
            for name, array in bound.items():
                binding.bind_output(name, *_memory(array, name in bfloat16))
        except foreign as e:
            raise _failure("bind", e) from e
        run = session.run_with_iobinding

        # `inputs` is an argument to keep the arrays alive: the library holds bare pointers.
        def run_bound(_alive: dict[str, Array] = inputs) -> dict[str, Array]:
            try:
                run(binding)
            except foreign as e:
                raise _failure("run", e) from e
            return bound

        def run_free(_alive: dict[str, Array] = inputs) -> dict[str, Array]:
            try:
                for name in free:
                    binding.bind_output(name)
                run(binding)
                given = binding.get_outputs()[len(bound) :]  # in the order they were bound
                arrays = [_array(value) for value in given]
            except foreign as e:
                raise _failure("run", e) from e
            return bound | dict(zip(free, arrays, strict=True))

        return run_free if free else run_bound


@functools.cache
def _library() -> Any:
    # Official Linux wheels from 1.29 on report model names, hashes and a device id to their maker,
    # by default and from a thread that the import starts. An appliance sends nothing that its owner
    # did not ask for; and what is forked must not have threads. Read by the library at import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except (ImportError, OSError) as e:  # OSError: a shared object that does not load
        raise BackendError(
            f"onnxruntime does not import: {e}",
            expected=f"a wheel for {platform.machine()} and Python {platform.python_version()}",
            remedy="pip install 'edge-runtime[onnxruntime]'",
        ) from e
    onnxruntime.set_default_logger_severity(4)  # errors come as exceptions; stderr is the journal's
    return onnxruntime


@functools.cache
def _foreign() -> tuple[type[Exception], ...]:
    """What the library raises: its own classes have no common base; the binding adds Python's."""
    _library()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type)]
    return (
        *(kind for kind in own if issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        TypeError,
        MemoryError,  # std::bad_alloc
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:_ERROR_SIZE_MAX]


def _failure(doing: str, error: Exception) -> EdgeError:
    text = _brief(error)
    # What 1.32 and what older ones say of a preallocated output of another shape than computed.
    if "provided for output" in text or "OrtValue shape verification failed" in text:
        return RequestError(
            f"a bound output has another shape than the model gave: {text}",
            remedy="bind an array of that shape, or None to let the backend allocate",
        )
    return BackendError(f"onnxruntime failed to {doing}: {text}")


def _session(artifact: Path | bytes, options: Options) -> Any:
    library = _library()
    chosen = [_as_provider(choice) for choice in options.providers]
    told = _session_options(library, options)
    listed: dict[str, Any] = {}
    if any(_is_plugin(provider) for provider in chosen):
        for index, provider in enumerate(chosen):
            _add_provider(told, provider, f"options.providers[{index}]")
    else:
        listed["providers"] = [provider.name for provider in chosen]
        listed["provider_options"] = [provider.options for provider in chosen]
    try:
        return library.InferenceSession(
            artifact if isinstance(artifact, bytes) else str(artifact),
            sess_options=told,
            enable_fallback=0,
            disabled_optimizers=list(DISABLED_OPTIMIZERS),
            **listed,
        )
    except _foreign() as e:
        raise _refusal(artifact, e) from e


def _refusal(artifact: Path | bytes, error: Exception) -> BackendError:
    text = _brief(error)
    left = "fallback to CPU EP has been explicitly disabled" in text
    return BackendError(
        "some nodes would run on the CPU"
        if left
        else f"onnxruntime {_library().__version__} refuses the artifact: {text}",
        where=str(artifact) if isinstance(artifact, Path) else "",
        remedy="fix free dimensions with `dimensions`, quantize the model for the accelerator, or "
        "allow cpu_fallback"
        if left
        else "",
    )


def _session_options(library: Any, options: Options) -> Any:
    session = library.SessionOptions()
    session.intra_op_num_threads = options.threads
    session.inter_op_num_threads = options.inter_op_threads
    session.execution_mode = getattr(
        library.ExecutionMode, _EXECUTION_MODES[options.execution_mode]
    )
    session.graph_optimization_level = getattr(
        library.GraphOptimizationLevel, _GRAPH_LEVELS[options.graph_level]
    )
    session.enable_cpu_mem_arena = options.memory_arena
    session.log_severity_level = 4
    spinning = "1" if options.spinning else "0"
    session.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    session.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    session.add_session_config_entry(_RECORD_PLACEMENT, "1")
    if not options.cpu_fallback:
        session.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, size in options.dimensions.items():
        session.add_free_dimension_override_by_name(name, size)
    return session


def _as_provider(choice: str | Provider) -> Provider:
    return choice if isinstance(choice, Provider) else Provider(choice)


def _check_providers(options: Options) -> None:
    """Every provider is there, plug-ins registered. Raises: BackendError."""
    for index, provider in enumerate(map(_as_provider, options.providers)):
        where = f"options.providers[{index}]"
        if _is_plugin(provider):
            _load_plugin(provider, where)
        elif provider.name not in (built_in := _built_in()):
            raise BackendError(
                f"this onnxruntime has no provider {provider.name!r}",
                where=where,
                expected="one of " + ", ".join(built_in),
                remedy=providers.remedy(provider.name)
                or did_you_mean(provider.name, {*built_in, *providers.known()})
                or "install the onnxruntime build that has it",
            )


@functools.cache
def _built_in() -> tuple[str, ...]:
    """The providers that the library itself has: asked before any plug-in is registered."""
    return tuple(_library().get_available_providers())


def _is_plugin(provider: Provider) -> bool:
    return provider.name not in _built_in() and bool(_plugin_path(provider))


def _plugin_path(provider: Provider) -> str:
    """The library of a provider's plug-in: as the options say, or in its installed package."""
    module_name = providers.PLUGINS.get(provider.name, "")
    if provider.library or not module_name:
        return provider.library
    if importlib.util.find_spec(module_name) is None:
        return ""
    return str(importlib.import_module(module_name).get_library_path())


def _load_plugin(provider: Provider, where: str) -> None:
    """Have the library load a provider's plug-in. Raises: BackendError."""
    if not hasattr(_library(), "register_execution_provider_library"):
        raise BackendError(
            f"onnxruntime {_library().__version__} takes no plug-ins",
            where=where,
            remedy="install onnxruntime 1.24 or newer",
        )
    path = _plugin_path(provider)
    try:
        _register(provider.name, path)
    except _foreign() as e:
        raise BackendError(
            f"the plug-in of {provider.name} does not load: {_brief(e)}",
            where=where,
            expected=f"{path}, for this onnxruntime",
            remedy=providers.remedy(provider.name),
        ) from e


@functools.cache
def _register(name: str, path: str) -> None:
    """Once for a process: the library refuses a second time."""
    _library().register_execution_provider_library(name, path)


def _add_provider(session: Any, provider: Provider, where: str) -> None:
    """Give a session a provider, where one of them is a plug-in: then all are given like this."""
    if provider.name == CPU:
        return  # it comes last by itself
    if not _is_plugin(provider):
        session.add_provider(provider.name, provider.options)
        return
    devices = [one for one in _library().get_ep_devices() if one.ep_name == provider.name]
    if not devices:
        raise BackendError(
            f"{provider.name} finds no device that it can drive",
            where=where,
            remedy="install the device's driver; see `edge-runtime doctor`",
        )
    try:
        session.add_provider_for_devices(devices, provider.options)
    except _foreign() as e:
        raise BackendError(f"{provider.name} refuses: {_brief(e)}", where=where) from e


def _check_dimensions(artifact: Path, dimensions: Mapping[str, int]) -> None:
    """The library ignores a name it does not know, so the model is looked at without overrides.

    That is a second load, paid only by variants that use the option.
    """
    plain = _session(artifact, Options(graph_level="disabled"))
    free = {dim for node in plain.get_inputs() for dim in node.shape if isinstance(dim, str)}
    for name in dimensions:
        if name not in free:
            raise UsageError(
                f"the model's inputs have no free dimension {name!r}",
                where=f"options.dimensions.{name}",
                expected="one of " + ", ".join(sorted(free)) if free else "no dimensions",
                remedy=did_you_mean(name, list(free)),
            )


def _specs(role: str, nodes: Any) -> tuple[TensorSpec, ...]:
    return tuple(_spec(role, node) for node in nodes)


def _spec(role: str, node: Any) -> TensorSpec:
    if node.type not in _DATATYPES:
        raise BackendError(
            f"{role} {node.name!r} is a {node.type}",
            expected="dense tensors of an Open Inference Protocol datatype",
            remedy="export the model without sequences and maps (scikit-learn: zipmap=False)",
        )
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(node.name, _DATATYPES[node.type], shape)


def _placement(session: Any, chosen: Sequence[Provider]) -> tuple[Placement, ...]:
    """Where nodes were placed; an older library can only tell which providers are registered."""
    options = {provider.name: provider.options for provider in chosen}

    def device(name: str) -> str:
        return providers.provider_device(name, options.get(name, {}))

    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return tuple(
            Placement(device(name), f"{name} (registered; placement not known)")
            for name in session.get_providers()
        )
    counts: Counter[str] = Counter()
    for part in ask():
        counts[part.ep_name] += len(part.get_nodes())
    return tuple(Placement(device(name), name, nodes) for name, nodes in counts.most_common())


def _memory(array: Array, is_bfloat16: bool) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Device, device id, element type, shape, address: what bind_input and bind_output take."""
    element_type = _BFLOAT16_ELEMENT_TYPE if is_bfloat16 else array.dtype.type
    return "cpu", 0, element_type, array.shape, array.ctypes.data


def _array(value: Any) -> Array:
    """The memory of an OrtValue (current libraries) or a copy (older ones, and bfloat16)."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    out = np.empty(value.shape(), dtype=np.uint16)
    ctypes.memmove(out.ctypes.data, value.data_ptr(), out.nbytes)
    return out


def _to_text(array: Array) -> Array:
    """BYTES as the library wants them (str): it would write b'...' for bytes objects.

    Raises:
        RequestError: an element is not UTF-8.
    """
    if array.dtype.kind == "U":
        return array
    try:
        flat = [item.decode() if isinstance(item, bytes) else str(item) for item in array.flat]
    except UnicodeDecodeError as e:
        raise RequestError(
            "a BYTES element is not text", expected="UTF-8: onnxruntime takes no other strings"
        ) from e
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(array.shape)


def _from_text(array: Array) -> Array:
    """Text comes back as bytes objects, like BYTES from the wire; other arrays as they are."""
    if array.dtype.kind not in "OU":
        return array
    flat = np.empty(array.size, dtype=object)
    flat[:] = [str(item).encode() for item in array.flat]
    return flat.reshape(array.shape)
