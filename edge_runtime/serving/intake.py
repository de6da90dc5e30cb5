"""Intake: from the bytes of connections to whole requests.

Law of this file: it reads, finds frames, plans them once per distinct header, and receives tensors
into the memory that the model will read. What it refuses, it refuses for what the frame says, or
because there is no memory for it; a whole request is `admit`'s. It runs nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import EdgeError, MalformedError, RequestError, TooLargeError
from edge_runtime.serving import asides, channel, connection
from edge_runtime.serving.admission import Admission
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.plan import Plan, Planner, Slot
from edge_runtime.serving.running import Request, edge_error
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import HEADER_SIZE_MAX, MAGIC, PREFIX, PREFIX_SIZE, VERSION, Kind

# Distinct request headers remembered: clients send a handful; more are planned anew each time
# round.
PLANS_MAX = 256
# Longer headers are planned each time: 256 of them per connection must not be 16 MiB.
HEADER_KEPT_MAX = 8 * 1024
# Descriptors that came with frames which take none: a client that goes on sending them is broken.
STRAY_MAX = 8
# Versions that a client may ask the active worker for, besides the number of its own.
STABLE_LABELS = frozenset({"", "stable"})
# One descriptor a frame is legal; room for two shows the mistake instead of hiding it.
_ANCILLARY = socket.CMSG_SPACE(2 * 4)
_INFER = int(Kind.INFER)
_MODEL_KINDS = frozenset(int(kind) for kind in frames.MODEL_KINDS)
_DROPPED_FLAGS = int(socket.MSG_CTRUNC)  # an IntFlag costs half a microsecond at each `&`


class Intake:
    """Reads requests.

    Attributes:
        plans: by header; those that name regions are with their connection.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        planner: Planner,
        peers: Peers,
        admission: Admission,
        slots: Slots,
        admit: Callable[[Request], None],
        all_wait: Callable[[], bool],
    ) -> None:
        """See above.

        Args:
            all_wait: whether `admit` lets each request wait in line; false: some are answered
                otherwise, so that even when the line is full they have to be received.
        """
        self.plans: dict[bytes, Plan] = {}
        self._spec = spec
        self._limits = spec.limits
        self._planner = planner
        self._peers = peers
        self._admission = admission
        self._slots = slots
        self._admit = admit
        self._all_wait = all_wait
        self._pending = admission.line.entries
        self._version = str(spec.version)
        self._labels = STABLE_LABELS
        self._disowned = False

    def all_plans(self) -> Iterable[dict[bytes, Plan]]:
        """Ours, and those of every connection."""
        return (self.plans, *(owner.plans for owner in self._peers.by_fd.values()))

    # -- which requests are ours -------------------------------------------------------------------

    def promote(self) -> None:
        """Headers that name no version are ours; those that name our label so far may not be."""
        self._labels = STABLE_LABELS
        for plans in self.all_plans():
            connection.retire(plans)

    def demote(self, label: str) -> None:
        """From now on take none that does not name our version, or this label."""
        self._labels = frozenset({label} - {""})
        connection.retire(self.plans)  # those without a version are not ours any more

    def disown(self) -> None:
        """From now on no request is ours."""
        self._disowned = True
        for plans in self.all_plans():
            connection.retire(plans)

    def _ours(self, name: str, version: str) -> bool:
        if name != self._spec.model or self._disowned:
            return False
        return version == self._version or version in self._labels

    # -- reading -----------------------------------------------------------------------------------

    def readable(self, owner: Connection) -> None:
        """Read what is there, once, and use it."""
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
            self._peers.close(owner)
            return
        if ancillary or flags & _DROPPED_FLAGS:
            owner.stray += channel.descriptors(ancillary)
            if len(owner.stray) > STRAY_MAX:
                self._peers.close(owner)
                return
        if not count:
            self._peers.close(owner)
        elif receiving is not None:
            receiving.filled += count
            if receiving.filled == receiving.plan.body_size:
                owner.receiving = None
                owner.stalled_since_ns = 0
                receiving.read_ns = _monotonic_ns()
                self._admit(receiving)
        else:
            owner.end += count
            self.parse(owner)

    def parse(self, owner: Connection) -> None:
        """Use up the bytes read: every whole frame, and the beginning of a large one."""
        read_ns = _monotonic_ns()
        began = owner.start
        pending, places_min = self._pending, self._admission.places_min
        away = -1  # requests of this connection of no higher priority find the line full
        while owner.receiving is None and not owner.leaving:
            have = owner.end - owner.start
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
            plan = self.plans.get(header)
            if plan is None:
                plan = self._plan(owner, header, body_size, request_id, body_at)
                if plan is None:
                    continue
            if len(pending) >= places_min and body_size == plan.body_size:
                if priority <= away or self._turns_away(owner, priority, time_ns):
                    if priority > away and self._admission.full:
                        away = priority
                    self._skip_body(owner, body_at, body_size)
                    self._admission.refuse(owner, request_id)
                    continue
                away = -1
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
        if owner.leaving:
            self._peers.settle(owner)

    def _malformed(self, owner: Connection) -> None:
        try:
            frames.decode_prefix(owner.buffer, owner.start)
        except (MalformedError, TooLargeError) as error:
            self._admission.answer_error(owner, 0, error)
        self._peers.close(owner)

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
                self._peers.leave(owner)
                return None
            plan = self._planner.plan(request, owner.regions)
        except EdgeError as error:
            self._refuse(owner, error, request_id, body_at, body_size)
            return None
        shared = any(one.region for one in plan.inputs) or any(one.region for one in plan.outputs)
        plans = owner.plans if shared else self.plans
        if len(header) > HEADER_KEPT_MAX:
            plan.retire()
            return plan
        if len(plans) >= PLANS_MAX:
            plans.pop(next(iter(plans))).retire()
        plans[header] = plan
        return plan

    def _turns_away(self, owner: Connection, priority: int, deadline_ns: int) -> bool:
        """Whether a request would only be received to be refused."""
        return self._all_wait() and self._admission.turns_away(owner, priority, deadline_ns)

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
            self._slots.used_bytes + plan.slot_bytes > limits.queue_bytes_max
            and not self._admission.make_room(owner, priority, plan.slot_bytes)
        ):
            self._skip_body(owner, body_at, body_size)
            self._admission.refuse(owner, request_id)
            return None
        else:
            if owner.leaving:  # it closed when an older request of its own made way
                return None
            try:
                return self._slots.acquire(plan)
            except Exception as failure:  # noqa: BLE001 - the backend binds memory here
                error = edge_error(failure)
        self._refuse(owner, error, request_id, body_at, body_size)
        return None

    def _too_large(self, body_size: int) -> TooLargeError:
        return TooLargeError(
            f"body of {body_size} bytes",
            expected=f"<= {self._limits.frame_body_bytes_max}",
            remedy="pass large tensors by shared memory (REGION_ADD)",
        )

    def _refuse(
        self, owner: Connection, error: EdgeError, request_id: int, body_at: int, body_size: int
    ) -> None:
        self._skip_body(owner, body_at, body_size)
        self._admission.answer_error(owner, request_id, error)

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
                self._peers.leave(owner)
                return True
            ref = messages.decode_model_ref(header)
            if not self._ours(ref.model_name, ref.model_version):
                self._peers.leave(owner)
                return True
            answer = asides.reply(self._spec, owner, kind, header, self._peers.descriptors_of)
        except MalformedError:
            self._malformed(owner)
            return False
        except EdgeError as error:
            self._refuse(owner, error, request_id, body_at, body_size)
            return True
        self._skip_body(owner, body_at, body_size)
        frame = messages.encode_frame(kind | frames.RESPONSE, *answer, request_id=request_id)
        self._peers.send(owner, memoryview(frame), None)
        return owner.fd in self._peers.by_fd
