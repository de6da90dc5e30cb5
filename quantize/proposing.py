"""What `edge-quantize auto` tries: a recipe made of the model, the data and the target.

Law of this file: pure; a table of candidates by format and backend, nothing measured. What is not
worth trying for a kind of graph is left out with its reason; what wins is decided by measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from quantize.models import ModelFile
from quantize.passes import ONNX
from quantize.recipe import Variant

CLEAN: dict[str, Any] = {"use": "clean"}


class Idea(NamedTuple):
    """A variant to try, for models that have one of these operators (empty: any)."""

    variant: Variant
    operators: frozenset[str] = frozenset()


def _static(**more: Any) -> tuple[dict[str, Any], ...]:
    return (CLEAN, {"use": "static_int8", **more})


_PRODUCTS = frozenset({"MatMul", "Gemm", "LSTM", "GRU", "Attention"})
# By backend. Several ways to read ranges are tried, because none is best for every model.
_ONNX: dict[str, tuple[Idea, ...]] = {
    "onnxruntime": (
        Idea(Variant("fp32", "onnxruntime")),
        Idea(Variant("int8", "onnxruntime", passes=_static())),
        Idea(Variant("int8-percentile", "onnxruntime", passes=_static(method="percentile"))),
        Idea(Variant("int8-mse", "onnxruntime", passes=_static(method="mse"))),
        Idea(
            Variant("int8-dynamic", "onnxruntime", passes=(CLEAN, {"use": "dynamic_int8"})),
            _PRODUCTS,
        ),
    ),
    "openvino": (
        Idea(Variant("fp32-openvino", "openvino")),
        Idea(Variant("int8-openvino", "openvino", passes=_static())),
    ),
}


def variants(source: ModelFile, operators: set[str], backends: Sequence[str]) -> list[Variant]:
    """The variants to try, the float model first.

    Args:
        operators: kinds of nodes in the model. backends: of the target, in its order.
    """
    table = _ONNX if source.format == ONNX else {}
    ideas = [idea for backend in backends for idea in table.get(backend, ())]
    return [idea.variant for idea in ideas if not idea.operators or idea.operators & operators]
