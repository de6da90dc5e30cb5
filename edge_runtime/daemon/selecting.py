"""Which variant of a generation serves: measured once, kept, and left when it fails.

Law of this file: the order of steps of a selection, and the decisions of one model in memory and on
disk. Verdicts are `serving.selection`'s and `standing`'s, the measuring is `tryout`'s; no worker
gets a role here. The caller holds the model's lock wherever something is waited for.

A decision that cannot be stored is used all the same, and made again after the next start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.daemon import specs
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.loading import Loader
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.errors import EdgeError, GoldenError, ModelError
from edge_runtime.serving import governing, standing
from edge_runtime.serving.health import Cause
from edge_runtime.store import Generation
from edge_runtime.store.decisions import Decision, Left

if TYPE_CHECKING:
    from edge_runtime.serving.selection import Candidate

# Whether to stop measuring: nothing serves any more.
Hurry = Callable[[], bool]


class Selector:
    """The decisions about one model's generations."""

    def __init__(self, parts: Parts, crew: Crew, loader: Loader) -> None:
        self._parts = parts
        self._crew = crew
        self._loader = loader
        self._known: dict[int, Decision | None] = {}
        self.slim = False  # the device is hot: the next smaller variant goes before the best
        self._single: set[int] = set()  # generations without a choice

    # -- what is known ----------------------------------------------------------------------------

    async def decision(self, number: int) -> Decision | None:
        """The decision about a generation, if there is one."""
        if number not in self._known:
            name = self._parts.name
            self._known[number] = await self._parts.shelf.read(
                lambda store: store.decision(name, number)
            )
        return self._known[number]

    def describe(self, number: int) -> dict[str, Any] | None:
        """The decision for `why`: its fields, and of each variant whether it may serve."""
        decision = self._known.get(number)
        if decision is None:
            return None
        document: dict[str, Any] = msgspec.to_builtins(decision)
        return document

    def forget(self, number: int) -> None:
        """A generation was removed."""
        self._known.pop(number, None)
        self._single.discard(number)

    def left(self, number: int) -> list[str]:
        """The variants that are not used any more, in the order in which they were left."""
        decision = self._known.get(number)
        return [one.variant for one in decision.left] if decision is not None else []

    async def due(self, generation: Generation) -> str:
        """Why a new decision about a generation is needed, when it is activated; "": it is not."""
        return await self._due(generation, activating=True)

    async def outdated(self, generation: Generation) -> str:
        """The same while it serves: a variant that was left stays left."""
        return await self._due(generation, activating=False)

    async def _due(self, generation: Generation, activating: bool) -> str:
        if generation.number in self._single:
            return ""
        manifest = await self._parts.shelf.manifest(generation)
        if not self._has_choice(generation, manifest):
            return ""
        return await self._stale(generation, manifest, activating)

    def _has_choice(self, generation: Generation, manifest: Manifest) -> bool:
        if len(manifest.variants) > 1 and not self._parts.worker_config.variant:
            return True
        self._single.add(generation.number)  # a switch to it need not read its manifest again
        return False

    async def _stale(self, generation: Generation, manifest: Manifest, activating: bool) -> str:
        decision = await self.decision(generation.number)
        if decision is None:
            return "it was not decided yet"
        if not decision.fingerprint:
            return "the last choice was made in a hurry"
        if activating and decision.left:
            return f"{decision.left[-1].variant} had been left"
        return standing.changed(decision, self._fingerprint(generation, manifest))

    def _fingerprint(self, generation: Generation, manifest: Manifest) -> dict[str, str]:
        backends = sorted({one.backend for one in manifest.variants})
        return {
            **self._parts.machine.fingerprint(backends),
            "bundle": generation.manifest_sha256[:16],
            "policy": self._parts.config.selection.policy,
            "cpuset": self._parts.worker_config.cpuset,
        }

    # -- a worker of the right variant -------------------------------------------------------------

    async def worker(
        self, generation: Generation, *, asked: bool, choose: bool = False, hurry: Hurry = bool
    ) -> WorkerProcess:
        """A ready worker for a generation, of the variant that is to serve.

        Args:
            asked: somebody wants it now; other models may have to go for it.
            choose: decide first, if that is due. Otherwise an old decision is good enough.
            hurry: asked now and then; true: no time to measure.

        Raises:
            NoMemoryError: one may be, when there is room in memory.
            ModelError: no variant is fit; all reasons are in the message.
        """
        manifest = await self._parts.shelf.manifest(generation)
        if not self._has_choice(generation, manifest):
            given = specs.candidates(manifest, self._parts.worker_config)
            return await self._loader.load(generation, manifest, given, asked)
        why = await self._stale(generation, manifest, activating=True) if choose else ""
        if why:
            return await self._choose(generation, manifest, asked, hurry, why)
        variants = self._in_order(await self.decision(generation.number), manifest)
        if not variants:
            raise self._unfit(generation, manifest)
        return await self._loader.load(generation, manifest, variants, asked, self._note_refusal)

    async def first(self, generation: Generation) -> str:
        """The variant that is to serve now, without deciding anew; "": there is no choice."""
        manifest = await self._parts.shelf.manifest(generation)
        if not self._has_choice(generation, manifest):
            return ""
        variants = self._in_order(await self.decision(generation.number), manifest)
        return variants[0].name if variants else ""

    def _in_order(self, decision: Decision | None, manifest: Manifest) -> Sequence[Variant]:
        by_name = {one.name: one for one in manifest.variants}
        if decision is not None and by_name.keys() >= set(decision.order):
            names = list(standing.to_load(decision))
        else:
            names = [one.variant.name for one in self._candidates(manifest) if not one.skipped]
        if self.slim and names:
            tried = decision.tried if decision is not None else ()
            slower = {one.variant for one in tried if one.verdict == "slower"}
            sizes = {name: one.artifact.size for name, one in by_name.items()}
            names = governing.slimmed(names, sizes, slower)
        return [by_name[name] for name in names]

    def _unfit(self, generation: Generation, manifest: Manifest) -> ModelError:
        reasons = "; ".join(
            f"{one.variant.name}: {one.skipped}" for one in self._candidates(manifest)
        )
        return ModelError(
            f"no variant of {generation.name}@{generation.version} can run here: {reasons}"
        )

    def _candidates(self, manifest: Manifest) -> tuple[Candidate, ...]:
        from edge_runtime.serving import selection  # only where there is something to choose

        machine = self._parts.machine
        return selection.candidates(manifest, machine.order, machine.runnable)

    # -- leaving a variant -------------------------------------------------------------------------

    def another(self, worker: WorkerProcess) -> str:
        """The variant that takes over when this worker's is left; "": there is none."""
        decision = self._known.get(worker.spec.generation)
        if decision is None or self._parts.worker_config.variant:
            return ""
        names = [one for one in standing.remaining(decision) if one != worker.spec.variant]
        return names[0] if names else ""

    def leave(self, number: int, variant: str, reason: str, cause: Cause) -> None:
        """A variant is not used again until a new decision. At once; on disk a moment later."""
        decision = self._known.get(number)
        if decision is None:
            return
        left = Left(variant, reason, str(cause), self._parts.clock.wall_s())
        self._known[number] = decision = standing.without(decision, left)
        self._parts.emit(
            "variant_left",
            f"{variant} is not used any more until the next activation: {reason}",
            level="error",
            generation=number,
            variant=variant,
            cause=str(cause),
        )
        self._crew.spawn(self._keep(number))

    def _note_refusal(self, generation: Generation, variant: Variant, error: EdgeError) -> None:
        """A variant that gave right answers when it was decided, and now does not."""
        decision = self._known.get(generation.number)
        if decision is None or variant.name not in standing.remaining(decision):
            return
        if isinstance(error, GoldenError):
            self.leave(generation.number, variant.name, str(error), Cause.GOLDEN)

    async def _keep(self, number: int) -> None:
        """Store what is decided about a generation now."""
        decision = self._known.get(number)
        if decision is None:  # removed meanwhile
            return
        try:
            await self._parts.shelf.switch(lambda store: store.keep_decision(decision))
        except EdgeError as error:
            self._parts.emit(
                "decision_not_stored",
                f"what was decided is used, and found out again after a restart: {error}",
                level="warning",
                generation=number,
            )

    # -- deciding ----------------------------------------------------------------------------------

    async def _choose(
        self, generation: Generation, manifest: Manifest, asked: bool, hurry: Hurry, why: str
    ) -> WorkerProcess:
        """Load every variant that can run, measure them, keep the best and the decision."""
        from edge_runtime.daemon.tryout import Tryout  # as above: an idle daemon does without it

        began_ns = self._parts.clock.monotonic_ns()
        tryout = Tryout(self._parts, self._crew, self._loader, generation, manifest, hurry)
        try:
            worker, decision = await tryout.decide(self._candidates(manifest), asked)
            decision = msgspec.structs.replace(
                decision,
                # One made in a hurry rests on nothing: the next occasion makes it again.
                fingerprint={} if tryout.hurried else self._fingerprint(generation, manifest),
                decided_wall_s=self._parts.clock.wall_s(),
                took_s=round((self._parts.clock.monotonic_ns() - began_ns) / 1e9, 3),
            )
            self._known[generation.number] = decision
            await self._keep(generation.number)
        except BaseException:
            tryout.kill_all()
            raise
        chosen = next(one for one in decision.tried if one.variant == worker.spec.variant)
        self._parts.emit(
            "variant_selected",
            f"{generation.name}@{generation.version}: {chosen.variant} of {len(decision.tried)}"
            f" variants ({chosen.reason}), in {decision.took_s:.1f} s because {why}",
            version=generation.version,
            generation=generation.number,
            variant=chosen.variant,
            run_ms=chosen.run_ms_p50,
            took_s=decision.took_s,
        )
        return worker
