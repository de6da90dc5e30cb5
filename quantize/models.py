"""What a model file says of itself, read by the same lint that a device uses.

Law of this file: a path in, values out; nothing is loaded. What lint refuses here would be refused
on every device, so it is refused before hours are spent on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edge_runtime.bundle import create, lint, source
from edge_runtime.bundle.onnx_graph import Value
from edge_runtime.errors import BundleError, NotFoundError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize.passes import FLOAT, INTEGER, ONNX, SMALL_WEIGHTS, TFLITE

# What lint calls a format -> the trait of passes, and the ending of files of it.
FORMATS = {"onnx": ONNX, "tflite": TFLITE}
_INTEGER_PRECISIONS = ("int8", "int4")


class ModelFile(NamedTuple):
    """A model file.

    Attributes:
        batch_axis: 0 if the first axis of every input and output is free, else None.
        precision: as `bundle create` would name it.
        traits: what it is, for passes.
    """

    path: Path
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: int | None
    precision: str
    traits: frozenset[str]


def read(path: Path) -> ModelFile:
    """The signature of a model file.

    Raises:
        NotFoundError, BundleError: it is missing, refused by lint, or of no known format.
        UsageError: a format that no pass takes.
    """
    if not path.exists():
        raise NotFoundError("there is no such model", where=str(path))
    artifact = lint.lint_artifact(source.from_path(path.resolve()), path.name)
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


def _specs(values: tuple[Value, ...], path: Path) -> tuple[TensorSpec, ...]:
    for value in values:
        if value.kind != "tensor" or not value.datatype or value.shape is None:
            raise BundleError(
                f"{value.name!r} has no datatype or shape that a device could serve",
                where=str(path),
                expected="dense tensors whose number of dimensions is known",
            )
    return tuple(TensorSpec(one.name, one.datatype, one.shape or ()) for one in values)
