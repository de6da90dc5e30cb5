"""Which output is judged, by which metric, against which labels: settled before any work.

Law of this file: pure; the model's outputs, the recipe's wishes, the labels in; one decision out.
A metric that cannot tell right from wrong for this output (the largest of one value, a column of
one-hot labels) is refused or replaced here, because it would call every variant right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.errors import ModelError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import meaning, scores
from quantize.meaning import Look
from quantize.recipe import Evaluation
from quantize.scores import Metric

Array = np.ndarray[Any, Any]

CLASSES, MANY_LABELS, VALUES = "classes", "many-labels", "values"
_WANTS = {"top1": CLASSES, "topk": CLASSES, "f1": MANY_LABELS, "map": MANY_LABELS}
_WANTS |= {"mse": VALUES, "psnr": VALUES, "nmse": VALUES}
_FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
_STATE = "state evaluation.metric (and evaluation.output), or leave the labels out"


class Judged(NamedTuple):
    """What is asked of every variant.

    Attributes:
        labels: as the metric reads them: classes [samples] as integers, or values [samples, n].
        note: what was chosen that the user did not say; empty if nothing.
    """

    output: str
    name: str
    metric: Metric
    labels: Array | None
    note: str = ""


def judged(
    evaluation: Evaluation,
    outputs: Sequence[TensorSpec],
    labels: Array | None,
    function: Callable[..., Array] | None = None,
    where: str = "",
    look: Callable[[str], Look] | None = None,
) -> Judged:
    """The decision for a model with these outputs and samples with these labels.

    Args:
        where: the data, for messages. look: shows what the float model answers in an output; asked
            only where labels do not say what it holds.

    Raises:
        UsageError, ModelError: an unknown output, or labels that do not fit it or the metric.
    """
    spec = _output(evaluation.output, outputs)
    notes = []
    if spec is not outputs[0] and not evaluation.output:
        notes.append(
            f"judged by output {spec.name!r}: the first, {outputs[0].name!r}, holds no floats"
        )
    if evaluation.metric == "auto":
        if labels is None:
            name, note = unlabelled(spec, look)
            notes += [note] if note else []
        else:
            name = _labelled(spec, labels, where)
    else:
        name = evaluation.metric
    metric = scores.metric(name, evaluation.k, function)
    if labels is None and metric.needs_labels:
        raise ModelError(
            f"metric {name!r} needs labels, and the data have none",
            where=where,
            remedy="give labels (`y` in the .npz), or evaluation.metric: agreement",
        )
    others = [repr(one.name) for one in outputs if one is not spec]
    if others:
        notes.append(f"only output {spec.name!r} is judged, not {', '.join(others)}")
    if labels is not None:
        _check_numbers(labels, where)
        labels = _as_wanted(labels, _WANTS.get(name, ""), spec, where)
    if name == "topk":
        _can_miss(evaluation.k, spec)
    return Judged(spec.name, name, metric, labels, "; ".join(notes))


def _can_miss(k: int, spec: TensorSpec) -> None:
    """Raises: UsageError where every class is among the k largest, so that all are right."""
    count = columns(spec)
    if spec.datatype in _FLOATS and count is not None and k >= count:
        raise UsageError(
            f"k is {k}, output {spec.name!r} has {count} classes: every answer would be right",
            where="evaluation.k",
            expected=f"less than {count}; 1 is the metric top1",
        )


def _output(named: str, outputs: Sequence[TensorSpec]) -> TensorSpec:
    """The output that is named; else the first of floats: a class number says less than scores."""
    for spec in outputs:
        if named and spec.name == named:
            return spec
    if named:
        raise ModelError(
            f"the model has no output {named!r}",
            where="evaluation.output",
            expected=", ".join(spec.name for spec in outputs),
        )
    return next((spec for spec in outputs if spec.datatype in _FLOATS), outputs[0])


def columns(spec: TensorSpec) -> int | None:
    """Values of a sample that lie along one axis; None: along several, or nobody knows how many."""
    inner = [size for size in spec.shape[1:] if size != 1]
    if len(inner) > 1 or (inner and inner[0] < 0):
        return None
    return math.prod(inner)


def _size(spec: TensorSpec) -> int | None:
    """Values of a sample; None: nobody knows."""
    return math.prod(spec.shape[1:]) if min(spec.shape[1:], default=1) > 0 else None


def unlabelled(spec: TensorSpec, look: Callable[[str], Look] | None) -> tuple[str, str]:
    """The metric against the float model, and a note where another might be meant."""
    count = columns(spec)
    if spec.datatype not in _FLOATS:
        return "agreement", ""
    if count is None and len(spec.shape) != 2:
        return "cosine", ""  # a field of values: where its largest lies says little
    if count == 1:
        return "nmse", ""
    seen = meaning.meaning(spec.name, look(spec.name) if look else Look("", None))
    name, other = _BY_MEANING[seen.kind], _BY_MEANING[_OTHER[seen.kind]]
    if seen.is_sure and seen.kind == meaning.SCORES:
        return name, ""
    return name, (
        f"output {spec.name!r} was taken for {seen.kind} ({seen.why}) and is judged by {name};"
        f" if it is {_OTHER[seen.kind]}, the metric is {other}"
    )


_BY_MEANING = {meaning.SCORES: "agreement", meaning.EMBEDDING: "cosine"}
_OTHER = {meaning.SCORES: meaning.EMBEDDING, meaning.EMBEDDING: meaning.SCORES}


def _labelled(spec: TensorSpec, labels: Array, where: str) -> str:
    count, kind = columns(spec), _kind(labels)
    one_each = labels.size == len(labels)
    if spec.datatype not in _FLOATS or (count != 1 and len(spec.shape) == 2 and one_each):
        return "top1"
    if count == 1 and one_each:
        return "f1" if np.isin(labels, (0, 1)).all() else "nmse"
    if kind == CLASSES and count not in (None, 1):
        return "top1"
    if labels.size == len(labels) * (_size(spec) or 0):
        return "f1" if kind == MANY_LABELS else "nmse"
    raise UsageError(
        f"labels {list(labels.shape)} {labels.dtype} do not say which metric judges output"
        f" {spec.name!r} {list(spec.shape)}",
        where=where,
        remedy=_STATE,
    )


def _kind(labels: Array) -> str:
    """What labels look like: one class a sample (a number, or one-hot), 0/1 by column, values."""
    if labels.size == len(labels):
        return CLASSES if _whole(labels) else VALUES
    if labels.dtype.kind in "biuf" and np.isin(labels, (0, 1)).all():
        return CLASSES if _one_hot(labels) else MANY_LABELS
    return VALUES


def _whole(labels: Array) -> bool:
    return labels.dtype.kind in "biu" or (
        labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
    )


def _one_hot(labels: Array) -> bool:
    rows = labels.reshape(len(labels), -1)
    return bool(np.isin(rows, (0, 1)).all() and (rows.sum(axis=1) == 1).all())


def _check_numbers(labels: Array, where: str) -> None:
    """Raises: UsageError for labels that are missing here and there: nothing equals them."""
    bad = 0
    if labels.dtype.kind == "f":
        bad = int((~np.isfinite(labels).reshape(len(labels), -1).all(axis=1)).sum())
    if bad:
        raise UsageError(
            f"labels hold NaN or infinity for {bad} of {len(labels)} samples",
            where=where,
            expected="a label for every sample; leave the others out",
        )


def _as_wanted(labels: Array, wanted: str, spec: TensorSpec, where: str) -> Array:
    if labels.dtype.kind not in "biuf" and wanted:
        raise UsageError(
            f"labels have dtype {labels.dtype}",
            where=where,
            expected="numbers; classes count from 0 in the order of the model's output",
        )
    if wanted == CLASSES:
        return _as_classes(labels, spec, where)
    count = _size(spec)
    if wanted and count is not None and labels.size != len(labels) * count:
        raise UsageError(
            f"labels {list(labels.shape)} are compared value by value with output {spec.name!r}"
            f" {list(spec.shape)}",
            where=where,
            expected=f"{count} values for each sample",
            remedy=_STATE,
        )
    return labels


def _as_classes(labels: Array, spec: TensorSpec, where: str) -> Array:
    """Integers [samples]; one-hot rows are read as what they say."""
    count = columns(spec)
    if labels.size != len(labels):
        if not _one_hot(labels):
            raise UsageError(
                f"labels {list(labels.shape)} are not one class a sample",
                where=where,
                expected="integers [samples], or one-hot rows",
                remedy=_STATE,
            )
        labels = labels.reshape(len(labels), -1).argmax(axis=1)
    if not _whole(labels):
        raise UsageError(
            f"labels are no classes: {labels.reshape(-1)[0]}", where=where, remedy=_STATE
        )
    found = labels.reshape(-1).astype(np.int64)
    if spec.datatype in _FLOATS and count == 1:
        raise UsageError(
            f"output {spec.name!r} has one value a sample: the largest of one is always right",
            where="evaluation.metric",
            expected="f1 (labels 0 and 1), or nmse (values)",
        )
    last = found.max() if count is None or spec.datatype not in _FLOATS else count - 1
    if found.min() < 0 or found.max() > last:
        raise UsageError(
            f"labels reach from {found.min()} to {found.max()}, output {spec.name!r} has {count}"
            " classes",
            where=where,
            expected=f"0 to {last}: classes count from 0",
        )
    return found
