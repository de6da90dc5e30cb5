"""From model files to a bundle: the manifest is derived, the goldens are recorded.

Law of this file: it runs at the builder's desk, not on the device, and it is the only file of
`bundle/` that uses numpy. It reads model files through `lint`, so nothing reaches the caller's
`load` unlinted. It knows no backend: the caller passes `load`. No clock and no randomness but the
seed, so that the same models, samples and arguments give the same bytes on the same machine.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

import edge_runtime
from edge_runtime import tensors
from edge_runtime.bundle import archive, lint, openvino_ir, source, tflite_graph
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import (
    Blob,
    Golden,
    GoldenTensor,
    Manifest,
    Postprocess,
    Preprocess,
    Tolerance,
    Variant,
)
from edge_runtime.bundle.onnx_graph import OnnxGraph, Value
from edge_runtime.bundle.openvino_ir import IrGraph
from edge_runtime.bundle.source import Source
from edge_runtime.bundle.tflite_graph import TfliteGraph
from edge_runtime.errors import BundleError, EdgeError, NotFoundError, UsageError
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Run = Callable[[Mapping[str, "Array"]], Mapping[str, "Array"]]
Load = Callable[[Variant, Path], Run]  # loads an artifact once, gives a function to run it
Say = Callable[[str, int, int], None]  # what is done; bytes done of all, 0 of 0 if no bytes

GOLDENS_DEFAULT = 3  # one could be right by chance; each costs a run at every load
# Size of a free dimension in generated inputs where the user gives none: small, yet enough for a
# few layers of pooling.
FREE_SIZE = 32

BACKEND_OF_FORMAT = {
    "onnx": "onnxruntime",
    "tflite": "litert",
    "openvino-ir": "openvino",
    "reference": "reference",
}

_INTEGER_OPERATORS = {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
# By precision: rtol, and atol as a share of the largest output. They cover what another processor
# or library version may change in the order of additions (2e-7 and 5e-4 per operation).
_TOLERANCES = {
    "fp32": (1e-3, 1e-5),
    "fp64": (1e-3, 1e-5),
    "fp16": (1e-2, 2e-3),
    "bf16": (5e-2, 2e-2),
}
_ATOL_MIN = Tolerance().atol
# A quantized model whose output scale is not known: this share of the range of its outputs.
_INTEGER_ATOL_SHARE = 0.02
_TOLERANCE_SHARE_MAX = 0.25  # a wider tolerance notices little


class Choice(NamedTuple):
    """A model file and the backend that shall run it; "": the usual one for its format."""

    path: Path
    backend: str = ""


class Options(msgspec.Struct, frozen=True):
    """What the user says beside the models.

    `shapes` fixes inputs' shapes for generated goldens; `backend_options` become the options of all
    variants of a backend.
    """

    name: str
    version: int = 1
    label: str = ""
    goldens: int = GOLDENS_DEFAULT
    samples: Path | None = None
    seed: int = 0
    shapes: dict[str, tuple[int, ...]] = {}
    preprocess: Preprocess | None = None
    postprocess: Postprocess | None = None
    card: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    backend_options: dict[str, dict[str, Any]] = {}


class Given(msgspec.Struct, frozen=True):
    """What the caller knows of a variant better than its file says."""

    name: str
    backend: str
    precision: str = ""
    options: dict[str, Any] = {}


class Created(NamedTuple):
    """The bundle that was made, and what its maker should know."""

    manifest: Manifest
    sha256: str
    notes: tuple[str, ...]


class _Model(NamedTuple):
    """A model file that has passed lint; inputs and outputs as its backend names them."""

    path: Path
    content: Source
    blob: Blob
    format: str
    backend: str
    options: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    graph: OnnxGraph | TfliteGraph | IrGraph | None


class _Recorded(NamedTuple):
    """What one variant answered to every golden input."""

    run: Run
    outputs: list[Mapping[str, Array]]


def create(
    models: Sequence[Path | Choice],
    options: Options,
    out: Path,
    load: Load | None = None,
    say: Say = lambda what, done, total: None,
    given: Sequence[Given] = (),
) -> Created:
    """Make a bundle of model files.

    Args:
        models: one artifact for each variant; the first one's outputs are the reference. A file may
            come twice, for two backends.
        options: what the models do not say themselves.
        out: the `.bundle` file to write; replaced if it exists.
        load: how to run a model. Without it there are no goldens.
        say: called with progress.
        given: one for each model, where name, backend and options are not to be guessed.

    Raises:
        BundleError: a model is refused by lint, or the models do not fit each other or the samples.
        UsageError: an option is wrong.
        ModelError: a model does not run.
        NotFoundError, StorageError: a file cannot be read or written.
    """
    if not models:
        raise UsageError("no model is given", expected="at least one model file")
    choices = [Choice(one) if isinstance(one, Path) else one for one in models]
    with tempfile.TemporaryDirectory(prefix="edge-bundle-") as folder:
        packed = [one._replace(path=as_artifact(one.path, Path(folder))) for one in choices]
        return _create(packed, options, out, load, say, given)


def _create(
    choices: Sequence[Choice],
    options: Options,
    out: Path,
    load: Load | None,
    say: Say,
    given: Sequence[Given],
) -> Created:
    opened = _named_alike([_open_model(choice, options, say) for choice in choices])
    _check_same_signature(opened)
    inputs, outputs = _specs(opened[0].inputs, opened[0]), _specs(opened[0].outputs, opened[0])
    variants = _as_given(opened, given) if given else _variants(opened)
    bare = _bare_manifest(options, inputs, outputs, variants, opened)
    if load is None or options.goldens < 1:
        batched = _has_batch_axis(opened[0], trusted=True)
        manifest = msgspec.structs.replace(bare, batch_axis=0 if batched else None)
        return _write(manifest, _contents(opened), out, say, ())
    feeds = _golden_inputs(options, opened[0], inputs)
    recorded = [
        _record(load, variant, model, feeds, outputs, say)
        for variant, model in zip(variants, opened, strict=True)
    ]
    batched = _has_batch_axis(opened[0], trusted=False) and _rows_are_independent(
        recorded[0].run, _two_rows(options, opened[0], inputs, feeds)
    )
    manifest, golden_blobs, notes = _with_goldens(bare, opened, feeds, recorded, batched=batched)
    return _write(manifest, {**_contents(opened), **golden_blobs}, out, say, notes)


# --- what the models say -------------------------------------------------------------------------


def as_artifact(path: Path, folder: Path) -> Path:
    """OpenVINO IR as the one file that an artifact is, in a new folder in `folder` (two may have
    the same name); others as they are.

    Raises:
        NotFoundError, BundleError, StorageError: one of the two files is missing or unreadable.
    """
    if path.suffix.lower() != ".xml":
        return path
    graph, weights = (_ir_part(path.with_suffix(end)) for end in (path.suffix, ".bin"))
    packed = Path(tempfile.mkdtemp(dir=folder), f"{path.stem}.ir")
    packed.write_bytes(openvino_ir.pack(graph, weights))
    return packed


def _ir_part(path: Path) -> bytes:
    try:
        part = source.from_path(path.resolve())
    except NotFoundError as e:
        e.expected = "OpenVINO IR: the graph in an .xml file, its weights in a .bin file beside it"
        raise
    return part.read_at(0, part.size)


def _open_model(choice: Choice, options: Options, say: Say) -> _Model:
    path = choice.path
    say(f"reading {path.name}", 0, 0)
    content = source.from_path(path.resolve())
    artifact = lint.lint_artifact(content, path.name)
    lint.refuse(list(artifact.findings))
    backend = choice.backend or BACKEND_OF_FORMAT[artifact.format]
    if artifact.format not in lint.BACKEND_FORMATS.get(backend, ()):
        raise UsageError(
            f"the backend {backend!r} is not given {artifact.format!r} files",
            where=str(path),
            expected=" or ".join(lint.BACKEND_FORMATS.get(backend, ()))
            or "one of " + ", ".join(lint.BACKEND_FORMATS),
        )
    chosen = dict(options.backend_options.get(backend, {}))
    compiled = lint.compiled_for(artifact.graph) if backend == "litert" else None
    if compiled is not None:
        chosen.setdefault("delegate", {"library": compiled.delegate})
    inputs, outputs = lint.signature_of(artifact, backend, chosen)
    assert inputs is not None and outputs is not None, artifact.format
    blob = Blob(content.sha256(), content.size, path.name)
    return _Model(
        path, content, blob, artifact.format, backend, chosen, inputs, outputs, artifact.graph
    )


def _named_alike(models: list[_Model]) -> list[_Model]:
    """Models of litert get the names that the other backends' models have, if they can.

    A TFLite file knows its tensors by two names; what was exported from the same graph to ONNX has
    the tensors' own.
    """
    others = [_names_of(model) for model in models if model.backend != "litert"]
    return [
        _with_own_names(model) if _is_named_otherwise(model, others) else model for model in models
    ]


def _names_of(model: _Model) -> tuple[set[str], set[str]]:
    return {value.name for value in model.inputs}, {value.name for value in model.outputs}


def _is_named_otherwise(model: _Model, others: list[tuple[set[str], set[str]]]) -> bool:
    """Whether the tensors' own names are those of the others, and the present ones are not."""
    if model.backend != "litert" or "names" in model.options or not others:
        return False
    return _names_of(model) != others[0] == _names_of(_with_own_names(model))


def _with_own_names(model: _Model) -> _Model:
    assert isinstance(model.graph, TfliteGraph)
    inputs, outputs = (
        tflite_graph.values(ios, "tensor") for ios in (model.graph.inputs, model.graph.outputs)
    )
    options = {**model.options, "names": "tensor"}
    return model._replace(inputs=inputs, outputs=outputs, options=options)


def _specs(values: tuple[Value, ...], model: _Model) -> tuple[TensorSpec, ...]:
    for value in values:
        where = f"{model.path}: {value.name}"
        if value.kind != "tensor":
            raise BundleError(f"is a {value.kind}", where=where, expected="a tensor")
        if not value.datatype:
            raise BundleError(
                "has a datatype that the protocol has no name for",
                where=where,
                expected="one of " + ", ".join(tensors.DATATYPES),
            )
        if value.shape is None:
            raise BundleError(
                "does not say how many dimensions it has",
                where=where,
                remedy="export the model with shapes (onnx.shape_inference may help)",
            )
    return tuple(TensorSpec(v.name, v.datatype, v.shape or ()) for v in values)


def _check_same_signature(models: list[_Model]) -> None:
    first = models[0]
    for model in models[1:]:
        for group in ("inputs", "outputs"):
            want, have = _specs(getattr(first, group), first), _specs(getattr(model, group), model)
            if sorted(want, key=_by_name) != sorted(have, key=_by_name):
                raise BundleError(
                    f"has other {group} than {first.path.name}: {_shown(have)}",
                    where=str(model.path),
                    expected=_shown(want),
                    remedy="variants of a model must be interchangeable",
                )


def _by_name(spec: TensorSpec) -> str:
    return spec.name


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in specs)


def guess_precision(graph: OnnxGraph | TfliteGraph | IrGraph | None) -> str:
    """What a model computes with: "int8" if it quantizes, else the type of most of its weights.

    "int8-dynamic": a TFLite file whose weights are INT8 and whose activations are not.
    """
    if graph is None:
        return ""
    if isinstance(graph, TfliteGraph):
        return _precision_of_tflite(graph)
    if isinstance(graph, IrGraph):
        return openvino_ir.precision(graph)
    names = {name for _, name in graph.operators}
    if "MatMulNBits" in names:
        return "int4"
    if names & _INTEGER_OPERATORS or any(name.startswith("QLinear") for name in names):
        return "int8"
    weights = dict.fromkeys(("FP32", "FP16", "BF16", "FP64"), 0)
    for initializer in graph.initializers:
        if initializer.datatype in weights:
            weights[initializer.datatype] += math.prod(initializer.shape)
    return max(weights, key=lambda datatype: weights[datatype]).lower()


def _precision_of_tflite(graph: TfliteGraph) -> str:
    constants = graph.constants
    if constants.get("INT4", 0) > constants.get("INT8", 0):
        return "int4"
    if graph.has_quantized_activations:
        return "int8"
    floats = {name: constants.get(name, 0) for name in ("FP32", "FP16", "BF16", "FP64")}
    most = max(floats, key=lambda name: floats[name])
    if constants.get("INT8", 0) + constants.get("UINT8", 0) > floats[most]:
        return "int8-dynamic"
    return most.lower()


def _variants(models: list[_Model]) -> tuple[Variant, ...]:
    """Named by precision where that tells them apart, else with the backend, else by file."""
    precisions = [guess_precision(model.graph) for model in models]
    keys = [(precision, model.backend) for precision, model in zip(precisions, models, strict=True)]
    names: list[str] = []
    for model, precision in zip(models, precisions, strict=True):
        if precision and precisions.count(precision) == 1:
            name = precision
        elif precision and keys.count((precision, model.backend)) == 1:
            name = f"{precision}-{model.backend}"
        else:
            name = _as_name(model.path.stem)
        names.append(_unused(name, names))
    return tuple(
        Variant(name, model.backend, model.blob, precision, _device_class(model), model.options)
        for name, model, precision in zip(names, models, precisions, strict=True)
    )


def _as_given(models: list[_Model], given: Sequence[Given]) -> tuple[Variant, ...]:
    return tuple(
        Variant(
            one.name,
            one.backend,
            model.blob,
            one.precision or guess_precision(model.graph),
            options=dict(one.options),
        )
        for one, model in zip(given, models, strict=True)
    )


def _device_class(model: _Model) -> str:
    """Of the accelerator that a file was compiled for; else "cpu"."""
    compiled = lint.compiled_for(model.graph)
    return compiled.device_class if compiled is not None else "cpu"


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:48] or "model"


def _unused(name: str, taken: list[str]) -> str:
    """The name, with a number behind it if need be."""
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbered) if each not in taken)


def _has_batch_axis(model: _Model, *, trusted: bool) -> bool:
    """Whether axis 0 of every input and output is free, so that it may be the batch.

    `trusted`: the answer will not be tried out, so the free dimensions must have one name too.
    """
    values = model.inputs + model.outputs
    if not all(value.shape and value.shape[0] == -1 for value in values):
        return False
    symbols = {value.symbols[0] for value in values}
    return len(symbols) == 1 and "" not in symbols if trusted else True


# --- goldens -------------------------------------------------------------------------------------


def _golden_inputs(
    options: Options, model: _Model, specs: tuple[TensorSpec, ...]
) -> list[dict[str, Array]]:
    if options.samples is not None:
        return _read_samples(options.samples, specs, options.goldens)
    return _generate(options, model, specs, options.goldens)


def _generate(
    options: Options, model: _Model, specs: tuple[TensorSpec, ...], count: int
) -> list[dict[str, Array]]:
    import numpy as np

    unknown = sorted(set(options.shapes) - {spec.name for spec in specs})
    if unknown:
        raise UsageError(
            f"the model has no input {unknown[0]!r}",
            where="--shape",
            expected="one of " + ", ".join(spec.name for spec in specs),
        )
    is_batched = _has_batch_axis(model, trusted=False)
    rng = np.random.Generator(np.random.PCG64(options.seed))
    shapes = {spec.name: _concrete(spec, options.shapes, is_batched) for spec in specs}
    return [
        {spec.name: _random(rng, spec, shapes[spec.name]) for spec in specs} for _ in range(count)
    ]


def _concrete(
    spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]], is_batched: bool
) -> tuple[int, ...]:
    if spec.name in shapes:
        shape = shapes[spec.name]
        if not tensors.shape_matches(shape, spec.shape):
            raise UsageError(
                f"{list(shape)} does not fit {spec.name!r}",
                where="--shape",
                expected=str(list(spec.shape)),
            )
        return shape
    free = [1 if is_batched and axis == 0 else FREE_SIZE for axis in range(len(spec.shape))]
    return tuple(size if dim == -1 else dim for dim, size in zip(spec.shape, free, strict=True))


def _random(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    """Values that any model takes: 0..1, bytes over their range, wider integers 0 or 1.

    A wider integer is most often an index or a token, and of those only 0 and 1 are sure to exist.
    """
    import numpy as np

    if spec.datatype in ("BYTES", "BF16"):
        raise UsageError(
            f"no {spec.datatype} values can be made up for {spec.name!r}",
            where="--goldens",
            remedy="give real inputs with --samples, or --goldens 0",
        )
    dtype = np.dtype(tensors.DATATYPES[spec.datatype][0])
    if dtype.kind == "f":
        return rng.random(shape, dtype=np.float64).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind != "b":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    return rng.integers(0, 2, shape).astype(dtype)


def _read_samples(path: Path, specs: tuple[TensorSpec, ...], count: int) -> list[dict[str, Array]]:
    """The first rows of an .npz (an array for each input) or of an .npy (for the only input)."""
    arrays = _load_arrays(path, specs)
    columns = {spec.name: _rows(path, spec, arrays[spec.name], count) for spec in specs}
    lengths = {len(rows) for rows in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise BundleError("inputs have different numbers of samples, or none", where=str(path))
    return [{name: rows[i] for name, rows in columns.items()} for i in range(lengths.pop())]


def _load_arrays(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    import numpy as np

    names = [spec.name for spec in specs]
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError) as e:
        raise BundleError(
            f"cannot be read: {e}", where=str(path), expected="an .npz or .npy file without objects"
        ) from e
    if len(arrays) == 1 and len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if not set(names) <= set(arrays):
        raise BundleError(
            f"holds {', '.join(sorted(arrays))[:300] or 'no arrays'}",
            where=str(path),
            expected="an array for each of " + ", ".join(names),
        )
    return {name: arrays[name] for name in names}


def _rows(path: Path, spec: TensorSpec, array: Array, count: int) -> list[Array]:
    """Samples along the first axis; each keeps a batch of 1 where the input has that axis."""
    import numpy as np

    has_batch = array.ndim == len(spec.shape) and spec.shape[0] in (-1, 1)
    rows = [array[i : i + 1] if has_batch else array[i] for i in range(min(count, len(array)))]
    for row in rows:
        datatype = tensors.datatype_of(row.dtype)
        fits = tensors.shape_matches(row.shape, spec.shape)
        if datatype != spec.datatype or not fits:
            raise BundleError(
                f"samples for {spec.name!r} are {datatype} {list(row.shape)}",
                where=str(path),
                expected=f"{spec.datatype} {list(spec.shape)} each",
            )
    # Not ascontiguousarray: it gives an axis to what has none.
    return [np.asarray(row, order="C") for row in rows]


def _record(
    load: Load,
    variant: Variant,
    model: _Model,
    feeds: list[dict[str, Array]],
    outputs: tuple[TensorSpec, ...],
    say: Say,
) -> _Recorded:
    """The answers of one variant, each asked for twice."""
    run = load(variant, model.path.resolve())
    answers = []
    for index, feed in enumerate(feeds):
        say(f"recording golden {index + 1} of {len(feeds)} with {variant.name}", 0, 0)
        answers.append(_run_golden(run, feed, model))
        _check_answer(answers[-1], run(feed), outputs, model)
    return _Recorded(run, answers)


def _run_golden(run: Run, feed: Mapping[str, Array], model: _Model) -> Mapping[str, Array]:
    import numpy as np

    try:
        return {name: np.array(array) for name, array in run(feed).items()}
    except EdgeError as e:
        e.where = e.where or str(model.path)
        e.remedy = e.remedy or "give real inputs with --samples, or other sizes with --shape"
        raise


def _check_answer(
    answer: Mapping[str, Array],
    again: Mapping[str, Array],
    outputs: tuple[TensorSpec, ...],
    model: _Model,
) -> None:
    import numpy as np

    for spec in outputs:
        first, second = answer[spec.name], again[spec.name]
        where = f"{model.path}: output {spec.name!r}"
        if not tensors.shape_matches(first.shape, spec.shape):
            raise BundleError(
                f"has shape {list(first.shape)}", where=where, expected=str(list(spec.shape))
            )
        if first.dtype.kind == "f" and not np.isfinite(first).all():
            raise BundleError(
                "is not finite for a golden input", where=where, remedy="give inputs with --samples"
            )
        if first.shape != second.shape or _deviation(first, second) > _ATOL_MIN:
            raise BundleError(
                "differs from run to run",
                where=where,
                expected="a deterministic model",
                remedy="--goldens 0 makes a bundle whose answers cannot be checked",
            )


def _deviation(got: Array, want: Array) -> float:
    """Largest absolute difference; for what is no number: 1 if anything differs."""
    import numpy as np

    if got.size == 0:
        return 0.0
    if got.dtype.kind in "fiu":
        return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
    return float((got != want).any())


# --- the batch axis ------------------------------------------------------------------------------


def _two_rows(
    options: Options,
    model: _Model,
    specs: tuple[TensorSpec, ...],
    feeds: list[dict[str, Array]],
) -> list[dict[str, Array]]:
    """Two different inputs of batch 1 and the same shapes otherwise; none if there are none."""
    one_each = [feed for feed in feeds if all(len(array) == 1 for array in feed.values())]
    if len(one_each) < 2 and options.samples is None:
        one_each = _generate(options, model, specs, 2)
    two = one_each[:2]
    same = len(two) == 2 and all(two[0][n].shape == two[1][n].shape for n in two[0])
    return two if same and all(len(array) == 1 for array in two[0].values()) else []


def _rows_are_independent(run: Run, two: list[dict[str, Array]]) -> bool:
    """Whether two inputs in one batch give what each gives alone: then batching is safe."""
    import numpy as np

    if not two:
        return False
    alone = [run(feed) for feed in two]
    try:
        together = run({name: np.concatenate([feed[name] for feed in two]) for name in two[0]})
    except EdgeError:
        return False  # the model has a fixed size inside, whatever its signature says
    for name, array in together.items():
        want = np.concatenate([answer[name] for answer in alone])
        if array.shape != want.shape:
            return False
        largest = float(np.abs(want).max()) if want.dtype.kind == "f" and want.size else 0.0
        if _deviation(array, want) > max(_ATOL_MIN, 1e-3 * largest):
            return False
    return True


# --- tolerances ----------------------------------------------------------------------------------


def tolerance(
    precision: str, largest: float, spread: float, scale: float, deviation: float
) -> Tolerance:
    """How far a variant may lie from its own recorded outputs on another processor or library.

    Args:
        precision: as `guess_precision` gives it.
        largest: largest absolute value of its float outputs.
        spread: largest less smallest value of its float outputs.
        scale: quantization scale of its outputs, 0 if not known.
        deviation: how far it lies from the first variant, 0 for the first itself.

    For quantized models: integer kernels differ between processors (with and without VNNI) by some
    steps of the output's scale; what quantization itself cost (`deviation`) says how large an error
    inside the model shows up in its outputs.
    """
    if precision in _TOLERANCES:
        rtol, share = _TOLERANCES[precision]
        return Tolerance(rtol, _round(max(_ATOL_MIN, share * largest)))
    fallback = 0.0 if scale or deviation else _INTEGER_ATOL_SHARE * spread
    return Tolerance(0.0, _round(max(_ATOL_MIN, 2 * scale, deviation, fallback)))


def _round(value: float) -> float:
    """Up to two digits: more would claim what was not measured."""
    if value == 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    scaled = math.ceil(value * 10**digits - 1e-6)  # 0.05 as FP32 is a little above 0.05
    return float(f"{scaled / 10**digits:.12g}")


class _Range(NamedTuple):
    largest: float
    spread: float


def _range(answers: list[Mapping[str, Array]]) -> _Range:
    arrays = [a for answer in answers for a in answer.values() if a.dtype.kind == "f" and a.size]
    if not arrays:
        return _Range(0.0, 0.0)
    top, bottom = max(float(a.max()) for a in arrays), min(float(a.min()) for a in arrays)
    return _Range(max(abs(top), abs(bottom)), top - bottom)


def _deviation_of(mine: _Recorded, first: _Recorded, names: list[str]) -> float:
    """Over all goldens and float outputs."""
    return max(
        (
            _deviation(got[name], want[name])
            for got, want in zip(mine.outputs, first.outputs, strict=True)
            for name in names
            if want[name].dtype.kind == "f"
        ),
        default=0.0,
    )


# --- the manifest --------------------------------------------------------------------------------


def _bare_manifest(
    options: Options,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    variants: tuple[Variant, ...],
    models: list[_Model],
) -> Manifest:
    provenance = {
        "tool": f"edge-runtime {edge_runtime.__version__}",
        "models": [_provenance(model) for model in models],
        **options.provenance,
    }
    order = ("schema", "name", "version", *(["label"] if options.label else []))
    bare = Manifest(
        schema=manifests.SCHEMA,
        name=options.name,
        version=options.version,
        label=options.label,
        inputs=inputs,
        outputs=outputs,
        variants=variants,
        preprocess=_with_sizes(options.preprocess, inputs),
        postprocess=options.postprocess,
        card=options.card,
        calibration=options.calibration,
        provenance=provenance,
        document=dict.fromkeys(order),
    )
    manifests.from_document(manifests.to_document(bare))  # a wrong name is told before all the work
    return bare


def _provenance(model: _Model) -> dict[str, Any]:
    out: dict[str, Any] = {"filename": model.path.name, "sha256": model.blob.sha256}
    if isinstance(model.graph, OnnxGraph):
        out |= {"producer": model.graph.producer, "opset": model.graph.opsets.get("", 0)}
    elif isinstance(model.graph, TfliteGraph):
        out |= {"producer": model.graph.description, **_quantization(model.graph)}
    return out


def _quantization(graph: TfliteGraph) -> dict[str, Any]:
    """Of inputs and outputs that are served quantized: real = scale * (stored - zero_point)."""
    found = {
        io.signature_name: io.quantization._asdict()
        for io in (*graph.inputs, *graph.outputs)
        if io.quantization is not None
    }
    return {"quantization": found} if found else {}


def _with_sizes(step: Preprocess | None, inputs: tuple[TensorSpec, ...]) -> Preprocess | None:
    """Width and height from the input where the user does not say them."""
    if step is None:
        return None
    spec = next((i for i in inputs if i.name == step.input), inputs[0])
    sizes = dict(zip(step.layout, spec.shape, strict=False))
    return msgspec.structs.replace(
        step,
        input=step.input or spec.name,
        width=step.width or max(sizes.get("W", 0), 0),
        height=step.height or max(sizes.get("H", 0), 0),
    )


def _with_goldens(
    bare: Manifest,
    models: list[_Model],
    feeds: list[dict[str, Array]],
    recorded: list[_Recorded],
    *,
    batched: bool,
) -> tuple[Manifest, dict[str, Source], tuple[str, ...]]:
    """The manifest with goldens and tolerances; their blobs; notes."""
    names = [spec.name for spec in bare.outputs]
    variants, notes, own = [], [], {}
    for variant, model, mine in zip(bare.variants, models, recorded, strict=True):
        deviation = _deviation_of(mine, recorded[0], names)
        largest, spread = _range(mine.outputs)
        scale = _scale(model)
        limit = tolerance(variant.precision or "fp32", largest, spread, scale, deviation)
        variants.append(msgspec.structs.replace(variant, tolerance=limit))
        if mine is not recorded[0]:
            own[variant.name] = mine
            notes.append(
                f"{variant.name} lies at most {_round(deviation):g} from {bare.variants[0].name} "
                f"(outputs spread over {spread:.3g})"
            )
        if spread and limit.atol > _TOLERANCE_SHARE_MAX * spread:
            notes.append(
                f"{variant.name}: a tolerance of {limit.atol:g} on outputs that spread over "
                f"{spread:.3g} notices little; give real inputs with --samples"
            )
    store = _Blobs()
    goldens = tuple(
        Golden(
            store.tensors(bare.inputs, feed),
            store.tensors(bare.outputs, recorded[0].outputs[index]),
            {name: store.tensors(bare.outputs, mine.outputs[index]) for name, mine in own.items()},
        )
        for index, feed in enumerate(feeds)
    )
    manifest = msgspec.structs.replace(
        bare, variants=tuple(variants), goldens=goldens, batch_axis=0 if batched else None
    )
    if _has_batch_axis(models[0], trusted=False) and not batched:
        notes.append("axis 0 is free, but rows in one batch change each other: no batch axis")
    return manifest, store.sources, tuple(notes)


def _scale(model: _Model) -> float:
    """The largest quantization step of its outputs, in the outputs' own unit; 0 if not known."""
    return max(model.graph.output_scales.values(), default=0.0) if model.graph else 0.0


class _Blobs:
    """Tensors as blobs, each content once."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}

    def tensors(
        self, specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]
    ) -> tuple[GoldenTensor, ...]:
        return tuple(self._tensor(spec, arrays[spec.name]) for spec in specs)

    def _tensor(self, spec: TensorSpec, array: Array) -> GoldenTensor:
        content = source.from_bytes(bytes(tensors.to_bytes(array)), spec.name)
        sha256 = content.sha256()
        self.sources[sha256] = content
        blob = Blob(sha256, content.size)
        return GoldenTensor(spec.name, spec.datatype, tuple(array.shape), blob)


def _contents(models: list[_Model]) -> dict[str, Source]:
    return {model.blob.sha256: model.content for model in models}


def _write(
    manifest: Manifest, blobs: dict[str, Source], out: Path, say: Say, notes: tuple[str, ...]
) -> Created:
    with archive.compose(manifest, blobs) as bundle:
        findings = lint.lint(bundle.manifest, bundle.blob)
        lint.refuse(findings)
        sha256 = archive.pack(bundle, out, lambda done, total: say("writing", done, total))
        remarks = [f"{finding.where}: {finding.message}" for finding in findings]
        return Created(bundle.manifest, sha256, (*notes, *remarks))
