"""The response cache: the bytes that the model gives, within a budget, only where it is right."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BackendError
from edge_runtime.serving import page
from edge_runtime.serving.cache import ENTRY_OVERHEAD_BYTES, ResponseCache
from edge_runtime.tensors import TensorSpec, to_bytes
from edge_runtime.wire import messages
from edge_runtime.wire.frames import Kind

from .rig import (
    NAME,
    WIDTH,
    Answer,
    Array,
    NumpyModel,
    Rig,
    close_all,
    double_plus_one,
    infer,
    memfd,
    other,
    region_add,
)
from .test_streams import region_infer

Build = Callable[..., Rig]
MIB = 1 << 20


@pytest.fixture(params=[0, 2], ids=["inline", "runners"])
def lanes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def counts(rig: Rig) -> tuple[int, int]:
    return rig.status[page.CACHE_HITS], rig.status[page.CACHE_MISSES]


# --- in a worker ----------------------------------------------------------------------------------


def test_a_hit_is_the_models_answer_byte_for_byte_and_the_model_does_not_run(
    build: Build, lanes: int
) -> None:
    rig = build(runners=lanes, cache_bytes_max=MIB)
    client, another = rig.client(), rig.client()
    answers: list[Answer] = []
    for number, one in enumerate((client, another, client, another)):
        answers.append(one.ask(infer(3.0, 100 + number)))
    assert [answer.request_id for answer in answers] == [100, 101, 102, 103]
    assert len({answer._replace(request_id=0) for answer in answers}) == 1
    assert rig.model.ran == [3.0] and counts(rig) == (3, 1)
    assert rig.status[page.REQUESTS] == 4, "a hit is an answered request"


def test_deadline_and_priority_are_no_part_of_the_question(build: Build) -> None:
    rig = build(cache_bytes_max=MIB)
    client = rig.client()
    for more in ({}, {"deadline_ns": 1 << 62}, {"priority": 9}):
        assert not client.ask(infer(3.0, **more)).code
    assert rig.model.ran == [3.0] and counts(rig) == (2, 1)


def test_another_tensor_shape_or_wish_is_another_question(build: Build) -> None:
    rig = build(cache_bytes_max=MIB)
    client = rig.client()
    flat = np.arange(2 * WIDTH, dtype=np.float32)
    asked = [
        infer(1.0),
        infer(np.nextafter(np.full((1, WIDTH), 1, np.float32), np.float32(2))),
        infer(flat.reshape(2, WIDTH)),
        infer(np.concatenate([flat, flat]).reshape(4, WIDTH)),
        infer(np.zeros((0, WIDTH), np.float32)),
        infer(1.0, version="1"),
    ]
    first = [client.ask(frame) for frame in asked]
    assert counts(rig) == (0, 6)
    assert [client.ask(frame) for frame in asked] == first
    assert counts(rig) == (6, 6)


def test_an_error_is_not_kept(build: Build, lanes: int) -> None:
    fails = [True, True, False, False]

    def moody(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if fails.pop(0):
            raise BackendError("not now")
        return double_plus_one(inputs)

    rig = build(NumpyModel(moody), runners=lanes, cache_bytes_max=MIB)
    client = rig.client()
    codes = [client.ask(infer(3.0)).code for _ in range(4)]
    assert codes == ["backend_failed", "backend_failed", "", ""]
    assert counts(rig) == (1, 3) and len(fails) == 1


def test_what_is_in_shared_memory_is_never_cached(build: Build) -> None:
    rig = build(cache_bytes_max=MIB)
    client = rig.client()
    fd = memfd()
    assert not client.ask(region_add(0, 4096), [fd]).code
    for value in (1.0, 2.0):
        os.pwrite(fd, np.full(WIDTH, value, np.float32).tobytes(), 0)
        assert client.ask(region_infer(0, 4)).array()[0, 0] == 2 * value + 1
    place = messages.TensorParameters(shared_memory_region=0, shared_memory_offset=1024)
    into = (messages.RequestedOutput("y", place),)
    for _ in range(2):
        assert not client.ask(infer(1.0, outputs=into)).code
    assert len(rig.model.ran) == 4 and counts(rig) == (0, 0)
    assert rig.worker._dispatch._cache is not None and len(rig.worker._dispatch._cache) == 0
    os.close(fd)


def test_strings_and_free_shapes_are_cached_too(build: Build) -> None:
    spec = TensorSpec("x", "BYTES", (-1,)), TensorSpec("y", "BYTES", (-1,))
    model = NumpyModel(
        lambda inputs: {"y": np.array([one * 2 for one in inputs["x"]], object)},
        (spec[0],),
        (spec[1],),
    )
    rig = build(model, cache_bytes_max=MIB)
    client = rig.client()
    frames = []
    for words in ([b"ab", b"c"], [b"a", b"bc"]):
        data = bytes(to_bytes(np.array(words, object)))
        header = messages.TensorHeader(
            "x", "BYTES", (2,), messages.TensorParameters(binary_data_size=len(data))
        )
        request = messages.encode_header(messages.InferRequest(NAME, (header,)))
        frames.append(messages.encode_frame(Kind.INFER, request, data, request_id=1))
    first = [client.ask(frame) for frame in frames]
    assert first[0].body != first[1].body
    assert [client.ask(frame) for frame in frames] == first and counts(rig) == (2, 2)


def test_a_body_larger_than_the_buffer_is_cached_too(build: Build) -> None:
    rig = build(cache_bytes_max=8 * MIB)
    client = rig.client()
    large = np.arange(60_000 * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    first = client.ask(infer(large))
    assert client.ask(infer(large)) == first and counts(rig) == (1, 1)
    large[-1, -1] += 1
    assert client.ask(infer(large)) != first and counts(rig) == (1, 2)


def test_answers_of_a_batch_are_each_kept(build: Build) -> None:
    rig = build(cache_bytes_max=MIB, batch_rows_max=8)
    clients = [rig.client() for _ in range(6)]
    for _ in range(2):
        for number, client in enumerate(clients):
            client.send(infer(float(number), number))
        for number, client in enumerate(clients):
            (answer,) = client.answers()
            assert answer.request_id == number and answer.array()[0, 0] == 2 * number + 1
    assert rig.status[page.BATCHED] == 6 and counts(rig) == (6, 6)


def test_a_kept_answer_is_no_part_of_a_slot_that_is_used_again(build: Build) -> None:
    rig = build(cache_bytes_max=MIB)
    client = rig.client()
    for value in (1.0, 2.0, 3.0, 1.0, 2.0, 3.0):
        assert client.ask(infer(value)).array()[0, 0] == 2 * value + 1
    assert counts(rig) == (3, 3)


def test_a_hit_needs_no_place_in_a_full_queue(build: Build) -> None:
    rig = build(cache_bytes_max=MIB, queue_requests_max=2)
    client = rig.client()
    client.ask(infer(7.0))
    client.send(b"".join(infer(float(n), n) for n in (1, 2, 3)) + infer(7.0, 4))
    codes = {answer.request_id: answer.code for answer in client.answers()}
    assert codes == {1: "", 2: "", 3: "overloaded", 4: ""}


def test_hits_of_a_client_that_leaves_hold_nothing_and_a_drain_comes_after_them(
    build: Build,
) -> None:
    rig = build(cache_bytes_max=MIB)
    client, gone = rig.client(), rig.client()
    client.ask(infer(1.0))
    gone.send(infer(1.0) * 3)
    gone.close()
    client.send(infer(1.0) * 3)
    rig.settle()
    assert [len(message.residual) for message, fds in rig.drain() if not close_all(fds)] == [0]
    assert [answer.code for answer in client.answers()] == [""] * 3
    assert rig.worker._slots.used_bytes == 0


def test_no_cache_unless_it_is_asked_for(build: Build) -> None:
    rig = build()
    client = rig.client()
    for _ in range(2):
        client.ask(infer(1.0))
    assert len(rig.model.ran) == 2 and counts(rig) == (0, 0)


def test_other_frames_pass_a_cache_by(build: Build) -> None:
    rig = build(cache_bytes_max=MIB)
    assert not rig.client().ask(other(Kind.MODEL_READY, {"model_name": NAME})).code
    assert counts(rig) == (0, 0)


# --- by itself ------------------------------------------------------------------------------------


def view(size: int, fill: int = 0) -> memoryview:
    return memoryview(bytes([fill]) * size)


def test_keys_tell_plans_and_bodies_apart() -> None:
    keys = {ResponseCache.key(s, view(n, f)) for s in (1, 2) for n in (0, 1, 2) for f in (0, 1)}
    assert len(keys) == 2 * 5, "an empty body has no fill"
    assert ResponseCache.key(1, view(9)) == ResponseCache.key(1, memoryview(bytearray(9)))


def test_an_answer_over_the_budget_is_not_kept_and_costs_nobody_its_place() -> None:
    cache = ResponseCache(2 * (100 + ENTRY_OVERHEAD_BYTES))
    cache.put((1, b"a"), view(100))
    cache.put((1, b"b"), view(2 * 100 + ENTRY_OVERHEAD_BYTES + 1))
    assert cache.get((1, b"b")) is None and cache.get((1, b"a")) is not None


class Model:
    """The same in slow and simple: a list by age, cut to the budget."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max, self.kept = bytes_max, OrderedDict[Any, bytes]()

    def put(self, key: Any, value: bytes) -> None:
        if len(value) + ENTRY_OVERHEAD_BYTES > self.bytes_max:
            return
        self.kept.pop(key, None)
        self.kept[key] = value
        while self.size() > self.bytes_max:
            del self.kept[next(iter(self.kept))]

    def get(self, key: Any) -> bytes | None:
        if key in self.kept:
            self.kept[key] = self.kept.pop(key)
        return self.kept.get(key)

    def size(self) -> int:
        return sum(len(value) + ENTRY_OVERHEAD_BYTES for value in self.kept.values())


@given(
    st.integers(0, 5_000),
    st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 1_500)), max_size=60),
)
def test_the_least_recently_used_go_first_and_the_budget_holds(
    bytes_max: int, steps: list[tuple[bool, int, int]]
) -> None:
    cache, model = ResponseCache(bytes_max), Model(bytes_max)
    hits = misses = 0
    for puts, number, size in steps:
        key = (number, b"")
        if puts:
            cache.put(key, view(size, number))
            model.put(key, bytes(view(size, number)))
        else:
            got = cache.get(key)
            assert got == model.get(key)
            hits, misses = hits + (got is not None), misses + (got is None)
        assert cache.size_bytes == model.size() <= max(bytes_max, 0)
        assert len(cache) == len(model.kept)
    assert (cache.hits, cache.misses) == (hits, misses)


def test_a_kept_answer_is_a_copy() -> None:
    cache, answer = ResponseCache(MIB), bytearray(b"abc")
    cache.put((1, b""), memoryview(answer))
    answer[:] = b"xyz"
    assert cache.get((1, b"")) == b"abc"


def test_what_was_asked_again_outlives_what_was_not() -> None:
    cache = ResponseCache(2 * (100 + ENTRY_OVERHEAD_BYTES))
    cache.put((1, b""), view(100, 1))
    cache.put((2, b""), view(100, 2))
    assert cache.get((1, b"")) == view(100, 1)
    cache.put((3, b""), view(100, 3))
    assert cache.get((2, b"")) is None and cache.get((1, b"")) == view(100, 1)
