"""The connections of a worker: what is sent to them, when they are closed, how they leave.

Law of this file: the only place that adds connections to the loop's epoll and takes them out, that
writes to them, and that hands them over. What their bytes mean is `intake`'s; what becomes of a
request whose connection is gone is for whoever holds it.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import EdgeError
from edge_runtime.serving import channel, connection, page
from edge_runtime.serving.connection import Connection
from edge_runtime.serving.plan import Slot
from edge_runtime.serving.slots import Slots
from edge_runtime.wire import messages

# A peer that sends half a frame, or does not take its answer, holds a slot: not for longer than
# this.
STALL_S_MAX = 30.0


class Peers:
    """Who is connected.

    Attributes:
        by_fd: the open ones, by their descriptor.
        draining: they are being handed over; from then on there is no way back.
        resume: called with a connection whose read bytes may be looked at (again).
        forget: called with a closed connection that still has requests in flight.
    """

    resume: Callable[[Connection], None]
    forget: Callable[[Connection], None]

    def __init__(
        self, epoll: select.epoll, control: socket.socket, status: memoryview, slots: Slots
    ) -> None:
        self.by_fd: dict[int, Connection] = {}
        self._epoll = epoll
        self._control = control
        self._status = status
        self._slots = slots
        self._leaving: set[Connection] | None = None  # while draining: who still has to go back
        self._drained = 0

    @property
    def draining(self) -> bool:
        return self._leaving is not None

    # -- writing -----------------------------------------------------------------------------------

    def send_error(self, owner: Connection, request_id: int, error: EdgeError) -> None:
        """Send an ERROR frame."""
        self.send(owner, memoryview(messages.encode_error(error, request_id)), None)

    def send(self, owner: Connection, data: memoryview, slot: Slot | None) -> None:
        """Send or queue an answer; the slot is free again when the kernel has taken all of it."""
        if not owner.outbox:
            try:
                sent = owner.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._slots.release(slot)
                self.close(owner)
                return
            if sent == len(data):
                if slot is not None:
                    self._slots.release(slot)
                return
            data = data[sent:]
        owner.outbox.append((data, slot))
        owner.stalled_since_ns = owner.stalled_since_ns or _monotonic_ns()
        # No more requests from a client that does not take its answers.
        self._watch(owner, select.EPOLLOUT)

    def flush(self, owner: Connection) -> None:
        """The socket takes bytes again."""
        while owner.outbox:
            data, slot = owner.outbox[0]
            try:
                sent = owner.sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.close(owner)
                return
            owner.stalled_since_ns = _monotonic_ns()
            if sent < len(data):
                owner.outbox[0] = (data[sent:], slot)
                return
            owner.outbox.popleft()
            self._slots.release(slot)
        owner.stalled_since_ns = 0
        if owner.leaving:
            self._watch(owner, 0)
            self.settle(owner)
            return
        self._watch(owner, select.EPOLLIN)
        self.resume(owner)  # half a frame may wait there: its time counts again

    def _watch(self, owner: Connection, events: int) -> None:
        if owner.fd in self.by_fd:
            self._epoll.modify(owner.fd, events)

    def _counted(self, owner: Connection, change: int) -> None:
        self._status[page.CONNECTIONS] = len(self.by_fd)
        page.count_user(self._status, owner.peer[1], change)

    def descriptors_of(self, uid: int) -> int:
        """How many of this process's descriptors a user holds: connections and regions, each of
        which has a second one in its mapping.
        """
        theirs = [one for one in self.by_fd.values() if one.peer[1] == uid]
        return len(theirs) + 2 * sum(len(one.regions) for one in theirs)

    # -- closing -----------------------------------------------------------------------------------

    def close(self, owner: Connection) -> None:
        """Close a connection and let go of what it holds; a second time does nothing."""
        if self.by_fd.pop(owner.fd, None) is None:
            return
        self._epoll.unregister(owner.fd)
        owner.leaving = True  # whoever is in the middle of its bytes stops there
        for _, slot in owner.outbox:
            self._slots.release(slot)
        owner.outbox.clear()
        if owner.receiving is not None:
            self._slots.release(owner.receiving.slot)
            owner.receiving = None
        if owner.in_flight:
            self.forget(owner)
        owner.close()
        self._counted(owner, -1)
        if self._leaving:
            self._leaving.discard(owner)
        self._report_drained()

    def close_all(self) -> None:
        """Close every connection."""
        for owner in list(self.by_fd.values()):
            self.close(owner)

    def close_stalled(self, now_ns: int) -> None:
        """Close connections that hold memory and do not move."""
        limit_ns = now_ns - round(STALL_S_MAX * 1e9)
        for owner in list(self.by_fd.values()):
            if 0 < owner.stalled_since_ns < limit_ns:
                self.close(owner)

    # -- hand-over ---------------------------------------------------------------------------------

    def adopt(self, message: channel.Adopt, fds: list[int]) -> None:
        """Serve a connection that the supervisor hands over; takes over `fds`."""
        try:
            owner = connection.adopt(message, fds)
        except EdgeError:  # a descriptor or a region is missing: nothing to serve
            return
        self.by_fd[owner.fd] = owner
        self._epoll.register(owner.fd, select.EPOLLIN)
        self._counted(owner, 1)
        self.resume(owner)

    def drain(self) -> None:
        """Give every connection back, each when its last answer is out; then say so."""
        self._leaving = set(self.by_fd.values())
        self._drained = 0
        for owner in list(self._leaving):
            self.leave(owner)
            if not owner.in_flight:
                self._give_back(owner)
        self._report_drained()

    def leave(self, owner: Connection) -> None:
        """Read no more from it; it goes back when its last answer is out (see `settle`)."""
        owner.leaving = True
        self._watch(owner, select.EPOLLOUT if owner.outbox else 0)

    def settle(self, owner: Connection) -> None:
        """Give a connection back that leaves and has nothing in flight any more."""
        if owner.leaving and not owner.in_flight:
            self._give_back(owner)

    def _give_back(self, owner: Connection) -> None:
        if owner.outbox or self.by_fd.pop(owner.fd, None) is None:
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
        self._slots.release(unused)
        self._counted(owner, -1)
        if self._leaving and owner in self._leaving:
            self._leaving.remove(owner)
            self._drained += 1
        self._report_drained()

    def _report_drained(self) -> None:
        if self._leaving is not None and not self._leaving:
            self._leaving = None
            channel.send(self._control, channel.Drained(self._drained))


def hung_up(owner: Connection) -> bool:
    """Asked of the socket itself: an event may be that of an earlier owner of the number."""
    poll = select.poll()
    poll.register(owner.fd, 0)
    return bool(poll.poll(0))
