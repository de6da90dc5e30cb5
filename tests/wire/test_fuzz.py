"""Mutations of a corpus of real streams: nothing crashes, hangs or grows, whatever the bytes.

Every `corpus/*.bin` is a stream that was right (or wrong in a way worth keeping). A finding becomes
one more file there. The mutations are seeded, so a failure comes back.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest

from edge_runtime.errors import MalformedError, RequestError
from edge_runtime.wire import messages
from edge_runtime.wire.frames import HEADER_SIZE_MAX, PREFIX_SIZE, Kind
from edge_runtime.wire.reader import CHUNK_SIZE, Frame, FrameReader, TooLarge

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))
BODY_SIZE_MAX = 50_000
ROUNDS = 2000  # per file; some 40,000 streams in a few seconds
INTERESTING = [0, 1, 0x7F, 0x80, 0xFE, 0xFF, ord('"'), ord("{"), ord("["), ord("9"), ord("\\")]

DECODERS = {
    Kind.INFER: messages.decode_infer_request,
    Kind.INFER | 0x80: messages.decode_infer_response,
    Kind.REGION_ADD: messages.decode_region_add,
    Kind.REGION_DROP: messages.decode_region_drop,
    Kind.MODEL_METADATA: messages.decode_model_ref,
    Kind.MODEL_READY: messages.decode_model_ref,
    Kind.CONTROL: messages.decode_control,
    Kind.ERROR: messages.decode_error,
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice(INTERESTING)
        elif kind == 2:
            del out[at : at + rng.randint(1, 40)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 200)]
        elif kind == 4 and len(out) >= 16:  # a size field of the first prefix
            field = rng.choice([8, 12])
            out[field : field + 4] = rng.choice([0, 1, 65535, 65536, 2**31, 2**32 - 1]).to_bytes(
                4, "little"
            )
        else:
            out[at:at] = rng.choice(INTERESTING).to_bytes(1, "little") * rng.randint(1, 9)
    return bytes(out)


def consume(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Read a stream as a server would; returns (frames, refusals)."""
    reader = FrameReader(body_size_max=BODY_SIZE_MAX)
    frames = refusals = at = 0
    while at < len(data):
        piece = data[at : at + rng.choice([1, 7, 33, 500, 100_000])]
        at += len(piece)
        reader.feed(piece)
        assert len(reader.get_buffer()) <= BODY_SIZE_MAX + HEADER_SIZE_MAX + 2 * CHUNK_SIZE
        try:
            while (frame := reader.next_frame()) is not None:
                frames += 1
                refusals += refused(frame)
        except MalformedError:
            return frames, refusals + 1
    reader.eof()
    return frames, refusals


def refused(frame: Frame | TooLarge) -> bool:
    if isinstance(frame, TooLarge):
        return True
    assert len(frame.header) == frame.prefix.header_size
    assert len(frame.body) == frame.prefix.body_size <= BODY_SIZE_MAX
    decode = DECODERS.get(frame.prefix.kind)
    try:
        if decode is None:
            messages.decode_document(frame.header, frame.body)
        else:
            decode(frame.header)
        messages.model_name_of(frame.header)
    except RequestError as e:
        assert messages.encode_error(e, frame.prefix.request_id)  # any refusal can be answered
        return True
    return False


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_mutated_streams_are_read_or_refused(path):
    rng = random.Random(path.stem)
    data = path.read_bytes()
    tracemalloc.start()
    slowest_s = 0.0
    refusals = 0
    try:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            refusals += consume(mutate(data, rng), rng)[1]
            slowest_s = max(slowest_s, time.perf_counter() - started)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refusals > ROUNDS // 10, "the mutations reach the checks"
    assert slowest_s < 2.0
    assert peak < 32 * 1024 * 1024


def test_the_corpus_is_read_as_it_is():
    assert len(CORPUS) >= 15
    rng = random.Random(0)
    good = [path for path in CORPUS if not path.stem.startswith("bad_")]
    for path in good:
        frames, refusals = consume(path.read_bytes(), rng)
        assert frames >= 1 and not refusals, path.name
    for path in set(CORPUS) - set(good):
        frames, refusals = consume(path.read_bytes(), rng)
        assert refusals or len(path.read_bytes()) < PREFIX_SIZE, path.name
