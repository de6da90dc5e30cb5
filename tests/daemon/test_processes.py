"""The supervisor's end of a channel, where a whole daemon would need luck to show it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import SystemClock
from edge_runtime.daemon.line import Line
from edge_runtime.daemon.processes import UnansweredError, WorkerProcess
from edge_runtime.daemon.reaper import Reaper
from edge_runtime.serving import channel, page
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import sockets


def descriptors() -> set[str]:
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


def filled_line(loop: asyncio.AbstractEventLoop) -> tuple[Line, object, int]:
    """A line whose peer reads nothing, and whose queue holds messages with a descriptor each."""
    ours, theirs = channel.pair()
    line = Line(ours, loop, lambda _message, _fds: None)
    message = channel.Adopt(own=False, residual=bytes(channel.RESIDUAL_INLINE_MAX))
    count = 0
    while len(line._queue) < 3:
        assert line.send(message, [os.open("/dev/null", os.O_RDONLY)])
        count += 1
    return line, theirs, count


def test_messages_that_wait_are_sent_in_order_when_the_peer_reads():
    async def main() -> None:
        before = descriptors()
        line, theirs, count = filled_line(asyncio.get_running_loop())
        theirs.setblocking(False)
        for _ in range(count):
            while True:
                try:
                    message, fds = channel.receive(theirs)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0)
            assert isinstance(message, channel.Adopt) and len(fds) == 1
            os.close(fds[0])
        line.close()
        theirs.close()
        assert descriptors() == before

    asyncio.run(main())


class Crowded(socket.socket):
    """A socket of a user of whom the kernel lets no more descriptors travel, for a few sends.

    The kernel says so to users without privileges only, and tests may run as root.
    """

    refusals = 5

    def sendmsg(self, *arguments: Any) -> int:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return super().sendmsg(*arguments)


def crowded_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = channel.pair()
    return Crowded(fileno=ours.detach()), theirs


def test_too_many_descriptors_on_their_way_is_waited_for_and_nothing_is_lost_or_reordered():
    async def main() -> None:
        before = descriptors()
        ours, theirs = crowded_pair()
        line = Line(ours, asyncio.get_running_loop(), lambda _message, _fds: None)
        for number in range(3):
            fd = os.open("/dev/null", os.O_RDONLY)
            assert line.send(channel.Adopt(own=False, skip=number), [fd])
        for number in range(3):
            message, fds = await asyncio.to_thread(channel.receive, theirs)
            assert isinstance(message, channel.Adopt) and message.skip == number
            assert len(fds) == 1
            os.close(fds[0])
        line.close()
        theirs.close()
        assert descriptors() == before

    asyncio.run(main())


def test_a_blocking_channel_waits_too_but_not_for_ever(monkeypatch):
    ours, theirs = crowded_pair()
    channel.send(ours, channel.Stop())
    assert channel.receive(theirs) == (channel.Stop(), [])
    ours.refusals = 1_000_000
    monkeypatch.setattr(channel, "CROWDED_S_MAX", 0.02)
    with pytest.raises(OSError, match="Too many references"):
        channel.send(ours, channel.Stop())
    ours.close()
    theirs.close()


def test_a_peer_that_dies_with_messages_waiting_costs_each_descriptor_one_close():
    async def main() -> None:
        before = descriptors()
        line, theirs, _ = filled_line(asyncio.get_running_loop())
        theirs.close()
        line._writable()  # as the loop would: the first message that waits finds the peer gone
        assert not line.send(channel.Stop(), [os.open("/dev/null", os.O_RDONLY)])
        assert descriptors() == before

    asyncio.run(main())


def test_a_worker_cannot_claim_more_connections_than_it_was_given():
    async def main() -> None:
        back: list[channel.Returned] = []

        def returned(message: channel.Returned, fds: list[int]) -> None:
            sockets.close_fds(fds)
            back.append(message)

        spec = WorkerSpec("m", 1, 1, "fp32", "reference", "/nowhere", "", (), ())
        worker = WorkerProcess(spec, "", SystemClock(), returned, lambda *_: None)
        theirs = socket.socket(fileno=worker.descriptors()[0])
        worker.status[page.CONNECTIONS] = (1 << 64) - 1
        for uid in (1000, 1001):
            worker.status[page.USERS + 2 * (uid - 1000)] = uid + 1
            worker.status[page.USERS + 2 * (uid - 1000) + 1] = (1 << 64) - 1
        assert (worker.connections(), worker.connections_of(1000)) == (0, 0)
        for uid in (1000, 1000, 1001):
            fd = os.open("/dev/null", os.O_RDONLY)
            worker.adopt(channel.Adopt(own=False, peer=(1, uid, uid)), [fd])
        assert (worker.connections(), worker.connections_of(1000)) == (3, 2)
        for uid in (1000, 1002):  # one is given back, and one that it never had
            with Path(os.devnull).open("rb") as file:
                channel.send(
                    theirs, channel.Returned(own=False, peer=(1, uid, uid)), [file.fileno()]
                )
        while len(back) < 2:
            await asyncio.sleep(0)
        assert (worker.connections(), worker.connections_of(1000)) == (2, 1)
        assert worker.connections_of(1002) == 0
        worker.not_forked("it was only a test")
        theirs.close()

    asyncio.run(main())


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one():
    async def main() -> None:
        spec = WorkerSpec("m", 1, 1, "fp32", "reference", "/nowhere", "", (), ())
        worker = WorkerProcess(spec, "", SystemClock(), lambda *_: None, lambda *_: None)
        theirs = socket.socket(fileno=worker.descriptors()[0])
        with pytest.raises(UnansweredError, match="did not answer"):
            await worker.measure(3, 1.0, patience_s=0.01)
        again = asyncio.ensure_future(worker.measure(4, 1.0, patience_s=10.0))
        for runs in (3, 4):
            order, _ = await asyncio.to_thread(channel.receive, theirs)
            assert isinstance(order, channel.Measure) and order.runs == runs
            channel.send(theirs, channel.Measured([runs] * runs))
        assert await again == [4, 4, 4, 4]
        worker.not_forked("it was only a test")
        theirs.close()

    asyncio.run(main())


def test_a_child_that_nobody_watches_is_ended_even_if_it_has_ended_already(monkeypatch):
    killed: list[int] = []
    real_kill = os.kill
    monkeypatch.setattr(
        os, "kill", lambda pid, number: (killed.append(pid), real_kill(pid, number))
    )
    reaper = Reaper()
    ended = os.posix_spawn("/bin/true", ["true"], {})
    lives = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)  # it has ended and is not collected
    reaper.collect()
    reaper.end(ended)  # its number may belong to another process by now
    assert killed == []
    reaper.end(lives)
    assert killed == [lives]
    os.waitid(os.P_PID, lives, os.WEXITED | os.WNOWAIT)
    reaper.collect()
    assert not Path(f"/proc/{lives}").exists()
