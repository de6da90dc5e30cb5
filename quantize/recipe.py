"""The recipe: what is compressed, with which data, under which budgets, into which variants.

Law of this file: values only. YAML becomes one frozen, checked `Recipe`; an unknown key is an error
with its path and nearest match. Nothing here opens a model or data, and no library for either is
imported. Paths stay as written; `resolved` makes them absolute from where the recipe lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_runtime.backends import options as typed
from edge_runtime.bundle import document
from edge_runtime.bundle import manifest as manifests
from edge_runtime.errors import BundleError, EdgeError, NotFoundError, UsageError

SCHEMA = 1
SAMPLES_MAX = 10_000_000
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=SAMPLES_MAX)]
Positive = Annotated[float, msgspec.Meta(ge=0)]
# Exporters write names into the code of a function.
PythonName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]

METRICS = (
    "auto",
    "top1",
    "topk",
    "f1",
    "map",
    "mse",
    "nmse",
    "psnr",
    "wer",
    "agreement",
    "kl",
    "cosine",
    "callable",
)


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where samples come from.

    Attributes:
        path: an .npz file (`x`, or one array per input, first axis is the sample; `y`: labels), a
            folder of images (one folder per class, or flat with labels.csv), or
            `module:function`, a callable that returns (inputs, labels or None).
        calibration: the same, for calibration only. Empty: samples are taken from `path`, and
            evaluation leaves them out.
        layout, color, width, height, mean, std, pixel_scale: for a folder of images, as in a
            manifest's `preprocess`; 0 sizes: from the model's input.
    """

    path: str
    calibration: str = ""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    color: Literal["RGB", "BGR", "L"] = "RGB"
    width: Annotated[int, msgspec.Meta(ge=0, le=32768)] = 0
    height: Annotated[int, msgspec.Meta(ge=0, le=32768)] = 0
    pixel_scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples the quantizers see. 512: more changed no scale by 1 % in our measurements."""

    samples: Annotated[int, msgspec.Meta(ge=1, le=SAMPLES_MAX)] = 512
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How right a variant is, and how that is measured.

    Attributes:
        metric: one of METRICS; auto: what fits labels and output (see judging.py), for classes
            top1 with labels, agreement with the float model without.
        k: for topk. callable: `module:function` for metric `callable` and `wer`: takes
            (outputs, labels) and returns one score per sample, larger is better.
        output: the output that is judged; empty: the first that holds floats.
        samples: at most so many, chosen by `seed`; 0: all.
        rounds: interleaved rounds of latency; each runs every variant.
    """

    metric: Literal[METRICS] = "auto"  # type: ignore[valid-type]
    k: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    callable: str = ""
    output: str = ""
    samples: Count = 0
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    rounds: Annotated[int, msgspec.Meta(ge=3, le=10_000)] = 30


class Budgets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a variant must keep to be shipped. 0: not limited.

    Attributes:
        drop_max: largest loss of the metric against the float model, in the metric's own unit
            (top1: 0.01 is one point). null: the metric's default.
        confidence: of the upper bound that the loss must keep.
        speedup_min: float latency / variant latency at batch 1, on the same backend and threads.
            1.0: a variant that is not faster is refused. 0: size alone may justify it.
    """

    drop_max: Annotated[float, msgspec.Meta(ge=0)] | None = None
    confidence: Annotated[float, msgspec.Meta(gt=0.5, lt=1)] = 0.95
    size_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    latency_ms_max: Positive = 0.0
    memory_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    speedup_min: Positive = 1.0


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chain of passes, and the backend that its result is for.

    `passes` are mappings with the pass's name under `use` and its options beside it.
    """

    name: str
    backend: str = "onnxruntime"
    options: dict[str, Any] = {}
    passes: tuple[dict[str, Any], ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether it is the float model as it is."""
        return not self.passes and not computes_in(self.backend, self.options)


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What else is tried beside `variants`, and how long.

    Attributes:
        time_s_max: no trial begins after it, so a run takes at most one trial longer (with `train`
            a training and its trials); building and judging what was found comes on top.
        trials_max: nor more trials than this.
        keep: finalists of each backend that are judged like the recipe's own variants.
        samples: of the evaluation set that a trial is judged with; 0: all. Finalists see all.
        rounds: of latency for a trial.
        backends: to search for; empty: those of the variants and targets that are installed.
        ratios: shares of channels to be pruned; empty: no pruning. train: `module:function` that
            trains a pruned model again (pass fine_tune); empty: none, so that little can be pruned.
    """

    time_s_max: Positive = 600.0
    trials_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    keep: Annotated[int, msgspec.Meta(ge=1, le=32)] = 4
    samples: Count = 2000
    rounds: Annotated[int, msgspec.Meta(ge=3, le=1000)] = 10
    backends: tuple[str, ...] = ()
    ratios: tuple[Annotated[float, msgspec.Meta(gt=0, lt=1)], ...] = ()
    train: str = ""


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a torch source becomes a file; for other sources it says nothing.

    Attributes:
        inputs, outputs: names, in the order of forward's arguments and of what it returns; empty:
            the arguments' own names, and `output` (several: the keys of a dict, or output_0, ...).
        batch: free: any number of samples at a time; one: one at a time; auto: free where the
            module allows it.
        tolerance: largest difference from torch's own answers, as a share of their largest value.
        samples: that are compared.
    """

    inputs: tuple[PythonName, ...] = ()
    outputs: tuple[PythonName, ...] = ()
    batch: Literal["auto", "free", "one"] = "auto"
    tolerance: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-3
    samples: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 32


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a source was exported from. The run fills it in; nobody writes it.

    Attributes:
        source: `module:function` or the .pt2 file. code_sha256: of the files that define the
            module. weights_sha256: of its parameters and buffers.
        versions: of the libraries that exported. differences: by format, the largest from torch's
            own answers, as a share of their largest value. notes: what the export did by itself.
    """

    source: str
    code_sha256: str
    weights_sha256: str
    versions: dict[str, str]
    differences: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class Pack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes into the bundle beside the variants."""

    goldens: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 6
    labels: tuple[str, ...] = ()


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that one run of `edge-quantize` needs to know.

    Attributes:
        source: a model file; or torch: `module:function`, or an exported program (.pt2).
        also: the same model in another format (`tflite: path`), for backends that read no other.
            A torch source brings it by itself.
    """

    name: str
    source: str
    data: Data
    also: dict[Literal["tflite"], str] = {}
    export: Export = Export()
    origin: Origin | None = None
    schema: int = SCHEMA
    version: Annotated[int, msgspec.Meta(ge=1, le=manifests.VERSION_MAX)] = 1
    label: str = ""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    budgets: Budgets = Budgets()
    targets: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    search: Search | None = None
    pack: Pack = Pack()
    notes: tuple[str, ...] = ()  # of who wrote it, for the report


def computes_in(backend: str, options: Mapping[str, Any]) -> str:
    """The precision that a variant's options ask for, in a manifest's words; empty: the file's."""
    told = options.get("precision", "") if backend == "openvino" else ""
    return {"bf16": "bf16", "f16": "fp16"}.get(told, "")


def load(path: Path) -> Recipe:
    """The recipe in a YAML file, with its paths made absolute.

    Raises:
        NotFoundError: no such file.
        UsageError: what is wrong, with file and key path.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise NotFoundError("there is no such recipe", where=str(path)) from e
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", where=str(path)) from e
    try:
        given = document.load(data, str(path))
    except BundleError as e:
        raise UsageError(e.message, where=e.where, expected=e.expected) from e
    return resolved(parse(given, str(path)), path.parent)


def parse(given: dict[str, Any], where: str) -> Recipe:
    """A checked recipe of a mapping.

    Raises:
        UsageError: `where` ends in the key path.
    """
    try:
        recipe = typed.decode(Recipe, given, "")
    except UsageError as e:
        e.where = f"{where}: {e.where.lstrip('.')}"
        raise
    _check(recipe, where)
    return recipe


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with relative paths made absolute from `folder`."""

    def absolute(text: str) -> str:
        return text if not text or is_callable(text) else str((folder / text).resolve())

    data = msgspec.structs.replace(
        recipe.data, path=absolute(recipe.data.path), calibration=absolute(recipe.data.calibration)
    )
    also = {kind: absolute(path) for kind, path in recipe.also.items()}
    return msgspec.structs.replace(recipe, source=absolute(recipe.source), also=also, data=data)


def is_callable(text: str) -> bool:
    """Whether a text names `module:function` and not a path."""
    module, colon, function = text.partition(":")
    return (
        bool(colon)
        and function.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )


def _check(recipe: Recipe, where: str) -> None:
    if recipe.schema != SCHEMA:
        raise UsageError(f"is {recipe.schema}", where=f"{where}: schema", expected=str(SCHEMA))
    names = [("name", recipe.name)]
    names += [(f"variants[{i}].name", one.name) for i, one in enumerate(recipe.variants)]
    for path, name in names:
        if not manifests.NAME.fullmatch(name):
            raise UsageError(
                f"{name[:80]!r} is not a name",
                where=f"{where}: {path}",
                expected="1 to 64 of a-z 0-9 . _ - beginning with a letter or digit",
            )
    seen: set[str] = set()
    for index, one in enumerate(recipe.variants):
        if one.name in seen:
            raise UsageError(
                f"{one.name!r} is there twice", where=f"{where}: variants[{index}].name"
            )
        seen.add(one.name)
    if recipe.search is not None and recipe.search.train and not recipe.search.ratios:
        raise UsageError(
            "nothing is pruned, so nothing is trained again",
            where=f"{where}: search.train",
            remedy="say how much is to be pruned: `ratios: [0.5]`; or leave `train` out",
        )
    if recipe.evaluation.metric in ("callable", "wer") and not is_callable(
        recipe.evaluation.callable
    ):
        raise UsageError(
            f"{recipe.evaluation.callable!r} names no function",
            where=f"{where}: evaluation.callable",
            expected="module:function",
        )


def locate(error: EdgeError, where: str) -> EdgeError:
    """The error with the recipe's own path before what it says of itself."""
    error.where = f"{where}.{error.where}" if error.where else where
    return error
