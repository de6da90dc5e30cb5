"""A worker that is not alone: the trial's other version, as its loop sees it.

Law of this file: it holds what a trial needs on either side (mirror and splitter of the serving
worker, shadow of the candidate), registers their descriptors, says what the loop is to do, and
answers what the candidate answered. What a worker does without a trial does not come here.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable

from edge_runtime.clock import monotonic_ns
from edge_runtime.errors import EdgeError
from edge_runtime.serving import channel, page, ring
from edge_runtime.serving.mirror import Mirror
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.plan import Planner
from edge_runtime.serving.running import Request
from edge_runtime.serving.shadowing import POLL_S, Shadow
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.serving.splitting import Splitter
from edge_runtime.wire import frames, sockets

TRIAL_MESSAGES = (
    channel.Accompany,
    channel.Shares,
    channel.Alone,
    channel.Shadow,
    channel.Unshadow,
)


class Company:
    """What one worker has to do with the other one.

    Attributes:
        active: `turn` and `wait_s` are to be called.
        mirror: shows answers to the candidate.
        splitter: passes requests to it.
    """

    def __init__(
        self,
        epoll: select.epoll,
        spec: WorkerSpec,
        planner: Planner,
        status: memoryview,
        peers: Peers,
        slots: Slots,
        run_here: Callable[[Request], None],
    ) -> None:
        """See above.

        Args:
            run_here: queues a request that the candidate did not answer.
        """
        self._epoll = epoll
        self._spec = spec
        self._planner = planner
        self._status = status
        self._peers = peers
        self._slots = slots
        self._run_here = run_here
        self.active = False
        self.mirror: Mirror | None = None
        self.splitter: Splitter | None = None
        self._shadow: Shadow | None = None
        self._bell = -1  # of our mirror

    # -- told by the supervisor --------------------------------------------------------------------

    def told(self, message: channel.Message, fds: list[int]) -> None:
        """Do as a message of TRIAL_MESSAGES says; takes over `fds`."""
        if isinstance(message, channel.Accompany):
            self._leave_candidate()
            self._accompany(message, fds)
        elif isinstance(message, channel.Shadow):
            self._unshadow()
            self._follow(message, fds)
        elif isinstance(message, channel.Shares):
            if self.mirror is not None:
                self.mirror.share(message.shadow_share)
            if self.splitter is not None:
                self.splitter.share(message.split_share)
        elif isinstance(message, channel.Alone):
            self.part()
        else:
            self._unshadow()
        self._refresh()

    def _accompany(self, message: channel.Accompany, fds: list[int]) -> None:
        if len(fds) != 4:  # this process has as many descriptors as it may
            sockets.close_fds(fds)
            return
        ring_fd, bell, connection, page_fd = fds
        words = _page(page_fd)
        sock = socket.socket(fileno=connection)
        self._bell = bell
        try:
            memory = ring.open_ring(ring_fd, message.ring_bytes)
        except EdgeError:
            self._drop_mirror()
            sock.close()
            return
        seed = message.seed
        writer = ring.Writer(memory, bell)
        self.mirror = Mirror(writer, words, seed, message.shadow_share)
        self.splitter = Splitter(
            sock,
            (self._spec.model, str(message.version)),
            words,
            seed,
            message.split_share,
            self._spec.limits.frame_body_bytes_max,
            lambda events: self._epoll.modify(connection, events),
        )
        self._epoll.register(connection, select.EPOLLIN)

    def _follow(self, message: channel.Shadow, fds: list[int]) -> None:
        if len(fds) != 3:
            sockets.close_fds(fds)
            return
        ring_fd, bell, page_fd = fds
        words = _page(page_fd)
        try:
            memory = ring.open_ring(ring_fd, message.ring_bytes)
        except EdgeError:
            os.close(bell)
            return
        self._shadow = Shadow(memory, bell, words, self._planner, self._spec)

    def part(self) -> None:
        """Show and pass on nothing more; what the candidate has been asked is waited for."""
        self._drop_mirror()
        if self.splitter is not None:
            self.splitter.retire()
            self._close_when_done()

    def close(self) -> None:
        """End it at once; whoever waits for an answer of the candidate gets none."""
        self._drop_mirror()
        if self.splitter is not None:
            self.splitter.close()
            self.splitter = None
        self._unshadow()

    def _drop_mirror(self) -> None:
        self.mirror = None
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def _leave_candidate(self) -> None:
        """At once: what it was asked is run here."""
        self._drop_mirror()
        if self.splitter is not None:
            self._settle(self.splitter.give_up())
            self._close_splitter()

    def _close_when_done(self) -> None:
        splitter = self.splitter
        if splitter is not None and not splitter.waiting and (splitter.retiring or splitter.closed):
            self._close_splitter()

    def _close_splitter(self) -> None:
        assert self.splitter is not None
        self._epoll.unregister(self.splitter.fd)
        self.splitter.close()
        self.splitter = None
        self._drop_mirror()
        self._refresh()

    def _unshadow(self) -> None:
        shadow, self._shadow = self._shadow, None
        if shadow is None:
            return
        if shadow.armed:
            self._epoll.unregister(shadow.bell)
        os.close(shadow.bell)

    def _refresh(self) -> None:
        self.active = self.splitter is not None or self._shadow is not None

    # -- in the loop -------------------------------------------------------------------------------

    def event(self, fd: int, events: int) -> None:
        """Something is to be read or written on a descriptor that is not the loop's own."""
        splitter, shadow = self.splitter, self._shadow
        if splitter is not None and fd == splitter.fd:
            if events & select.EPOLLOUT:
                splitter.flush()
            if events & ~select.EPOLLOUT:
                self._settle(splitter.readable())
            self._close_when_done()
        elif shadow is not None and shadow.armed and fd == shadow.bell:
            self._epoll.unregister(fd)
            shadow.armed = False
            shadow.wake(monotonic_ns())

    def _settle(self, outcomes: list[tuple[Request, memoryview | None]]) -> None:
        for request, frame in outcomes:
            if frame is None:
                self._take_back(request)
            else:
                self._relay(request, frame)

    def takes(self, request: Request, run_ns: float) -> bool:
        """Whether the candidate answers this request; `run_ns`: what a run takes here."""
        if self.splitter is None or not self.splitter.takes(request, run_ns):
            return False
        request.connection.in_flight += 1
        return True

    def _relay(self, request: Request, frame: memoryview) -> None:
        """Answer with what the candidate answered; it is the candidate that counts it."""
        owner = request.connection
        owner.in_flight -= 1
        if owner.fd < 0:
            self._slots.release(request.slot)
            return
        tail = request.request_id, monotonic_ns() - request.read_ns
        frames.PREFIX_TAIL.pack_into(frame, frames.PREFIX_TAIL_AT, *tail)
        self._peers.send(owner, frame, request.slot)
        self._peers.settle(owner)

    def _take_back(self, request: Request) -> None:
        """The candidate did not answer: run it here."""
        owner = request.connection
        owner.in_flight -= 1
        if owner.fd < 0:
            self._status[page.CANCELLED] += 1
            self._slots.release(request.slot)
        else:
            self._run_here(request)

    def send_and_show(self, request: Request, response: memoryview, run_ns: int) -> None:
        """Answer, and let the candidate see what was asked and answered."""
        slot, mirror = request.slot, self.mirror
        assert slot is not None and mirror is not None
        if request.plan.cacheable:
            self._peers.send(request.connection, response, slot)
            mirror.show(request.plan, slot, response, run_ns)  # nobody has used its memory since
        else:  # shared memory is the client's again once it has the answer
            mirror.show(request.plan, slot, response, run_ns)
            self._peers.send(request.connection, response, slot)

    def turn(self, idle: bool) -> None:
        """Once a turn of the loop; `idle`: no request of a client waits or runs."""
        now_ns = monotonic_ns()
        if self._shadow is not None and not self._shadow.armed and idle:
            self._shadow_turn(self._shadow, now_ns)
        if self.splitter is not None and self.splitter.waiting:
            for request in self.splitter.late(now_ns):
                self._take_back(request)
            self._close_when_done()

    def _shadow_turn(self, shadow: Shadow, now_ns: int) -> None:
        try:
            if shadow.due(now_ns):
                shadow.run(self._status)
            elif not shadow.restless(now_ns):
                self._epoll.register(shadow.bell, select.EPOLLIN)
                shadow.armed = True
        except EdgeError:  # what is in the ring makes no sense: it will not make any later
            self._unshadow()
            self._refresh()

    def wait_s(self, wait_s: float) -> float:
        """How long the loop may sleep that would sleep for `wait_s`."""
        shadow, splitter = self._shadow, self.splitter
        if shadow is not None and not shadow.armed:
            wait_s = min(wait_s, 0 if shadow.waiting else POLL_S)
        if splitter is not None and splitter.waiting:
            wait_s = min(wait_s, splitter.wait_s(monotonic_ns()))
        return wait_s


def _page(fd: int) -> memoryview:
    words = page.words(fd)
    os.close(fd)
    return words
