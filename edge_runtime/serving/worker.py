"""The worker loop: one thread, one epoll, one model.

Law of this file: the turn, and what runs in it. It moves requests from sockets to the model and
answers back: `intake` reads them, `admission` lets them wait or refuses them, `waiting` says who is
next, `batching` what can run together, `peers` sends the answers and hands connections over. What a
request means is `plan`'s; how the process came to be is `process`'s. Nothing here blocks except
`epoll.poll` and, for models without runners, the model itself. If this process dies, its
connections close and nobody else notices.

A turn: wait, read what is readable, admit it (or refuse it at once), run one or one batch, answer.
Small models run in this thread; slower ones in a few runner threads, so that reading and refusing
go on meanwhile.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import (
    BackendError,
    DeadlineError,
    EdgeError,
    GoldenError,
    InternalError,
    ModelError,
    UnavailableError,
)
from edge_runtime.serving import admission, batching, channel, page, peers, slots
from edge_runtime.serving.admission import Admission
from edge_runtime.serving.batching import Batches
from edge_runtime.serving.cache import ResponseCache
from edge_runtime.serving.company import TRIAL_MESSAGES, Company
from edge_runtime.serving.heartbeat import Heart
from edge_runtime.serving.intake import Intake
from edge_runtime.serving.measuring import Meter
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.plan import Planner
from edge_runtime.serving.running import Done, Request, Runners, Work, edge_error, execute
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import frames

SWEEP_S = 1.0
SELECT_FDS = 1024  # FD_SETSIZE of the C library
Poll = Callable[[float], list[tuple[int, int]]]
P = ParamSpec("P")
T = TypeVar("T")
# A worker that was found to be wrong waits so long for clients to take the answers they have due.
PART_S_MAX = 0.5
# Errors of the library, not of a request.
FAILURES = frozenset({BackendError.code, ModelError.code, InternalError.code})


class Worker:
    """Serves one loaded model until told to stop or the channel closes."""

    def __init__(
        self,
        spec: WorkerSpec,
        planner: Planner,
        control: socket.socket,
        status: memoryview,
        runners: int,
        batch_rows_max: int = 1,
        run_ms: float = 0.0,
        batch_rows_tried: int = 0,
        heart: Heart | None = None,
    ) -> None:
        self._spec = spec
        self._planner = planner
        self._heart = heart
        self._condemned_until_ns = 0  # a golden was wrong: gone by then at the latest; 0: all well
        self._control = control
        self._status = status
        self._rows_max = batch_rows_max
        # Of batches in this thread: fewer than may be, where so many hold the loop up for too long.
        self._rows_inline = batch_rows_tried or batch_rows_max
        self._window_ns = round(spec.batch_window_ms * 1e6) if batch_rows_max > 1 else 0
        self._spin_ns = round(spec.spin_us * 1e3)
        self._hold_until_ns = 0  # a batch is being waited for until then; 0: none
        self._turn_ns_mean = 0.0  # a run of one or a batch: what is left of a deadline must hold it
        self._batches = Batches()
        self._cache = ResponseCache(spec.cache_bytes_max) if spec.cache_bytes_max else None
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._slots = Slots(lambda: self._intake.all_plans())
        self._peers = Peers(self._epoll, control, status, self._slots)
        self._admission = Admission(
            spec.model, spec.limits, status, self._peers, self._slots, runners or 1, run_ms
        )
        self._line = self._admission.line
        self._pending = self._line.entries
        self._intake = Intake(
            spec,
            planner,
            self._peers,
            self._admission,
            self._slots,
            self._admit,
            lambda: self._cache is None and self._company.splitter is None,
        )
        self._peers.resume = self._intake.parse
        self._peers.forget = self._admission.forget
        self._company = Company(
            self._epoll, spec, planner, status, self._peers, self._slots, self._queue
        )
        self._runners = Runners(runners, status, self._ran) if runners else None
        if self._runners:
            self._epoll.register(self._runners.wake_fd, select.EPOLLIN)
        self._sweep_at_ns = 0
        self._put_off = 0  # the connection with which the last turn stopped reading; 0: none
        self._meter: Meter | None = None
        self._stopping = False
        status[page.BATCH_ROWS_MAX] = batch_rows_max

    # -- the loop ---------------------------------------------------------------------------------

    def serve(self) -> bool:
        """Run until Stop, until the supervisor is gone, or until the model is found to be wrong;
        whether that was why.
        """
        poll: Poll = self._epoll.poll
        if self._spin_ns:
            poll = _spinning(poll, self._spin_ns)
        if self._runners is None:
            return self._turns(poll)
        with self._runners.lock:
            return self._turns(_unlocked(poll, self._runners.lock))

    def _turns(self, poll: Poll) -> bool:
        intake, company, load = self._intake, self._company, self._admission
        status = self._status
        heart = self._heart
        connections, readable, flush = self._peers.by_fd, intake.readable, self._peers.flush
        control_fd = self._control.fileno()
        wake_fd = self._runners.wake_fd if self._runners else -1
        plain = self._runners is None and not self._window_ns  # one call less where each counts
        run_pending = self._run_next if plain else self._run_pending
        while not self._stopping:
            wait_s = self._wait_s() if self._pending else SWEEP_S
            ready = poll(company.wait_s(wait_s) if company.active else wait_s)
            status[page.LOOP_NS] = began_ns = _monotonic_ns()
            if self._put_off:
                ready = self._rotated(ready)
            for fd, events in ready:
                if load.refusals and _monotonic_ns() - began_ns > admission.READ_NS_MAX:
                    self._put_off = fd
                    break
                owner = connections.get(fd)
                if owner is not None:
                    if events & select.EPOLLOUT:
                        flush(owner)
                    if events & ~select.EPOLLOUT and owner.fd in connections:
                        if not owner.leaving:
                            readable(owner)
                        elif peers.hung_up(owner):  # nobody is left to answer or give back
                            self._peers.close(owner)
                elif fd == control_fd:
                    self._told()
                elif fd == wake_fd:
                    assert self._runners is not None
                    self._runners.collect()
                else:
                    company.event(fd, events)
            if load.refusals:
                load.send_refusals()
            if self._pending:
                read_ns = _monotonic_ns()
                run_pending()
                if self._pending and self._runners is None:
                    self._run_on(load.run_until_ns(began_ns, read_ns), read_ns)
            if company.active:
                company.turn(self._idle())
                if load.refusals:
                    load.send_refusals()
            if began_ns > self._sweep_at_ns:
                self._sweep(began_ns)
            if heart is not None and heart.reason:
                self._tend(heart)
        return self._condemned_until_ns > 0

    def close(self) -> None:
        """Let go of threads, descriptors and memory: where the process goes on without it."""
        if self._runners is not None:
            self._runners.close()
        self._company.close()
        self._peers.close_all()
        self._epoll.close()

    def _rotated(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those first that the last turn had no time for: `epoll` always begins with the same."""
        fds = [fd for fd, _ in ready]
        at = fds.index(self._put_off) if self._put_off in fds else 0
        self._put_off = 0
        return ready[at:] + ready[:at]

    def _told(self) -> None:
        message, fds = channel.receive(self._control)
        if isinstance(message, channel.Adopt):
            self._peers.adopt(message, fds)
        elif isinstance(message, channel.Drain):
            self._company.part()
            self._intake.demote(message.label)
            self._peers.drain()
        elif isinstance(message, channel.Promote):
            self._intake.promote()
        elif isinstance(message, channel.Restrain):
            self._admission.restrain(message)
        elif isinstance(message, TRIAL_MESSAGES):
            self._company.told(message, fds)
        elif isinstance(message, channel.Measure):
            channel.send(self._control, self._measured(message))
        else:  # Stop, or the supervisor is gone
            self._stopping = True

    def _wait_s(self) -> float:
        """How long `epoll` may sleep while requests wait; what is left of a hold is slept here."""
        if self._hold_until_ns:
            hold_s = max(self._hold_until_ns - _monotonic_ns(), 0) / 1e9
            if self._runners is None:
                _doze(self._epoll.fileno(), hold_s)
            else:
                _unlocked(_doze, self._runners.lock)(self._epoll.fileno(), hold_s)
            return 0
        return SWEEP_S if self._runners else 0

    def _idle(self) -> bool:
        return not self._pending and self._at_rest()

    def _sweep(self, now_ns: int) -> None:
        """Once a second: give back what nobody uses."""
        self._sweep_at_ns = now_ns + round(SWEEP_S * 1e9)
        if self._heart is not None:
            self._heart.look(now_ns)
        self._peers.close_stalled(now_ns)
        self._slots.trim()
        self._batches.trim(slots.IDLE_BYTES_MAX)

    # -- is it still right? ------------------------------------------------------------------------

    def _measured(self, order: channel.Measure) -> channel.Measured:
        """Run as ordered; asked before anybody is served."""
        try:
            self._meter = self._meter or Meter(self._spec, self._planner, self._status)
            return channel.Measured(self._meter.run(order.runs, round(order.time_ms_max * 1e6)))
        except Exception as failure:  # noqa: BLE001 - a model that fails is what is to be found out
            return channel.Measured([], edge_error(failure).document())

    def _tend(self, heart: Heart) -> None:
        """A golden is due, or one was wrong."""
        quiet = self._at_rest() if heart.pressing else self._idle()
        if quiet and not self._condemned_until_ns:
            self._beat(heart)
            if self._pending:  # runners were kept waiting for it
                self._run_pending()
        if self._condemned_until_ns:
            late = _monotonic_ns() > self._condemned_until_ns
            self._stopping = self._stopping or late or not self._peers.by_fd

    def _at_rest(self) -> bool:
        """Whether no run is under way."""
        return self._runners is None or self._runners.idle == self._runners.count

    def _beat(self, heart: Heart) -> None:
        """Run a golden here; no request of anybody runs meanwhile."""
        self._status[page.RUN_BEGAN] = _monotonic_ns()  # it may hang like any other run
        try:
            wrong = heart.beat(_monotonic_ns)
        finally:
            self._status[page.RUN_BEGAN] = 0
        self._status[page.GOLDENS] += 1
        if wrong is not None:
            self._condemn(wrong)
            heart.reason = "it was wrong"

    def _condemn(self, wrong: GoldenError) -> None:
        """The model gives wrong answers: from here on it gives none. The supervisor is told first,
        so that connections which come back to it are not sent here again.
        """
        self._condemned_until_ns = _monotonic_ns() + round(PART_S_MAX * 1e9)
        channel.send(self._control, channel.Failed("heartbeat", wrong.document()))
        self._intake.disown()
        self._company.part()
        self._admission.dismiss(self._not_any_more())
        self._peers.drain()

    def _not_any_more(self) -> UnavailableError:
        return UnavailableError(
            "this variant was just found to give wrong answers; another one takes over",
            where=self._spec.model,
            remedy=f"try again; see `edge-runtime why {self._spec.model}`",
            retry_after_s=0.02,
        )

    # -- in ----------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """A request whose tensors are here waits for its turn, unless the candidate takes it."""
        if self._company.splitter is None or not self._company.takes(
            request, self._admission.run_ns_mean
        ):
            self._queue(request)

    def _queue(self, request: Request) -> None:
        """Have a request run here, unless its answer is known."""
        if self._condemned_until_ns:  # the candidate gave it back
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

    def _run_pending(self) -> None:
        if self._window_ns and self._holds():
            self._status[page.WAITING] = len(self._pending)
        elif self._runners is None:
            self._run_next()
        else:
            self._start_runners(self._runners)
            self._status[page.WAITING] = len(self._pending)

    def _run_on(self, until_ns: int, began_ns: int) -> None:
        """Go on running what waits: most of a turn belongs to the model, not to refusing others.

        Args:
            until_ns: by when to end, if a run takes what the one that began at `began_ns` took.
        """
        now_ns, heart = _monotonic_ns(), self._heart
        while self._pending and not self._hold_until_ns and 2 * now_ns - began_ns < until_ns:
            if heart is not None and heart.pressing:
                return  # a golden comes first
            self._run_pending()
            began_ns, now_ns = now_ns, _monotonic_ns()

    def _run_next(self) -> None:
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
        assert self._runners is not None
        self._finish_run(done)
        work = None
        waits = self._window_ns or (self._heart is not None and self._heart.pressing)
        if not waits and not self._stopping:
            while self._pending and work is None:
                work = self._next_work(self._runners.idle + 1)
        self._status[page.WAITING] = len(self._pending)
        return work

    def _gather(self, first: Request, rows_max: int) -> list[Request]:
        """`first` and those behind it that run in one batch with it."""
        alike = self._line.pop_alike(first, batching.capacity(first.plan, rows_max))
        return [first] + [one for one in alike if not (one.deadline_ns and self._expired(one))]

    def _holds(self) -> bool:
        """Whether to go on waiting for a fuller batch."""
        self._hold_until_ns = 0
        if self._runners is not None and not self._runners.idle:
            return False  # what waits for a runner waits for company anyway
        if self._peers.draining or self._admission.full:
            return False
        until_ns = self._line.hold_until_ns(
            self._rows_max, self._window_ns, round(self._turn_ns_mean)
        )
        if until_ns <= _monotonic_ns():
            return False
        self._hold_until_ns = until_ns
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
            alone = self._company.mirror is None or self._admission.restraint is not None
            if alone or not run_ns:  # held back, nothing is done twice
                self._peers.send(owner, response, slot)
            else:
                self._company.send_and_show(request, response, 0 if batched else run_ns)
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


def _unlocked(sleep: Callable[P, T], lock: threading.Lock) -> Callable[P, T]:
    """`sleep`, during which others may have the lock that the caller has."""

    def unlocked(*arguments: P.args, **options: P.kwargs) -> T:
        lock.release()
        try:
            return sleep(*arguments, **options)
        finally:
            lock.acquire()

    return unlocked


def _spinning(poll: Poll, spin_ns: int) -> Poll:
    """`poll` that looks again and again for so long before it sleeps."""

    def look(wait_s: float) -> list[tuple[int, int]]:
        if wait_s > 0:
            until_ns = _monotonic_ns() + spin_ns
            while _monotonic_ns() < until_ns:
                if ready := poll(0):
                    return ready
        return poll(wait_s)

    return look


def _doze(fd: int, seconds: float) -> None:
    """Sleep until the descriptor is readable: to the microsecond, where `epoll` rounds up to a
    millisecond and would sleep through a short window. (The loop's epoll is among a process's first
    descriptors, but in a process with others it may be beyond what select takes.)
    """
    if fd < SELECT_FDS:
        select.select((fd,), (), (), seconds)
    else:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1e3)
