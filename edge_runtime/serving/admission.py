"""Admission: which requests may wait, who goes when there is no room, and what it is told.

Law of this file: everything about too much. It puts requests into the line or refuses them, knows
how long a run takes lately, and how much of a turn may go into reading and refusing. It runs
nothing and reads nothing from a socket; who is next is `waiting`'s.

A refusal is to come within 10 ms of its request and to cost little, or a model of microseconds
would do nothing else under load. So a request that would be last in a full line is refused as soon
as its header is read, with a frame made beforehand, and all refusals of a turn to one connection
leave in one `send` (some 2 us each; a request that is admitted and then makes way costs 10 us).
"""

from __future__ import annotations

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import EdgeError, OverloadedError, ThrottledError
from edge_runtime.serving import channel, page
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.restraint import Restraint
from edge_runtime.serving.running import Request
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import Limits
from edge_runtime.serving.waiting import Line
from edge_runtime.wire import frames, messages

# When memory for tensors is short: a body takes milliseconds to arrive on a unix socket; one that
# takes longer than this is not being sent.
BODY_NS_MAX = 1_000_000_000
# A run counts for at most four of those before it (and this, where those are very short): when it
# took longer, the processor was somebody else's, and nobody is refused for that.
RUN_NS_SPIKE = 100_000
# So many may wait however long a run takes: as many clients that ask one by one are never refused.
PLACES_MIN = 16
# A turn that refuses reads for so long; what is left waits in its sockets for the next turn, where
# its clients feel it. Then the model runs for so many times the time that was spent on newcomers,
# at most for RUN_NS_MAX: half of the time within which a refusal is to come.
READ_NS_MAX = 1_000_000
RUN_SHARE = 9
RUN_NS_MAX = 4_000_000
REFUSAL_NS = 5_000_000  # for so long the same "come back in" is true
# Where an error is counted, by its code; any other: FAILED.
_OUTCOMES = {
    "overloaded": page.REFUSED,
    "throttled": page.REFUSED,
    "deadline_exceeded": page.EXPIRED,
    "invalid_request": page.INVALID,
    "too_large": page.INVALID,
    "malformed": page.INVALID,
}


class Admission:
    """The way into the line.

    Attributes:
        line: who waits.
        run_ns_mean: of a request, in recent runs: what retry_after_s is made of.
        places_min: so many may wait in any case.
        refusals: of this turn, not yet sent: request ids by connection.
        restraint: what the device allows; None: everything.
    """

    def __init__(
        self,
        model: str,
        limits: Limits,
        status: memoryview,
        peers: Peers,
        slots: Slots,
        lanes: int,
        run_ms: float,
    ) -> None:
        """See above.

        Args:
            lanes: runs at the same time.
            run_ms: of a run, as far as is known.
        """
        self.line = Line(limits.priority_max)
        self.run_ns_mean = run_ms * 1e6
        self._model = model
        self._limits = limits
        self._status = status
        self._peers = peers
        self._slots = slots
        self._lanes = lanes
        self._pending = self.line.entries
        self.places_min = min(PLACES_MIN, limits.queue_requests_max)
        self.restraint: Restraint | None = None
        self.refusals: dict[Connection, list[int]] = {}
        self._refusal = b"", b""  # the newest "overloaded" frame, before and behind its id
        self._refusal_until_ns = 0

    def ran(self, run_ns: int) -> None:
        """A request's run (or its share of one) took so long."""
        mean_ns = self.run_ns_mean
        self.run_ns_mean += (min(run_ns, 4 * mean_ns + RUN_NS_SPIKE) - mean_ns) * 0.1

    # -- turns -------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether as many wait as may."""
        return len(self._pending) >= self.places_min and len(self._pending) >= self._places()

    def _places(self) -> int:
        """How many may wait: what runs within `queue_ms_max`, as runs were lately."""
        limits = self._limits
        if not limits.queue_ms_max:
            return limits.queue_requests_max
        within = int(limits.queue_ms_max * 1e6 * self._lanes / max(self.run_ns_mean, 1.0))
        return max(min(within, limits.queue_requests_max), self.places_min)

    @staticmethod
    def run_until_ns(began_ns: int, read_ns: int) -> int:
        """Until when a turn that has read from `began_ns` to `read_ns` runs what waits.

        Without this a model of microseconds would be busy with newcomers only: its goodput at twice
        the load that it can serve was 0.2 % of its peak.
        """
        return read_ns + min(RUN_SHARE * (read_ns - began_ns), RUN_NS_MAX)

    # -- in ----------------------------------------------------------------------------------------

    def put(self, request: Request) -> None:
        """Let a request wait. When the queue is full, whoever is last in line then is refused."""
        if self.restraint is not None and self._held_back(self.restraint, request):
            return
        request.connection.in_flight += 1
        self.line.put(request)
        if len(self._pending) > self.places_min and len(self._pending) > self._places():
            self._send_away([self.line.last()])
        elif request.deadline_ns and len(self._pending) > 1 and self._hopeless(request):
            self._send_away([request])

    def turns_away(self, owner: Connection, priority: int, deadline_ns: int) -> bool:
        """Whether a newcomer would be refused by `put`. Only asked when `places_min` wait."""
        if not self.line.would_be_last(owner, priority):
            return False
        return len(self._pending) >= self._places() or (
            bool(deadline_ns) and self._wait_ns() > deadline_ns - _monotonic_ns() > 0
        )

    def make_room(self, owner: Connection, priority: int, size_bytes: int) -> bool:
        """Have requests behind the newcomer refused, if that gives it so many bytes."""
        limit, slots = self._limits.queue_bytes_max, self._slots
        while slots.used_bytes + size_bytes > limit and self._close_slowest(owner):
            pass
        excess = slots.used_bytes + size_bytes - limit
        if excess <= 0:
            return True
        going = self.line.must_go(owner, priority, excess)
        self._send_away(going)
        return bool(going)

    def forget(self, owner: Connection) -> None:
        """What a client that left had waiting is not run."""
        forgotten = self.line.of(owner)
        self.line.remove(forgotten)
        self._status[page.CANCELLED] += len(forgotten)
        for request in forgotten:
            owner.in_flight -= 1
            self._slots.release(request.slot)
        self._status[page.WAITING] = len(self._pending)

    def _close_slowest(self, newcomer: Connection) -> bool:
        """Close the connection whose body has been on its way longest, if that is too long.

        Memory is short: who announces much and sends little must not keep it from the others.
        """
        latest_ns = _monotonic_ns() - BODY_NS_MAX
        slow = [
            (owner.receiving.read_ns, owner.fd, owner)
            for owner in self._peers.by_fd.values()
            if owner.receiving is not None and owner is not newcomer
        ]
        if not slow or min(slow)[0] > latest_ns:
            return False
        self._peers.close(min(slow)[2])
        return True

    def _hopeless(self, request: Request) -> bool:
        """Whether a request, last in line, would be run only after its deadline."""
        left_ns = request.deadline_ns - _monotonic_ns()
        return self._wait_ns() > left_ns > 0 and self.line.last() is request

    def _wait_ns(self) -> float:
        """How long the last in line will wait, as runs were lately."""
        return len(self._pending) * self.run_ns_mean / self._lanes

    # -- held back ---------------------------------------------------------------------------------

    def restrain(self, order: channel.Restrain) -> None:
        """Hold back as told, from the next request on."""
        free = order.run_share == 1 and not order.priority_min
        self.restraint = (
            None
            if free
            else Restraint(
                order.run_share, order.priority_min, order.reason, self._lanes, _monotonic_ns()
            )
        )

    def _held_back(self, restraint: Restraint, request: Request) -> bool:
        """Refuse a request, not in the line yet, that the device does not allow now."""
        ahead_ns = len(self._pending) * self.run_ns_mean
        priority = min(request.priority, self._limits.priority_max)  # as much as it may claim
        wait_ns = restraint.wait_ns(priority, ahead_ns, _monotonic_ns())
        if not wait_ns:
            return False
        error = ThrottledError(
            restraint.reason, where=self._model, retry_after_s=round(wait_ns / 1e9, 4)
        )
        self._slots.release(request.slot)
        self._status[page.HELD] += 1
        self.answer_error(request.connection, request.request_id, error)
        self._peers.settle(request.connection)
        return True

    # -- away --------------------------------------------------------------------------------------

    def dismiss(self, error: EdgeError) -> None:
        """Nothing that waits is run any more: each is answered with `error`."""
        while self._pending:
            self.turn_down(self.line.pop(), error)
        self._status[page.WAITING] = 0

    def turn_down(self, request: Request, error: EdgeError) -> None:
        """Answer a request that was in flight, and is not run, with `error`."""
        owner = request.connection
        owner.in_flight -= 1
        self._slots.release(request.slot)
        if owner.fd >= 0:
            self.answer_error(owner, request.request_id, error)
            self._peers.settle(owner)

    def _send_away(self, requests: list[Request]) -> None:
        """Refuse requests that were waiting."""
        self.line.remove(requests)
        for request in requests:
            request.connection.in_flight -= 1
            self._slots.release(request.slot)
            self.refuse(request.connection, request.request_id)

    def refuse(self, owner: Connection, request_id: int) -> None:
        """Say "overloaded", at the end of this turn's reading: in flight until then."""
        owner.in_flight += 1
        ids = self.refusals.get(owner)
        if ids is None:
            self.refusals[owner] = [request_id]
        else:
            ids.append(request_id)

    def send_refusals(self) -> None:
        """Once a turn, when there are any: one `send` for each connection."""
        refusals, self.refusals = self.refusals, {}
        head, rest = self._overloaded_frame()
        tail = frames.PREFIX_TAIL.pack
        for owner, ids in refusals.items():
            self._status[page.REFUSED] += len(ids)
            owner.in_flight -= len(ids)
            if owner.fd < 0:
                continue  # it closed meanwhile
            data = b"".join([head + tail(request_id, 0) + rest for request_id in ids])
            self._peers.send(owner, memoryview(data), None)
            self._peers.settle(owner)

    def _overloaded_frame(self) -> tuple[bytes, bytes]:
        """Made once for some milliseconds, because it is said often."""
        now_ns = _monotonic_ns()
        if now_ns > self._refusal_until_ns:
            frame = messages.encode_error(self._overloaded())
            rest_at = frames.PREFIX_TAIL_AT + frames.PREFIX_TAIL.size
            self._refusal = frame[: frames.PREFIX_TAIL_AT], frame[rest_at:]
            self._refusal_until_ns = now_ns + REFUSAL_NS
        return self._refusal

    def _overloaded(self) -> OverloadedError:
        wait_s = max(self._wait_ns() / 1e9, 0.001)
        return OverloadedError(
            f"{len(self._pending)} requests wait for {self._model}",
            where=self._model,
            expected=f"<= {self._places()} requests and {self._limits.queue_bytes_max} bytes",
            retry_after_s=round(wait_s, 4),
        )

    def answer_error(self, owner: Connection, request_id: int, error: EdgeError) -> None:
        """Answer with an error, and count it as what it is."""
        word = _OUTCOMES.get(error.code, page.FAILED)
        self._status[word] += 1
        if word in (page.INVALID, page.FAILED):
            self._status[page.ERRORS] += 1
        self._peers.send_error(owner, request_id, error)
