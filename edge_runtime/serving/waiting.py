"""The line: admitted requests that wait for the model, in the order in which they run.

Law of this file: who is next, who runs along, who must go when there is no room, how long a batch
may wait for company; values in, verdict out. No socket, no clock, no model: the loop acts.

Higher priorities run first. Within a priority connections take turns (start-time fair queueing:
Goyal, Vin and Cheng, SIGCOMM 1996, every request of weight one): a request's turn is one after that
of its connection's request before it, and never before the turn that runs now. So one that
pipelines many requests does not push those of others back, and one that was away gains nothing.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from edge_runtime.serving import batching

if TYPE_CHECKING:
    from edge_runtime.serving.connection import Connection
    from edge_runtime.serving.running import Request

    # (-priority, turn, order, request)
    Entry = tuple[int, int, int, Request]

PRIORITIES = 256  # the priority of a frame is one byte


class Line:
    """Requests that wait.

    Attributes:
        entries: who is next comes first, who is last comes last; always the same list, because what
            asks whether anything waits holds it.
    """

    def __init__(self, priority_max: int) -> None:
        self.entries: list[Entry] = []
        self._priority_max = priority_max
        self._order = 0
        self._turns = [0] * PRIORITIES  # of the request run last: where newcomers begin

    def put(self, request: Request) -> None:
        """Let a request wait."""
        priority = request.priority
        if priority > self._priority_max:
            request.priority = priority = self._priority_max
        turns = request.connection.turns
        turn, mine = self._turns[priority], turns.get(priority, 0)
        turns[priority] = turn = (mine if mine > turn else turn) + 1
        self._order += 1
        insort(self.entries, (-priority, turn, self._order, request))

    def pop(self) -> Request:
        """The request whose turn it is."""
        _, turn, _, request = self.entries.pop(0)
        self._turns[request.priority] = turn
        return request

    def pop_alike(self, first: Request, rows_max: int) -> list[Request]:
        """Those next in line that fit into one batch with `first`.

        It ends at the first that does not: nobody is overtaken by a whole batch.
        """
        key, rows = first.plan.batch_key, first.plan.rows
        alike = []
        for _, turn, _, request in self.entries:
            rows += request.plan.rows
            if request.plan.batch_key != key or rows > rows_max:
                break
            self._turns[request.priority] = turn
            alike.append(request)
        del self.entries[: len(alike)]
        return alike

    def hold_until_ns(self, rows_max: int, window_ns: int, run_ns: int) -> int:
        """Until when the first in line may wait for a fuller batch; 0: not at all.

        Only while all that wait would run together: nobody waits for somebody else's batch. A
        request with a deadline waits at most half of its time, and leaves twice `run_ns` for the
        run.
        """
        plan = self.entries[0][3].plan
        if plan.batch_key is None:
            return 0
        rows, until_ns = 0, self.entries[0][3].read_ns + window_ns
        for _, _, _, request in self.entries:
            if request.plan.batch_key != plan.batch_key:
                return 0
            rows += request.plan.rows
            read_ns, deadline_ns = request.read_ns, request.deadline_ns
            until_ns = min(until_ns, read_ns + window_ns)
            if deadline_ns:
                half_ns = (read_ns + deadline_ns) // 2
                until_ns = min(until_ns, half_ns, deadline_ns - 2 * run_ns)
        return 0 if rows >= batching.capacity(plan, rows_max) else until_ns

    def last(self) -> Request:
        """The one behind everybody else."""
        return self.entries[-1][3]

    def would_be_last(self, newcomer: Connection, priority: int) -> bool:
        """Whether a request of this connection would stand behind everybody else."""
        if not self.entries:
            return True
        return self._place(newcomer, priority) >= self.entries[-1][:2]

    def _place(self, newcomer: Connection, priority: int) -> tuple[int, int]:
        priority = min(priority, self._priority_max)
        return -priority, max(newcomer.turns.get(priority, 0), self._turns[priority]) + 1

    def must_go(self, newcomer: Connection, priority: int, size_bytes: int) -> list[Request]:
        """The last in line, if they come behind the newcomer and their going frees so much.

        Returns:
            Those to be refused in the newcomer's place, the last first; none: it must go itself.
        """
        place = self._place(newcomer, priority)
        going: list[Request] = []
        for entry in reversed(self.entries):
            if entry[:2] <= place:
                return []
            going.append(entry[3])
            size_bytes -= entry[3].plan.slot_bytes
            if size_bytes <= 0:
                return going
        return []

    def remove(self, requests: list[Request]) -> None:
        """Take these out; their connections get their turns back."""
        if len(requests) == 1 and requests[0] is self.entries[-1][3]:
            self.entries.pop()  # who makes way for a newcomer
        else:
            gone = set(map(id, requests))
            self.entries[:] = [entry for entry in self.entries if id(entry[3]) not in gone]
        for request in requests:
            request.connection.turns[request.priority] -= 1

    def of(self, owner: Connection) -> list[Request]:
        """The requests of a connection that wait."""
        return [entry[3] for entry in self.entries if entry[3].connection is owner]
