"""The recipe of `edge-quantize auto`: model, data and target profile, nothing else asked.

Law of this file: it reads what is needed to propose (the model's signature and operators, the
profile's backends, which libraries are here) and returns a recipe like one that a person wrote.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.bundle import openvino_ir
from edge_runtime.bundle import source as contents
from edge_runtime.errors import ModelError, NotFoundError, UsageError
from quantize import (
    causes,
    kernels,
    litert_door,
    models,
    onnx_door,
    origins,
    proposing,
    targets,
    tflite_ops,
)
from quantize.models import ModelFile
from quantize.passes import FLOAT, ONNX, OPENVINO, TFLITE, Say
from quantize.proposing import Groups
from quantize.recipe import Budgets, Data, Evaluation, Pack, Recipe, Search, Variant

_CHANNELS = (1, 3)  # of an image


class Wish(NamedTuple):
    """What the user said."""

    model: Path
    data: str
    target: str
    calibration: str = ""
    name: str = ""
    version: int = 1
    labels: Path | None = None
    drop_max: float | None = None
    samples: int = 0
    threads: int = 1
    search_s: float = 0.0
    metric: str = "auto"
    output: str = ""


def recipe(wish: Wish, folder: Path | None = None, say: Say = lambda what: None) -> Recipe:
    """What will be tried.

    Args:
        folder: where a torch source is exported to, to be looked at; None: nowhere that is kept.

    Raises:
        NotFoundError, BundleError: the model. UsageError: the target or the labels.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return recipe(wish, Path(temporary), say)
    source, notes = _source(wish, folder, say)
    if FLOAT not in source.traits:
        raise UsageError(
            f"is quantized already ({source.precision})",
            where=str(wish.model),
            expected="the float model it was made of: what rounding lost does not come back",
        )
    backends = [one for one in targets.backends(wish.target) if targets.is_here(one)]
    groups = _groups(source, backends)
    proposal = proposing.propose(
        source,
        operators(source),
        backends,
        targets.can_import,
        groups,
        _features(wish.target),
    )
    if not proposal.variants:
        raise UsageError(
            f"nothing to try for {wish.target}: none of its backends is installed and reads"
            f" {source.format}",
            expected="one of " + ", ".join(targets.backends(wish.target)),
            remedy="pip install 'edge-runtime[quantize]'",
        )
    return Recipe(
        name=wish.name or as_name(wish.model.stem.partition(":")[2] or wish.model.stem),
        version=wish.version,
        source=_absolute(str(wish.model)),
        data=data(wish.data, wish.calibration, source),
        threads=wish.threads,
        targets=(wish.target,),
        evaluation=Evaluation(wish.metric, output=wish.output, samples=wish.samples),
        budgets=Budgets(drop_max=wish.drop_max),
        variants=proposal.variants,
        search=Search(time_s_max=wish.search_s) if wish.search_s else None,
        pack=Pack(labels=_labels(wish.labels)),
        notes=(*notes, *map(_not_tried, proposal.missing)),
    )


def _features(target: str) -> frozenset[str]:
    """What this processor can do, where it says something of the target's."""
    return frozenset() if targets.other_kinds(target) else causes.processor_features()


def _not_tried(module: str) -> str:
    return f"not tried: what {module} could do; it is not installed"


def _source(wish: Wish, folder: Path, say: Say) -> tuple[ModelFile, list[str]]:
    """The model as files, and what was left out. Of torch also the .tflite, where one is wanted."""
    source = str(wish.model)
    if not origins.is_torch(source):
        return models.read(wish.model), []
    given, notes = Recipe("source", _absolute(source), Data(_absolute(wish.data))), []
    if "litert" in targets.backends(wish.target) and not origins.tflite_is_possible():
        notes.append(_not_tried("litert_torch"))
    elif "litert" in targets.backends(wish.target):
        both = msgspec.structs.replace(given, variants=(Variant("fp32", "litert"),))
        try:
            return origins.read(origins.exported(both, folder, say)), []
        except ModelError as error:
            notes.append(f"not tried: .tflite for litert: {error.message}")
    return origins.read(origins.exported(given, folder, say)), notes


def operators(source: ModelFile) -> set[str]:
    """Kinds of nodes of an ONNX model or IR; none for .tflite."""
    if source.format == OPENVINO:
        graph = openvino_ir.read(contents.from_path(source.path))
        return {name for _, name in graph.operators}
    if source.format != ONNX:
        return set()
    return {node.op_type for node in onnx_door.load(source.path).graph.node}


def _groups(source: ModelFile, backends: Sequence[str]) -> Groups:
    """Nodes that proposals name; none of a format or without a backend that says none."""
    if source.format == ONNX:
        return Groups(thin=kernels.slow(source.path).thin)
    if source.format == TFLITE and "litert" in backends:
        graph = litert_door.graph(source.path)
        return Groups(connected=tflite_ops.of_kinds(graph, {"FULLY_CONNECTED"}))
    return proposing.NO_GROUPS


def as_name(text: str) -> str:
    """A model's name made of a file's."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:48] or "model"


def data(path: str, calibration: str, source: ModelFile) -> Data:
    """Where samples are; of a folder of images also what the model's input says about them."""
    told = Data(path=_absolute(path), calibration=_absolute(calibration))
    shape = source.inputs[0].shape
    if len(shape) != 4 or not Path(told.path).is_dir():
        return told
    last = shape[3] in _CHANNELS and shape[1] not in _CHANNELS
    return msgspec.structs.replace(
        told,
        layout="NHWC" if last else "NCHW",
        color="L" if shape[3 if last else 1] == 1 else "RGB",
        pixel_scale=told.pixel_scale if source.inputs[0].datatype.startswith("FP") else 1.0,
    )


def _absolute(text: str) -> str:
    from quantize.recipe import is_callable

    return text if not text or is_callable(text) else str(Path(text).resolve())


def _labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return tuple(line for line in path.read_text().splitlines() if line)
    except FileNotFoundError as e:
        raise NotFoundError("there is no such file of labels", where=str(path)) from e
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot be read as lines of text: {e}", where=str(path)) from e
