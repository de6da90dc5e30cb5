"""From a request that is here to its answer: who runs, together with whom, and what is said.

Law of this file: what runs and what becomes of it. `admission` lets requests wait or refuses them,
`waiting` says who is next, `batching` what can run together, `running` calls the model, `peers`
sends the answers. It never waits and reads no socket; it is called by the loop, and by a runner
that has the loop's lock.
"""

from __future__ import annotations

import select

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import (
    BackendError,
    DeadlineError,
    EdgeError,
    InternalError,
    ModelError,
    UnavailableError,
)
from edge_runtime.serving import batching, page
from edge_runtime.serving.admission import Admission
from edge_runtime.serving.batching import Batches
from edge_runtime.serving.cache import ResponseCache
from edge_runtime.serving.company import Company
from edge_runtime.serving.heartbeat import Heart
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.plan import Planner
from edge_runtime.serving.running import Done, Request, Runners, Work, edge_error, execute
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import frames

# Errors of the library, not of a request.
FAILURES = frozenset({BackendError.code, ModelError.code, InternalError.code})


class Dispatch:
    """Of one worker.

    Attributes:
        company: the trial's other version, which may take a request or see an answer.
        runners: threads that run; None: the loop does.
        hold_until_ns: a batch is being waited for until then; 0: none.
        stopping: runners begin nothing more.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        planner: Planner,
        epoll: select.epoll,
        status: memoryview,
        peers: Peers,
        slots: Slots,
        admission: Admission,
        heart: Heart | None,
        runners: int,
        batch_rows_max: int,
        batch_rows_tried: int,
    ) -> None:
        self._spec = spec
        self._status = status
        self._peers = peers
        self._slots = slots
        self._admission = admission
        self._line = admission.line
        self._pending = admission.line.entries
        self._heart = heart
        self._rows_max = batch_rows_max
        # Of batches in this thread: fewer than may be, where so many hold the loop up for too long.
        self._rows_inline = batch_rows_tried or batch_rows_max
        self._window_ns = round(spec.batch_window_ms * 1e6) if batch_rows_max > 1 else 0
        self._turn_ns_mean = 0.0  # a run of one or a batch: what is left of a deadline must hold it
        self._batches = Batches()
        self._cache = ResponseCache(spec.cache_bytes_max) if spec.cache_bytes_max else None
        self._dismissed = False
        self.hold_until_ns = 0
        self.stopping = False
        self.company = Company(epoll, spec, planner, status, peers, slots, self.queue)
        self.runners = Runners(runners, status, self._ran) if runners else None
        status[page.BATCH_ROWS_MAX] = batch_rows_max

    @property
    def plain(self) -> bool:
        """Whether whoever is next runs at once, in the loop's thread."""
        return self.runners is None and not self._window_ns

    def every_request_runs_here(self) -> bool:
        """Whether neither the cache nor the candidate may answer instead of the model."""
        return self._cache is None and self.company.splitter is None

    def at_rest(self) -> bool:
        """Whether no run is under way."""
        return self.runners is None or self.runners.idle == self.runners.count

    def trim(self, bytes_max: int) -> None:
        """Give back memory of batches that nobody uses, but for so much."""
        self._batches.trim(bytes_max)

    def dismiss(self) -> None:
        """The model gives wrong answers: whoever waits, or comes yet, is turned away."""
        self._dismissed = True
        self._admission.dismiss(self._not_any_more())

    def _not_any_more(self) -> UnavailableError:
        return UnavailableError(
            "this variant was just found to give wrong answers; another one takes over",
            where=self._spec.model,
            remedy=f"try again; see `edge-runtime why {self._spec.model}`",
            retry_after_s=0.02,
        )

    # -- in ----------------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """A request whose tensors are here waits for its turn, unless the candidate takes it."""
        if self.company.splitter is None or not self.company.takes(
            request, self._admission.run_ns_mean
        ):
            self.queue(request)

    def queue(self, request: Request) -> None:
        """Have a request run here, unless its answer is known."""
        if self._dismissed:  # the candidate gave it back
            request.connection.in_flight += 1
            self._admission.turn_down(request, self._not_any_more())
        elif self._cache is None or not self._answer_from_cache(self._cache, request):
            self._admission.put(request)

    def _answer_from_cache(self, cache: ResponseCache, request: Request) -> bool:
        slot = request.slot
        assert slot is not None
        if not request.plan.cacheable:
            return False
        key = cache.key(request.plan.serial, slot.body)
        answer = cache.get(key)
        self._status[page.CACHE_HITS] = cache.hits
        self._status[page.CACHE_MISSES] = cache.misses
        if answer is None:
            request.cache_key = key
            return False
        request.connection.in_flight += 1
        self._finish(request, memoryview(bytearray(answer)), None)
        return True

    # -- running -----------------------------------------------------------------------------------

    def run_pending(self) -> None:
        """Run who is next, or have runners do it; not yet, if company is worth waiting for."""
        if self._window_ns and self._holds():
            self._status[page.WAITING] = len(self._pending)
        elif self.runners is None:
            self.run_next()
        else:
            self._start_runners(self.runners)
            self._status[page.WAITING] = len(self._pending)

    def run_on(self, until_ns: int, began_ns: int) -> None:
        """Go on running what waits: most of a turn belongs to the model, not to refusing others.

        Args:
            until_ns: by when to end, if a run takes what the one that began at `began_ns` took.
        """
        now_ns, heart = _monotonic_ns(), self._heart
        while self._pending and not self.hold_until_ns and 2 * now_ns - began_ns < until_ns:
            if heart is not None and heart.pressing:
                return  # a golden comes first
            self.run_pending()
            began_ns, now_ns = now_ns, _monotonic_ns()

    def run_next(self) -> None:
        """Run whoever is next, and who runs along, here."""
        request = self._line.pop()
        self._status[page.WAITING] = len(self._pending)
        if request.deadline_ns and self._expired(request):
            return
        if self._pending and request.plan.batch_key is not None:
            requests = self._gather(request, self._rows_inline)
            self._status[page.WAITING] = len(self._pending)
            if len(requests) > 1:
                batch = self._batches.take(request.plan, self._rows_max)
                done = execute(requests, batch, self._status, page.RUN_BEGAN)
                self._finish_run(done)
                rows = sum(one.plan.rows for one in requests)
                self._rows_inline = batching.inline_rows(
                    min(self._rows_inline, self._rows_max), rows, done.run_ns, self._rows_max
                )
                return
        self._run_inline(request)

    def _start_runners(self, runners: Runners) -> None:
        """Give idle runners what waits."""
        if self._heart is not None and self._heart.pressing:
            return  # a golden comes first, when the runs under way have ended
        while self._pending and runners.idle:
            work = self._next_work(runners.idle)
            if work is not None:
                runners.start(work)

    def _next_work(self, lanes: int) -> Work | None:
        """What the next of so many idle runners is to run; None: who was next has expired."""
        request = self._line.pop()
        if request.deadline_ns and self._expired(request):
            return None
        requests, batch = [request], None
        if self._pending and request.plan.batch_key is not None:
            # They share it: one long batch beside an idle core helps nobody.
            share = -(-(len(self._pending) + 1) // lanes)
            requests = self._gather(request, min(share * request.plan.rows, self._rows_max))
            if len(requests) > 1:
                batch = self._batches.take(request.plan, self._rows_max)
        return requests, batch

    def _ran(self, done: Done) -> Work | None:
        """In a runner's thread, which has the lock: answer, and take what is next.

        Who may wait for company, or has to wait for a golden, is left to the loop.
        """
        assert self.runners is not None
        self._finish_run(done)
        work = None
        waits = self._window_ns or (self._heart is not None and self._heart.pressing)
        if not waits and not self.stopping:
            while self._pending and work is None:
                work = self._next_work(self.runners.idle + 1)
        self._status[page.WAITING] = len(self._pending)
        return work

    def _gather(self, first: Request, rows_max: int) -> list[Request]:
        """`first` and those behind it that run in one batch with it."""
        alike = self._line.pop_alike(first, batching.capacity(first.plan, rows_max))
        return [first] + [one for one in alike if not (one.deadline_ns and self._expired(one))]

    def _holds(self) -> bool:
        """Whether to go on waiting for a fuller batch."""
        self.hold_until_ns = 0
        if self.runners is not None and not self.runners.idle:
            return False  # what waits for a runner waits for company anyway
        if self._peers.draining or self._admission.full:
            return False
        until_ns = self._line.hold_until_ns(
            self._rows_max, self._window_ns, round(self._turn_ns_mean)
        )
        if until_ns <= _monotonic_ns():
            return False
        self.hold_until_ns = until_ns
        return True

    def _expired(self, request: Request) -> bool:
        deadline_ns = request.deadline_ns
        if not deadline_ns or _monotonic_ns() < deadline_ns:
            return False
        self._finish(request, None, DeadlineError("the deadline passed before the model ran"))
        return True

    def _run_inline(self, request: Request) -> None:
        """`execute` of one request, without its detours: the hot path."""
        status = self._status
        assert request.slot is not None
        status[page.RUN_BEGAN] = began_ns = _monotonic_ns()
        response: memoryview | None = None
        error: EdgeError | None = None
        try:
            response = request.slot.respond()
        except Exception as failure:  # noqa: BLE001 - a worker must live; the client is told
            error = edge_error(failure)
        finally:
            status[page.RUN_BEGAN] = 0
        run_ns = _monotonic_ns() - began_ns
        page.observe(status, page.COMPUTE, run_ns)
        self._finish(request, response, error, run_ns, began_ns)

    # -- out ---------------------------------------------------------------------------------------

    def _finish_run(self, done: Done) -> None:
        """Answer the requests of one run."""
        requests, batch = done.requests, done.batch
        page.observe(self._status, page.COMPUTE, done.run_ns)
        self._turn_ns_mean += (done.run_ns - self._turn_ns_mean) * 0.1
        if batch is not None:
            self._batches.give(requests[0].plan, batch)
            if done.together:
                self._status[page.BATCHES] += 1
                self._status[page.BATCHED] += len(requests)
            elif all(error is None for _, error in done.outcomes):
                self._batch_failed(requests)
        share_ns = max(done.run_ns // len(requests), 1)
        for request, (response, error) in zip(requests, done.outcomes, strict=True):
            self._finish(request, response, error, share_ns, done.began_ns, len(requests) > 1)

    def _batch_failed(self, requests: list[Request]) -> None:
        """Each of them ran alone, but not together: so many rows are too many."""
        self._note_failure()
        rows = sum(request.plan.rows for request in requests)
        self._rows_max = max(min(self._rows_max, rows // 2), 1)
        self._status[page.BATCH_ROWS_MAX] = self._rows_max

    def _finish(
        self,
        request: Request,
        response: memoryview | None,
        error: EdgeError | None,
        run_ns: int = 0,
        began_ns: int = 0,
        batched: bool = False,
    ) -> None:
        """Answer a request that ran (since `began_ns`, for `run_ns`), was cached, or expired."""
        owner = request.connection
        slot = request.slot
        owner.in_flight -= 1
        status = self._status
        if run_ns:
            page.observe(status, page.QUEUE, began_ns - request.read_ns)
            load = self._admission
            load.ran(run_ns)
            if load.restraint is not None:
                load.restraint.ran(run_ns)
        if owner.fd < 0:
            status[page.CANCELLED] += 1
            self._slots.release(slot)  # the client left meanwhile
        elif response is not None:
            status[page.REQUESTS] += 1
            if request.cache_key is not None and self._cache is not None:
                self._cache.put(request.cache_key, response)
            request_ns = _monotonic_ns() - request.read_ns
            page.observe(status, page.REQUEST, request_ns)
            frames.PREFIX_TAIL.pack_into(
                response, frames.PREFIX_TAIL_AT, request.request_id, request_ns
            )
            alone = self.company.mirror is None or self._admission.restraint is not None
            if alone or not run_ns:  # held back, nothing is done twice
                self._peers.send(owner, response, slot)
            else:
                self.company.send_and_show(request, response, 0 if batched else run_ns)
        else:
            assert error is not None
            if error.code in FAILURES:
                self._note_failure()
            self._slots.release(slot)
            self._admission.answer_error(owner, request.request_id, error)
        if owner.leaving:
            self._peers.settle(owner)

    def _note_failure(self) -> None:
        """The library failed: what it answers from now on is to be looked at."""
        if self._heart is not None:
            self._heart.note_failure(_monotonic_ns())
