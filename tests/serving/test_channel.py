"""The channel between supervisor and workers, and the status page."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import UnavailableError
from edge_runtime.serving import channel, page

from .rig import close_all, open_descriptors

EVERY = [
    channel.Fork(1),
    channel.Fork(2, host=True),
    channel.Join(3),
    channel.Left(3, 70),
    channel.Forked(1, 2, "why not"),
    channel.TemplateReady("1.0", 3.5, False),
    channel.Phase("load"),
    channel.Compiled("abc", 7),
    channel.Ready(1, 2, 3, 4, 5, [{"device": "CPU"}], golden_deviation=0.5, sandbox=["seccomp"]),
    channel.Failed("load", {"code": "internal"}),
    channel.Adopt(True, b"abc", 0, ((1, 2),), 3, 4, (5, 6, 7)),
    channel.Returned(False, b"", 9, (), 0, 1, (0, 0, 0)),
    channel.Drain(),
    channel.Promote(),
    channel.Restrain(0.5, 3, "it is hot"),
    channel.Accompany(8, 1 << 63, 1 << 20, 0.1, 0.25),
    channel.Shares(1.0, 0.0),
    channel.Alone(),
    channel.Measure(100, 20.0),
    channel.Measured([1, 2], {"code": "internal"}),
    channel.Shadow(1 << 20),
    channel.Unshadow(),
    channel.Drained(3),
    channel.Stop(),
]


def test_every_message_arrives_as_it_was_sent() -> None:
    ours, theirs = channel.pair()
    for message in EVERY:
        channel.send(ours, message)
        assert channel.receive(theirs) == (message, [])
    assert {type(message) for message in EVERY} == set(channel.Message.__args__)
    ours.close()
    theirs.close()


def test_descriptors_arrive_with_their_message_and_are_not_inherited() -> None:
    ours, theirs = channel.pair()
    read_fd, write_fd = os.pipe()
    channel.send(ours, channel.Drain())
    channel.send(ours, channel.Fork(1), [read_fd] * channel.DESCRIPTORS_MAX)
    assert channel.receive(theirs) == (channel.Drain(), [])
    message, fds = channel.receive(theirs)
    assert message == channel.Fork(1) and len(fds) == channel.DESCRIPTORS_MAX
    assert not any(os.get_inheritable(fd) for fd in fds)
    os.write(write_fd, b"x")
    assert os.read(fds[-1], 1) == b"x"
    close_all([*fds, read_fd, write_fd])
    ours.close()
    theirs.close()


@pytest.mark.parametrize("unread", [False, True])
def test_the_end_of_the_peer_is_the_end(unread: bool) -> None:
    ours, theirs = channel.pair()
    if unread:
        channel.send(theirs, channel.Drain())  # makes the end a reset
    ours.close()
    assert channel.receive(theirs) == (None, [])
    with pytest.raises(BrokenPipeError):
        channel.send(theirs, channel.Stop())
    theirs.close()


def test_an_empty_channel_that_does_not_block_says_so() -> None:
    ours, theirs = channel.pair()
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.receive(theirs)
    ours.close()
    theirs.close()


def test_a_message_over_its_limit_is_our_own_mistake() -> None:
    ours, theirs = channel.pair()
    with pytest.raises(AssertionError):
        channel.send(ours, channel.Phase("x" * channel.PACKET_SIZE_MAX))
    with pytest.raises(AssertionError):
        channel.send(ours, channel.Stop(), [0] * (channel.DESCRIPTORS_MAX + 1))
    ours.close()
    theirs.close()


def test_the_largest_hand_over_fits_a_packet() -> None:
    message = channel.Returned(
        own=True,
        residual=bytes(channel.RESIDUAL_INLINE_MAX),
        regions=tuple((n, 1 << 40) for n in range(16)),
        stray=8,
        skip=1 << 62,
        peer=(1 << 31, 1 << 31, 1 << 31),
    )
    assert len(msgspec.msgpack.encode(message)) <= channel.PACKET_SIZE_MAX
    assert channel.DESCRIPTORS_MAX >= 1 + 16 + 8 + 1


def test_an_unknown_message_is_refused() -> None:
    ours, theirs = channel.pair()
    ours.send(msgspec.msgpack.encode({"type": "nonsense"}))
    with pytest.raises(msgspec.DecodeError):
        channel.receive(theirs)
    ours.close()
    theirs.close()


@settings(deadline=None, max_examples=30)
@given(
    size=st.one_of(
        st.integers(0, 200),
        st.integers(channel.RESIDUAL_INLINE_MAX - 2, channel.RESIDUAL_INLINE_MAX + 2),
        st.integers(0, 3_000_000),
    )
)
def test_a_residual_of_any_size_survives_inline_or_as_a_memfd(size: int) -> None:
    before = len(open_descriptors())
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    inline, memfd_size, memfd = channel.pack_residual(memoryview(data))
    assert (memfd is not None) == (size > channel.RESIDUAL_INLINE_MAX)
    fds = [0] if memfd is None else [0, memfd]
    assert channel.unpack_residual(inline, memfd_size, fds) == data
    assert fds == [0], "the memfd is taken and closed"
    assert len(open_descriptors()) == before


def test_missing_descriptors_of_a_connection_are_noticed() -> None:
    message = channel.Adopt(own=False, residual_size=10, regions=((1, 2),), stray=2)
    channel.check_complete(message, [3, 4, 5, 6, 7])
    for count in (0, 1, 4, 6):
        with pytest.raises(UnavailableError, match=f"{count} of 5"):
            channel.check_complete(message, list(range(count)))


def test_half_an_ancillary_number_is_not_a_descriptor() -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\x05\x00\x00\x00\x06\x00")
    other = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(12))
    assert channel.descriptors([other, rights]) == [5]


# --- the status page ------------------------------------------------------------------------------


def test_a_page_is_shared_starts_at_zero_and_cannot_change_its_size() -> None:
    fd = page.create()
    ours, theirs = page.words(fd), page.words(fd)
    assert len(ours) == page.PAGE_SIZE // 8 and not any(ours)
    ours[page.REQUESTS] = (1 << 64) - 1
    assert theirs[page.REQUESTS] == (1 << 64) - 1
    for size in (0, page.PAGE_SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_the_words_do_not_overlap() -> None:
    named = [page.REQUESTS, page.ERRORS, page.REFUSED, page.EXPIRED, page.CONNECTIONS]
    named += [page.WAITING, page.LOOP_NS, page.INVALID, page.FAILED, page.CANCELLED]
    assert len(set(named)) == len(named) and max(named) < page.RUN_BEGAN
    assert page.RUN_BEGAN + page.RUNNERS_MAX <= page.PAGE_SIZE // 8


def test_the_oldest_run_is_the_earliest_that_still_goes_on() -> None:
    words = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
    assert page.oldest_run_ns(words) == 0
    words[page.RUN_BEGAN + page.RUNNERS_MAX] = 1  # not a runner's
    words[page.RUN_BEGAN] = 50
    words[page.RUN_BEGAN + page.RUNNERS_MAX - 1] = 20
    assert page.oldest_run_ns(words) == 20
    words[page.RUN_BEGAN + page.RUNNERS_MAX - 1] = 0
    assert page.oldest_run_ns(words) == 50


def test_a_frozen_page_keeps_its_words_and_gives_the_mapping_back() -> None:
    fd = page.create()
    live = page.words(fd)
    live[page.ERRORS] = 7
    mapping = live.obj
    frozen = page.freeze(live)
    assert frozen[page.ERRORS] == 7 and isinstance(mapping, mmap.mmap) and mapping.closed
    os.close(fd)
