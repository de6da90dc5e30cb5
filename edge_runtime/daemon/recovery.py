"""What becomes of a model whose worker died, rests, or has to be found again after a start.

Law of this file: the order of steps from an end to the next worker: the same variant again with
growing pauses, the next variant, the previous generation. Verdicts are `serving.health`'s and
`standing`'s; which generation is active changes by the `rollback` that is given to it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from edge_runtime.daemon import specs
from edge_runtime.daemon.candidate import Candidates
from edge_runtime.daemon.crew import Crew
from edge_runtime.daemon.parts import Parts
from edge_runtime.daemon.post import Post
from edge_runtime.daemon.processes import WorkerProcess
from edge_runtime.daemon.selecting import Selector
from edge_runtime.errors import ConflictError, EdgeError, NoMemoryError
from edge_runtime.serving import health, standing
from edge_runtime.serving.health import Cause, Death

# How many deaths are remembered: more than any sensible deaths_max.
DEATHS_KEPT = 1000


class Recovery:
    """Of one model."""

    def __init__(
        self,
        parts: Parts,
        crew: Crew,
        post: Post,
        selector: Selector,
        candidates: Candidates,
        rollback: Callable[[str], Awaitable[int]],
    ) -> None:
        """See above.

        Args:
            rollback: has the previous generation serve, for a reason; its version.
        """
        self._parts = parts
        self._crew = crew
        self._post = post
        self._selector = selector
        self._candidates = candidates
        self._rollback = rollback
        self._deaths_ns: list[int] = []
        self._task: asyncio.Task[Any] | None = None
        self._waking: asyncio.Task[Any] | None = None
        self._refused_until_ns = 0
        self.refusal: NoMemoryError | None = None

    # -- from rest, and after a start --------------------------------------------------------------

    def resumes(self) -> None:
        """The running task is a recovery, which a command may supersede."""
        self._task = asyncio.current_task()

    async def unreadable(self, error: EdgeError) -> None:
        """The record of what is active cannot be read: nothing is known of it."""
        self._post.fail(error)
        await self._fall_back(f"it cannot be read: {error}")

    def wake(self, then: Callable[[], None]) -> asyncio.Task[Any] | None:
        """Load an idle model again because somebody asks; None: it is not idle, or it was refused
        memory a moment ago.

        Args:
            then: called afterwards.
        """
        if self._waking is None or self._waking.done():
            refused = self._parts.clock.monotonic_ns() < self._refused_until_ns
            if self._post.state != "idle" or refused or self._post.closing:
                return None
            self._waking = self._crew.spawn(self._wake(then))
        return self._waking

    async def _wake(self, then: Callable[[], None]) -> None:
        async with self._post.lock:
            if self._post.state == "idle" and self._post.active is not None:
                self._post.reason = "asked for again"
                await self.restart(asked=True)
        then()

    async def restart(self, asked: bool) -> WorkerProcess | None:
        """Load the active generation again; a failure counts as a death. Never raises."""
        assert self._post.active is not None
        self._post.state = "loading"
        try:
            worker = self._crew.worker = await self._selector.worker(self._post.active, asked=asked)
        except NoMemoryError as error:  # nothing is wrong with it: it waits until it is asked for
            self._post.stand("idle", str(error))
            if asked:
                self._refuse(error)
        except EdgeError as error:
            self._post.fail(error)
            self._after_death()
        else:
            self._post.stand("ready", self._post.reason or "started")
            self.refusal = None
            self._candidates.introduce()
            self.seated(worker)
        return self._crew.worker

    def _refuse(self, error: NoMemoryError) -> None:
        """Whoever asks until its time to retry gets the same answer, without another attempt."""
        self.refusal = error
        retry_after_ns = round((error.retry_after_s or 0.0) * 1e9)
        self._refused_until_ns = self._parts.clock.monotonic_ns() + retry_after_ns

    # -- making way --------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether the next worker is on its way, or planned."""
        return self._task is not None and not self._task.done()

    def cancel(self) -> None:
        """But for one that switches already, unless the daemon stops."""
        spared = asyncio.current_task(), self._post.spared
        if self._task is not None and self._task not in spared:
            self._task.cancel()
            self._task = None
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None

    def supersede(self) -> None:
        """Another generation serves: nothing of the one before counts any more."""
        self._deaths_ns.clear()
        self.refusal = None
        self.cancel()

    def plan_if_missing(self) -> None:
        """A command failed for which a recovery had made way: it starts again."""
        missing = self._crew.worker is None and self._post.state != "idle"
        if self._post.active is not None and missing and not self.under_way:
            self._post.state = "backoff"
            self._plan()

    # -- deaths ------------------------------------------------------------------------------------

    def died(self, worker: WorkerProcess, death: Death) -> None:
        """A worker ended although nobody had asked it to."""
        if self._post.closing:
            return
        self._parts.emit(
            "worker_died",
            f"{self._parts.name}@{worker.spec.version} {worker.spec.variant}: {death.detail}",
            level="error",
            version=worker.spec.version,
            variant=worker.spec.variant,
            cause=str(death.cause),
            pid=worker.pid,
            serving=worker is self._crew.worker,
        )
        self._lost(worker, death)

    def seated(self, worker: WorkerProcess) -> None:
        """A worker has its role: see to one that died before, while somebody waited for the disk,
        and was nobody's then.
        """
        if not worker.alive and not self._post.closing:
            self._lost(worker, worker.ended.result())

    def _lost(self, worker: WorkerProcess, death: Death) -> None:
        """What follows from the death of a worker with the role that it has, if it has one."""
        if worker is self._crew.warm:
            self._crew.warm = None
        if worker is self._crew.candidate:
            self._candidates.end(f"the candidate died: {death.detail}", level="error")
        if worker is self._crew.worker:
            self._crew.worker = None
            self._post.stand("backoff", death.detail)
            if death.cause is Cause.NEIGHBOUR:  # whoever it was is counted; this one is not
                self._task = self._crew.spawn(self._recover(health.Verdict(0.0, False)))
            elif not self._leave_variant(worker, death):
                self._after_death()

    def _leave_variant(self, worker: WorkerProcess, death: Death) -> bool:
        """Have the next variant take over when this one is not to be trusted; whether it does."""
        now_ns, rules = self._parts.clock.monotonic_ns(), self._parts.worker_config.restart
        deaths = 1 + health.recent(self._deaths_ns, now_ns, rules.window_s)
        following = self._selector.another(worker)
        if not following or not standing.must_leave(death.cause, deaths, rules.variant_deaths_max):
            return False
        self._deaths_ns.clear()  # they were this variant's
        self._selector.leave(worker.spec.generation, worker.spec.variant, death.detail, death.cause)
        self._task = self._crew.spawn(self._fail_over(worker, death, now_ns))
        return True

    async def _fail_over(self, worker: WorkerProcess, death: Death, died_ns: int) -> None:
        """The next variant of the same generation; the previous generation only after the last."""
        generation, post = self._post.active, self._post
        async with post.lock:
            if post.active is not generation or self._crew.worker is not None or post.closing:
                return
            post.restarts += 1
            following = await self.restart(asked=False)
            if following is None:
                return
            gap_ms = (self._parts.clock.monotonic_ns() - died_ns) / 1e6
            self._parts.emit(
                "variant_failed_over",
                f"{following.spec.variant} answers instead of {worker.spec.variant},"
                f" {gap_ms:.0f} ms after its end ({death.detail})",
                level="error",
                version=following.spec.version,
                variant=following.spec.variant,
                left=worker.spec.variant,
                cause=str(death.cause),
                gap_ms=round(gap_ms, 3),
            )

    def _after_death(self) -> None:
        """Count a death of the active generation and plan what comes next."""
        self._deaths_ns = [*self._deaths_ns, self._parts.clock.monotonic_ns()][-DEATHS_KEPT:]
        self._plan()

    def _plan(self) -> None:
        now_ns = self._parts.clock.monotonic_ns()
        policy = specs.restart_policy(self._parts.worker_config)
        verdict = health.after_death(self._deaths_ns, now_ns, policy)
        if not self._post.closing:
            self._task = self._crew.spawn(self._recover(verdict))

    async def _recover(self, verdict: health.Verdict) -> None:
        generation, post = self._post.active, self._post
        if verdict.give_up and await self._fall_back(
            f"died {len(self._deaths_ns)} times: {post.reason}"
        ):
            return
        await asyncio.sleep(verdict.restart_after_s)
        async with post.lock:
            if generation is not None and post.active is generation and self._crew.worker is None:
                post.restarts += 1
                await self.restart(asked=False)

    async def _fall_back(self, what: str) -> bool:
        """The previous generation takes over from one that cannot serve. Whether it could.

        Args:
            what: happened to that one.
        """
        name, active = self._parts.name, self._post.active
        bad = f"{name}@{active.version}" if active is not None else "the active version"
        try:
            version = await self._rollback(f"{bad}: {what}")
        except ConflictError:  # there is none: the reason stays what happened to this one
            self._post.state = "failed"
            return False
        except EdgeError as error:
            self._post.fail(error)
            return False
        self._parts.emit(
            "fell_back",
            f"{name}@{version} took over from a generation that could not serve",
            level="error",
            version=version,
        )
        return True
