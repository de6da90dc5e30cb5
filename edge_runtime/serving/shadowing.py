"""The candidate's side of shadowing: run what the serving version ran, compare, count.

Law of this file: one record at a time, when the loop says that nothing else is to be done. It
answers nobody: what it finds is on the trial's page.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_runtime import tensors
from edge_runtime.clock import monotonic_ns
from edge_runtime.serving import comparison, page, ring, trial
from edge_runtime.serving.comparison import Comparison
from edge_runtime.serving.plan import Plan, Planner, Slot
from edge_runtime.serving.running import edge_error
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import messages
from edge_runtime.wire.frames import PREFIX, PREFIX_SIZE

Array = np.ndarray[Any, Any]

# Requests of distinct shapes whose memory is kept; clients of one model use a few.
SLOTS_MAX = 8
# While records come, the ring is looked at so often, and the writer need not wake us.
POLL_S = 0.002
# Without any for so long, we sleep until the bell rings.
AWAKE_NS = 20_000_000


class Shadow:
    """Compares this worker's model with the answers in a ring.

    Attributes:
        armed: asleep until the bell; the loop watches `bell` then.
        bell: the eventfd; the loop closes it.
    """

    def __init__(
        self, memory: memoryview, bell: int, words: memoryview, planner: Planner, spec: WorkerSpec
    ) -> None:
        self._ring = ring.Reader(memory, bell)
        self.bell = bell
        self.armed = False
        self._words = words
        self._reals: memoryview[float] = trial.numbers(words)
        self._planner = planner
        self._tolerance = spec.rtol, spec.atol
        self._classes = comparison.class_outputs(spec.outputs, spec.metadata)
        self._places = {spec.name: index for index, spec in enumerate(spec.outputs)}
        self._slots: dict[bytes, Slot] = {}
        self._wanted: dict[bytes, messages.InferResponse] = {}
        self._busy_ns = 0  # when the newest record was found

    def due(self, now_ns: int) -> bool:
        """Whether a record waits."""
        if self._ring.waiting or self._ring.listen():
            self._busy_ns = now_ns
            return True
        return False

    @property
    def waiting(self) -> int:
        """Records that are known to be there."""
        return self._ring.waiting

    def wake(self, now_ns: int) -> None:
        """The bell rang."""
        self._busy_ns = now_ns

    def restless(self, now_ns: int) -> bool:
        """Whether to look again soon rather than to sleep."""
        return now_ns - self._busy_ns < AWAKE_NS

    def run(self, status: memoryview) -> None:
        """Take one record, run it, compare.

        Raises:
            MalformedError: the ring is of no use any more.
        """
        record = self._ring.take()
        try:
            self._run(record, status)
        except Exception as failure:  # noqa: BLE001 - a model that fails is what is to be found out
            self._words[trial.ERRORS] += 1
            trial.write_text(self._words, str(edge_error(failure)))
        self._ring.done()

    def _run(self, record: ring.Record, status: memoryview) -> None:
        slot = self._slot(bytes(record.sections[0]))
        slot.body[:] = record.sections[1]
        status[page.RUN_BEGAN] = began_ns = monotonic_ns()
        try:
            response = slot.respond()
        finally:
            status[page.RUN_BEGAN] = 0
        run_ns = monotonic_ns() - began_ns
        got = _own_outputs(slot, response)
        self._count(got, self._described(record), run_ns, record.number)

    def _slot(self, header: bytes) -> Slot:
        slot = self._slots.get(header)
        if slot is None:
            if len(self._slots) >= SLOTS_MAX:
                self._slots.pop(next(iter(self._slots))).plan.retire()
            plan = self._planner.plan(messages.decode_infer_request(header), {})
            slot = self._slots[header] = Slot(plan)
        return slot

    def _described(self, record: ring.Record) -> dict[str, Array]:
        """The serving version's outputs."""
        header = bytes(record.sections[2])
        response = self._wanted.get(header)
        if response is None:
            if len(self._wanted) >= SLOTS_MAX:
                self._wanted.pop(next(iter(self._wanted)))
            response = self._wanted[header] = messages.decode_infer_response(header)
        return _arrays(response, record.sections[3])

    def _count(
        self, got: dict[str, Array], want: dict[str, Array], run_ns: int, stable_ns: int
    ) -> None:
        words, found = self._words, {}
        for name, wanted in want.items():
            found[name] = comparison.compare(
                got[name], wanted, name in self._classes, *self._tolerance
            )
            if self._places[name] < trial.OUTPUTS_MAX:
                self._count_output(
                    trial.OUTPUT + self._places[name] * trial.OUTPUT_WORDS, found[name]
                )
        words[trial.COMPARED] += 1
        words[trial.DISAGREED] += disagree(found)
        if stable_ns:  # it ran alone, as ours did: these two are comparable
            page.observe(words, trial.STABLE_RUN, stable_ns)
            page.observe(words, trial.CANDIDATE_RUN, run_ns)

    def _count_output(self, at: int, one: Comparison) -> None:
        words, reals = self._words, self._reals
        words[at + trial.COUNT] += 1
        words[at + trial.UNLIKE] += not one.alike
        words[at + trial.OUTSIDE] += not one.within
        words[at + trial.ROWS] += one.rows
        words[at + trial.AGREED] += one.agreed
        if one.alike:
            reals[at + trial.MAX_ABS] = max(reals[at + trial.MAX_ABS], one.max_abs)
        if one.cosine is not None:
            first = not words[at + trial.COSINES]
            lowest = one.cosine if first else min(reals[at + trial.COSINE_MIN], one.cosine)
            reals[at + trial.COSINE_MIN] = lowest
            reals[at + trial.COSINE_SUM] += one.cosine
            words[at + trial.COSINES] += 1


def disagree(found: dict[str, Comparison]) -> bool:
    """Whether two answers are not the same to a user.

    Where outputs name classes, another class; where none does, numbers outside the tolerance; and
    always what cannot be compared.
    """
    if not all(one.alike for one in found.values()):
        return True
    if any(one.rows for one in found.values()):
        return any(one.agreed < one.rows for one in found.values())
    return not all(one.within for one in found.values())


def _own_outputs(slot: Slot, response: memoryview) -> dict[str, Array]:
    plan: Plan = slot.plan
    if plan.static:
        return {
            output.spec.name: array
            for output, array in zip(plan.outputs, slot.outputs, strict=True)
        }
    body_at = PREFIX_SIZE + PREFIX.unpack_from(response)[5]
    described = messages.decode_infer_response(response[PREFIX_SIZE:body_at])
    return _arrays(described, response[body_at:])


def _arrays(response: messages.InferResponse, body: memoryview) -> dict[str, Array]:
    arrays, offset = {}, 0
    for output in response.outputs:
        place = output.parameters
        size = place.binary_data_size or 0
        if place.shared_memory_region is not None:
            size = place.shared_memory_byte_size
        data = body[offset : offset + size]
        arrays[output.name] = tensors.from_bytes(data, output.datatype, output.shape)
        offset += size
    return arrays
