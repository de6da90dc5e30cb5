"""Two answers to one question: how far apart are they?

Law of this file: pure; two arrays in, numbers out. The reference (`want`) is the serving version's
answer. NaN equals NaN in the same place and nothing else; an infinity equals itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.serving import goldens
from edge_runtime.tensors import TensorSpec

Array = np.ndarray[Any, Any]


class Comparison(NamedTuple):
    """One output of one request, compared.

    Attributes:
        alike: same shape and datatype, and NaN and infinities in the same places.
        rows, agreed: top-1: rows along the class axis, and those with the same class; 0, 0: the
            output has no class axis.
        within: every element is within the tolerance.
        max_abs: the largest distance of finite elements; inf: not alike.
        cosine: of the finite elements as one vector, -1 to 1; None: not defined.
    """

    alike: bool
    rows: int
    agreed: int
    within: bool
    max_abs: float
    cosine: float | None


UNLIKE = Comparison(False, 0, 0, False, float("inf"), None)


def compare(got: Array, want: Array, classes: bool, rtol: float, atol: float) -> Comparison:
    """Compare the candidate's output with the serving version's.

    Args:
        classes: the last axis holds one score per class.
        rtol, atol: as of goldens: |got - want| <= atol + rtol |want|.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return UNLIKE
    if want.dtype.kind not in "biuf":
        same = bool((got == want).all())
        return Comparison(same, 0, 0, same, 0.0 if same else float("inf"), None)
    rows, agreed = _top1(got, want) if classes and want.size else (0, 0)
    have, wanted = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(wanted)
    if not _same_oddities(have, wanted, finite):
        return Comparison(False, rows, agreed, False, float("inf"), None)
    x, y = have[finite], wanted[finite]
    with np.errstate(over="ignore"):
        max_abs = float(np.abs(x - y).max(initial=0.0))
    within = goldens.deviation(got, want, rtol, atol) <= 1.0
    return Comparison(True, rows, agreed, within, max_abs, _cosine(x, y))


def _same_oddities(have: Array, wanted: Array, finite: Array) -> bool:
    if bool(finite.all()) and bool(np.isfinite(have).all()):
        return True
    same = (have == wanted) | (np.isnan(have) & np.isnan(wanted))
    return bool((same | (finite & np.isfinite(have))).all())


def _top1(got: Array, want: Array) -> tuple[int, int]:
    """Rows, and those where the best class of one is among the best of the other.

    Quantized models give equal scores; which of two equals comes first says nothing.
    """
    x, y = (array.reshape(-1, array.shape[-1]) for array in (got, want))
    if x.dtype.kind == "f":
        x, y = (np.where(np.isnan(array), -np.inf, array) for array in (x, y))
    each = np.arange(len(x))
    agreed = (x[each, y.argmax(axis=1)] == x.max(axis=1)) | (
        y[each, x.argmax(axis=1)] == y.max(axis=1)
    )
    return len(x), int(agreed.sum())


def _cosine(x: Array, y: Array) -> float | None:
    if not x.size:
        return None
    largest = np.abs(x).max(), np.abs(y).max()
    if not all(largest):
        return 1.0 if not any(largest) else 0.0  # no direction, and so the same one only for both
    x, y = x / largest[0], y / largest[1]  # squares of large numbers are no numbers any more
    value = float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))
    return min(max(value, -1.0), 1.0)


def class_outputs(outputs: tuple[TensorSpec, ...], metadata: bytes) -> frozenset[str]:
    """The outputs whose last axis holds one score per class.

    The manifest says so by labels in `postprocess`; where it does not, floating-point outputs of
    the shape [N, classes] or [classes] are taken for such.
    """
    parameters = msgspec.json.decode(metadata).get("parameters", {})
    post = parameters.get("postprocess") or {}
    if post.get("labels"):
        return frozenset({post.get("output") or outputs[0].name})
    return frozenset(
        spec.name
        for spec in outputs
        if spec.datatype in ("FP16", "FP32", "FP64")
        and len(spec.shape) in (1, 2)
        and spec.shape[-1] >= 2
    )
