"""One model on this device: which generation serves, through which worker, and what if it dies.

Law of this file: the order of steps of activate, roll back, unload and recover. The state of a
model changes under its lock only, on disk first and in memory after; a step that fails leaves what
served before serving. Verdicts about deaths come from `serving.health`, processes from `processes`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.clock import Clock
from edge_runtime.config import Config, WorkerConfig
from edge_runtime.daemon import memory, residency, specs
from edge_runtime.daemon.processes import Templates, WorkerProcess
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.shelf import Shelf
from edge_runtime.errors import (
    ConflictError,
    EdgeError,
    ModelError,
    NoMemoryError,
    NotFoundError,
)
from edge_runtime.events import Events, Value
from edge_runtime.serving import channel, health, page
from edge_runtime.serving.health import Cause, Death
from edge_runtime.store import Generation, Switch

# A worker asked to stop answers what it has first; then it is killed.
STOP_GRACE_S = 5.0
# Handing all connections over waits for their requests in flight: at most for one slow run.
DRAIN_S_MAX = 15.0
# How many deaths are remembered: more than any sensible deaths_max.
DEATHS_KEPT = 1000

Returned = Callable[[channel.Returned, list[int]], None]
# Makes room for a model that needs so many bytes, or raises NoMemoryError.
MakeRoom = Callable[[str, int], Awaitable[None]]


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
        self._requests_seen = 0
        self._waking: asyncio.Task[Any] | None = None
        self._lock = asyncio.Lock()
        self._deaths_ns: list[int] = []
        self._recovery: asyncio.Task[Any] | None = None
        self._loading: WorkerProcess | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def config(self) -> WorkerConfig:
        return self._config.worker(self.name)

    # -- what is asked of it ----------------------------------------------------------------------

    async def resume(self) -> None:
        """After a start of the daemon: serve what the store says is active. Never raises."""
        self._recovery = asyncio.current_task()
        async with self._lock:
            switch = await self._shelf.call(lambda store: store.current(self.name))
            if switch.active is None:
                return
            try:
                self.active = await self._generation(switch.active)
            except EdgeError as error:
                self._fail(error)
                return
            await self._restart()

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
            switch = await self._shelf.call(lambda store: store.current(self.name))
            if switch.previous is None:
                raise ConflictError(
                    f"{self.name} has no previous generation", remedy="activate a version instead"
                )
            generation = await self._generation(switch.previous)
            worker, warm = await self._loaded(generation)
            try:
                switch = await self._shelf.call(lambda store: store.rollback(self.name, reason))
            except EdgeError:
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
            worker, self.worker = self.worker, None
            warm, self.warm = self.warm, None
            self.active, self.state, self.reason = None, "stopped", "unloaded"
            moved = sum(await asyncio.gather(self._hand_back(worker), self._hand_back(warm)))
            freed = sum([await self._stop(one) for one in (worker, warm) if one is not None])
            self._emit("model_unloaded", f"unloaded, {freed} bytes came back", freed_bytes=freed)
            return Change(switch, version, variant, moved, 0.0, freed, False)

    async def close(self) -> None:
        """The daemon stops: answer what is in flight, end the workers, change nothing on disk."""
        self._closing = True
        self._cancel_recovery()
        worker, warm = self.worker, self.warm
        self.worker = self.warm = None
        await asyncio.gather(self._hand_back(worker), self._hand_back(warm))
        await asyncio.gather(*(self._stop(one) for one in (worker, warm) if one is not None))

    @property
    def busy(self) -> bool:
        """Whether a change of this model is under way."""
        return self._lock.locked()

    def wake(self) -> asyncio.Task[Any] | None:
        """Load an idle model again because somebody asks; None: it is not idle."""
        if self._waking is None or self._waking.done():
            if self.state != "idle" or self._closing:
                return None
            self._waking = self._spawn(self._wake())
        return self._waking

    async def _wake(self) -> None:
        async with self._lock:
            if self.state == "idle" and self.active is not None:
                self.reason = "asked for again"
                await self._restart()

    async def sleep(self, reason: str) -> int:
        """Unload the worker until the model is asked for again; the bytes that came back."""
        async with self._lock:
            worker = self.worker
            if worker is None or not worker.serving:
                return 0
            self.worker, self.state, self.reason = None, "idle", reason
            await self._hand_back(worker)
            freed = await self._stop(worker)
            self._emit("model_idle", f"{reason}; {freed} bytes came back", freed_bytes=freed)
            return freed

    def residents(self) -> list[Resident]:
        """The loaded workers with their memory."""
        return [
            Resident(
                self.name,
                worker is self.warm,
                memory.of(worker.pid).private_bytes,
                self.last_used_ns,
                movable=worker.serving and not self.busy,
            )
            for worker in (self.worker, self.warm)
            if worker is not None and worker.alive
        ]

    async def cool(self) -> int:
        """End the warm previous version; the bytes that came back."""
        async with self._lock:
            warm, self.warm = self.warm, None
            return await self._stop(warm) if warm is not None else 0

    def retry_after_s(self) -> float:
        """When a client that was told "unavailable" may try again."""
        return 1.0 if self.state in ("failed", "stopped") and not self._loading else 0.02

    def serving(self, version: str) -> WorkerProcess | None:
        """The worker for a requested version ("": the active one), if there is one now.

        Raises:
            NotFoundError: that version is neither active nor warm.
        """
        worker = self.worker
        if self.active is None:  # not known yet (the daemon starts), or unloaded
            return None
        if version in ("", str(self.active.version)):
            return worker if worker is not None and worker.serving else None
        warm = self.warm
        if warm is not None and warm.serving and version == str(warm.spec.version):
            return warm
        raise NotFoundError(
            f"version {version!r} of {self.name} is not loaded",
            where=self.name,
            expected=str(self.active.version),
            remedy="leave the version empty for the active one",
        )

    def check(self, oom_kills: int) -> None:
        """Look after the workers: kill one that hangs, unload one that nobody asks."""
        self._note_use()
        limit_s = self.config.run_time_max_ms / 1000
        for worker in (self.worker, self.warm):
            if worker is not None and worker.serving:
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
                if self.active is not None and self.worker is None and not recovers:
                    self.state = "backoff"
                    self._plan_recovery()
                raise

    def _note_use(self) -> None:
        worker, now_ns = self.worker, self._clock.monotonic_ns()
        if worker is None:
            return
        requests = worker.status[page.REQUESTS] + worker.status[page.WAITING]
        if requests != self._requests_seen:
            self._requests_seen, self.last_used_ns = requests, now_ns
        elif not self.busy and residency.is_idle(
            self.last_used_ns, now_ns, self.config.keep_alive_s
        ):
            self.last_used_ns = now_ns  # once
            self._spawn(self.sleep(f"not asked for {self.config.keep_alive_s:g} s"))

    # -- loading ----------------------------------------------------------------------------------

    async def _generation(self, number: int) -> Generation:
        return await self._shelf.call(lambda store: store.generation(self.name, number))

    async def _loaded(self, generation: Generation) -> tuple[WorkerProcess, bool]:
        """A ready worker for a generation: the one at hand, or a new one."""
        for worker in (self.worker, self.warm):
            if worker and worker.serving and worker.spec.generation == generation.number:
                return worker, True
        return await self._load(generation), False

    async def _load(self, generation: Generation) -> WorkerProcess:
        """Start workers for the variants in order until one is ready.

        Raises:
            ModelError: none is; all reasons are in the message.
        """
        manifest = await self._shelf.manifest(generation)
        refused: list[str] = []
        failure: EdgeError | None = None
        for variant in specs.candidates(manifest, self.config):
            try:
                return await self._load_variant(generation, manifest, variant)
            except EdgeError as error:
                failure = error
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
        if len(refused) == 1 or isinstance(failure, NoMemoryError):
            raise failure
        raise ModelError(
            f"no variant of {self.name}@{generation.version} is fit: " + "; ".join(refused)
        )

    async def _load_variant(
        self, generation: Generation, manifest: Manifest, variant: Variant
    ) -> WorkerProcess:
        spec = await self._shelf.call(
            lambda store: specs.worker_spec(
                manifest,
                variant,
                generation.number,
                self.config,
                self._config.limits,
                store.blob_path,
            )
        )
        learned = self._needs_bytes.get((generation.number, variant.name), 0)
        stated = manifest.budgets.memory_bytes
        need_bytes = residency.predicted_bytes(stated, learned, variant.artifact.size)
        await self._make_room(self.name, need_bytes)
        worker = WorkerProcess(spec, "", self._clock, self._returned)
        template = self._templates.get(variant.backend)
        limit_s = self.config.load_time_max_s
        self._loading = worker
        try:
            async with asyncio.timeout(limit_s):
                await template.fork(worker)
                report = await asyncio.shield(worker.ready)
        except TimeoutError:
            phase = worker.phase
            worker.kill()
            raise ModelError(
                f"{phase} took longer than {limit_s:g} s",
                where=f"{self.name}@{generation.version} variant {variant.name}",
                remedy="raise load_time_max_s if this device compiles models",
            ) from None
        except BaseException:
            worker.kill()
            raise
        finally:
            self._loading = None
        worker.backend_version = template.version
        self._check_budget(worker, stated)
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

    def _check_budget(self, worker: WorkerProcess, stated_bytes: int) -> None:
        """Hold a worker to what its manifest states; remember what it took."""
        spec = worker.spec
        taken_bytes = memory.of(worker.pid).private_bytes
        self._needs_bytes[spec.generation, spec.variant] = taken_bytes
        self.last_used_ns = self._clock.monotonic_ns()
        if stated_bytes and taken_bytes > stated_bytes:
            worker.kill()
            raise ModelError(
                f"takes {taken_bytes} bytes of memory",
                where=f"{self.name}@{spec.version} variant {spec.variant}",
                expected=f"<= {stated_bytes} bytes (model.yaml: budgets.memory_bytes)",
                remedy="state a larger budget in the bundle, or use a smaller variant",
            )

    # -- switching --------------------------------------------------------------------------------

    async def _take_over(
        self, generation: Generation, worker: WorkerProcess, switch: Switch, warm: bool, reason: str
    ) -> Change:
        """The flip: from here on `worker` gets every connection."""
        before = {self.worker, self.warm} - {worker}
        old = self.worker if self.worker is not worker else None
        self.active, self.worker = generation, worker
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
        moved = sum(await asyncio.gather(*(self._hand_back(one) for one in leaving)))
        swap_ms = (self._clock.monotonic_ns() - flipped_ns) / 1e6
        freed = sum([await self._stop(one) for one in before if one and one is not self.warm])
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
                return await worker.drain()
        except TimeoutError:
            self._emit("drain_timeout", "requests in flight did not end", level="warning")
            return 0

    async def _stop(self, worker: WorkerProcess) -> int:
        """End a worker; the private bytes that come back with it."""
        if not worker.alive:
            return 0
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
                await self._restart()

    async def _restart(self) -> None:
        """Load the active generation again; a failure counts as a death. Never raises."""
        assert self.active is not None
        self.state = "loading"
        try:
            self.worker = await self._load(self.active)
        except NoMemoryError as error:  # nothing is wrong with it: it waits until it is asked for
            self.state, self.reason = "idle", str(error)
        except EdgeError as error:
            self._fail(error)
            self._after_death()
        else:
            self.state, self.reason = "ready", self.reason or "started"

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

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
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
