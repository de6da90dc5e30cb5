"""The incremental reader: any split of any frames gives the same frames; garbage stays bounded."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import MalformedError
from edge_runtime.wire.frames import HEADER_SIZE_MAX, PREFIX, PREFIX_SIZE, Kind, encode_prefix
from edge_runtime.wire.messages import encode_frame
from edge_runtime.wire.reader import CHUNK_SIZE, Frame, FrameReader, TooLarge

CAP = 5000


def drain(reader: FrameReader) -> list[Frame | TooLarge]:
    found = []
    while (frame := reader.next_frame()) is not None:
        found.append(frame)
    return found


def plain(frame: Frame | TooLarge) -> tuple[object, ...]:
    if isinstance(frame, TooLarge):
        return ("too large", frame.prefix.request_id)
    return (tuple(frame.prefix), frame.header, bytes(frame.body))


FRAMES = st.builds(
    lambda kind, header, size, seed, request_id, time_ns, priority: encode_frame(
        kind,
        header,
        random.Random(seed).randbytes(size),
        request_id=request_id,
        time_ns=time_ns,
        priority=priority,
    ),
    st.sampled_from([int(kind) for kind in Kind] + [0x81, 0x90]),
    st.binary(max_size=200),
    st.integers(0, CAP + 1000) | st.sampled_from([0, 1, CAP, CAP + 1, 3 * CHUNK_SIZE]),
    st.integers(0, 2**32),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
)


def whole(frames: list[bytes]) -> list[tuple[object, ...]]:
    """What must come out, by slicing and not by the reader."""
    out: list[tuple[object, ...]] = []
    for data in frames:
        _, _, kind, priority, _, header_size, body_size, request_id, time_ns = PREFIX.unpack_from(
            data
        )
        if body_size > CAP:
            out.append(("too large", request_id))
            continue
        header = data[PREFIX_SIZE : PREFIX_SIZE + header_size]
        prefix = (kind, priority, header_size, body_size, request_id, time_ns)
        out.append((prefix, header, data[PREFIX_SIZE + header_size :]))
    return out


@settings(max_examples=150, deadline=None)
@given(frames=st.lists(FRAMES, max_size=6), data=st.data())
def test_any_split_of_any_frames_gives_the_same_frames(frames, data):
    stream = b"".join(frames)
    reader = FrameReader(body_size_max=CAP)
    got = []
    at = 0
    while at < len(stream):
        size = data.draw(st.integers(1, 40) | st.integers(1, len(stream)))
        piece = stream[at : at + size]
        at += len(piece)
        if data.draw(st.booleans()):
            reader.feed(piece)
        else:
            rest = memoryview(piece)
            while rest:
                buffer = reader.get_buffer()
                n = min(len(buffer), len(rest))
                buffer[:n] = rest[:n]
                reader.advance(n)
                rest = rest[n:]
                got += drain(reader)
        got += drain(reader)
        if data.draw(st.integers(0, 9)) == 0:  # the connection moves to another process
            reader = FrameReader(
                body_size_max=CAP, data=reader.pending(), skip_size=reader.skip_size
            )
    # Compared at the end: bodies handed out early must not have been overwritten since.
    assert [plain(frame) for frame in got] == whole(frames)
    assert reader.eof()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_garbage_is_malformed_or_incomplete_and_never_anything_else(pieces):
    reader = FrameReader(body_size_max=CAP)
    failed = False
    for piece in pieces:
        reader.feed(piece)
        try:
            drain(reader)
            assert not failed, "a failed reader must stay failed"
        except MalformedError:
            failed = True
        assert len(reader.get_buffer()) <= CAP + HEADER_SIZE_MAX + PREFIX_SIZE + CHUNK_SIZE
    assert not (failed and reader.eof())


def test_one_byte_at_a_time_is_linear():
    stream = encode_frame(Kind.INFER, b"{}" + b" " * 30, bytes(200_000), request_id=7)

    def feed(data: bytes) -> float:
        reader = FrameReader()
        start = time.perf_counter()
        for index in range(len(data)):
            reader.feed(data[index : index + 1])
            if reader.next_frame():
                break
        return time.perf_counter() - start

    quarter = min(feed(stream[:50_000]) for _ in range(3))
    assert min(feed(stream) for _ in range(2)) < 12 * quarter  # linear: 4; quadratic: 16


def test_small_reads_that_nobody_takes_frames_from_are_linear_too():
    frame = encode_frame(Kind.SERVER_LIVE, b"", b"x" * 100)

    def fill(count: int) -> float:
        reader = FrameReader()
        start = time.perf_counter()
        for _ in range(count * len(frame) // 50):
            buffer = reader.get_buffer()
            reader.advance(min(50, len(buffer)))
        return time.perf_counter() - start

    quarter = min(fill(3_000) for _ in range(3))
    assert min(fill(12_000) for _ in range(2)) < 12 * quarter


def test_a_promised_body_costs_no_memory_before_it_arrives():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    readers = []
    for _ in range(20):
        reader = FrameReader()
        reader.feed(encode_prefix(Kind.INFER, 0, 64 * 1024 * 1024))
        assert reader.next_frame() is None
        assert len(reader.get_buffer()) == 64 * 1024 * 1024
        readers.append(reader)
    assert resident_bytes() - before < 20 * 1024 * 1024


def test_a_too_large_body_is_reported_once_and_the_next_frame_follows():
    reader = FrameReader(body_size_max=10)
    reader.feed(encode_prefix(Kind.INFER, 4, 100_000, request_id=9))
    report = reader.next_frame()
    assert isinstance(report, TooLarge) and report.prefix.request_id == 9
    assert report.error.code == "too_large" and "10 bytes" in report.error.expected
    for _ in range(100):
        reader.feed(bytes(1000))
        assert reader.next_frame() is None
        assert not reader.eof()
    reader.feed(b"tail" + encode_frame(Kind.SERVER_LIVE, b"", request_id=10))
    frame = reader.next_frame()
    assert isinstance(frame, Frame) and frame.prefix.request_id == 10
    assert reader.eof()


def test_skipping_keeps_nothing():
    reader = FrameReader(body_size_max=10)
    reader.feed(encode_prefix(Kind.INFER, 0, 1 << 31))
    reader.next_frame()
    for _ in range(1000):
        buffer = reader.get_buffer()
        assert len(buffer) <= CHUNK_SIZE
        reader.advance(len(buffer))
    assert reader.pending() == b""


@pytest.mark.parametrize(
    "prefix",
    [
        b"EDGX" + encode_prefix(Kind.INFER, 0, 0)[4:],
        b"EDGE\x02" + encode_prefix(Kind.INFER, 0, 0)[5:],
        encode_prefix(0x7D, 0, 0),
        encode_prefix(0x00, 0, 0),
        encode_prefix(Kind.INFER, 0, 0)[:7] + b"\x01" + encode_prefix(Kind.INFER, 0, 0)[8:],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    ],
)
def test_what_is_not_our_frame_is_malformed_and_stays_so(prefix):
    reader = FrameReader()
    reader.feed(prefix)
    for _ in range(2):
        with pytest.raises(MalformedError):
            reader.next_frame()
    reader.feed(encode_frame(Kind.SERVER_LIVE, b""))
    with pytest.raises(MalformedError):
        reader.next_frame()


def test_a_header_over_its_limit_is_malformed_and_names_its_request():
    reader = FrameReader()
    reader.feed(encode_prefix(Kind.INFER, HEADER_SIZE_MAX + 1, 0, request_id=77))
    with pytest.raises(MalformedError, match="65537"):
        reader.next_frame()
    assert reader.failed_request_id == 77


def test_the_end_inside_a_frame_is_told_from_the_end_between_frames():
    frame = encode_frame(Kind.SERVER_LIVE, b"{}", b"abc")
    for cut in range(len(frame) + 1):
        reader = FrameReader()
        reader.feed(frame[:cut])
        reader.next_frame()
        assert reader.eof() is (cut in (0, len(frame))), cut


def test_bodies_of_padded_frames_are_aligned():
    import ctypes

    reader = FrameReader()
    for size in (4, 20_000, 12, 300_000, 8):
        stream = encode_frame(Kind.INFER, b" " * 64, bytes(size))
        rest = memoryview(stream)
        while rest:
            buffer = reader.get_buffer()
            n = min(len(buffer), len(rest))
            buffer[:n] = rest[:n]
            reader.advance(n)
            rest = rest[n:]
            frame = reader.next_frame()
        assert isinstance(frame, Frame)
        address = ctypes.addressof(ctypes.c_char.from_buffer(frame.body))
        assert address % 16 == 0, size
