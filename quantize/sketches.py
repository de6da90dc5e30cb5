"""A baseline of inputs and outputs, for a device to notice later that its data drifted.

Law of this file: arrays in, plain values out. A sketch is a histogram over fixed edges with counts
below and above, so that two sketches with the same edges can be added; edges come from the data
that the model was judged on. A test of drift needs counts, not means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantize import rows
from quantize.rows import Samples

Array = np.ndarray[Any, Any]

# Of a sketch: finer ones need more samples on the device before a difference means anything.
BINS = 32
SAMPLES_MAX = 2_000_000  # values looked at per tensor: enough for every edge to three digits


def sketch(values: Array) -> dict[str, Any]:
    """Edges [BINS + 1], counts [BINS + 2] (below, bins, above), and moments of those looked at."""
    flat = rows.thinned(values, SAMPLES_MAX).astype(np.float64)
    flat = flat[np.isfinite(flat)]  # a log of zero has no place among edges
    if not len(flat):
        return {"count": 0, "mean": 0.0, "std": 0.0, "edges": [], "counts": []}
    low, high = (float(one) for one in np.quantile(flat, (0.001, 0.999)))
    edges = np.linspace(low, high if high > low else low + 1e-9, BINS + 1)
    inside, _ = np.histogram(flat, bins=edges)
    counts = [int((flat < edges[0]).sum()), *inside.tolist(), int((flat > edges[-1]).sum())]
    return {
        "count": len(flat),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": counts,
    }


def classes(outputs: Array) -> list[int]:
    """How often each class had the largest value; [N, classes]."""
    flat = outputs.reshape(len(outputs), -1)
    counts = np.bincount(flat.argmax(axis=1), minlength=flat.shape[1])
    return [int(count) for count in counts]


def baseline(inputs: Mapping[str, Samples], outputs: dict[str, Array]) -> dict[str, Any]:
    """Sketches by tensor, and of outputs that look like classes their shares."""
    found: dict[str, Any] = {
        "inputs": {
            name: sketch(rows.spread(one, len(one)))
            for name, one in inputs.items()
            if one.dtype.kind in "fiu"
        },
        "outputs": {name: sketch(one) for name, one in outputs.items() if one.dtype.kind in "fiu"},
    }
    shares = {
        name: classes(one)
        for name, one in outputs.items()
        if one.ndim == 2 and 2 <= one.shape[1] <= 10_000
    }
    return found | ({"classes": shares} if shares else {})
