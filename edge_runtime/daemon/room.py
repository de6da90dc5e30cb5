"""Room in memory for a model that is to be loaded.

Law of this file: the driver of `residency`: it asks the deployments who is there, has those go whom
the verdict names, and waits. It holds no lock: what a load was promised counts as taken from then
on, because the caller makes its worker before it waits for anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from edge_runtime.clock import Clock
from edge_runtime.daemon import residency
from edge_runtime.daemon.deployment import Deployment
from edge_runtime.daemon.residency import Resident
from edge_runtime.errors import NoMemoryError

# How long a load waits for others to finish loading or leaving: a few loads of a small model. A
# model that compiles for minutes is not waited for.
WAIT_S_MAX = 10.0
# Between two looks. A look reads one file of /proc per worker.
LOOK_S = 0.02
# Soon enough for a client; a refused model is not tried again before.
RETRY_AFTER_S = 1.0


class Room:
    """The memory budget of all models."""

    def __init__(
        self, budget_bytes: int, deployments: Callable[[], Iterable[Deployment]], clock: Clock
    ) -> None:
        self._budget_bytes = budget_bytes
        self._deployments = deployments
        self._clock = clock
        self._waiting: set[str] = set()

    async def make(self, model: str, need_bytes: int, asked: bool) -> None:
        """Return when `need_bytes` more for `model` fit; others are unloaded for it.

        Args:
            asked: somebody wants the model now. Otherwise no other model has to go for it: it
                takes what is free, warm, or about to be given back.

        Raises:
            NoMemoryError: it does not fit, even without the models that can go.
        """
        if not self._budget_bytes:
            return
        give_up_ns = self._clock.monotonic_ns() + round(WAIT_S_MAX * 1e9)
        self._waiting.add(model)
        try:
            while True:
                residents = self._residents(model)
                staying = [one for one in residents if not one.leaving]
                chosen = self._victims(staying, need_bytes, model, asked)
                used_bytes = sum(one.private_bytes for one in residents)
                if chosen:
                    await self._evict(chosen, model)
                    continue
                if chosen is not None and used_bytes + need_bytes <= self._budget_bytes:
                    return
                hopeless = chosen is None and not (
                    asked and self._may_come(staying, need_bytes, model)
                )
                if hopeless or self._clock.monotonic_ns() >= give_up_ns:
                    raise self._refusal(model, used_bytes + need_bytes)
                await asyncio.sleep(LOOK_S)
        finally:
            self._waiting.discard(model)

    def _residents(self, newcomer: str) -> list[Resident]:
        return [one for each in self._deployments() for one in each.residents(newcomer)]

    def _victims(
        self, residents: list[Resident], need_bytes: int, model: str, asked: bool
    ) -> list[Resident] | None:
        return residency.victims(
            residents, need_bytes, self._budget_bytes, model, warm_only=not asked
        )

    def _may_come(self, staying: list[Resident], need_bytes: int, model: str) -> bool:
        """Whether there would be room if everybody finished what they are at.

        Those who wait for room themselves do not: two that wait for each other are both refused.
        """
        later = [
            one._replace(movable=one.movable or one.model not in self._waiting) for one in staying
        ]
        return self._victims(later, need_bytes, model, asked=True) is not None

    async def _evict(self, chosen: list[Resident], model: str) -> None:
        """Have them go; their ends are theirs, whatever becomes of the newcomer."""
        by_name = {one.name: one for one in self._deployments()}
        leaving = [
            by_name[one.model].cool()
            if one.warm
            else by_name[one.model].sleep(f"made room for {model}")
            for one in chosen
        ]
        await asyncio.wait(leaving)

    def _refusal(self, model: str, bytes_then: int) -> NoMemoryError:
        return NoMemoryError(
            f"no room in memory: with {model} the models would take {bytes_then} bytes",
            where=model,
            expected=f"<= {self._budget_bytes} bytes (memory.budget_bytes)",
            remedy="raise memory.budget_bytes, unload a model, or use a smaller variant",
            retry_after_s=RETRY_AFTER_S,
        )
