"""From an installed generation to a worker that is ready.

Law of this file: the steps of one load: room in memory, fork, load, goldens, what it really took.
It gives no role to the worker that it made and changes nothing on disk; one that is refused is
killed before the refusal is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.daemon import residency, specs
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.errors import EdgeError, ModelError, NoMemoryError
from edge_runtime.serving import channel
from edge_runtime.serving.health import Cause, Death
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.store import Generation

# Told of a worker that ended although nobody had asked it to.
Died = Callable[[WorkerProcess, Death], None]
# Told of a variant that is not fit.
Refused = Callable[[Generation, Variant, EdgeError], None]


class Loader:
    """Makes the workers of one model, one at a time: its caller holds the model's lock."""

    def __init__(self, parts: Parts, crew: Crew, died: Died) -> None:
        self._parts = parts
        self._crew = crew
        self._died = died
        self._under_way: WorkerProcess | None = None

    @property
    def under_way(self) -> bool:
        """Whether a worker is being loaded."""
        return self._under_way is not None

    def describe(self) -> dict[str, Any] | None:
        """What a load under way does now: fork, import, load, warmup, goldens."""
        if self._under_way is None:
            return None
        spec = self._under_way.spec
        return {"version": spec.version, "variant": spec.variant, "phase": self._under_way.phase}

    async def load(
        self,
        generation: Generation,
        manifest: Manifest,
        variants: Sequence[Variant],
        asked: bool,
        told: Refused | None = None,
    ) -> WorkerProcess:
        """Start workers for the variants in order until one is ready.

        Args:
            asked: somebody wants it now; other models may have to go for it.
            told: called with each variant that is not fit.

        Raises:
            NoMemoryError: one may be, when there is room in memory.
            ModelError: none is; all reasons are in the message.
        """
        refused: list[str] = []
        failure: EdgeError | None = None
        no_room: NoMemoryError | None = None
        for variant in variants:
            try:
                return await self.load_variant(generation, manifest, variant, asked)
            except EdgeError as error:
                failure = error
                no_room = error if isinstance(error, NoMemoryError) else no_room
                refused.append(f"{variant.name}: {error.message}")
                self.tell_refused(generation, variant.name, error)
                if told is not None:
                    told(generation, variant, error)
        assert failure is not None
        if no_room is not None or len(refused) == 1:
            raise no_room or failure
        raise ModelError(
            f"no variant of {self._parts.name}@{generation.version} is fit: " + "; ".join(refused)
        )

    def tell_refused(self, generation: Generation, variant: str, error: EdgeError) -> None:
        """A variant is not fit."""
        self._parts.emit(
            "variant_refused",
            str(error),
            level="warning",
            version=generation.version,
            variant=variant,
            code=error.code,
        )

    async def load_variant(
        self, generation: Generation, manifest: Manifest, variant: Variant, asked: bool
    ) -> WorkerProcess:
        """A ready worker for one variant.

        Raises:
            NoMemoryError: there is no room for it.
            EdgeError: it is not fit.
        """
        spec = await self._spec(generation, manifest, variant)
        stated_bytes = manifest.budgets.memory_bytes
        need_bytes = residency.predicted_bytes(
            stated_bytes, self._crew.expected_bytes(spec), variant.artifact.size
        )
        await self._parts.make_room(self._parts.name, need_bytes, asked)
        worker = self._crew.newcomer(spec, need_bytes)  # no wait in between: the room is its own
        self._under_way = worker
        try:
            report = await self._bring_up(worker)
            await self._check_memory(worker, stated_bytes, asked)
        except BaseException:
            self._crew.kill(worker)
            raise
        finally:
            self._under_way = None
        self._watch(worker)
        self._tell_ready(worker, report)
        return worker

    async def _spec(
        self, generation: Generation, manifest: Manifest, variant: Variant
    ) -> WorkerSpec:
        spec = await self._parts.shelf.read(
            lambda store: specs.worker_spec(
                manifest,
                variant,
                generation.number,
                self._parts.worker_config,
                self._parts.config.limits,
                store.blob_path,
                self._parts.board,
            )
        )
        kept = self._parts.compiled.directory(spec.artifact_sha256)
        return msgspec.structs.replace(spec, compiled_dir=str(kept)) if kept else spec

    async def _bring_up(self, worker: WorkerProcess) -> channel.Ready:
        """Fork it and wait until it is ready.

        Raises:
            ModelError: it takes too long.
            EdgeError: what it or its template failed of.
        """
        limit_s = self._parts.worker_config.load_time_max_s
        await self._parts.hosts.turn(worker)  # as long as others take, each of which has its limit
        try:
            async with asyncio.timeout(limit_s):
                await self._parts.hosts.fork(worker)
                report = await asyncio.shield(worker.ready)
        except TimeoutError:
            spec = worker.spec
            raise ModelError(
                f"{worker.phase} took longer than {limit_s:g} s",
                where=f"{spec.model}@{spec.version} variant {spec.variant}",
                remedy="raise load_time_max_s if this device compiles models",
            ) from None
        return report

    async def _check_memory(self, worker: WorkerProcess, stated_bytes: int, asked: bool) -> None:
        """Hold a loaded worker to what its manifest states and to the budget of all.

        Raises:
            ModelError: it takes more than stated.
            NoMemoryError: it takes more than was expected, and there is no room for that.
        """
        spec = worker.spec
        taken_bytes = self._crew.note_loaded(worker)
        if stated_bytes and taken_bytes > stated_bytes:
            raise ModelError(
                f"takes {taken_bytes} bytes of memory",
                where=f"{spec.model}@{spec.version} variant {spec.variant}",
                expected=f"<= {stated_bytes} bytes (model.yaml: budgets.memory_bytes)",
                remedy="state a larger budget in the bundle, or use a smaller variant",
            )
        await self._parts.make_room(self._parts.name, 0, asked)

    def _watch(self, worker: WorkerProcess) -> None:
        async def watch() -> None:
            death = await worker.ended
            if death.cause is not Cause.STOPPED:
                self._died(worker, death)

        self._crew.spawn(watch())

    def _tell_ready(self, worker: WorkerProcess, report: channel.Ready) -> None:
        spec = worker.spec
        self._parts.emit(
            "worker_ready",
            f"{spec.model}@{spec.version} {spec.variant} ready:"
            f" load {report.load_ms:.0f} ms, {report.goldens} goldens kept,"
            f" run {report.run_ms_p50:.3f} ms",
            version=spec.version,
            generation=spec.generation,
            variant=spec.variant,
            backend=spec.backend,
            pid=worker.pid,
            runners=report.runners,
        )
        if report.cpu_fallback:
            self._parts.emit(
                "cpu_fallback",
                f"{spec.model}@{spec.version} {spec.variant}: {report.cpu_fallback}",
                level="warning",
                version=spec.version,
                variant=spec.variant,
                device=worker.device,
            )
