"""`model.yaml`: what a bundle says of itself.

Law of this file: values only. It turns a document (YAML or JSON mapping) into a checked, frozen
`Manifest` and back, and knows no file system, archive or runtime. Unknown fields survive a round
trip; every error names the key path. The rules are one generator per part of the manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from edge_runtime import tensors
from edge_runtime.bundle import document as documents
from edge_runtime.errors import BundleError, EdgeError, nearest
from edge_runtime.tensors import TensorSpec

SCHEMA = 1
FILE_NAME = "model.yaml"

# A name becomes part of paths, topics and command lines (`NAME@VERSION`), so it is kept plain.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
VERSION_MAX = (1 << 31) - 1  # a counter; fits every database's integer
BLOBS_MAX = 4096  # files of a bundle: a thousand goldens of four tensors
VARIANTS_MAX = 64  # backends x precisions x device classes; each is tried at installation
TENSORS_MAX = 256  # inputs or outputs
TEXT_MAX = 512  # characters of a label or tensor name: one line on a screen


class Blob(msgspec.Struct, frozen=True):
    """A file of the bundle, named by its content."""

    sha256: str
    size: int
    filename: str = ""


class Tolerance(msgspec.Struct, frozen=True):
    """How far an output may lie from its golden: |got - want| <= atol + rtol * |want|."""

    rtol: float = 1e-3
    atol: float = 1e-4


class Variant(msgspec.Struct, frozen=True):
    """One artifact for one backend, precision and class of device.

    `custom_domains` names the ONNX operator domains, beyond the standard ones, that the artifact
    may use: whoever makes the bundle says so, lint does not guess.
    """

    name: str
    backend: str
    artifact: Blob
    precision: str = ""
    device_class: str = "cpu"
    options: dict[str, Any] = {}
    tolerance: Tolerance = Tolerance()
    custom_domains: tuple[str, ...] = ()


class GoldenTensor(msgspec.Struct, frozen=True):
    """A recorded tensor: raw little-endian bytes in a blob, its datatype and concrete shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    blob: Blob


class Golden(msgspec.Struct, frozen=True):
    """A recorded input and the outputs that a variant must give for it.

    `outputs` are the first variant's. A variant that rightly differs from them by more than its
    tolerance (int8 beside fp32) has its own in `variant_outputs`, under its name, so that its
    tolerance can stay narrow enough to notice a wrong answer.
    """

    inputs: tuple[GoldenTensor, ...]
    outputs: tuple[GoldenTensor, ...]
    variant_outputs: dict[str, tuple[GoldenTensor, ...]] = {}

    def expected(self, variant: str) -> tuple[GoldenTensor, ...]:
        """The outputs to compare this variant's with, within its tolerance."""
        return self.variant_outputs.get(variant, self.outputs)


class Preprocess(msgspec.Struct, frozen=True):
    """How an image becomes the input: resize, colour, then (x / scale_divisor - mean) / std.

    `pixel_scale` multiplies 0..255 pixels first (1/255 by default gives 0..1); `mean` and `std` are
    per channel (one value: all channels).
    """

    input: str = ""
    width: int = 0
    height: int = 0
    color: str = "RGB"  # RGB, BGR or L (grey)
    layout: str = "NCHW"
    resize: str = "bilinear"  # bilinear, nearest, bicubic
    pixel_scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Postprocess(msgspec.Struct, frozen=True):
    """What the output means."""

    output: str = ""
    labels: tuple[str, ...] = ()
    top_k: int = 3
    activation: str = "none"  # none, softmax, sigmoid: applied before printing confidences


class Budgets(msgspec.Struct, frozen=True):
    """What the model may cost; 0 is "not stated"."""

    latency_ms: float = 0.0
    memory_bytes: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """The typed view of `model.yaml`. `document` keeps everything, also what we do not know."""

    schema: int
    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    label: str = ""
    batch_axis: int | None = None
    preprocess: Preprocess | None = None
    postprocess: Postprocess | None = None
    goldens: tuple[Golden, ...] = ()
    budgets: Budgets = Budgets()
    card: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    document: dict[str, Any] = {}


def parse(data: bytes, where: str = FILE_NAME) -> Manifest:
    """The manifest that a `model.yaml` states, checked.

    Args:
        data: YAML or JSON, UTF-8, within the limits of `bundle/document.py`.
        where: name of the file, for errors.

    Raises:
        BundleError: the text is no manifest; `where` names file and key path.
    """
    return from_document(documents.load(data, where), where)


def from_document(document: dict[str, Any], where: str = FILE_NAME) -> Manifest:
    """The checked manifest of a mapping as `document.load` gives it.

    Raises:
        BundleError: as `parse`.
    """
    schema = document.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"schema {schema} is newer than this edge-runtime",
            where=f"{where}: schema",
            expected=f"at most {SCHEMA}",
            remedy="install a newer edge-runtime",
        )
    known = {key: value for key, value in document.items() if key != "document"}
    try:
        manifest = msgspec.convert(known, Manifest)
    except msgspec.ValidationError as e:
        raise _type_error(str(e), document, where) from e
    manifest = msgspec.structs.replace(manifest, document=document)
    for problem in problems(manifest):
        raise BundleError(
            problem.message, where=f"{where}: {problem.path}", expected=problem.expected
        )
    return manifest


def dump(manifest: Manifest) -> bytes:
    """The manifest as YAML; the same bytes for the same manifest.

    Known fields come from the typed values, unknown ones from `document`, both in the document's
    order; fields with their default are left out unless the document states them.
    """
    return documents.dump(to_document(manifest))


def to_document(manifest: Manifest) -> dict[str, Any]:
    """The mapping of the manifest, with the unknown fields of `document` in their places."""
    return _merge_struct(manifest, manifest.document)


def blobs(manifest: Manifest) -> dict[str, Blob]:
    """Every blob of the bundle once, by sha256, in sorted order (that of the archive)."""
    placed = {blob.sha256: blob for _, blob in _placed_blobs(manifest)}
    return dict(sorted(placed.items()))


# --- rules ---------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is wrong at a key path (`variants[0].artifact.sha256`)."""

    path: str
    message: str
    expected: str


def problems(manifest: Manifest) -> Iterator[Problem]:
    """Everything wrong with the values of a manifest whose types are right, in reading order."""
    yield from _head_problems(manifest)
    yield from _tensors_problems("inputs", manifest.inputs)
    yield from _tensors_problems("outputs", manifest.outputs)
    yield from _batch_problems(manifest)
    yield from _variants_problems(manifest.variants)
    yield from _processing_problems(manifest)
    yield from _blobs_problems(manifest)
    yield from _goldens_problems(manifest)
    yield from _budgets_problems(manifest.budgets)


def _head_problems(manifest: Manifest) -> Iterator[Problem]:
    if manifest.schema != SCHEMA:
        yield Problem("schema", f"is {manifest.schema}", str(SCHEMA))
    yield from _name_problems("name", manifest.name)
    if not 1 <= manifest.version <= VERSION_MAX:
        yield Problem("version", f"is {manifest.version}", f"a counter from 1 to {VERSION_MAX}")
    yield from _text_problems("label", manifest.label)


def _name_problems(path: str, name: str) -> Iterator[Problem]:
    if not NAME.fullmatch(name):
        yield Problem(
            path,
            f"{name[:80]!r} is not a name",
            "1 to 64 of a-z 0-9 . _ - beginning with a letter or digit",
        )


def _text_problems(path: str, text: str) -> Iterator[Problem]:
    if len(text) > TEXT_MAX or not text.isprintable():
        yield Problem(
            path, f"{text[:80]!r} is not a line of text", f"at most {TEXT_MAX} printable characters"
        )


def _tensors_problems(path: str, specs: tuple[TensorSpec, ...]) -> Iterator[Problem]:
    if not 1 <= len(specs) <= TENSORS_MAX:
        yield Problem(path, f"holds {len(specs)} tensors", f"1 to {TENSORS_MAX}")
    yield from _unique_problems(path, [spec.name for spec in specs])
    for index, spec in enumerate(specs):
        here = f"{path}[{index}]"
        yield from _tensor_name_problems(f"{here}.name", spec.name)
        yield from _datatype_problems(f"{here}.datatype", spec.datatype)
        yield from _text_problems(f"{here}.layout", spec.layout)
        if len(spec.shape) > tensors.DIMENSIONS_MAX or any(dim < -1 for dim in spec.shape):
            yield Problem(
                f"{here}.shape",
                f"is {list(spec.shape[:20])}",
                f"at most {tensors.DIMENSIONS_MAX} sizes, -1 for a free one",
            )


def _unique_problems(path: str, names: list[str]) -> Iterator[Problem]:
    seen = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Problem(f"{path}[{index}].name", f"{name!r} is there twice", "each name once")
        seen.add(name)


def _tensor_name_problems(path: str, name: str) -> Iterator[Problem]:
    if not name:
        yield Problem(path, "is empty", "the tensor's name in the artifact")
    yield from _text_problems(path, name)


def _datatype_problems(path: str, datatype: str) -> Iterator[Problem]:
    if datatype not in tensors.DATATYPES:
        yield Problem(path, f"is {datatype[:80]!r}", "one of " + ", ".join(tensors.DATATYPES))


def _batch_problems(manifest: Manifest) -> Iterator[Problem]:
    axis = manifest.batch_axis
    if axis is None:
        return
    for spec in manifest.inputs + manifest.outputs:
        if not 0 <= axis < len(spec.shape) or spec.shape[axis] != -1:
            yield Problem(
                "batch_axis",
                f"is {axis}, but {spec.name!r} has shape {list(spec.shape[:20])}",
                "an axis that is free (-1) in every input and output, or null",
            )


def _variants_problems(variants: tuple[Variant, ...]) -> Iterator[Problem]:
    if not 1 <= len(variants) <= VARIANTS_MAX:
        yield Problem("variants", f"holds {len(variants)} variants", f"1 to {VARIANTS_MAX}")
    yield from _unique_problems("variants", [variant.name for variant in variants])
    for index, variant in enumerate(variants):
        here = f"variants[{index}]"
        yield from _name_problems(f"{here}.name", variant.name)
        yield from _name_problems(f"{here}.backend", variant.backend)
        yield from _text_problems(f"{here}.precision", variant.precision)
        yield from _text_problems(f"{here}.device_class", variant.device_class)
        for key in ("rtol", "atol"):
            yield from _positive_problems(
                f"{here}.tolerance.{key}", getattr(variant.tolerance, key)
            )


def _positive_problems(path: str, value: float) -> Iterator[Problem]:
    if not (value >= 0 and math.isfinite(value)):
        yield Problem(path, f"is {value}", "a finite number >= 0")


def _processing_problems(manifest: Manifest) -> Iterator[Problem]:
    if manifest.preprocess is not None:
        yield from _preprocess_problems(manifest.preprocess, manifest.inputs)
    if manifest.postprocess is not None:
        yield from _postprocess_problems(manifest.postprocess, manifest.outputs)


_PREPROCESS_CHOICES = {
    "color": ("RGB", "BGR", "L"),
    "layout": ("NCHW", "NHWC", "CHW", "HWC", "NHW", "HW"),
    "resize": ("bilinear", "nearest", "bicubic"),
}
IMAGE_SIDE_MAX = 1 << 15  # pixels; a larger "image" is a mistake


def _preprocess_problems(step: Preprocess, inputs: tuple[TensorSpec, ...]) -> Iterator[Problem]:
    yield from _tensor_choice_problems("preprocess.input", step.input, inputs)
    for key, choices in _PREPROCESS_CHOICES.items():
        yield from _choice_problems(f"preprocess.{key}", getattr(step, key), choices)
    for key in ("width", "height"):
        if not 0 <= getattr(step, key) <= IMAGE_SIDE_MAX:
            yield Problem(
                f"preprocess.{key}", f"is {getattr(step, key)}", f"0 to {IMAGE_SIDE_MAX} pixels"
            )
    channels = 1 if step.color == "L" else 3
    for key in ("mean", "std"):
        values = getattr(step, key)
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            yield Problem(
                f"preprocess.{key}", f"is {list(values[:9])}", f"1 or {channels} finite numbers"
            )
    if 0 in step.std:
        yield Problem("preprocess.std", "holds 0, which is a divisor", "numbers other than 0")
    if step.pixel_scale == 0 or not math.isfinite(step.pixel_scale):
        yield Problem("preprocess.pixel_scale", f"is {step.pixel_scale}", "a number other than 0")


def _postprocess_problems(step: Postprocess, outputs: tuple[TensorSpec, ...]) -> Iterator[Problem]:
    yield from _tensor_choice_problems("postprocess.output", step.output, outputs)
    yield from _choice_problems(
        "postprocess.activation", step.activation, ("none", "softmax", "sigmoid")
    )
    if step.top_k < 1:
        yield Problem("postprocess.top_k", f"is {step.top_k}", "at least 1")
    for index, label in enumerate(step.labels):
        yield from _text_problems(f"postprocess.labels[{index}]", label)


def _tensor_choice_problems(
    path: str, name: str, specs: tuple[TensorSpec, ...]
) -> Iterator[Problem]:
    """An empty name means the only (or first) tensor."""
    if name and name not in [spec.name for spec in specs]:
        yield Problem(
            path, f"{name[:80]!r} is not declared", "one of " + ", ".join(s.name for s in specs)
        )


def _choice_problems(path: str, value: str, choices: tuple[str, ...]) -> Iterator[Problem]:
    if value not in choices:
        yield Problem(path, f"is {value[:80]!r}", "one of " + ", ".join(choices))


def _placed_blobs(manifest: Manifest) -> Iterator[tuple[str, Blob]]:
    for index, variant in enumerate(manifest.variants):
        yield f"variants[{index}].artifact", variant.artifact
    for path, tensor in _golden_tensors(manifest):
        yield f"{path}.blob", tensor.blob


def _golden_tensors(manifest: Manifest) -> Iterator[tuple[str, GoldenTensor]]:
    for index, golden in enumerate(manifest.goldens):
        for path, group in _golden_groups(index, golden):
            for place, tensor in enumerate(group):
                yield f"{path}[{place}]", tensor


def _golden_groups(index: int, golden: Golden) -> Iterator[tuple[str, tuple[GoldenTensor, ...]]]:
    yield f"goldens[{index}].inputs", golden.inputs
    yield f"goldens[{index}].outputs", golden.outputs
    for name, group in golden.variant_outputs.items():
        yield f"goldens[{index}].variant_outputs.{name}", group


def _blobs_problems(manifest: Manifest) -> Iterator[Problem]:
    sizes: dict[str, int] = {}
    for path, blob in _placed_blobs(manifest):
        if not SHA256.fullmatch(blob.sha256):
            yield Problem(f"{path}.sha256", f"is {blob.sha256[:80]!r}", "64 digits of 0-9 a-f")
        if not 0 <= blob.size < 1 << 62:
            yield Problem(f"{path}.size", f"is {blob.size}", "bytes, >= 0")
        if sizes.setdefault(blob.sha256, blob.size) != blob.size:
            yield Problem(
                f"{path}.size",
                f"is {blob.size}, elsewhere the same blob has {sizes[blob.sha256]}",
                "one size for one sha256",
            )
        yield from _filename_problems(f"{path}.filename", blob.filename)
    if len(sizes) > BLOBS_MAX:
        yield Problem("goldens", f"{len(sizes)} blobs in all", f"at most {BLOBS_MAX}")


def _filename_problems(path: str, filename: str) -> Iterator[Problem]:
    """A filename tells the format and is shown; it is never opened. Even so: no paths."""
    if filename in (".", "..") or "/" in filename or "\\" in filename or len(filename) > 255:
        yield Problem(path, f"is {filename[:80]!r}", "a file's name without directories")
    yield from _text_problems(path, filename)


def _goldens_problems(manifest: Manifest) -> Iterator[Problem]:
    names = {variant.name for variant in manifest.variants}
    for index, golden in enumerate(manifest.goldens):
        here = f"goldens[{index}]"
        for variant in golden.variant_outputs:
            if variant not in names:
                yield Problem(
                    f"{here}.variant_outputs",
                    f"{variant[:80]!r} is no variant",
                    "one of " + ", ".join(sorted(names)),
                )
        for path, group in _golden_groups(index, golden):
            specs = manifest.inputs if path.endswith(".inputs") else manifest.outputs
            yield from _golden_group_problems(path, group, specs)


def _golden_group_problems(
    path: str, group: tuple[GoldenTensor, ...], specs: tuple[TensorSpec, ...]
) -> Iterator[Problem]:
    declared = {spec.name: spec for spec in specs}
    if sorted(tensor.name for tensor in group) != sorted(declared):
        yield Problem(
            path,
            "names " + (", ".join(tensor.name[:80] for tensor in group[:20]) or "no tensors"),
            "each of " + ", ".join(declared) + " once",
        )
        return
    for index, tensor in enumerate(group):
        yield from _golden_tensor_problems(f"{path}[{index}]", tensor, declared[tensor.name])


def _golden_tensor_problems(path: str, tensor: GoldenTensor, spec: TensorSpec) -> Iterator[Problem]:
    if tensor.datatype != spec.datatype:
        yield Problem(f"{path}.datatype", f"is {tensor.datatype[:80]!r}", spec.datatype)
        return
    try:
        count = tensors.elements(tensor.shape)
    except EdgeError as e:
        yield Problem(f"{path}.shape", e.message, e.expected)
        return
    if not tensors.shape_matches(tensor.shape, spec.shape):
        yield Problem(f"{path}.shape", f"is {list(tensor.shape)}", f"as {list(spec.shape)}")
    size = count * tensors.DATATYPES[tensor.datatype][1]
    if tensor.datatype != "BYTES" and tensor.blob.size != size:
        yield Problem(
            f"{path}.blob.size",
            f"is {tensor.blob.size}",
            f"{size} bytes for {tensor.datatype} {list(tensor.shape)}",
        )


def _budgets_problems(budgets: Budgets) -> Iterator[Problem]:
    yield from _positive_problems("budgets.latency_ms", budgets.latency_ms)
    yield from _positive_problems("budgets.memory_bytes", budgets.memory_bytes)


# --- documents -----------------------------------------------------------------------------------

_TYPE_WORDS = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number"}
_TYPE_WORDS |= {"float": "a number", "bool": "true or false", "null": "null"}


def _type_error(text: str, document: dict[str, Any], where: str) -> BundleError:
    """Our error for msgspec's "Expected `int`, got `str` - at `$.version`"."""
    message, _, place = text.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(.*)`", message)
    wrong = re.fullmatch(r"Expected `(.*)`, got `(.*)`", message)
    if missing:
        found = _keys_at(document, path)
        near = nearest(missing[1], found)
        return BundleError(
            "is missing",
            where=f"{where}: {path}.{missing[1]}".replace(": .", ": "),
            remedy=f"did you mean it by the key {near!r}?" if near else "",
        )
    if wrong:
        want = " or ".join(_TYPE_WORDS.get(word, word) for word in wrong[1].split(" | "))
        got = _TYPE_WORDS.get(wrong[2], wrong[2])
        return BundleError(f"is {got}", where=f"{where}: {path}", expected=want)
    return BundleError(message, where=f"{where}: {path}")


def _keys_at(document: dict[str, Any], path: str) -> list[str]:
    """The keys of the mapping at a path; none if the path leads nowhere."""
    value: Any = document
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            return []
    return list(value) if isinstance(value, dict) else []


def near_misses(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """Unknown keys that look like misspelt known ones: (path, key, known key)."""
    yield from _near_misses(manifest, manifest.document, "")


def _near_misses(value: Any, document: Any, path: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, msgspec.Struct) and isinstance(document, dict):
        known = [name for name in value.__struct_fields__ if name != "document"]
        unused = [name for name in known if name not in document]
        for key in document:
            # Whoever wrote it may mean something of their own: said only of a slip of the pen.
            near = nearest(key.lower(), unused, likeness=0.75)
            if key not in known and near:
                yield f"{path}.{key}".lstrip("."), key, near
        for name in known:
            yield from _near_misses(getattr(value, name), document.get(name), f"{path}.{name}")
    elif isinstance(value, tuple) and isinstance(document, list):
        for index, (item, part) in enumerate(zip(value, document, strict=False)):
            yield from _near_misses(item, part, f"{path}[{index}]")


def _merge(value: Any, document: Any) -> Any:
    """Plain values of `value`, with what `document` has beyond them, in its order."""
    if isinstance(value, msgspec.Struct):
        return _merge_struct(value, document if isinstance(document, dict) else {})
    if isinstance(value, tuple):
        return _merge_list(value, document if isinstance(document, list) else [])
    if isinstance(value, dict):
        known = document if isinstance(document, dict) else {}
        return {key: _merge(value[key], known.get(key)) for key in _in_order(value, known)}
    if isinstance(value, float) and type(document) is int and float(document) == value:
        return document  # `rtol: 0` stays as it was written
    return value


def _in_order(mine: dict[str, Any], document: dict[str, Any]) -> list[str]:
    first = [key for key in document if key in mine]
    return first + [key for key in mine if key not in document]


def _merge_struct(value: msgspec.Struct, document: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in value.__struct_fields__ if name != "document"]
    defaults = _defaults(type(value))
    out: dict[str, Any] = {}
    for key in [*document, *(name for name in known if name not in document)]:
        if key not in known:
            out[key] = document[key]
            continue
        item = getattr(value, key)
        if key in document or key not in defaults or item != defaults[key]:
            out[key] = _merge(item, document.get(key))
    return out


def _merge_list(items: tuple[Any, ...], document: list[Any]) -> list[Any]:
    """Items are paired by name where they have one, else by place."""
    by_name = {
        item["name"]: item
        for item in document
        if isinstance(item, dict) and isinstance(item.get("name"), str)
    }
    parts = []
    for index, item in enumerate(items):
        at_place = document[index] if index < len(document) else None
        name = getattr(item, "name", None)
        parts.append(_merge(item, by_name.get(name) if name is not None else at_place))
    return parts


def _defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    out = {}
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            out[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            out[field.name] = field.default_factory()
    return out
