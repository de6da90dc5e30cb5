"""A look at what a float model answers, before anything is decided by it.

Law of this file: some runs in this process, on the backend that the format belongs to; what is seen
is told, what it means is decided in `meaning`. A model that does not run is no error here: whoever
serves it will say why.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.backends import backend
from edge_runtime.errors import EdgeError
from quantize import datasets, models, onnx_door, targets
from quantize.datasets import Dataset
from quantize.meaning import Look
from quantize.models import ModelFile
from quantize.passes import ONNX

RUNS = 8  # answers of the same length to eight samples are no chance


def looks(source: ModelFile, data: Dataset) -> Callable[[str], Look]:
    """A function that looks at the output of a name when it is asked to."""

    def look(output: str) -> Look:
        operator = onnx_door.origin(source.path, output) if source.format == ONNX else ""
        return Look(operator, _answers(source, data, output))

    return look


def _answers(source: ModelFile, data: Dataset, output: str) -> np.ndarray | None:
    """[samples, ...] of the first samples; None where it does not run, or not alike for all."""
    name = models.BACKENDS[source.format]
    if not targets.is_here(name):
        return None
    first = {key: np.asarray(array[:RUNS]) for key, array in data.inputs.items()}
    try:
        model = backend(name).load(source.path, {"threads": 1})
        found = [model.run(feed)[output] for feed in datasets.batches(first, 1, source.inputs)]
    except EdgeError:
        return None
    if len({one.shape for one in found}) != 1:
        return None
    return np.stack([np.array(one).reshape(-1) for one in found])
