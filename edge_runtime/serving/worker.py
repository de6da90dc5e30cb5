"""The worker loop: one thread, one epoll, one model.

Law of this file: the turn, what the supervisor tells, and whether the model is still right. It
moves requests from sockets to the model and answers back: `intake` reads them, `dispatch` has them
run and answered, `peers` sends the answers and hands connections over. What a request means is
`plan`'s; how the process came to be is `process`'s. Nothing here blocks except `epoll.poll` and,
for models without runners, the model itself. If this process dies, its connections close and
nobody else notices.

A turn: wait, read what is readable, admit it (or refuse it at once), run one or one batch, answer.
Small models run in this thread; slower ones in a few runner threads, so that reading and refusing
go on meanwhile.
"""

from __future__ import annotations

import select
import socket

from edge_runtime.clock import monotonic_ns as _monotonic_ns
from edge_runtime.errors import GoldenError
from edge_runtime.serving import admission, channel, page, peers, slots
from edge_runtime.serving.admission import Admission
from edge_runtime.serving.company import TRIAL_MESSAGES
from edge_runtime.serving.dispatch import Dispatch
from edge_runtime.serving.heartbeat import Heart
from edge_runtime.serving.intake import Intake
from edge_runtime.serving.measuring import Meter
from edge_runtime.serving.peers import Peers
from edge_runtime.serving.plan import Planner
from edge_runtime.serving.running import edge_error
from edge_runtime.serving.sleeping import Poll, doze, spinning, unlocked
from edge_runtime.serving.slots import Slots
from edge_runtime.serving.spec import WorkerSpec

SWEEP_S = 1.0
# A worker that was found to be wrong waits so long for clients to take the answers they have due.
PART_S_MAX = 0.5


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
        self._spin_ns = round(spec.spin_us * 1e3)
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._slots = Slots(lambda: self._intake.all_plans())
        self._peers = Peers(self._epoll, control, status, self._slots)
        self._admission = Admission(
            spec.model, spec.limits, status, self._peers, self._slots, runners or 1, run_ms
        )
        self._line = self._admission.line
        self._pending = self._line.entries
        self._dispatch = Dispatch(
            spec,
            planner,
            self._epoll,
            status,
            self._peers,
            self._slots,
            self._admission,
            heart,
            runners,
            batch_rows_max,
            batch_rows_tried,
        )
        self._company = self._dispatch.company
        self._runners = self._dispatch.runners
        self._intake = Intake(
            spec,
            planner,
            self._peers,
            self._admission,
            self._slots,
            self._dispatch.admit,
            self._dispatch.every_request_runs_here,
        )
        self._peers.resume = self._intake.parse
        self._peers.forget = self._admission.forget
        if self._runners:
            self._epoll.register(self._runners.wake_fd, select.EPOLLIN)
        self._sweep_at_ns = 0
        self._put_off = 0  # the connection with which the last turn stopped reading; 0: none
        self._meter: Meter | None = None

    # -- the loop ---------------------------------------------------------------------------------

    def serve(self) -> bool:
        """Run until Stop, until the supervisor is gone, or until the model is found to be wrong;
        whether that was why.
        """
        poll: Poll = self._epoll.poll
        if self._spin_ns:
            poll = spinning(poll, self._spin_ns)
        if self._runners is None:
            return self._turns(poll)
        with self._runners.lock:
            return self._turns(unlocked(poll, self._runners.lock))

    def _turns(self, poll: Poll) -> bool:
        intake, company, load = self._intake, self._company, self._admission
        status, heart, dispatch = self._status, self._heart, self._dispatch
        connections, readable, flush = self._peers.by_fd, intake.readable, self._peers.flush
        control_fd = self._control.fileno()
        wake_fd = self._runners.wake_fd if self._runners else -1
        # One call less where each counts.
        run_pending = dispatch.run_next if dispatch.plain else dispatch.run_pending
        while not dispatch.stopping:
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
                    dispatch.run_on(load.run_until_ns(began_ns, read_ns), read_ns)
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
            self._dispatch.stopping = True

    def _wait_s(self) -> float:
        """How long `epoll` may sleep while requests wait; what is left of a hold is slept here."""
        if self._dispatch.hold_until_ns:
            hold_s = max(self._dispatch.hold_until_ns - _monotonic_ns(), 0) / 1e9
            if self._runners is None:
                doze(self._epoll.fileno(), hold_s)
            else:
                unlocked(doze, self._runners.lock)(self._epoll.fileno(), hold_s)
            return 0
        return SWEEP_S if self._runners else 0

    def _idle(self) -> bool:
        return not self._pending and self._dispatch.at_rest()

    def _sweep(self, now_ns: int) -> None:
        """Once a second: give back what nobody uses."""
        self._sweep_at_ns = now_ns + round(SWEEP_S * 1e9)
        if self._heart is not None:
            self._heart.look(now_ns)
        self._peers.close_stalled(now_ns)
        self._slots.trim()
        self._dispatch.trim(slots.IDLE_BYTES_MAX)

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
        quiet = self._dispatch.at_rest() if heart.pressing else self._idle()
        if quiet and not self._condemned_until_ns:
            self._beat(heart)
            if self._pending:  # runners were kept waiting for it
                self._dispatch.run_pending()
        if self._condemned_until_ns:
            late = _monotonic_ns() > self._condemned_until_ns
            if late or not self._peers.by_fd:
                self._dispatch.stopping = True

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
        self._dispatch.dismiss()
        self._peers.drain()
