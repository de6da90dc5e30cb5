"""The ring: what goes in comes out in order, and a full one refuses."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import EdgeError, MalformedError
from edge_runtime.serving import ring
from edge_runtime.serving.ring import Offer
from edge_runtime.wire import regions

SIZE = 4096


class Pair:
    """Both sides of a ring in this process."""

    def __init__(self, size: int = SIZE) -> None:
        fd = regions.create_region(size)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.memory = ring.open_ring(os.dup(fd), size)
        self.writer = ring.Writer(self.memory, self.bell)
        self.reader = ring.Reader(ring.open_ring(fd, size), self.bell)

    def take(self) -> tuple[int, list[bytes]]:
        record = self.reader.take()
        found = record.number, [bytes(one) for one in record.sections]
        self.reader.done()
        return found


@pytest.fixture
def pair():
    one = Pair()
    yield one
    os.close(one.bell)


def whole(data: bytes):
    """Sizes and parts of a record whose first section is `data`."""
    return (len(data), 0, 0, 0), (data,)


records = st.tuples(
    st.integers(0, (1 << 64) - 1),
    st.tuples(*[st.lists(st.binary(max_size=400), max_size=3)] * ring.SECTIONS),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, SIZE), max_size=30))
def test_without_room_an_offer_would_find_it_full(sizes):
    """And what is too large is never called "full"."""
    pair = Pair()
    try:
        for size in sizes:
            had_room = pair.writer.has_room(size)
            offer = pair.writer.offer(1, *whole(bytes(size)))
            assert had_room or offer is Offer.FULL
    finally:
        os.close(pair.bell)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(records, st.none()), max_size=60))
def test_it_is_a_bounded_queue(steps):
    """A record: offer it; None: take one."""
    pair = Pair()
    try:
        model = []
        for step in steps:
            if step is not None:
                sizes = [sum(map(len, section)) for section in step[1]]
                parts = [part for section in step[1] for part in section]
                offer = pair.writer.offer(step[0], sizes, parts)
                size = sum(sizes)
                assert (offer is Offer.TOO_LARGE) == (size + 32 > (SIZE - 64) // 2 // 32 * 32)
                if offer is Offer.TAKEN:
                    model.append((step[0], [b"".join(section) for section in step[1]]))
                elif offer is Offer.FULL:
                    assert model
            elif pair.reader.listen():
                assert pair.take() == model.pop(0)
            else:
                assert not model
        while pair.reader.listen():
            assert pair.take() == model.pop(0)
        assert not model
    finally:
        os.close(pair.bell)


def test_a_full_ring_takes_again_what_was_made_room_for(pair):
    taken = 0
    while pair.writer.offer(taken, *whole(b"x" * 100)) is Offer.TAKEN:
        taken += 1
    assert taken == 25  # of 160 bytes each
    assert pair.reader.listen() == taken
    assert pair.take()[0] == 0
    assert pair.writer.offer(taken, *whole(b"x" * 100)) is Offer.TAKEN
    assert pair.writer.offer(99, *whole(b"x" * 100)) is Offer.FULL


def test_whatever_a_reader_writes_the_writer_only_finds_it_full(pair):
    head = pair.memory[:8].cast("Q")
    for wrong in (1, 1 << 40, (1 << 64) - 1):
        head[0] = wrong
        assert pair.writer.offer(1, *whole(b"a")) is Offer.FULL
    head[0] = 0
    assert pair.writer.offer(1, *whole(b"a")) is Offer.TAKEN


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=64, max_size=64))
def test_a_record_that_makes_no_sense_is_malformed(junk):
    pair = Pair()
    try:
        pair.memory[64:128] = junk
        pair.reader.waiting = 1
        try:
            record = pair.reader.take()
        except MalformedError:
            return
        assert sum(len(one) for one in record.sections) <= SIZE
    finally:
        os.close(pair.bell)


def test_a_ring_that_could_shrink_is_refused():
    fd = os.memfd_create("x")
    os.ftruncate(fd, SIZE)
    with pytest.raises(EdgeError):
        ring.open_ring(fd, SIZE)


def test_two_threads_lose_and_tear_nothing():
    pair = Pair(1 << 16)
    count = 5_000
    found = []

    def read() -> None:
        while len(found) < count:
            if pair.reader.listen():
                number, (data, *_) = pair.take()
                assert data == number.to_bytes(8, "little") * (number % 50)
                found.append(number)

    reader = threading.Thread(target=read)
    reader.start()
    number = 0
    while number < count and reader.is_alive():
        data = number.to_bytes(8, "little") * (number % 50)
        if pair.writer.offer(number, *whole(data)) is Offer.TAKEN:
            number += 1
    reader.join(20)
    assert found == list(range(count))
    os.close(pair.bell)
