"""Samples: arrays by input name, with labels or without, and which of them are for what.

Law of this file: it decides which samples fit and which are for what; `sources` reads them, and
what a pixel becomes is said by the recipe. Every sample has the first axis to itself; a model's
batch axis is not assumed. Selection is by seed, so that the same recipe sees the same samples. No
sample both calibrates and judges, nor do two of one group (blank ones aside: see `split`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import UsageError
from edge_runtime.tensors import TensorSpec
from quantize import checks, clusters, rows, sources
from quantize.recipe import Data
from quantize.results import Finding
from quantize.rows import Rows, Samples
from quantize.sources import GROUPS, Found

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


class Facts(NamedTuple):
    """What one look at every sample says, by sample.

    Attributes:
        digests: [samples, 2] 64-bit integers, of the bytes of all inputs.
        ranges: per input name [samples, 2]: smallest and largest value, where they are numbers.
    """

    digests: Array
    ranges: dict[str, Array]


@dataclass(frozen=True)
class Dataset:
    """Samples with their labels.

    Attributes:
        inputs: per input name [samples, ...]: arrays, or rows that are read when asked for.
        labels: [samples] or [samples, ...]; None: there are none.
        where: what it was read from, for messages.
        notes: what a reader should know of how it was read.
        groups: [samples] whole numbers; samples with the same one belong together (views of one
            photograph, windows of one recording). None: every sample is one of its own.
        facts: see `known`; None: nobody looked yet.
    """

    inputs: Mapping[str, Samples]
    labels: Array | None
    where: str
    notes: tuple[str, ...] = ()
    groups: Array | None = None
    facts: Facts | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, chosen: Array) -> Dataset:
        """The samples at these indices."""
        facts = self.facts and Facts(
            self.facts.digests[chosen],
            {name: one[chosen] for name, one in self.facts.ranges.items()},
        )
        return replace(
            self,
            inputs={name: rows.taken(array, chosen) for name, array in self.inputs.items()},
            labels=None if self.labels is None else self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            facts=facts,
        )

    def labelled(self, labels: Array | None) -> Dataset:
        """The same samples with other labels."""
        return replace(self, labels=labels)

    @property
    def feeds(self) -> Feeds:
        """All samples in memory: what calibrates is read over and over."""
        return {name: np.asarray(array[:]) for name, array in self.inputs.items()}

    @property
    def units(self) -> int:
        """How many groups, or samples where there are none: what a statement is made of."""
        return len(self) if self.groups is None else clusters.count(self.groups)


class Split(NamedTuple):
    """What calibrates and what judges; no sample is in both.

    `findings`: samples that were, and samples that are there more than once. `spare`: of a
    calibration set of its own what is not needed; evaluation may hold copies of it.
    """

    calibration: Dataset
    evaluation: Dataset
    notes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    spare: Dataset | None = None


def load(data: Data, specs: tuple[TensorSpec, ...], path: str = "") -> Dataset:
    """The samples that a recipe names, fitted to the model's inputs.

    Args:
        specs: the model's inputs; a sample is what one of them is without its batch axis, or with
            it when that is 1. Where the first axis is fixed to more (a state), a sample is all; of
            an input without axes it is one value, and a single value is that of all samples.
        path: another place than `data.path` (the calibration set).

    Raises:
        NotFoundError, UsageError: there are none, or they do not fit.
    """
    where = path or data.path
    return _fitted(sources.read(where, data, specs), specs, where)


def first(data: Data, names: Sequence[str], count: int) -> dict[str, Array]:
    """The first samples as they lie there, for a model whose inputs nobody knows yet.

    Args:
        names: of the inputs. Wide floats become FP32; of images the recipe says the size.

    Raises:
        NotFoundError, UsageError: there are none.
    """
    unknown = tuple(TensorSpec(name, "FP32", (-1, -1, -1, -1)) for name in names)
    found = sources.read(data.path, data, unknown).inputs
    samples = {
        name: np.asarray(one[np.arange(min(count, len(one)))]) for name, one in found.items()
    }
    return {
        name: one.astype(np.float32) if one.dtype == np.float64 else one
        for name, one in samples.items()
    }


def split(
    whole: Dataset,
    calibration: Dataset | None,
    samples: int,
    seed: int,
    judged: int,
    judge_seed: int,
) -> Split:
    """Calibration samples and evaluation samples that have nothing in common.

    Args:
        calibration: its own set; None: `samples` of `whole`, which evaluation leaves out. Groups
            are not divided. Samples of `whole` that calibrate all the same, exact copies, leave it:
            but blank ones, and not where half of all are copies, as of a few switches' states.
        judged: at most so many are evaluated; 0: all that are left.

    Raises:
        UsageError: too few samples.
    """
    notes: list[str] = []
    spare = None
    if calibration is None:
        ours, rest = _parted(whole, samples, seed, notes)
    else:
        if len(calibration) < samples:
            notes.append(f"calibrated with {len(calibration)} samples: all there are")
        ours, rest = some(calibration, samples, seed), whole
        if samples and len(calibration) > samples:
            spare = calibration.take(np.sort(_shuffled(len(calibration), seed)[samples:]))
    ours = known(replace(ours, inputs=ours.feeds))
    rest, findings = _apart(ours, known(some(rest, judged, judge_seed)))
    enough(rest)
    if rest.groups is not None:
        notes.append(f"{len(rest)} samples in {rest.units} groups judge")
    return Split(ours, rest, tuple(notes), (*findings, *repeated(rest)), spare)


def some(data: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` samples in their order, chosen by chance; 0: all."""
    if not count or count >= len(data):
        return data
    return data.take(np.sort(_shuffled(len(data), seed)[:count]))


def _shuffled(count: int, seed: int) -> Array:
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)


def _parted(whole: Dataset, samples: int, seed: int, notes: list[str]) -> tuple[Dataset, Dataset]:
    """A third at most for calibration, most for judging; whole groups."""
    enough(whole)
    count = min(samples, max(len(whole) // 3, 1))
    if whole.groups is None:
        order = _shuffled(len(whole), seed)
        mine, rest = np.sort(order[:count]), np.sort(order[count:])
    else:
        mine, rest = _whole_groups(whole.groups, count, seed)
    if len(mine) < samples:
        notes.append(f"calibrated with {len(mine)} samples: a third of the {len(whole)} there are")
    return whole.take(mine), whole.take(rest)


def _whole_groups(groups: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Indices of samples of chance groups, one at least, up to `count`; and of the others."""
    names = np.unique(groups)
    names = names[_shuffled(len(names), seed)]
    sizes = np.cumsum([(groups == name).sum() for name in names])
    first = names[: max(int((sizes <= count).sum()), 1)]
    return np.flatnonzero(np.isin(groups, first)), np.flatnonzero(~np.isin(groups, first))


def _apart(calibration: Dataset, evaluation: Dataset) -> tuple[Dataset, list[Finding]]:
    """Evaluation without samples that calibrate, nor others of their groups; and how many left."""
    assert calibration.facts is not None and evaluation.facts is not None
    digests = evaluation.facts.digests[:, 0]
    same = np.isin(digests, calibration.facts.digests[:, 0]) & ~_blank(evaluation)
    if 2 * len(np.unique(digests)) <= len(digests):
        same &= False  # of a few switches and steps there are only so many different samples
    groups = evaluation.groups
    gone = same if groups is None else np.isin(groups, groups[same])
    findings = checks.overlap(int(same.sum()), int(gone.sum()), len(evaluation))
    if gone.all():
        raise UsageError(
            findings[0].text,
            where=evaluation.where,
            expected="samples to judge by that no quantizer has seen",
            remedy="give other data to calibrate with, or none: then a part of these does",
        )
    return (evaluation.take(np.flatnonzero(~gone)) if gone.any() else evaluation), findings


def _blank(data: Dataset) -> Array:
    """Samples [samples] all of whose values are alike: silence, a covered lens; nobody's copy."""
    assert data.facts is not None
    wide = [name for name, one in data.inputs.items() if math.prod(one.shape[1:]) > 1]
    blank = np.full(len(data), bool(wide))
    for name in wide:
        ranges = data.facts.ranges.get(name)
        blank &= False if ranges is None else ranges[:, 0] == ranges[:, 1]
    return blank


def enough(data: Dataset) -> None:
    """Raises: UsageError where nothing can be said of other samples than these."""
    if data.units < 2:
        plural = "" if len(data) == 1 else "s"
        what = f"{len(data)} sample{plural} to judge by" + (
            "" if data.groups is None else f" in {data.units} group"
        )
        raise UsageError(
            what,
            where=data.where,
            expected="two at the very least" + ("" if data.groups is None else ", of two groups"),
        )


def repeated(data: Dataset) -> list[Finding]:
    """Samples that are there more than once; those of one group count as one anyway."""
    facts = known(data).facts
    assert facts is not None
    _, firsts = np.unique(facts.digests[:, 0], return_inverse=True)
    firsts = firsts.reshape(-1)
    pairs = firsts if data.groups is None else np.stack([firsts, data.groups], axis=1)
    copies = len(np.unique(pairs, axis=0)) if data.groups is not None else len(firsts)
    return checks.duplicates(copies - len(np.unique(firsts)), len(data))


def known(data: Dataset) -> Dataset:
    """The data set with its facts; every sample is read for them, once."""
    if data.facts is not None:
        return data
    ranges: dict[str, Array] = {}
    digests = [hashlib.blake2b(digest_size=16) for _ in range(len(data))]
    for name, array in sorted(data.inputs.items()):
        place, found = 0, []
        for piece in rows.pieces(array):
            flat = np.ascontiguousarray(piece).reshape(len(piece), -1)
            for one in flat:
                digests[place].update(one.data)
                place += 1
            if flat.dtype.kind in "biuf" and flat.size:
                found.append(np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1))
        if found:
            ranges[name] = np.concatenate(found).astype(np.float64)
    whole = b"".join(one.digest() for one in digests)
    return replace(data, facts=Facts(np.frombuffer(whole, "<u8").reshape(-1, 2), ranges))


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What a manifest says of the calibration set: count, sha256, and range by input."""
    facts = known(data).facts
    assert facts is not None
    digest = hashlib.sha256()
    for name, array in sorted(data.inputs.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
    digest.update(facts.digests.tobytes())
    ranges = {
        name: [float(one[:, 0].min()), float(one[:, 1].max())]
        for name, one in facts.ranges.items()
        if len(one)
    }
    groups = {} if data.groups is None else {"groups": data.units}
    return {"samples": len(data), "sha256": digest.hexdigest(), "range": ranges} | groups


def batches(
    inputs: Mapping[str, Samples], count: int, specs: tuple[TensorSpec, ...]
) -> Iterator[Feeds]:
    """Consecutive samples, at most `count` at a time, as a model with these inputs takes them."""
    samples = len(next(iter(inputs.values())))
    for first in range(0, samples, count):
        part = {name: np.asarray(one[first : first + count]) for name, one in inputs.items()}
        yield fed(part, specs)


def fed(part: Feeds, specs: tuple[TensorSpec, ...]) -> Feeds:
    """Samples as a run takes them: without the samples' axis where an input has none (a state)."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    return {
        name: array[0, ...] if array.ndim == ranks.get(name, array.ndim) + 1 else array
        for name, array in part.items()
    }


# --- whether they fit -----------------------------------------------------------------------------


def _fitted(found: Found, specs: tuple[TensorSpec, ...], where: str) -> Dataset:
    """As the model wants them: [samples, *shape without the batch axis], right datatype.

    Integers become the model's float exactly where the model wants floats; no other conversion is
    made, and nothing is scaled: a scale that nobody stated is how answers become wrong.
    """
    given = _repeated_values(found.inputs, specs)
    every: list[tuple[str, Samples | None]] = [(repr(name), one) for name, one in given.items()]
    every += [("labels", found.labels), ("groups", found.groups)]
    counts = [(name, len(one) if one.shape else 0) for name, one in every if one is not None]
    if len({count for _, count in counts}) != 1 or not counts[0][1]:
        raise UsageError(
            "samples: " + ", ".join(f"{name} {count}" for name, count in counts),
            where=where,
            expected="the same number, at least one, in all",
        )
    inputs = {spec.name: _fit(given[spec.name], spec, where) for spec in specs}
    notes = tuple(
        _unscaled(name, given[name].dtype, one)
        for name, one in inputs.items()
        if given[name].dtype.kind in "iu" and one.dtype.kind == "f"
    )
    groups = None if found.groups is None else _codes(found.groups, where)
    return Dataset(inputs, found.labels, where, (*found.notes, *notes), groups)


def _unscaled(name: str, given: Any, one: Samples) -> str:
    few = rows.spread(one, 100) if isinstance(one, Rows) else np.asarray(one)
    return (
        f"{name!r} is {given} and was given to the model as {one.dtype} of {few.min():g} to"
        f" {few.max():g}; nothing was scaled"
    )


def _repeated_values(
    given: dict[str, Samples], specs: tuple[TensorSpec, ...]
) -> dict[str, Samples]:
    """A single value for an input without axes is the value of every sample."""
    lone = [spec.name for spec in specs if not spec.shape and not given[spec.name].shape]
    count = max((len(one) for one in given.values() if one.shape), default=1)
    wide: dict[str, Samples] = {name: np.repeat(np.asarray(given[name]), count) for name in lone}
    return {**given, **wide}


def _codes(groups: Array, where: str) -> Array:
    """Groups as integers [samples]; they may be given as whole numbers or as names."""
    if groups.ndim != 1 or groups.dtype.kind not in "biuSU":
        raise UsageError(
            f"{GROUPS!r} is {list(groups.shape)} {groups.dtype}",
            where=where,
            expected="one whole number or name for each sample",
        )
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _fit(array: Samples, spec: TensorSpec, where: str) -> Samples:
    if spec.datatype == "BF16" or spec.datatype == "BYTES":
        raise UsageError(f"input {spec.name!r} is {spec.datatype}", where=where, expected="numbers")
    wanted = np.dtype(tensors.DATATYPES[spec.datatype][0])
    if not _fits(array.dtype.kind, wanted.kind) and array.dtype != wanted:
        raise UsageError(
            f"{spec.name!r} has dtype {array.dtype}", where=where, expected=str(wanted)
        )
    # Where the first axis is fixed to more than 1, as of a state, a sample is all of it.
    one = spec.shape[1:] if spec.shape and spec.shape[0] in (-1, 1) else spec.shape
    inner = array.shape[1:]
    if not tensors.shape_matches(inner, one):
        if not (tensors.shape_matches(inner, spec.shape) and inner[0] == 1):
            raise UsageError(
                f"{spec.name!r} has shape {list(array.shape)}",
                where=where,
                expected="[samples]"
                if not one
                else f"[samples, {', '.join(map(str, one))}] (-1: any size)",
                remedy=f"the model takes {spec.shape[0]} samples at a time, no fewer: export it"
                " with a first axis that is free or 1, and each is judged by itself"
                if spec.shape and tensors.shape_matches(inner, spec.shape[1:])
                else "",
            )
        inner = inner[1:]  # each sample came with a batch axis of its own

    def change(part: Array) -> Array:
        return _converted(part.reshape(len(part), *inner), wanted, spec.name, where)

    if isinstance(array, Rows):
        return array.changed(change, inner, wanted)
    return change(np.asarray(array))


def _fits(given: str, wanted: str) -> bool:
    return (wanted == "f" and given in "fiu") or (wanted in "iu" and given in "iu")


def _converted(array: Array, wanted: np.dtype[Any], name: str, where: str) -> Array:
    if array.dtype != wanted:
        converted = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(converted, array):
            raise UsageError(f"{name!r} does not fit {wanted}", where=where)
        array = converted
    if wanted.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array).reshape(len(array), -1).all(axis=1)).sum())
        raise UsageError(
            f"{name!r} holds NaN or infinity in {bad} of {len(array)} samples",
            where=where,
            expected="numbers: one of these would spoil every range that is calibrated",
        )
    return array
