"""The door to LiteRT, and to tflite-runtime where LiteRT is not installed.

Law of this file: the only one that imports ai_edge_litert and tflite_runtime, and it imports one of
them when a version or a load is asked for, not before. Every exception of the library becomes ours
here, once. No interpreter exists before `load`: a template may call `version()` and fork.

Source of what is relied on: the docstrings of `ai_edge_litert.interpreter` (the same API in both
libraries) and LiteRT's schema; tried with ai-edge-litert 2.3.0 and tflite-runtime 2.14.0. Facts met
on purpose:
- an interpreter is for one thread, and has one shape at a time. Giving it another shape costs 2 to
  4 us for a small graph and 0.2 ms for one of 240 nodes, so none is kept per shape;
- `reset_all_variables` leaves resource variables (VAR_HANDLE) as they are: only a new interpreter
  has fresh ones;
- a view of a tensor's memory forbids the next `invoke`, and memory may move in each: no view is
  kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from edge_runtime import tensors
from edge_runtime.backends import checks, heap
from edge_runtime.backends import options as typed
from edge_runtime.backends.protocol import Placement
from edge_runtime.errors import BackendError, UsageError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# More threads than any board we know has cores; a larger number is a typing error.
Threads = Annotated[int, msgspec.Meta(ge=1, le=256)]
# Each has its own activations and its own copy of the weights as XNNPACK packs them.
Interpreters = Annotated[int, msgspec.Meta(ge=1, le=64)]
Dimension = Annotated[int, msgspec.Meta(ge=1)]

INTERPRETERS_DEFAULT = 4  # at once; as many runners as boards have large cores


class Delegate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An external delegate: a shared library with TFLite's plug-in interface.

    Attributes:
        library: its name, as the system's loader finds it, or an absolute path.
        options: what its own documentation names.
        device: what it drives ("NPU", "TPU", …), for the report; known for the names in _DEVICES.
    """

    library: str
    options: dict[str, str] = {}
    device: str = ""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`variants[n].options` of this backend.

    Attributes:
        threads: of one run. 1: a worker shares the box with other workers, and for small models a
            second thread costs more than it brings; a profile may raise it.
        xnnpack: the fast kernels for CPUs. False: the plain ones, slower and nearer to the
            reference implementation.
        delegate: an accelerator's library; the nodes that it does not take run on the CPU.
        cpu_fallback: false: a node that the delegate does not take is a load error.
        interpreters: how many runs there may be at once; each interpreter costs memory. 0: one with
            a delegate (most devices serve one at a time) or a kept state, else 4. They are made
            when they are needed.
        stateful: for models with variables. `reset`: every request starts from the state that the
            file has. `keep`: a request goes on where the last one ended; one worker has one state.
        names: of inputs and outputs: those of the signature (tensor names where there is none), or
            the tensors' own, which are the ones that OpenVINO and ONNX exports of a graph have.
        shapes: fixes the shapes of inputs by name, as accelerators need it.
    """

    threads: Threads = 1
    xnnpack: bool = True
    delegate: Delegate | None = None
    cpu_fallback: bool = True
    interpreters: Literal[0] | Interpreters = 0
    stateful: Literal["reset", "keep"] = "reset"
    names: Literal["signature", "tensor"] = "signature"
    shapes: dict[str, tuple[Dimension, ...]] = {}


# numpy's name -> OIP datatype. BFLOAT16 and the packed four-bit types have no type in numpy.
_DATATYPES = {
    name: datatype for datatype, (name, _) in tensors.DATATYPES.items() if datatype != "BF16"
}

# The device that a delegate drives, by the beginning of its file's name.
_DEVICES = {
    "libedgetpu": "TPU",
    "libethosu": "NPU",
    "libvx_delegate": "NPU",
    "libQnnTFLiteDelegate": "NPU",
    "libneuron": "NPU",
    "libarmnnDelegate": "GPU",
    "libtensorflowlite_gpu_delegate": "GPU",
}
_PLUGIN_SYMBOLS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")

# Operators that keep a state in resource variables, and those that keep it in variable tensors.
_RESOURCE_OPERATORS = {"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE"}
_VARIABLE_OPERATORS = {
    "SVDF",
    "RNN",
    "LSTM",
    "UNIDIRECTIONAL_SEQUENCE_RNN",
    "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "BIDIRECTIONAL_SEQUENCE_RNN",
    "BIDIRECTIONAL_SEQUENCE_LSTM",
}
_DELEGATE_NODE = "DELEGATE"

_NEWEST_TFLITE_NUMPY = 1  # tflite-runtime's last release was built for numpy 1
_ERROR_SIZE_MAX = 600  # characters of a library's message
_UNRESOLVED = re.compile(r"unresolved custom op: (?P<name>[\w.-]*\w)")
_FOREIGN = (ValueError, RuntimeError, TypeError, MemoryError, OSError, AttributeError)


class LiteRt:
    """LiteRT (or tflite-runtime) as a backend."""

    name = "litert"
    fork_safe = True  # no thread exists before the first interpreter

    def version(self) -> str:
        """Imports the library; "2.3.0", or "2.14.0 (tflite-runtime)". Raises: BackendError."""
        used = library()
        return f"{used.version}{'' if used.is_litert else ' (tflite-runtime)'}"

    def load(self, artifact: Path, options: Mapping[str, Any]) -> LiteRtModel:
        """One .tflite file. Raises: UsageError, BackendError."""
        chosen = typed.decode(Options, options)
        used = library()
        if chosen.delegate is not None:
            _check_delegate(chosen.delegate)
        model = LiteRtModel(lambda: _Engine(used, artifact, chosen), chosen)
        heap.give_back()
        return model


# --- a model -------------------------------------------------------------------------------------


class LiteRtModel:
    """Interpreters of one file. Each run has one to itself; `concurrent`: there may be several."""

    def __init__(self, make: Callable[[], _Engine], options: Options) -> None:
        first = make()
        nodes = first.nodes()
        state = state_of(nodes)
        self.inputs = tuple(tensor.spec for tensor in first.inputs)
        self.outputs = tuple(tensor.spec for tensor in first.outputs)
        self.placement = placement_of(nodes, first.nodes_at_first, options)
        _check_placement(self.placement, options)
        self._make = make
        self.keeps_state = state != "none" and options.stateful == "keep"
        # A resource variable cannot be reset, so such an interpreter runs once.
        self._runs_once = state == "resource" and options.stateful == "reset"
        self._resets = state == "tensor" and options.stateful == "reset"
        count = options.interpreters or (
            1 if options.delegate or self.keeps_state else INTERPRETERS_DEFAULT
        )
        if self.keeps_state and count > 1:
            raise UsageError(
                f"{count} interpreters would have {count} states",
                where="options.interpreters",
                expected="1 with stateful: keep",
            )
        self.concurrent = count > 1
        self.facts = _facts((*first.inputs, *first.outputs))
        self._pool = _Pool(make, count, first)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See protocol.Model.run.

        It stands alone also where the state is kept: it starts from the file's state and leaves
        that of the bindings as it is. So a golden gives the same answer at any time.
        """
        checks.check_inputs(self.inputs, inputs)
        given = [np.asarray(inputs[spec.name], order="C") for spec in self.inputs]
        wanted: dict[str, Array | None] = dict.fromkeys(spec.name for spec in self.outputs)
        if self.keeps_state:
            return self._make().run(given, wanted)
        return self._run(given, wanted)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """See protocol.Model.bind. An interpreter has its own memory: tensors are copied."""
        checks.check_binding(self.inputs, self.outputs, inputs, outputs)
        given = [inputs[spec.name] for spec in self.inputs]
        wanted = dict(outputs)
        return lambda: self._run(given, wanted)

    def _run(self, given: list[Array], wanted: Mapping[str, Array | None]) -> dict[str, Array]:
        pool = self._pool
        engine = pool.take(tuple(array.shape for array in given))
        try:
            if self._resets:
                engine.reset()
            results = engine.run(given, wanted)
        except BaseException:
            pool.drop()  # what a failure leaves behind is not known
            raise
        if self._runs_once:
            pool.drop()
        else:
            pool.give(engine)
        return results


class _Pool:
    """At most `count` interpreters, made when needed. May be used from several threads."""

    def __init__(self, make: Callable[[], _Engine], count: int, first: _Engine) -> None:
        self._make = make
        self._resting = [first]
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()  # a semaphore in C
        for _ in range(count):
            self._tickets.put(None)

    def take(self, shapes: tuple[tuple[int, ...], ...]) -> _Engine:
        """One that rests, best of these shapes, or a new one; waits while all are taken."""
        self._tickets.get()
        resting = self._resting
        try:
            for index, engine in enumerate(resting):
                if engine.shapes == shapes:
                    return resting.pop(index)
        except IndexError:
            pass  # another thread was quicker
        try:
            return resting.pop()
        except IndexError:
            pass
        try:
            return self._make()
        except BaseException:
            self._tickets.put(None)
            raise

    def give(self, engine: _Engine) -> None:
        self._resting.append(engine)
        self._tickets.put(None)

    def drop(self) -> None:
        """The one that was taken is not to be used again."""
        self._tickets.put(None)


# --- an interpreter ------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """An input or output and its number in the interpreter.

    `quantization`: scale and zero point; None: not quantized, or not as a whole.
    """

    spec: TensorSpec
    number: int
    quantization: tuple[float, int] | None


class _Engine:
    """One interpreter. Used by one thread at a time."""

    def __init__(self, library: Library, artifact: Path, options: Options) -> None:
        try:
            with _quiet(options.delegate is None):
                interpreter = _interpreter(library, artifact, options)
                # What the delegate was given; XNNPACK's parts are added by allocate_tensors.
                self.nodes_at_first = len(_nodes(interpreter)) if options.delegate else 0
                names = _names(interpreter, options.names)
                self.inputs = _tensors("input", interpreter.get_input_details(), names[0])
                _fix_shapes(interpreter, self.inputs, options.shapes)
                interpreter.allocate_tensors()
            # After fixing, for that may have decided shapes of outputs as well.
            self.outputs = _tensors("output", interpreter.get_output_details(), names[1])
            self.inputs = tuple(_fixed(tensor, options.shapes) for tensor in self.inputs)
        except _FOREIGN as e:
            raise _refusal(library, artifact, options, e) from e
        self.shapes: tuple[tuple[int, ...], ...] = tuple(
            tuple(map(int, detail["shape"])) for detail in interpreter.get_input_details()
        )
        self._interpreter = interpreter
        self._inputs = [tensor.number for tensor in self.inputs]
        self._outputs = {tensor.spec.name: tensor.number for tensor in self.outputs}
        self._texts = {t.spec.name for t in self.outputs if t.spec.datatype == "BYTES"}

    def nodes(self) -> list[Node]:
        """The main graph's nodes, delegated parts behind those of the file."""
        return _nodes(self._interpreter)

    def reset(self) -> None:
        """Variable tensors get the values of the file."""
        self._interpreter.reset_all_variables()

    def run(self, given: list[Array], wanted: Mapping[str, Array | None]) -> dict[str, Array]:
        """One run. Outputs are copies: new arrays where none is given. Raises: as Model.run."""
        interpreter = self._interpreter
        try:
            shapes = tuple(array.shape for array in given)
            if shapes != self.shapes:
                self._resize(shapes)
            for number, array in zip(self._inputs, given, strict=True):
                interpreter.set_tensor(number, array)
            interpreter.invoke()
        except _FOREIGN as e:
            raise BackendError(f"LiteRT failed to run: {_brief(e)}") from e
        return {name: self._output(name, out) for name, out in wanted.items()}

    def _resize(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        # Not the library's `strict`: shapes are checked already, and it forgets which dimensions of
        # a tensor of strings are free as soon as one was set.
        for number, shape in zip(self._inputs, shapes, strict=True):
            self._interpreter.resize_tensor_input(number, shape)
        self._interpreter.allocate_tensors()
        self.shapes = shapes

    def _output(self, name: str, out: Array | None) -> Array:
        number = self._outputs[name]
        if out is None or not out.size or name in self._texts:
            result: Array = self._interpreter.get_tensor(number)
            if out is None:
                return result
        else:
            result = self._interpreter.tensor(number)()  # a view: gone before the next invoke
        checks.check_given(name, result, out)
        np.copyto(out, result)
        return out


def _interpreter(library: Library, artifact: Path, options: Options) -> Any:
    module = library.module
    resolvers = module.OpResolverType
    delegates = []
    if options.delegate is not None:
        delegates = [module.load_delegate(options.delegate.library, dict(options.delegate.options))]
    return module.Interpreter(
        model_path=str(artifact),
        num_threads=options.threads,
        experimental_delegates=delegates,
        experimental_op_resolver_type=resolvers.AUTO
        if options.xnnpack
        else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )


def _names(interpreter: Any, kind: str) -> tuple[dict[int, str], dict[int, str]]:
    """Tensor number -> name, for inputs and outputs.

    Those of the first signature (by key) that covers exactly the inputs and outputs of the main
    graph, with one name for each; else the tensors' own. As `bundle/tflite_graph.py` has it.
    """
    sides = (interpreter.get_input_details(), interpreter.get_output_details())
    own = tuple({int(d["index"]): str(d["name"]) for d in details} for details in sides)
    for key in sorted(interpreter.get_signature_list()) if kind == "signature" else ():
        runner = interpreter.get_signature_runner(key)
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
        if _is_the_same(inputs, own[0]) and _is_the_same(outputs, own[1]):
            return _by_index(inputs), _by_index(outputs)
    return own[0], own[1]


def _by_index(details: Mapping[str, Any]) -> dict[int, str]:
    return {int(detail["index"]): name for name, detail in details.items()}


def _is_the_same(details: Mapping[str, Any], own: Mapping[int, str]) -> bool:
    """Whether the tensors of a signature are those of the main graph: numbers and names agree."""
    found = {int(detail["index"]): str(detail["name"]) for detail in details.values()}
    return found == own and len(details) == len(own)


def _tensors(
    role: str, details: Iterable[Mapping[str, Any]], names: Mapping[int, str]
) -> tuple[_Tensor, ...]:
    return tuple(_tensor(role, detail, names[int(detail["index"])]) for detail in details)


def _tensor(role: str, detail: Mapping[str, Any], name: str) -> _Tensor:
    dtype = np.dtype(detail["dtype"])
    datatype = "BYTES" if dtype.kind in "SUO" else _DATATYPES.get(dtype.name, "")
    if not datatype:
        raise BackendError(
            f"{role} {name!r} is of {dtype.name}",
            expected="tensors of an Open Inference Protocol datatype",
            remedy="convert the model with float or integer inputs and outputs",
        )
    shape, free = detail["shape"], detail.get("shape_signature", ())
    dims = free if len(free) == len(shape) else shape
    scale, zero_point = detail["quantization"]  # (0, 0): none, or one for each channel
    quantization = (float(scale), int(zero_point)) if scale else None
    spec = TensorSpec(name, datatype, tuple(map(int, dims)))
    return _Tensor(spec, int(detail["index"]), quantization)


def _facts(ends: Iterable[_Tensor]) -> dict[str, Any]:
    """How numbers that are served quantized are meant: real = scale * (stored - zero_point)."""
    found = {
        tensor.spec.name: {"scale": tensor.quantization[0], "zero_point": tensor.quantization[1]}
        for tensor in ends
        if tensor.quantization is not None
    }
    return {"quantization": found} if found else {}


def _fix_shapes(
    interpreter: Any, inputs: tuple[_Tensor, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    by_name = {tensor.spec.name: tensor for tensor in inputs}
    for name, shape in shapes.items():
        where = f"options.shapes.{name}"
        if name not in by_name:
            raise UsageError(
                f"the model has no input {name!r}",
                where=where,
                expected="one of " + ", ".join(map(repr, by_name)),
                remedy=did_you_mean(name, by_name),
            )
        spec, number, _ = by_name[name]
        if not tensors.shape_matches(shape, spec.shape):
            raise UsageError(
                f"{list(shape)} does not fit", where=where, expected=f"{list(spec.shape)}"
            )
        interpreter.resize_tensor_input(number, shape)


def _fixed(tensor: _Tensor, shapes: Mapping[str, tuple[int, ...]]) -> _Tensor:
    spec = tensor.spec
    shape = tuple(shapes.get(spec.name, spec.shape))
    return tensor._replace(spec=TensorSpec(spec.name, spec.datatype, shape))


# --- where nodes run -----------------------------------------------------------------------------


class Node(NamedTuple):
    operator: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _nodes(interpreter: Any) -> list[Node]:
    """The main graph's nodes: those of the file, then one for each part that was delegated.

    The library has this for its own debugging only; without it the placement is not known.
    """
    ask = getattr(interpreter, "_get_ops_details", None)
    if ask is None:
        return []
    return [
        Node(op["op_name"], tuple(map(int, op["inputs"])), tuple(map(int, op["outputs"])))
        for op in ask()
    ]


def replaced(nodes: list[Node], part: Node) -> set[int]:
    """The numbers of the nodes that a delegated part stands for.

    Found backwards from the part's outputs to its inputs; what has no producer is a constant.
    """
    producers = {
        tensor: number
        for number, node in enumerate(nodes)
        if node.operator != _DELEGATE_NODE
        for tensor in node.outputs
    }
    taken: set[int] = set()
    border, open_tensors = set(part.inputs), list(part.outputs)
    while open_tensors:
        number = producers.get(open_tensors.pop())
        if number is not None and number not in taken:
            taken.add(number)
            open_tensors += [tensor for tensor in nodes[number].inputs if tensor not in border]
    return taken


def placement_of(nodes: list[Node], nodes_at_first: int, options: Options) -> tuple[Placement, ...]:
    """How many nodes of the file run where.

    Args:
        nodes: all, parts included.
        nodes_at_first: so many of them there were before XNNPACK took its parts.
        options: whose the first parts are.
    """
    if not nodes:
        return (Placement("CPU", "LiteRT (placement not known)"),)
    taken: dict[bool, set[int]] = {True: set(), False: set()}
    for number, part in enumerate(nodes):
        if part.operator == _DELEGATE_NODE:
            taken[number < nodes_at_first] |= replaced(nodes, part)
    rest = sum(node.operator != _DELEGATE_NODE for node in nodes)
    rest -= len(taken[True]) + len(taken[False])
    found = [Placement("CPU", "XNNPACK", len(taken[False])), Placement("CPU", "kernels", rest)]
    if options.delegate is not None:
        name = PurePath(options.delegate.library).name
        found.insert(0, Placement(_device(options.delegate), name, len(taken[True])))
    return tuple(place for place in found if place.nodes)


def _device(delegate: Delegate) -> str:
    name = PurePath(delegate.library).name
    known = (device for start, device in _DEVICES.items() if name.startswith(start))
    return delegate.device or next(known, "DELEGATE")


def _check_placement(placement: tuple[Placement, ...], options: Options) -> None:
    """With `cpu_fallback: false`, the delegate has all nodes. Raises: BackendError."""
    if options.delegate is None or options.cpu_fallback:
        return
    on_cpu = [place.nodes for place in placement if place.device == "CPU"]
    if on_cpu:
        nodes = sum(place.nodes for place in placement)
        raise BackendError(
            f"{sum(on_cpu)} of {nodes} nodes would run on the CPU"
            if nodes
            else "which nodes would run on the CPU is not known",
            where="options.cpu_fallback",
            expected=f"all of them on {options.delegate.library}",
            remedy="convert the model with operators that it takes, or allow cpu_fallback",
        )


def state_of(nodes: list[Node]) -> Literal["none", "tensor", "resource"]:
    """Where a graph of these nodes keeps a state from run to run."""
    operators = {node.operator for node in nodes}
    if operators & _RESOURCE_OPERATORS:
        return "resource"
    return "tensor" if operators & _VARIABLE_OPERATORS else "none"


# --- the library ---------------------------------------------------------------------------------


class Library(NamedTuple):
    """`module` has Interpreter, OpResolverType and load_delegate."""

    module: Any
    version: str
    is_litert: bool


@functools.cache
def library() -> Library:
    """LiteRT, else tflite-runtime. Raises: BackendError: neither imports, or numpy is too new."""
    try:
        import ai_edge_litert
        from ai_edge_litert import interpreter

        return Library(interpreter, str(ai_edge_litert.__version__), True)
    except ImportError as e:
        if e.name is None or e.name.partition(".")[0] != "ai_edge_litert":
            raise _no_import("ai-edge-litert", e, "litert") from e  # it is there, and broken
    except OSError as e:  # a shared object that does not load
        raise _no_import("ai-edge-litert", e, "litert") from e
    return _old_library()


def _old_library() -> Library:
    major = int(np.__version__.partition(".")[0])
    try:
        with _quiet(major > _NEWEST_TFLITE_NUMPY):  # numpy explains the clash in forty lines
            import tflite_runtime
            from tflite_runtime import interpreter
    except ModuleNotFoundError as e:
        if e.name == "tflite_runtime":
            raise _no_import("ai-edge-litert, or else tflite-runtime,", e, "litert") from e
        raise _no_import("tflite-runtime", e, "tflite") from e
    except (ImportError, OSError, AttributeError) as e:
        if major > _NEWEST_TFLITE_NUMPY:
            raise _numpy_clash() from e
        raise _no_import("tflite-runtime", e, "tflite") from e
    if major > _NEWEST_TFLITE_NUMPY:  # it may import, and then fails at the first interpreter
        raise _numpy_clash()
    return Library(interpreter, str(tflite_runtime.__version__), False)


def _numpy_clash() -> BackendError:
    return BackendError(
        f"tflite-runtime does not work with numpy {np.__version__}",
        expected="numpy < 2",
        remedy="pip install ai-edge-litert (Python 3.11 and newer, x86_64 and aarch64), "
        "or pip install 'edge-runtime[tflite]', which keeps numpy below 2",
    )


def _no_import(what: str, error: Exception, extra: str) -> BackendError:
    return BackendError(
        f"{what} does not import: {_brief(error)}",
        expected=f"a wheel for {platform.machine()} and Python {platform.python_version()}",
        remedy=f"pip install 'edge-runtime[{extra}]'",
    )


def _check_delegate(delegate: Delegate) -> None:
    """The library loads and is a delegate; asked for by ourselves, for clear words.

    Raises:
        UsageError: a relative path.
        BackendError: it does not load, or has not the plug-in's functions.
    """
    where = "options.delegate.library"
    if "/" in delegate.library and not delegate.library.startswith("/"):
        raise UsageError(
            f"{delegate.library!r} is a relative path",
            where=where,
            expected="a library's name, or an absolute path",
        )
    try:
        library = ctypes.CDLL(delegate.library)
    except OSError as e:
        raise BackendError(
            f"the delegate does not load: {_brief(e)}",
            where=where,
            remedy="install the accelerator's runtime library on the device",
        ) from e
    missing = [name for name in _PLUGIN_SYMBOLS if not hasattr(library, name)]
    if missing:
        raise BackendError(
            f"{delegate.library} is no external delegate",
            where=where,
            expected=f"a library that has {missing[0]}",
        )


def _refusal(library: Library, artifact: Path, options: Options, error: Exception) -> BackendError:
    """Why an artifact was not loaded."""
    name = "LiteRT" if library.is_litert else "tflite-runtime"
    text = _brief(error)
    custom = _UNRESOLVED.search(text)
    if custom:
        return BackendError(
            f"the operator {custom['name']!r} is not one of {name} {library.version}",
            where=str(artifact),
            expected="options.delegate with the accelerator's library that has it",
            remedy="this model was compiled for an accelerator; use its delegate, "
            "or a variant of the model that was not",
        )
    with_delegate = f" with {options.delegate.library}" if options.delegate else ""
    return BackendError(
        f"{name} {library.version} refuses the artifact{with_delegate}: {text}",
        where=str(artifact),
    )


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """While a model loads, what the library prints does not reach stderr, which is the journal's.

    Errors come as exceptions; the library has no other way to be told. Not with a delegate: what
    its library prints before it crashes is all that is known of it.
    """
    if not wanted:
        yield
        return
    with _stderr_lock:
        # In memory: a worker's sandbox lets no file be opened for writing, /dev/null neither.
        kept, sink = os.dup(2), os.memfd_create("litert-stderr")
        os.dup2(sink, 2)
        os.close(sink)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


_stderr_lock = threading.Lock()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:_ERROR_SIZE_MAX]
