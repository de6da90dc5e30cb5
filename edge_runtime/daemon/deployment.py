"""One model on this device: which generation serves, through which worker, and what if it dies.

Law of this file: the order of steps of activate, roll back, unload and recover. The state of a
model changes under its lock only, on disk first and in memory after; a step that fails leaves what
served before serving. Verdicts about deaths come from `serving.health`, processes from `processes`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec

from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.clock import Clock
from edge_runtime.config import Config, WorkerConfig
from edge_runtime.daemon import memory, residency, specs
from edge_runtime.daemon.processes import Templates, WorkerProcess
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.shelf import Shelf
from edge_runtime.daemon.trial import Trial
from edge_runtime.errors import (
    ConflictError,
    EdgeError,
    ModelError,
    NoMemoryError,
    NotFoundError,
    UnavailableError,
)
from edge_runtime.events import Events, Value
from edge_runtime.serving import channel, health, page
from edge_runtime.serving.health import Cause, Death
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.store import Generation, Switch

# A worker asked to stop answers what it has first; then it is killed.
STOP_GRACE_S = 5.0
# Handing all connections over waits for their requests in flight: at most for one slow run.
DRAIN_S_MAX = 10.0
# How many deaths are remembered: more than any sensible deaths_max.
DEATHS_KEPT = 1000
# Words of a worker's page that change when somebody wants an answer of the model.
SIGNS_OF_USE = (page.REQUESTS, page.ERRORS, page.REFUSED, page.EXPIRED, page.WAITING)

T = TypeVar("T")
Returned = Callable[[channel.Returned, list[int]], None]
# Makes room for a model that needs so many bytes more, or raises NoMemoryError; the third says
# whether somebody asks for it now, so that others may have to go.
MakeRoom = Callable[[str, int, bool], Awaitable[None]]


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

    def __init__(
        self,
        name: str,
        shelf: Shelf,
        templates: Templates,
        config: Config,
        events: Events,
        clock: Clock,
        returned: Returned,
        make_room: MakeRoom,
    ) -> None:
        self.name = name
        self.active: Generation | None = None
        self.worker: WorkerProcess | None = None
        self.warm: WorkerProcess | None = None
        self.trial: Trial | None = None  # of a candidate, or the last one
        self.state = "stopped"  # stopped, loading, ready, idle, backoff, failed
        self.last_used_ns = clock.monotonic_ns()
        self.reason = ""
        self.restarts = 0
        self._shelf = shelf
        self._templates = templates
        self._config = config
        self._events = events
        self._clock = clock
        self._returned = returned
        self._make_room = make_room
        self._needs_bytes: dict[tuple[int, str], int] = {}  # measured: (generation, variant)
        self._workers: set[WorkerProcess] = set()  # every one that lives: loading and leaving too
        self._leaving: set[WorkerProcess] = set()  # of these: on their way out
        self._departures: set[asyncio.Task[int]] = set()
        self._loaded_ns = 0
        self._requests_seen = 0
        self._waking: asyncio.Task[Any] | None = None
        self._refusal: NoMemoryError | None = None
        self._refused_until_ns = 0
        self._lock = asyncio.Lock()
        self._deaths_ns: list[int] = []
        self._recovery: asyncio.Task[Any] | None = None
        self._loading: WorkerProcess | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def config(self) -> WorkerConfig:
        return self._config.worker(self.name)

    @property
    def candidate(self) -> WorkerProcess | None:
        """The worker of the version that is tried beside the active one."""
        return self.trial.candidate if self.trial is not None and self.trial.live else None

    def workers(self) -> list[tuple[WorkerProcess, str]]:
        """Those that can answer, with what they are."""
        each = ((self.worker, "active"), (self.warm, "warm"), (self.candidate, "candidate"))
        return [(worker, role) for worker, role in each if worker is not None]

    # -- what is asked of it ----------------------------------------------------------------------

    async def resume(self) -> None:
        """After a start of the daemon: serve what the store says is active. Never raises."""
        self._recovery = asyncio.current_task()
        async with self._lock:
            switch = await self._shelf.read(lambda store: store.current(self.name))
            if switch.active is None:
                return
            try:
                self.active = await self._generation(switch.active)
            except EdgeError as error:
                self._fail(error)
                return
            await self._restart(asked=False)

    async def activate(self, generation: Generation, reason: str) -> Change:
        """Make a generation the one that serves; the one before stays if this one fails.

        Raises:
            ModelError: no variant of it loads and keeps its goldens.
            EdgeError: the store could not switch.
        """
        async with self._superseding():
            worker, warm = await self._loaded(generation)
            try:
                switch = await self._shelf.call(
                    lambda store: store.activate(self.name, generation.number, reason)
                )
            except EdgeError:
                if not warm:  # what serves, or may be rolled back to, stays
                    await self._stop(worker)
                raise
            return await self._take_over(generation, worker, switch, warm, reason)

    async def rollback(self, reason: str) -> Change:
        """Make the previous generation the one that serves.

        Raises:
            ConflictError: there is none.
            ModelError: it does not load any more; the present one goes on.
        """
        async with self._superseding():
            switch = await self._shelf.read(lambda store: store.current(self.name))
            if switch.previous is None:
                raise ConflictError(
                    f"{self.name} has no previous generation", remedy="activate a version instead"
                )
            generation = await self._generation(switch.previous)
            worker, warm = await self._loaded(generation)
            try:
                switch = await self._shelf.call(lambda store: store.rollback(self.name, reason))
            except EdgeError:
                if not warm:  # what serves, or may be rolled back to, stays
                    await self._stop(worker)
                raise
            return await self._take_over(generation, worker, switch, warm, reason)

    async def unload(self) -> Change:
        """Stop serving the model, for good until it is activated again.

        Raises:
            NotFoundError: the model is not installed.
        """
        async with self._superseding():
            switch = await self._shelf.call(lambda store: store.deactivate(self.name))
            version = self.active.version if self.active else 0
            variant = self.worker.spec.variant if self.worker else ""
            workers = [worker for worker, _ in self.workers()]
            self._end_trial("the model was unloaded")
            self.worker = self.warm = None
            self.active, self.state, self.reason = None, "stopped", "unloaded"
            moved = sum(await asyncio.gather(*(self._hand_back(one) for one in workers)))
            freed = sum([await self._stop(one) for one in workers])
            self._emit("model_unloaded", f"unloaded, {freed} bytes came back", freed_bytes=freed)
            return Change(switch, version, variant, moved, 0.0, freed, False)

    async def close(self) -> None:
        """The daemon stops: answer what is in flight, end the workers, change nothing on disk."""
        self._closing = True
        self._cancel_recovery()
        workers = [worker for worker, _ in self.workers()]
        self._end_trial("the daemon stops")
        self.worker = self.warm = None
        await asyncio.gather(*(self._hand_back(one) for one in workers))
        await asyncio.gather(*(self._stop(one) for one in workers))
        if self._departures:
            await asyncio.wait(self._departures)

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
            self._waking = self._spawn(self._wake())
        return self._waking

    async def _wake(self) -> None:
        async with self._lock:
            if self.state == "idle" and self.active is not None:
                self.reason = "asked for again"
                await self._restart(asked=True)

    def sleep(self, reason: str) -> asyncio.Task[int]:
        """Unload the model until it is asked for again; done with the bytes that came back.

        From the call on requests wait for the next load, which need not wait for this end.
        """
        leaving = [worker for worker, _ in self.workers()]
        self._end_trial(f"the model rests: {reason}")
        self.worker = self.warm = None
        self.state, self.reason = "idle", reason
        return self._depart(leaving, "model_idle", reason)

    def cool(self) -> asyncio.Task[int]:
        """End the warm previous version, or else the candidate; done with the bytes that came
        back.
        """
        candidate = self.candidate
        if self.warm is None and candidate is not None:
            self._end_trial("its memory was needed")
            return self._depart([candidate], "candidate_unloaded", "the candidate made room")
        leaving = [self.warm] if self.warm is not None else []
        self.warm = None
        return self._depart(leaving, "previous_unloaded", "the previous version gave its memory up")

    def _depart(self, workers: list[WorkerProcess], event: str, reason: str) -> asyncio.Task[int]:
        """End workers that nothing refers to any more, whoever waits for it or ceases to."""
        self._note_leaving(*workers)

        async def depart() -> int:
            await asyncio.gather(*(self._hand_back(worker) for worker in workers))
            freed = sum([await self._stop(worker) for worker in workers])
            self._emit(event, f"{reason}; {freed} bytes came back", freed_bytes=freed)
            return freed

        task = self._spawn(depart())
        self._departures.add(task)
        task.add_done_callback(self._departures.discard)
        return task

    def residents(self, newcomer: str = "") -> list[Resident]:
        """Its workers with their memory, as they concern a load of the model `newcomer`."""
        self._refresh_use()
        return [self._resident(worker, newcomer == self.name) for worker in self._workers]

    def _resident(self, worker: WorkerProcess, own: bool) -> Resident:
        """`own`: it is this model that loads; its warm version may go although it is busy."""
        warm = worker is self.warm or worker is self.candidate  # nobody's answers depend on it
        held = warm or worker is self.worker
        settled = warm or residency.is_settled(self._loaded_ns, self._clock.monotonic_ns())
        taken_bytes = memory.of(worker.pid).private_bytes if worker.pid else 0
        return Resident(
            self.name,
            warm,
            taken_bytes if worker.report else max(taken_bytes, self._expected_bytes(worker.spec)),
            self.last_used_ns,
            movable=held and settled and worker.serving and (not self.busy or (own and warm)),
            leaving=worker in self._leaving,
        )

    def _expected_bytes(self, spec: WorkerSpec) -> int:
        return self._needs_bytes.get((spec.generation, spec.variant), 0)

    def not_ready(self) -> UnavailableError:
        """What a client is told whose request cannot be served now."""
        if self.state == "idle" and self._refusal is not None:
            return self._refusal
        lasting = self.state in ("failed", "stopped") and not self._loading
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
            return worker if worker is not None and worker.serving else None
        for other, label in ((self.warm, "previous"), (self.candidate, "candidate")):
            if other is not None and other.serving and version in (label, str(other.spec.version)):
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
        limit_s = self.config.run_time_max_ms / 1000
        if self.trial is not None:
            self.trial.tidy()
        for worker in self._workers:
            if worker.serving:
                worker.note_oom_kills(oom_kills)
                running_s = worker.running_s()
                if running_s > limit_s:
                    worker.kill(hung_for_s=running_s)

    @contextlib.asynccontextmanager
    async def _superseding(self) -> AsyncIterator[None]:
        """The lock, at once: a recovery under way, however slow its load, makes way for a command.

        If the command fails, the recovery starts again.
        """
        if self.active is not None:
            self._cancel_recovery()
        async with self._lock:
            try:
                yield
            except EdgeError:
                recovers = self._recovery is not None and not self._recovery.done()
                missing = self.worker is None and self.state != "idle"
                if self.active is not None and missing and not recovers:
                    self.state = "backoff"
                    self._plan_recovery()
                raise

    def _refresh_use(self) -> None:
        """Note that it was asked for, when it was: requests have come, or one runs."""
        workers = self.workers()
        requests = sum(one.status[word] for one, _ in workers for word in SIGNS_OF_USE)
        runs = any(one.running_s() for one, role in workers if role != "candidate")
        if requests != self._requests_seen or runs:
            self._requests_seen, self.last_used_ns = requests, self._clock.monotonic_ns()

    def _rest_if_idle(self) -> None:
        self._refresh_use()
        worker, keep_s = self.worker, self.config.keep_alive_s
        if worker is None or not worker.serving or self.busy:
            return
        if residency.is_idle(self.last_used_ns, self._clock.monotonic_ns(), keep_s):
            self.sleep(f"not asked for {keep_s:g} s")

    # -- loading ----------------------------------------------------------------------------------

    async def _generation(self, number: int) -> Generation:
        return await self._shelf.read(lambda store: store.generation(self.name, number))

    async def _loaded(self, generation: Generation) -> tuple[WorkerProcess, bool]:
        """A ready worker for a generation: the one at hand, or a new one."""
        for worker, _ in self.workers():
            if worker.serving and worker.spec.generation == generation.number:
                return worker, True
        return await self._load(generation, asked=True), False

    async def _load(self, generation: Generation, asked: bool) -> WorkerProcess:
        """Start workers for the variants in order until one is ready.

        Args:
            asked: somebody wants it now; other models may have to go for it.

        Raises:
            NoMemoryError: one may be, when there is room in memory.
            ModelError: none is; all reasons are in the message.
        """
        manifest = await self._shelf.manifest(generation)
        refused: list[str] = []
        failure: EdgeError | None = None
        no_room: NoMemoryError | None = None
        for variant in specs.candidates(manifest, self.config):
            try:
                return await self._load_variant(generation, manifest, variant, asked)
            except EdgeError as error:
                failure = error
                no_room = error if isinstance(error, NoMemoryError) else no_room
                refused.append(f"{variant.name}: {error.message}")
                self._emit(
                    "variant_refused",
                    str(error),
                    level="warning",
                    version=generation.version,
                    variant=variant.name,
                    code=error.code,
                )
        assert failure is not None
        if no_room is not None or len(refused) == 1:
            raise no_room or failure
        raise ModelError(
            f"no variant of {self.name}@{generation.version} is fit: " + "; ".join(refused)
        )

    async def _load_variant(
        self, generation: Generation, manifest: Manifest, variant: Variant, asked: bool
    ) -> WorkerProcess:
        spec = await self._shelf.read(
            lambda store: specs.worker_spec(
                manifest,
                variant,
                generation.number,
                self.config,
                self._config.limits,
                store.blob_path,
            )
        )
        stated_bytes = manifest.budgets.memory_bytes
        need_bytes = residency.predicted_bytes(
            stated_bytes, self._expected_bytes(spec), variant.artifact.size
        )
        await self._make_room(self.name, need_bytes, asked)
        worker = self._newcomer(spec, need_bytes)  # with no wait in between: the room is its own
        template = self._templates.get(variant.backend)
        limit_s = self.config.load_time_max_s
        self._loading = worker
        try:
            async with asyncio.timeout(limit_s):
                await template.fork(worker)
                report = await asyncio.shield(worker.ready)
            await self._check_memory(worker, stated_bytes, asked)
        except TimeoutError:
            phase = worker.phase
            self._kill(worker)
            raise ModelError(
                f"{phase} took longer than {limit_s:g} s",
                where=f"{self.name}@{generation.version} variant {variant.name}",
                remedy="raise load_time_max_s if this device compiles models",
            ) from None
        except BaseException:
            self._kill(worker)
            raise
        finally:
            self._loading = None
        worker.backend_version = template.version
        self._watch(worker)
        self._emit(
            "worker_ready",
            f"{self.name}@{generation.version} {variant.name} ready:"
            f" load {report.load_ms:.0f} ms, {report.goldens} goldens kept,"
            f" run {report.run_ms_p50:.3f} ms",
            version=generation.version,
            generation=generation.number,
            variant=variant.name,
            backend=variant.backend,
            pid=worker.pid,
            runners=report.runners,
        )
        return worker

    def _newcomer(self, spec: WorkerSpec, need_bytes: int) -> WorkerProcess:
        """A worker to be forked; its memory counts as taken from now until its end."""
        worker = WorkerProcess(spec, "", self._clock, self._returned)
        self._needs_bytes[spec.generation, spec.variant] = need_bytes
        self._workers.add(worker)

        def forget(_: object) -> None:
            self._workers.discard(worker)
            self._leaving.discard(worker)

        worker.ended.add_done_callback(forget)
        return worker

    def _kill(self, worker: WorkerProcess) -> None:
        """A newcomer that is not wanted."""
        self._note_leaving(worker)
        worker.kill()

    def _note_leaving(self, *workers: WorkerProcess) -> None:
        self._leaving |= self._workers.intersection(workers)  # those that live; `forget` ends it

    async def _check_memory(self, worker: WorkerProcess, stated_bytes: int, asked: bool) -> None:
        """Hold a loaded worker to what its manifest states and to the budget of all.

        Raises:
            ModelError: it takes more than stated.
            NoMemoryError: it takes more than was expected, and there is no room for that.
        """
        spec = worker.spec
        taken_bytes = memory.of(worker.pid).private_bytes
        self._needs_bytes[spec.generation, spec.variant] = taken_bytes
        self.last_used_ns = self._loaded_ns = self._clock.monotonic_ns()
        if stated_bytes and taken_bytes > stated_bytes:
            raise ModelError(
                f"takes {taken_bytes} bytes of memory",
                where=f"{self.name}@{spec.version} variant {spec.variant}",
                expected=f"<= {stated_bytes} bytes (model.yaml: budgets.memory_bytes)",
                remedy="state a larger budget in the bundle, or use a smaller variant",
            )
        await self._make_room(self.name, 0, asked)

    # -- switching --------------------------------------------------------------------------------

    async def _take_over(
        self, generation: Generation, worker: WorkerProcess, switch: Switch, warm: bool, reason: str
    ) -> Change:
        """The flip: from here on `worker` gets every connection."""
        before = {one for one, _ in self.workers()} - {worker}
        promoted = worker is self.candidate
        self._end_trial("promoted" if promoted else f"version {generation.version} was activated")
        old = self.worker if self.worker is not worker else None
        self.active, self.worker, self._refusal = generation, worker, None
        if old is not None and old.serving and self.config.keep_previous_warm and switch.previous:
            self.warm = old  # at once: a request that names its version finds it there
        elif old is not None or self.warm is worker:
            self.warm = None
        worker.promote()
        self.state, self.reason = "ready", reason
        self._deaths_ns.clear()
        self._cancel_recovery()
        flipped_ns = self._clock.monotonic_ns()
        leaving = [one for one in before if one is old or one is not self.warm]
        self._note_leaving(*(one for one in before if one is not self.warm))
        moved = sum(await asyncio.gather(*(self._hand_back(one) for one in leaving)))
        swap_ms = (self._clock.monotonic_ns() - flipped_ns) / 1e6
        freed = sum([await self._stop(one) for one in before if one is not self.warm])
        self._emit(
            "model_activated",
            f"{self.name}@{generation.version} serves ({reason});"
            f" {moved} connections moved in {swap_ms:.1f} ms",
            version=generation.version,
            generation=generation.number,
            variant=worker.spec.variant,
            connections=moved,
        )
        return Change(switch, generation.version, worker.spec.variant, moved, swap_ms, freed, warm)

    async def _hand_back(self, worker: WorkerProcess | None) -> int:
        """Have a worker give its connections to the router, which passes them on."""
        if worker is None or not worker.serving:
            return 0
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                return await worker.drain(self._label(worker))
        except TimeoutError:
            self._emit("drain_timeout", "requests in flight did not end", level="warning")
            return 0

    def _label(self, worker: WorkerProcess) -> str:
        """What a client may call a worker that does not serve, besides by its version."""
        if worker is self.warm:
            return "previous"
        return "candidate" if worker is self.candidate else ""

    async def _stop(self, worker: WorkerProcess) -> int:
        """End a worker; the private bytes that come back with it."""
        if not worker.alive:
            return 0
        self._note_leaving(worker)
        freed = memory.of(worker.pid).private_bytes
        await worker.stop(STOP_GRACE_S)
        self._emit(
            "worker_stopped",
            f"{self.name}@{worker.spec.version} stopped, {freed} bytes came back",
            version=worker.spec.version,
            pid=worker.pid,
            freed_bytes=freed,
        )
        return freed

    # -- a candidate beside it --------------------------------------------------------------------

    async def accompany(
        self, generation: Generation, shadow: float | None, split: float | None
    ) -> Trial:
        """Load a candidate beside the active version, or change the shares of the one there is.

        Args:
            shadow, split: shares of the traffic, 0 to 1; None: as it is.

        Raises:
            ConflictError: another candidate is there, this version serves, or none does.
            ModelError: no variant of it loads and keeps its goldens.
        """
        async with self._lock:
            trial = self.trial if self.candidate is not None else None
            if trial is None:
                trial = await self._begin_trial(generation)
            elif trial.candidate.spec.generation != generation.number:
                raise ConflictError(
                    f"{self.name}@{trial.version} is the candidate",
                    where=self.name,
                    remedy="promote it or stop it first",
                )
            trial.share(shadow, split)
            self._emit(
                "candidate_shares",
                f"{self.name}@{trial.version} is shown {trial.shadow_share:.1%} of the answers"
                f" and gives {trial.split_share:.1%} of them",
                version=trial.version,
                shadow_share=trial.shadow_share,
                split_share=trial.split_share,
            )
            return trial

    async def _begin_trial(self, generation: Generation) -> Trial:
        active = self.active
        if active is None or self.worker is None or active.number == generation.number:
            raise ConflictError(
                f"{self.name}@{generation.version} cannot be a candidate:"
                + (" it serves" if active == generation else " no version serves beside it"),
                where=self.name,
            )
        candidate = self.warm
        if candidate is None or candidate.spec.generation != generation.number:
            candidate = await self._load(generation, asked=False)
        else:
            self.warm = None
        if self.trial is not None:
            self.trial.close()
        self.trial = trial = Trial(candidate, active.version, self._clock)
        await self._hand_back(candidate)
        self._introduce()
        if not trial.live:
            raise ModelError(trial.ended, where=f"{self.name}@{generation.version}")
        self._emit(
            "trial_began",
            f"{self.name}@{trial.version} is the candidate beside version {active.version}",
            version=trial.version,
        )
        return trial

    def _introduce(self) -> None:
        """Have the active version's worker, maybe a new one, know the candidate."""
        if self.candidate is None or self.worker is None:
            return
        assert self.trial is not None
        try:
            self.trial.link(self.worker)
        except (EdgeError, OSError) as error:
            candidate = self.trial.candidate
            self._end_trial(f"no memory or descriptor for it: {error}", level="error")
            self._depart([candidate], "candidate_unloaded", "the candidate could not be tried")

    def _end_trial(self, reason: str, level: Any = "info") -> None:
        """The candidate is none any more; what becomes of its worker is the caller's."""
        trial = self.trial
        if trial is None or not trial.live:
            return
        trial.end(reason)
        self._emit(
            "trial_ended",
            f"{self.name}@{trial.version}: {reason}; {trial.summary()}",
            level=level,
            version=trial.version,
        )

    async def stop_trial(self) -> Trial:
        """End the candidate; a previous version that was warm before is so again.

        Raises:
            ConflictError: there is none.
        """
        async with self._lock:
            candidate = self.candidate
            if candidate is None:
                raise self._no_candidate()
            assert self.trial is not None
            self._end_trial("stopped by command")
            switch = await self._shelf.read(lambda store: store.current(self.name))
            if switch.previous == candidate.spec.generation and self.config.keep_previous_warm:
                self.warm = candidate
                await self._hand_back(candidate)
            else:
                await self._hand_back(candidate)
                await self._stop(candidate)
            return self.trial

    async def promote(self) -> Change:
        """Make the candidate the active version.

        Raises:
            ConflictError: there is none.
            EdgeError: the store could not switch; the candidate stays one.
        """
        candidate = self.candidate
        if candidate is None:
            raise self._no_candidate()
        generation = await self._generation(candidate.spec.generation)
        return await self.activate(generation, "promoted")

    def _no_candidate(self) -> ConflictError:
        return ConflictError(
            f"{self.name} has no candidate",
            where=self.name,
            expected=f"`shadow` or `split` before (the last one: {self.trial.ended})"
            if self.trial
            else "`shadow` or `split` before",
        )

    # -- deaths -----------------------------------------------------------------------------------

    def _watch(self, worker: WorkerProcess) -> None:
        async def watch() -> None:
            death = await worker.ended
            if death.cause is not Cause.STOPPED and not self._closing:
                self._died(worker, death)

        self._spawn(watch())

    def _died(self, worker: WorkerProcess, death: Death) -> None:
        serving = worker is self.worker
        self._emit(
            "worker_died",
            f"{self.name}@{worker.spec.version} {worker.spec.variant}: {death.detail}",
            level="error",
            version=worker.spec.version,
            variant=worker.spec.variant,
            cause=str(death.cause),
            pid=worker.pid,
            serving=serving,
        )
        if worker is self.warm:
            self.warm = None
        if worker is self.candidate:
            self._end_trial(f"the candidate died: {death.detail}", level="error")
        if serving:
            self.worker = None
            self.state, self.reason = "backoff", death.detail
            self._after_death()

    def _after_death(self) -> None:
        """Count a death of the active generation and plan what comes next."""
        self._deaths_ns = [*self._deaths_ns, self._clock.monotonic_ns()][-DEATHS_KEPT:]
        self._plan_recovery()

    def _plan_recovery(self) -> None:
        now_ns = self._clock.monotonic_ns()
        verdict = health.after_death(self._deaths_ns, now_ns, specs.restart_policy(self.config))
        if not self._closing:
            self._recovery = self._spawn(self._recover(verdict))

    async def _recover(self, verdict: health.Verdict) -> None:
        generation = self.active
        if verdict.give_up and await self._fall_back():
            return
        await asyncio.sleep(verdict.restart_after_s)
        async with self._lock:
            if self.active is generation and self.worker is None:
                self.restarts += 1
                await self._restart(asked=False)

    async def _restart(self, asked: bool) -> None:
        """Load the active generation again; a failure counts as a death. Never raises."""
        assert self.active is not None
        self.state = "loading"
        try:
            self.worker = await self._load(self.active, asked)
        except NoMemoryError as error:  # nothing is wrong with it: it waits until it is asked for
            self.state, self.reason = "idle", str(error)
            if asked:
                self._refuse(error)
        except EdgeError as error:
            self._fail(error)
            self._after_death()
        else:
            self.state, self.reason, self._refusal = "ready", self.reason or "started", None
            self._introduce()

    def _refuse(self, error: NoMemoryError) -> None:
        """Whoever asks until its time to retry gets the same answer, without another attempt."""
        self._refusal = error
        retry_after_ns = round((error.retry_after_s or 0.0) * 1e9)
        self._refused_until_ns = self._clock.monotonic_ns() + retry_after_ns

    async def _fall_back(self) -> bool:
        """The previous generation takes over from one that keeps dying. Whether it could."""
        dead = self.active
        try:
            change = await self.rollback(
                f"{self.name}@{dead.version if dead else 0} died {len(self._deaths_ns)} times:"
                f" {self.reason}"
            )
        except EdgeError as error:
            self._fail(error, keep_reason=isinstance(error, ConflictError))
            return False
        self._emit(
            "fell_back",
            f"{self.name}@{change.version} took over from a generation that kept dying",
            level="error",
            version=change.version,
        )
        return True

    def _fail(self, error: EdgeError, keep_reason: bool = False) -> None:
        self.state = "failed"
        if not keep_reason:
            self.reason = str(error)
            self._emit("model_failed", str(error), level="error", code=error.code)

    def _cancel_recovery(self) -> None:
        if self._recovery is not None and self._recovery is not asyncio.current_task():
            self._recovery.cancel()
            self._recovery = None
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _emit(self, event: str, message: str, *, level: Any = "info", **fields: Value) -> None:
        self._events.emit(event, message, level=level, model=self.name, **fields)

    # -- what it says of itself -------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """State, active version and variant, for `models`."""
        worker = self.worker
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "active": self._describe_generation(self.active, worker) if self.active else None,
            "device": _device(worker),
            "restarts": self.restarts,
            "loading": _describe_loading(self._loading) if self._loading else None,
            "candidate": self.trial.describe() if self.trial and self.trial.live else None,
        }

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
                "placement": msgspec.to_builtins(worker.report.placement) if worker.report else [],
            }
        return facts


def _describe_loading(worker: WorkerProcess) -> dict[str, Any]:
    """What a load under way does now: fork, import, load, warmup, goldens."""
    spec = worker.spec
    return {"version": spec.version, "variant": spec.variant, "phase": worker.phase}


def _device(worker: WorkerProcess | None) -> str:
    """Where it really runs, as the backend said after the load."""
    if worker is None or worker.report is None:
        return ""
    return "+".join(sorted({str(place.get("device", "")) for place in worker.report.placement}))
