"""Hostile bytes against the loop: it never raises, never hangs, never grows."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.serving import connection, intake, page
from edge_runtime.wire import frames
from edge_runtime.wire.frames import PREFIX, Kind

from .rig import NAME, WIDTH, Rig, close_all, infer, memfd, open_descriptors, other, region_add
from .test_streams import region_infer

STREAMS = 8_000  # some two seconds
GROWTH_BYTES_MAX = 8 * 1024 * 1024

SEEDS = [
    infer(1.0, 1),
    infer(np.ones((300, WIDTH), np.float32), 2),
    infer(np.ones((2_000, WIDTH), np.float32), 3, deadline_ns=1 << 62, priority=9),
    other(Kind.MODEL_READY, {"model_name": NAME}),
    other(Kind.MODEL_METADATA, {"model_name": NAME, "model_version": "1"}),
    region_add(0, 4096),
    region_infer(0, 4),
    other(Kind.REGION_DROP, {"model_name": NAME, "region": 0}),
    frames.encode_prefix(Kind.SERVER_LIVE, 0, 0),
]
WORDS = [b"null", b"-1", b"1e99", b"[]", b"{}", b'"\\ud800"', b"9" * 30, b"[" * 200, b'"FP32"']
SIZES = [0, 1, 15, 31, 64 * 1024, 64 * 1024 + 1, 1 << 20, (1 << 32) - 1, 1 << 40, (1 << 64) - 1]


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 50)]


def _double(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randrange(1, 400)]


def _word(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    word = rng.choice(WORDS)
    data[start : start + len(word)] = word


def _prefix(rng: random.Random, data: bytearray) -> None:
    """A prefix that is nearly right."""
    fields = list(PREFIX.unpack(SEEDS[0][: PREFIX.size]))
    for index in rng.sample(range(1, len(fields)), 2):
        width = (4, 1, 1, 1, 1, 4, 4, 8, 8)[index]
        fields[index] = rng.choice(SIZES) % (1 << (8 * width))
    at = data.find(b"EDGE", rng.randrange(len(data)))
    data[max(at, 0) : max(at, 0) + PREFIX.size] = PREFIX.pack(*fields)


def _noise(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.randrange(1, 300))


MUTATIONS = [_flip, _flip, _cut, _double, _word, _prefix, _noise]


def _stream(rng: random.Random) -> bytes:
    data = bytearray(b"".join(rng.choices(SEEDS, k=rng.randrange(1, 6))))
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        if data:
            rng.choice(MUTATIONS)(rng, data)
    return bytes(data)


def _attack(rig: Rig, rng: random.Random) -> None:
    client = rig.client(buffer_bytes=rng.choice([0, 4096]))
    data = _stream(rng)
    while data and not client.closed:
        size = rng.choice([1, 33, 500, len(data)])
        fds = [memfd()] if rng.random() < 0.1 else []
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            sent = socket.send_fds(client.sock, [data[:size]], fds)
            data = data[sent:]
        close_all(fds)
        if rng.random() < 0.7:
            client.answers()  # what comes back are whole frames, or the reader raises
            for _, returned in rig.told():
                close_all(returned)
        if rng.random() < 0.05:
            break
    if rng.random() < 0.5:
        rig.settle()
    client.close()
    rig.settle()
    rig.clients.clear()
    for _, returned in rig.told():
        close_all(returned)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("runners", [0, 1])
def test_hostile_streams_never_end_or_fatten_a_worker(runners: int) -> None:
    rng = random.Random(20_261_123 + runners)
    rig = Rig(runners=runners, queue_requests_max=8, queue_bytes_max=1 << 20)
    bystander = rig.client()
    rig.clients.clear()
    before, resident = len(open_descriptors()), 0
    for number in range(STREAMS):
        _attack(rig, rng)
        assert len(rig.connections()) == 1, "only the bystander is left"
        assert rig.worker._slots.used_bytes == 0, number
        if number % 100 == 0:
            answer = bystander.ask(infer(float(number)))
            assert answer.array()[0, 0] == 2 * number + 1
        if number == STREAMS // 3:
            resident = _resident_bytes()
    assert len(open_descriptors()) == before
    assert len(rig.worker._intake.plans) <= intake.PLANS_MAX
    assert _resident_bytes() - resident < GROWTH_BYTES_MAX
    assert rig.status[page.REQUESTS] > 100 and rig.status[page.ERRORS] > 100, "both were reached"
    rig.close()
    bystander.close()


def test_pure_noise_ends_the_connection_and_nothing_else() -> None:
    rng = random.Random(7)
    rig = Rig()
    for size in (1, 31, 32, 33, 1_000, 50_000):
        client = rig.client().send(rng.randbytes(size))
        answers = client.answers()
        assert client.closed == (size >= frames.PREFIX_SIZE)
        assert [a.code for a in answers] == ["malformed"] * client.closed
    rig.close()


def test_the_buffer_of_a_connection_stays_within_its_bound() -> None:
    rig = Rig(queue_requests_max=4)
    client = rig.client()
    rng = random.Random(3)
    padded = bytearray(infer(1.0))
    for _ in range(200):
        header_size = rng.choice([60_000, 65_536, 200])
        header = bytes(padded[32:-16]).ljust(header_size)
        frame = frames.encode_prefix(Kind.INFER, len(header), 16) + header + bytes(16)
        client.send(frame[: rng.randrange(1, len(frame))])
        rig.settle()
        (owner,) = rig.connections()
        assert len(owner.buffer) <= connection.BUFFER_SIZE_MAX
        client.close()
        rig.settle()
        client = rig.client()
    rig.close()
