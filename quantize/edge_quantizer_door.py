"""The door to ai-edge-quantizer: .tflite in, .tflite out.

Law of this file: the only one that imports ai_edge_quantizer. Inputs and outputs stay floats, so
that variants of a model can stand for each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import UsageError
from quantize import foreign
from quantize.passes import Bench

if TYPE_CHECKING:
    from quantize.passes.tflite import TfliteInt8, TfliteWeights

Array = np.ndarray[Any, Any]

# The signature that every converter writes for a model of one function.
SIGNATURE = "serving_default"
_STATIC = {8: "static_wi8_ai8", 16: "static_wi8_ai16"}
_WEIGHTS = {
    ("float", 8): "weight_only_wi8_afp32",
    ("float", 4): "weight_only_wi4_afp32",
    ("dynamic", 8): "dynamic_wi8_afp32",
    ("dynamic", 4): "dynamic_wi4_afp32",
}


def version() -> str:
    _library()
    from importlib import metadata

    return metadata.version("ai-edge-quantizer")


def quantize_static(source: Path, out: Path, how: TfliteInt8, bench: Bench) -> None:
    """Weights in 8 bits, activations in 8 or 16, ranges from calibration.

    Raises:
        UsageError: the library is not installed. ModelError: it refuses the model.
    """
    library, count = _library(), len(next(iter(bench.calibration.values())))
    samples = [
        {name: _row(array, index) for name, array in bench.calibration.items()}
        for index in range(min(count, how.samples) if how.samples else count)
    ]
    with foreign.ours("ai-edge-quantizer failed", source):
        made = _with_float_edges(library, source, _STATIC[how.activations])
        _write(made, made.calibrate({SIGNATURE: samples}), out)


def quantize_weights(source: Path, out: Path, how: TfliteWeights) -> None:
    """Weights in 8 or 4 bits; activations float, or quantized at each run.

    Raises:
        UsageError: the library is not installed. ModelError: it refuses the model.
    """
    library = _library()
    with foreign.ours("ai-edge-quantizer failed", source):
        made = _with_float_edges(library, source, _WEIGHTS[how.compute, how.bits])
        _write(made, None, out)


def _row(array: Array, index: int) -> Array:
    return array[index : index + 1]


def _with_float_edges(library: Any, source: Path, name: str) -> Any:
    made = library.quantizer.Quantizer(str(source), getattr(library.recipe, name)())
    kinds, skip = library.qtyping.TFLOperationName, library.algorithm_manager.AlgorithmName
    for edge in (kinds.INPUT, kinds.OUTPUT):
        made.update_quantization_recipe(".*", edge, algorithm_key=skip.NO_QUANTIZE)
    return made


def _write(made: Any, ranges: Any, out: Path) -> None:
    out.unlink(missing_ok=True)
    made.quantize(ranges).export_model(str(out))


def _library() -> Any:
    try:
        with foreign.quiet():
            import ai_edge_quantizer
            from ai_edge_quantizer import (  # noqa: F401 - loads what the package itself does not
                algorithm_manager,
                qtyping,
                quantizer,
                recipe,
            )
    except (ImportError, OSError) as e:
        raise UsageError(
            f"ai-edge-quantizer does not import: {e}",
            remedy="pip install 'edge-runtime[quantize-litert]'",
        ) from e
    return ai_edge_quantizer
