"""From what passed to a bundle: variants, goldens, card, provenance.

Law of this file: it chooses and records; it judges nothing again. Goldens are samples that the
variants were judged on: some ordinary, some hard. Their expected answers are each variant's own,
with the tolerance that `bundle create` derives, and the packed bundle is served once to prove it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import edge_runtime
from edge_runtime.backends import backend
from edge_runtime.bundle import archive, create
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Postprocess
from quantize import served, sketches
from quantize.datasets import Dataset
from quantize.recipe import Recipe
from quantize.results import Evaluated, Outcome

Array = np.ndarray[Any, Any]


def choose_goldens(
    answers: Array, labels: Array | None, count: int, groups: Array | None = None
) -> list[int]:
    """Indices of samples for goldens: half the surest, half the hardest, of many classes.

    Args:
        answers: the float model's main output [samples, ...]. A sample is hard when its two largest
            values lie near each other: there a small error shows first.
        groups: [samples], see datasets.Dataset: as long as there are others, one sample of each.
    """
    flat = answers.reshape(len(answers), -1).astype(np.float64)
    if flat.shape[1] < 2:
        return [int(i) for i in np.linspace(0, len(flat) - 1, min(count, len(flat)))]
    top = np.sort(flat, axis=1)[:, -2:]
    order = np.argsort(top[:, 1] - top[:, 0], kind="stable")
    hard = _one_of_each(order, groups)[: (count + 1) // 2]
    classes = flat.argmax(axis=1)
    if labels is not None and labels.dtype.kind in "biu" and labels.size == len(flat):
        classes = labels.reshape(-1)
    rest = [int(index) for index in order[::-1] if index not in hard]  # the surest first
    firsts = {int(classes[index]): index for index in reversed(rest)}  # the surest of each class
    sure = sorted(rest, key=lambda index: firsts[int(classes[index])] != index)
    return [int(index) for index in (*hard, *_one_of_each(sure, groups, hard))][:count]


def _one_of_each(
    order: Sequence[int] | Array, groups: Array | None, taken: Sequence[int] | Array = ()
) -> list[int]:
    """The indices in their order, but those whose group came before (or was taken) at the end."""
    if groups is None:
        return list(order)
    known = {int(groups[index]) for index in taken}
    first: list[int] = []
    later: list[int] = []
    for index in order:
        (later if int(groups[index]) in known else first).append(index)
        known.add(int(groups[index]))
    return [*first, *later]


def pack(
    recipe: Recipe,
    outcome: Outcome,
    data: Dataset,
    answers: Mapping[str, Array],
    main_output: str,
    out: Path,
) -> create.Created:
    """Write the bundle of everything that was shipped, the float model first.

    Args:
        answers: the reference's outputs for `data`, [samples, ...] by name.

    Raises:
        ModelError: a backend fails on a golden, or a daemon does not serve a packed variant.
        StorageError: the bundle cannot be written.
    """
    fit = _in_order(outcome)
    count = recipe.pack.goldens
    chosen = np.array(
        choose_goldens(answers[main_output], data.labels, count, data.groups), dtype=int
    )
    samples = out.with_name(f".{out.name}.goldens.npz")
    np.savez(samples, **{name: array[chosen] for name, array in data.inputs.items()})
    options = create.Options(
        name=recipe.name,
        version=recipe.version,
        label=recipe.label,
        goldens=len(chosen),
        samples=samples,
        postprocess=Postprocess(output=main_output, labels=recipe.pack.labels)
        if recipe.pack.labels
        else None,
        card=card(outcome) | {"drift_baseline": sketches.baseline(data.inputs, dict(answers))},
        calibration=outcome.calibration,
        provenance=provenance(outcome),
    )
    given = [create.Given(one.name, one.backend, one.precision, one.options) for one in fit]
    draft = out.with_name(f".{out.name}.draft")
    try:
        made = create.create([Path(one.path) for one in fit], options, draft, _load, given=given)
        prove(draft)
        draft.replace(out)
        return made
    finally:
        samples.unlink(missing_ok=True)
        draft.unlink(missing_ok=True)


def prove(path: Path) -> None:
    """Serve every variant of the bundle once, in a daemon that compares its goldens.

    Raises:
        EdgeError: a variant is not served as it was recorded; names it.
    """
    with archive.open_bundle(path) as bundle, served.daemon() as daemon:
        daemon.prove(bundle)


def _in_order(outcome: Outcome) -> Sequence[Evaluated]:
    """The float model first: its answers are the goldens' own; then the fastest."""
    reference = outcome.of(outcome.reference)
    return [reference, *(one for one in outcome.shipped if one.name != reference.name)]


def _load(variant: manifests.Variant, path: Path) -> create.Run:
    return backend(variant.backend).load(path, variant.options).run


def card(outcome: Outcome) -> dict[str, Any]:
    """What was measured, where: shipped and refused, with reasons. Plain values."""
    return {
        "metric": outcome.metric,
        "samples": outcome.samples,
        "groups": outcome.groups,
        "confidence": outcome.confidence,
        "drop_max": outcome.drop_max,
        "machine": outcome.machine,
        "variants": {one.name: _figures(one) for one in outcome.evaluated if not one.refusal},
        "refused": {one.name: one.refusal for one in outcome.evaluated if one.refusal},
        "findings": [msgspec.to_builtins(one) for one in outcome.findings],
    }


def _figures(one: Evaluated) -> dict[str, Any]:
    assert one.score is not None and one.against is not None
    return {
        "backend": f"{one.backend} {one.backend_version}",
        "score": msgspec.to_builtins(one.score),
        "loss": msgspec.to_builtins(one.against),
        "p50_ms": one.p50_ms,
        "p95_ms": one.p95_ms,
        "speedup": one.speedup,
        "size_bytes": one.size_bytes,
        "packed_bytes": one.packed_bytes,
        "memory_bytes": one.memory_bytes,
        "macs": one.macs,
        "passes": list(one.steps),
        "notes": list(one.notes),
    }


def provenance(outcome: Outcome) -> dict[str, Any]:
    """Where the bundle comes from: source, recipe, library versions."""
    return {
        "tool": f"edge-quantize {edge_runtime.__version__}",
        "source_sha256": outcome.source_sha256,
        "recipe": outcome.recipe,  # of a torch source it also says what was exported, and by what
        "libraries": outcome.machine.get("libraries", {}),
    }
