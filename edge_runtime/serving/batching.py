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

from edge_runtime import tensors
from edge_runtime.errors import EdgeError
from edge_runtime.serving import goldens
from edge_runtime.serving.plan import Plan, Slot, aligned_array

if TYPE_CHECKING:
    from edge_runtime.backends.protocol import Model

    Array = np.ndarray[Any, Any]

# What is tried at warm-up. More rows than 64 make one answer wait for too many others.
SIZES = (4, 16, 64)
# A warm-up must stay short: what cannot be measured within it (of the clock that is used) is not
# batched unasked.
MEASURE_S_MAX = 0.1
# Runs of one size; the fastest counts, because whatever else the machine does only adds.
REPEATS = 3
# A row in a batch must cost at most this share of a row alone, or batching is not worth its copies.
GAIN_MIN = 0.8
# And a row in a larger batch at most this share of one in a smaller, or the answers wait for
# nothing.
GAIN_MORE = 0.9
# Memory of one batch; bounds the rows of models with large tensors.
BATCH_BYTES_MAX = 16 * 1024 * 1024
# A batch that runs in the loop's own thread keeps it from reading and refusing for as long.
INLINE_RUN_NS_MAX = 4_000_000
# Distinct shapes with batch memory at rest; clients of one model use one or two.
KEYS_MAX = 8


class Choice(NamedTuple):
    """What the measurement says: rows of a batch at most (1: no batches), and why.

    Attributes:
        tried: rows of the largest batch that was tried; the loop goes beyond it step by step. 0: as
            rows_max.
    """

    rows_max: int
    reason: str
    tried: int = 0


class Batch:
    """Memory for up to `rows_max` rows of one key, bound once per number of rows."""

    def __init__(self, plan: Plan, rows_max: int) -> None:
        self.byte_size = rows_max * _row_bytes(plan)
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


class Batches:
    """Batch memory at rest, by key. Used by one thread."""

    def __init__(self) -> None:
        self._resting: dict[tuple[object, ...], list[Batch]] = {}

    def take(self, plan: Plan, rows_max: int) -> Batch | None:
        """Memory for a batch of this plan's key; None: there is none, run them one by one."""
        assert plan.batch_key is not None
        resting = self._resting.get(plan.batch_key)
        if resting:
            return resting.pop()
        try:
            return Batch(plan, capacity(plan, rows_max))
        except MemoryError:
            return None

    def give(self, plan: Plan, batch: Batch) -> None:
        """The batch has run and rests."""
        assert plan.batch_key is not None
        if plan.batch_key not in self._resting and len(self._resting) >= KEYS_MAX:
            del self._resting[next(iter(self._resting))]
        self._resting.setdefault(plan.batch_key, []).append(batch)

    @property
    def resting_bytes(self) -> int:
        """What rests here."""
        return sum(batch.byte_size for resting in self._resting.values() for batch in resting)

    def trim(self, bytes_max: int) -> None:
        """Give all of it back when it is more than that."""
        if self.resting_bytes > bytes_max:
            self._resting.clear()


def capacity(plan: Plan, rows_max: int) -> int:
    """How many rows of this plan one batch may have, within BATCH_BYTES_MAX."""
    return max(1, min(rows_max, BATCH_BYTES_MAX // max(_row_bytes(plan), 1)))


def inline_rows(limit: int, rows: int, run_ns: int, rows_max: int) -> int:
    """How many rows the next batch in the loop's thread may have, after one of `rows` took
    `run_ns`: fewer when that was more than INLINE_RUN_NS_MAX and a quarter (at most by half,
    because a run also takes long when somebody else has the processor; two are always tried), a
    quarter more when it was full and well within.
    """
    if run_ns * 4 > INLINE_RUN_NS_MAX * 5:
        return max(rows // 2, rows * INLINE_RUN_NS_MAX // run_ns, min(2, rows_max))
    if rows >= limit and run_ns * 5 < INLINE_RUN_NS_MAX * 4:
        return min(limit + max(limit // 4, 1), rows_max)
    return limit


def _row_bytes(plan: Plan) -> int:
    """Of a row's inputs and outputs (not of the places in shared memory that they may go to)."""
    shapes = [(given.spec, given.shape) for given in plan.inputs]
    shapes += [(output.spec, output.shape or ()) for output in plan.outputs]
    return sum(tensors.byte_size(spec.datatype, (1, *shape[1:])) for spec, shape in shapes)


def measure(
    model: Model,
    samples: Sequence[Mapping[str, Array]],
    rtol: float,
    atol: float,
    clock_ns: Callable[[], int],
    asked: int = 0,
) -> Choice:
    """Try batches of a warmed-up model. A model that fails here only rules batches out.

    Args:
        samples: inputs of one run or more; rows of them, and variations of the first row, are
            tried alone and together.
        rtol, atol: how far a row in a batch may lie from the same row alone.
        clock_ns: nanoseconds of wall time, or of the calling thread's processor time.
        asked: rows that the configuration asks for; only their rightness is tried. 0: measure.
    """
    rows = _rows(samples)
    try:
        return _measure(model, rows, rtol, atol, clock_ns, asked)
    except EdgeError as error:
        return Choice(1, f"the model failed when batches were tried: {error.message}")


def _measure(
    model: Model,
    alone: Sequence[Mapping[str, Array]],
    rtol: float,
    atol: float,
    clock_ns: Callable[[], int],
    asked: int,
) -> Choice:
    until_ns = clock_ns() + round(MEASURE_S_MAX * 1e9)
    runs = [_timed(model, inputs, clock_ns) for inputs in alone]
    row_ns = max(min(run_ns for run_ns, _ in runs), 1)
    answers = [outputs for _, outputs in runs]
    rows_max = max(1, BATCH_BYTES_MAX // max(sum(one.nbytes for one in alone[0].values()), 1))
    each_ns: float = row_ns  # of the size before: what a row of the next may cost
    best, best_ns = Choice(1, "a row in a batch is not cheaper than a row alone"), row_ns * GAIN_MIN
    tried = 0
    for size in (min(asked, rows_max),) if asked else SIZES:
        if not asked and (size > rows_max or clock_ns() + 2 * size * each_ns > until_ns):
            if size == SIZES[0]:
                best = Choice(1, "too slow or too large to be measured at load; set batch_rows_max")
            elif size <= rows_max and best.rows_max == tried:  # each size so far was worth it
                best = Choice(SIZES[-1], f"{best.reason}; no time to try more", tried)
            break
        tried = size
        inputs = _stack([alone[index % len(alone)] for index in range(size)])
        _, outputs = _timed(model, inputs, clock_ns)  # the first run of a new size allocates
        off = _deviation(outputs, answers, size, rtol, atol)
        if not off <= 1.0:
            return Choice(1, f"rows of a batch differ from rows alone ({off:.3g} x the tolerance)")
        if asked:
            return Choice(size, "as configured" if size == asked else "as its memory allows")
        each_ns = _fastest_ns(model, inputs, clock_ns, until_ns) / size
        if each_ns < best_ns:
            best = Choice(size, f"{size} rows at once: {each_ns / row_ns:.0%} of the time for each")
            best_ns = each_ns * GAIN_MORE
    return best


def _fastest_ns(
    model: Model, inputs: Mapping[str, Array], clock_ns: Callable[[], int], until_ns: int
) -> int:
    """Of up to REPEATS runs, as long as there is time; at least one."""
    fastest_ns, _ = _timed(model, inputs, clock_ns)
    for _ in range(REPEATS - 1):
        if clock_ns() + fastest_ns > until_ns:
            break
        fastest_ns = min(fastest_ns, _timed(model, inputs, clock_ns)[0])
    return fastest_ns


def _timed(
    model: Model, inputs: Mapping[str, Array], clock_ns: Callable[[], int]
) -> tuple[int, dict[str, Array]]:
    began_ns = clock_ns()
    outputs = model.run(inputs)
    return clock_ns() - began_ns, outputs


def _rows(samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """REPEATS rows that differ: the samples' first rows, then variations of the very first."""
    first = {name: np.ascontiguousarray(array[:1]) for name, array in samples[0].items()}
    rows = [first]
    for sample in samples[1:REPEATS]:
        row = {name: np.ascontiguousarray(array[:1]) for name, array in sample.items()}
        if all(row[name].shape == array.shape for name, array in first.items()):
            rows.append(row)
    for index in range(1, REPEATS - len(rows) + 1):
        rows.append({name: _varied(array, index) for name, array in first.items()})
    return rows


def _varied(array: Array, index: int) -> Array:
    """Another row like this one, of values that its model can be expected to take: moved along, and
    scaled where numbers are continuous. A row that is all the same value gets some others.
    """
    varied = np.roll(array, index)
    kind = array.dtype.kind
    if kind in "fiub" and array.size and bool((array == array.flat[0]).all()):
        steps = np.arange(array.size).reshape(array.shape) + index
        varied = varied + (steps / steps.max() / index if kind == "f" else steps % 2)
    elif kind == "f":
        varied = varied * (1 - 0.25 * index)
    return np.ascontiguousarray(varied, array.dtype)


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
