"""Which channels go: importance in, indices to keep out.

Law of this file: pure. Ties are broken by index, so that the same weights give the same choice.
Importance is the L2 (or L1) norm of the slices that make a channel (Li et al. 2017, "Pruning
filters for efficient convnets"), or what the channel adds to the next layer on calibration samples
(as Sun et al. 2023, "A simple and effective pruning approach", for single weights). Both are
divided by the mean over the layer, so that layers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from quantize.pruning.groups import Channels, Reader
from quantize.pruning.seen import Read, Seen, going

Array = np.ndarray[Any, Any]


def by_weights(
    found: Channels, weights: dict[str, Array], norm: Literal["l1", "l2"]
) -> dict[int, Array]:
    """Per prunable group one number for each channel: the norm of the weights that make it."""
    scores = {}
    for group in found.prunable:
        count = found.sizes[group]
        total = np.zeros(count)
        for one in found.made_by[group]:
            slices = np.moveaxis(weights[one.weight], one.axis, 0)[one.start : one.start + count]
            flat = slices.reshape(count, -1).astype(np.float64)
            total += _relative(
                np.abs(flat).sum(axis=1) if norm == "l1" else np.linalg.norm(flat, axis=1)
            )
        scores[group] = total
    return scores


def by_activations(
    found: Channels, weights: dict[str, Array], seen: dict[str, Seen]
) -> dict[int, Array]:
    """The same from what the channels do: strength of the value x norm of the weights that read it.

    Args:
        seen: by a reader's value.
    """
    scores = {group: np.zeros(found.sizes[group]) for group in found.prunable}
    for one in found.readers:
        added = _norms(one, weights) * seen[one.value].square
        by_channel = added.reshape(-1, one.cut.block).sum(axis=1)
        for group, own in _own(one, found):
            if group in scores:
                scores[group] += _relative(np.sqrt(by_channel[own]))
    return scores


def by_foresight(
    found: Channels, weights: dict[str, Array], seen: dict[str, Seen]
) -> dict[int, Array]:
    """The same of what the other channels cannot say (see `seen`)."""
    readers: dict[int, list[Read]] = {group: [] for group in found.prunable}
    for one in found.readers:
        norms = _norms(one, weights).reshape(-1, one.cut.block).sum(axis=1)
        for group, own in _own(one, found):
            if group in readers:
                readers[group].append(Read(seen[one.value], norms, own, bool(one.bias)))
    return {
        group: going(some) if some else np.zeros(found.sizes[group])
        for group, some in readers.items()
    }


def _norms(one: Reader, weights: dict[str, Array]) -> Array:
    """Squared norm of the weights that read each element."""
    weight = np.moveaxis(weights[one.cut.weight], one.cut.axis, 0)
    found: Array = np.square(weight.reshape(len(weight), -1).astype(np.float64)).sum(axis=1)
    return found


def _own(one: Reader, found: Channels) -> Iterator[tuple[int, Array]]:
    """Each group of the axis with its channels."""
    offset = 0
    for group in one.cut.groups:
        yield group, np.arange(offset, offset + found.sizes[group])
        offset += found.sizes[group]


def _relative(values: Array) -> Array:
    return values / max(float(values.mean()), 1e-12)


def counts(
    found: Channels,
    scores: dict[int, Array],
    ratio: float,
    ratios: dict[str, float],
    multiple: int,
    across: bool,
    keep_min: float,
) -> dict[int, int]:
    """How many channels stay, of every group that loses some.

    Args:
        ratio: share of channels that go. ratios: other shares for groups that a node makes, by its
            name. multiple: what is kept is a multiple of this, where the group is that large: SIMD
            kernels compute the rest anyway. across: rank the channels of all groups together.
        keep_min: share of each group that stays in any case.
    """
    shares = _across(found, scores, ratio) if across else dict.fromkeys(scores, ratio)
    kept = {}
    for group, values in scores.items():
        stated = [ratios[name] for name in found.nodes[group] if name in ratios]
        share = min(stated[0] if stated else shares[group], 1 - keep_min if not stated else 1.0)
        count = kept_count(len(values), share, multiple)
        if count < len(values):
            kept[group] = count
    return kept


def partway(size: int, count: int, part: float, multiple: int) -> int:
    """How many of `size` channels are there when `part` of the way to `count` is gone."""
    return max(count, kept_count(size, (size - count) / size * part, multiple))


def best(scores: dict[int, Array], wanted: dict[int, int]) -> dict[int, Array]:
    """Indices to keep, ascending, of every group that loses channels."""
    return {
        group: np.sort(np.argsort(-scores[group], kind="stable")[:count])
        for group, count in wanted.items()
        if count < len(scores[group])
    }


def kept_count(size: int, share: float, multiple: int) -> int:
    """How many of `size` channels stay when `share` should go: rounded up to the multiple."""
    wanted = max(1, size - math.floor(size * share + 1e-9))
    if size >= 2 * multiple:
        wanted = math.ceil(wanted / multiple) * multiple
    return min(size, wanted)


def _across(found: Channels, scores: dict[int, Array], ratio: float) -> dict[int, float]:
    every = np.sort(np.concatenate(list(scores.values()))) if scores else np.zeros(0)
    limit = every[min(int(len(every) * ratio), len(every) - 1)] if len(every) else 0.0
    return {group: float((values < limit).mean()) for group, values in scores.items()}
