"""OpenVINO's devices: what is asked for, what each is told, where the model went.

Law of this file: from options and a model that was read to a compiled one and its placement. It
runs nothing, and imports no library: what it calls belongs to the objects that it is given.

Source of what is relied on: OpenVINO 2026's documentation, "Device properties", "Heterogeneous
execution", "Model caching". Traps that are met on purpose:
- on processors with bf16 units fp32 models run in bf16 by default: the precision is always stated;
- AUTO hides which device failed and why, and may move to the CPU later, at any run: AUTO is done
  here, one device after the other, and the reasons are kept;
- a CPU with one stream of one thread runs in the thread that calls, and there loses every error of
  a run: the outputs stay what they were (another client's, perhaps), the failed run stays queued
  and is begun again by the next. HETERO does so too. These run by the library's queue instead
  (seen with 2026.4.1);
- the library's own cache of compiled models writes files from the process that loads: a worker may
  not, and nothing would tell a damaged file from a whole one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from edge_runtime.backends.openvino_library import (
    Run,
    brief,
    foreign,
    library,
    run_by_queue,
    run_directly,
)
from edge_runtime.backends.protocol import BlobCache, Placement
from edge_runtime.errors import BackendError, UsageError

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
        compiled: keep what was compiled for the next load. auto: but not for the CPU, where reading
            it back takes as long as compiling.
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
    compiled: Literal["auto", "keep", "discard"] = "auto"
    hint: Literal["latency", "throughput"] = "latency"
    stateful: Literal["reset", "keep"] = "reset"
    shapes: dict[str, list[Dimension]] = {}


_AUTO_ORDER = ("GPU", "NPU", "CPU")
_DEFAULT_PRECISIONS = {"CPU": "f32", "GPU": "f32", "NPU": "f16"}
# Options that only some devices have: their property in the library. An option that was given and
# that no device in question has is an error.
_PROPERTIES = {
    "precision": "INFERENCE_PRECISION_HINT",
    "hint": "PERFORMANCE_HINT",
    "streams": "NUM_STREAMS",
    "threads": "INFERENCE_NUM_THREADS",
}

# What tells one device and driver from another, of what a device has.
_IDENTITY = (
    "FULL_DEVICE_NAME",
    "DEVICE_ARCHITECTURE",
    "DEVICE_UUID",
    "DRIVER_VERSION",
    "GPU_DRIVER_VERSION",
    "NPU_DRIVER_VERSION",
    "NPU_COMPILER_VERSION",
    "NPU_COMPILER_TYPE",
)
# Nodes of a compiled model that compute nothing.
_NOT_WORK = frozenset({"Input", "Output", "Const", "Parameter", "Result", "Constant"})

_REFUSAL_SIZE_MAX = 200  # of one in a placement, which `models` prints


def check_device(device: str) -> None:
    """Whether a device string is one. Raises: UsageError."""
    if not _DEVICE.fullmatch(device):
        raise UsageError(
            f"{device!r} is no device",
            where="options.device",
            expected="CPU, GPU, GPU.1, NPU, AUTO, or a list such as AUTO:NPU,CPU or HETERO:GPU,CPU",
        )


def check_given(core: Any, chosen: Options, given: Mapping[str, Any]) -> None:
    """No option that was given is without effect. Raises: UsageError.

    A device that is not there is not judged: that it is missing is what will be told.
    """
    there = {name.partition(".")[0] for name in core.available_devices}
    devices = _devices(core, chosen.device)
    if any(device.partition(".")[0] not in there for device in devices):
        return
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
    except foreign():
        return frozenset()


def compiled_for(
    core: Any, model: Any, options: Options, cache: BlobCache | None
) -> tuple[Any, tuple[Placement, ...]]:
    """The compiled model and where it runs.

    Raises:
        BackendError: no device takes it; each says why.
    """
    if options.device.startswith("HETERO"):
        return _compile_hetero(core, model, options)
    refusals: list[str] = []
    for device in _devices(core, options.device):
        try:
            told = _properties(core, device, options)
            if cache is None or not _is_kept(core, device, options):
                compiled = core.compile_model(model, device, told)
            else:
                compiled = _compile_once(core, model, device, told, cache)
            return compiled, (_placement(compiled, device, refusals),)
        except foreign() as e:
            refusals.append(f"{device}: {brief(e)}")
    raise _refused(options, refusals)


def way_to_run(compiled: Any) -> Run:
    """How requests of this model are run so that their errors are heard.

    What counts is the number of threads that the library settled on: on one core it is 1, whatever
    the options say.
    """
    threads = _property(compiled, "INFERENCE_NUM_THREADS")
    return run_directly() if isinstance(threads, int) and threads > 1 else run_by_queue()


def _is_kept(core: Any, device: str, options: Options) -> bool:
    """Whether what is compiled for a device is worth keeping, and can be."""
    worth = options.compiled == "keep" or (options.compiled == "auto" and device != "CPU")
    return worth and "EXPORT_IMPORT" in core.get_property(device, "OPTIMIZATION_CAPABILITIES")


def _compile_once(
    core: Any, model: Any, device: str, told: dict[str, Any], cache: BlobCache
) -> Any:
    """What an earlier load has compiled, or else a compilation, which is then kept.

    Raises: what the library raises.
    """
    key = _key(core, model, device, told)
    blob = cache.get(key)
    if blob is not None:
        try:
            return core.import_model(blob, device, told)
        except foreign():
            pass  # the driver has the last word; the new blob takes the place of this one
    compiled = core.compile_model(model, device, told)
    try:
        cache.put(key, compiled.export_model().getvalue())
    except foreign():
        pass  # it runs, and that is what it was compiled for
    return compiled


def _key(core: Any, model: Any, device: str, told: dict[str, Any]) -> str:
    """All that a compiled blob depends on besides the artifact, as text."""
    supported = _supported(core, device)
    properties = (name for name in _IDENTITY if name in supported)
    facts = {
        "library": str(library().__version__),
        "device": {"name": device}
        | {name: str(core.get_property(device, name)) for name in properties},
        "told": {name: str(value) for name, value in told.items()},
        "shapes": [str(port.get_partial_shape()) for port in model.inputs],
    }
    return msgspec.json.encode(facts, order="sorted").decode()


def _compile_hetero(core: Any, model: Any, options: Options) -> tuple[Any, tuple[Placement, ...]]:
    try:
        for device in _devices(core, options.device):
            core.set_property(device, _properties(core, device, options))
        compiled = core.compile_model(model, options.device)
        places = core.query_model(model, options.device)
    except foreign() as e:
        raise _refused(options, [brief(e)]) from e
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
    """What the device is told, of what it takes."""
    supported = _supported(core, device)
    told: dict[str, Any] = {
        "PERFORMANCE_HINT": options.hint.upper(),
        "NUM_STREAMS": options.streams,
        "INFERENCE_NUM_THREADS": options.streams * options.threads,
        "ENABLE_CPU_PINNING": False,  # the worker's cpuset says where it runs
        **_precision(device, options.precision),
    }
    return {name: value for name, value in told.items() if name in supported}


def _precision(device: str, precision: str) -> dict[str, str]:
    if precision == "model":
        return {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "dynamic"}
    if precision == "default":
        precision = _DEFAULT_PRECISIONS[device.partition(".")[0]]
    return {"INFERENCE_PRECISION_HINT": precision}


def _placement(compiled: Any, device: str, refusals: Sequence[str]) -> Placement:
    """The device that executes, by its own word, and what was tried before it."""
    told = _property(compiled, "EXECUTION_DEVICES") or device
    executes = told if isinstance(told, str) else ",".join(told)
    precision = _property(compiled, "INFERENCE_PRECISION_HINT")
    detail = f"{executes}, {precision.get_type_name()}" if precision else executes
    if refusals:
        detail += "; refused by " + "; ".join(text[:_REFUSAL_SIZE_MAX] for text in refusals)
    return Placement(executes.partition(".")[0], detail, _node_count(compiled))


def _property(compiled: Any, name: str) -> Any:
    """What a compiled model says of itself; None where its device does not say."""
    try:
        return compiled.get_property(name)
    except foreign():
        return None


def _node_count(compiled: Any) -> int:
    try:
        ops = compiled.get_runtime_model().get_ops()
    except foreign():  # not every device shows what it made of the model
        return 0
    return sum(_layer(op) not in _NOT_WORK for op in ops)


def _layer(op: Any) -> str:
    info = op.get_rt_info()
    return str(info["layerType"].value if "layerType" in info else op.get_type_name())
