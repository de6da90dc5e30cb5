"""The worker loop: what it answers, refuses, forgets and gives back."""

from __future__ import annotations

import gc
import os
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BackendError
from edge_runtime.serving import channel, connection, intake, page, peers, slots, worker
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind

from .rig import (
    CLOCKED,
    NAME,
    WIDTH,
    Gate,
    NumpyModel,
    Rig,
    close_all,
    double_plus_one,
    infer,
    memfd,
    open_descriptors,
    other,
    region_add,
    tensor,
)

Build = Callable[..., Rig]


class Clock:
    """The loop's clock, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 1_000_000_000
        for module in CLOCKED:
            monkeypatch.setattr(module, "_monotonic_ns", lambda: self.now_ns)

    def advance_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=[0, 2], ids=["inline", "runners"])
def lanes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# --- answers --------------------------------------------------------------------------------------


def test_a_request_is_answered_with_its_id_and_the_models_outputs(build: Build, lanes: int) -> None:
    rig = build(runners=lanes)
    answer = rig.client().ask(infer(3.0, request_id=77))
    assert answer.request_id == 77 and answer.kind == Kind.INFER | frames.RESPONSE
    np.testing.assert_array_equal(answer.array(), np.full((1, WIDTH), 7, np.float32))
    assert rig.status[page.REQUESTS] == 1 and rig.status[page.COMPUTE] > 0


def test_pipelined_requests_are_each_answered_once_and_inline_in_order(build: Build) -> None:
    client = build().client()
    client.send(b"".join(infer(float(n), request_id=n) for n in range(50)))
    answers = client.answers()
    assert [answer.request_id for answer in answers] == list(range(50))
    assert [answer.array()[0, 0] for answer in answers] == [2 * n + 1 for n in range(50)]


def test_batches_of_any_size_are_answered_in_their_own_shape(build: Build, lanes: int) -> None:
    client = build(runners=lanes).client()
    for rows in (1, 7, 1, 3, 0, 7):
        given = np.arange(rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH)
        np.testing.assert_array_equal(client.ask(infer(given)).array(), given * 2 + 1)


def test_a_body_larger_than_the_buffer_goes_straight_into_its_slot(
    build: Build, lanes: int
) -> None:
    rig = build(runners=lanes)
    given = np.random.default_rng(1).standard_normal((60_000, WIDTH)).astype(np.float32)
    client = rig.client()
    client.send(infer(1.0, 1) + infer(given, 2) + infer(2.0, 3))
    answers = {answer.request_id: answer.array() for answer in client.answers()}
    assert answers.keys() == {1, 2, 3}
    np.testing.assert_array_equal(answers[2], given * 2 + 1)


def test_runners_answer_everything_that_the_inline_worker_answers(build: Build) -> None:
    stream = [infer(float(n), request_id=n + 1) for n in range(20)]
    stream += [infer(1.0, 30, model="other" if False else NAME, version="1")]
    stream += [
        infer(np.zeros((2, 9), np.float32), 31),
        other(Kind.MODEL_READY, {"model_name": NAME}, 32),
    ]
    seen = []
    for runners in (0, 1, 3):
        client = build(runners=runners).client()
        got = client.send(b"".join(stream)).answers()
        seen.append(sorted((a.request_id, a.code, a.header, a.body) for a in got))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 23


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (BackendError("the library failed"), "backend_failed"),
        (MemoryError(), "overloaded"),
        (ValueError("a bug in a backend"), "internal"),
    ],
)
def test_whatever_a_model_raises_is_an_answer_and_the_worker_goes_on(
    build: Build, lanes: int, failure: Exception, code: str
) -> None:
    def fails(inputs: Any) -> Any:
        if inputs["x"].reshape(-1)[0] == 13:
            raise failure
        return double_plus_one(inputs)

    rig = build(NumpyModel(fails), runners=lanes)
    client = rig.client()
    client.send(infer(13.0, 1) + infer(1.0, 2))
    answers = {answer.request_id: answer for answer in client.answers()}
    assert answers[1].code == code and answers[2].array()[0, 0] == 3
    counted = page.REFUSED if code == "overloaded" else page.ERRORS
    assert rig.status[counted] == 1 and rig.status[page.RUN_BEGAN] == 0


def test_a_backend_that_cannot_bind_is_an_answer_and_nothing_is_kept(build: Build) -> None:
    model = NumpyModel()
    model.bind = lambda inputs, outputs: 1 // 0  # type: ignore[method-assign]
    rig = build(model)
    assert rig.client().ask(infer(1.0)).code == "internal"
    assert rig.worker._slots.used_bytes == 0


def test_metadata_and_readiness_are_answered(build: Build) -> None:
    client = build(metadata=b'{"name":"m"}').client()
    ready = client.ask(other(Kind.MODEL_READY, {"model_name": NAME}, 5))
    assert (ready.request_id, ready.kind) == (5, Kind.MODEL_READY | frames.RESPONSE)
    assert messages.decode_document(ready.header) == {"name": "m", "ready": True}
    metadata = client.ask(other(Kind.MODEL_METADATA, {"model_name": NAME, "model_version": "1"}))
    assert messages.decode_document(metadata.header, metadata.body) == {"name": "m"}


def test_metadata_longer_than_a_header_comes_in_the_body(build: Build) -> None:
    document = b'{"labels":"' + b"x" * 100_000 + b'"}'
    answer = build(metadata=document).client().ask(other(Kind.MODEL_METADATA, {"model_name": NAME}))
    assert messages.decode_document(answer.header, answer.body) == {"labels": "x" * 100_000}


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (other(Kind.INFER, {"model_name": NAME}), "invalid_request"),
        (messages.encode_frame(Kind.INFER, b"not json"), "invalid_request"),
        (messages.encode_frame(Kind.INFER, b"\xff\xfe"), "invalid_request"),
        (infer(np.zeros((1, WIDTH + 1), np.float32)), "invalid_request"),
        (infer(np.zeros((1, WIDTH), np.int8)), "invalid_request"),
        (other(Kind.MODEL_READY, {}), "invalid_request"),
        (other(Kind.REGION_DROP, {"model_name": NAME, "region": 3}), "invalid_request"),
        (other(Kind.REGION_DROP, {"model_name": NAME, "region": 99}), "invalid_request"),
    ],
)
def test_a_wrong_request_is_refused_and_the_connection_goes_on(
    build: Build, frame: bytes, code: str
) -> None:
    client = build().client()
    client.send(frame + infer(1.0, 9))
    first, second = client.answers()
    assert first.code == code and first.request_id in (0, 1)
    assert second.request_id == 9 and second.array()[0, 0] == 3


def test_a_refused_body_is_skipped_however_large_it_is(build: Build) -> None:
    client = build(frame_body_bytes_max=1000).client()
    good = infer(np.zeros((1, WIDTH), np.float32))
    header = good[32 : len(good) - 16]
    lying = messages.encode_frame(Kind.INFER, header, bytes(200_000), request_id=4)
    honest = infer(np.zeros((500, WIDTH), np.float32), 5)
    client.send(
        lying
        + honest
        + infer(1.0, 6)
        + other(Kind.MODEL_READY, {"model_name": NAME}, 7, bytes(5000))
    )
    answers = client.answers()
    assert [(a.request_id, a.code) for a in answers] == [
        (4, "too_large"),
        (5, "too_large"),
        (7, ""),
        (6, ""),
    ]


def test_a_body_of_another_size_than_the_header_says_is_refused(build: Build) -> None:
    good = infer(1.0)
    header = good[32 : len(good) - 16]
    for size in (0, 15, 17):
        client = build().client()
        client.send(messages.encode_frame(Kind.INFER, header, bytes(size), request_id=2) + good)
        assert [a.code for a in client.answers()] == ["invalid_request", ""]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        frames.PREFIX.pack(b"EDGE", 2, Kind.INFER, 0, 0, 0, 0, 1, 0),
        frames.PREFIX.pack(b"EDGE", 1, 0x55, 0, 0, 0, 0, 1, 0),
        frames.PREFIX.pack(b"EDGE", 1, Kind.INFER, 0, 1, 0, 0, 1, 0),
        frames.PREFIX.pack(b"EDGE", 1, Kind.INFER, 0, 0, 70_000, 0, 1, 0),
        frames.PREFIX.pack(b"EDGE", 1, 0x44, 0, 0, 70_000, 0, 1, 0),
    ],
)
def test_bytes_that_are_no_frames_get_an_error_and_the_end(build: Build, garbage: bytes) -> None:
    rig = build()
    bystander, client = rig.client(), rig.client()
    client.send(garbage)
    (answer,) = client.answers()
    assert answer.code in ("malformed", "too_large") and client.closed
    assert rig.status[page.CONNECTIONS] == 1 and rig.status[page.ERRORS] == 1
    assert bystander.ask(infer(1.0)).array()[0, 0] == 3


# --- order and deadlines --------------------------------------------------------------------------


def test_higher_priority_runs_first_and_equal_ones_in_order(build: Build) -> None:
    rig = build()
    order = [(0, 1.0), (5, 2.0), (0, 3.0), (255, 4.0), (5, 5.0)]
    client = rig.client()
    client.send(b"".join(infer(v, int(v), priority=p) for p, v in order))
    assert [a.request_id for a in client.answers()] == [4, 2, 5, 1, 3]
    assert rig.model.ran == [4.0, 2.0, 5.0, 1.0, 3.0]


def test_priority_is_capped_by_the_limit(build: Build) -> None:
    client = build(priority_max=5).client()
    client.send(infer(1.0, 1, priority=5) + infer(2.0, 2, priority=200))
    assert [a.request_id for a in client.answers()] == [1, 2]


def test_an_expired_request_is_refused_without_a_run(
    build: Build, clock: Clock, lanes: int
) -> None:
    rig = build(runners=lanes)
    client = rig.client()
    late, now, soon = clock.now_ns - 1, clock.now_ns, clock.now_ns + 1
    client.send(infer(1.0, 1, deadline_ns=late) + infer(2.0, 2, deadline_ns=now))
    client.send(infer(3.0, 3, deadline_ns=soon))
    codes = {a.request_id: a.code for a in client.answers()}
    assert codes == {1: "deadline_exceeded", 2: "deadline_exceeded", 3: ""}
    assert rig.model.ran == [3.0]
    assert rig.status[page.EXPIRED] == 2 and rig.status[page.ERRORS] == 0


# --- spinning -------------------------------------------------------------------------------------


def test_a_spinning_worker_looks_for_a_while_and_then_sleeps(clock: Clock) -> None:
    waits: list[float] = []

    def poll(wait_s: float) -> list[tuple[int, int]]:
        waits.append(wait_s)
        clock.advance_s(10e-6)
        return [(7, 1)] if wait_s or len(waits) == ready_at else []

    spinning = worker.spinning(poll, 50_000)
    ready_at = 0
    assert spinning(1.0) == [(7, 1)] and waits == [0, 0, 0, 0, 0, 1.0]
    waits.clear()
    ready_at = 3
    assert spinning(1.0) == [(7, 1)] and waits == [0, 0, 0], "an event ends it"
    waits.clear()
    assert spinning(0) == [] and waits == [0], "who would not sleep does not spin"


def test_a_spinning_worker_answers_as_any(build: Build) -> None:
    rig = build(spin_us=50)
    assert [rig.client().ask(infer(float(n), n)).array()[0, 0] for n in range(3)] == [1, 3, 5]


# --- bounds ---------------------------------------------------------------------------------------


def test_the_queue_is_bounded_in_requests_and_refuses_at_once(build: Build) -> None:
    rig = build(queue_requests_max=3)
    client = rig.client()
    client.send(b"".join(infer(float(n), n) for n in range(1, 11)))
    answers = client.answers()
    refused = [a for a in answers if a.code]
    assert [a.request_id for a in refused] == [4, 5, 6, 7, 8, 9, 10]
    assert answers[: len(refused)] == refused, "refusals do not wait for runs"
    assert {a.code for a in refused} == {"overloaded"}
    assert all((a.error().retry_after_s or 0) > 0 for a in refused)
    assert rig.status[page.REFUSED] == 7 and rig.status[page.ERRORS] == 0
    assert client.ask(infer(1.0)).code == ""


def test_the_queue_is_bounded_in_bytes_of_requests_and_responses(build: Build) -> None:
    rig = build(queue_bytes_max=4 * 2 * WIDTH * 4)
    client = rig.client()
    client.send(b"".join(infer(float(n), n) for n in range(1, 7)))
    codes = {a.request_id: a.code for a in client.answers()}
    assert [codes[n] for n in range(1, 7)] == ["", "", "", "", "overloaded", "overloaded"]
    assert rig.worker._slots.used_bytes == 0


def test_what_can_never_fit_the_queue_is_too_large_and_not_to_be_retried(build: Build) -> None:
    answer = build(queue_bytes_max=100).client().ask(infer(np.zeros((10, WIDTH), np.float32)))
    assert answer.code == "too_large" and answer.error().retry_after_s is None


def test_an_output_of_terabytes_is_refused_before_any_memory_is_asked_for(build: Build) -> None:
    model = NumpyModel(
        inputs=(TensorSpec("x", "FP32", (-1, -1)),), outputs=(TensorSpec("y", "FP32", (-1,)),)
    )
    answer = build(model).client().ask(infer(np.zeros((1 << 38, 0), np.float32)))
    assert answer.code == "too_large"


def test_plans_are_bounded_and_an_old_one_gives_its_memory_back_at_once(build: Build) -> None:
    rig = build()
    client = rig.client()
    for rows in range(1, intake.PLANS_MAX + 20):
        assert client.ask(infer(np.zeros((rows, WIDTH), np.float32))).code == ""
        if rows == 1:
            first = weakref.ref(next(iter(rig.worker._intake.plans.values())).free[0].body.obj)
            gc.disable()  # only the cycle collector would find what is not let go
    assert len(rig.worker._intake.plans) == intake.PLANS_MAX
    gone = first() is None
    gc.enable()
    assert gone
    assert client.ask(infer(1.0)).array()[0, 0] == 3  # planned anew


def test_memory_at_rest_is_bounded_between_sweeps_too(build: Build) -> None:
    rig = build(queue_bytes_max=1 << 30)
    client = rig.client()
    most = 0
    for rows in range(20):
        assert not client.ask(infer(np.zeros((250_000 + rows, WIDTH), np.float32))).code  # 8 MB
        most = max(most, _resting(rig))
    assert most <= slots.IDLE_BYTES_MAX + 2 * 8_100_000
    assert most > 2 * 8_000_000, "and slots do rest"


def test_a_sweep_gives_much_memory_at_rest_back(build: Build, clock: Clock) -> None:
    rig = build(queue_bytes_max=1 << 30)
    client = rig.client()
    for _ in range(5):  # they all wait before the first runs
        client.send(infer(np.zeros((2_200_000, WIDTH), np.float32)))
    client.answers()
    assert not client.ask(infer(1.0)).code
    clock.advance_s(2)
    assert not client.ask(infer(1.0)).code
    assert _resting(rig) <= slots.IDLE_BYTES_MAX
    for rows in (1_000, 2_000):
        client.ask(infer(np.zeros((rows, WIDTH), np.float32)))
    assert _resting(rig) >= 3_000 * WIDTH * 4 * 2, "and what comes later rests again"


def _resting(rig: Rig) -> int:
    every = [rig.worker._intake.plans, *(owner.plans for owner in rig.connections())]
    return sum(p.slot_bytes * len(p.free) for plans in every for p in plans.values())


# --- slow and broken peers ------------------------------------------------------------------------


def test_a_slow_reader_gets_all_its_answers_and_delays_nobody(build: Build, lanes: int) -> None:
    rig = build(runners=lanes)
    slow, quick = rig.client(buffer_bytes=4096), rig.client()
    given = np.arange(20_000 * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    slow.send(infer(given, 0))
    rig.settle()
    assert any(owner.outbox for owner in rig.connections())
    assert quick.ask(infer(1.0)).array()[0, 0] == 3
    for n in (1, 2):
        slow.send(infer(given + n, n))
    answers = {a.request_id: a.array() for a in slow.answers()}
    assert answers.keys() == {0, 1, 2}
    for n, got in answers.items():
        np.testing.assert_array_equal(got, (given + n) * 2 + 1)
    assert slow.ask(infer(5.0)).array()[0, 0] == 11


def test_a_worker_reads_no_more_from_a_client_that_takes_no_answers(build: Build) -> None:
    rig = build()
    client = rig.client(buffer_bytes=4096)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sent, frame = 0, infer(np.zeros((500, WIDTH), np.float32))
    while sent < 2000:
        try:
            client.sock.sendall(frame)
        except BlockingIOError:
            before = rig.status[page.REQUESTS] + rig.status[page.REFUSED]
            rig.settle()
            if rig.status[page.REQUESTS] + rig.status[page.REFUSED] == before:
                break
            continue
        sent += 1
        if sent % 20 == 0:
            rig.settle()
    assert sent < 2000, "it took everything"
    (owner,) = rig.connections()
    held = sum(len(data) for data, _ in owner.outbox)
    assert held < 2 * connection.BUFFER_SIZE_MAX + rig.spec.limits.queue_requests_max * len(frame)


def test_a_client_that_takes_no_answer_is_closed_after_a_while(build: Build, clock: Clock) -> None:
    rig = build()
    client = rig.client(buffer_bytes=4096)
    client.send(infer(np.zeros((50_000, WIDTH), np.float32)))
    rig.settle()
    clock.advance_s(peers.STALL_S_MAX - 1)
    rig.client().ask(infer(1.0))
    assert len(rig.connections()) == 2
    clock.advance_s(2)
    rig.client().ask(infer(1.0))
    assert len(rig.connections()) == 2, "the two that only asked"
    assert rig.worker._slots.used_bytes == 0


@pytest.mark.parametrize("size", [1, 31, 40, 200, 100_000])
def test_half_a_frame_is_closed_after_a_while(build: Build, clock: Clock, size: int) -> None:
    rig = build()
    whole = infer(np.zeros((50_000, WIDTH), np.float32))
    client = rig.client().send(whole[:size])
    rig.settle()
    clock.advance_s(peers.STALL_S_MAX + 2)
    rig.client().ask(infer(1.0))
    client.answers()
    assert client.closed and rig.worker._slots.used_bytes == 0


def test_half_a_frame_behind_an_answer_taken_late_is_closed_after_a_while(
    build: Build, clock: Clock
) -> None:
    rig = build()
    client = rig.client(buffer_bytes=4096)
    batch = infer(np.zeros((400, WIDTH), np.float32))
    client.send(batch + batch + infer(1.0)[:20])  # all of it in one read
    assert len(client.answers()) == 2
    clock.advance_s(peers.STALL_S_MAX + 2)
    rig.client().ask(infer(1.0))
    client.answers()
    assert client.closed


def test_an_idle_connection_is_never_closed(build: Build, clock: Clock) -> None:
    rig = build()
    client = rig.client()
    assert not client.ask(infer(1.0)).code
    for _ in range(5):
        clock.advance_s(peers.STALL_S_MAX * 10)
        rig.client().ask(infer(1.0))
    assert client.ask(infer(2.0)).array()[0, 0] == 5


def test_a_busy_client_whose_reads_always_end_inside_a_frame_is_not_closed(
    build: Build, clock: Clock
) -> None:
    client = build().client()
    frame = infer(1.0)
    stream = frame * 80
    for at in range(0, len(stream) - 7, len(frame)):  # each piece ends seven bytes into a frame
        client.send(stream[at + 7 if at else 0 : at + 7 + len(frame)])
        client.answers()
        clock.advance_s(1)
    assert not client.closed
    assert client.send(stream[len(stream) - len(frame) + 7 :]).closed is False


def test_a_client_that_leaves_has_its_waiting_requests_forgotten(build: Build) -> None:
    gate = Gate()
    rig = build(NumpyModel(gate), runners=1)
    rig.stepper.stalled = True
    leaver, stayer = rig.client(), rig.client()
    leaver.send(b"".join(infer(float(n), n) for n in range(1, 5)))
    rig.settle()
    stayer.send(infer(9.0, 9))
    rig.settle()
    leaver.close()
    rig.settle()
    gate.open.set()
    rig.stepper.stalled = False
    assert stayer.answers()[0].array()[0, 0] == 19
    assert rig.model.ran == [1.0, 9.0]
    assert rig.worker._slots.used_bytes == 0 and rig.status[page.WAITING] == 0


@pytest.mark.parametrize("size", [0, 1, 32, 100, 250, 70_000])
def test_a_client_may_leave_at_any_point_of_a_frame(build: Build, size: int) -> None:
    rig = build()
    whole = infer(1.0) + infer(np.zeros((30_000, WIDTH), np.float32))
    client = rig.client().send(whole[:size])
    rig.settle()
    client.close()
    rig.settle()
    assert rig.connections() == [] and rig.status[page.CONNECTIONS] == 0
    assert rig.worker._slots.used_bytes == 0
    assert rig.client().ask(infer(1.0)).array()[0, 0] == 3


def test_a_client_that_shuts_its_writing_end_before_its_answers_is_closed_not_served(
    build: Build,
) -> None:
    rig = build()
    client = rig.client().send(infer(1.0))
    client.sock.shutdown(socket.SHUT_WR)
    client.answers()
    assert rig.connections() == [] and rig.worker._slots.used_bytes == 0


# --- descriptors and regions ----------------------------------------------------------------------


def test_a_region_is_read_and_written_in_place(build: Build, lanes: int) -> None:
    rig = build(runners=lanes)
    client = rig.client()
    given = np.full((1, WIDTH), 4, np.float32)
    fd = memfd(4096, fill=given)
    assert not client.ask(region_add(2, 4096), [fd]).code
    answer = client.ask(_region_request(2, offset_out=1024))
    assert not answer.code and answer.body == b""
    (output,) = messages.decode_infer_response(answer.header).outputs
    assert output.parameters.shared_memory_byte_size == 4 * WIDTH
    np.testing.assert_array_equal(np.frombuffer(os.pread(fd, 16, 1024), np.float32), [9] * WIDTH)
    os.pwrite(fd, (given + 1).tobytes(), 0)  # the same slot, new bytes
    client.ask(_region_request(2, offset_out=1024))
    np.testing.assert_array_equal(np.frombuffer(os.pread(fd, 16, 1024), np.float32), [11] * WIDTH)
    os.close(fd)


def _region_request(
    number: int, offset_in: int = 0, offset_out: int = 1024, room: int = 64, request_id: int = 1
) -> bytes:
    array = np.zeros((1, WIDTH), np.float32)
    place = {"shared_memory_region": number, "shared_memory_offset": offset_in}
    into = messages.TensorParameters(
        shared_memory_region=number, shared_memory_offset=offset_out, shared_memory_byte_size=room
    )
    request = messages.InferRequest(
        NAME,
        (tensor("x", array, **place, shared_memory_byte_size=array.nbytes),),
        outputs=(messages.RequestedOutput("y", into),),
    )
    header = messages.encode_header(request)
    return messages.encode_frame(Kind.INFER, header, request_id=request_id)


def test_a_region_dropped_or_replaced_is_unmapped_and_its_plans_forgotten(
    build: Build, lanes: int
) -> None:
    rig = build(runners=lanes)
    client = rig.client()
    before = len(open_descriptors())
    for value in (1.0, 2.0, 3.0):
        fd = memfd(4096, fill=np.full(WIDTH, value, np.float32))
        assert not client.ask(region_add(0, 4096), [fd]).code
        assert not client.ask(_region_request(0)).code
        got = np.frombuffer(os.pread(fd, 4, 1024), np.float32)[0]
        assert got == value * 2 + 1
        os.close(fd)
    assert not client.ask(other(Kind.REGION_DROP, {"model_name": NAME, "region": 0})).code
    assert client.ask(_region_request(0)).code == "invalid_request"
    _until(lambda: len(open_descriptors()) == before)  # a runner is on its way back to rest


def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("make", "announce"),
    [
        (list, (0, 4096)),
        (lambda: [memfd(), memfd()], (0, 4096)),
        (lambda: [os.memfd_create("unsealed")], (0, 4096)),
        (lambda: [os.open("/dev/null", os.O_RDWR)], (0, 4096)),
        (lambda: [memfd(100)], (0, 4096)),
        (lambda: [memfd()], (99, 4096)),
        (lambda: [memfd()], (0, 0)),
        (lambda: [memfd()], (0, 5000)),
        (lambda: [memfd(70_000)], (0, 70_000)),
    ],
    ids=["none", "two", "unsealed", "device", "short", "number", "empty", "announced", "limit"],
)
def test_a_wrong_region_is_refused_and_its_descriptors_are_closed(
    build: Build, make: Callable[[], list[int]], announce: tuple[int, int]
) -> None:
    rig = build(region_bytes_max=65_536)
    client = rig.client()
    before = len(open_descriptors())
    fds = make()
    number, size = announce
    document = {"model_name": NAME, "region": number, "byte_size": size}
    answer = client.ask(other(Kind.REGION_ADD, document), fds)
    close_all(fds)
    assert answer.code in ("invalid_request", "too_large")
    assert client.ask(_region_request(0)).code == "invalid_request"
    assert len(open_descriptors()) - sum(map(len, (o.stray for o in rig.connections()))) == before
    good = memfd()
    if not any(owner.stray for owner in rig.connections()):
        assert not client.ask(region_add(0, 4096), [good]).code
    os.close(good)


def test_regions_of_one_connection_are_bounded_but_may_be_replaced(build: Build) -> None:
    client = build(regions_per_connection_max=2).client()
    fd = memfd()
    codes = [client.ask(region_add(n, 4096), [fd]).code for n in (0, 1, 2, 1)]
    os.close(fd)
    assert codes == ["", "", "invalid_request", ""]


def test_pipelined_regions_each_get_their_own_descriptor_wherever_a_read_ends(
    build: Build,
) -> None:
    first = memfd(4096, fill=np.full(WIDTH, 1, np.float32))
    second = memfd(4096, fill=np.full(WIDTH, 2, np.float32))
    add = region_add(0, 4096)
    for cut in range(1, len(add), 5):
        client = build().client()
        client.send(add[:cut], [first])
        client.rig.settle()
        client.send(add[cut:])
        client.send(region_add(1, 4096, 2), [second])
        client.send(_region_request(0, request_id=3) + _region_request(1, request_id=4))
        assert [a.code for a in client.answers()] == [""] * 4, cut
        got = [np.frombuffer(os.pread(fd, 4, 1024), np.float32)[0] for fd in (first, second)]
        assert got == [3, 5]
    close_all([first, second])


def test_descriptors_that_nobody_asked_for_end_a_connection_that_goes_on_sending_them(
    build: Build,
) -> None:
    rig = build()
    client = rig.client()
    fd = memfd()
    before = len(open_descriptors())
    for _ in range(intake.STRAY_MAX):
        assert not client.ask(infer(1.0), [fd]).code
    client.send(infer(1.0), [fd])
    client.answers()
    os.close(fd)
    assert client.closed
    assert len(open_descriptors()) == before - 2  # the memfd, and the served end


def test_a_region_stays_mapped_while_a_request_uses_it(build: Build) -> None:
    gate = Gate()
    rig = build(NumpyModel(gate), runners=1)
    rig.stepper.stalled = True
    client = rig.client()
    fd = memfd(4096, fill=np.full(WIDTH, 4, np.float32))
    client.send(region_add(0, 4096), [fd])
    client.send(_region_request(0, request_id=2))
    client.send(other(Kind.REGION_DROP, {"model_name": NAME, "region": 0}, 3))
    rig.settle()
    assert gate.entered.acquire(timeout=10)
    gate.open.set()
    rig.stepper.stalled = False
    codes = {a.request_id: a.code for a in client.answers()}
    assert codes == {1: "", 2: "", 3: ""}
    assert np.frombuffer(os.pread(fd, 4, 1024), np.float32)[0] == 9
    os.close(fd)


def test_a_region_may_be_as_large_as_the_configuration_says(build: Build) -> None:
    size = 300 * 1024 * 1024  # sparse: no page of it is touched
    client = build(region_bytes_max=size).client()
    fd = memfd(size)
    assert not client.ask(region_add(0, size), [fd]).code
    os.close(fd)


# --- the supervisor -------------------------------------------------------------------------------


def test_stop_and_the_end_of_the_channel_end_the_loop(build: Build) -> None:
    for end in (
        lambda rig: channel.send(rig.control, channel.Stop()),
        lambda rig: rig.control.close(),
    ):
        rig = build()
        end(rig)
        rig.worker.serve()
        assert rig.worker._dispatch.stopping


def test_a_connection_for_another_model_version_or_server_goes_back_unread(build: Build) -> None:
    foreign = [
        infer(1.0, model="other"),
        infer(1.0, version="2"),
        other(Kind.MODEL_READY, {"model_name": "other"}),
        other(Kind.MODEL_METADATA, {"model_name": NAME, "model_version": "2"}),
        other(Kind.SERVER_LIVE, {}),
        region_add(0, 10).replace(b'"m"', b'"n"'),
    ]
    for frame in foreign:
        rig = build()
        client = rig.client().send(infer(1.0, 5) + frame + infer(2.0, 6))
        assert [a.request_id for a in client.answers()] == [5]
        ((message, fds),) = rig.returned()
        close_all(fds)
        assert message.residual == frame + infer(2.0, 6)
        assert rig.connections() == [] and rig.worker._slots.used_bytes == 0


def test_a_connection_whose_descriptors_were_lost_is_dropped_and_nothing_leaks(
    build: Build,
) -> None:
    rig = build()
    before = len(open_descriptors())
    ours, theirs = socket.socketpair()
    bad = os.memfd_create("unsealed")
    lost = [
        (channel.Adopt(own=False, regions=((0, 4096),)), [theirs.fileno()]),
        (channel.Adopt(own=False, residual_size=10), [theirs.fileno()]),
        (channel.Adopt(own=False, stray=2), [theirs.fileno(), bad]),
        (
            channel.Adopt(own=False, regions=((0, 1), (1, 1)), stray=1),
            [theirs.fileno(), *[bad] * 3],
        ),
        (channel.Adopt(own=False), []),
    ]
    for message, fds in lost:
        rig.adopt(message, fds)
        assert rig.connections() == []
    close_all([bad])
    ours.close()
    theirs.close()
    assert len(open_descriptors()) == before
    assert rig.client().ask(infer(1.0)).array()[0, 0] == 3


def test_only_the_active_version_answers_requests_that_name_none(build: Build) -> None:
    rig = build()
    rig.drain()
    client = rig.client().send(infer(1.0, 1, version="1"))
    assert [a.code for a in client.answers()] == [""]
    client.send(infer(2.0, 2))
    assert client.answers() == []
    back = rig.returned()
    assert back[0][0].residual == infer(2.0, 2)
    rig.tell(channel.Promote())
    rig.take_over(rig, [])
    for message, fds in back:
        rig.adopt(channel.Adopt(own=False, residual=message.residual), fds[:1])
        close_all(fds)
    assert client.answers()[0].array()[0, 0] == 5


def test_the_end_of_a_leaving_client_is_noticed_and_its_bytes_fill_nothing(build: Build) -> None:
    gate = Gate()
    rig = build(NumpyModel(gate), runners=1)
    rig.stepper.stalled = True
    client = rig.client().send(infer(1.0))
    rig.settle()
    assert rig.drain() == []
    client.sock.send(infer(2.0) * 1000)
    client.close()
    rig.settle()
    assert rig.connections() == []
    assert rig.worker._slots.used_bytes, "at once: its run goes on"
    assert [m for m, _ in rig.told() if isinstance(m, channel.Drained)]
    gate.open.set()
    rig.stepper.stalled = False
    rig.settle()
    assert rig.worker._slots.used_bytes == 0


def test_a_number_taken_again_in_the_same_turn_is_another_connection(build: Build) -> None:
    rig = build()
    leaver = rig.client()
    (owner,) = rig.connections()
    number = owner.fd
    leaver.close()
    rig.settle()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel.send(rig.control, channel.Adopt(own=False), [theirs.fileno()])
    real = rig.stepper._real
    turns = [[(rig._theirs.fileno(), 1), (number, 1 | 4 | 16)]]  # an old event of the number

    class Replay:
        def poll(self, timeout_s: float) -> list[tuple[int, int]]:
            return turns.pop() if turns else rig_poll(timeout_s)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    rig_poll = rig.stepper.poll
    rig.worker._epoll = Replay()  # type: ignore[assignment]
    rig.settle()
    assert [one.fd for one in rig.connections()] == [number], "the number was taken again"
    ours.send(infer(1.0))
    rig.settle()
    assert len(ours.recv(4096)) > 32
    ours.close()
    theirs.close()
