"""Requests out at their times, answers in: one thread, a few connections, nothing retried.

Law of this file: it records and does not judge; sockets are `lanes`'. A request that is due is
given to the next connection whether or not earlier ones were answered; if that one takes nothing,
the request waits there with its time running. What bounds the memory is OUTSTANDING_MAX and the
deadline: a request that could not be sent until then is unsent.

It must be cheaper than the server that it measures, so it works on arrays by index, many requests
at a time. It says how late it was itself (`dispatched_ns`).
"""

from __future__ import annotations

import gc
import resource
import select
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.client.load.lanes import Lane
from edge_runtime.client.load.request import Template
from edge_runtime.client.load.schedule import REQUESTS_MAX
from edge_runtime.client.load.statistics import (
    ANSWERED,
    NOT_OFFERED,
    OUTCOME_OF_CODE,
    UNANSWERED,
    UNSENT,
    Observations,
)
from edge_runtime.errors import EdgeError
from edge_runtime.wire.frames import PREFIX_TAIL, RESPONSE, Kind
from edge_runtime.wire.reader import Frame, TooLarge

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Requests that wait for a connection or an answer, all together: some 5 MB here, and far more than
# a server's queue (256 by default) and the sockets between hold. Beyond it the generator would
# measure its own memory: further requests are `unsent` at once.
OUTSTANDING_MAX = 16_384
CONNECTIONS_MAX = 256  # a request's connection is kept in a byte, and select() takes 1024
# After the last deadline, so long for answers that are on their way: later ones are not useful.
GRACE_S = 1.0
RECONNECT_S = 0.1  # between attempts of one connection
CONNECT_TIMEOUT_S = 0.01  # of such an attempt: the others must not wait for it
SEND_BYTES_MAX = 256 * 1024  # offered to the kernel at once; a socket takes about as much
SEND_REQUESTS_MAX = 256  # two pieces each; the kernel takes 1024 pieces
DISPATCH_MAX = 512  # requests given out before answers are read: 1 ms of work at most
IDLE_S = 0.05  # the longest sleep

_INFERRED = int(Kind.INFER | RESPONSE)
_INTERNAL, _CLOSED = OUTCOME_OF_CODE["internal"], OUTCOME_OF_CODE["closed"]
_TOO_LARGE = OUTCOME_OF_CODE["too_large"]


class _Code(msgspec.Struct):
    code: str = "internal"


_CODE = msgspec.json.Decoder(_Code)


class Records(NamedTuple):
    """One entry per request, by its number; times in ns from the beginning, -1: never."""

    due_ns: array[int]
    dispatched_ns: array[int]
    answered_ns: array[int]
    outcome: bytearray
    lane: bytearray

    def append(self, due_ns: int) -> None:
        """One more request, due at a time."""
        self.due_ns.append(due_ns)
        self.dispatched_ns.append(-1)
        self.answered_ns.append(-1)
        self.outcome.append(NOT_OFFERED)
        self.lane.append(0)

    def numbers_of(self, lane: int) -> list[int]:
        """Requests that were sent on a connection and have no answer."""
        lanes, outcomes = np.frombuffer(self.lane, np.uint8), np.frombuffer(self.outcome, np.uint8)
        found: list[int] = np.flatnonzero((lanes == lane) & (outcomes == UNANSWERED)).tolist()
        return found


def records(due_ns: Array) -> Records:
    """For these requests, none of them offered yet."""
    never = array("q", b"\xff" * (8 * len(due_ns)))
    blank = bytearray(len(due_ns))
    return Records(array("q", due_ns.tobytes()), never, never[:], blank, blank[:])


class Generator:
    """Connections to one model. `close` it.

    Args:
        path: of the socket.
        template: what is sent, again and again.
        now_ns: CLOCK_MONOTONIC, which deadlines are told in.
        timeout_s: of connecting and of the first answer of each connection.

    Raises:
        EdgeError: the daemon is not there, or refuses the model, the region or the request.
    """

    def __init__(
        self,
        path: str,
        template: Template,
        *,
        connections: int,
        now_ns: Callable[[], int],
        timeout_s: float = 10.0,
        outstanding_max: int = OUTSTANDING_MAX,
    ) -> None:
        assert 1 <= connections <= CONNECTIONS_MAX
        self._template = template
        self._now_ns = now_ns
        self._outstanding_max = outstanding_max
        self._lanes = [Lane(number, path, template) for number in range(connections)]
        self._next_id = 1  # never used twice: a late answer of one load is not the next one's
        try:
            for lane in self._lanes:
                lane.open(timeout_s)
                lane.warm(self._next_id, now_ns() + round(timeout_s * 1e9))
                lane.start()
                self._next_id += 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        for lane in self._lanes:
            lane.close()

    def open_loop(self, due_ns: Array, end_ns: int, deadline_s: float) -> Observations:
        """Send a request at each of these times (ns from now, ascending), whatever comes back.

        Ctrl-C ends it early: what was seen until then is returned, with `interrupted` set.
        """
        run = self._run(records(due_ns), deadline_s)
        return self._watch(run, lambda: run.open_loop(end_ns))

    def closed_loop(self, in_flight: int, duration_s: float, deadline_s: float) -> Observations:
        """Keep so many requests in flight for so long: the next goes when one is answered.

        Ctrl-C as in `open_loop`.
        """
        run = self._run(records(np.empty(0, np.int64)), deadline_s)
        return self._watch(run, lambda: run.closed_loop(in_flight, round(duration_s * 1e9)))

    def _run(self, kept: Records, deadline_s: float) -> _Run:
        return _Run(
            self._lanes,
            kept,
            first_id=self._next_id,
            deadline_ns=round(deadline_s * 1e9),
            batch=max(1, min(SEND_REQUESTS_MAX, SEND_BYTES_MAX // self._template.size)),
            outstanding_max=self._outstanding_max,
            now_ns=self._now_ns,
        )

    def _watch(self, run: _Run, work: Callable[[], None]) -> Observations:
        interrupted = False
        with _without_collections():
            began_s = _cpu_s()
            run.begin()
            try:
                work()
                run.drain()
            except KeyboardInterrupt:
                interrupted = True
                run.elapsed_ns = run.elapsed_ns or run.now()
            cpu_share = (_cpu_s() - began_s) / (run.now() / 1e9)
        run.abandon()
        self._next_id += len(run.records.due_ns)
        return Observations(
            np.frombuffer(run.records.due_ns, np.int64),
            np.frombuffer(run.records.dispatched_ns, np.int64),
            np.frombuffer(run.records.answered_ns, np.int64),
            np.frombuffer(run.records.outcome, np.uint8),
            run.elapsed_ns,
            cpu_share,
            interrupted,
        )


class _Run:
    """One load, from its first request to its last answer."""

    def __init__(
        self,
        lanes: list[Lane],
        kept: Records,
        *,
        first_id: int,
        deadline_ns: int,
        batch: int,
        outstanding_max: int,
        now_ns: Callable[[], int],
    ) -> None:
        self.records = kept
        self.elapsed_ns = 0
        self._lanes = lanes
        self._first_id = first_id
        self._deadline_ns = deadline_ns
        self._batch = batch
        self._outstanding_max = outstanding_max
        self._clock_ns = now_ns
        self._next = 0  # the first request that was not given out
        self._outstanding = 0
        self._began_ns = 0

    def begin(self) -> None:
        """Time counts from here."""
        self._began_ns = self._clock_ns()

    def now(self) -> int:
        """Nanoseconds from the beginning."""
        return self._clock_ns() - self._began_ns

    # -- the loops ---------------------------------------------------------------------------------

    def open_loop(self, end_ns: int) -> None:
        due_ns = self.records.due_ns
        while (now_ns := self.now()) < end_ns or self._next < len(due_ns):
            due = bisect_right(due_ns, now_ns, self._next)
            if due > self._next:
                self._dispatch(min(due, self._next + DISPATCH_MAX), now_ns)
            self._turn(due_ns[self._next] if self._next < len(due_ns) else end_ns)
        self.elapsed_ns = end_ns

    def closed_loop(self, in_flight: int, duration_ns: int) -> None:
        while (now_ns := self.now()) < duration_ns and self._next < REQUESTS_MAX:
            if any(lane.is_open for lane in self._lanes):
                for _ in range(in_flight - self._outstanding):
                    self.records.append(now_ns)
                self._dispatch(len(self.records.due_ns), now_ns)
            self._turn(duration_ns)
        self.elapsed_ns = self.now()

    def drain(self) -> None:
        """Wait for the answers to what was sent, but not for ever."""
        until_ns = self.now() + self._deadline_ns + round(GRACE_S * 1e9)
        while self._outstanding and self.now() < until_ns:
            self._turn(until_ns)

    def abandon(self) -> None:
        """A connection with half a request on it is of no more use; what waits was not sent."""
        for lane in self._lanes:
            if lane.begun:
                lane.close()
            lane.waiting.clear()
            lane.blocked = False
            lane.retry_at_ns = 0  # it was told in this load's time

    # -- one turn ----------------------------------------------------------------------------------

    def _turn(self, until_ns: int) -> None:
        """Sleep until something can be done or `until_ns`, and do it."""
        live = [lane for lane in self._lanes if lane.is_open or self._reopened(lane)]
        wait_s = min(max(until_ns - self.now(), 0) / 1e9, IDLE_S)
        # Not epoll, whose time-outs are whole milliseconds.
        readable, writable, _ = select.select(
            live, [lane for lane in live if lane.blocked], [], wait_s
        )
        for lane in readable:
            self._receive(lane)
        for lane in writable:
            if lane.is_open:
                self._flush(lane)

    def _reopened(self, lane: Lane) -> bool:
        now_ns = self.now()
        if now_ns < lane.retry_at_ns:
            return False
        lane.retry_at_ns = now_ns + round(RECONNECT_S * 1e9)
        try:
            lane.open(CONNECT_TIMEOUT_S)
        except EdgeError:  # nobody there yet: the requests of this time are unsent, and say so
            return False
        lane.start()
        lane.retry_at_ns = 0
        return True

    def _dispatch(self, stop: int, now_ns: int) -> None:
        """Give the requests from `_next` to `stop` to the connections, in turns."""
        dispatched_ns, outcome, lane_of = self.records[1], self.records.outcome, self.records.lane
        live = [lane for lane in self._lanes if lane.is_open]
        room = self._outstanding_max - self._outstanding if live else 0
        for index in range(self._next, stop):
            dispatched_ns[index] = now_ns
            outcome[index] = UNSENT
            if room > 0:
                room -= 1
                lane = live[index % len(live)]
                lane_of[index] = lane.number
                lane.waiting.append(index)
                self._outstanding += 1
        self._next = stop
        for lane in live:
            if lane.waiting and not lane.blocked:
                self._flush(lane)

    def _flush(self, lane: Lane) -> None:
        """Send what waits, until the connection takes no more."""
        waiting, outcome, due_ns = lane.waiting, self.records.outcome, self.records.due_ns
        deadline_ns = self._began_ns + self._deadline_ns
        lane.blocked = False
        while waiting and not lane.blocked:
            if not lane.begun:
                self._drop_expired(lane)
            tails = [
                PREFIX_TAIL.pack(self._first_id + index, deadline_ns + due_ns[index])
                for index in islice(waiting, self._batch)
            ]
            if not tails:
                return
            try:
                whole = lane.send(tails)
            except OSError:
                self._lost(lane)
                return
            for _ in range(whole):
                index = waiting.popleft()
                if outcome[index] == UNSENT:  # else it is answered already: its body was too large
                    outcome[index] = UNANSWERED

    def _drop_expired(self, lane: Lane) -> None:
        """A client that could not send until its deadline has gone."""
        limit_ns = self.now() - self._deadline_ns
        while lane.waiting and self.records.due_ns[lane.waiting[0]] < limit_ns:
            lane.waiting.popleft()
            self._outstanding -= 1

    def _receive(self, lane: Lane) -> None:
        try:
            for arrived in lane.receive():
                now_ns = self.now()
                for frame in arrived:
                    self._take(frame, now_ns)
        except (OSError, EdgeError):
            self._lost(lane)

    def _take(self, frame: Frame | TooLarge, now_ns: int) -> None:
        index = frame.prefix.request_id - self._first_id
        outcome = self.records.outcome
        if not 0 <= index < self._next or outcome[index] not in (UNSENT, UNANSWERED):
            return  # of an earlier load, or of the region
        outcome[index] = _outcome(frame)
        self.records.answered_ns[index] = now_ns
        self._outstanding -= 1

    def _lost(self, lane: Lane) -> None:
        """The connection is gone: what was on it has no answer, what waited for it is unsent."""
        gone = self.records.numbers_of(lane.number)
        if lane.begun and self.records.outcome[lane.waiting[0]] == UNSENT:
            gone.append(lane.waiting.popleft())
        for index in gone:
            self.records.outcome[index] = _CLOSED
        unsent = [index for index in lane.waiting if self.records.outcome[index] == UNSENT]
        self._outstanding -= len(gone) + len(unsent)
        lane.close()


def _outcome(frame: Frame | TooLarge) -> int:
    if frame.prefix.kind == _INFERRED:
        return ANSWERED if isinstance(frame, Frame) else _TOO_LARGE
    if isinstance(frame, TooLarge):
        return _TOO_LARGE
    try:
        return OUTCOME_OF_CODE.get(_CODE.decode(frame.header).code, _INTERNAL)
    except msgspec.MsgspecError:
        return _INTERNAL


@contextmanager
def _without_collections() -> Iterator[None]:
    """A collection of garbage would be read as the server's latency; the loop leaves no cycles."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
