"""One selection: every variant that can run is loaded, measured, and the best is kept.

Law of this file: the workers of one selection, from their loads to the one that is left, and what
was found out about each variant. Verdicts are `serving.selection`'s; it gives nobody a role and
keeps nothing. Imported when there is something to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from edge_runtime.bundle.manifest import Manifest, Variant
from edge_runtime.daemon import energy
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.loading import Loader
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.processes import UnansweredError, WorkerProcess
from edge_runtime.daemon.selecting import Hurry
from edge_runtime.errors import EdgeError, GoldenError, ModelError, NoMemoryError
from edge_runtime.serving import selection
from edge_runtime.serving.selection import Measured
from edge_runtime.store import Generation
from edge_runtime.store.decisions import Decision, Tried

# A slice that takes so many times what it should, and at least so long, is not waited for. A slow
# card that is busy stalls whoever reads from it for seconds: that must not refuse a variant for as
# long as the decision stands. So a slice is tried twice.
SLICE_PATIENCE = 10.0
SLICE_S_MIN = 3.0


class Rounds(NamedTuple):
    """What a measurement gave."""

    measured: list[Measured]  # in the order of preference
    together: bool
    rounds: int
    note: str = ""


class Tryout:
    """One selection: the workers that it has made, and what was found out about each variant.

    Attributes:
        hurried: it was cut short, because nothing served any more.
    """

    def __init__(
        self,
        parts: Parts,
        crew: Crew,
        loader: Loader,
        generation: Generation,
        manifest: Manifest,
        hurry: Hurry,
    ) -> None:
        self._parts = parts
        self._crew = crew
        self._loader = loader
        self._generation = generation
        self._manifest = manifest
        self._hurry = hurry
        self._workers: dict[str, WorkerProcess] = {}  # in the order of preference
        self._tried: dict[str, Tried] = {}
        self._policy = parts.config.selection.policy
        self._no_room: NoMemoryError | None = None
        self._failure: EdgeError | None = None
        self._refused: set[str] = set()  # wrong, or failed
        self.hurried = False

    def kill_all(self) -> None:
        """Nothing of this selection stays."""
        for worker in self._workers.values():
            self._crew.kill(worker)

    async def decide(
        self, candidates: Sequence[selection.Candidate], asked: bool
    ) -> tuple[WorkerProcess, Decision]:
        """The worker of the best variant, and the decision without when and why it was made.

        Raises:
            NoMemoryError, ModelError: as `Selector.worker`.
        """
        for one in candidates:
            self._tried[one.variant.name] = _untried(one)
        variants = [one.variant for one in candidates if not one.skipped]
        if self._policy == "off":
            return await self._first(variants, asked)
        crowded = await self._load_all(variants, asked)
        if crowded:
            rounds = await self._apart(variants, asked)
        else:
            rounds = await self._in_turns()
        if not rounds.measured:
            raise self._unfit()
        decision = self._verdict(rounds, variants)
        worker = await self._winner(decision, asked)
        return worker, self._described(decision, variants)

    async def _first(
        self, variants: Sequence[Variant], asked: bool
    ) -> tuple[WorkerProcess, Decision]:
        """Without measuring: the first that is right serves, those behind it stand by."""
        for place, variant in enumerate(variants):
            if await self._load(variant, asked):
                self._rule(variant.name, "chosen", "the first in order that keeps its goldens")
                order = tuple(one.name for one in variants[place:])
                decision = self._decision(order, Rounds([], True, 0, "not measured"), "", 0.0)
                return self._workers[variant.name], self._described(decision, variants)
        raise self._unfit()

    # -- loading -----------------------------------------------------------------------------------

    async def _load_all(self, variants: Sequence[Variant], asked: bool) -> bool:
        """A worker for each; whether memory had no room for them all at once."""
        for variant in variants:
            # For the first one others may have to go; the choice among more is not worth that.
            await self._load(variant, asked and not self._workers)
            if self._workers and self._hurried():
                break
        return self._no_room is not None

    def _hurried(self) -> bool:
        self.hurried = self.hurried or self._hurry()
        return self.hurried

    async def _load(self, variant: Variant, asked: bool) -> bool:
        """Load one, note how that went; whether it is ready."""
        try:
            worker = await self._loader.load_variant(
                self._generation, self._manifest, variant, asked
            )
        except NoMemoryError as error:
            self._no_room = error
            self._rule(variant.name, "failed", str(error))
            return False
        except EdgeError as error:
            self._refuse(variant.name, error)
            return False
        self._workers[variant.name] = worker
        report = worker.report
        assert report is not None
        if self._tried[variant.name].verdict == "failed":  # for want of memory, the last time
            self._rule(variant.name, "fit", "")
        self._tried[variant.name] = msgspec.structs.replace(
            self._tried[variant.name],
            loaded=True,
            backend_version=worker.backend_version,
            goldens=report.goldens,
            golden_deviation=report.golden_deviation,
            placement=report.placement,
        )
        return True

    def _refuse(self, name: str, error: EdgeError) -> None:
        self._failure = error
        self._refused.add(name)
        self._rule(name, "wrong" if isinstance(error, GoldenError) else "failed", str(error))
        self._loader.tell_refused(self._generation, name, error)

    def _rule(self, name: str, verdict: str, reason: str) -> None:
        self._tried[name] = msgspec.structs.replace(
            self._tried[name], verdict=verdict, reason=reason
        )

    def _unfit(self) -> EdgeError:
        refused = [f"{one.variant}: {one.reason}" for one in self._tried.values() if one.reason]
        if self._no_room is not None:
            return self._no_room
        if len(refused) == 1 and self._failure is not None:
            return self._failure
        name = f"{self._generation.name}@{self._generation.version}"
        return ModelError(f"no variant of {name} is fit: " + "; ".join(refused))

    # -- measuring ---------------------------------------------------------------------------------

    async def _in_turns(self) -> Rounds:
        """All that are loaded, round after round."""
        if len(self._workers) < 2:
            return Rounds([Measured(name, ()) for name in self._workers], True, 0)
        async with self._parts.machine.turn:
            give_up_ns = self._give_up_ns()
            series: dict[str, Series] = {name: Series() for name in self._workers}
            rounds = 0
            while rounds <= selection.ROUNDS and not self._hurried():
                if rounds > 1 and not self._fits(give_up_ns):
                    break
                await self._round(series, rounds)
                rounds += 1
        note = "" if rounds > selection.ROUNDS else f"stopped after {rounds} rounds"
        measured = [self._measured(name, one) for name, one in series.items() if self._lives(name)]
        return Rounds(measured, True, max(rounds - 1, 0), note)

    async def _round(self, series: dict[str, Series], number: int) -> None:
        names = [name for name in series if self._lives(name)]
        for place in selection.turns(len(names), number) if names else ():
            await self._slice(names[place], series[names[place]])

    async def _apart(self, variants: Sequence[Variant], asked: bool) -> Rounds:
        """One after the other: each is loaded, measured and ended before the next."""
        await self._stop(list(self._workers))
        measured, per_variant_s = [], self._parts.config.selection.time_max_s / len(variants)
        for variant in variants:
            if variant.name in self._refused or not await self._load(variant, asked):
                continue
            one, name = Series(), variant.name
            async with self._parts.machine.turn:
                give_up_ns = self._parts.clock.monotonic_ns() + round(per_variant_s * 1e9)
                for number in range(selection.ROUNDS + 1):
                    late = self._parts.clock.monotonic_ns() > give_up_ns
                    if not self._lives(name) or (late and number > 1) or self._hurried():
                        break
                    await self._slice(name, one)
            if self._lives(name):
                measured.append(self._measured(name, one))
            await self._stop([name])
        note = "measured one after the other: memory had no room for all at once"
        return Rounds(measured, False, min((len(m.run_ns) for m in measured), default=0), note)

    def _give_up_ns(self) -> int:
        limit_s = self._parts.config.selection.time_max_s
        return self._parts.clock.monotonic_ns() + round(limit_s * 1e9)

    def _lives(self, name: str) -> bool:
        return name in self._workers and self._workers[name].serving

    def _fits(self, give_up_ns: int) -> bool:
        """Whether another round ends in time."""
        round_ns = sum(max(selection.SLICE_NS, self._run_ns(name)) for name in self._workers)
        return self._parts.clock.monotonic_ns() + round_ns <= give_up_ns

    def _run_ns(self, name: str) -> float:
        report = self._workers[name].report
        return report.run_ms_p50 * 1e6 if report is not None else 0.0

    async def _slice(self, name: str, series: Series) -> None:
        """One variant's part of a round; one that fails is refused and ended."""
        try:
            try:
                times_ns, used_uj = await self._runs(name)
            except UnansweredError:
                times_ns, used_uj = await self._runs(name)
        except EdgeError as error:
            self._refuse(name, error)
            self._crew.kill(self._workers.pop(name))
        else:
            series.add(times_ns, used_uj)

    async def _runs(self, name: str) -> tuple[list[int], float | None]:
        """A slice's runs of one variant: the time of each in ns, and what the machine used, in uJ.

        Raises:
            EdgeError: it failed, or gave no answer in time.
        """
        run_ns = self._run_ns(name)
        slice_ms = max(selection.SLICE_NS, run_ns) / 1e6
        patience_s = max(SLICE_S_MIN, slice_ms / 1e3 * SLICE_PATIENCE)
        before_uj = energy.read_uj()
        times_ns = await self._workers[name].measure(
            selection.runs_of_slice(run_ns), slice_ms, patience_s
        )
        return times_ns, energy.used_uj(before_uj, energy.read_uj())

    def _measured(self, name: str, series: Series) -> Measured:
        worker = self._workers[name]
        private_bytes = worker.memory().private_bytes
        found = series.measured(name, private_bytes)
        self._tried[name] = msgspec.structs.replace(
            self._tried[name],
            run_ms_p50=round(found.run_ms_p50, 6),
            run_ms_spread=round(found.run_ms_spread, 6),
            runs=found.runs,
            private_bytes=private_bytes,
            energy_uj=round(selection.median(found.energy_uj), 1) if found.energy_uj else 0.0,
        )
        return found

    # -- the verdict -------------------------------------------------------------------------------

    def _verdict(self, rounds: Rounds, variants: Sequence[Variant]) -> Decision:
        measured, note = rounds.measured, rounds.note
        names = {one.variant for one in measured}
        fit = [one for one in variants if one.name in names]
        plain = selection.reference(fit)
        if len(measured) < 2 or not all(one.run_ns for one in measured):
            only = "the only one that is right" if len(measured) < 2 else "first in order"
            for place, one in enumerate(measured):
                self._rule(one.variant, "fit" if place else "chosen", only if not place else "")
            order = tuple(one.variant for one in measured)
            return self._decision(order, rounds, plain, 0.0)
        policy = self._policy
        if policy == "energy" and not all(one.energy_uj for one in measured):
            policy = "latency"
            note = "; ".join(filter(None, (note, "energy cannot be read here: by latency")))
        verdict = selection.decide(
            policy,
            measured,
            plain,
            together=rounds.together,
            latency_ms_max=self._manifest.budgets.latency_ms,
        )
        for name, ruling in verdict.rulings.items():
            self._rule(name, ruling.verdict, ruling.reason)
        return self._decision(verdict.order, rounds._replace(note=note), plain, verdict.margin)

    def _decision(
        self, order: tuple[str, ...], rounds: Rounds, plain: str, margin: float
    ) -> Decision:
        return Decision(
            name=self._generation.name,
            generation=self._generation.number,
            fingerprint={},
            policy=self._policy,
            order=order,
            tried=(),
            reference=plain,
            margin=round(margin, 4),
            rounds=rounds.rounds,
            together=rounds.together,
            note=rounds.note,
        )

    def _described(self, decision: Decision, variants: Sequence[Variant]) -> Decision:
        """With what came of each. Those for which there was no time stand by behind the others."""
        late = [one.name for one in variants if not self._tried[one.name].loaded]
        order = [name for name in dict.fromkeys((*decision.order, *late)) if self._is_fit(name)]
        if self._tried[order[0]].verdict != "chosen":  # what was has died meanwhile
            self._rule(order[0], "chosen", "the next best")
        tried = tuple(self._tried.values())
        return msgspec.structs.replace(decision, order=tuple(order), tried=tried)

    def _is_fit(self, name: str) -> bool:
        return self._tried[name].verdict in ("chosen", "fit", "slower")

    async def _winner(self, decision: Decision, asked: bool) -> WorkerProcess:
        """The first of the order that is ready; the others are ended."""
        by_name = {one.name: one for one in self._manifest.variants}
        for name in decision.order:
            if self._lives(name) or await self._load(by_name[name], asked):
                await self._stop([one for one in self._workers if one != name])
                return self._workers[name]
        raise self._unfit()

    async def _stop(self, names: list[str]) -> None:
        for name in names:
            await self._crew.stop(self._workers.pop(name))


class Series:
    """What the slices of one variant gave, in order; the first of several only warms up."""

    def __init__(self) -> None:
        self._run_ns: list[float] = []
        self._energy_uj: list[float] = []
        self._runs = 0

    def add(self, times_ns: list[int], used_uj: float | None) -> None:
        """A slice."""
        self._run_ns.append(selection.median(times_ns))
        self._runs += len(times_ns)
        if used_uj is not None:
            self._energy_uj.append(used_uj / len(times_ns))

    def measured(self, variant: str, private_bytes: int) -> Measured:
        """All of them."""
        first = 1 if len(self._run_ns) > 1 else 0
        complete = len(self._energy_uj) == len(self._run_ns)
        return Measured(
            variant,
            tuple(self._run_ns[first:]),
            private_bytes,
            tuple(self._energy_uj[first:]) if complete else (),
            self._runs,
        )


def _untried(one: selection.Candidate) -> Tried:
    verdict = "skipped" if one.skipped else "fit"
    return Tried(one.variant.name, one.variant.backend, verdict, one.skipped)
