"""Which variant of a generation serves: found for it, and changed beside what serves.

Law of this file: the order of steps when the variant changes and the generation does not; nothing
of that is a switch on disk. Which variant is the right one is `selecting`'s; a variant that dies is
left in `recovery`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from edge_runtime.daemon.candidate import Candidates
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.post import Post
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.recovery import Recovery
from edge_runtime.daemon.selecting import Selector
from edge_runtime.errors import EdgeError
from edge_runtime.store import Generation

# A variant that had no room, or failed, may be fit later: heat and want of memory come together.
FIT_AGAIN_S = 60.0


class Variants:
    """Of one model."""

    def __init__(
        self,
        parts: Parts,
        crew: Crew,
        post: Post,
        selector: Selector,
        candidates: Candidates,
        recovery: Recovery,
    ) -> None:
        self._parts = parts
        self._crew = crew
        self._post = post
        self._selector = selector
        self._candidates = candidates
        self._recovery = recovery
        self._reselection: asyncio.Task[Any] | None = None
        self._slimmed = False  # `slim` wanted something, once
        self._fitted: tuple[WorkerProcess, bool] | None = None  # seen by `slim`, and what it wanted
        self._fit_again_ns = 0  # when to try that again; 0: not

    async def loaded(
        self, generation: Generation, *, asked: bool, choose: bool
    ) -> tuple[WorkerProcess, bool]:
        """A ready worker for a generation, and whether it was at hand.

        Args:
            asked: somebody wants it now.
            choose: decide about its variants first, where that is due.
        """
        at_hand = [one for one, _ in self._crew.roles() if one.serving]
        at_hand = [one for one in at_hand if one.spec.generation == generation.number]
        if at_hand and not (choose and await self._selector.due(generation)):
            return at_hand[0], True
        served = self._crew.worker is not None
        worker = await self._selector.worker(
            generation,
            asked=asked,
            choose=choose,
            hurry=lambda: served and self._crew.worker is None,  # what served has died meanwhile
        )
        for one in at_hand:
            if one.serving and one.spec.variant == worker.spec.variant:
                await self._crew.stop(worker)
                return one, True
        return worker, False

    # -- the best one, again -----------------------------------------------------------------------

    def reselect_if_due(self) -> None:
        """Decide again, beside what serves, when the machine is not the one that was measured."""
        if self._reselection is None or self._reselection.done():
            self._reselection = self._crew.spawn(self._reselect())

    async def _reselect(self) -> None:
        """Never raises: what serves goes on."""
        generation = self._post.active
        try:
            # Before the lock: who holds it counts as busy, and is not asked to make room.
            if generation is None or not await self._selector.outdated(generation):
                return
            async with self._post.lock:
                old = self._crew.worker
                if old is None or self._post.active is not generation or self._post.closing:
                    return
                worker, same = await self.loaded(generation, asked=False, choose=True)
                if not same:
                    await self._replace(old, worker, "it is the best variant here now")
        except EdgeError as error:
            self._parts.emit("selection_failed", str(error), level="warning", code=error.code)

    def cancel(self) -> bool:
        """But for one that switches already, unless the daemon stops; whether there was one."""
        task = self._reselection
        return task is not None and task is not self._post.spared and task.cancel()

    # -- a smaller one, while the device is hot ----------------------------------------------------

    def slim(self, wanted: bool) -> None:
        """Serve through the next smaller variant, or through the best again. May be called at any
        time: loads do so at once, and what serves is replaced a moment later; what did not succeed
        is tried again after FIT_AGAIN_S.
        """
        self._selector.slim = wanted
        self._slimmed = self._slimmed or wanted
        worker = self._crew.worker
        if worker is None or not worker.serving or self._post.lock.locked() or not self._slimmed:
            return
        again = 0 < self._fit_again_ns <= self._parts.clock.monotonic_ns()
        if again or self._fitted != (worker, wanted):
            self._fitted, self._fit_again_ns = (worker, wanted), 0
            self._crew.spawn(self._fit())

    async def _fit(self) -> None:
        """Have the variant serve that is to serve now. Never raises: what serves goes on."""
        again_ns = self._parts.clock.monotonic_ns() + round(FIT_AGAIN_S * 1e9)
        try:
            async with self._post.lock:
                generation, old = self._post.active, self._crew.worker
                if generation is None or old is None or self._post.closing:
                    return
                if await self._selector.first(generation) in ("", old.spec.variant):
                    return
                worker = await self._selector.worker(generation, asked=False)
                if self._crew.worker is not old or worker.spec.variant == old.spec.variant:
                    self._fit_again_ns = again_ns
                    await self._crew.stop(worker)  # it died meanwhile, or no other one is fit
                    return
                weather = "hot" if self._selector.slim else "cool again"
                await self._replace(old, worker, f"the device is {weather}")
        except EdgeError as error:
            self._fit_again_ns = again_ns
            self._parts.emit("variant_not_changed", str(error), level="warning", code=error.code)

    # -- the flip ----------------------------------------------------------------------------------

    async def _replace(self, old: WorkerProcess, worker: WorkerProcess, reason: str) -> None:
        """The flip between variants of the same generation; nothing changes on disk."""
        self._post.switching = asyncio.current_task()
        try:
            self._crew.worker = worker
            self._post.stand("ready", reason)
            self._recovery.cancel()  # of the old one, if it has died meanwhile
            self._candidates.introduce()
            moved = await self._crew.hand_back(old)
            await self._crew.stop(old)
        finally:
            self._post.switching = None
        self._recovery.seated(worker)
        self._parts.emit(
            "variant_changed",
            f"{worker.spec.variant} serves instead of {old.spec.variant}: {reason};"
            f" {moved} connections moved",
            version=worker.spec.version,
            variant=worker.spec.variant,
            connections=moved,
        )
