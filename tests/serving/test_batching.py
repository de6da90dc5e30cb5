"""Batches: the same answers as without them, only where they pay and are right, and bounded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import BackendError, RequestError
from edge_runtime.serving import batching, channel, page, running, slots
from edge_runtime.serving import worker as loop
from edge_runtime.serving.batching import measure
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire import messages
from edge_runtime.wire.frames import Kind

from .rig import (
    CLOCKED,
    NAME,
    WIDTH,
    Array,
    Client,
    Gate,
    NumpyModel,
    Rig,
    close_all,
    double_plus_one,
    infer,
    memfd,
    region_add,
    tensor,
)

Build = Callable[..., Rig]
FAR_NS = 1 << 62


class Rows:
    """A model that notes how many rows each of its runs had."""

    def __init__(self, function: Callable[[Mapping[str, Array]], dict[str, Array]]) -> None:
        self.function = function
        self.seen: list[int] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.seen.append(len(next(iter(inputs.values()))))
        return self.function(inputs)


# --- the same answers -----------------------------------------------------------------------------

A, B = TensorSpec("a", "FP32", (-1, -1)), TensorSpec("b", "INT64", (-1, 2))
P, Q = TensorSpec("p", "FP32", (-1,)), TensorSpec("q", "INT64", (-1, 2))
REGION = 7
ROOM = 1 << 12  # of one request in the region


def two_in_two_out(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Rows do not touch each other; one with a 13 is refused."""
    if (inputs["a"] == 13).any():
        raise RequestError("13")
    return {"p": inputs["a"].sum(axis=1), "q": inputs["b"] * 3 + inputs["a"][:, :1].astype("i8")}


class Ask(NamedTuple):
    client: int
    rows: int
    width: int
    wanted: tuple[str, ...]
    priority: int
    expired: bool
    poison: bool
    shared_in: bool
    shared_out: bool

    def arrays(self, number: int) -> dict[str, Array]:
        a = np.arange(self.rows * self.width, dtype=np.float32).reshape(self.rows, self.width)
        a += 100 * (number + 1)
        if self.poison:
            a[-1, -1] = 13
        return {"a": a, "b": np.full((self.rows, 2), number, np.int64)}

    def frame(self, number: int) -> bytes:
        arrays = self.arrays(number)
        inputs = [tensor("a", arrays["a"]), tensor("b", arrays["b"])]
        if self.shared_in:
            inputs[0] = tensor("a", arrays["a"], **_at(number * ROOM, arrays["a"].nbytes))
        outputs = []
        for name in self.wanted:
            place = _at(number * ROOM + ROOM // 2, ROOM // 2)
            shared = self.shared_out and name == "q"
            parameters = messages.TensorParameters(**(place if shared else {}))
            outputs.append(messages.RequestedOutput(name, parameters))
        body = b"" if self.shared_in else arrays["a"].tobytes()
        return messages.encode_frame(
            Kind.INFER,
            messages.encode_header(messages.InferRequest(NAME, tuple(inputs), "", tuple(outputs))),
            body + arrays["b"].tobytes(),
            request_id=number + 1,
            time_ns=1 if self.expired else FAR_NS,
            priority=self.priority,
        )


def _at(offset: int, size: int) -> dict[str, int]:
    return {
        "shared_memory_region": REGION,
        "shared_memory_offset": offset,
        "shared_memory_byte_size": size,
    }


def mostly_not() -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * 7 + [True])


ASKS = st.lists(
    st.builds(
        Ask,
        client=st.integers(0, 2),
        rows=st.integers(1, 6),
        width=st.sampled_from([3, 3, 3, 5]),
        wanted=st.sampled_from([("p", "q")] * 3 + [("q",), ("q", "p")]),
        priority=st.sampled_from([0, 0, 0, 9]),
        expired=mostly_not(),
        poison=mostly_not(),
        shared_in=mostly_not(),
        shared_out=mostly_not(),
    ),
    min_size=1,
    max_size=24,
)


@pytest.mark.parametrize("lanes", [0, 2], ids=["inline", "runners"])
@settings(max_examples=150, deadline=None)
@given(asks=ASKS, rows_max=st.sampled_from([1, 2, 5, 16]), leaves=st.sampled_from([None, None, 1]))
def test_every_request_of_any_mix_gets_the_answer_that_it_gets_alone(
    lanes: int, asks: list[Ask], rows_max: int, leaves: int | None
) -> None:
    rows = Rows(two_in_two_out)
    rig = Rig(NumpyModel(rows, (A, B), (P, Q)), runners=lanes, batch_rows_max=rows_max)
    with contextlib.closing(rig):
        clients, fds = [rig.client() for _ in range(3)], [memfd(1 << 17) for _ in range(3)]
        for client, fd in zip(clients, fds, strict=True):
            assert not client.ask(region_add(REGION, 1 << 17), [fd]).code
        for number, ask in enumerate(asks):
            if ask.shared_in:
                os.pwrite(fds[ask.client], ask.arrays(number)["a"].tobytes(), number * ROOM)
            clients[ask.client].send(ask.frame(number))
        if leaves is not None:
            clients[leaves].close()
        answers = {}
        for index, client in enumerate(clients):
            for answer in client.answers() if index != leaves else ():
                assert answers.setdefault(answer.request_id, answer) is answer, "answered twice"
        stay = {n + 1 for n, ask in enumerate(asks) if ask.client != leaves}
        assert answers.keys() == stay
        for number, ask in enumerate(asks):
            if number + 1 in stay:
                _check(ask, number, answers[number + 1], fds[ask.client])
        assert all(seen <= max(rows_max, 6) for seen in rows.seen)
        assert not rig.worker._pending and not rig.status[page.WAITING]
        assert rig.status[page.RUN_BEGAN] == rig.status[page.RUN_BEGAN + 1] == 0
        close_all(fds)


def _check(ask: Ask, number: int, answer: Any, fd: int) -> None:
    if ask.expired:
        assert answer.code == "deadline_exceeded"
        return
    if ask.poison:
        assert answer.code == "invalid_request"
        return
    want = two_in_two_out(ask.arrays(number))
    response = messages.decode_infer_response(answer.header)
    assert tuple(output.name for output in response.outputs) == ask.wanted
    for name in ask.wanted:
        if name == "q" and ask.shared_out:
            data = os.pread(fd, want["q"].nbytes, number * ROOM + ROOM // 2)
            got = np.frombuffer(data, np.int64).reshape(-1, 2)
        else:
            got = answer.array(name)
        np.testing.assert_array_equal(got, want[name])


# --- what runs together ---------------------------------------------------------------------------


def crowd(rig: Rig, count: int, rows: int = 1, **options: Any) -> list[Client]:
    """So many clients whose requests are all there when the worker wakes."""
    clients = [rig.client() for _ in range(count)]
    for number, client in enumerate(clients):
        client.send(infer(np.full((rows, WIDTH), number, np.float32), number, **options))
    return clients


def check(clients: Sequence[Client]) -> None:
    for number, client in enumerate(clients):
        (answer,) = client.answers()
        assert answer.request_id == number and (answer.array() == 2 * number + 1).all()


def test_requests_that_wait_together_run_together_and_are_counted(build: Build) -> None:
    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), batch_rows_max=16)
    check(crowd(rig, 40))
    assert rows.seen == [16, 16, 8]
    assert rig.status[page.BATCHES] == 3 and rig.status[page.BATCHED] == 40
    assert rig.status[page.REQUESTS] == 40


def test_one_client_that_waits_for_its_answers_is_never_batched(build: Build) -> None:
    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), batch_rows_max=16)
    client = rig.client()
    for number in range(5):
        client.ask(infer(float(number)))
    assert rows.seen == [1] * 5 and rig.status[page.BATCHES] == 0


@pytest.mark.parametrize(
    ("rows_max", "seen"), [(1, [3] * 4), (4, [3] * 4), (6, [6, 6]), (9, [9, 3])]
)
def test_a_batch_never_has_more_rows_than_it_may(
    build: Build, rows_max: int, seen: list[int]
) -> None:
    rows = Rows(double_plus_one)
    check(crowd(build(NumpyModel(rows), batch_rows_max=rows_max), 4, rows=3))
    assert rows.seen == seen


def test_a_request_of_more_rows_than_a_batch_may_have_runs_alone(build: Build) -> None:
    rows = Rows(double_plus_one)
    check(crowd(build(NumpyModel(rows), batch_rows_max=4), 3, rows=9))
    assert rows.seen == [9, 9, 9]


def test_memory_bounds_the_rows_of_a_batch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES_MAX", 5 * 2 * WIDTH * 4)  # five rows, in and out
    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), batch_rows_max=16)
    check(crowd(rig, 10))
    assert rows.seen == [5, 5]
    assert 0 < rig.worker._dispatch._batches.resting_bytes <= batching.BATCH_BYTES_MAX


def test_a_model_without_batch_axis_0_is_never_batched(build: Build) -> None:
    for axis in (None, 1):
        rows = Rows(double_plus_one)
        check(crowd(build(NumpyModel(rows), batch_axis=axis, batch_rows_max=16), 4))
        assert rows.seen == [1] * 4


def test_an_output_without_rows_keeps_its_requests_alone(build: Build) -> None:
    fixed = TensorSpec("y", "FP32", (1, WIDTH))
    rows = Rows(lambda inputs: {"y": inputs["x"].sum(axis=0, keepdims=True)})
    rig = build(NumpyModel(rows, outputs=(fixed,)), batch_rows_max=16)
    clients = [rig.client().send(infer(np.ones((2, WIDTH), np.float32))) for _ in range(4)]
    for client in clients:
        assert (client.answers()[0].array() == 2).all()
    assert rows.seen == [2] * 4


def test_idle_runners_share_what_waits(build: Build) -> None:
    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), runners=2, batch_rows_max=16)
    check(crowd(rig, 8))
    assert sorted(rows.seen) == [4, 4]


def test_a_runner_that_has_run_takes_what_waits_as_one_batch(build: Build) -> None:
    gate = Gate()
    rows = Rows(gate)
    rig = build(NumpyModel(rows), runners=2, batch_rows_max=16)
    rig.stepper.stalled = True
    first = [rig.client().send(infer(1.0)), rig.client().send(infer(1.0))]
    rig.settle()  # both runners are busy
    clients = crowd(rig, 8)
    rig.settle()
    assert rig.status[page.WAITING] == 8
    gate.open.set()
    rig.stepper.stalled = False
    check(clients)
    assert all(client.answers()[0].code == "" for client in first)
    assert sorted(rows.seen) == [1, 1, 8]


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [0, 1])
def test_a_request_that_the_model_cannot_take_fails_alone(build: Build, lanes: int) -> None:
    def poisoned(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 3).any():
            raise BackendError("3 is too much")
        return double_plus_one(inputs)

    rows = Rows(poisoned)
    rig = build(NumpyModel(rows), runners=lanes, batch_rows_max=8)
    clients = crowd(rig, 8)
    for number, client in enumerate(clients):
        (answer,) = client.answers()
        assert answer.code == ("backend_failed" if number == 3 else "")
    assert rig.status[page.FAILED] == 1 and rig.status[page.REQUESTS] == 7
    assert rig.status[page.BATCH_ROWS_MAX] == 8, "the request was at fault, not the batch"
    if not lanes:
        assert rig.status[page.BATCHES] == 0 and rows.seen == [8] + [1] * 8
        assert rig.worker._dispatch._batches.resting_bytes == 8 * 2 * WIDTH * 4, (
            "its memory came back"
        )


def test_batches_that_fail_where_their_requests_do_not_become_smaller(build: Build) -> None:
    def small_only(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(inputs["x"]) > 3:
            raise MemoryError
        return double_plus_one(inputs)

    rows = Rows(small_only)
    rig = build(NumpyModel(rows), batch_rows_max=16)
    clients = crowd(rig, 16)
    check(clients)
    for number, client in enumerate(clients):
        client.send(infer(float(number), number))
    check(clients)
    for number, client in enumerate(clients):
        client.send(infer(float(number), number))
    check(clients)
    assert rig.status[page.BATCH_ROWS_MAX] == 2
    assert rows.seen[-8:] == [2] * 8


def test_no_memory_for_a_batch_means_one_by_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise MemoryError

    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), batch_rows_max=8)
    monkeypatch.setattr(batching, "aligned_array", none)
    check(crowd(rig, 5))
    assert rows.seen == [1] * 5 and rig.status[page.BATCHES] == 0


def test_the_watchdog_sees_each_call_of_a_batch_that_is_run_again_one_by_one(build: Build) -> None:
    """A hang is one call that does not return, not many that do."""
    seen = []

    def looks(inputs: Mapping[str, Array]) -> dict[str, Array]:
        seen.append(rig.status[page.RUN_BEGAN])
        if len(inputs["x"]) > 1:
            raise BackendError("no")
        return double_plus_one(inputs)

    rig = build(NumpyModel(looks), batch_rows_max=8)
    check(crowd(rig, 4))
    assert all(seen) and len(set(seen)) == 5 and rig.status[page.RUN_BEGAN] == 0


def test_batch_memory_at_rest_is_bounded(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("x", "FP32", (-1, -1)), TensorSpec("y", "FP32", (-1,))
    rig = build(
        NumpyModel(lambda inputs: {"y": inputs["x"].sum(axis=1)}, (spec[0],), (spec[1],)),
        batch_rows_max=16,
    )
    clients = [rig.client(), rig.client()]
    for width in range(1, batching.KEYS_MAX + 5):
        for client in clients:
            client.send(infer(np.ones((1, width), np.float32)))
        assert [client.answers()[0].array()[0] for client in clients] == [width] * 2
    assert len(rig.worker._dispatch._batches._resting) == batching.KEYS_MAX
    monkeypatch.setattr(slots, "IDLE_BYTES_MAX", 100)
    rig.worker._sweep(0)
    assert rig.worker._dispatch._batches.resting_bytes == 0


def test_a_worker_told_to_drain_answers_its_batches_first(build: Build) -> None:
    old, new = build(batch_rows_max=4), build(batch_rows_max=4, version=2)
    clients = crowd(old, 6)
    old.tell(channel.Drain())
    new.take_over(old, old.returned())
    check(clients)
    assert old.status[page.REQUESTS] + new.status[page.REQUESTS] == 6
    assert not old.connections() and len(new.connections()) == 6


# --- the window -----------------------------------------------------------------------------------


class Time:
    """The loop's clock and its sleep: time passes only while it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = self.began_ns = 1_000_000_000
        self.dozes_s: list[float] = []
        self.then: Callable[[], object] = lambda: None  # what happens during the next sleep
        for module in (*CLOCKED, running):
            monkeypatch.setattr(module, "_monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(loop, "doze", self._doze)

    def _doze(self, fd: int, seconds: float) -> None:
        self.dozes_s.append(seconds)
        assert len(self.dozes_s) < 100, "it spins"
        then, self.then = self.then, lambda: None
        if then() is None:
            self.now_ns += round(seconds * 1e9)

    @property
    def passed_ms(self) -> float:
        return (self.now_ns - self.began_ns) / 1e6


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_a_window_is_waited_for_once_and_ends(build: Build, passing: Time) -> None:
    rows = Rows(double_plus_one)
    check(crowd(build(NumpyModel(rows), batch_rows_max=8, batch_window_ms=0.3), 3))
    assert rows.seen == [3] and passing.passed_ms == pytest.approx(0.3)
    assert len(passing.dozes_s) == 1


def test_who_comes_within_the_window_runs_along_and_a_full_batch_does_not_wait(
    build: Build, passing: Time
) -> None:
    rows = Rows(double_plus_one)
    rig = build(NumpyModel(rows), batch_rows_max=4, batch_window_ms=50)
    late = rig.client()
    passing.then = lambda: late.send(infer(np.zeros((1, WIDTH), np.float32), 9))
    clients = crowd(rig, 3)
    rig.settle()
    assert rows.seen == [4] and passing.passed_ms == 0
    check(clients)
    assert late.answers()[0].request_id == 9
    check(crowd(rig, 8))
    assert rows.seen == [4, 4, 4] and passing.passed_ms == 0


def test_a_batch_that_its_memory_makes_full_does_not_wait(
    build: Build, passing: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES_MAX", 3 * 2 * WIDTH * 4)
    check(crowd(build(batch_rows_max=64, batch_window_ms=50), 3))
    assert passing.passed_ms == 0


@pytest.mark.parametrize("left_ms", [0.1, 1, 10, 90])
def test_no_request_waits_past_half_of_its_time(
    build: Build, passing: Time, left_ms: float
) -> None:
    rig = build(batch_rows_max=8, batch_window_ms=100)
    deadline_ns = passing.now_ns + round(left_ms * 1e6)
    client = rig.client().send(infer(1.0) + infer(1.0, deadline_ns=deadline_ns))
    assert [answer.code for answer in client.answers()] == ["", ""]
    assert passing.passed_ms == pytest.approx(left_ms / 2, rel=0.01)


def test_the_run_itself_is_left_its_time(build: Build, passing: Time) -> None:
    rig = build(batch_rows_max=8, batch_window_ms=100)
    rig.worker._dispatch._turn_ns_mean = 4e6
    check(crowd(rig, 2, deadline_ns=passing.now_ns + 10_000_000))
    assert passing.passed_ms == pytest.approx(2)


def test_nobody_waits_for_somebody_elses_batch(build: Build, passing: Time) -> None:
    rig = build(NumpyModel(two_in_two_out, (A, B), (P, Q)), batch_rows_max=8, batch_window_ms=100)
    for width in (3, 3, 5):
        ask = Ask(0, 1, width, ("p",), 0, *[False] * 4)
        rig.client().send(ask.frame(width))
    passing.then = lambda: pytest.fail("it waits")
    rig.worker._dispatch.run_pending = _first_turn(rig)  # type: ignore[method-assign]
    rig.settle()


def _first_turn(rig: Rig) -> Callable[[], None]:
    """The loop's `run_pending`, once."""
    real = rig.worker._dispatch.run_pending

    def run() -> None:
        real()
        rig.worker._pending.clear()

    return run


def test_what_can_never_be_batched_does_not_wait(build: Build, passing: Time) -> None:
    fixed = TensorSpec("y", "FP32", (1, WIDTH))
    model = NumpyModel(lambda inputs: {"y": inputs["x"][:1]}, outputs=(fixed,))
    rig = build(model, batch_rows_max=8, batch_window_ms=100)
    rig.client().ask(infer(np.ones((2, WIDTH), np.float32)))
    assert passing.passed_ms == 0


def test_a_full_queue_does_not_wait_for_more(build: Build, passing: Time) -> None:
    rig = build(batch_rows_max=64, batch_window_ms=100, queue_requests_max=4)
    check(crowd(rig, 4))
    assert passing.passed_ms == 0 and rig.status[page.REFUSED] == 0


def test_a_worker_that_drains_does_not_wait_for_more(build: Build, passing: Time) -> None:
    rig = build(batch_rows_max=64, batch_window_ms=100)
    client = rig.client()
    channel.send(rig.control, channel.Drain())
    client.send(infer(1.0))
    passing.then = lambda: None
    rig.settle()
    assert passing.passed_ms == 0


def test_while_all_runners_are_busy_the_loop_sleeps(build: Build, passing: Time) -> None:
    gate = Gate()
    rig = build(NumpyModel(gate), runners=1, batch_rows_max=2, batch_window_ms=5)
    rig.stepper.stalled = True
    clients = crowd(rig, 5)
    rig.settle()  # returns, because the loop asked for a real sleep
    assert rig.status[page.WAITING] == 3 and rig.worker._wait_s() > 0
    gate.open.set()
    rig.stepper.stalled = False
    check(clients)


def test_a_doze_ends_with_the_time_or_with_the_first_byte() -> None:
    import socket
    import time

    ours, theirs = socket.socketpair()
    with ours, theirs:
        began_s = time.monotonic()
        loop.doze(theirs.fileno(), 0.0003)
        assert time.monotonic() - began_s >= 0.0003
        ours.send(b"x")
        loop.doze(theirs.fileno(), 60)
        assert time.monotonic() - began_s < 30


# --- the measurement ------------------------------------------------------------------------------


class Ticks:
    """A clock that a model moves: so much a run, so much a row."""

    def __init__(self, run_us: float, row_us: float) -> None:
        self.now_ns, self.run_us, self.row_us = 0, run_us, row_us

    def __call__(self) -> int:
        return self.now_ns

    def model(self, function: Callable[[Mapping[str, Array]], dict[str, Array]]) -> NumpyModel:
        def timed(inputs: Mapping[str, Array]) -> dict[str, Array]:
            rows = len(next(iter(inputs.values())))
            self.now_ns += round((self.run_us + rows * self.row_us) * 1e3)
            return function(inputs)

        return NumpyModel(timed)


def tried(
    function: Callable[[Mapping[str, Array]], dict[str, Array]] = double_plus_one,
    run_us: float = 20,
    row_us: float = 1,
    sample: Array | None = None,
    **options: Any,
) -> batching.Choice:
    clock = Ticks(run_us, row_us)
    samples = [{"x": np.zeros((1, WIDTH), np.float32) if sample is None else sample}]
    return measure(clock.model(function), samples, 1e-3, 1e-4, clock, **options)


def test_batches_are_as_large_as_makes_a_row_cheaper() -> None:
    assert tried(run_us=20, row_us=0.1).rows_max == 64
    assert tried(run_us=20, row_us=1).rows_max == 64
    assert tried(run_us=2, row_us=1).rows_max == 16, "four times the rows would gain too little"
    choice = tried(run_us=0.1, row_us=20)
    assert choice.rows_max == 1 and "not cheaper" in choice.reason


def test_a_model_too_slow_to_be_measured_at_load_is_not_batched_unasked() -> None:
    slow_us = batching.MEASURE_S_MAX * 1e6 / 6  # three rows alone, and then four twice
    choice = tried(run_us=0, row_us=slow_us)
    assert choice.rows_max == 1 and "batch_rows_max" in choice.reason
    assert tried(run_us=0, row_us=slow_us, asked=8) == (8, "as configured", 0)


def test_what_there_was_no_time_to_try_is_tried_while_serving() -> None:
    choice = tried(run_us=batching.MEASURE_S_MAX * 1e6 / 12, row_us=1)
    assert (choice.rows_max, choice.tried) == (64, 4) and "no time" in choice.reason
    assert tried(run_us=2, row_us=1).tried == 0, "64 was tried and not worth it"


def test_the_measurement_keeps_its_time() -> None:
    for run_us in (1, 50, 200, 900, 3_000, 20_000):
        clock = Ticks(run_us, run_us / 3)
        measure(clock.model(double_plus_one), [{"x": np.ones((1, WIDTH), np.float32)}], 1, 1, clock)
        assert clock.now_ns <= batching.MEASURE_S_MAX * 1e9 + 4 * run_us * 1e3 * 4 / 3


def _softmax_0(inputs: Mapping[str, Array]) -> dict[str, Array]:
    e = np.exp(inputs["x"])
    return {"y": e / e.sum(axis=0)}


def _mean_away(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"] - inputs["x"].mean(axis=0)}


def _max_0(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": np.broadcast_to(inputs["x"].max(axis=0), inputs["x"].shape)}


def _flipped(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"][::-1]}


def _neighbour(inputs: Mapping[str, Array]) -> dict[str, Array]:
    y = inputs["x"].copy()
    y[1:] += y[:-1] // 2 if y.dtype.kind in "iu" else y[:-1] * y.dtype.type(0.5)
    return {"y": y}


@pytest.mark.parametrize("asked", [0, 4])
@pytest.mark.parametrize("sample", ["zeros", "ones", "ramp", "int zeros", "int ramp", "one number"])
@pytest.mark.parametrize("function", [_softmax_0, _mean_away, _max_0, _flipped, _neighbour])
def test_a_model_whose_rows_touch_each_other_is_not_batched(
    function: Callable[[Mapping[str, Array]], dict[str, Array]], sample: str, asked: int
) -> None:
    given = {
        "zeros": np.zeros((1, WIDTH), np.float32),
        "ones": np.ones((1, WIDTH), np.float32),
        "ramp": np.linspace(0, 1, WIDTH, dtype=np.float32).reshape(1, WIDTH),
        "int zeros": np.zeros((1, WIDTH), np.int64),
        "int ramp": np.arange(5, WIDTH + 5).reshape(1, WIDTH) * 4,
        "one number": np.full((1, 1), 3, np.float32),
    }[sample]
    if function is _neighbour and sample == "int zeros":
        given = given + 8
    choice = tried(function, sample=given, asked=asked)
    assert choice.rows_max == 1 and "differ" in choice.reason, choice


def test_a_model_that_fails_on_several_rows_or_on_made_up_ones_is_served_without_batches() -> None:
    def single(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(inputs["x"]) > 1:
            raise BackendError("one at a time")
        return double_plus_one(inputs)

    def picky(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs["x"].any():
            raise RequestError("only zeros")
        return double_plus_one(inputs)

    for function in (single, picky):
        choice = tried(function)
        assert choice.rows_max == 1 and "failed" in choice.reason


def test_a_batch_that_was_asked_for_still_fits_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES_MAX", 10 * WIDTH * 4)
    assert tried(asked=4096).rows_max == 10
    assert tried(run_us=20, row_us=0).rows_max == 4, "16 would not fit"


def test_recorded_rows_are_what_is_tried() -> None:
    """Nothing is made up where goldens give enough rows."""
    seen: list[float] = []

    def notes(inputs: Mapping[str, Array]) -> dict[str, Array]:
        seen.extend(inputs["x"][:, 0].tolist())
        return double_plus_one(inputs)

    clock = Ticks(20, 1)
    samples = [{"x": np.full((2, WIDTH), value, np.float32)} for value in (5, 6, 7, 8)]
    measure(clock.model(notes), samples, 1e-3, 1e-4, clock)
    assert set(seen) == {5.0, 6.0, 7.0}
