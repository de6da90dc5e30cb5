"""Take channels out of a model.

Law of this file: it changes a model in memory as `channels` and `choosing` say, and states no rule
of its own. Shapes that were written into the file for inner values are dropped: they are wrong now.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize import onnx_door
from quantize.pruning.groups import Channels, Cut

Array = np.ndarray[Any, Any]


def cut(model: Any, found: Channels, kept: dict[int, Array], weights: dict[str, Array]) -> None:
    """Slice every weight that hangs on a group which loses channels; `model` is changed."""
    changed, depthwise = dict(weights), dict(found.depthwise)
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
