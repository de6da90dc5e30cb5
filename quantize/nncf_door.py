"""The door to NNCF: int8 as OpenVINO's makers do it.

Law of this file: the only one that imports nncf. ONNX is written as ONNX and IR as IR;
measured on our CNN both run equally fast. NNCF reports its use to its maker through
openvino_telemetry: that module is kept from loading.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import UsageError
from quantize import datasets, foreign, onnx_door, openvino_door
from quantize.passes import Bench, Feeds

if TYPE_CHECKING:
    from quantize.passes.openvino import NncfInt8, NncfWeights

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
    model, library = _load(source), _library()
    rows = list(_rows(bench.calibration, bench))
    options: dict[str, Any] = {
        "preset": library.QuantizationPreset(how.preset),
        "subset_size": len(rows),
        "fast_bias_correction": how.fast_bias_correction,
    }
    if how.model_type == "transformer":
        options["model_type"] = library.ModelType.TRANSFORMER
    if how.exclude:
        options["ignored_scope"] = library.IgnoredScope(names=list(how.exclude))
    with foreign.ours("NNCF failed to quantize", source):
        made = library.quantize(model, library.Dataset(rows), **options)
    _save(made, out)


def compress_weights(source: Path, out: Path, how: NncfWeights) -> None:
    """Write the model with weights in fewer bits.

    Raises:
        UsageError: the library is not installed, or a node to be ignored does not exist.
        ModelError: it refuses the model.
    """
    model, library = _load(source), _library()
    sign = "SYM" if how.symmetric else "ASYM"
    options: dict[str, Any] = {"mode": library.CompressWeightsMode[f"INT{how.bits}_{sign}"]}
    if how.bits == 4:
        options |= {"group_size": how.group, "ratio": how.share}
    if how.exclude:
        options["ignored_scope"] = library.IgnoredScope(names=list(how.exclude))
    with foreign.ours("NNCF failed to compress the weights", source):
        made = library.compress_weights(model, **options)
    _save(made, out)


def _load(path: Path) -> Any:
    """The model as NNCF takes it. OpenVINO comes in first: NNCF imports it as it finds it."""
    return openvino_door.load(path) if path.suffix == openvino_door.IR else onnx_door.load(path)


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
