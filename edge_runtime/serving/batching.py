"""Batches: requests that wait at the same time and fit together run as one.

Law of this file: which requests fit, the memory of a batch, and the measurement that says whether
batching pays; no socket, no queue. Batches form only along axis 0 of tensors that declare it, only
where rows of a batch gave the same answers as rows alone when the worker warmed up, and only as
large as made a row cheaper there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime.errors import EdgeError
from edge_runtime.serving import goldens
from edge_runtime.serving.plan import Plan, Slot, aligned_array

if TYPE_CHECKING:
    from edge_runtime.backends.protocol import Model

    Array = np.ndarray[Any, Any]

# What is tried at warm-up. More rows than 64 make one answer wait for too many others.
SIZES = (4, 16, 64)
# A warm-up must stay short: a model that cannot be measured within it is not batched unasked.
MEASURE_S_MAX = 0.03
# A row in a batch must cost at most this share of a row alone, or batching is not worth its copies.
GAIN_MIN = 0.8
# Memory of one batch; bounds the rows of models with large tensors.
BATCH_BYTES_MAX = 16 * 1024 * 1024


class Choice(NamedTuple):
    """What the measurement says: rows of a batch at most (1: no batches), and why."""

    rows_max: int
    reason: str


class Batch:
    """Memory for up to `rows_max` rows of one key, bound once per number of rows."""

    def __init__(self, plan: Plan, rows_max: int) -> None:
        self._model = plan.model
        self._names = (
            [given.spec.name for given in plan.inputs],
            [output.spec.name for output in plan.outputs],
        )
        self._inputs = [
            aligned_array((rows_max, *given.shape[1:]), given.spec.datatype)
            for given in plan.inputs
        ]
        self._outputs = [
            aligned_array((rows_max, *(output.shape or ())[1:]), output.spec.datatype)
            for output in plan.outputs
        ]
        self._bindings: dict[int, Callable[[], object]] = {}

    def run(self, slots: Sequence[Slot]) -> None:
        """Run the requests of these slots together; each slot's frame then holds its answer.

        Raises:
            EdgeError: as the model.
        """
        rows = 0
        for slot in slots:
            end = rows + slot.plan.rows
            for mine, theirs in zip(self._inputs, slot.inputs, strict=True):
                mine[rows:end] = theirs
            rows = end
        run = self._bindings.get(rows)
        if run is None:
            run = self._bindings[rows] = self._bind(rows)
        run()
        rows = 0
        for slot in slots:
            end = rows + slot.plan.rows
            for mine, theirs in zip(self._outputs, slot.outputs, strict=True):
                theirs[...] = mine[rows:end]
            rows = end

    def _bind(self, rows: int) -> Callable[[], object]:
        inputs, outputs = self._names
        return self._model.bind(
            {name: array[:rows] for name, array in zip(inputs, self._inputs, strict=True)},
            {name: array[:rows] for name, array in zip(outputs, self._outputs, strict=True)},
        )


def capacity(plan: Plan, rows_max: int) -> int:
    """How many rows of this plan one batch may have, within BATCH_BYTES_MAX."""
    row_bytes = sum(given.byte_size for given in plan.inputs) // max(plan.rows, 1)
    return max(1, min(rows_max, BATCH_BYTES_MAX // max(row_bytes, 1)))


def measure(
    model: Model,
    single: Mapping[str, Array],
    rtol: float,
    atol: float,
    clock_ns: Callable[[], int],
    asked: int = 0,
) -> Choice:
    """Try batches of a warmed-up model.

    Args:
        single: inputs of one run; their first row is repeated and varied.
        rtol, atol: how far a row in a batch may lie from the same row alone.
        clock_ns: CLOCK_MONOTONIC.
        asked: rows that the configuration asks for; only their rightness is tried. 0: measure.

    Raises:
        EdgeError: the model fails on a single row; a failure on several only rules batches out.
    """
    began_ns = clock_ns()
    alone = [_row(single, index) for index in range(3)]
    answers = []
    times_ns = []
    for inputs in alone:
        run_ns, outputs = _timed(model, inputs, clock_ns)
        answers.append(outputs)
        times_ns.append(run_ns)
    row_ns = float(sorted(times_ns)[1])
    best = Choice(1, "a row in a batch is not cheaper than a row alone")
    best_ns = row_ns * GAIN_MIN
    for rows in (asked,) if asked else SIZES:
        if not asked and clock_ns() - began_ns + 2 * rows * row_ns > MEASURE_S_MAX * 1e9:
            break
        inputs = _stack([alone[index % len(alone)] for index in range(rows)])
        try:
            _, outputs = _timed(model, inputs, clock_ns)  # the first run at a new size allocates
        except EdgeError as error:
            return Choice(1, f"the model does not take {rows} rows: {error.message}")
        off = _deviation(outputs, answers, rows, rtol, atol)
        if not off <= 1.0:
            return Choice(1, f"rows of a batch differ from rows alone ({off:.3g} x the tolerance)")
        if asked:
            return Choice(asked, "as configured")
        run_ns, _ = _timed(model, inputs, clock_ns)
        if run_ns / rows < best_ns:
            best = Choice(rows, f"{rows} rows at once: {run_ns / rows / row_ns:.0%} of the time")
            best_ns = run_ns / rows * 0.9  # a larger batch must make it better, not equal
    return best


def _timed(
    model: Model, inputs: Mapping[str, Array], clock_ns: Callable[[], int]
) -> tuple[int, dict[str, Array]]:
    began_ns = clock_ns()
    outputs = model.run(inputs)
    return clock_ns() - began_ns, outputs


def _row(inputs: Mapping[str, Array], index: int) -> dict[str, Array]:
    """The first row, varied with `index` where numbers are continuous."""
    row = {name: np.ascontiguousarray(array[:1]) for name, array in inputs.items()}
    for name, array in row.items():
        if array.dtype.kind == "f" and index:
            row[name] = np.ascontiguousarray(
                np.roll(array, index) * (1 - 0.25 * index), array.dtype
            )
    return row


def _stack(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _deviation(
    outputs: Mapping[str, Array],
    answers: Sequence[Mapping[str, Array]],
    rows: int,
    rtol: float,
    atol: float,
) -> float:
    wanted = _stack([answers[index % len(answers)] for index in range(rows)])
    return max(
        (goldens.deviation(outputs[name], want, rtol, atol) for name, want in wanted.items()),
        default=0.0,
    )
