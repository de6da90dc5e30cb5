"""One model on this device: which generation serves, through which worker, and what if it dies.

Law of this file: the order of steps of activate, roll back, unload and recover. The state of a
model changes under its lock only, on disk first and in memory after; a step that fails leaves what
served before serving. Verdicts about deaths come from `serving.health`, workers from `loading`, and
`crew` ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from edge_runtime.daemon import residency, specs
from edge_runtime.daemon.candidate import Candidates
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.loading import Loader
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.selecting import Selector
from edge_runtime.daemon.trial import Trial
from edge_runtime.errors import (
    ConflictError,
    EdgeError,
    NoMemoryError,
    NotFoundError,
    UnavailableError,
)
from edge_runtime.serving import health, standing
from edge_runtime.serving.health import Cause, Death
from edge_runtime.store import Generation, Store, Switch

# A variant that had no room, or failed, may be fit later: heat and want of memory come together.
FIT_AGAIN_S = 60.0
# How many deaths are remembered: more than any sensible deaths_max.
DEATHS_KEPT = 1000


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
        self.active: Generation | None = None
        self.state = "stopped"  # stopped, loading, ready, idle, backoff, failed
        self.reason = ""
        self.restarts = 0
        self._parts = parts
        self._shelf = parts.shelf
        self._clock = parts.clock
        self._config = parts.worker_config
        self._crew = Crew(parts)
        self._loader = Loader(parts, self._crew, self._died)
        self._selector = Selector(parts, self._crew, self._loader)
        self._candidates = Candidates(parts, self._crew, self._selector)
        self._lock = asyncio.Lock()
        self._waking: asyncio.Task[Any] | None = None
        self._refusal: NoMemoryError | None = None
        self._refused_until_ns = 0
        self._deaths_ns: list[int] = []
        self._recovery: asyncio.Task[Any] | None = None
        self._reselection: asyncio.Task[Any] | None = None
        self._slimmed = False  # `slim` wanted something, once
        self._fitted: tuple[WorkerProcess, bool] | None = None  # seen by `slim`, and what it wanted
        self._fit_again_ns = 0  # when to try that again; 0: not
        self._switching: asyncio.Task[Any] | None = None  # between disk and memory just now
        self._closing = False

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
        self._recovery = asyncio.current_task()
        try:
            async with self._lock:
                switch = await self._shelf.read(lambda store: store.current(self.name))
                if switch.active is None:
                    return
                self.active = await self._generation(switch.active)
                await self._restart(asked=False)
        except EdgeError as error:  # its record cannot be read: nothing is known of it
            self._fail(error)
            await self._fall_back(f"it cannot be read: {error}")
        self._reselect_if_due()

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
            generation = await self._shelf.read(self._previous)
            return await self._serve(
                generation, lambda store: store.rollback(self.name, reason), reason, choose=False
            )

    async def unload(self) -> Change:
        """Stop serving the model, for good until it is activated again.

        Raises:
            NotFoundError: the model is not installed.
        """
        async with self._superseding():
            switch = await self._switched(None, lambda store: store.deactivate(self.name))
            self._cancel_recovery()  # of a worker that died meanwhile
            version = self.active.version if self.active else 0
            variant = self.worker.spec.variant if self.worker else ""
            workers = [worker for worker, _ in self.workers()]
            self._candidates.end("the model was unloaded")
            self._crew.worker = self._crew.warm = None
            self.active, self.state, self.reason = None, "stopped", "unloaded"
            moved = sum(await asyncio.gather(*(self._crew.hand_back(one) for one in workers)))
            freed = sum([await self._crew.stop(one) for one in workers])
            await self._settle()
            self._parts.emit(
                "model_unloaded", f"unloaded, {freed} bytes came back", freed_bytes=freed
            )
            return Change(switch, version, variant, moved, 0.0, freed, False)

    async def close(self) -> None:
        """The daemon stops: answer what is in flight, end the workers, change nothing on disk."""
        self._closing = True
        self._cancel_recovery()
        self._cancel_reselection()
        workers = [worker for worker, _ in self.workers()]
        self._candidates.end("the daemon stops")
        self._crew.worker = self._crew.warm = None
        await asyncio.gather(*(self._crew.hand_back(one) for one in workers))
        await asyncio.gather(*(self._crew.stop(one) for one in workers))
        await self._crew.departed()

    @property
    def busy(self) -> bool:
        """Whether a change of this model is under way."""
        return self._lock.locked()

    # -- in memory only while it is needed --------------------------------------------------------

    def wake(self) -> asyncio.Task[Any] | None:
        """Load an idle model again because somebody asks; None: it is not idle, or it was refused
        memory a moment ago.
        """
        if self._waking is None or self._waking.done():
            refused = self._clock.monotonic_ns() < self._refused_until_ns
            if self.state != "idle" or refused or self._closing:
                return None
            self._waking = self._crew.spawn(self._wake())
        return self._waking

    async def _wake(self) -> None:
        async with self._lock:
            if self.state == "idle" and self.active is not None:
                self.reason = "asked for again"
                await self._restart(asked=True)
        self._reselect_if_due()

    def sleep(self, reason: str) -> asyncio.Task[int]:
        """Unload the model until it is asked for again; done with the bytes that came back.

        From the call on requests wait for the next load, which need not wait for this end.
        """
        leaving = [worker for worker, _ in self.workers()]
        self._candidates.end(f"the model rests: {reason}")
        self._crew.worker = self._crew.warm = None
        self.state, self.reason = "idle", reason
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

    def residents(self, newcomer: str = "") -> list[Resident]:
        """Its workers with their memory, as they concern a load of the model `newcomer`."""
        return self._crew.residents(own=newcomer == self.name, busy=self.busy)

    def not_ready(self) -> UnavailableError:
        """What a client is told whose request cannot be served now."""
        if self.state == "idle" and self._refusal is not None:
            return self._refusal
        lasting = self.state in ("failed", "stopped") and not self._loader.under_way
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
        worker = self.worker
        if self.active is None:  # not known yet (the daemon starts), or unloaded
            return None
        if version in ("", "stable", str(self.active.version)):
            return worker if worker is not None and worker.reachable else None
        for other, label in ((self._crew.warm, "previous"), (self.candidate, "candidate")):
            if (
                other is not None
                and other.reachable
                and version in (label, str(other.spec.version))
            ):
                return other
        raise NotFoundError(
            f"version {version!r} of {self.name} is not loaded",
            where=self.name,
            expected=str(self.active.version),
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
        stopped = self._cancel_reselection()
        if self.active is not None:
            self._cancel_recovery()
        async with self._lock:
            try:
                yield
            except EdgeError:
                if stopped:
                    self._reselect_if_due()
                recovers = self._recovery is not None and not self._recovery.done()
                missing = self.worker is None and self.state != "idle"
                if self.active is not None and missing and not recovers:
                    self.state = "backoff"
                    self._plan_recovery()
                raise

    def _rest_if_idle(self) -> None:
        self._crew.refresh_use()
        worker, keep_s = self.worker, self._config.keep_alive_s
        if worker is None or not worker.serving or self.busy:
            return
        if residency.is_idle(self._crew.last_used_ns, self._clock.monotonic_ns(), keep_s):
            self.sleep(f"not asked for {keep_s:g} s")

    # -- loading ----------------------------------------------------------------------------------

    async def _generation(self, number: int) -> Generation:
        return await self._shelf.read(lambda store: store.generation(self.name, number))

    def _previous(self, store: Store) -> Generation:
        number = store.current(self.name).previous
        if number is None:
            raise ConflictError(
                f"{self.name} has no previous generation", remedy="activate a version instead"
            )
        return store.generation(self.name, number)

    async def _serve(
        self, generation: Generation, step: Callable[[Store], Switch], reason: str, *, choose: bool
    ) -> Change:
        """Load a generation, have `step` say on the disk that it serves, and have it serve.

        A recovery that has come so far is not cancelled any more: disk and memory would differ.
        """
        worker, warm = await self._loaded(generation, asked=True, choose=choose)
        self._switching = asyncio.current_task()
        try:
            try:
                switch = await self._switched(generation, step)
            except EdgeError:
                if not warm:  # what serves, or may be rolled back to, stays
                    await self._crew.stop(worker)
                raise
            return await self._take_over(generation, worker, switch, warm, reason)
        finally:
            self._switching = None

    async def _switched(
        self, generation: Generation | None, step: Callable[[Store], Switch]
    ) -> Switch:
        """Have the disk say that this generation serves (None: that none does).

        When it says so although the step failed (the slot has its name, and the directory was not
        synced), that holds: what serves in memory must be what a restart finds.
        """
        before = self.active.number if self.active is not None else None
        try:
            return await self._shelf.switch(step)
        except EdgeError as error:
            switch = await self._shelf.read(lambda store: store.current(self.name))
            after = generation.number if generation is not None else None
            if switch.active != after or after == before:
                raise
            what = f"{self.name}@{generation.version} serves" if generation else "nothing serves"
            self._parts.emit(
                "switch_not_synced",
                f"{what}; a power cut may bring the version before back: {error}",
                level="error",
                code=error.code,
            )
            return switch

    async def _settle(self) -> None:
        """Copy the switch, now that nobody waits for it. Without the copy it stands as well."""
        try:
            await self._shelf.switch(lambda store: store.settle(self.name))
        except EdgeError as error:
            self._parts.emit("switch_not_copied", str(error), level="warning", code=error.code)

    async def _loaded(
        self, generation: Generation, *, asked: bool, choose: bool
    ) -> tuple[WorkerProcess, bool]:
        """A ready worker for a generation, and whether it was at hand.

        Args:
            asked: somebody wants it now.
            choose: decide about its variants first, where that is due.
        """
        at_hand = [one for one, _ in self.workers() if one.serving]
        at_hand = [one for one in at_hand if one.spec.generation == generation.number]
        if at_hand and not (choose and await self._selector.due(generation)):
            return at_hand[0], True
        served = self.worker is not None
        worker = await self._selector.worker(
            generation,
            asked=asked,
            choose=choose,
            hurry=lambda: served and self.worker is None,  # what served has died meanwhile
        )
        for one in at_hand:
            if one.serving and one.spec.variant == worker.spec.variant:
                await self._crew.stop(worker)
                return one, True
        return worker, False

    # -- variants ---------------------------------------------------------------------------------

    def _reselect_if_due(self) -> None:
        """Decide again, beside what serves, when the machine is not the one that was measured."""
        if self._reselection is None or self._reselection.done():
            self._reselection = self._crew.spawn(self._reselect())

    async def _reselect(self) -> None:
        """Never raises: what serves goes on."""
        generation = self.active
        try:
            # Before the lock: who holds it counts as busy, and is not asked to make room.
            if generation is None or not await self._selector.outdated(generation):
                return
            async with self._lock:
                old = self.worker
                if old is None or self.active is not generation or self._closing:
                    return
                worker, same = await self._loaded(generation, asked=False, choose=True)
                if not same:
                    await self._replace(old, worker, "it is the best variant here now")
        except EdgeError as error:
            self._parts.emit("selection_failed", str(error), level="warning", code=error.code)

    def slim(self, wanted: bool) -> None:
        """Serve through the next smaller variant, or through the best again. May be called at any
        time: loads do so at once, and what serves is replaced a moment later; what did not succeed
        is tried again after FIT_AGAIN_S.
        """
        self._selector.slim = wanted
        self._slimmed = self._slimmed or wanted
        worker = self.worker
        if worker is None or not worker.serving or self.busy or not self._slimmed:
            return
        again = 0 < self._fit_again_ns <= self._clock.monotonic_ns()
        if again or self._fitted != (worker, wanted):
            self._fitted, self._fit_again_ns = (worker, wanted), 0
            self._crew.spawn(self._fit())

    async def _fit(self) -> None:
        """Have the variant serve that is to serve now. Never raises: what serves goes on."""
        again_ns = self._clock.monotonic_ns() + round(FIT_AGAIN_S * 1e9)
        try:
            async with self._lock:
                generation, old = self.active, self.worker
                if generation is None or old is None or self._closing:
                    return
                if await self._selector.first(generation) in ("", old.spec.variant):
                    return
                worker = await self._selector.worker(generation, asked=False)
                if self.worker is not old or worker.spec.variant == old.spec.variant:
                    self._fit_again_ns = again_ns
                    await self._crew.stop(worker)  # it died meanwhile, or no other one is fit
                    return
                weather = "hot" if self._selector.slim else "cool again"
                await self._replace(old, worker, f"the device is {weather}")
        except EdgeError as error:
            self._fit_again_ns = again_ns
            self._parts.emit("variant_not_changed", str(error), level="warning", code=error.code)

    async def _replace(self, old: WorkerProcess, worker: WorkerProcess, reason: str) -> None:
        """The flip between variants of the same generation; nothing changes on disk."""
        self._switching = asyncio.current_task()
        try:
            self._crew.worker = worker
            self.state, self.reason = "ready", reason
            self._cancel_recovery()  # of the old one, if it has died meanwhile
            self._candidates.introduce()
            moved = await self._crew.hand_back(old)
            await self._crew.stop(old)
        finally:
            self._switching = None
        self._seated(worker)
        self._parts.emit(
            "variant_changed",
            f"{worker.spec.variant} serves instead of {old.spec.variant}: {reason};"
            f" {moved} connections moved",
            version=worker.spec.version,
            variant=worker.spec.variant,
            connections=moved,
        )

    # -- switching --------------------------------------------------------------------------------

    async def _take_over(
        self, generation: Generation, worker: WorkerProcess, switch: Switch, warm: bool, reason: str
    ) -> Change:
        """The flip: from here on `worker` gets every connection."""
        before = {one for one, _ in self.workers()} - {worker}
        promoted = worker is self.candidate
        self._candidates.end(
            "promoted" if promoted else f"version {generation.version} was activated"
        )
        self.active, self._refusal = generation, None
        keep_warm = self._config.keep_previous_warm and switch.previous is not None
        old = self._crew.seat(worker, keep_warm=keep_warm)
        worker.promote()
        self.state, self.reason = "ready", reason
        self._deaths_ns.clear()
        self._cancel_recovery()
        flipped_ns = self._clock.monotonic_ns()
        leaving = [one for one in before if one is old or one is not self._crew.warm]
        self._crew.note_leaving(*(one for one in before if one is not self._crew.warm))
        moved = sum(await asyncio.gather(*(self._crew.hand_back(one) for one in leaving)))
        swap_ms = (self._clock.monotonic_ns() - flipped_ns) / 1e6
        await self._settle()
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
        self._seated(worker)
        return Change(switch, generation.version, worker.spec.variant, moved, swap_ms, freed, warm)

    # -- a candidate beside it --------------------------------------------------------------------

    async def accompany(
        self, generation: Generation, shadow: float | None, split: float | None
    ) -> Trial:
        """Load a candidate, or change the shares of the one there is. As `Candidates.accompany`."""
        async with self._lock:
            return await self._candidates.accompany(self.active, generation, shadow, split)

    async def stop_trial(self) -> Trial:
        """End the candidate. As `Candidates.stop`."""
        async with self._lock:
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
        generation = await self._generation(candidate.spec.generation)
        return await self.activate(generation, "promoted")

    # -- deaths -----------------------------------------------------------------------------------

    def _died(self, worker: WorkerProcess, death: Death) -> None:
        if self._closing:
            return
        self._parts.emit(
            "worker_died",
            f"{self.name}@{worker.spec.version} {worker.spec.variant}: {death.detail}",
            level="error",
            version=worker.spec.version,
            variant=worker.spec.variant,
            cause=str(death.cause),
            pid=worker.pid,
            serving=worker is self.worker,
        )
        self._lost(worker, death)

    def _seated(self, worker: WorkerProcess) -> None:
        """A worker has its role: see to one that died before, while somebody waited for the disk,
        and was nobody's then.
        """
        if not worker.alive and not self._closing:
            self._lost(worker, worker.ended.result())

    def _lost(self, worker: WorkerProcess, death: Death) -> None:
        """What follows from the death of a worker with the role that it has, if it has one."""
        if worker is self._crew.warm:
            self._crew.warm = None
        if worker is self.candidate:
            self._candidates.end(f"the candidate died: {death.detail}", level="error")
        if worker is self.worker:
            self._crew.worker = None
            self.state, self.reason = "backoff", death.detail
            if death.cause is Cause.NEIGHBOUR:  # whoever it was is counted; this one is not
                self._recovery = self._crew.spawn(self._recover(health.Verdict(0.0, False)))
            elif not self._leave_variant(worker, death):
                self._after_death()

    def _leave_variant(self, worker: WorkerProcess, death: Death) -> bool:
        """Have the next variant take over when this one is not to be trusted; whether it does."""
        now_ns, rules = self._clock.monotonic_ns(), self._config.restart
        horizon_ns = now_ns - round(rules.window_s * 1e9)
        deaths = 1 + sum(at_ns >= horizon_ns for at_ns in self._deaths_ns)
        following = self._selector.another(worker)
        if not following or not standing.must_leave(death.cause, deaths, rules.variant_deaths_max):
            return False
        self._deaths_ns.clear()  # they were this variant's
        self._selector.leave(worker.spec.generation, worker.spec.variant, death.detail, death.cause)
        self._recovery = self._crew.spawn(self._fail_over(worker, death, now_ns))
        return True

    async def _fail_over(self, worker: WorkerProcess, death: Death, died_ns: int) -> None:
        """The next variant of the same generation; the previous generation only after the last."""
        generation = self.active
        async with self._lock:
            if self.active is not generation or self.worker is not None or self._closing:
                return
            self.restarts += 1
            following = await self._restart(asked=False)
            if following is None:
                return
            gap_ms = (self._clock.monotonic_ns() - died_ns) / 1e6
            self._parts.emit(
                "variant_failed_over",
                f"{following.spec.variant} answers instead of {worker.spec.variant},"
                f" {gap_ms:.0f} ms after its end ({death.detail})",
                level="error",
                version=following.spec.version,
                variant=following.spec.variant,
                left=worker.spec.variant,
                cause=str(death.cause),
                gap_ms=round(gap_ms, 3),
            )

    def _after_death(self) -> None:
        """Count a death of the active generation and plan what comes next."""
        self._deaths_ns = [*self._deaths_ns, self._clock.monotonic_ns()][-DEATHS_KEPT:]
        self._plan_recovery()

    def _plan_recovery(self) -> None:
        now_ns = self._clock.monotonic_ns()
        verdict = health.after_death(self._deaths_ns, now_ns, specs.restart_policy(self._config))
        if not self._closing:
            self._recovery = self._crew.spawn(self._recover(verdict))

    async def _recover(self, verdict: health.Verdict) -> None:
        generation = self.active
        if verdict.give_up and await self._fall_back(
            f"died {len(self._deaths_ns)} times: {self.reason}"
        ):
            return
        await asyncio.sleep(verdict.restart_after_s)
        async with self._lock:
            if generation is not None and self.active is generation and self.worker is None:
                self.restarts += 1
                await self._restart(asked=False)

    async def _restart(self, asked: bool) -> WorkerProcess | None:
        """Load the active generation again; a failure counts as a death. Never raises."""
        assert self.active is not None
        self.state = "loading"
        try:
            worker = self._crew.worker = await self._selector.worker(self.active, asked=asked)
        except NoMemoryError as error:  # nothing is wrong with it: it waits until it is asked for
            self.state, self.reason = "idle", str(error)
            if asked:
                self._refuse(error)
        except EdgeError as error:
            self._fail(error)
            self._after_death()
        else:
            self.state, self.reason, self._refusal = "ready", self.reason or "started", None
            self._candidates.introduce()
            self._seated(worker)
        return self.worker

    def _refuse(self, error: NoMemoryError) -> None:
        """Whoever asks until its time to retry gets the same answer, without another attempt."""
        self._refusal = error
        retry_after_ns = round((error.retry_after_s or 0.0) * 1e9)
        self._refused_until_ns = self._clock.monotonic_ns() + retry_after_ns

    async def _fall_back(self, what: str) -> bool:
        """The previous generation takes over from one that cannot serve. Whether it could.

        Args:
            what: happened to that one.
        """
        bad = f"{self.name}@{self.active.version}" if self.active else "the active version"
        try:
            change = await self.rollback(f"{bad}: {what}")
        except EdgeError as error:
            self._fail(error, keep_reason=isinstance(error, ConflictError))
            return False
        self._parts.emit(
            "fell_back",
            f"{self.name}@{change.version} took over from a generation that could not serve",
            level="error",
            version=change.version,
        )
        return True

    def _fail(self, error: EdgeError, keep_reason: bool = False) -> None:
        self.state = "failed"
        if not keep_reason:
            self.reason = str(error)
            self._parts.emit("model_failed", str(error), level="error", code=error.code)

    def _cancel_reselection(self) -> bool:
        """But for one that switches already, unless the daemon stops; whether there was one."""
        task, spared = self._reselection, None if self._closing else self._switching
        return task is not None and task is not spared and task.cancel()

    def _cancel_recovery(self) -> None:
        """But for one that switches already, unless the daemon stops."""
        spared = asyncio.current_task(), None if self._closing else self._switching
        if self._recovery is not None and self._recovery not in spared:
            self._recovery.cancel()
            self._recovery = None
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None

    # -- what it says of itself -------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """State, active version and variant, for `models`."""
        worker = self.worker
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "active": self._describe_generation(self.active, worker) if self.active else None,
            "device": worker.device if worker is not None else "",
            "restarts": self.restarts,
            "left": self._selector.left(self.active.number) if self.active else [],
            "loading": self._loader.describe(),
            "candidate": self.trial.describe() if self.trial and self.trial.live else None,
        }

    def decision(self) -> dict[str, Any] | None:
        """Which of the active generation's variants may serve, and why; None: there is no choice,
        or nothing was decided yet.
        """
        return self._selector.describe(self.active.number) if self.active is not None else None

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
