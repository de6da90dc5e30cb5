"""What must hold before a native library sees an artifact.

Law of this file: it judges, it does not run, and it decides from the file's own bytes, never from
its name alone. What it lets through may still be refused by the backend; what it refuses never gets
there. Formats, the formats that each backend may be given, allowed operator domains and forbidden
operators are tables. Everything that is not in a table is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import msgspec

from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle import onnx_graph, openvino_ir, tflite_graph
from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.bundle.onnx_graph import OnnxGraph, Value
from edge_runtime.bundle.openvino_ir import IrGraph
from edge_runtime.bundle.source import Source
from edge_runtime.bundle.tflite_graph import TfliteGraph
from edge_runtime.errors import BundleError
from edge_runtime.tensors import TensorSpec

Severity = Literal["error", "warning", "note"]
OpenBlob = Callable[[str], Source]


class Finding(msgspec.Struct, frozen=True):
    """One remark. An error means: this must not be loaded."""

    severity: Severity
    where: str
    message: str
    remedy: str = ""


class Limits(msgspec.Struct, frozen=True):
    """What an artifact may have at most."""

    # protobuf, and with it onnxruntime, cannot read more than 2 GiB in one file.
    artifact_bytes_max: int = (1 << 31) - 1
    # The largest language models have some 10,000; each costs the loader time and memory.
    nodes_max: int = 200_000
    reference_bytes_max: int = 16 * 1024 * 1024


LIMITS = Limits()


class Artifact(NamedTuple):
    """What lint learnt of an artifact; None where the format is not read so far."""

    format: str
    inputs: tuple[Value, ...] | None
    outputs: tuple[Value, ...] | None
    graph: OnnxGraph | TfliteGraph | IrGraph | None
    findings: tuple[Finding, ...]


# --- tables --------------------------------------------------------------------------------------

# Operator sets that onnxruntime itself brings. "" is the ONNX standard.
STANDARD_DOMAINS = ("", "ai.onnx.ml", "com.microsoft")

# Operators of standard domains that run code or open files of the artifact's choice.
FORBIDDEN_OPERATORS: dict[tuple[str, str], str] = {
    ("com.microsoft", "EPContext"): "it makes the runtime load a compiled blob or another file",
    ("com.microsoft", "PythonOp"): "it runs Python code",
    ("com.microsoft", "PythonOpGrad"): "it runs Python code",
    ("com.microsoft", "ATen"): "it calls into another framework",
}

# Custom operators of TFLite that LiteRT and tflite-runtime bring.
TFLITE_CUSTOM_OPERATORS = ("AudioSpectrogram", "Mfcc", "TFLite_Detection_PostProcess")


class Compiled(NamedTuple):
    """Whose compiler leaves an operator, and the delegate that has it."""

    title: str
    device_class: str  # as device profiles call it
    delegate: str


# Custom operators that accelerators' compilers leave in TFLite files.
DELEGATE_OPERATORS: dict[str, Compiled] = {
    "ethos-u": Compiled("Arm Ethos-U (compiled with vela)", "npu", "libethosu_delegate.so"),
    "edgetpu-custom-op": Compiled("Coral EdgeTPU", "edgetpu", "libedgetpu.so.1"),
    "vsi-npu": Compiled("VeriSilicon NPU", "npu", "libvx_delegate.so"),
}

# Operators whose indices a backend does not check (tried with OpenVINO 2026.4.1; docs/backends.md).
UNCHECKED_INDICES: dict[str, frozenset[str]] = {
    "openvino": frozenset({"GatherND", "GATHER_ND", "ScatterElements", "ScatterElementsUpdate"})
}
_INDEX_DATATYPES = frozenset({"INT32", "INT64", "UINT32", "UINT64"})

# What a backend may be given. A backend that is not here gets nothing.
BACKEND_FORMATS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnx",),
    "openvino": ("onnx", "tflite", "openvino-ir"),
    "litert": ("tflite",),
    "reference": ("reference",),
}


class _Format(NamedTuple):
    """How a format is recognised, by its first bytes and the end of its file name, and read.

    `read` is None for formats that are known only to be refused, for `reason`.
    """

    name: str
    is_it: Callable[[bytes, str], bool]
    read: Callable[[Source, Limits], Artifact] | None
    reason: str = ""


_HEAD_BYTES = 64
CONVERT = "convert it to ONNX or TFLite"


# --- the whole bundle ----------------------------------------------------------------------------


def lint(manifest: Manifest, open_blob: OpenBlob, limits: Limits = LIMITS) -> list[Finding]:
    """All remarks on a bundle, errors first.

    Args:
        manifest: as parsed.
        open_blob: gives the source of a blob by sha256: `Bundle.blob`, or one over the store's
            verified files. What is linted must be what is loaded later, so a daemon lints its own
            copy and not the file of a client.
        limits: what an artifact may have at most.

    Raises:
        StorageError, NotFoundError: a blob cannot be read.
    """
    findings = [*_manifest_findings(manifest)]
    for index, variant in enumerate(manifest.variants):
        findings += lint_variant(manifest, variant, open_blob, limits, f"variants[{index}]")
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def check(manifest: Manifest, open_blob: OpenBlob, limits: Limits = LIMITS) -> None:
    """Refuse a bundle that has an error.

    Raises:
        BundleError: the first error.
    """
    refuse(lint(manifest, open_blob, limits))


def refuse(findings: list[Finding]) -> None:
    """Raise the first error among findings, if there is one."""
    for finding in findings:
        if finding.severity == "error":
            raise BundleError(finding.message, where=finding.where, remedy=finding.remedy)


def lint_variant(
    manifest: Manifest,
    variant: Variant,
    open_blob: OpenBlob,
    limits: Limits = LIMITS,
    where: str = "",
) -> list[Finding]:
    """All remarks on one variant: its artifact, its backend and whether they fit the manifest."""
    here = f"{manifests.FILE_NAME}: {where or variant.name}"
    blob = variant.artifact
    artifact = lint_artifact(open_blob(blob.sha256), blob.filename, limits, variant.custom_domains)
    findings = list(artifact.findings)
    findings += _backend_findings(variant, artifact, here)
    findings += _index_findings(variant.backend, artifact, f"{here}.artifact")
    findings += _option_findings(variant.options, f"{here}.options")
    if isinstance(artifact.graph, TfliteGraph):
        domains = variant.custom_domains
        findings += _tflite_findings(
            artifact.graph, variant.backend, variant.options, domains, f"{here}.artifact"
        )
    inputs, outputs = signature_of(artifact, variant.backend, variant.options)
    if inputs is not None:
        findings += _signature_findings("inputs", manifest.inputs, inputs, here)
    if outputs is not None:
        findings += _signature_findings("outputs", manifest.outputs, outputs, here)
    return findings


def signature_of(
    artifact: Artifact, backend: str, options: Mapping[str, Any]
) -> tuple[tuple[Value, ...] | None, tuple[Value, ...] | None]:
    """Inputs and outputs under the names that a backend gives them.

    Only TFLite files have two sets of names; of the backends that read them, only litert knows
    those of signatures.
    """
    graph = artifact.graph
    if not isinstance(graph, TfliteGraph):
        return artifact.inputs, artifact.outputs
    names = options.get("names", "signature") if backend == "litert" else "tensor"
    return tflite_graph.values(graph.inputs, names), tflite_graph.values(graph.outputs, names)


def lint_file(source: Source, filename: str) -> list[Finding]:
    """All remarks on a model file as a variant of its usual backend, without options.

    Raises:
        StorageError: it cannot be read.
    """
    artifact = lint_artifact(source, filename)
    if not isinstance(artifact.graph, TfliteGraph):
        return list(artifact.findings)
    found = _tflite_findings(artifact.graph, "litert", {}, (), source.where)
    return [*artifact.findings, *found]


def compiled_for(graph: OnnxGraph | TfliteGraph | IrGraph | None) -> Compiled | None:
    """The accelerator that a TFLite file was compiled for; None: for none that we know."""
    if not isinstance(graph, TfliteGraph):
        return None
    names = (name for name in DELEGATE_OPERATORS if name in graph.custom_operators)
    return next((DELEGATE_OPERATORS[name] for name in names), None)


def lint_artifact(
    source: Source,
    filename: str = "",
    limits: Limits = LIMITS,
    custom_domains: tuple[str, ...] = (),
) -> Artifact:
    """What one artifact is, with all remarks on it.

    Args:
        source: its bytes.
        filename: the name that it came with, "" if none.
        limits: what it may have at most.
        custom_domains: operator domains allowed beside the standard ones.

    Raises:
        StorageError: it cannot be read.
    """
    known = recognise(source.read_at(0, min(_HEAD_BYTES, source.size)), filename)
    if known is None or known.read is None:
        return _unreadable(source, known)
    if source.size > limits.artifact_bytes_max:
        message = f"has {source.size} bytes; at most {limits.artifact_bytes_max} are allowed"
        return _refused(known.name, Finding("error", source.where, message, "use a smaller model"))
    try:
        artifact = known.read(source, limits)
    except BundleError as e:
        message = f"{e.message} (expected {e.expected})" if e.expected else e.message
        return _refused(known.name, Finding("error", e.where, message, e.remedy))
    if not isinstance(artifact.graph, OnnxGraph):
        return artifact
    findings = _operator_findings(artifact.graph, custom_domains, source.where)
    return artifact._replace(findings=(*artifact.findings, *findings))


def recognise(head: bytes, filename: str) -> _Format | None:
    """The row of FORMATS for a file's first bytes; None if there is none."""
    name = PurePath(filename.lower()).name
    return next((row for row in FORMATS if row.is_it(head, name)), None)


def _refused(name: str, finding: Finding) -> Artifact:
    return Artifact(name, None, None, None, (finding,))


def _unreadable(source: Source, known: _Format | None) -> Artifact:
    name = known.name if known else "unknown"
    reason = known.reason if known else "is of no format that edge-runtime knows"
    return _refused(name, Finding("error", source.where, reason, CONVERT))


# --- parts ---------------------------------------------------------------------------------------


def _manifest_findings(manifest: Manifest) -> Iterator[Finding]:
    name = manifests.FILE_NAME
    for path, key, near in manifests.near_misses(manifest):
        message = f"the key {key!r} is not known and has no effect"
        yield Finding("warning", f"{name}: {path}", message, f"did you mean {near!r}?")
    if not manifest.goldens:
        message = "there are no goldens, so a wrong answer cannot be noticed"
        yield Finding("warning", f"{name}: goldens", message, "create the bundle with --goldens 3")
    yield from _label_findings(manifest)
    yield from _image_findings(manifest)


def _label_findings(manifest: Manifest) -> Iterator[Finding]:
    step = manifest.postprocess
    if step is None or not step.labels:
        return
    output = next((o for o in manifest.outputs if o.name == step.output), manifest.outputs[0])
    if output.shape and output.shape[-1] not in (-1, len(step.labels)):
        message = f"{len(step.labels)} labels for {output.shape[-1]} values of {output.name!r}"
        where = f"{manifests.FILE_NAME}: postprocess.labels"
        yield Finding("warning", where, message, "give one label for each value")


def _image_findings(manifest: Manifest) -> Iterator[Finding]:
    step = manifest.preprocess
    if step is None:
        return
    spec = next((i for i in manifest.inputs if i.name == step.input), manifest.inputs[0])
    if len(spec.shape) != len(step.layout):
        return
    for axis, key in (("W", "width"), ("H", "height")):
        size, want = getattr(step, key), spec.shape[step.layout.index(axis)]
        if size and want not in (-1, size):
            message = f"is {size}, but {spec.name!r} takes {want}"
            where = f"{manifests.FILE_NAME}: preprocess.{key}"
            yield Finding("warning", where, message, f"make it {want}")


def _backend_findings(variant: Variant, artifact: Artifact, where: str) -> Iterator[Finding]:
    formats = BACKEND_FORMATS.get(variant.backend)
    if formats is None:
        message = f"there are no lint rules for the backend {variant.backend!r}"
        known = ", ".join(BACKEND_FORMATS)
        yield Finding("error", f"{where}.backend", message, f"use one of {known}")
    elif artifact.format not in formats:
        message = f"the backend {variant.backend!r} is not given {artifact.format!r} files"
        yield Finding("error", f"{where}.backend", message, f"give it {' or '.join(formats)}")


def _index_findings(backend: str, artifact: Artifact, where: str) -> Iterator[Finding]:
    """Indices that a client may give and that nobody checks."""
    if artifact.graph is None:
        return
    names = {_operator_name(key) for key in artifact.graph.operators}
    unchecked = sorted(names & UNCHECKED_INDICES.get(backend, frozenset()))
    given = [one.name for one in artifact.inputs or () if one.datatype in _INDEX_DATATYPES]
    if unchecked and given:
        message = (
            f"{backend} does not check the indices of {', '.join(unchecked)}: "
            f"a number out of range in {given[0][:200]!r} may reach other memory of its worker"
        )
        remedy = "use another backend for it, or let only clients that are trusted use this model"
        yield Finding("warning", where, message, remedy)


def _operator_name(key: tuple[str, str] | int) -> str:
    if isinstance(key, int):
        return "GATHER_ND" if key == tflite_graph.GATHER_ND else ""
    return key[1]


def _option_findings(value: Any, where: str) -> Iterator[Finding]:
    """Options are data of the bundle; a path in them would reach out of it."""
    if isinstance(value, str) and "/" in value:
        message = f"{value[:80]!r} looks like a path of the device"
        yield Finding("warning", where, message, "set device paths in the device's own config")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _option_findings(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _option_findings(item, f"{where}[{index}]")


def _tflite_findings(
    graph: TfliteGraph,
    backend: str,
    options: Mapping[str, Any],
    custom_domains: tuple[str, ...],
    where: str,
) -> Iterator[Finding]:
    """Custom operators without the delegate that has them, and a state that nobody asked for."""
    known = (*TFLITE_CUSTOM_OPERATORS, *custom_domains)
    has_delegate = backend == "litert" and options.get("delegate") is not None
    for name in sorted(graph.custom_operators):
        if name in known or has_delegate:
            continue
        yield Finding("error", where, *_custom_operator(name[:200]))
    if graph.is_stateful and "stateful" not in options:
        yield Finding(
            "note",
            where,
            "has variables; every request starts from the state in the file",
            "set the option stateful to keep (or reset) to say which is meant",
        )


def _custom_operator(name: str) -> tuple[str, str]:
    """What is wrong with a custom operator, and what to do."""
    if name in DELEGATE_OPERATORS:
        of = DELEGATE_OPERATORS[name]
        return (
            f"uses the operator {name}: compiled for {of.title}, it runs with its delegate only",
            f"set options.delegate: {{library: {of.delegate}}} on the backend litert",
        )
    if name.startswith("Flex"):
        return f"uses the TensorFlow operator {name}", "convert the model without SELECT_TF_OPS"
    return (
        f"uses the custom operator {name}",
        "name the delegate that has it (options.delegate), or the operator in custom_domains",
    )


def _signature_findings(
    path: str, declared: tuple[TensorSpec, ...], found: tuple[Value, ...], where: str
) -> Iterator[Finding]:
    by_name = {value.name: value for value in found}
    names = [spec.name for spec in declared]
    if sorted(names) != sorted(value.name for value in found):
        message = (
            f"the artifact has {path} {sorted(by_name)}, the manifest declares {sorted(names)}"
        )
        yield Finding("error", f"{where}.artifact", message[:500], "create the bundle anew")
        return
    for spec in declared:
        yield from _tensor_findings(path, spec, by_name[spec.name], where)


def _tensor_findings(path: str, spec: TensorSpec, found: Value, where: str) -> Iterator[Finding]:
    here = f"{where}.artifact: {path} {spec.name!r}"
    if found.kind != "tensor":
        yield Finding("error", here, f"is a {found.kind}, not a tensor", CONVERT)
    elif found.datatype != spec.datatype:
        have = found.datatype or "a datatype without a name in the protocol"
        message = f"has {have}, the manifest declares {spec.datatype}"
        yield Finding("error", here, message, "create the bundle anew")
    elif found.shape is not None and not _fits(spec.shape, found.shape):
        message = f"has shape {list(found.shape)}, the manifest declares {list(spec.shape)}"
        yield Finding("error", here, message, "create the bundle anew")


def _fits(declared: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """A manifest may fix what the artifact leaves free, not free what it fixes."""
    return len(declared) == len(found) and all(
        have in (-1, want) for want, have in zip(declared, found, strict=True)
    )


def _operator_findings(
    graph: OnnxGraph, custom_domains: tuple[str, ...], where: str
) -> Iterator[Finding]:
    for key in sorted(graph.operators):
        domain, name = key
        shown = f"{domain}::{name}" if domain else name
        if key in FORBIDDEN_OPERATORS:
            yield Finding(
                "error",
                where,
                f"uses the operator {shown}: {FORBIDDEN_OPERATORS[key]}",
                "export the model without it",
            )
        elif not _is_known(graph, key, custom_domains):
            yield Finding(
                "error",
                where,
                f"uses the operator {shown[:200]} of an unknown domain",
                "export with standard operators, or name it in the variant's custom_domains",
            )


def _is_known(graph: OnnxGraph, key: tuple[str, str], custom_domains: tuple[str, ...]) -> bool:
    return key[0] in STANDARD_DOMAINS or key[0] in custom_domains or key in graph.local_functions


# --- formats -------------------------------------------------------------------------------------


def _read_onnx(source: Source, limits: Limits) -> Artifact:
    graph = onnx_graph.read(source)
    findings = []
    for name in graph.external_data[:5]:
        message = f"keeps the data of {name!r} in another file"
        remedy = "save the model in one file (onnx.save without save_as_external_data)"
        findings.append(Finding("error", source.where, message, remedy))
    nodes = sum(graph.operators.values())
    if nodes > limits.nodes_max:
        message = f"has {nodes} nodes; at most {limits.nodes_max} are allowed"
        findings.append(Finding("error", source.where, message, "use a smaller model"))
    return Artifact("onnx", graph.inputs, graph.outputs, graph, tuple(findings))


def _read_tflite(source: Source, limits: Limits) -> Artifact:
    """Under the names of its signature; `signature_of` knows the others too."""
    graph = tflite_graph.read(source)
    findings = []
    if graph.external:
        findings.append(Finding("error", source.where, graph.external, "save it in one file"))
    nodes = sum(graph.operators.values()) + sum(graph.custom_operators.values())
    if nodes > limits.nodes_max:
        message = f"has {nodes} nodes; at most {limits.nodes_max} are allowed"
        findings.append(Finding("error", source.where, message, "use a smaller model"))
    inputs, outputs = (
        tflite_graph.values(ios, "signature") for ios in (graph.inputs, graph.outputs)
    )
    return Artifact("tflite", inputs, outputs, graph, tuple(findings))


def _read_openvino_ir(source: Source, limits: Limits) -> Artifact:
    graph = openvino_ir.read(source)
    findings = [
        Finding(
            "error",
            source.where,
            f"uses the operator {name[:200]} of no OpenVINO opset: it needs an extension",
            "convert the model without it",
        )
        for name in openvino_ir.unknown_opsets(graph)[:5]
    ]
    nodes = sum(graph.operators.values())
    if nodes > limits.nodes_max:
        message = f"has {nodes} nodes; at most {limits.nodes_max} are allowed"
        findings.append(Finding("error", source.where, message, "use a smaller model"))
    if graph.is_stateful:
        message = "has a state; by default every request starts from its initial value"
        remedy = "set the option stateful to keep (or reset) to say which is meant"
        findings.append(Finding("note", source.where, message, remedy))
    return Artifact("openvino-ir", graph.inputs, graph.outputs, graph, tuple(findings))


class _ReferenceDocument(msgspec.Struct):
    format: Literal["edge-runtime-reference"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def _read_reference(source: Source, limits: Limits) -> Artifact:
    if source.size > limits.reference_bytes_max:
        raise BundleError(
            f"has {source.size} bytes",
            where=source.where,
            expected=f"at most {limits.reference_bytes_max}",
        )
    try:
        data = source.read_at(0, source.size)
        document = msgspec.json.decode(data, type=_ReferenceDocument)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BundleError(str(e), where=source.where, expected="a reference model") from e
    inputs, outputs = map(_reference_values, (document.inputs, document.outputs))
    return Artifact("reference", inputs, outputs, None, ())


def _reference_values(specs: tuple[TensorSpec, ...]) -> tuple[Value, ...]:
    """All free dimensions carry the same symbol: numpy code does not name them."""
    return tuple(
        Value(spec.name, "tensor", spec.datatype, spec.shape, ("N",) * len(spec.shape))
        for spec in specs
    )


def _starts(*magics: bytes) -> Callable[[bytes, str], bool]:
    return lambda head, name: head.startswith(magics)


def _magic_at_4(magic: bytes) -> Callable[[bytes, str], bool]:
    return lambda head, name: head[4:8] == magic


# In this order: what a loader recognises by its magic wins over what we take by its name, so that a
# file cannot be one thing here and another there.
FORMATS: tuple[_Format, ...] = (
    _Format("tflite", _magic_at_4(b"TFL3"), _read_tflite),
    _Format(
        "onnxruntime", _magic_at_4(b"ORTM"), None, "is in onnxruntime's own format: not linted"
    ),
    _Format(
        "zip", _starts(b"PK\3\4"), None, "is a zip archive (PyTorch, Keras, npz): may hold code"
    ),
    _Format(
        "pickle", _starts(b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), None, "is a pickle: code"
    ),
    _Format("hdf5", _starts(b"\x89HDF"), None, "is an HDF5 file (Keras): may hold code"),
    _Format("elf", _starts(b"\x7fELF"), None, "is native code"),
    _Format(
        "openvino",
        lambda head, name: head.lstrip().startswith((b"<?xml", b"<net")),
        None,
        "is the graph of OpenVINO IR without its weights: give `bundle create` the .xml file",
    ),
    _Format("openvino-ir", _starts(openvino_ir.MAGIC), _read_openvino_ir),
    _Format(
        "reference",
        lambda head, name: name.endswith(".json") or head.lstrip().startswith(b"{"),
        _read_reference,
    ),
    _Format(
        "onnx",
        # The first field is ir_version, or the file is called so; the reader decides.
        lambda head, name: head.startswith(b"\x08") or name.endswith(".onnx"),
        _read_onnx,
    ),
)
