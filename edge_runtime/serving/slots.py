"""The memory that a worker's requests take: how much is in use, how much rests.

Law of this file: counting and giving back; what a slot holds is `plan`'s, whether there is room for
one is `admission`'s. No socket, no clock. Used by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edge_runtime.serving.plan import Plan, Slot

# Memory of slots at rest: what a busy minute needed is given back when it is more than this.
IDLE_BYTES_MAX = 32 * 1024 * 1024

# All plans that slots may rest with.
Plans = Callable[[], Iterable[Mapping[bytes, Plan]]]


class Slots:
    """Slots in use, by their bytes.

    Attributes:
        used_bytes: of requests that are being received, wait, run, or are being answered.
    """

    def __init__(self, plans: Plans) -> None:
        self.used_bytes = 0
        self._made_bytes = 0  # used, at rest, or dropped since the last trim
        self._plans = plans

    def acquire(self, plan: Plan) -> Slot:
        """Memory for one request. Raises whatever a backend raises that binds memory."""
        slot = plan.free.pop() if plan.free else self._new(plan)
        self.used_bytes += plan.slot_bytes
        return slot

    def release(self, slot: Slot | None) -> None:
        """The request is done with."""
        if slot is None:
            return
        plan = slot.plan
        self.used_bytes -= plan.slot_bytes
        plan.free.append(slot)

    def trim(self) -> None:
        """Give the memory of slots at rest back, when it is much."""
        if self._made_bytes - self.used_bytes <= IDLE_BYTES_MAX:
            return
        for plans in self._plans():
            for plan in plans.values():
                plan.free.clear()
        self._made_bytes = self.used_bytes

    def _new(self, plan: Plan) -> Slot:
        self.trim()
        slot = Slot(plan)
        self._made_bytes += plan.slot_bytes
        return slot
