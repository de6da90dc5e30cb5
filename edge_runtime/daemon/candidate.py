"""A candidate beside the version that serves: when a trial begins, changes and ends.

Law of this file: the order of steps around a `Trial`, which holds what the two workers share. The
caller holds the model's lock wherever something is waited for. Nothing of it is on disk.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.selecting import Selector
from edge_runtime.daemon.trial import Trial
from edge_runtime.errors import ConflictError, EdgeError, ModelError
from edge_runtime.store import Generation


class Candidates:
    """The candidates of one model, one at a time."""

    def __init__(self, parts: Parts, crew: Crew, selector: Selector) -> None:
        self._parts = parts
        self._crew = crew
        self._selector = selector

    async def accompany(
        self,
        active: Generation | None,
        generation: Generation,
        shadow: float | None,
        split: float | None,
    ) -> Trial:
        """Load a candidate beside the active version, or change the shares of the one there is.

        Args:
            shadow, split: shares of the traffic, 0 to 1; None: as it is.

        Raises:
            ConflictError: another candidate is there, this version serves, or none does.
            ModelError: no variant of it loads and keeps its goldens.
        """
        trial = self._crew.trial if self._crew.candidate is not None else None
        if trial is None:
            trial = await self._begin(active, generation)
        elif trial.candidate.spec.generation != generation.number:
            raise ConflictError(
                f"{self._parts.name}@{trial.version} is the candidate",
                where=self._parts.name,
                remedy="promote it or stop it first",
            )
        trial.share(shadow, split)
        self._parts.emit(
            "candidate_shares",
            f"{self._parts.name}@{trial.version} is shown {trial.shadow_share:.1%} of the answers"
            f" and gives {trial.split_share:.1%} of them",
            version=trial.version,
            shadow_share=trial.shadow_share,
            split_share=trial.split_share,
        )
        return trial

    async def _begin(self, active: Generation | None, generation: Generation) -> Trial:
        crew = self._crew
        if active is None or crew.worker is None or active.number == generation.number:
            raise ConflictError(
                f"{self._parts.name}@{generation.version} cannot be a candidate:"
                + (" it serves" if active == generation else " no version serves beside it"),
                where=self._parts.name,
            )
        candidate = crew.warm
        if candidate is None or candidate.spec.generation != generation.number:
            candidate = await self._selector.worker(
                generation, asked=False, choose=True, hurry=lambda: crew.worker is None
            )
        else:
            crew.warm = None
        if crew.trial is not None:
            crew.trial.close()
        crew.trial = trial = Trial(candidate, active.version, self._parts.clock)
        if not candidate.alive:  # died while somebody waited for the disk, and was nobody's then
            self.end(f"the candidate died: {candidate.ended.result().detail}", level="error")
        await crew.hand_back(candidate)
        self.introduce()
        if not trial.live:
            raise ModelError(trial.ended, where=f"{self._parts.name}@{generation.version}")
        self._parts.emit(
            "trial_began",
            f"{self._parts.name}@{trial.version} is the candidate beside version {active.version}",
            version=trial.version,
        )
        return trial

    def introduce(self) -> None:
        """Have the active version's worker, maybe a new one, know the candidate."""
        if self._crew.candidate is None or self._crew.worker is None:
            return
        assert self._crew.trial is not None
        try:
            self._crew.trial.link(self._crew.worker)
        except (EdgeError, OSError) as error:
            candidate = self._crew.trial.candidate
            self.end(f"no memory or descriptor for it: {error}", level="error")
            self._crew.depart([candidate], "candidate_unloaded", "the candidate could not be tried")

    def end(self, reason: str, level: Any = "info") -> None:
        """The candidate is none any more; what becomes of its worker is the caller's."""
        trial = self._crew.trial
        if trial is None or not trial.live:
            return
        trial.end(reason)
        self._parts.emit(
            "trial_ended",
            f"{self._parts.name}@{trial.version}: {reason}; {trial.summary()}",
            level=level,
            version=trial.version,
        )

    async def stop(self) -> Trial:
        """End the candidate; a previous version that was warm before is so again.

        Raises:
            ConflictError: there is none.
        """
        crew, name = self._crew, self._parts.name
        candidate, trial = crew.candidate, crew.trial
        if candidate is None or trial is None:
            raise self.missing()
        self.end("stopped by command")
        switch = await self._parts.shelf.read(lambda store: store.current(name))
        previous = switch.previous == candidate.spec.generation
        if previous and candidate.serving and self._parts.worker_config.keep_previous_warm:
            crew.warm = candidate
            await crew.hand_back(candidate)
        else:
            await crew.hand_back(candidate)
            await crew.stop(candidate)
        return trial

    def missing(self) -> ConflictError:
        """What is told to whoever asks for a candidate when there is none."""
        trial = self._crew.trial
        last = f" (the last one: {trial.ended})" if trial else ""
        return ConflictError(
            f"{self._parts.name} has no candidate",
            where=self._parts.name,
            expected=f"`shadow` or `split` before{last}",
        )
