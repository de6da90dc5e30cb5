"""The door to OpenVINO: IR read, written and halved.

Law of this file: packed IR in, packed IR out. It imports the library by the backend's own door
(`edge_runtime.backends.openvino_library`), which keeps it from reporting its use to its maker.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_runtime.backends import openvino, openvino_library
from edge_runtime.bundle import create
from edge_runtime.errors import BackendError, UsageError, did_you_mean
from quantize import foreign

IR = ".ir"  # the ending of a packed file
# What moves values and computes none: quantized are those who read them.
PASSING = {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}


def versions() -> dict[str, str]:
    """What a pass that may meet IR depends on: nothing where it is not installed."""
    try:
        return {"openvino": metadata.version("openvino")}
    except metadata.PackageNotFoundError:
        return {}


def library() -> Any:
    """The module. Raises: UsageError with the remedy."""
    try:
        return openvino_library.library()
    except BackendError as e:
        raise UsageError(e.message, expected=e.expected, remedy=e.remedy) from e


def load(path: Path) -> Any:
    """The ov.Model of a packed file. Raises: BackendError."""
    library()
    return openvino.read(path)


def save(model: Any, out: Path, *, half: bool = False) -> None:
    """Write a model as one packed file; `half`: float weights are stored in 16 bits.

    Raises:
        ModelError: the library cannot write it.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        graph = Path(folder) / f"{out.stem}.xml"
        with foreign.ours("OpenVINO failed to write IR", out):
            library().save_model(model, str(graph), compress_to_fp16=half)
        create.as_artifact(graph, Path(folder)).replace(out)


def quantized(model: Any) -> list[str]:
    """Nodes that work on quantized values."""

    def is_quantized(op: Any) -> bool:
        maker = op.input_value(0).get_node()
        if maker.get_type_name() in PASSING:
            return is_quantized(maker)
        return bool(maker.get_type_name() == "FakeQuantize")

    return [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_input_size() and op.get_type_name() not in PASSING | {"Result", "FakeQuantize"}
        if is_quantized(op)
    ]


def refuse_unknown(names: Sequence[str], model: Any) -> None:
    """Raises: UsageError for a name that no node has."""
    known = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_input_size()]
    for name in names:
        if name not in known:
            raise UsageError(
                f"the model has no node {name!r}",
                where="exclude",
                expected="the name of a layer in the .xml file",
                remedy=did_you_mean(name, known),
            )


def has_four_bits(model: Any) -> bool:
    """Whether some constant is stored in 4 bits."""
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return any(op.get_element_type().get_type_name() in ("i4", "u4") for op in constants)


def note(path: Path, key: str) -> str:
    """What was written into a packed file under that key; empty if nothing. Raises: BackendError"""
    model = load(path)
    return str(model.get_rt_info(key).value) if model.has_rt_info(key) else ""


def to_float16(source: Path, out: Path) -> None:
    """Weights in float16; the arithmetic is what the backend is told. Raises: ModelError."""
    save(load(source), out, half=True)
