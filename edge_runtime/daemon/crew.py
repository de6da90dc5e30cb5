"""The workers of one model: who has which role, what they take, how they leave.

Law of this file: it keeps and ends processes. Which worker gets which role, and when one has to go,
is decided in `deployment`, `recovery` and `variants`; how one comes to be is in `loading`. Every
worker is known here from the moment its memory is promised to it until its process is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from edge_runtime.daemon import memory, residency
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.residency import Resident
from edge_runtime.daemon.trial import Trial
from edge_runtime.serving import channel, page
from edge_runtime.serving.spec import WorkerSpec

# A worker asked to stop answers what it has first; then it is killed.
STOP_GRACE_S = 5.0
# Handing all connections over waits for their requests in flight: at most for one slow run.
DRAIN_S_MAX = 10.0
# Words of a worker's page that change when somebody wants an answer of the model.
SIGNS_OF_USE = (page.REQUESTS, page.ERRORS, page.REFUSED, page.EXPIRED, page.WAITING)
# The kernel walks all of a process's pages for its private memory: 1 ms of the daemon's loop for
# each worker, twice in every load. Those that are loaded change slowly.
MEASURED_NS = 100_000_000

T = TypeVar("T")


class Crew:
    """Of one model.

    Attributes:
        worker: the one that serves.
        warm: of the previous version, kept for a quick roll-back.
        trial: of a candidate, or the last one.
        last_used_ns: CLOCK_MONOTONIC, when the model was asked for.
    """

    def __init__(self, parts: Parts) -> None:
        self.worker: WorkerProcess | None = None
        self.warm: WorkerProcess | None = None
        self.trial: Trial | None = None
        self.last_used_ns = parts.clock.monotonic_ns()
        self._parts = parts
        self._needs_bytes: dict[tuple[int, str], int] = {}  # measured: (generation, variant)
        self._living: set[WorkerProcess] = set()  # loading and leaving ones too
        self._leaving: set[WorkerProcess] = set()  # of these: on their way out
        self._measured: dict[WorkerProcess, tuple[int, int]] = {}  # good until (ns), private bytes
        self._departures: set[asyncio.Task[int]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loaded_ns = 0
        self._requests_seen = 0

    # -- who is there -----------------------------------------------------------------------------

    @property
    def candidate(self) -> WorkerProcess | None:
        """The worker of the version that is tried beside the active one."""
        return self.trial.candidate if self.trial is not None and self.trial.live else None

    def roles(self) -> list[tuple[WorkerProcess, str]]:
        """Those that can answer, with what they are."""
        each = ((self.worker, "active"), (self.warm, "warm"), (self.candidate, "candidate"))
        return [(worker, role) for worker, role in each if worker is not None]

    def living(self) -> list[WorkerProcess]:
        """Every one with a process, or about to get one."""
        return list(self._living)

    def label(self, worker: WorkerProcess) -> str:
        """What a client may call a worker that does not serve, besides by its version."""
        if worker is self.warm:
            return "previous"
        return "candidate" if worker is self.candidate else ""

    def seat(self, worker: WorkerProcess, *, keep_warm: bool) -> WorkerProcess | None:
        """`worker` serves from now on; the one that did, if it was another one.

        Args:
            keep_warm: that one stays, as the previous version's. At once: a request that names its
                version finds it there.
        """
        old = self.worker if self.worker is not worker else None
        self.worker = worker
        if old is not None and old.spec.generation == worker.spec.generation:
            return old  # another variant of what serves: the previous version is still that
        if old is not None and old.serving and keep_warm:
            self.warm = old
        elif old is not None or self.warm is worker:
            self.warm = None
        return old

    def newcomer(self, spec: WorkerSpec, need_bytes: int) -> WorkerProcess:
        """A worker to be forked; its memory counts as taken from now until its end."""

        def keep(message: channel.Compiled, fd: int) -> None:
            self._parts.compiled.keep(spec.model, spec.artifact_sha256, message, fd)

        worker = WorkerProcess(spec, "", self._parts.clock, self._parts.returned, keep)
        self._needs_bytes[spec.generation, spec.variant] = need_bytes
        self._living.add(worker)

        def forget(_: object) -> None:
            self._living.discard(worker)
            self._leaving.discard(worker)
            self._measured.pop(worker, None)

        worker.ended.add_done_callback(forget)
        return worker

    # -- what they take ---------------------------------------------------------------------------

    def expected_bytes(self, spec: WorkerSpec) -> int:
        """What a worker like this took before; 0: not known."""
        return self._needs_bytes.get((spec.generation, spec.variant), 0)

    def forget(self, number: int) -> None:
        """A generation was removed."""
        for key in [key for key in self._needs_bytes if key[0] == number]:
            del self._needs_bytes[key]

    def note_loaded(self, worker: WorkerProcess) -> int:
        """A worker is loaded, which is a use of the model; the private bytes that it takes."""
        taken_bytes = self._taken_bytes(worker)
        # One that joins others may find memory that one before it has left: it says too little.
        need_bytes = max(taken_bytes, self.expected_bytes(worker.spec) if worker.shares else 0)
        self._needs_bytes[worker.spec.generation, worker.spec.variant] = need_bytes
        self.last_used_ns = self._loaded_ns = self._parts.clock.monotonic_ns()
        return taken_bytes

    def refresh_use(self) -> None:
        """Note that it was asked for, when it was: requests have come, or one runs."""
        workers = self.roles()
        requests = sum(one.status[word] for one, _ in workers for word in SIGNS_OF_USE)
        runs = any(one.running_s() for one, role in workers if role != "candidate")
        if requests != self._requests_seen or runs:
            self._requests_seen, self.last_used_ns = requests, self._parts.clock.monotonic_ns()

    def residents(self, *, own: bool, busy: bool) -> list[Resident]:
        """Every worker with its memory.

        Args:
            own: it is this model that loads; its warm version may go although it is busy.
            busy: a change of this model is under way.
        """
        self.refresh_use()
        return [self._resident(worker, own, busy) for worker in self._living]

    def _resident(self, worker: WorkerProcess, own: bool, busy: bool) -> Resident:
        warm = worker is self.warm or worker is self.candidate  # nobody's answers depend on it
        held = warm or worker is self.worker
        settled = warm or residency.is_settled(self._loaded_ns, self._parts.clock.monotonic_ns())
        taken_bytes = self._taken_bytes(worker)
        return Resident(
            self._parts.name,
            warm,
            taken_bytes if worker.report else max(taken_bytes, self.expected_bytes(worker.spec)),
            self.last_used_ns,
            movable=held and settled and worker.serving and (not busy or (own and warm)),
            leaving=worker in self._leaving,
        )

    def _taken_bytes(self, worker: WorkerProcess) -> int:
        """Its private memory, now or a moment ago; of one that loads, now."""
        now_ns = self._parts.clock.monotonic_ns()
        known = self._measured.get(worker)
        if known is not None and now_ns < known[0]:
            return known[1]
        taken_bytes = worker.memory().private_bytes
        if worker.report is not None:
            self._measured[worker] = now_ns + MEASURED_NS, taken_bytes
        return taken_bytes

    # -- how they leave ---------------------------------------------------------------------------

    def note_leaving(self, *workers: WorkerProcess) -> None:
        """Their memory will come back soon."""
        self._leaving |= self._living.intersection(workers)  # those that live; `forget` ends it

    def kill(self, worker: WorkerProcess) -> None:
        """A newcomer that is not wanted."""
        self.note_leaving(worker)
        worker.kill()

    async def hand_back(self, worker: WorkerProcess) -> int:
        """Have a worker give its connections to the router, which passes them on; how many."""
        if not worker.serving:
            return 0
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                return await worker.drain(self.label(worker))
        except TimeoutError:
            self._parts.emit("drain_timeout", "requests in flight did not end", level="warning")
            return 0

    async def stop(self, worker: WorkerProcess) -> int:
        """End a worker; the private bytes that come back with it."""
        if not worker.alive:
            return 0
        self.note_leaving(worker)
        had = memory.of(worker.pid).private_bytes
        await worker.stop(STOP_GRACE_S)
        stays = worker.stays_bytes()
        freed = max(had - stays, 0)
        self._parts.emit(
            "worker_stopped",
            f"{self._parts.name}@{worker.spec.version} stopped, {freed} bytes came back"
            + (f"; {stays} bytes stay with the others of its process" if stays else ""),
            version=worker.spec.version,
            pid=worker.pid,
            freed_bytes=freed,
        )
        return freed

    def depart(self, workers: list[WorkerProcess], event: str, reason: str) -> asyncio.Task[int]:
        """End workers that have no role any more, whoever waits for it or ceases to; the bytes that
        came back.
        """
        self.note_leaving(*workers)

        async def depart() -> int:
            await asyncio.gather(*(self.hand_back(worker) for worker in workers))
            freed = sum([await self.stop(worker) for worker in workers])
            self._parts.emit(event, f"{reason}; {freed} bytes came back", freed_bytes=freed)
            return freed

        task = self.spawn(depart())
        self._departures.add(task)
        task.add_done_callback(self._departures.discard)
        return task

    async def departed(self) -> None:
        """Return when nobody is on the way out any more."""
        if self._departures:
            await asyncio.wait(self._departures)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin something that nobody waits for; held, because the loop's references are weak."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
