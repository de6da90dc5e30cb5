"""Take channels out of a model.

Law of this file: it changes a model in memory as `channels` and `choosing` say, and states no rule
of its own. Shapes that were written into the file for inner values are dropped: they are wrong now.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize import onnx_door
from quantize.pruning.groups import Channels, Cut
from quantize.pruning.seen import Seen

Array = np.ndarray[Any, Any]


def cut(
    model: Any,
    found: Channels,
    kept: dict[int, Array],
    weights: dict[str, Array],
    seen: dict[str, Seen] | None = None,
) -> None:
    """Slice every weight that hangs on a group which loses channels; `model` is changed.

    Args:
        seen: see `compensated`; None: what the channels added is lost.
    """
    changed = compensated(found, kept, weights, seen) if seen else dict(weights)
    depthwise = dict(found.depthwise)
    for one in found.cuts:
        if any(group in kept for group in one.groups):
            changed[one.weight] = np.take(changed[one.weight], indices(one, found, kept), one.axis)
    for size in found.stated:
        constant = changed[size.constant].copy()
        constant[size.place] = size.block * sum(
            len(kept.get(group, range(found.sizes[group]))) for group in size.groups
        )
        changed[size.constant] = constant
    for node in model.graph.node:
        for group in depthwise.get(node.output[0], ()):
            attribute = next(one for one in node.attribute if one.name == "group")
            attribute.i -= found.sizes[group] - len(kept.get(group, range(found.sizes[group])))
    make = onnx_door.library().numpy_helper.from_array
    for item in model.graph.initializer:
        if changed[item.name] is not weights[item.name]:
            item.CopyFrom(make(np.ascontiguousarray(changed[item.name]), item.name))
    for info in model.graph.input:  # of old files, whose weights are inputs with a default
        if info.name in changed:
            for dim, length in zip(
                info.type.tensor_type.shape.dim, changed[info.name].shape, strict=True
            ):
                dim.dim_value = length
    del model.graph.value_info[:]


def compensated(
    found: Channels, kept: dict[int, Array], weights: dict[str, Array], seen: dict[str, Seen]
) -> dict[str, Array]:
    """The weights, in which those of channels that stay take on what these foretell of the channels
    that go, and biases the rest of what those added on average.

    Exact where a channel is a sum of others and a constant, but for the borders of a convolution
    with pads, where the constant is not.
    """
    changed = dict(weights)
    for one in found.readers:
        cut = one.cut
        left = indices(cut._replace(block=1), found, kept)
        values = np.moveaxis(changed[cut.weight], cut.axis, 0)
        by_channel = values.reshape(-1, cut.block, *values.shape[1:]).astype(np.float64)
        gone = np.setdiff1d(np.arange(len(by_channel)), left)
        if not len(gone):
            continue
        foretold = seen[one.value].foretold(left, gone, bool(one.bias))
        if one.bias:
            means = seen[one.value].mean.reshape(-1, cut.block)
            rest = means[gone] - foretold @ means[left]
            summed = by_channel[gone].reshape(len(gone), *by_channel.shape[1:3], -1).sum(axis=3)
            added = np.einsum("cb,cbo->o", rest, summed)
            changed[one.bias] = (changed[one.bias] + added).astype(changed[one.bias].dtype)
        by_channel[left] += np.tensordot(foretold.T, by_channel[gone], 1)
        moved = np.moveaxis(by_channel.reshape(values.shape), 0, cut.axis)
        changed[cut.weight] = moved.astype(values.dtype)
    return changed


def indices(one: Cut, found: Channels, kept: dict[int, Array]) -> Array:
    """What stays of the cut's axis: channels of its groups in order, `block` elements each."""
    parts, offset = [], 0
    for group in one.groups:
        size = found.sizes[group]
        channels = kept.get(group, np.arange(size))
        elements = channels[:, None] * one.block + np.arange(one.block)
        parts.append(offset + elements.reshape(-1))
        offset += size * one.block
    return np.concatenate(parts)
