"""Which channels go: importance in, indices to keep out.

Law of this file: pure. Ties are broken by index, so that the same weights give the same choice.
Importance is the L2 (or L1) norm of the slices that make a channel (Li et al. 2017, "Pruning
filters for efficient convnets"), or what the channel adds to the next layer on calibration samples
(as Sun et al. 2023, "A simple and effective pruning approach", for single weights). Both are
divided by the mean over the layer, so that layers can be compared.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from quantize.pruning.groups import Channels

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
    found: Channels, weights: dict[str, Array], strengths: dict[str, Array]
) -> dict[int, Array]:
    """The same from what the channels do: strength of the value x norm of the weights that read it.

    Args:
        strengths: by a reader's value, root mean square of each element of its axis.
    """
    scores = {group: np.zeros(found.sizes[group]) for group in found.prunable}
    for one in found.readers:
        weight = np.moveaxis(weights[one.cut.weight], one.cut.axis, 0)
        norms = np.linalg.norm(weight.reshape(len(weight), -1).astype(np.float64), axis=1)
        added, offset = np.square(norms * strengths[one.value]), 0
        for group in one.cut.groups:
            length = found.sizes[group] * one.cut.block
            mine = added[offset : offset + length].reshape(found.sizes[group], -1)
            if group in scores:
                scores[group] += _relative(np.sqrt(mine.sum(axis=1)))
            offset += length
    return scores


def _relative(values: Array) -> Array:
    return values / max(float(values.mean()), 1e-12)


def keep(
    found: Channels,
    scores: dict[int, Array],
    ratio: float,
    ratios: dict[str, float],
    multiple: int,
    across: bool,
    keep_min: float,
) -> dict[int, Array]:
    """Indices to keep, ascending, of every group that loses channels.

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
            order = np.argsort(-values, kind="stable")[:count]
            kept[group] = np.sort(order)
    return kept


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
