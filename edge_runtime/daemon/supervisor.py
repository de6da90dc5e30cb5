"""The supervisor: builds the parts, starts them, watches over them, stops them.

Law of this file: composition and lifetime. It is the only place that knows all parts; no part looks
another up. It imports no numpy and no backend: what they do, however badly, happens elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_runtime import __version__, systemd
from edge_runtime.clock import Clock
from edge_runtime.config import Config
from edge_runtime.daemon import machine, memory
from edge_runtime.daemon.access import Access, resolve
from edge_runtime.daemon.board import Board
from edge_runtime.daemon.commands import Commands
from edge_runtime.daemon.compiled import CompiledModels
from edge_runtime.daemon.control import ControlServer
from edge_runtime.daemon.deployment import Deployment
from edge_runtime.daemon.governor import Governor
from edge_runtime.daemon.hosts import Hosts
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.reaper import Reaper
from edge_runtime.daemon.room import Room
from edge_runtime.daemon.router import Router
from edge_runtime.daemon.shelf import Shelf
from edge_runtime.daemon.statistics import Statistics
from edge_runtime.daemon.templates import Templates
from edge_runtime.errors import EdgeError, NotFoundError, UnavailableError
from edge_runtime.events import Events, Level, LevelSink, RingSink, TeeSink, sink_for
from edge_runtime.files import SystemFiles
from edge_runtime.serving import sandbox
from edge_runtime.store import Freed, Store
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import Kind

# How often runs are compared with their time budget: a hang is found this much late.
HANG_CHECK_S = 0.25
# READY=1 is sent when every active model has been tried, or after this long: a device that compiles
# for minutes must not be taken for one that does not start.
READY_WAIT_S = 20.0
# After a probe without an answer: soon, because systemd allows two intervals only, and one bad
# moment (interval, probe_timeout_s, interval) would be more than that.
PROBE_RETRY_S = 1.0
# A worker gets 5 s, a template 2 s; systemd waits longer than both (TimeoutStopSec).
TEMPLATE_GRACE_S = 2.0


class Supervisor:
    """The daemon."""

    def __init__(
        self, state_dir: Path, run_dir: Path, config: Config, board: Board, clock: Clock
    ) -> None:
        self.config = config
        self.board = board
        self.clock = clock
        self.started_ns = clock.monotonic_ns()
        self.ring = RingSink(config.limits.history_events_max)
        log = LevelSink(sink_for(sys.stderr, os.environ, config.log.format), config.log.level)
        self.statistics = Statistics(self.started_ns)
        self.events = Events(TeeSink([self.ring, self.statistics, log]), clock)
        self._state_dir = state_dir
        self._run_dir = run_dir
        self._deployments: dict[str, Deployment] = {}
        self._access = resolve(config.access.infer, "access.infer")
        self._control_access = resolve(config.access.control, "access.control")
        self._model_access = {
            name: resolve(worker.access, f"models.{name}.access")
            for name, worker in config.models.items()
            if worker.access is not None
        }
        if config.workers.access is not None:
            self._access = resolve(config.workers.access, "workers.access")
        self._stop = asyncio.Event()
        budget = config.memory.budget_bytes
        self.governor = Governor(
            config.governor, board.ladder, self.deployments, self.events, clock
        )
        auto_bytes = board.budget_bytes(memory.limit_bytes())
        self._machine = machine.look(board)
        self._compiled = CompiledModels(
            SystemFiles(),
            state_dir / "compiled",
            config.store.compiled_bytes_max,
            config.store.free_bytes_min,
            self.events,
        )
        self._room = Room(auto_bytes if budget == "auto" else budget, self.deployments, clock)

    # -- the day of a daemon -----------------------------------------------------------------------

    async def run(self) -> None:
        """Start, serve until told to stop, stop."""
        loop = asyncio.get_running_loop()
        sandbox.become_subreaper()
        reaper = Reaper()
        reaper.start(loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._tell_board()
        self.shelf = Shelf(self._open_store())
        try:
            self.templates = Templates(reaper, self.events, self.clock, self.statistics.watch)
            self._hosts = Hosts(self.templates, self.events, self.statistics.watch)
            self.router = Router(self, self.config, self.events, self.clock)
            await self.shelf.read(self._compiled.tidy)
            # Before anybody can ask: whoever started us by connecting must find the model known.
            for name in await self.shelf.call(lambda opened: opened.models()):
                self.know(name)
            control = self._listen()
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._close, control)
                await self._open_metrics_port(stack)
                tasks = [loop.create_task(self._check_workers())]
                tasks.append(loop.create_task(self._feed_watchdog()))
                if self.config.governor.enabled:
                    tasks.append(loop.create_task(self.governor.run()))
                stack.callback(lambda: [task.cancel() for task in tasks])
                await self._resume()
                self._notify("READY=1\nSTATUS=serving")
                self.events.emit("daemon_ready", f"edge-runtime {__version__} serves")
                await self._stop.wait()
                self._notify("STOPPING=1")
                self.events.emit("daemon_stopping", "told to stop")
        finally:
            await self.shelf.close()

    def _tell_board(self) -> None:
        """Which device profile holds, and why."""
        board = self.board
        for problem in board.problems:
            self.events.emit("profile_problem", problem, level="warning")
        if board.name:
            self.events.emit(
                "profile_chosen",
                f"device profile {', '.join([board.name, *board.addons])}: "
                + "; ".join(board.reasons),
                profile=board.name,
            )

    def _open_store(self) -> Store:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        budget = self.config.store.byte_budget or None
        store = Store(
            self._state_dir,
            SystemFiles(),
            self.clock,
            byte_budget=budget,
            reserve_bytes=self.config.store.free_bytes_min,
        )
        recovery = store.open()
        for field in ("removed", "repaired", "damaged", "problems"):
            for note in getattr(recovery, field):
                level: Level = "warning" if field in ("damaged", "problems") else "info"
                self.events.emit(f"store_{field}", note, level=level)
        return store

    def _listen(self) -> ControlServer:
        given = systemd.listen_sockets(os.environ, os.getpid())
        access = self.config.access
        infer = given.pop("infer", None) or sockets.listen_unix(
            self._run_dir / "infer.sock", int(access.infer_mode, 8)
        )
        control = given.pop("control", None) or sockets.listen_unix(
            self._run_dir / "control.sock", int(access.control_mode, 8)
        )
        for name, sock in given.items():
            self.events.emit("socket_unknown", f"systemd gave a socket {name!r}", level="warning")
            sock.close()
        self.router.listen(infer)
        return ControlServer(
            control,
            Commands(self).table(),
            self._control_access,
            self.config.limits.control_connections_max,
            self.events,
        )

    async def _open_metrics_port(self, stack: contextlib.AsyncExitStack) -> None:
        """Where Prometheus may ask, if it was configured; serving does not depend on it."""
        port = self.config.metrics.port
        if not port:
            return
        from edge_runtime.daemon import exposition, scrape

        server = scrape.ScrapeServer(lambda: exposition.text(self))
        try:
            await server.start(port)
        except EdgeError as error:
            self.events.emit("metrics_port_failed", str(error), level="error", port=port)
            return
        stack.callback(server.close)
        self.events.emit("metrics_port_open", f"metrics on {scrape.HOST}:{port}", port=port)

    async def _resume(self) -> None:
        """Start every model that was active; told to stop meanwhile, leave them to their end."""
        waiting = [asyncio.ensure_future(one.resume()) for one in self._deployments.values()]
        self._resuming = waiting  # held: the loop keeps only weak references
        if not waiting:
            return
        stop: asyncio.Task[object] = asyncio.create_task(self._stop.wait())
        tried: asyncio.Task[object] = asyncio.create_task(
            asyncio.wait(waiting, timeout=READY_WAIT_S)
        )
        await asyncio.wait([tried, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (tried, stop):
            task.cancel()
        pending = sum(not one.done() for one in waiting)
        if pending:
            self._notify(f"STATUS={pending} of {len(waiting)} models are still loading")

    async def _close(self, control: ControlServer) -> None:
        self.shelf.interrupt()
        await control.close()
        self.router.closing = True
        await asyncio.gather(*(one.close() for one in self._deployments.values()))
        for name in list(self._deployments):
            self.router.unlisten(name)
        self.router.close()
        await self._hosts.stop(TEMPLATE_GRACE_S)
        await self.templates.stop(TEMPLATE_GRACE_S)
        self.events.emit("daemon_stopped", "stopped")

    # -- watching over it --------------------------------------------------------------------------

    async def _check_workers(self) -> None:
        while True:
            await asyncio.sleep(HANG_CHECK_S)
            self.statistics.look(self.clock.monotonic_ns())
            oom_kills = memory.oom_kills()
            for deployment in self._deployments.values():
                deployment.check(oom_kills)

    async def _feed_watchdog(self) -> None:
        """Tell systemd that we are well, whenever a probe of our own socket was answered."""
        interval_s = systemd.watchdog_interval_s(os.environ, os.getpid())
        if interval_s is None:
            return
        while True:
            wait_s = interval_s
            try:
                await self._probe()
            except (EdgeError, OSError, TimeoutError) as error:
                self.events.emit("probe_failed", f"own socket: {error}", level="error")
                wait_s = min(interval_s, PROBE_RETRY_S)
            else:
                self._notify("WATCHDOG=1")
            await asyncio.sleep(wait_s)

    async def _probe(self) -> None:
        """SERVER_LIVE through accept, read, route and answer, as a client would."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.config.watchdog.probe_timeout_s):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
                await loop.sock_connect(sock, str(self.router.address()))
                request = messages.encode_document(Kind.SERVER_LIVE, {}, request_id=1)
                await loop.sock_sendall(sock, request)
                answer = await loop.sock_recv(sock, 4096)
        prefix = frames.decode_prefix(answer.ljust(frames.PREFIX_SIZE, b"\0"))
        if prefix.kind != Kind.SERVER_LIVE | frames.RESPONSE:
            raise UnavailableError(f"the probe was answered by kind {prefix.kind:#04x}")

    def _notify(self, state: str) -> None:
        systemd.notify(state, os.environ)

    # -- models ------------------------------------------------------------------------------------

    def know(self, name: str) -> Deployment:
        """The deployment of an installed model, made when first heard of."""
        deployment = self._deployments.get(name)
        if deployment is None:
            deployment = Deployment(
                Parts(
                    name=name,
                    shelf=self.shelf,
                    hosts=self._hosts,
                    config=self.config,
                    board=self.board,
                    events=self.events,
                    clock=self.clock,
                    returned=lambda message, fds: self.router.take_back(message, fds, name),
                    make_room=self._room.make,
                    machine=self._machine,
                    compiled=self._compiled,
                )
            )
            self._deployments[name] = deployment
        self._listen_for(name)
        return deployment

    def _listen_for(self, name: str) -> None:
        """A model's own socket."""
        if not self.config.worker(name).own_socket or self.router.listening(name):
            return
        path = self._run_dir / "models" / f"{name}.sock"
        try:
            path.parent.mkdir(exist_ok=True)
            sock = sockets.listen_unix(path, int(self.config.access.infer_mode, 8))
        except (EdgeError, OSError) as error:
            self.events.emit("own_socket_failed", str(error), level="warning", model=name)
            return
        self.router.listen(sock, name)

    async def forget_removed(self, freed: Freed) -> None:
        """What was removed, and models of which nothing is installed any more."""
        for one in freed.generations:
            if one.name in self._deployments:
                self._deployments[one.name].forget(one.number)
        left = await self.shelf.read(lambda store: store.models())
        for name in self._deployments.keys() - set(left):
            del self._deployments[name]
            self.statistics.forget(name)
            self.router.unlisten(name)

    def deployment(self, name: str) -> Deployment:
        """The deployment of a model that is known to be installed."""
        return self._deployments[name]

    def known(self, name: str) -> Deployment:
        """The deployment of a model that a user named.

        Raises:
            NotFoundError: no such model is installed.
        """
        deployment = self._deployments.get(name)
        if deployment is None:
            raise NotFoundError(
                f"no model {name!r} is installed",
                expected=", ".join(self._deployments) or "a model; none is installed",
            )
        return deployment

    def deployments(self) -> list[Deployment]:
        """All of them."""
        return list(self._deployments.values())

    # -- what the router asks (its Directory) ------------------------------------------------------

    def worker(self, model: str, version: str) -> WorkerProcess | None:
        return self.known(model).serving(version)

    def access(self, model: str) -> Access:
        return self._model_access.get(model, self._access)

    def wake(self, model: str) -> asyncio.Task[Any] | None:
        return self.known(model).wake()

    def sleeping(self, model: str) -> bool:
        return self.known(model).state == "idle"

    def not_ready(self, model: str) -> UnavailableError:
        return self.known(model).not_ready()

    def models(self) -> list[str]:
        return sorted(self._deployments)

    def ready(self) -> bool:
        return all(one.state in ("ready", "idle", "stopped") for one in self._deployments.values())

    def connections(self) -> int:
        return sum(worker.connections() for worker in self._workers())

    def connections_of(self, uid: int) -> int:
        return sum(worker.connections_of(uid) for worker in self._workers())

    def _workers(self) -> Iterator[WorkerProcess]:
        return (worker for one in self._deployments.values() for worker, _ in one.workers())
