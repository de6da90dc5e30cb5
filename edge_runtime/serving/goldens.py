"""Goldens: recorded answers that a loaded model must give again before it may serve.

Law of this file: reads the recorded tensors, compares, and says how far off; what follows from
that is the worker's and the daemon's. |got - want| <= atol + rtol * |want| per element
(numpy.isclose's rule, with the recorded value as the reference); a deviation is that ratio, so
that 1 is the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import GoldenError
from edge_runtime.serving.spec import GoldenFile, GoldenPair
from edge_runtime.tensors import TensorSpec

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def read(golden: GoldenFile) -> Array:
    """The recorded tensor.

    Raises:
        RequestError: the file has another size than datatype and shape need.
        OSError: it cannot be read.
    """
    return tensors.from_bytes(Path(golden.path).read_bytes(), golden.datatype, golden.shape)


def inputs_of(pair: GoldenPair) -> dict[str, Array]:
    """The recorded inputs by name."""
    return {golden.name: read(golden) for golden in pair.inputs}


def zeros(specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """An input of zeros, every free dimension 1."""
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(1 if dim < 0 else dim for dim in spec.shape)
        array: Array = np.zeros(shape, dtype=np.dtype(tensors.DATATYPES[spec.datatype][0]))
        if spec.datatype == "BYTES":
            array.fill(b"")
        arrays[spec.name] = array
    return arrays


def deviation(got: Array, want: Array, rtol: float, atol: float) -> float:
    """The largest |got - want| / (atol + rtol |want|); inf where no distance is defined."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.dtype.kind not in "biuf":
        return 0.0 if bool((got == want).all()) else float("inf")
    if not want.size:
        return 0.0
    have, wanted = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(have) & np.isnan(wanted))
    if not bool((same | (np.isfinite(wanted) & np.isfinite(have))).all()):
        return float("inf")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        off = np.abs(have - wanted)
        if want.dtype.kind in "iu":  # neighbours above 2**53 are one FP64 number
            off = np.maximum(off, 1.0)
        ratio = np.where(same, 0.0, off / (atol + rtol * np.abs(wanted)))
    return float(ratio.max())


def check(run: Run, pairs: Sequence[GoldenPair], rtol: float, atol: float, first: int = 0) -> float:
    """Run every golden and compare.

    Args:
        first: the number of the first one, for the error.

    Returns:
        The largest deviation (<= 1).

    Raises:
        GoldenError: an output lies outside its tolerance; names golden, output, and how far off.
    """
    worst = 0.0
    for index, pair in enumerate(pairs, first):
        outputs = run(inputs_of(pair))
        for golden in pair.outputs:
            want = read(golden)
            got = outputs.get(golden.name)
            off = float("inf") if got is None else deviation(np.asarray(got), want, rtol, atol)
            if not off <= 1.0:
                raise GoldenError(
                    f"output {golden.name!r} is {off:.3g} x its tolerance away from golden {index}",
                    expected=f"|got - want| <= {atol:g} + {rtol:g} |want|",
                    remedy="this variant gives other answers here than where it was packed; "
                    "it is not served",
                )
            worst = max(worst, off)
    return worst
