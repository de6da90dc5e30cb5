"""A worker as the supervisor holds it: what it is told, what it says, how it ended.

Law of this file: one process and its channel, no policy. What follows from an end is decided
elsewhere. Everything runs in the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

from edge_runtime.clock import Clock
from edge_runtime.daemon import memory
from edge_runtime.daemon.line import Line
from edge_runtime.daemon.reaper import Reaper
from edge_runtime.errors import BackendError, EdgeError, from_document
from edge_runtime.serving import channel, health, page
from edge_runtime.serving import spec as specs
from edge_runtime.serving.health import Cause, Death
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import sockets

PF_EXITING = 0x4
# An out-of-memory kill counts for a death when it is younger than so many looks of the supervisor:
# long enough for a large process to be taken down, short enough not to blame an old one.
OOM_SAMPLES = 20
# Compiled models that a worker may give us to keep: one for each device that it tries; more would
# be a worker that wants to fill the disk.
COMPILED_MAX = 4
# A worker that shares its process cannot be killed without the others. One that is to end is waited
# for so long, whatever it does: the others are worth it; one that hangs keeps them from the device.
LEAVE_S_MAX = 10.0


class UnansweredError(BackendError):
    """There was no answer in time; it may come yet."""


class Sharing(Protocol):
    """The process of several workers, as one of them knows it."""

    def memory_of(self, worker: WorkerProcess) -> memory.Memory:
        """Its part of the memory."""

    def stays_bytes(self) -> int:
        """Private memory of the process, unless it is about to end."""


class WorkerProcess:
    """One worker, from fork to end: a process, or a thread in a host (hosts.Host).

    Attributes:
        ready: done when it may serve; carries its failure otherwise.
        ended: done when the process is gone, or the thread.
    """

    is_host = False

    def __init__(
        self,
        spec: WorkerSpec,
        backend_version: str,
        clock: Clock,
        returned: Callable[[channel.Returned, list[int]], None],
        keep: Callable[[channel.Compiled, int], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.spec = spec
        self.backend_version = backend_version
        self.pid = 0
        self.phase = "fork"
        self.started_ns = clock.monotonic_ns()
        self.ready: asyncio.Future[channel.Ready] = loop.create_future()
        self.ended: asyncio.Future[Death] = loop.create_future()
        self.report: channel.Ready | None = None
        self.stopping = False
        self._clock = clock
        self._returned = returned
        self._keep = keep
        self._may_give = COMPILED_MAX
        self._failure: dict[str, Any] = {}
        self._measured: asyncio.Future[channel.Measured] | None = None
        self._hung_for_s: float | None = None
        self._oom_kills = deque([memory.oom_kills()], maxlen=OOM_SAMPLES)
        self._drained: asyncio.Future[int] | None = None
        self._host: Sharing | None = None
        self._restraint = channel.Restrain()
        self._given: Counter[int] = Counter()  # connections by uid, less those that came back
        ours, self._theirs = channel.pair()
        self._line = Line(ours, loop, self._receive)
        self._page_fd = page.create()
        self.status = page.words(self._page_fd)

    @property
    def backend(self) -> str:
        """See Forkable."""
        return self.spec.backend

    def descriptors(self) -> list[int]:
        """What the fork order carries: duplicates, for the template's line to close."""
        return [
            os.dup(self._theirs.fileno()),
            os.dup(self._page_fd),
            specs.pass_on(self.spec),
        ]

    def forked(self, pid: int, reaper: Reaper) -> None:
        """The template has made the process."""
        self.pid = pid
        self._part()
        reaper.watch(pid, self._end)

    def joined(self, pid: int, host: Sharing) -> None:
        """A host runs it in a thread, and tells when that has ended."""
        self.pid, self._host = pid, host
        self._part()

    def left(self, exit_code: int) -> None:
        """Its thread has ended."""
        self._end(exit_code << 8)

    def lost(self, status: int, failure: dict[str, Any], blame: str) -> None:
        """The process that it shared has ended.

        Args:
            status: as `os.waitpid` gives it.
            failure: what the host said of its end.
            blame: who was the end of it, and how; "": perhaps this one.
        """
        self._line.drain()
        self._failure = self._failure or failure
        if blame and not self._failure and not self.stopping:
            self._finish(Death(Cause.NEIGHBOUR, blame))
        else:
            self._end(status)

    def not_forked(self, reason: str) -> None:
        """There will be no process."""
        self._part()
        self._finish(Death(Cause.FAILED, reason))

    def _part(self) -> None:
        """The other end is the worker's alone now."""
        self._theirs.close()
        os.close(self._page_fd)

    @property
    def alive(self) -> bool:
        return not self.ended.done()

    @property
    def shares(self) -> bool:
        """Whether it has its process not for itself."""
        return self._host is not None

    @property
    def uses_device(self) -> bool:
        """Whether it is its turn on the device that it shares."""
        return bool(self.status[page.TURN])

    @property
    def hung(self) -> bool:
        """Whether it was killed because a run did not return."""
        return self._hung_for_s is not None

    def memory(self) -> memory.Memory:
        """What it takes; in a host, its part."""
        if self._host is not None:
            return self._host.memory_of(self)
        return memory.of(self.pid) if self.pid else memory.Memory(0, 0, 0)

    def stays_bytes(self) -> int:
        """Private memory of the process, when the process goes on without this worker."""
        return self._host.stays_bytes() if self._host is not None else 0

    @property
    def serving(self) -> bool:
        """Whether it takes requests: loaded, not told to stop, not found to be wrong."""
        return self.alive and self.report is not None and not self.stopping and not self._failure

    @property
    def reachable(self) -> bool:
        """Whether a connection that is handed over now is answered.

        A process that was killed closes its connections before we learn of its end (and its channel
        last of all); a client that lost one that way is back sooner, and must not lose another.
        """
        return self.serving and not _is_exiting(self.pid)

    @property
    def device(self) -> str:
        """Where its model really runs, as the backend said after the load; "": not known yet."""
        placement = self.report.placement if self.report else []
        return "+".join(sorted({str(place.get("device", "")) for place in placement}))

    def adopt(self, message: channel.Adopt, fds: list[int]) -> bool:
        """Hand a connection over; the descriptors are the line's to close. False: it is gone."""
        self._given[message.peer[1]] += 1
        return self._line.send(message, fds)

    def connections(self) -> int:
        """How many it has, as it says; not more than it may have."""
        said: int = self.status[page.CONNECTIONS]
        return min(said, self._given.total())

    def connections_of(self, uid: int) -> int:
        """The same of one user."""
        return min(page.connections_of(self.status, uid), self._given[uid])

    def tell(self, message: channel.Message, fds: list[int] | None = None) -> None:
        """Send a message; the descriptors are the line's to close."""
        self._line.send(message, fds)

    def restrain(self, order: channel.Restrain) -> None:
        """Have it hold back, if it was not told the same before."""
        if self.serving and order != self._restraint:
            self._restraint = order
            self._line.send(order)

    def promote(self) -> None:
        """From now on it answers requests that name no version, too."""
        self._line.send(channel.Promote())

    async def measure(self, runs: int, time_ms_max: float, patience_s: float) -> list[int]:
        """Have it run a recorded input; the time of each run in ns. Nobody is served meanwhile.

        The answer to an order that was given up is waited for first, and thrown away.

        Args:
            time_ms_max: after it no run is begun.
            patience_s: for an answer.

        Raises:
            UnansweredError: there was none in time.
            BackendError: the model failed, or the worker ended.
        """
        if self._measured is not None and not self._measured.done():
            await self._answer(self._measured, patience_s)
        self._measured = asyncio.get_running_loop().create_future()
        self._line.send(channel.Measure(runs, time_ms_max))
        answer = await self._answer(self._measured, patience_s)
        if answer.error:
            raise from_document(answer.error)
        return answer.times_ns

    async def _answer(
        self, measured: asyncio.Future[channel.Measured], patience_s: float
    ) -> channel.Measured:
        both: list[asyncio.Future[Any]] = [measured, self.ended]
        done, _ = await asyncio.wait(both, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise UnansweredError(f"did not answer within {patience_s:g} s while it was measured")
        if not measured.done():
            raise self._error(self.ended.result(), "being measured")
        return measured.result()

    async def drain(self, label: str = "") -> int:
        """Have it hand all its connections back; how many it had.

        From then on it answers only who names its version, or `label`.
        """
        self._drained = asyncio.get_running_loop().create_future()
        if not self._line.send(channel.Drain(label)):
            return 0
        both: list[asyncio.Future[Any]] = [self._drained, self.ended]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return self._drained.result() if self._drained.done() else 0

    async def stop(self, grace_s: float) -> Death:
        """Ask it to end, make it end after `grace_s`; with others in its process, it has longer."""
        self.stopping = True
        grace_s = max(grace_s, LEAVE_S_MAX) if self.shares else grace_s
        self._line.send(channel.Stop())
        done, _ = await asyncio.wait([self.ended], timeout=grace_s)
        if not done:
            self.kill()
        return await self.ended

    def kill(self, hung_for_s: float | None = None) -> None:
        """SIGKILL; `hung_for_s` is remembered as the reason.

        One that shares its process and does not hang is asked first, for LEAVE_S_MAX.
        """
        self._hung_for_s = hung_for_s
        if not self.alive:
            return
        if not self.pid:
            self.not_forked("given up before it was forked")
        elif self.shares and hung_for_s is None and not self.stopping:
            self.stopping = True
            self._line.send(channel.Stop())
            asyncio.get_running_loop().call_later(LEAVE_S_MAX, self.kill)
        else:
            os.kill(self.pid, signal.SIGKILL)

    def note_oom_kills(self, count: int) -> None:
        """The machine's count of now and then: a later kill is told from those long ago."""
        self._oom_kills.append(count)

    def running_s(self) -> float:
        """For how long its oldest run has been going on; 0.0: nothing runs."""
        began_ns = self.status[page.TURN] if self.shares else page.oldest_run_ns(self.status)
        return (self._clock.monotonic_ns() - began_ns) / 1e9 if began_ns else 0.0

    def _receive(self, message: channel.Message, fds: list[int]) -> None:
        if isinstance(message, channel.Returned):
            uid = message.peer[1]
            self._given[uid] = max(self._given[uid] - 1, 0)
            self._returned(message, fds)
            return
        if isinstance(message, channel.Compiled) and self._may_give and len(fds) == 1:
            self._may_give -= 1
            self._keep(message, fds[0])
            return
        sockets.close_fds(fds)
        if isinstance(message, channel.Phase):
            self.phase = message.name
        elif isinstance(message, channel.Ready):
            self.phase = "ready"
            self.report = message
            if not self.ready.done():
                self.ready.set_result(message)
        elif isinstance(message, channel.Failed):
            self.phase = f"{message.phase} failed"
            self._failure = message.error
        elif isinstance(message, channel.Measured):
            if self._measured is not None and not self._measured.done():
                self._measured.set_result(message)
        elif isinstance(message, channel.Drained) and self._drained and not self._drained.done():
            self._drained.set_result(message.connections)

    def _end(self, status: int) -> None:
        self._line.drain()
        kills = memory.oom_kills() - self._oom_kills[0]
        failure = str(self._failure.get("message", ""))
        self._finish(
            health.classify(
                status,
                stopping=self.stopping,
                hung_for_s=self._hung_for_s,
                oom_kills=kills,
                failure=failure,
                failure_code=str(self._failure.get("code", "")) if self.report else "",
            )
        )

    def _finish(self, death: Death) -> None:
        self._line.close()
        if not self.ready.done():
            self.ready.set_exception(self._error(death))
            self.ready.exception()  # seen: whoever waits gets it, nobody else is told
        if not self.ended.done():
            self.status = page.freeze(self.status)
            self.ended.set_result(death)

    def _error(self, death: Death, phase: str = "") -> EdgeError:
        where = f"{self.spec.model}@{self.spec.version} variant {self.spec.variant}"
        if self._failure:
            error = from_document(self._failure)
            error.where = f"{where}: {error.where}" if error.where else where
            return error
        return BackendError(
            f"the worker died during {phase or self.phase}: {death.detail}", where=where
        )


def _is_exiting(pid: int) -> bool:
    """Whether a child has begun to end (PF_EXITING of include/linux/sched.h, which the kernel sets
    before it closes files; 9th field of /proc/PID/stat). Once per connection, also when many are
    handed over: hence not Path.read_bytes (14 us against 8).
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.read(fd, 1024)  # a process's is some 300 bytes
        finally:
            os.close(fd)
        return bool(int(stat.rpartition(b")")[2].split()[6]) & PF_EXITING)
    except (OSError, ValueError, IndexError):
        return False  # not known: as if it were well
