"""The worker loop: one thread, one epoll, one model.

Law of this file: it moves requests from sockets to the model and answers back, within the limits
of its spec, and hands connections over when told. What a request means is `plan`'s, what a
connection holds is `connection`'s; how the process came to be is `process`'s. Nothing here blocks
except `epoll.poll` and, for models without runners, the model itself. If this process dies, its
connections close and nobody else notices.

A turn: wait, read what is readable, admit it (or refuse it at once), run one or one batch, answer.
Small models run in this thread; slower ones in a few runner threads, so that reading and refusing
go on meanwhile. Who is next is `waiting`'s, what can run together `batching`'s.
"""

from __future__ import annotations

import os
import select
import socket

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    MalformedError,
    OverloadedError,
    RequestError,
    TooLargeError,
)
from edge_runtime.serving import batching, channel, connection, page
from edge_runtime.serving.batching import Batches
from edge_runtime.serving.cache import ResponseCache
from edge_runtime.serving.company import TRIAL_MESSAGES, Company
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.mirror import Mirror
from edge_runtime.serving.plan import Plan, Planner, Slot
from edge_runtime.serving.running import Done, Request, Runners, edge_error, execute
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.serving.waiting import Line
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import HEADER_SIZE_MAX, MAGIC, PREFIX, PREFIX_SIZE, VERSION, Kind

# Distinct request headers remembered: clients send a handful; more are planned anew each time
# round.
PLANS_MAX = 256
# Memory of slots at rest: what a busy minute needed is given back when it is more than this.
IDLE_SLOT_BYTES_MAX = 32 * 1024 * 1024
# A peer that sends half a frame, or does not take its answer, holds a slot: not for longer than
# this.
STALL_S_MAX = 30.0
SWEEP_S = 1.0
# When memory for tensors is short: a body takes milliseconds to arrive on a unix socket; one that
# takes longer than this is not being sent.
BODY_NS_MAX = 1_000_000_000
# Longer headers are planned each time: 256 of them per connection must not be 16 MiB.
HEADER_KEPT_MAX = 8 * 1024
# Descriptors that came with frames which take none: a client that goes on sending them is broken.
STRAY_MAX = 8
# Under overload a turn refuses so many requests, more for slow models, and looks at no more
# newcomers: they wait in their sockets, where their clients feel it.
REFUSALS_A_TURN = 8
RUN_NS_A_REFUSAL = 90_000  # a refusal takes some 10 us: a tenth of the time
# ... and then runs what waits for so many times the time that it spent on newcomers, at most for as
# long as a refusal may take to come.
RUN_SHARE = 9
RUN_NS_MAX = 5_000_000
REFUSAL_NS = 5_000_000  # for so long the same "come back in" is true
# Where an error is counted, by its code; any other: FAILED.
_OUTCOMES = {
    "overloaded": page.REFUSED,
    "deadline_exceeded": page.EXPIRED,
    "invalid_request": page.INVALID,
    "too_large": page.INVALID,
    "malformed": page.INVALID,
}
# Versions that a client may ask the active worker for, besides the number of its own.
STABLE_LABELS = frozenset({"", "stable"})
# One descriptor a frame is legal; room for two shows the mistake instead of hiding it.
_ANCILLARY = socket.CMSG_SPACE(2 * 4)
_INFER = int(Kind.INFER)
_MODEL_KINDS = frozenset(int(kind) for kind in frames.MODEL_KINDS)
_DROPPED_FLAGS = socket.MSG_CTRUNC


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
    ) -> None:
        self._spec = spec
        self._rows_max = batch_rows_max
        self._window_ns = round(spec.batch_window_ms * 1e6) if batch_rows_max > 1 else 0
        self._hold_until_ns = 0  # a batch is being waited for until then; 0: none
        self._batches = Batches()
        self._cache = ResponseCache(spec.cache_bytes_max) if spec.cache_bytes_max else None
        self._planner = planner
        self._control = control
        self._status = status
        self._limits = spec.limits
        self._plans: dict[bytes, Plan] = {}
        self._connections: dict[int, Connection] = {}
        self._line = Line(spec.limits.priority_max)
        self._pending = self._line.entries
        self._slot_bytes_used = 0
        self._slot_bytes_made = 0  # used, at rest, or dropped since the last trim
        # Of a request, in recent runs: what retry_after_s is made of.
        self._run_ns_mean = run_ms * 1e6
        self._turn_ns_mean = 0.0  # a run of one or a batch: what is left of a deadline must hold it
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._sweep_at_ns = 0
        self._refusals_left = self._refusals_a_turn()
        # Connections with whole frames read and not looked at: the queue was full.
        self._backlog: dict[int, Connection] = {}
        self._refusal = b""  # the newest "overloaded" frame; its id is filled in
        self._refusal_until_ns = 0
        self._draining: set[Connection] | None = None  # who still has to go back
        self._drained = 0
        self._labels = STABLE_LABELS
        self._stopping = False
        self._runners = Runners(runners, status) if runners else None
        if self._runners:
            self._epoll.register(self._runners.wake_fd, select.EPOLLIN)
        self._version = str(spec.version)
        status[page.BATCH_ROWS_MAX] = batch_rows_max
        self._company = Company(self._epoll, spec, planner, status, self._relay, self._take_back)

    # -- the loop ---------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run until Stop, or until the supervisor is gone."""
        poll = self._epoll.poll
        connections = self._connections
        control_fd = self._control.fileno()
        wake_fd = self._runners.wake_fd if self._runners else -1
        plain = self._runners is None and not self._window_ns  # one call less where each counts
        run_pending = self._run_next if plain else self._run_pending
        company = self._company
        while not self._stopping:
            wait_s = self._wait_s() if self._pending or self._backlog else SWEEP_S
            ready = poll(company.wait_s(wait_s) if company.active else wait_s)
            began_ns = _monotonic_ns()
            if self._backlog or self._refusals_left < REFUSALS_A_TURN:
                self._look_at_backlog()
            for fd, events in ready:
                owner = connections.get(fd)
                if owner is not None:
                    if events & select.EPOLLOUT:
                        self._flush(owner)
                    if events & ~select.EPOLLOUT and owner.fd in connections:
                        if not owner.leaving:
                            self._readable(owner)
                        elif _hung_up(owner):  # nobody is left to answer or give back
                            self._close(owner)
                elif fd == control_fd:
                    self._told()
                elif fd == wake_fd:
                    self._collect()
                else:
                    company.event(fd, events)
            if self._pending:
                run_pending()
                if self._pending and self._runners is None:
                    self._run_on(began_ns)
            if company.active:
                company.turn(self._idle())
            now_ns = _monotonic_ns()
            self._status[page.LOOP_NS] = now_ns
            if now_ns > self._sweep_at_ns:
                self._sweep(now_ns)

    def _run_pending(self) -> None:
        if self._window_ns and self._holds():
            self._status[page.WAITING] = len(self._pending)
        elif self._runners is None:
            self._run_next()
        else:
            self._start_runners(self._runners)
            self._status[page.WAITING] = len(self._pending)

    def _run_on(self, began_ns: int) -> None:
        """Go on running what waits: most of a turn belongs to the model, not to refusing others.

        Without this a model of microseconds would be busy with newcomers only: its goodput at twice
        the load that it can serve was 0.2 % of its peak.
        """
        until_ns = _monotonic_ns()
        until_ns += min(RUN_SHARE * (until_ns - began_ns), RUN_NS_MAX)
        while self._pending and not self._hold_until_ns and _monotonic_ns() < until_ns:
            self._run_pending()

    def _run_next(self) -> None:
        """Run whoever is next, and who runs along, here."""
        request = self._line.pop()
        self._status[page.WAITING] = len(self._pending)
        if request.deadline_ns and self._expired(request):
            return
        if self._pending and request.plan.batch_key is not None:
            requests = self._gather(request, self._rows_max)
            self._status[page.WAITING] = len(self._pending)
            if len(requests) > 1:
                batch = self._batches.take(request.plan, self._rows_max)
                self._finish_run(execute(requests, batch, self._status, page.RUN_BEGAN))
                return
        self._run_inline(request)

    def _start_runners(self, runners: Runners) -> None:
        """Give idle runners what waits."""
        while self._pending and runners.idle:
            request = self._line.pop()
            if request.deadline_ns and self._expired(request):
                continue
            requests, batch = [request], None
            if self._pending and request.plan.batch_key is not None:
                # They share it: one long batch beside an idle core helps nobody.
                share = -(-(len(self._pending) + 1) // runners.idle)
                requests = self._gather(request, min(share * request.plan.rows, self._rows_max))
                if len(requests) > 1:
                    batch = self._batches.take(request.plan, self._rows_max)
            runners.start(requests, batch)

    def _gather(self, first: Request, rows_max: int) -> list[Request]:
        """`first` and those behind it that run in one batch with it."""
        alike = self._line.pop_alike(first, batching.capacity(first.plan, rows_max))
        return [first] + [one for one in alike if not (one.deadline_ns and self._expired(one))]

    def _holds(self) -> bool:
        """Whether to go on waiting for a fuller batch."""
        self._hold_until_ns = 0
        if self._runners is not None and not self._runners.idle:
            return False  # what waits for a runner waits for company anyway
        if self._draining is not None or len(self._pending) >= self._limits.queue_requests_max:
            return False
        until_ns = self._line.hold_until_ns(
            self._rows_max, self._window_ns, round(self._turn_ns_mean)
        )
        if until_ns <= _monotonic_ns():
            return False
        self._hold_until_ns = until_ns
        return True

    def _wait_s(self) -> float:
        """How long `epoll` may sleep while requests wait; what is left of a hold is slept here."""
        if self._hold_until_ns:
            _doze(self._epoll.fileno(), max(self._hold_until_ns - _monotonic_ns(), 0) / 1e9)
            return 0
        return SWEEP_S if self._runners and not self._backlog else 0

    def _idle(self) -> bool:
        runners = self._runners
        waiting = self._pending or self._backlog
        return not waiting and (runners is None or runners.idle == runners.count)

    def _sweep(self, now_ns: int) -> None:
        """Once a second: close connections that hold memory and do not move."""
        self._sweep_at_ns = now_ns + round(SWEEP_S * 1e9)
        limit_ns = now_ns - round(STALL_S_MAX * 1e9)
        for owner in list(self._connections.values()):
            if 0 < owner.stalled_since_ns < limit_ns:
                self._close(owner)
        self._trim()
        self._batches.trim(IDLE_SLOT_BYTES_MAX)

    def _trim(self) -> None:
        """Give the memory of slots at rest back, when it is much."""
        if self._slot_bytes_made - self._slot_bytes_used <= IDLE_SLOT_BYTES_MAX:
            return
        for plans in (self._plans, *(owner.plans for owner in self._connections.values())):
            for plan in plans.values():
                plan.free.clear()
        self._slot_bytes_made = self._slot_bytes_used

    # -- reading ----------------------------------------------------------------------------------

    def _look_at_backlog(self) -> None:
        """A new turn: some may be refused again, and frames that were put off come first."""
        self._refusals_left = self._refusals_a_turn()
        backlog, self._backlog = self._backlog, {}
        for fd, owner in backlog.items():
            if self._connections.get(fd) is owner and not owner.leaving and not owner.outbox:
                self._parse(owner)

    def _refusals_a_turn(self) -> int:
        """So many that refusing stays a small share of what a run takes."""
        return max(REFUSALS_A_TURN, int(self._run_ns_mean / RUN_NS_A_REFUSAL))

    def _crowded(self) -> bool:
        """Whether newcomers wait in their sockets: the queue is full and enough were refused."""
        return len(self._pending) >= self._limits.queue_requests_max

    def _readable(self, owner: Connection) -> None:
        if self._backlog and owner.fd in self._backlog:
            return  # what was read before comes first
        if self._refusals_left <= 0 and self._crowded():
            return
        receiving = owner.receiving
        if receiving is not None:
            assert receiving.slot is not None
            room = receiving.slot.body[receiving.filled :]
        else:
            room = owner.make_room()
            if owner.stray:  # the next frame's descriptors must not meet those of this one
                room = room[: owner.missing()]
        try:
            count, ancillary, flags, _ = owner.sock.recvmsg_into((room,), _ANCILLARY)
        except BlockingIOError:
            return
        except OSError:
            self._close(owner)
            return
        if ancillary or flags & _DROPPED_FLAGS:
            owner.stray += channel.descriptors(ancillary)
            if len(owner.stray) > STRAY_MAX:
                self._close(owner)
                return
        if not count:
            self._close(owner)
        elif receiving is not None:
            receiving.filled += count
            if receiving.filled == receiving.plan.body_size:
                owner.receiving = None
                owner.stalled_since_ns = 0
                receiving.read_ns = _monotonic_ns()
                self._admit(receiving)
        else:
            owner.end += count
            self._parse(owner)

    def _parse(self, owner: Connection) -> None:
        """Use up the bytes read: every whole frame, and the beginning of a large one."""
        read_ns = _monotonic_ns()
        began = owner.start
        while owner.receiving is None and not owner.leaving:
            have = owner.end - owner.start
            if have and self._refusals_left <= 0 and self._crowded():
                self._backlog[owner.fd] = owner
                owner.stalled_since_ns = 0  # it is us who do not move
                return
            if owner.skip and have:
                used = min(owner.skip, have)
                owner.skip -= used
                owner.start += used
                continue
            if have < PREFIX_SIZE:
                break
            start = owner.start
            magic, version, kind, priority, flags, header_size, body_size, request_id, time_ns = (
                PREFIX.unpack_from(owner.buffer, start)
            )
            if magic != MAGIC or version != VERSION or flags or header_size > HEADER_SIZE_MAX:
                self._malformed(owner)
                return
            body_at = start + PREFIX_SIZE + header_size
            if owner.end < body_at:
                break
            header = bytes(owner.view[start + PREFIX_SIZE : body_at])
            if kind != _INFER:
                if not self._other_kind(owner, kind, header, body_size, request_id, body_at):
                    return
                continue
            plan = self._plans.get(header)
            if plan is None:
                plan = self._plan(owner, header, body_size, request_id, body_at)
                if plan is None:
                    continue
            slot = self._acquire(owner, plan, body_size, request_id, body_at, priority)
            if slot is None:
                continue
            request = Request(owner, plan, slot, request_id, time_ns, priority, read_ns)
            stop = body_at + body_size
            if stop <= owner.end:
                owner.start = stop
                if body_size:
                    slot.body[:] = owner.view[body_at:stop]
                self._admit(request)
            else:
                request.filled = owner.end - body_at
                slot.body[: request.filled] = owner.view[body_at : owner.end]
                request.prefix = bytes(owner.view[start : start + PREFIX_SIZE])
                request.header = header
                owner.start = owner.end
                owner.receiving = request
        if owner.receiving is not None or owner.start != owner.end or owner.skip:
            if owner.start != began or not owner.stalled_since_ns:
                owner.stalled_since_ns = read_ns
        elif not owner.outbox:
            owner.stalled_since_ns = 0
        if owner.leaving and not owner.in_flight:
            self._give_back(owner)

    def _malformed(self, owner: Connection) -> None:
        try:
            frames.decode_prefix(owner.buffer, owner.start)
        except (MalformedError, TooLargeError) as error:
            self._count(error)
            self._answer_error(owner, 0, error)
        self._close(owner)

    def _skip_body(self, owner: Connection, body_at: int, body_size: int) -> None:
        owner.start = min(body_at + body_size, owner.end)
        owner.skip = body_at + body_size - owner.start

    def _plan(
        self, owner: Connection, header: bytes, body_size: int, request_id: int, body_at: int
    ) -> Plan | None:
        """The plan of a header not seen lately; None when it was answered or is not for us."""
        plan = owner.plans.get(header)
        if plan is not None:
            return plan
        try:
            request = messages.decode_infer_request(header)
            if not self._ours(request.model_name, request.model_version):
                self._leave(owner)
                return None
            plan = self._planner.plan(request, owner.regions)
        except EdgeError as error:
            self._refuse(owner, error, request_id, body_at, body_size)
            return None
        shared = any(one.region for one in plan.inputs) or any(one.region for one in plan.outputs)
        plans = owner.plans if shared else self._plans
        if len(header) > HEADER_KEPT_MAX:
            plan.retire()
            return plan
        if len(plans) >= PLANS_MAX:
            plans.pop(next(iter(plans))).retire()
        plans[header] = plan
        return plan

    def _ours(self, name: str, version: str) -> bool:
        if name != self._spec.model:
            return False
        return version == self._version or version in self._labels

    def _acquire(
        self,
        owner: Connection,
        plan: Plan,
        body_size: int,
        request_id: int,
        body_at: int,
        priority: int,
    ) -> Slot | None:
        """Memory for a request, or None when it was refused."""
        limits = self._limits
        error: EdgeError
        if body_size != plan.body_size:
            if body_size > limits.frame_body_bytes_max:
                error = self._too_large(body_size)
            else:
                error = RequestError(
                    f"body of {body_size} bytes", expected=f"{plan.body_size} as the header says"
                )
        elif body_size > limits.frame_body_bytes_max:
            error = self._too_large(body_size)
        elif plan.slot_bytes > limits.queue_bytes_max:  # waiting would not help
            error = TooLargeError(
                f"request and response of {plan.slot_bytes} bytes",
                expected=f"<= {limits.queue_bytes_max}",
                remedy="pass large tensors by shared memory (REGION_ADD)",
            )
        elif (
            self._slot_bytes_used + plan.slot_bytes > limits.queue_bytes_max
            and not self._make_room(owner, priority, plan.slot_bytes)
        ):
            error = self._overloaded()
        else:
            if owner.leaving:  # it closed when an older request of its own made way
                return None
            try:
                slot = plan.free.pop() if plan.free else self._new_slot(plan)
                self._slot_bytes_used += plan.slot_bytes
                return slot
            except Exception as failure:  # noqa: BLE001 - the backend binds memory here
                error = edge_error(failure)
        self._refuse(owner, error, request_id, body_at, body_size)
        return None

    def _make_room(self, owner: Connection, priority: int, size_bytes: int) -> bool:
        """Have requests behind the newcomer refused, if that gives it so many bytes."""
        limit = self._limits.queue_bytes_max
        while self._slot_bytes_used + size_bytes > limit and self._close_slowest(owner):
            pass
        excess = self._slot_bytes_used + size_bytes - limit
        if excess <= 0:
            return True
        going = self._line.must_go(owner, priority, excess)
        self._send_away(going)
        return bool(going)

    def _close_slowest(self, newcomer: Connection) -> bool:
        """Close the connection whose body has been on its way longest, if that is too long.

        Memory is short: who announces much and sends little must not keep it from the others.
        """
        latest_ns = _monotonic_ns() - BODY_NS_MAX
        slow = [
            (owner.receiving.read_ns, owner.fd, owner)
            for owner in self._connections.values()
            if owner.receiving is not None and owner is not newcomer
        ]
        if not slow or min(slow)[0] > latest_ns:
            return False
        self._close(min(slow)[2])
        return True

    def _new_slot(self, plan: Plan) -> Slot:
        self._trim()
        slot = Slot(plan)
        self._slot_bytes_made += plan.slot_bytes
        return slot

    def _too_large(self, body_size: int) -> TooLargeError:
        return TooLargeError(
            f"body of {body_size} bytes",
            expected=f"<= {self._limits.frame_body_bytes_max}",
            remedy="pass large tensors by shared memory (REGION_ADD)",
        )

    def _overloaded(self) -> OverloadedError:
        wait_s = max(self._wait_ns() / 1e9, 0.001)
        return OverloadedError(
            f"{len(self._pending)} requests wait for {self._spec.model}",
            where=self._spec.model,
            expected=f"<= {self._limits.queue_requests_max} requests and "
            f"{self._limits.queue_bytes_max} bytes",
            retry_after_s=round(wait_s, 4),
        )

    def _refuse(
        self, owner: Connection, error: EdgeError, request_id: int, body_at: int, body_size: int
    ) -> None:
        self._skip_body(owner, body_at, body_size)
        self._refusals_left -= 1
        self._count(error)
        self._answer_error(owner, request_id, error)

    def _count(self, error: EdgeError) -> None:
        """An answer that is an error."""
        word = _OUTCOMES.get(error.code, page.FAILED)
        self._status[word] += 1
        if word in (page.INVALID, page.FAILED):
            self._status[page.ERRORS] += 1

    # -- what is not an inference ------------------------------------------------------------------

    def _other_kind(
        self,
        owner: Connection,
        kind: int,
        header: bytes,
        body_size: int,
        request_id: int,
        body_at: int,
    ) -> bool:
        """Answer a frame that is not INFER; False: the connection is gone or leaves."""
        try:
            frames.decode_prefix(owner.buffer, owner.start)
            if kind not in _MODEL_KINDS:
                self._leave(owner)
                return True
            ref = messages.decode_model_ref(header)
            if not self._ours(ref.model_name, ref.model_version):
                self._leave(owner)
                return True
            reply = self._reply(owner, kind, header)
        except MalformedError:
            self._malformed(owner)
            return False
        except EdgeError as error:
            self._refuse(owner, error, request_id, body_at, body_size)
            return True
        self._skip_body(owner, body_at, body_size)
        self._send(
            owner,
            memoryview(
                messages.encode_frame(kind | frames.RESPONSE, *reply, request_id=request_id)
            ),
            None,
        )
        return owner.fd in self._connections

    def _reply(self, owner: Connection, kind: int, header: bytes) -> tuple[bytes, bytes]:
        """Header and body of the answer. Raises EdgeError."""
        if kind == Kind.MODEL_READY:
            return messages.encode_header({"name": self._spec.model, "ready": True}), b""
        if kind == Kind.MODEL_METADATA:
            padded = frames.pad_header(self._spec.metadata)
            if len(padded) <= HEADER_SIZE_MAX:
                return padded, b""
            return frames.pad_header(b'{"in_body":true}'), padded
        if kind == Kind.REGION_ADD:
            self._add_region(owner, messages.decode_region_add(header))
        else:
            number = messages.decode_region_drop(header).region
            if not owner.drop_region(number):
                raise RequestError(f"region {number} was not added", where="header $.region")
        return messages.encode_header({}), b""

    def _add_region(self, owner: Connection, region: messages.RegionAdd) -> None:
        fds, owner.stray = owner.stray, []
        try:
            if len(fds) != 1:
                raise RequestError(
                    f"{len(fds)} descriptors came with REGION_ADD",
                    expected="exactly one memfd, attached to the frame",
                )
            limits = self._limits
            if region.byte_size > limits.region_bytes_max:
                raise TooLargeError(
                    f"region of {region.byte_size} bytes",
                    where="header $.byte_size",
                    expected=f"<= {limits.region_bytes_max}",
                )
            if (
                region.region not in owner.regions
                and len(owner.regions) >= limits.regions_per_connection_max
            ):
                raise RequestError(
                    f"{len(owner.regions)} regions on this connection",
                    expected=f"<= {limits.regions_per_connection_max}",
                )
            owner.add_region(region.region, region.byte_size, fds.pop())
        finally:
            for fd in fds:
                os.close(fd)

    # -- running -----------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """A request whose tensors are here waits for its turn, or is answered from the cache.

        When the queue is full, whoever is last in line then is refused.
        """
        splitter = self._company.splitter
        if splitter is not None and splitter.takes(request, self._run_ns_mean):
            request.connection.in_flight += 1
            return
        self._queue(request)

    def _queue(self, request: Request) -> None:
        """Have a request run here."""
        if self._cache is not None and self._answer_from_cache(self._cache, request):
            return
        owner = request.connection
        owner.in_flight += 1
        self._line.put(request)
        if len(self._pending) > self._limits.queue_requests_max:
            self._send_away([self._line.last()])
        elif request.deadline_ns and len(self._pending) > 1 and self._hopeless(request):
            self._send_away([request])

    def _hopeless(self, request: Request) -> bool:
        """Whether a request, last in line, would be run only after its deadline."""
        left_ns = request.deadline_ns - _monotonic_ns()
        return self._wait_ns() > left_ns > 0 and self._line.last() is request

    def _wait_ns(self) -> float:
        """How long the last in line will wait, as runs were lately."""
        lanes = self._runners.count if self._runners else 1
        return len(self._pending) * self._run_ns_mean / lanes

    def _send_away(self, requests: list[Request]) -> None:
        """Refuse requests that were waiting."""
        self._line.remove(requests)
        for request in requests:
            owner = request.connection
            owner.in_flight -= 1
            self._release(request.slot)
            self._refused(owner, request.request_id)
            if owner.leaving and not owner.in_flight:
                self._give_back(owner)

    def _refused(self, owner: Connection, request_id: int) -> None:
        """Say "overloaded": prepared once for some milliseconds, because it is said often."""
        self._refusals_left -= 1
        self._status[page.REFUSED] += 1
        now_ns = _monotonic_ns()
        if now_ns > self._refusal_until_ns:
            self._refusal = messages.encode_error(self._overloaded())
            self._refusal_until_ns = now_ns + REFUSAL_NS
        frame = bytearray(self._refusal)
        frames.PREFIX_TAIL.pack_into(frame, frames.PREFIX_TAIL_AT, request_id, 0)
        self._send(owner, memoryview(frame), None)

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
        rows = sum(request.plan.rows for request in requests)
        self._rows_max = max(min(self._rows_max, rows // 2), 1)
        self._status[page.BATCH_ROWS_MAX] = self._rows_max

    def _collect(self) -> None:
        assert self._runners is not None
        for done in self._runners.finished():
            self._finish_run(done)

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
            self._run_ns_mean += (run_ns - self._run_ns_mean) * 0.1
        if owner.fd < 0:
            status[page.CANCELLED] += 1
            self._release(slot)  # the client left meanwhile
        elif response is not None:
            status[page.REQUESTS] += 1
            if request.cache_key is not None and self._cache is not None:
                self._cache.put(request.cache_key, response)
            request_ns = _monotonic_ns() - request.read_ns
            page.observe(status, page.REQUEST, request_ns)
            frames.PREFIX_TAIL.pack_into(
                response, frames.PREFIX_TAIL_AT, request.request_id, request_ns
            )
            mirror = self._company.mirror
            if mirror is None or not run_ns:
                self._send(owner, response, slot)
            else:
                self._send_and_show(mirror, request, response, 0 if batched else run_ns)
        else:
            assert error is not None
            self._count(error)
            self._release(slot)
            self._answer_error(owner, request.request_id, error)
        if owner.leaving and not owner.in_flight:
            self._give_back(owner)

    def _send_and_show(
        self, mirror: Mirror, request: Request, response: memoryview, run_ns: int
    ) -> None:
        """Answer, and let the candidate see what was asked and answered."""
        slot = request.slot
        assert slot is not None
        if request.plan.cacheable:
            self._send(request.connection, response, slot)
            mirror.show(request.plan, slot, response, run_ns)  # nobody has used its memory since
        else:  # shared memory is the client's again once it has the answer
            mirror.show(request.plan, slot, response, run_ns)
            self._send(request.connection, response, slot)

    def _relay(self, request: Request, frame: memoryview) -> None:
        """Answer with what the candidate answered; it is the candidate that counts it."""
        owner = request.connection
        owner.in_flight -= 1
        if owner.fd < 0:
            self._release(request.slot)
            return
        tail = request.request_id, _monotonic_ns() - request.read_ns
        frames.PREFIX_TAIL.pack_into(frame, frames.PREFIX_TAIL_AT, *tail)
        self._send(owner, frame, request.slot)
        if owner.leaving and not owner.in_flight:
            self._give_back(owner)

    def _take_back(self, request: Request) -> None:
        """The candidate did not answer: run it here."""
        owner = request.connection
        owner.in_flight -= 1
        if owner.fd < 0:
            self._status[page.CANCELLED] += 1
            self._release(request.slot)
        else:
            self._queue(request)

    def _release(self, slot: Slot | None) -> None:
        if slot is None:
            return
        plan = slot.plan
        self._slot_bytes_used -= plan.slot_bytes
        plan.free.append(slot)

    # -- writing -----------------------------------------------------------------------------------

    def _answer_error(self, owner: Connection, request_id: int, error: EdgeError) -> None:
        self._send(owner, memoryview(messages.encode_error(error, request_id)), None)

    def _send(self, owner: Connection, data: memoryview, slot: Slot | None) -> None:
        """Send or queue an answer; the slot is free again when the kernel has taken all of it."""
        if not owner.outbox:
            try:
                sent = owner.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._release(slot)
                self._close(owner)
                return
            if sent == len(data):
                if slot is not None:
                    self._release(slot)
                return
            data = data[sent:]
        owner.outbox.append((data, slot))
        owner.stalled_since_ns = owner.stalled_since_ns or _monotonic_ns()
        # No more requests from a client that does not take its answers.
        self._watch(owner, select.EPOLLOUT)

    def _flush(self, owner: Connection) -> None:
        while owner.outbox:
            data, slot = owner.outbox[0]
            try:
                sent = owner.sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self._close(owner)
                return
            owner.stalled_since_ns = _monotonic_ns()
            if sent < len(data):
                owner.outbox[0] = (data[sent:], slot)
                return
            owner.outbox.popleft()
            self._release(slot)
        owner.stalled_since_ns = 0
        if owner.leaving:
            self._watch(owner, 0)
            if not owner.in_flight:
                self._give_back(owner)
            return
        self._watch(owner, select.EPOLLIN)
        self._parse(owner)  # half a frame may wait there: its time counts again

    def _watch(self, owner: Connection, events: int) -> None:
        if owner.fd in self._connections:
            self._epoll.modify(owner.fd, events)

    def _close(self, owner: Connection) -> None:
        if self._connections.pop(owner.fd, None) is None:
            return
        self._epoll.unregister(owner.fd)
        owner.leaving = True  # whoever is in the middle of its bytes stops there
        for _, slot in owner.outbox:
            self._release(slot)
        owner.outbox.clear()
        if owner.receiving is not None:
            self._release(owner.receiving.slot)
            owner.receiving = None
        if owner.in_flight:
            self._forget_pending(owner)
        owner.close()
        self._status[page.CONNECTIONS] = len(self._connections)
        if self._draining:
            self._draining.discard(owner)
        self._report_drained()

    def _forget_pending(self, owner: Connection) -> None:
        """What a client that left had waiting is not run."""
        forgotten = self._line.of(owner)
        self._line.remove(forgotten)
        self._status[page.CANCELLED] += len(forgotten)
        for request in forgotten:
            owner.in_flight -= 1
            self._release(request.slot)
        self._status[page.WAITING] = len(self._pending)

    # -- hand-over ---------------------------------------------------------------------------------

    def _told(self) -> None:
        message, fds = channel.receive(self._control)
        if isinstance(message, channel.Adopt):
            self._adopt(message, fds)
        elif isinstance(message, channel.Drain):
            self._drain(message.label)
        elif isinstance(message, channel.Promote):
            self._promote()
        elif isinstance(message, TRIAL_MESSAGES):
            self._company.told(message, fds)
        else:  # Stop, or the supervisor is gone
            self._stopping = True

    def _promote(self) -> None:
        """Headers that name no version are ours; those that name our label so far may not be."""
        self._labels = STABLE_LABELS
        for plans in (self._plans, *(owner.plans for owner in self._connections.values())):
            connection.retire(plans)

    def _drain(self, label: str) -> None:
        """Give every connection back, and from now on take none that does not name our version."""
        self._labels = frozenset({label} - {""})
        self._company.part()
        connection.retire(self._plans)  # those without a version are not ours any more
        self._draining = set(self._connections.values())
        self._drained = 0
        for owner in list(self._draining):
            self._leave(owner)
            if not owner.in_flight:
                self._give_back(owner)
        self._report_drained()

    def _adopt(self, message: channel.Adopt, fds: list[int]) -> None:
        try:
            owner = connection.adopt(message, fds)
        except EdgeError:  # a descriptor or a region is missing: nothing to serve
            return
        self._connections[owner.fd] = owner
        self._epoll.register(owner.fd, select.EPOLLIN)
        self._status[page.CONNECTIONS] = len(self._connections)
        self._parse(owner)

    def _leave(self, owner: Connection) -> None:
        """Read no more from it; it goes back when its last answer is out."""
        owner.leaving = True
        self._watch(owner, select.EPOLLOUT if owner.outbox else 0)

    def _give_back(self, owner: Connection) -> None:
        if owner.outbox or self._connections.pop(owner.fd, None) is None:
            return
        self._epoll.unregister(owner.fd)
        receiving, unused = owner.receiving, None
        if receiving is not None:
            unused = receiving.slot
        try:
            owner.hand_over(self._control)
        except OSError:  # the supervisor is gone: so are we, at the next turn
            owner.close()
        owner.receiving = None
        self._release(unused)
        self._status[page.CONNECTIONS] = len(self._connections)
        self._gone(owner)
        self._report_drained()

    def _gone(self, owner: Connection) -> None:
        if self._draining and owner in self._draining:
            self._draining.remove(owner)
            self._drained += 1

    def _report_drained(self) -> None:
        if self._draining is not None and not self._draining:
            self._draining = None
            channel.send(self._control, channel.Drained(self._drained))


def _hung_up(owner: Connection) -> bool:
    """Asked of the socket itself: an event may be that of an earlier owner of the number."""
    poll = select.poll()
    poll.register(owner.fd, 0)
    return bool(poll.poll(0))


def _doze(fd: int, seconds: float) -> None:
    """Sleep until the descriptor is readable: to the microsecond, where `epoll` rounds up to a
    millisecond and would sleep through a short window. (The loop's epoll is among a process's first
    descriptors, far below select's 1024.)
    """
    select.select((fd,), (), (), seconds)
