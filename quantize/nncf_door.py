"""The door to NNCF: int8 as OpenVINO's makers do it.

Law of this file: the only one that imports nncf. ONNX is written as ONNX and IR as IR;
measured on our CNN both run equally fast. NNCF reports its use to its maker through
openvino_telemetry: that module is kept from loading.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import ModelError, UsageError
from quantize import causes, datasets, foreign, onnx_door, openvino_door, scores
from quantize.passes import Bench, Feeds, Validation

if TYPE_CHECKING:
    from quantize.passes.openvino import NncfAccuracy, NncfInt8, NncfWeights

Array = np.ndarray[Any, Any]


def version() -> str:
    return str(_library().__version__)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a pass writes. Raises: UsageError: one is missing."""
    return {"nncf": version(), "onnx": onnx_door.version()} | openvino_door.versions()


def quantize(source: Path, out: Path, how: NncfInt8, bench: Bench) -> None:
    """Write the model with quantize/dequantize pairs where NNCF wants them.

    Raises:
        UsageError: the library is not installed, or a node to be ignored does not exist.
        ModelError: it refuses the model.
    """
    model, library = _load(source, how.exclude), _library()
    rows = list(_rows(bench.calibration, bench))
    with foreign.ours("NNCF failed to quantize", source):
        made = library.quantize(model, library.Dataset(rows), **_options(library, how, len(rows)))
    _save(made, out)


def quantize_with_control(source: Path, out: Path, how: NncfAccuracy, bench: Bench) -> None:
    """As `quantize`, with nodes put back into float until the loss is `drop_max`; says which.

    Raises:
        UsageError, ModelError: as `quantize`.
    """
    model, library = _load(source, how.exclude), _library()
    seen = bench.validation
    assert seen is not None, "the runner gives it to passes that say `validates`"
    drop_max = seen.drop_max if how.drop_max is None else how.drop_max
    rows, held = list(_rows(seen.calibration, bench)), list(_rows(seen.inputs, bench))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        judge = _Judge(source, seen, held, Path(folder))
        told: dict[str, Any] = {
            "intermediate_model_dir": folder,
            "ranking_subset_size": min(len(held), RANKING_SAMPLES_MAX),
            "num_ranking_workers": 1,  # the same order everywhere
        }
        if how.steps_max:
            told["max_num_iterations"] = how.steps_max
        with foreign.ours("NNCF failed to quantize under control", source):
            made = library.quantize_with_accuracy_control(
                model,
                library.Dataset(rows),
                library.Dataset(range(len(held))),
                judge.validate,
                max_drop=drop_max,
                advanced_accuracy_restorer_parameters=library.AdvancedAccuracyRestorerParameters(
                    **told
                ),
                **_options(library, how, len(rows), "advanced_quantization_parameters"),
            )
            before = _intermediate(Path(folder), source)
        whole, left = _quantized(before), _quantized(made)
        back = [name for name in whole if name not in left]
        _save(made, out)
        judge.result(out)
    said = _told(back, len(whole), judge, drop_max, seen, len(held))
    bench.say(said)
    _note(made, said)
    _save(made, out)


# Samples that rank the groups: each is run once for every group there is.
RANKING_SAMPLES_MAX = 100
NAMED_MAX = 8
# What moves values and computes none: quantized are those who read them.
PASSING = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


class _Judge:
    """NNCF's validation function over numbers of samples, by the backend that will serve.

    The whole set is scored by the metric, because that is the budget. A part of it is asked for to
    rank groups of nodes: that is scored by the squared distance to the float model's answers,
    because a metric of right or wrong cannot tell two groups apart by a hundred samples.
    """

    def __init__(self, source: Path, seen: Validation, rows: Sequence[Feeds], folder: Path) -> None:
        self._seen, self._rows, self._folder = seen, rows, folder
        self._every = np.arange(len(rows))
        self._want = seen.answers(source, self._every)
        self.scores: list[float] = []  # of all models in turn: float, int8, ..., the result

    def validate(self, model: Any, items: Iterable[int]) -> tuple[float, list[float]]:
        places = np.array(list(items))
        got = self._answers(model, places)
        output = self._seen.output
        near = scores.negative_mse(got[output], None, self._want[output][places])
        if len(places) < len(self._rows):
            return float(near.mean()), near.tolist()
        # NNCF divides by the float model's, which is 0 where its own answers are the truth.
        return 1 + self.note(got) - self.scores[0], near.tolist()

    def note(self, got: Feeds) -> float:
        """The metric of answers to all samples; kept."""
        self.scores.append(float(self._seen.score(got, self._want).mean()))
        return self.scores[-1]

    def result(self, path: Path) -> None:
        """Score the file that was written."""
        self.note(self._seen.answers(path, self._every))

    def _answers(self, model: Any, places: Array) -> Feeds:
        if hasattr(model, "create_infer_request"):  # IR, which NNCF has compiled in f32
            found = [list(model(self._rows[place]).values()) for place in places]
            return {
                name: np.concatenate([np.array(one[index]) for one in found])
                for index, name in enumerate(self._want)
            }
        path = self._folder / "candidate.onnx"
        onnx_door.save(model, path)
        return self._seen.answers(path, places)


def _intermediate(folder: Path, source: Path) -> Any:
    """The model with everything quantized, as NNCF left it in `folder`."""
    if source.suffix == openvino_door.IR:
        return openvino_door.library().Core().read_model(folder / "intermediate_model.xml")
    return onnx_door.load(folder / "intermediate_model.onnx")


def _quantized(model: Any) -> list[str]:
    """Nodes that work on quantized values."""
    if not hasattr(model, "graph"):
        return openvino_door.quantized(model)
    makers = {out: node for node in model.graph.node for out in node.output}

    def is_quantized(name: str) -> bool:
        maker = makers.get(name)
        if maker is not None and maker.op_type in PASSING:
            return is_quantized(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    return [
        node.name
        for node in model.graph.node
        if node.input and node.op_type not in PASSING | {"QuantizeLinear", "DequantizeLinear"}
        if is_quantized(node.input[0])
    ]


def _told(
    back: list[str], count: int, judge: _Judge, drop_max: float, seen: Validation, samples: int
) -> str:
    """What was done, in one sentence."""
    first = judge.scores[0] - judge.scores[1]
    begin = f"NNCF, by {samples} samples that neither calibrate nor judge: int8 loses {first:.4g}"
    begin += f" {seen.metric}, {drop_max:.4g} is wanted"
    if not back:
        return f"{begin}: nothing went back into float"
    lost = judge.scores[0] - judge.scores[-1]
    more = f" and {len(back) - NAMED_MAX} more" if len(back) > NAMED_MAX else ""
    return (
        f"{begin}; with {len(back)} of {count} nodes back in float ({', '.join(back[:NAMED_MAX])}"
        f"{more}) it loses {lost:.4g}"
    )


def _note(model: Any, said: str) -> None:
    if hasattr(model, "graph"):
        model.metadata_props.add(key=causes.NOTE, value=said)
    else:
        model.set_rt_info(said, causes.NOTE)


def _options(
    library: Any,
    how: NncfInt8 | NncfAccuracy,
    samples: int,
    advanced: str = "advanced_parameters",
) -> dict[str, Any]:
    """What both ways to quantize are told; `advanced`: what each calls its further parameters."""
    options: dict[str, Any] = {
        "preset": library.QuantizationPreset(how.preset),
        "subset_size": samples,
        "fast_bias_correction": how.fast_bias_correction,
    }
    if how.model_type == "transformer":
        options["model_type"] = library.ModelType.TRANSFORMER
    if how.exclude:
        options["ignored_scope"] = library.IgnoredScope(names=list(how.exclude))
    if how.ranges == "minmax":
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        options[advanced] = library.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        )
    return options


def compress_weights(source: Path, out: Path, how: NncfWeights) -> None:
    """Write the model with weights in fewer bits.

    Raises:
        UsageError: the library is not installed, or a node to be ignored does not exist.
        ModelError: it refuses the model, or no weights are in so few bits.
    """
    model, library = _load(source, how.exclude), _library()
    sign = "SYM" if how.symmetric else "ASYM"
    options: dict[str, Any] = {"mode": library.CompressWeightsMode[f"INT{how.bits}_{sign}"]}
    if how.bits == 4:
        options |= {"group_size": how.group, "ratio": how.share}
    if how.exclude:
        options["ignored_scope"] = library.IgnoredScope(names=list(how.exclude))
    with foreign.ours("NNCF failed to compress the weights", source):
        made = library.compress_weights(model, **options)
    if how.bits == 4 and not openvino_door.has_four_bits(made):
        raise ModelError(
            "no weights were stored in 4 bits: none but products before the last layer can be",
            where=str(source),
            remedy="raise `share`, or use 8 bits",
        )
    _save(made, out)


def _load(path: Path, exclude: Sequence[str]) -> Any:
    """The model as NNCF takes it. OpenVINO comes in first: NNCF imports it as it finds it.

    Raises:
        UsageError: a name in `exclude` that no node has.
    """
    if path.suffix == openvino_door.IR:
        model = openvino_door.load(path)
        openvino_door.refuse_unknown(exclude, model)
    else:
        model = onnx_door.load(path)
        onnx_door.refuse_unknown(exclude, model)
        onnx_door.tell_apart(model)  # NNCF wants names of its nodes' own
    return model


def _save(made: Any, out: Path) -> None:
    if out.suffix == openvino_door.IR:
        openvino_door.save(made, out)
    else:
        onnx_door.save(made, out)


def _rows(feeds: Feeds, bench: Bench) -> Iterator[Feeds]:
    """Single samples with a batch axis of 1."""
    for index in range(len(next(iter(feeds.values())))):
        part = {name: array[index : index + 1] for name, array in feeds.items()}
        yield datasets.fed(part, bench.inputs)


def _library() -> Any:
    silent = ModuleType("openvino_telemetry")
    silent.Telemetry = _Silent  # type: ignore[attr-defined]
    if sys.modules.get("openvino_telemetry") is None:  # none: OpenVINO's door was there before
        sys.modules["openvino_telemetry"] = silent
    try:
        with foreign.quiet():
            import nncf

            nncf.set_log_level(logging.ERROR)
    except (ImportError, OSError) as e:
        raise UsageError(
            f"nncf does not import: {e}", remedy="pip install 'edge-runtime[quantize-openvino]'"
        ) from e
    return nncf


class _Silent:
    """Stands for the reporter: takes every call and sends nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
