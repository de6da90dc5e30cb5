"""What `edge-quantize auto` tries: a recipe made of the model, the data and the target.

Law of this file: pure; a table of candidates by format and backend, nothing measured. What is not
worth trying for a kind of graph is left out with its reason; what wins is decided by measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from quantize import causes
from quantize.models import ModelFile
from quantize.passes import ONNX, OPENVINO, TFLITE
from quantize.recipe import Variant

CLEAN: dict[str, Any] = {"use": "clean"}


class Idea(NamedTuple):
    """A variant to try.

    `operators`: only for models that have one of these (empty: any). `needs`: a module that must be
    installed beside what the extra `quantize` brings. `names`: (option, group): the last pass's
    option names the nodes of this group of `Groups`; only for models that have some. `features`:
    only on processors with one of these (empty: any).
    """

    variant: Variant
    operators: frozenset[str] = frozenset()
    needs: str = ""
    names: tuple[Literal["exclude", "four_bits"], Literal["thin", "connected"]] | None = None
    features: frozenset[str] = frozenset()


class Groups(NamedTuple):
    """Nodes by name.

    Attributes:
        thin: those that integers make slower. connected: fully connected ones of a .tflite model,
            which keep their speed with weights of 4 bits.
    """

    thin: tuple[str, ...] = ()
    connected: tuple[str, ...] = ()


_EDGE = "ai_edge_quantizer"


def _static(**more: Any) -> tuple[dict[str, Any], ...]:
    return (CLEAN, {"use": "static_int8", **more})


_THIN: Any = ("exclude", "thin")
# ONNX's names and OpenVINO's.
_PRODUCTS = frozenset({"MatMul", "Gemm", "LSTM", "GRU", "Attention", "LSTMSequence", "GRUSequence"})


def _by_openvino(*before: dict[str, Any]) -> tuple[Idea, ...]:
    """Of either format; NNCF fails on ONNX whose weights are nodes, which `clean` makes weights."""
    int8, controlled = ((*before, {"use": use}) for use in ("nncf_int8", "nncf_accuracy"))
    return (
        Idea(Variant("bf16-openvino", "openvino", {"precision": "bf16"}), features=causes.BFLOAT16),
        Idea(Variant("int8-nncf", "openvino", passes=int8), needs="nncf"),
        # The same again where nothing is lost; where something is, it takes its time.
        Idea(Variant("int8-controlled", "openvino", passes=controlled), needs="nncf"),
    )


# By backend. Several ways to read ranges are tried, because none is best for every model.
_ONNX: dict[str, tuple[Idea, ...]] = {
    "onnxruntime": (
        Idea(Variant("fp32", "onnxruntime")),
        Idea(Variant("int8", "onnxruntime", passes=_static())),
        Idea(Variant("int8-mixed", "onnxruntime", passes=_static()), names=_THIN),
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
        *_by_openvino(CLEAN),
    ),
}
_IR: dict[str, tuple[Idea, ...]] = {
    "openvino": (
        Idea(Variant("fp32-openvino", "openvino")),
        Idea(Variant("fp16-openvino", "openvino", passes=({"use": "float16"},))),
        *_by_openvino(),
        Idea(
            Variant("weights-nncf", "openvino", passes=({"use": "nncf_weights"},)),
            _PRODUCTS,
            "nncf",
        ),
    ),
}
# OpenVINO reads .tflite too, but under the tensors' own names, not the signature's: that is no
# variant of the same model.
_TFLITE: dict[str, tuple[Idea, ...]] = {
    "litert": (
        Idea(Variant("fp32-litert", "litert")),
        Idea(Variant("int8-litert", "litert", passes=({"use": "tflite_int8"},)), needs=_EDGE),
        Idea(
            Variant("int8w4-litert", "litert", passes=({"use": "tflite_int8"},)),
            needs=_EDGE,
            names=("four_bits", "connected"),
        ),
        Idea(Variant("dynamic-litert", "litert", passes=({"use": "tflite_weights"},)), needs=_EDGE),
        Idea(Variant("fp16-litert", "litert", passes=({"use": "tflite_float16"},)), needs=_EDGE),
    ),
}
_BY_FORMAT = {ONNX: _ONNX, TFLITE: _TFLITE, OPENVINO: _IR}


NO_GROUPS = Groups()


class Proposal(NamedTuple):
    """What to try, and what would be tried if it were installed."""

    variants: tuple[Variant, ...]
    missing: tuple[str, ...]


def propose(
    source: ModelFile,
    operators: set[str],
    backends: Sequence[str],
    is_here: Callable[[str], bool],
    groups: Groups = NO_GROUPS,
    features: Collection[str] = (),
) -> Proposal:
    """The variants to try, the float model first.

    Args:
        operators: kinds of nodes in the model. backends: of the target, in its order. is_here:
            whether a module can be imported. features: instruction sets of the processor here.
    """
    ideas = [
        idea
        for backend in backends
        for idea in _BY_FORMAT.get(source.on(backend).format, {}).get(backend, ())
        if not idea.operators or idea.operators & operators
        if not idea.names or getattr(groups, idea.names[1])
        if not idea.features or idea.features & set(features)
    ]
    fit = [_variant(idea, groups) for idea in ideas if not idea.needs or is_here(idea.needs)]
    missing = {idea.needs for idea in ideas if idea.needs and not is_here(idea.needs)}
    return Proposal(tuple(fit), tuple(sorted(missing)))


def _variant(idea: Idea, groups: Groups) -> Variant:
    if idea.names is None:
        return idea.variant
    option, group = idea.names
    *before, last = idea.variant.passes
    passes = (*before, {**last, option: list(getattr(groups, group))})
    return msgspec.structs.replace(idea.variant, passes=passes)
