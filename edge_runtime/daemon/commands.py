"""What each control command does, step by step.

Law of this file: arguments are checked, the steps are called in order, the answer is built. The
keys of answers are documented in docs/protocol.md and stay.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edge_runtime.daemon import exposition, memory
from edge_runtime.daemon.trial import check_share
from edge_runtime.errors import ConflictError, EdgeError, NotFoundError, RequestError
from edge_runtime.metrics import CONTENT_TYPE
from edge_runtime.serving import page
from edge_runtime.store import Switch

if TYPE_CHECKING:
    from edge_runtime.daemon.control import Command, Say
    from edge_runtime.daemon.deployment import Change
    from edge_runtime.daemon.processes import WorkerProcess
    from edge_runtime.daemon.supervisor import Supervisor
    from edge_runtime.store import Freed, Generation, Store

T = TypeVar("T", bound=msgspec.Struct)
# Events that concern every model: part of each one's story.
OF_ALL_MODELS = frozenset({"governor_step", "throttled"})
# Without a share: a shadow sees everything and harms nobody, a split begins small.
SHARES = {"shadow": 1.0, "split": 0.1}
PROGRESS_STEP_BYTES = (
    4 * 1024 * 1024
)  # one event for so many bytes: a bar moves, a socket does not fill


class InstallArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`install`: the bundle's descriptor comes with the request."""

    activate: bool = False
    filename: str = "bundle"


class VersionArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's version."""

    name: str
    version: int


class TrialArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model, and to begin or change something a version of it and a share of its traffic."""

    name: str
    version: int | None = None
    share: float | None = None


class NameArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model."""

    name: str


class StatusArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`status`: with `buckets`, histograms too, for whoever makes differences of them."""

    buckets: bool = False


class NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing."""


class Commands:
    """The commands of one daemon."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._daemon = supervisor

    def table(self) -> dict[str, Command]:
        """Command name -> coroutine function."""
        return {
            "install": self.install,
            "activate": self.activate,
            "rollback": self.rollback,
            "shadow": self.shadow,
            "split": self.split,
            "promote": self.promote,
            "candidate_stop": self.candidate_stop,
            "unload": self.unload,
            "remove": self.remove,
            "gc": self.gc,
            "models": self.models,
            "ps": self.ps,
            "status": self.status,
            "metrics": self.metrics,
            "why": self.why,
            "config": self.config,
        }

    async def install(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Lint, copy into the store, and with `activate` make it serve."""
        arguments = _arguments(given, InstallArguments)
        if len(fds) != 1:
            raise RequestError(f"{len(fds)} descriptors came with install", expected="the bundle's")
        say({"event": "phase", "text": f"checking {arguments.filename}"})
        generation, added = await self._copy_in(fds.pop(), arguments.filename, say)
        daemon = self._daemon
        daemon.know(generation.name)
        daemon.events.emit(
            "bundle_installed",
            f"{generation.name}@{generation.version} installed",
            model=generation.name,
            version=generation.version,
            generation=generation.number,
            new=added,
        )
        answer = {
            "name": generation.name,
            "version": generation.version,
            "generation": generation.number,
            "new": added,
            "size_bytes": generation.size_bytes,
            "activated": False,
        }
        if arguments.activate:
            say({"event": "phase", "text": "loading, warming up, comparing goldens"})
            deployment = daemon.deployment(generation.name)
            change = await deployment.activate(generation, "installed and activated")
            answer |= _describe_change(generation.name, change) | {"activated": True}
        if not daemon.shelf.changing:  # else whoever installs now does it: no wait for that
            freed = await daemon.shelf.call(self._collect_garbage)
            if freed.size_bytes:
                await daemon.forget_removed(freed)
                daemon.events.emit(
                    "garbage_collected", f"{freed.size_bytes} bytes", freed_bytes=freed.size_bytes
                )
        return answer

    async def _copy_in(self, fd: int, filename: str, say: Say) -> tuple[Generation, bool]:
        """Lint and copy, in a thread; `fd` is closed when that has ended, not when its caller has,
        or it would read whatever got the number next.
        """
        loop = asyncio.get_running_loop()
        limit = self._daemon.config.limits.bundle_bytes_max
        reported = 0

        def progress(done: int, total: int) -> None:
            nonlocal reported
            if done - reported >= PROGRESS_STEP_BYTES or done == total:
                reported = done
                event = {"event": "progress", "text": "installing", "done": done, "total": total}
                loop.call_soon_threadsafe(say, event)

        def step(store: Store) -> tuple[Generation, bool]:
            try:
                return copy(store)
            finally:
                close()

        def copy(store: Store) -> tuple[Generation, bool]:
            # Needed at installs only: an idle daemon does without them.
            from edge_runtime.bundle import archive, lint
            from edge_runtime.bundle.source import from_path

            with archive.open_bundle(fd, where=filename, bundle_bytes_max=limit) as bundle:
                manifest = bundle.manifest
                lint.check(manifest, bundle.blob)  # before its bytes cost the disk anything
                before = _known(store, manifest.name, manifest.version)
                generation = store.install(
                    manifest.name,
                    manifest.version,
                    bundle.manifest_bytes,
                    bundle.blobs(),
                    progress,
                )
            try:  # once more what will be loaded: the client may have changed its file meanwhile
                lint.check(manifest, lambda sha256: from_path(store.blob_path(sha256)))
            except EdgeError:
                if not before:
                    store.remove(manifest.name, manifest.version)
                raise
            return generation, not before

        close = weakref.finalize(step, os.close, fd)  # once; also if the step never begins
        return await self._daemon.shelf.install(step)

    async def activate(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Make an installed version the one that serves."""
        arguments = _arguments(given, VersionArguments)
        generation = await self._daemon.shelf.read(
            lambda store: store.find(arguments.name, arguments.version)
        )
        say({"event": "phase", "text": "loading, warming up, comparing goldens"})
        deployment = self._daemon.deployment(arguments.name)
        change = await deployment.activate(generation, "activated")
        return _describe_change(arguments.name, change)

    async def rollback(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Make the previous version the one that serves."""
        name = _arguments(given, NameArguments).name
        change = await self._daemon.known(name).rollback("rolled back by command")
        return _describe_change(name, change)

    async def shadow(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Show answers to a candidate; without a version, what came of it."""
        return await self._try_out(given, say, "shadow")

    async def split(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Have a candidate answer requests; without a version, what came of it."""
        return await self._try_out(given, say, "split")

    async def _try_out(self, given: dict[str, Any], say: Say, way: str) -> dict[str, Any]:
        arguments = _arguments(given, TrialArguments)
        deployment = self._daemon.known(arguments.name)
        if arguments.version is None:
            if deployment.trial is None:
                raise NotFoundError(
                    f"{arguments.name} had no candidate since the daemon started",
                    remedy=f"edge-runtime {way} {arguments.name}@VERSION makes one",
                )
            return deployment.trial.report()
        share = check_share(SHARES[way] if arguments.share is None else arguments.share)
        version = arguments.version
        generation = await self._daemon.shelf.read(
            lambda store: store.find(arguments.name, version)
        )
        say({"event": "phase", "text": "loading, warming up, comparing goldens"})
        shadow, split = (share, None) if way == "shadow" else (None, share)
        return (await deployment.accompany(generation, shadow, split)).report()

    async def promote(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Make the candidate the version that serves."""
        name = _arguments(given, NameArguments).name
        change = await self._daemon.known(name).promote()
        return _describe_change(name, change)

    async def candidate_stop(
        self, given: dict[str, Any], fds: list[int], say: Say
    ) -> dict[str, Any]:
        """End the candidate; what came of it."""
        name = _arguments(given, NameArguments).name
        return (await self._daemon.known(name).stop_trial()).report()

    async def unload(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Stop serving a model; its versions stay installed."""
        name = _arguments(given, NameArguments).name
        change = await self._daemon.known(name).unload()
        return {"name": name, "version": change.version, "freed_bytes": change.freed_bytes}

    async def remove(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Delete an installed version that neither serves nor is the previous one."""
        arguments = _arguments(given, VersionArguments)
        candidate = self._daemon.known(arguments.name).candidate
        if candidate is not None and candidate.spec.version == arguments.version:
            raise ConflictError(
                f"{arguments.name}@{arguments.version} is the candidate",
                remedy=f"edge-runtime shadow {arguments.name} --stop",
            )
        freed = await self._daemon.shelf.call(
            lambda store: store.remove(arguments.name, arguments.version)
        )
        await self._daemon.forget_removed(freed)
        return {"name": arguments.name, "freed_bytes": freed.size_bytes}

    async def gc(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Delete what nothing needs, and the oldest versions over the byte budget."""
        _arguments(given, NoArguments)
        freed = await self._daemon.shelf.call(self._collect_garbage)
        await self._daemon.forget_removed(freed)
        return {
            "freed_bytes": freed.size_bytes,
            "blobs": len(freed.blobs),
            "removed": [f"{one.name}@{one.version}" for one in freed.generations],
            "held_back": freed.held_back,
        }

    def _collect_garbage(self, store: Store) -> Freed:
        """In the store's thread. What is being loaded or tried stays: it may be activated next."""
        every = self._daemon.deployments()
        return store.collect_garbage(keep={one.name: one.in_use() for one in every})

    async def models(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Every installed model with its state and versions."""
        _arguments(given, NoArguments)
        stored = [await self._stored(name) for name in self._daemon.models()]
        # All at one moment: what one model does and another does not must be true together.
        known = set(self._daemon.models())
        return {"models": [self._described(*one) for one in stored if one[0] in known]}

    async def _model(self, name: str) -> dict[str, Any]:
        return self._described(*await self._stored(name))

    async def _stored(self, name: str) -> tuple[str, tuple[Generation, ...], Switch]:
        shelf = self._daemon.shelf
        installed = await shelf.read(lambda store: store.generations(name))
        try:
            return name, installed, await shelf.read(lambda store: store.current(name))
        except EdgeError:  # removed just now, or its record cannot be read, which its state says
            return name, installed, Switch(name)

    def _described(
        self, name: str, installed: tuple[Generation, ...], switch: Switch
    ) -> dict[str, Any]:
        by_number = {one.number: one for one in installed}
        described = self._daemon.known(name).describe()
        for key, number in (("active", switch.active), ("previous", switch.previous)):
            generation = by_number.get(number) if number is not None else None
            if generation is not None and not described.get(key):
                described[key] = {"version": generation.version, "generation": generation.number}
            described.setdefault(key, None)
        described["since_wall_s"] = switch.since_wall_s
        described["reason"] = described["reason"] or switch.reason
        described["installed"] = [one.version for one in installed]
        return described

    async def ps(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Every process with its memory and counts."""
        _arguments(given, NoArguments)
        daemon = self._daemon
        own = memory.of(os.getpid())
        return {
            "daemon": {
                "pid": os.getpid(),
                "rss_bytes": own.rss_bytes,
                "pss_bytes": own.pss_bytes,
                "uptime_s": (daemon.clock.monotonic_ns() - daemon.started_ns) / 1e9,
                **daemon.router.statistics(),
            },
            "templates": [
                {
                    "backend": one.backend,
                    "version": one.version,
                    "pid": one.pid,
                    "state": "ready" if one.alive and one.ready.done() else "dead",
                    **_memory(one.pid if one.alive else 0),
                }
                for one in daemon.templates.all()
            ],
            "workers": [
                self._worker(worker, state, deployment.restarts)
                for deployment in daemon.deployments()
                for worker, state in deployment.workers()
            ],
        }

    def _worker(self, worker: WorkerProcess, state: str, restarts: int) -> dict[str, Any]:
        spec, status = worker.spec, worker.status
        return {
            "pid": worker.pid,
            "model": spec.model,
            "version": spec.version,
            "variant": spec.variant,
            "backend": spec.backend,
            "host": spec.host,
            "state": state if worker.serving else worker.phase,
            "connections": worker.connections(),
            "requests": status[page.REQUESTS],
            "errors": status[page.ERRORS],
            "refused": status[page.REFUSED],
            "expired": status[page.EXPIRED],
            "waiting": status[page.WAITING],
            "restarts": restarts,
            "batches": status[page.BATCHES],
            "batched": status[page.BATCHED],
            "cache_hits": status[page.CACHE_HITS],
            "cache_misses": status[page.CACHE_MISSES],
            "runners": worker.report.runners if worker.report else 0,
            "batch_rows_max": status[page.BATCH_ROWS_MAX] or 1,
            "batch_reason": worker.report.batch_reason if worker.report else "",
            "sandbox": worker.report.sandbox if worker.report else [],
            "uptime_s": (self._daemon.clock.monotonic_ns() - worker.started_ns) / 1e9,
            **worker.memory()._asdict(),
        }

    async def status(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """The daemon's health, and what each model is, has and did."""
        arguments = _arguments(given, StatusArguments)
        daemon, buckets = self._daemon, arguments.buckets
        document = await exposition.daemon_document(daemon)
        stored = [await self._stored(name) for name in daemon.models()]
        known = set(daemon.models())
        document["models"] = [
            self._described(*one) | exposition.model_document(daemon, one[0], buckets=buckets)
            for one in stored
            if one[0] in known
        ]
        return document | {"now_ns": daemon.clock.monotonic_ns()}

    async def metrics(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """Everything as Prometheus reads it."""
        _arguments(given, NoArguments)
        return {"content_type": CONTENT_TYPE, "text": await exposition.text(self._daemon)}

    async def why(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """What a model does now and the events that led to it, oldest first."""
        name = _arguments(given, NameArguments).name
        self._daemon.known(name)
        described = await self._model(name)
        history = [
            msgspec.to_builtins(event)
            for event in self._daemon.ring.newest()
            if event.fields.get("model") == name or event.name in OF_ALL_MODELS
        ]
        return {
            "name": name,
            "state": described["state"],
            "summary": _summary(described),
            "model": described,
            "device": exposition.device_document(self._daemon),
            "decision": self._daemon.known(name).decision(),
            "history": [
                {key: event[key] for key in ("wall_s", "level", "message", "fields")}
                | {"event": event["name"]}
                for event in history
            ],
            "now_wall_s": self._daemon.clock.wall_s(),
        }

    async def config(self, given: dict[str, Any], fds: list[int], say: Say) -> dict[str, Any]:
        """The configuration in force, and the device profile beneath it."""
        _arguments(given, NoArguments)
        config: dict[str, Any] = msgspec.to_builtins(self._daemon.config)
        return {"config": config, "profile": self._daemon.board.summary()}


def _arguments(given: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), where="arguments") from error


def _known(store: Store, name: str, version: int) -> bool:
    try:
        store.find(name, version)
    except NotFoundError:
        return False
    return True


def _describe_change(name: str, change: Change) -> dict[str, Any]:
    return {
        "name": name,
        "version": change.version,
        "variant": change.variant,
        "generation": change.switch.active,
        "previous": change.switch.previous,
        "connections_moved": change.moved,
        "swap_ms": change.swap_ms,
        "freed_bytes": change.freed_bytes,
        "warm": change.warm,
    }


def _memory(pid: int) -> dict[str, int]:
    return dict(memory.of(pid)._asdict()) if pid else {}


def _summary(described: dict[str, Any]) -> str:
    active = described["active"]
    state = described["state"]
    if active is None:
        return f"nothing serves: {described['reason'] or 'no version was activated'}"
    what = f"version {active['version']}"
    if active.get("variant"):
        what += f", variant {active['variant']} on {active['backend']}"
    return f"{what} is {state}: {described['reason']}"
