"""Streams of frames: however they are cut, and whoever reads a part, the answers are the same."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import BackendError
from edge_runtime.serving import channel, page
from edge_runtime.serving.connection import BUFFER_SIZE_MAX
from edge_runtime.wire import messages
from edge_runtime.wire.frames import Kind

from .rig import (
    NAME,
    WIDTH,
    Answer,
    Client,
    NumpyModel,
    Rig,
    adopt_of,
    close_all,
    double_plus_one,
    infer,
    memfd,
    open_descriptors,
    other,
    region_add,
    tensor,
)

LARGE_ROWS = 8_000  # 128 KB: larger than any buffer of a connection


class Stream(NamedTuple):
    """Bytes, and the descriptors that go with some of them: {offset: descriptor}."""

    data: bytes
    fds: dict[int, int]

    def send(self, client: Client, start: int, stop: int) -> None:
        """Send a part. A descriptor travels with a message of its own, as clients send it."""
        cuts = sorted({start, stop, *(at for at in self.fds if start < at < stop)})
        for begin, end in itertools.pairwise(cuts):
            client.send(self.data[begin:end], [self.fds[begin]] if begin in self.fds else [])


def region_infer(number: int, request_id: int) -> bytes:
    """`x` from the start of a region, `y` in the answer."""
    place = {"shared_memory_region": number, "shared_memory_byte_size": 4 * WIDTH}
    request = messages.InferRequest(NAME, (tensor("x", np.zeros((1, WIDTH), "f4"), **place),))
    return messages.encode_frame(Kind.INFER, messages.encode_header(request), request_id=request_id)


@contextlib.contextmanager
def mixed(large: bool = False) -> Iterator[Stream]:
    """Every kind of frame, right and wrong, and two regions."""
    data, fds = b"", {}
    first = memfd(fill=np.full(WIDTH, 10, np.float32))
    second = memfd(fill=np.full(WIDTH, 20, np.float32))
    parts: list[tuple[bytes, int | None]] = [
        (infer(1.0, 1), None),
        (region_add(0, 4096, 2), first),
        (region_add(1, 4096, 3), second),
        (region_infer(0, 4), None),
        (infer(np.zeros((1, WIDTH + 1), np.float32), 5), None),
        (other(Kind.MODEL_READY, {"model_name": NAME}, 6, b"12345"), None),
        (infer(np.zeros((0, WIDTH), np.float32), 7), None),
        (region_infer(1, 8), None),
        (other(Kind.REGION_DROP, {"model_name": NAME, "region": 0}, 9), None),
        (region_infer(0, 10), None),
        (infer(2.0, 11), None),
    ]
    if large:
        rows = np.arange(LARGE_ROWS * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
        parts.insert(4, (infer(rows, 20), None))
        parts.insert(7, (infer(np.zeros((LARGE_ROWS, WIDTH + 1), np.float32), 21), None))
    for part, fd in parts:
        if fd is not None:
            fds[len(data)] = fd
        data += part
    yield Stream(data, fds)
    close_all([first, second])


Seen = list[tuple[int, str, int, bytes, bytes]]


def seen(answers: list[Answer]) -> Seen:
    """What must not change: everything but order and times."""
    return sorted((a.request_id, a.code, a.kind, a.header, a.body) for a in answers)


def whole(stream: Stream) -> Seen:
    """The answers to the stream in one piece."""
    with contextlib.closing(Rig()) as rig:
        client = rig.client()
        stream.send(client, 0, len(stream.data))
        return seen(client.answers())


def split(stream: Stream, cuts: list[int], runners: int = 0) -> Seen:
    """The answers to the stream in pieces."""
    with contextlib.closing(Rig(runners=runners)) as rig:
        client = rig.client()
        for begin, end in _pieces(stream, cuts):
            stream.send(client, begin, end)
            rig.settle()
        return seen(client.answers())


def handed_over(stream: Stream, cuts: list[int], runners: int = 0) -> Seen:
    """The answers when the connection changes its worker at every cut."""
    rigs = [Rig(runners=runners)]
    client = rigs[0].client()
    try:
        for begin, end in _pieces(stream, cuts):
            stream.send(client, begin, end)
            rigs[-1].settle()
            if end == len(stream.data):
                break
            rigs.append(Rig(runners=runners))
            rigs[-1].take_over(rigs[-2], rigs[-2].drain())
            assert rigs[-2].worker._slots.used_bytes == 0
            assert rigs[-2].connections() == []
        answers = seen(client.answers())
        assert all(len(o.buffer) <= BUFFER_SIZE_MAX for o in rigs[-1].connections())
        return answers
    finally:
        for rig in rigs:
            rig.close()


def _pieces(stream: Stream, cuts: list[int]) -> list[tuple[int, int]]:
    inside = sorted({cut for cut in cuts if 0 < cut < len(stream.data)})
    return list(zip([0, *inside], [*inside, len(stream.data)], strict=True))


# --- splits ---------------------------------------------------------------------------------------


def test_the_mixed_stream_is_answered_as_it_deserves() -> None:
    with mixed(large=True) as stream:
        answers = {request_id: code for request_id, code, *_ in whole(stream)}
    wrong = dict.fromkeys((5, 10, 21), "invalid_request")
    assert answers == dict.fromkeys((1, 2, 3, 4, 6, 7, 8, 9, 11, 20), "") | wrong


def test_a_stream_cut_at_any_single_byte_gives_the_same_answers() -> None:
    with mixed() as stream:
        want = whole(stream)
        for cut in range(1, len(stream.data)):
            assert split(stream, [cut]) == want, cut


def test_a_stream_sent_byte_by_byte_gives_the_same_answers() -> None:
    with mixed() as stream:
        assert split(stream, list(range(len(stream.data)))) == whole(stream)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 300_000), max_size=12), runners=st.sampled_from([0, 2]))
def test_a_stream_with_large_bodies_cut_anywhere_gives_the_same_answers(
    cuts: list[int], runners: int
) -> None:
    with mixed(large=True) as stream:
        assert split(stream, cuts, runners) == whole(stream)


# --- hand-over ------------------------------------------------------------------------------------


def test_a_connection_changes_its_worker_at_any_byte_and_nothing_is_lost_or_doubled() -> None:
    before = len(open_descriptors())
    with mixed() as stream:
        want = whole(stream)
        for cut in range(1, len(stream.data)):
            assert handed_over(stream, [cut]) == want, cut
    assert len(open_descriptors()) == before


def test_a_connection_changes_its_worker_inside_large_bodies() -> None:
    rng = random.Random(5)
    with mixed(large=True) as stream:
        want = whole(stream)
        starts = [at for at in range(len(stream.data)) if stream.data.startswith(b"EDGE", at)]
        cuts = [at + off for at in starts for off in (1, 31, 33, 300, 40_000, 70_000, 127_999)]
        cuts += [rng.randrange(len(stream.data)) for _ in range(40)]
        for cut in cuts:
            assert handed_over(stream, [cut]) == want, cut


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 300_000), max_size=6), runners=st.sampled_from([0, 1]))
def test_a_connection_changes_its_worker_many_times(cuts: list[int], runners: int) -> None:
    with mixed(large=True) as stream:
        assert handed_over(stream, cuts, runners) == whole(stream)


def test_a_drain_waits_for_what_runs_and_keeps_what_came_after_it() -> None:
    rig, successor = Rig(), Rig()
    client = rig.client()
    client.send(infer(1.0, 1) + infer(2.0, 2))
    channel.send(rig.control, channel.Drain())  # both are ready in the same turn
    rig.settle()
    told = rig.told()
    assert isinstance(told[-1][0], channel.Drained) and told[-1][0].connections == 1
    successor.take_over(rig, [(m, f) for m, f in told if isinstance(m, channel.Returned)])
    client.send(infer(3.0, 3))
    assert sorted(a.request_id for a in client.answers()) == [1, 2, 3]
    assert successor.status[page.CONNECTIONS] == 1 and rig.status[page.CONNECTIONS] == 0
    rig.close()
    successor.close()


def test_a_slow_reader_changes_its_worker_after_its_last_answer() -> None:
    rig, successor = Rig(), Rig()
    client = rig.client(buffer_bytes=4096)
    rows = np.ones((20_000, WIDTH), np.float32)
    client.send(infer(rows, 1))
    assert rig.drain() == [], "its answer is still going out"
    client.sock.send(infer(2.0, 2))
    first = client.answers()
    successor.take_over(rig, rig.returned())
    second = client.answers()
    assert [a.request_id for a in first + second] == [1, 2]
    assert not any(a.code for a in first + second)
    rig.close()
    successor.close()


def test_a_message_of_a_returned_connection_says_what_an_adoption_needs() -> None:
    assert channel.Returned.__struct_fields__ == channel.Adopt.__struct_fields__
    message = channel.Returned(own=True, residual=b"abc", regions=((1, 2),), skip=3, stray=4)
    assert adopt_of(message).regions == ((1, 2),) and adopt_of(message).own


# --- accounting -----------------------------------------------------------------------------------


def _flaky(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if inputs["x"].size and inputs["x"].reshape(-1)[0] == 13:
        raise BackendError("13")
    return double_plus_one(inputs)


FRAMES = {
    "good": infer(1.0),
    "batch": infer(np.ones((9, WIDTH), np.float32)),
    "large": infer(np.ones((5_000, WIDTH), np.float32)),
    "failing": infer(13.0),
    "expired": infer(1.0, deadline_ns=1),
    "urgent": infer(1.0, priority=9),
    "wrong shape": infer(np.ones((1, WIDTH + 2), np.float32)),
    "wrong size": messages.encode_frame(Kind.INFER, infer(1.0)[32:-16], bytes(9)),
    "too large": infer(np.ones((9_000, WIDTH), np.float32)),
    "malformed": b"EDGE\xff" + bytes(40),
    "elsewhere": infer(1.0, model="elsewhere"),
    "ready": other(Kind.MODEL_READY, {"model_name": NAME}),
    "region request": region_infer(0, 1),
    "drop": other(Kind.REGION_DROP, {"model_name": NAME, "region": 0}),
}
ACTS = [
    *FRAMES,
    "half",
    "add",
    "add short",
    "stray",
    "close",
    "read",
    "settle",
    "drain",
    "reconnect",
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    acts=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ACTS)), max_size=40),
    runners=st.sampled_from([0, 0, 1, 2]),
)
def test_whatever_clients_do_every_slot_and_descriptor_comes_back(
    acts: list[tuple[int, str]], runners: int
) -> None:
    before = len(open_descriptors())
    limits = {"queue_requests_max": 6, "queue_bytes_max": 400_000, "frame_body_bytes_max": 100_000}
    rig = Rig(NumpyModel(_flaky), runners=runners, **limits)
    clients = [rig.client(buffer_bytes=4096), rig.client(), rig.client()]
    for index, act in acts:
        _act(rig, clients, index, act)
    rig.settle()
    held = [owner for owner in rig.connections() if owner.receiving or owner.outbox]
    if not held:
        assert rig.worker._slots.used_bytes == 0
    rig.close()  # says that no slot is left in use
    assert rig.status[page.CONNECTIONS] == rig.status[page.WAITING] == 0
    assert all(not owner.in_flight for owner in rig.connections())
    for client in clients:
        client.sock.close()
    assert len(open_descriptors()) == before


def _act(rig: Rig, clients: list[Client], index: int, act: str) -> None:
    client = clients[index]
    if act == "settle":
        rig.settle()
    elif act == "drain":
        for message, fds in rig.drain():
            rig.adopt(adopt_of(message), fds)
            close_all(fds)
        rig.tell(channel.Promote())
        _drop_returned(rig)
    elif act == "reconnect":
        client.sock.close()
        rig.clients.remove(client)
        clients[index] = rig.client()
    elif client.closed:
        return
    elif act == "close":
        client.close()
    elif act == "read":
        client.answers()
        _drop_returned(rig)
    else:
        _send_quickly(client, act)


def _send_quickly(client: Client, act: str) -> None:
    """One message, cut where the socket is full: a client that does not care."""
    fd = memfd(100 if act == "add short" else 4096) if act in ("add", "add short", "stray") else -1
    frame = region_add(0, 4096) if act.startswith("add") else FRAMES.get(act, FRAMES["good"])
    if act == "half":
        frame = FRAMES["large"][:50_000]
    try:
        if fd >= 0:
            socket.send_fds(client.sock, [frame], [fd])
        else:
            client.sock.send(frame)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass  # full, or closed by the worker: both are fine here
    if fd >= 0:
        os.close(fd)


def _drop_returned(rig: Rig) -> None:
    """A supervisor that has no other worker: connections for elsewhere end."""
    for _, fds in rig.told():
        close_all(fds)


@pytest.mark.parametrize("runners", [0, 2])
def test_three_hundred_connections_come_and_go_and_leave_nothing(runners: int) -> None:
    rig = Rig(runners=runners)
    before = len(open_descriptors())
    for number in range(300):
        client = rig.client()
        client.send(infer(float(number)))
        if number % 3:
            client.answers()
        client.close()
        rig.settle()
        rig.clients.clear()
    assert len(open_descriptors()) == before and rig.connections() == []
    rig.close()
