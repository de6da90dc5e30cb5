"""Why a quantized model is slower than it should be, and what a backend does without being asked.

Law of this file: graph and processor in, sentences out; a sentence that begins with "slower:" names
a cause. Each cause is one that users of such tools report again and again (onnxruntime#6732,
#20052, #24374, #26143), and is claimed only where the graph or the processor shows it.
"""

from __future__ import annotations

import functools
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize import litert_door, onnx_door, openvino_door
from quantize.results import Evaluated
from quantize.tflite_ops import Graph

# What makes 8-bit dot products fast. Without any of them int8 is emulated with more instructions.
DOT_PRODUCTS = frozenset(
    {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "avx_vnni_int8"}
)
# Units that compute in bfloat16: with one of them OpenVINO takes it for float models, untold.
BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})
INTERESTING = DOT_PRODUCTS | BFLOAT16 | {"avx2", "avx512f", "bf16", "fphp", "sve"}
# A graph in which more of the pairs than this touch no integer kernel pays for them all the time.
UNFUSED_SHARE = 0.5
NOTE = "edge-quantize"  # the key under which a file keeps what a pass says of it
_COMPUTING = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def notes(one: Evaluated, path: Path) -> tuple[str, ...]:
    """What a person should know of a measured variant."""
    said = list(_of_backend(one))
    if path.suffix == openvino_door.IR and one.steps:
        said += filter(None, [openvino_door.note(path, NOTE)])
    if path.suffix == ".onnx":
        model = onnx_door.load(path)
        said += [prop.value for prop in model.metadata_props if prop.key == NOTE]
        graph = model.graph
        kinds = Counter(node.op_type for node in graph.node)
        for cause in _CAUSES:
            said += cause(one, graph, kinds)
    if path.suffix == ".tflite" and one.steps:
        said += _of_tflite(litert_door.graph(path))
    return tuple(said)


def beside(one: Evaluated, reference: Evaluated) -> tuple[str, ...]:
    """What a person should know of a variant beside the float model."""
    if not 0 < one.macs < reference.macs:
        return ()
    return (
        f"{one.macs / 1e6:.2f} million multiplications a sample instead of"
        f" {reference.macs / 1e6:.2f}: {reference.macs / one.macs:.2f} times fewer",
    )


def _of_backend(one: Evaluated) -> Iterator[str]:
    if one.backend == "openvino" and one.precision in ("", "fp32", "fp16", "bf16"):
        hint = one.options.get("precision", "f32")
        yield f"computes in {hint}, as told; left to itself OpenVINO takes {_untold()}"


def _untold() -> str:
    """What OpenVINO computes float models in when nobody says."""
    if platform.machine() == "aarch64":
        return "f16 on ARM processors that have it"
    if processor_features() & BFLOAT16:
        return "bf16 on this processor"
    return "bf16 on processors with units for it (AVX512_BF16, AMX)"


def _of_tflite(graph: Graph) -> Iterator[str]:
    wide = [one for one in graph.operators if any(t.datatype == "int16" for t in one.inputs)]
    wide = [one for one in wide if one.weights is not None]
    if wide:
        yield (
            f"slower: {len(wide)} operators have 16-bit activations, for which LiteRT has no fast"
            f" kernel on CPUs ({', '.join(one.name for one in wide[:3])})"
        )


# --- causes ---------------------------------------------------------------------------------------


def _no_dot_product(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    if one.precision == "int8" and not processor_features() & DOT_PRODUCTS:
        yield (
            "slower: this processor has no 8-bit dot product (VNNI, dotprod): int8 runs are"
            " emulated; use float, or measure on the target"
        )


def _dynamic_convolutions(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    if kinds["ConvInteger"]:
        yield (
            f"slower: {kinds['ConvInteger']} convolutions are quantized while they run"
            " (ConvInteger has no fast kernel); quantize statically, or leave Conv out"
        )


def _signed_activations(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    if platform.machine() != "x86_64" or one.backend != "onnxruntime":
        return
    zeros = {item.name: item.data_type for item in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    signed = sum(
        1
        for node in made.values()
        if len(node.input) > 2 and zeros.get(node.input[2]) == onnx_door.library().TensorProto.INT8
    )
    if signed and signed == len(made):
        yield (
            "slower: activations are signed 8-bit (s8); onnxruntime's kernels for x86 want"
            " unsigned: use activations: u8"
        )


def _wide_activations(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    """16-bit activations: backends convert them and compute in float."""
    proto = onnx_door.library().TensorProto
    wide = {
        item.name for item in graph.initializer if item.data_type in (proto.UINT16, proto.INT16)
    }
    count = sum(
        1
        for node in graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in wide
    )
    if count:
        yield (
            f"slower: {count} tensors are quantized to 16 bits, for which there is no integer"
            " kernel: each is converted and computed in float"
        )


def _unfused_pairs(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    """Pairs around operators that have no integer kernel are computed, not fused away."""
    if not kinds["QuantizeLinear"]:
        return
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = {item.name for item in graph.initializer}
    live = [node for node in pairs if node.input[0] not in weights]
    lone = [
        node
        for node in live
        if not any(user.op_type in _FUSING for user in users.get(node.output[0], []))
    ]
    if live and len(lone) > UNFUSED_SHARE * len(live):
        kinds_of = Counter(u.op_type for n in lone for u in users.get(n.output[0], []))
        named = ", ".join(kind for kind, _ in kinds_of.most_common(3)) or "outputs"
        yield (
            f"slower: {len(lone)} of {len(live)} quantize/dequantize pairs stand before operators"
            f" without an integer kernel ({named}); exclude those nodes"
        )


def _float_left(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    """Convolutions and products that stayed float though the model is called int8."""
    if one.precision != "int8" or not kinds["QuantizeLinear"]:
        return
    made = {out: node.op_type for node in graph.node for out in node.output}
    computing = [node for node in graph.node if node.op_type in _COMPUTING]
    left = [node for node in computing if made.get(node.input[0]) != "DequantizeLinear"]
    if left:
        yield (
            f"{len(left)} of {len(computing)} convolutions and products compute in float"
            f" ({', '.join(node.name or node.op_type for node in left[:3])})"
        )


def _weights_only(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    """Some backends fuse the conversion into the product; then it is no cause."""
    if kinds["DequantizeLinear"] and not kinds["QuantizeLinear"] | kinds["DynamicQuantizeLinear"]:
        named = "slower: " if 0 < one.speedup < 1 else ""
        yield f"{named}weights are stored in 8 bits; what is not fused makes them float at each run"


def _zeros(one: Evaluated, graph: Any, kinds: Counter[str]) -> Iterator[str]:
    """Pruned weights are said to speed a model up; on these backends they do not."""
    if any(step["use"] == "prune_weights" for step in one.steps):
        yield (
            "weights that were pruned to 0 are computed like all others: runs are not faster, and"
            f" the file has its {one.size_bytes} bytes; compressed, as it travels, it has"
            f" {one.packed_bytes}"
        )


_FUSING = _COMPUTING | {
    "Add",
    "Mul",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Sigmoid",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Clip",
    "Reshape",
    "Flatten",
    "Transpose",
    "Resize",
    "Split",
    "Softmax",
    "Where",
    "Gather",
    "Squeeze",
    "Unsqueeze",
}
_CAUSES: tuple[Callable[[Evaluated, Any, Counter[str]], Iterator[str]], ...] = (
    _no_dot_product,
    _dynamic_convolutions,
    _signed_activations,
    _wide_activations,
    _unfused_pairs,
    _float_left,
    _weights_only,
    _zeros,
)


# --- the processor --------------------------------------------------------------------------------


@functools.cache
def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets that matter here, of the first core."""
    for line in _lines(cpuinfo):
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split()) & INTERESTING
    return frozenset()


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the system calls it; empty if it does not say."""
    for line in _lines(cpuinfo):
        if line.startswith(("model name", "Model", "Hardware")):
            return line.partition(":")[2].strip()
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
