"""Processes that several workers share, because only one process may open their device.

Law of this file: which worker gets a process of its own and which joins a host, and a host from its
fork to its end. One model at a time is loaded into a host. What follows from a worker's end is
decided where it is for any other; who was the end of a host is `serving.health`'s verdict.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from edge_runtime.daemon import memory
from edge_runtime.daemon.line import Line
from edge_runtime.daemon.memory import Memory
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.reaper import Reaper
from edge_runtime.daemon.templates import Started, Templates
from edge_runtime.errors import BackendError
from edge_runtime.events import Events
from edge_runtime.serving import channel, health, spec
from edge_runtime.serving.spec import HostSpec, WorkerSpec
from edge_runtime.wire import sockets

# A host without workers has nothing to wait for.
END_S_MAX = 5.0
# Who was the end of a host waits so long for its neighbours to be back. A load takes seconds; one
# that takes longer must not keep another model away.
NEIGHBOURS_FIRST_S = 10.0


class Host:
    """One process with the workers of one device."""

    is_host = True

    def __init__(self, first: WorkerSpec, place: Place, events: Events) -> None:
        """See above.

        Args:
            first: the worker for which it is made.
        """
        loop = asyncio.get_running_loop()
        self.spec = _spec(first)
        self.phase = "fork"
        self.backend_version = ""
        self.pid = 0
        self.ended: asyncio.Future[None] = loop.create_future()
        self._place = place
        self._events = events
        self._workers: dict[int, WorkerProcess] = {}  # by token, the one of longest standing first
        self._before_bytes: dict[WorkerProcess, int] = {}  # what was taken when it joined
        self._taken_bytes: dict[WorkerProcess, int] = {}
        self._tokens = 0
        self._failure: dict[str, Any] = {}
        self._leaving = False
        ours, self._theirs = channel.pair()
        self._line = Line(ours, loop, self._receive)

    @property
    def backend(self) -> str:
        """See Forkable."""
        return self.spec.backend

    @property
    def open(self) -> bool:
        """Whether a worker can join."""
        return self.pid > 0 and not self._leaving and not self.ended.done()

    # -- from fork to end --------------------------------------------------------------------------

    def descriptors(self) -> list[int]:
        """See Forkable."""
        return [os.dup(self._theirs.fileno()), spec.pass_on(self.spec)]

    def forked(self, pid: int, reaper: Reaper) -> None:
        """See Forkable."""
        self.pid = pid
        self._theirs.close()
        reaper.watch(pid, self._end)
        self._events.emit(
            "host_started",
            f"models on {self.spec.name} share process {pid}",
            device=self.spec.name,
            backend=self.spec.backend,
            pid=pid,
        )

    def not_forked(self, reason: str) -> None:
        """See Forkable."""
        self._leaving = True
        self._failure = self._failure or BackendError(reason, where=self.spec.name).document()
        self._theirs.close()
        self._line.close()  # if there is one after all, it ends
        if not self.pid and not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Have it end, when the last worker has left."""
        self._leaving = True
        self._line.send(channel.Stop())
        asyncio.get_running_loop().call_later(END_S_MAX, self._kill)

    def _kill(self) -> None:
        if not self.ended.done():
            os.kill(self.pid, signal.SIGKILL)

    def _end(self, status: int) -> None:
        self._line.drain()  # those that left before
        self._line.close()
        workers = list(self._workers.values())
        self._workers.clear()
        self._leaving = True
        self.ended.set_result(None)
        if workers:
            self._tell_lost(workers, status)

    def _tell_lost(self, workers: list[WorkerProcess], status: int) -> None:
        """Tell each worker of the end of the process."""
        suspects = health.suspects(
            [health.Resident(one.hung, one.uses_device, one.report is None) for one in workers]
        )
        named = [one for one, suspect in zip(workers, suspects, strict=True) if suspect]
        how = health.classify(status, stopping=False, hung_for_s=None, oom_kills=0).detail
        if any(one.hung for one in workers):
            how = "a run did not return"
        names = ", ".join(f"{one.spec.model}@{one.spec.version}" for one in named)
        blame = f"the process that it shared ended: {how}; suspected: {names}"
        self._events.emit(
            "host_died",
            f"the process of models on {self.spec.name}: {how}; suspected: {names}",
            level="error",
            device=self.spec.name,
            pid=self.pid,
        )
        self._place.order_return(workers, named)
        for one, suspect in zip(workers, suspects, strict=True):
            one.lost(status, self._failure, "" if suspect else blame)

    # -- its workers -------------------------------------------------------------------------------

    def join(self, worker: WorkerProcess) -> None:
        """Have `worker` run in it. If it cannot, the worker ends."""
        self._tokens += 1
        self._before_bytes[worker] = self._private_bytes() if self._workers else 0
        self._workers[self._tokens] = worker
        worker.backend_version = self.backend_version
        worker.phase = "fork"
        descriptors = worker.descriptors()
        worker.joined(self.pid, self)
        worker.ready.add_done_callback(lambda _: self._note_loaded(worker))
        worker.ended.add_done_callback(lambda _: self._forget(worker))
        self._line.send(channel.Join(self._tokens), descriptors)

    def _receive(self, message: channel.Message, fds: list[int]) -> None:
        sockets.close_fds(fds)
        if isinstance(message, channel.Failed):
            self._failure = message.error
        elif isinstance(message, channel.Left) and message.token in self._workers:
            worker = self._workers.pop(message.token)
            if not self._workers:
                self.close()
            worker.left(message.exit_code)

    # -- memory ------------------------------------------------------------------------------------

    def memory_of(self, worker: WorkerProcess) -> Memory:
        """What it took when it was loaded. Who is there longest has the rest, so that all together
        have what the process has.
        """
        if worker not in self._workers.values():
            return Memory(0, 0, 0)
        if worker is not next(iter(self._workers.values())):
            return Memory(*[self._share_bytes(worker)] * 3)
        others = sum(self._share_bytes(one) for one in self._workers.values() if one is not worker)
        return Memory(*(max(size - others, 0) for size in memory.of(self.pid)))

    def stays_bytes(self) -> int:
        """See Sharing."""
        return self._private_bytes() if self.open else 0

    def _share_bytes(self, worker: WorkerProcess) -> int:
        if worker in self._taken_bytes:
            return self._taken_bytes[worker]
        return max(self._private_bytes() - self._before_bytes[worker], 0)

    def _note_loaded(self, worker: WorkerProcess) -> None:
        if worker.alive:
            self._taken_bytes[worker] = self._share_bytes(worker)

    def _forget(self, worker: WorkerProcess) -> None:
        self._taken_bytes.pop(worker, None)
        self._before_bytes.pop(worker, None)

    def _private_bytes(self) -> int:
        return memory.of(self.pid).private_bytes


class Place:
    """A device that is shared: its host, and whose turn it is to load.

    Attributes:
        turn: held while a worker is being loaded.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.host: Host | None = None
        self._first: set[str] = set()
        self._later: set[str] = set()
        self._back = asyncio.Event()

    def order_return(self, lost: list[WorkerProcess], suspects: list[WorkerProcess]) -> None:
        """After the end of a host: those that served come first, who was its end comes last."""
        loading = {one.spec.model for one in suspects if one.report is None}
        self._later = loading or {one.spec.model for one in suspects}
        served = {one.spec.model for one in lost if one.report is not None}
        self._first = served - self._later
        self._back.clear()

    async def neighbours_first(self, model: str) -> None:
        """Return when nobody is to be loaded before `model`, or none of them comes back."""
        if not self._first or model not in self._later:
            return
        try:
            async with asyncio.timeout(NEIGHBOURS_FIRST_S):
                await self._back.wait()
        except TimeoutError:
            self._first.clear()  # asleep, or unloaded

    def note_back(self, model: str) -> None:
        """A model has been loaded, or failed to."""
        self._first.discard(model)
        if not self._first:
            self._back.set()


class Hosts:
    """Makes every worker: by itself, or in the host of its device."""

    def __init__(self, templates: Templates, events: Events, started: Started) -> None:
        self._templates = templates
        self._events = events
        self._started = started
        self._places: dict[str, Place] = {}

    async def turn(self, worker: WorkerProcess) -> None:
        """Return when `worker` may be loaded: on a shared device, one after the other. It has the
        turn until it is ready or has ended.
        """
        if not worker.spec.host:
            return
        place = self._places.setdefault(worker.spec.host, Place())
        worker.phase = "turn"
        await place.neighbours_first(worker.spec.model)
        await place.turn.acquire()

        def loaded(_: object) -> None:
            place.turn.release()
            place.note_back(worker.spec.model)

        worker.ready.add_done_callback(loaded)

    async def fork(self, worker: WorkerProcess) -> None:
        """Make `worker`, whose turn it is, a process or a part of one.

        Raises:
            BackendError: the template dies, the system has no process to give, or the device is in
                use through another backend.
        """
        if not worker.spec.host:
            await self._templates.fork(worker)
            return
        host = await self._host(self._places[worker.spec.host], worker)
        host.join(worker)
        self._started(worker)

    async def _host(self, place: Place, worker: WorkerProcess) -> Host:
        """The host to join, made now if there is none; the caller has the turn."""
        host = place.host
        if host is not None and not host.open:
            await asyncio.shield(host.ended)  # within END_S_MAX: until then it has the device
            host = None
        if host is None:
            worker.phase = "import"
            host = place.host = Host(worker.spec, place, self._events)
            try:
                await self._templates.fork(host)
            except BaseException:
                host.not_forked("given up")
                raise
        if not host.open:  # no process to give, or its end was quick
            raise BackendError("the process that its models share ended", where=host.spec.name)
        if host.backend != worker.backend:
            raise BackendError(
                f"{host.spec.name} is in use through {host.backend}, and only one process may"
                " open it",
                where=f"{worker.spec.model}@{worker.spec.version} variant {worker.spec.variant}",
                remedy=f"use variants for {host.backend}, or unload its models",
            )
        return host

    async def stop(self, grace_s: float) -> None:
        """Wait for the end of all hosts, whose workers have been told to end."""
        living = [one.host.ended for one in self._places.values() if one.host and one.host.pid]
        if living:
            await asyncio.wait(living, timeout=grace_s)


def _spec(first: WorkerSpec) -> HostSpec:
    """A host may read all that its workers may; each of them confines itself further."""
    readable = [str(Path(first.artifact).parent)]
    if first.compiled_dir:
        readable.append(str(Path(first.compiled_dir).parent))
    return HostSpec(
        name=first.host,
        backend=first.backend,
        supervisor_pid=first.supervisor_pid,
        readable=tuple(readable),
        devices=first.devices,
        sandbox=first.sandbox,
    )
