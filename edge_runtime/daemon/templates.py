"""Templates as the supervisor holds them: one per backend, which forks what it is asked for.

Law of this file: a template from its start to its end, and the orders that it has. What it forks
looks after itself from then on; what follows from a template's end is told to whoever waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

from edge_runtime.clock import Clock
from edge_runtime.daemon import memory
from edge_runtime.daemon.line import Line
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.reaper import Reaper
from edge_runtime.errors import BackendError, EdgeError, UnavailableError, from_document
from edge_runtime.events import Events
from edge_runtime.serving import channel, health
from edge_runtime.serving.health import Cause, Death
from edge_runtime.wire import sockets

# An import from a slow SD card takes seconds; one that takes longer than this hangs.
IMPORT_S_MAX = 120.0
FORK_S_MAX = 10.0
# What numpy's and the backends' own thread pools would start at import, before any fork.
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# Told of each worker that has become a process.
Started = Callable[[WorkerProcess], None]


class Forkable(Protocol):
    """What a template makes a process of."""

    phase: str
    backend_version: str
    is_host: bool  # of several workers

    @property
    def backend(self) -> str:
        """Whose template it is forked from."""

    def descriptors(self) -> list[int]:
        """What the fork order carries: duplicates, for the template's line to close."""

    def forked(self, pid: int, reaper: Reaper) -> None:
        """The template has made the process."""

    def not_forked(self, reason: str) -> None:
        """There will be no process."""


class Template:
    """The process that has one backend imported."""

    def __init__(
        self, backend: str, reaper: Reaper, events: Events, clock: Clock, started: Started
    ) -> None:
        loop = asyncio.get_running_loop()
        self.backend = backend
        self.version = ""
        self.ready: asyncio.Future[channel.TemplateReady] = loop.create_future()
        self.ended: asyncio.Future[Death] = loop.create_future()
        self._reaper = reaper
        self._events = events
        self._started = started
        self._failure: dict[str, Any] = {}
        self._stopping = False
        self._tokens = 0
        self._orders: dict[int, tuple[asyncio.Future[None], Forkable]] = {}
        self._oom_kills = memory.oom_kills()
        ours, theirs = channel.pair()
        self._line = Line(ours, loop, self._receive)
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", "edge_runtime.serving.template", backend],
            {**os.environ, **SINGLE_THREADED},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), channel.TEMPLATE_FD)],
        )
        theirs.close()
        self.started_ns = clock.monotonic_ns()
        self._limit = loop.call_later(IMPORT_S_MAX, self._import_hangs)
        self._spoken_for = False
        reaper.watch(self.pid, self._end)

    @property
    def alive(self) -> bool:
        return not self.ended.done()

    def take(self) -> bool:
        """Claim a worker of it, once it is ready; False: it makes only one, which is another's."""
        if self.ready.result().fork_safe:
            return True
        first, self._spoken_for = not self._spoken_for, True
        return first

    def _import_hangs(self) -> None:
        """The next load shall find a new process, not this one."""
        if self.alive and not self.ready.done():
            message = f"importing {self.backend} took longer than {IMPORT_S_MAX:g} s"
            self._failure = BackendError(message, where=self.backend).document()
            os.kill(self.pid, signal.SIGKILL)

    async def fork(self, worker: Forkable) -> None:
        """Make `worker` a process, once the template is ready and taken.

        Raises:
            BackendError: the template has died, or the system has no process to give.
        """
        self._tokens += 1
        token = self._tokens
        order: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders[token] = order, worker
        if not self._line.send(channel.Fork(token, worker.is_host), worker.descriptors()):
            raise UnavailableError(f"the {self.backend} template is gone")
        worker.phase = "fork"
        # Not wait_for: Python 3.11's loses a cancellation that comes together with the result.
        try:
            async with asyncio.timeout(FORK_S_MAX):
                await order
        except TimeoutError:  # the next load shall find a new process, not this one
            if self.alive:
                os.kill(self.pid, signal.SIGKILL)
            raise BackendError(
                f"the {self.backend} template did not fork within {FORK_S_MAX:g} s",
                where=self.backend,
            ) from None

    async def stop(self, grace_s: float) -> None:
        """End the process."""
        self._stopping = True
        self._line.send(channel.Stop())
        done, _ = await asyncio.wait([self.ended], timeout=grace_s)
        if not done:
            os.kill(self.pid, signal.SIGKILL)
            await self.ended

    def _receive(self, message: channel.Message, fds: list[int]) -> None:
        sockets.close_fds(fds)
        if isinstance(message, channel.TemplateReady):
            self.version = message.version
            self.ready.set_result(message)
            self._events.emit(
                "template_ready",
                f"{self.backend} {message.version} imported in {message.import_ms:.0f} ms",
                backend=self.backend,
                version=message.version,
                pid=self.pid,
            )
        elif isinstance(message, channel.Failed):
            self._failure = message.error
        elif isinstance(message, channel.Forked):
            if message.pid == self.pid:
                self._become()
            self._forked(message, *self._orders.pop(message.token))

    def _become(self) -> None:
        """It is a worker from now on: whoever watches that learns of its end."""
        self._line.close()
        self._limit.cancel()
        self.ended.set_result(Death(Cause.STOPPED, "became a worker"))

    def _forked(
        self, message: channel.Forked, order: asyncio.Future[None], worker: Forkable
    ) -> None:
        if order.done():  # whoever ordered it has given up
            if message.pid:
                self._reaper.end(message.pid)
            return
        if message.pid:
            worker.forked(message.pid, self._reaper)
            if isinstance(worker, WorkerProcess):
                self._started(worker)
        else:
            worker.not_forked(message.reason)
        order.set_result(None)

    def _end(self, status: int) -> None:
        self._line.drain()
        self._line.close()
        self._limit.cancel()
        death = health.classify(
            status,
            stopping=self._stopping,
            hung_for_s=None,
            oom_kills=memory.oom_kills() - self._oom_kills,
            failure=str(self._failure.get("message", "")),
        )
        at = "while idle" if self.ready.done() else "at import"
        error: EdgeError = (
            from_document(self._failure)
            if self._failure
            else BackendError(
                f"the {self.backend} library died {at}: {death.detail}",
                where=self.backend,
                remedy="install a build of it for this processor, or use another backend",
            )
        )
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        for order, _ in self._orders.values():
            if not order.done():
                order.set_exception(error)
        self._orders.clear()
        self.ended.set_result(death)
        if death.cause is not Cause.STOPPED:
            self._events.emit(
                "template_died",
                str(error),
                level="error",
                backend=self.backend,
                cause=str(death.cause),
                pid=self.pid,
            )


class Templates:
    """One template per backend, made when first needed and again after it died."""

    def __init__(self, reaper: Reaper, events: Events, clock: Clock, started: Started) -> None:
        self._reaper = reaper
        self._events = events
        self._started = started
        self._clock = clock
        self._templates: dict[str, Template] = {}

    async def fork(self, worker: Forkable) -> None:
        """Make `worker` a process, by the template of its backend.

        Raises:
            BackendError: the template dies, or the system has no process to give.
        """
        worker.phase = "import"
        while True:
            template = self._get(worker.backend)
            await asyncio.shield(template.ready)  # within IMPORT_S_MAX, or it ends
            if template.take():
                break
            self._forget(template)  # it becomes another's worker
        worker.backend_version = template.version
        await template.fork(worker)
        if not template.alive:
            self._forget(template)  # it became this one

    def _forget(self, template: Template) -> None:
        if self._templates.get(template.backend) is template:
            del self._templates[template.backend]

    def _get(self, backend: str) -> Template:
        """The living template of a backend; started now if there is none."""
        template = self._templates.get(backend)
        if template is None or not template.alive:
            template = Template(backend, self._reaper, self._events, self._clock, self._started)
            self._templates[backend] = template
        return template

    def all(self) -> list[Template]:
        """Every template, dead ones included."""
        return list(self._templates.values())

    async def stop(self, grace_s: float) -> None:
        """End them all."""
        living = [one for one in self._templates.values() if one.alive]
        await asyncio.gather(*(template.stop(grace_s) for template in living))
