"""Which passes exist, and what a pass is.

Law of this file: the table and its reader. A pass is a frozen Struct whose fields are its options;
its file states what it needs and what it gives, and imports its library only when it is applied.
A pass reads one model file and writes another: the input is never touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import msgspec

from edge_runtime.backends import options as typed
from edge_runtime.errors import UsageError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Feeds = dict[str, Array]  # per input name an array [samples, ...]
else:  # the table of passes can be read where numpy is not installed
    Array = Feeds = Any
Say = Callable[[str], None]

# What a file is. A pass requires some and ensures some; the runner checks both before any work. A
# file has one format: of those that a pass requires, any will do.
ONNX, TFLITE, OPENVINO = "onnx", "tflite", "openvino"
TORCH = "torch"  # just exported from a module that can be made again; ends with the first pass
FLOAT = "float"  # weights and activations are floats: nothing was quantized yet
SHAPED = "shaped"  # every tensor's rank is known; clean-up ensures it
PRUNED = "pruned"
INTEGER = "integer"  # activations are integers
SMALL_WEIGHTS = "small-weights"  # weights are stored in fewer bits than they are computed in
FORMATS = frozenset({ONNX, TFLITE, OPENVINO})

# name in a recipe (`use`) -> "module:class".
PASSES: dict[str, str] = {
    "clean": "quantize.passes.graph:Clean",
    "prune_channels": "quantize.passes.pruning:PruneChannels",
    "torch_prune": "quantize.passes.torch:TorchPrune",
    "prune_weights": "quantize.passes.pruning:PruneWeights",
    "fine_tune": "quantize.passes.training:FineTune",
    "static_int8": "quantize.passes.integer:StaticInt8",
    "dynamic_int8": "quantize.passes.integer:DynamicInt8",
    "weight_only": "quantize.passes.weights:WeightOnly",
    "float16": "quantize.passes.weights:Float16",
    "nncf_int8": "quantize.passes.openvino:NncfInt8",
    "nncf_accuracy": "quantize.passes.openvino:NncfAccuracy",
    "nncf_weights": "quantize.passes.openvino:NncfWeights",
    "tflite_int8": "quantize.passes.tflite:TfliteInt8",
    "tflite_weights": "quantize.passes.tflite:TfliteWeights",
    "tflite_float16": "quantize.passes.tflite:TfliteFloat16",
}


class Validation(NamedTuple):
    """Samples for passes that choose by what answers are worth: none that calibrates or judges.

    Attributes:
        calibration: what is left to calibrate with, [samples, ...] per input.
        inputs: the samples, as calibration is given.
        answers: a model file's outputs for those at these places, [places, ...] by name, from the
            backend that the variant is for. Raises: EdgeError.
        score: (answers, the float model's), both of all samples and outputs -> one score per
            sample, larger is better. output: the one that is judged.
        drop_max: the loss of the mean score that a pass may leave where its options do not say.
        metric: its name. key: of everything above, for the results' keys.
    """

    calibration: Feeds
    inputs: Feeds
    answers: Callable[[Path, Array], Feeds]
    score: Callable[[Feeds, Feeds], Array]
    output: str
    drop_max: float
    metric: str
    key: str


class Bench(NamedTuple):
    """What a pass may use while it works.

    Attributes:
        calibration: samples for the quantizers, [samples, ...] per input.
        inputs, outputs: the model's, as its file says.
        batch_axis: 0 if the first axis of all of them is a free batch axis, else None.
        seed: of anything random.
        say: progress, one line.
        cache: a folder where a pass may keep what another run of it can use; None: nowhere.
        module: `module:function` that the source was exported from; empty: from nowhere.
        validation: for passes that say `validates`; None: no pass of the chain does.
    """

    calibration: Feeds
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: int | None
    seed: int
    say: Say
    cache: Path | None = None
    module: str = ""
    validation: Validation | None = None


class Pass(Protocol):
    """One transformation. `requires` and `ensures` are traits; `removes` are those that end."""

    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]
    removes: ClassVar[frozenset[str]]

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """Read `source`, write `out`.

        Raises:
            UsageError: an option does not fit this model.
            ModelError: the library refused the model; its message says what and why.
        """

    def versions(self) -> dict[str, str]:
        """The libraries that decide the result, with their versions: part of its cache key."""


def decode(given: Mapping[str, Any], where: str) -> Pass:
    """The pass that a recipe's mapping means.

    Raises:
        UsageError: unknown pass or option (nearest named), or a wrong value.
    """
    name = given.get("use")
    if not isinstance(name, str) or name not in PASSES:
        raise UsageError(
            f"unknown pass {name!r}" if name else "names no pass",
            where=f"{where}.use",
            expected="one of " + ", ".join(PASSES),
            remedy=did_you_mean(str(name), list(PASSES)),
        )
    module, _, kind = PASSES[name].partition(":")
    options = {key: value for key, value in given.items() if key != "use"}
    chosen = getattr(importlib.import_module(module), kind)
    return cast(Pass, typed.decode(chosen, options, where))


def validates(one: Pass) -> bool:
    """Whether the pass chooses by answers, and so needs Bench.validation."""
    return bool(getattr(one, "validates", False))


def describe(one: Pass) -> dict[str, Any]:
    """The pass and its options as plain values, defaults included."""
    name = next(key for key, value in PASSES.items() if value.endswith(f":{type(one).__name__}"))
    return {"use": name, **cast(dict[str, Any], msgspec.to_builtins(one))}


def traits_after(traits: frozenset[str], one: Pass, where: str) -> frozenset[str]:
    """What the file is after the pass.

    Raises:
        UsageError: the pass cannot work on such a file.
    """
    formats = one.requires & FORMATS
    missing = sorted(one.requires - FORMATS - traits)
    if formats and not formats & traits:
        missing.insert(0, " or ".join(sorted(formats)))
    if missing:
        raise UsageError(
            f"{describe(one)['use']} needs a model that is {', '.join(missing)};"
            f" here it is {', '.join(sorted(traits))}",
            where=where,
            remedy="change the order of the passes, or leave one out",
        )
    return (traits - one.removes - {TORCH}) | one.ensures
