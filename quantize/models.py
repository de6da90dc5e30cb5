"""What a model file says of itself, read by the same lint that a device uses.

Law of this file: a path in, values out; nothing is loaded. What lint refuses here would be refused
on every device, so it is refused before hours are spent on it. An artifact is one file: OpenVINO
IR, which is two, and ONNX with weights in other files become one here, and stay one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from edge_runtime.bundle import create, lint, source
from edge_runtime.bundle.onnx_graph import OnnxGraph, Value
from edge_runtime.errors import BundleError, EdgeError, NotFoundError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import onnx_door, recipe
from quantize.passes import FLOAT, INTEGER, ONNX, OPENVINO, SMALL_WEIGHTS, TFLITE

# What lint calls a format -> the trait of passes, and the ending of files of it.
FORMATS = {"onnx": ONNX, "tflite": TFLITE, "openvino-ir": OPENVINO}
# The backend that runs a float model of a format where a recipe names none.
BACKENDS = {ONNX: "onnxruntime", TFLITE: "litert", OPENVINO: "openvino"}
# Files of torch and its kin that hold weights, most of them pickled.
WEIGHTS = (".pt", ".pth", ".ckpt", ".pkl", ".safetensors")
# Backends that read one format only.
ONLY = {"litert": "tflite"}
_INTEGER_PRECISIONS = ("int8", "int4")


class ModelFile(NamedTuple):
    """A model file.

    Attributes:
        path: of the artifact. Of a model in several files that is one file made of them, which
            lasts as long as this process.
        batch_axis: 0 if the first axis of every input and output is free, else None.
        precision: as `bundle create` would name it.
        traits: what it is, for passes.
        also: the same model in other formats, by format. module: `module:function` that it was
            exported from, code_sha256: of the files that define it; empty: from nowhere.
    """

    path: Path
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: int | None
    precision: str
    traits: frozenset[str]
    also: Mapping[str, ModelFile] = MappingProxyType({})
    module: str = ""
    code_sha256: str = ""

    def on(self, backend: str) -> ModelFile:
        """The file that this backend is given: its own format's, or the one there is."""
        return self.also.get(ONLY.get(backend, ""), self)


def read(path: Path) -> ModelFile:
    """The signature of a model file.

    Raises:
        NotFoundError, BundleError: it is missing, refused by lint, or of no known format.
        UsageError: a format that no pass takes.
    """
    _refuse_torch(path)
    if not path.exists():
        raise NotFoundError("there is no such model", where=str(path))
    packed = _as_artifact(path)
    try:
        return _read(packed)
    except EdgeError as error:  # of the file that the user has, not of ours
        error.where = error.where.replace(str(packed), str(path))
        raise


def _read(path: Path) -> ModelFile:
    artifact = lint.lint_artifact(source.from_path(path.resolve()), path.name)
    if isinstance(artifact.graph, OnnxGraph) and artifact.graph.external_data:
        path = _whole(path.resolve(), onnx_door.parts(path))
        artifact = lint.lint_artifact(source.from_path(path), path.name)
    lint.refuse(list(artifact.findings))
    if artifact.format not in FORMATS:
        raise UsageError(
            f"is a {artifact.format} model",
            where=str(path),
            expected="one of " + ", ".join(FORMATS),
        )
    if artifact.inputs is None or artifact.outputs is None:
        raise BundleError("does not say its inputs and outputs", where=str(path))
    inputs, outputs = _specs(artifact.inputs, path), _specs(artifact.outputs, path)
    free = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))
    precision = create.guess_precision(artifact.graph)
    small = precision in _INTEGER_PRECISIONS
    kind = {INTEGER, SMALL_WEIGHTS} if small else {FLOAT}
    traits = frozenset({FORMATS[artifact.format], *kind})
    return ModelFile(
        path, FORMATS[artifact.format], inputs, outputs, 0 if free else None, precision, traits
    )


def _as_artifact(path: Path) -> Path:
    if path.suffix.lower() != ".xml":
        return path
    parts = [one for one in (path, path.with_suffix(".bin")) if one.exists()]
    return _packed(path.resolve(), tuple(one.stat().st_mtime_ns for one in parts))


@functools.cache
def _packed(path: Path, _changed_ns: tuple[int, ...]) -> Path:
    return create.as_artifact(path, Path(_folder().name))


@functools.cache
def _whole(path: Path, _parts: tuple[onnx_door.Part, ...]) -> Path:
    """Made once of the same files. Raises: ModelError."""
    whole = Path(tempfile.mkdtemp(dir=_folder().name)) / path.name
    onnx_door.join(path, whole)
    return whole


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process does."""
    return tempfile.TemporaryDirectory(prefix="edge-quantize-whole-")


def _refuse_torch(path: Path) -> None:
    """Raises: UsageError where it is torch's, which has to be exported first."""
    if recipe.is_callable(str(path)) or path.suffix == ".pt2":
        raise UsageError(
            "is torch's, and has to be exported first",
            where=str(path),
            remedy="name it as `source` of a recipe, or as the model of a command",
        )
    if path.suffix in WEIGHTS:
        raise UsageError(
            "is no model that can be opened safely: a pickle runs code when it is read, and weights"
            " without their class are no model",
            where=str(path),
            expected="source: module:function, a function of yours that builds the network, loads"
            " these weights and returns it in eval mode; or what torch.export.save writes (.pt2)",
        )


def _specs(values: tuple[Value, ...], path: Path) -> tuple[TensorSpec, ...]:
    for value in values:
        if value.kind != "tensor" or not value.datatype or value.shape is None:
            raise BundleError(
                f"{value.name!r} has no datatype or shape that a device could serve",
                where=str(path),
                expected="dense tensors whose number of dimensions is known",
            )
    return tuple(TensorSpec(one.name, one.datatype, one.shape or ()) for one in values)
