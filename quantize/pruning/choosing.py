"""Which channels go: importance in, indices to keep out.

Law of this file: pure. Ties are broken by index, so that the same weights give the same choice.
Importance is the L2 (or L1) norm of the slices that make a channel, divided by the mean over its
layer, so that layers can be compared (Li et al. 2017, "Pruning filters for efficient convnets").
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from quantize.pruning.channels import Channels

Array = np.ndarray[Any, Any]


def importance(
    found: Channels, weights: dict[str, Array], norm: Literal["l1", "l2"]
) -> dict[int, Array]:
    """Per prunable group one number for each channel."""
    scores = {}
    for group in found.prunable:
        total = np.zeros(found.sizes[group])
        for name, axis in found.made_by[group]:
            slices = np.moveaxis(weights[name], axis, 0).reshape(found.sizes[group], -1)
            size = np.abs(slices).sum(axis=1) if norm == "l1" else np.linalg.norm(slices, axis=1)
            total += size / max(float(size.mean()), 1e-12)
        scores[group] = total
    return scores


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
