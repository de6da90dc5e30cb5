"""One model on this device: which generation serves, and what it says of itself.

Law of this file: the order of steps of activate, roll back, unload, rest and end; only here does
`active` change. It changes under the model's lock, on disk first (`switches`) and in memory after;
a step that fails leaves what served before serving. What follows from a death is in `recovery`,
which variant serves in `variants`; workers come from `loading`, and `crew` ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from edge_runtime.daemon import residency
from edge_runtime.daemon.candidate import Candidates
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.loading import Loader
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.post import Post
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.recovery import Recovery
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.selecting import Selector
from edge_runtime.daemon.switches import Switches
from edge_runtime.daemon.trial import Trial
from edge_runtime.daemon.variants import Variants
from edge_runtime.errors import EdgeError, NotFoundError, UnavailableError
from edge_runtime.serving.health import Death
from edge_runtime.store import Generation, Store, Switch


class Change(NamedTuple):
    """What an activation, rollback or unload did."""

    switch: Switch
    version: int
    variant: str
    moved: int  # connections handed over
    swap_ms: float  # from the flip until the last connection was handed over
    freed_bytes: int  # private memory of the processes that ended
    warm: bool  # the worker was already loaded


class Deployment:
    """A model by name. Public coroutines may be called at any time; they take turns."""

    def __init__(self, parts: Parts) -> None:
        self.name = parts.name
        self._parts = parts
        self._clock = parts.clock
        self._config = parts.worker_config
        self._post = Post(parts)
        self._switches = Switches(parts)
        self._crew = Crew(parts)
        self._loader = Loader(parts, self._crew, self._died)
        self._selector = Selector(parts, self._crew, self._loader)
        self._candidates = Candidates(parts, self._crew, self._selector)
        self._recovery = Recovery(
            parts, self._crew, self._post, self._selector, self._candidates, self._fall_back
        )
        self._variants = Variants(
            parts, self._crew, self._post, self._selector, self._candidates, self._recovery
        )

    @property
    def state(self) -> str:
        """See Post."""
        return self._post.state

    @property
    def restarts(self) -> int:
        """See Post."""
        return self._post.restarts

    @property
    def worker(self) -> WorkerProcess | None:
        """The one that serves."""
        return self._crew.worker

    @property
    def trial(self) -> Trial | None:
        """Of the candidate, or the last one."""
        return self._crew.trial

    @property
    def candidate(self) -> WorkerProcess | None:
        """The worker of the version that is tried beside the active one."""
        return self._crew.candidate

    def workers(self) -> list[tuple[WorkerProcess, str]]:
        """Those that can answer, with what they are: active, warm, candidate."""
        return self._crew.roles()

    # -- what is asked of it ----------------------------------------------------------------------

    async def resume(self) -> None:
        """After a start of the daemon: serve what the store says is active. Never raises."""
        self._recovery.resumes()
        try:
            async with self._post.lock:
                number = await self._switches.active()
                if number is None:
                    return
                self._post.active = await self._switches.generation(number)
                await self._recovery.restart(asked=False)
        except EdgeError as error:
            await self._recovery.unreadable(error)
        self._variants.reselect_if_due()

    async def activate(self, generation: Generation, reason: str) -> Change:
        """Make a generation the one that serves; the one before stays if this one fails.

        Raises:
            ModelError: no variant of it loads and keeps its goldens.
            EdgeError: the store could not switch.
        """
        async with self._superseding():
            return await self._serve(
                generation,
                lambda store: store.activate(self.name, generation.number, reason),
                reason,
                choose=True,
            )

    async def rollback(self, reason: str) -> Change:
        """Make the previous generation the one that serves.

        Raises:
            ConflictError: there is none.
            ModelError: it does not load any more; the present one goes on.
        """
        async with self._superseding():
            generation = await self._switches.previous()
            return await self._serve(
                generation, lambda store: store.rollback(self.name, reason), reason, choose=False
            )

    async def unload(self) -> Change:
        """Stop serving the model, for good until it is activated again.

        Raises:
            NotFoundError: the model is not installed.
        """
        async with self._superseding():
            active = self._post.active
            switch = await self._switches.switch(
                active, None, lambda store: store.deactivate(self.name)
            )
            self._recovery.cancel()  # of a worker that died meanwhile
            version = active.version if active else 0
            variant = self.worker.spec.variant if self.worker else ""
            workers = [worker for worker, _ in self.workers()]
            self._candidates.end("the model was unloaded")
            self._crew.worker = self._crew.warm = None
            self._post.active = None
            self._post.stand("stopped", "unloaded")
            moved = sum(await asyncio.gather(*(self._crew.hand_back(one) for one in workers)))
            freed = sum([await self._crew.stop(one) for one in workers])
            await self._switches.settle()
            self._parts.emit(
                "model_unloaded", f"unloaded, {freed} bytes came back", freed_bytes=freed
            )
            return Change(switch, version, variant, moved, 0.0, freed, False)

    async def close(self) -> None:
        """The daemon stops: answer what is in flight, end the workers, change nothing on disk."""
        self._post.closing = True
        self._recovery.cancel()
        self._variants.cancel()
        workers = [worker for worker, _ in self.workers()]
        self._candidates.end("the daemon stops")
        self._crew.worker = self._crew.warm = None
        await asyncio.gather(*(self._crew.hand_back(one) for one in workers))
        await asyncio.gather(*(self._crew.stop(one) for one in workers))
        await self._crew.departed()

    @property
    def busy(self) -> bool:
        """Whether a change of this model is under way."""
        return self._post.lock.locked()

    # -- in memory only while it is needed --------------------------------------------------------

    def wake(self) -> asyncio.Task[Any] | None:
        """Load an idle model again because somebody asks. As `Recovery.wake`."""
        return self._recovery.wake(self._variants.reselect_if_due)

    def sleep(self, reason: str) -> asyncio.Task[int]:
        """Unload the model until it is asked for again; done with the bytes that came back.

        From the call on requests wait for the next load, which need not wait for this end.
        """
        leaving = [worker for worker, _ in self.workers()]
        self._candidates.end(f"the model rests: {reason}")
        self._crew.worker = self._crew.warm = None
        self._post.stand("idle", reason)
        return self._crew.depart(leaving, "model_idle", reason)

    def cool(self) -> asyncio.Task[int]:
        """End the warm previous version, or else the candidate; done with the bytes that came
        back.
        """
        candidate = self.candidate
        if self._crew.warm is None and candidate is not None:
            self._candidates.end("its memory was needed")
            return self._crew.depart([candidate], "candidate_unloaded", "the candidate made room")
        leaving = [self._crew.warm] if self._crew.warm is not None else []
        self._crew.warm = None
        return self._crew.depart(
            leaving, "previous_unloaded", "the previous version gave its memory up"
        )

    def in_use(self) -> set[int]:
        """The generations of its workers, also of those that are being loaded."""
        return {worker.spec.generation for worker in self._crew.living()}

    def forget(self, number: int) -> None:
        """A generation was removed: nothing is remembered of it."""
        self._selector.forget(number)
        self._crew.forget(number)

    def residents(self, newcomer: str = "") -> list[Resident]:
        """Its workers with their memory, as they concern a load of the model `newcomer`."""
        return self._crew.residents(own=newcomer == self.name, busy=self.busy)

    def not_ready(self) -> UnavailableError:
        """What a client is told whose request cannot be served now."""
        if self._post.state == "idle" and self._recovery.refusal is not None:
            return self._recovery.refusal
        lasting = self._post.state in ("failed", "stopped") and not self._loader.under_way
        return UnavailableError(
            f"{self.name} is not ready",
            where=self.name,
            remedy=f"see `edge-runtime why {self.name}`",
            retry_after_s=1.0 if lasting else 0.02,
        )

    def serving(self, version: str) -> WorkerProcess | None:
        """The worker for a requested version or label, if there is one now.

        "" and "stable" are the active version, "previous" the warm one, "candidate" the one on
        trial.

        Raises:
            NotFoundError: that version is neither active nor warm nor the candidate.
        """
        worker, active = self.worker, self._post.active
        if active is None:  # not known yet (the daemon starts), or unloaded
            return None
        if version in ("", "stable", str(active.version)):
            return worker if worker is not None and worker.reachable else None
        others = [one for one in (self._crew.warm, self.candidate) if one and one.reachable]
        for other in others:
            if version in (self._crew.label(other), str(other.spec.version)):
                return other
        raise NotFoundError(
            f"version {version!r} of {self.name} is not loaded",
            where=self.name,
            expected=str(active.version),
            remedy="leave the version empty for the active one",
        )

    def check(self, oom_kills: int) -> None:
        """Look after the workers, those on their way out too: kill one that hangs; unload the model
        when nobody asks.
        """
        self._rest_if_idle()
        limit_s = self._config.run_time_max_ms / 1000
        if self.trial is not None:
            self.trial.tidy()
        for worker in self._crew.living():
            if worker.serving:
                worker.note_oom_kills(oom_kills)
                running_s = worker.running_s()
                if running_s > limit_s:
                    worker.kill(hung_for_s=running_s)

    @contextlib.asynccontextmanager
    async def _superseding(self) -> AsyncIterator[None]:
        """The lock, at once: a recovery or selection under way, however slow its loads, makes way
        for a command.

        If the command fails, they start again.
        """
        stopped = self._variants.cancel()
        if self._post.active is not None:
            self._recovery.cancel()
        async with self._post.lock:
            try:
                yield
            except EdgeError:
                if stopped:
                    self._variants.reselect_if_due()
                self._recovery.plan_if_missing()
                raise

    def _rest_if_idle(self) -> None:
        self._crew.refresh_use()
        worker, keep_s = self.worker, self._config.keep_alive_s
        if worker is None or not worker.serving or self.busy:
            return
        if residency.is_idle(self._crew.last_used_ns, self._clock.monotonic_ns(), keep_s):
            self.sleep(f"not asked for {keep_s:g} s")

    # -- switching --------------------------------------------------------------------------------

    async def _serve(
        self, generation: Generation, step: Callable[[Store], Switch], reason: str, *, choose: bool
    ) -> Change:
        """Load a generation, have `step` say on the disk that it serves, and have it serve.

        A recovery that has come so far is not cancelled any more: disk and memory would differ.
        """
        worker, warm = await self._variants.loaded(generation, asked=True, choose=choose)
        self._post.switching = asyncio.current_task()
        try:
            try:
                switch = await self._switches.switch(self._post.active, generation, step)
            except EdgeError:
                if not warm:  # what serves, or may be rolled back to, stays
                    await self._crew.stop(worker)
                raise
            return await self._take_over(generation, worker, switch, warm, reason)
        finally:
            self._post.switching = None

    async def _take_over(
        self, generation: Generation, worker: WorkerProcess, switch: Switch, warm: bool, reason: str
    ) -> Change:
        """The flip: from here on `worker` gets every connection."""
        before = {one for one, _ in self.workers()} - {worker}
        promoted = worker is self.candidate
        self._candidates.end(
            "promoted" if promoted else f"version {generation.version} was activated"
        )
        self._post.active = generation
        keep_warm = self._config.keep_previous_warm and switch.previous is not None
        old = self._crew.seat(worker, keep_warm=keep_warm)
        worker.promote()
        self._post.stand("ready", reason)
        self._recovery.supersede()
        flipped_ns = self._clock.monotonic_ns()
        leaving = [one for one in before if one is old or one is not self._crew.warm]
        self._crew.note_leaving(*(one for one in before if one is not self._crew.warm))
        moved = sum(await asyncio.gather(*(self._crew.hand_back(one) for one in leaving)))
        swap_ms = (self._clock.monotonic_ns() - flipped_ns) / 1e6
        await self._switches.settle()
        freed = sum([await self._crew.stop(one) for one in before if one is not self._crew.warm])
        self._parts.emit(
            "model_activated",
            f"{self.name}@{generation.version} serves ({reason});"
            f" {moved} connections moved in {swap_ms:.1f} ms",
            version=generation.version,
            generation=generation.number,
            variant=worker.spec.variant,
            connections=moved,
        )
        self._recovery.seated(worker)
        return Change(switch, generation.version, worker.spec.variant, moved, swap_ms, freed, warm)

    # -- a candidate beside it --------------------------------------------------------------------

    async def accompany(
        self, generation: Generation, shadow: float | None, split: float | None
    ) -> Trial:
        """Load a candidate, or change the shares of the one there is. As `Candidates.accompany`."""
        async with self._post.lock:
            return await self._candidates.accompany(self._post.active, generation, shadow, split)

    async def stop_trial(self) -> Trial:
        """End the candidate. As `Candidates.stop`."""
        async with self._post.lock:
            return await self._candidates.stop()

    async def promote(self) -> Change:
        """Make the candidate the active version.

        Raises:
            ConflictError: there is none.
            EdgeError: the store could not switch; the candidate stays one.
        """
        candidate = self.candidate
        if candidate is None:
            raise self._candidates.missing()
        generation = await self._switches.generation(candidate.spec.generation)
        return await self.activate(generation, "promoted")

    # -- what the others have it do ----------------------------------------------------------------

    def slim(self, wanted: bool) -> None:
        """Serve through the next smaller variant, or the best again. As `Variants.slim`."""
        self._variants.slim(wanted)

    def _died(self, worker: WorkerProcess, death: Death) -> None:
        self._recovery.died(worker, death)

    async def _fall_back(self, reason: str) -> int:
        return (await self.rollback(reason)).version

    # -- what it says of itself -------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """State, active version and variant, for `models`."""
        worker, active = self.worker, self._post.active
        return {
            "name": self.name,
            "state": self._post.state,
            "reason": self._post.reason,
            "active": self._describe_generation(active, worker) if active else None,
            "device": worker.device if worker is not None else "",
            "restarts": self.restarts,
            "left": self._selector.left(active.number) if active else [],
            "loading": self._loader.describe(),
            "candidate": self.trial.describe() if self.trial and self.trial.live else None,
        }

    def decision(self) -> dict[str, Any] | None:
        """Which of the active generation's variants may serve, and why; None: there is no choice,
        or nothing was decided yet.
        """
        active = self._post.active
        return self._selector.describe(active.number) if active is not None else None

    def _describe_generation(
        self, generation: Generation, worker: WorkerProcess | None
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {"version": generation.version, "generation": generation.number}
        if worker is not None:
            facts |= {
                "label": worker.spec.label,
                "variant": worker.spec.variant,
                "backend": worker.spec.backend,
                "backend_version": worker.backend_version,
                "placement": worker.report.placement if worker.report else [],
                "cpu_fallback": worker.report.cpu_fallback if worker.report else "",
            }
        return facts
