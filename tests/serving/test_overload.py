"""Too much: refusals come at once and cost little, and the model keeps its time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.serving import admission, batching, page
from edge_runtime.serving.admission import Admission

from .rig import CLOCKED, WIDTH, Array, NumpyModel, Rig, close_all, double_plus_one, infer
from .test_fairness import ROW_BYTES, many

Build = Callable[..., Rig]


class Slow:
    """A model whose runs move the clock of the worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run_ms: float) -> None:
        self.now_ns = 1_000_000_000
        self.run_ns = round(run_ms * 1e6)
        for module in CLOCKED:
            monkeypatch.setattr(module, "_monotonic_ns", lambda: self.now_ns)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.now_ns += self.run_ns
        return double_plus_one(inputs)


def waits_at_most(rig: Rig, number: int) -> int:
    """Of so many requests sent at once, how many are not refused."""
    answers = rig.client().send(many(range(1, number + 1))).answers()
    assert len(answers) == number
    return sum(not answer.code for answer in answers)


# --- how many may wait ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_ms", "may"),
    [(2.0, 40), (1000.0, 16), (0.001, 50)],
    ids=["by time", "slow: a few in any case", "quick: by count"],
)
def test_as_many_may_wait_as_run_within_the_time_that_is_configured(
    build: Build, run_ms: float, may: int
) -> None:
    rig = build(queue_ms_max=80, queue_requests_max=50)
    rig.worker._admission.run_ns_mean = run_ms * 1e6
    assert waits_at_most(rig, 70) == may


def test_one_run_that_took_long_by_accident_costs_nobody_a_place(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 1000.0)
    rig = build(NumpyModel(slow), queue_ms_max=80, queue_requests_max=50)
    rig.worker._admission.run_ns_mean = 1e6
    rig.client().ask(infer(0.0))
    assert waits_at_most(rig, 70) == 50
    for _ in range(20):  # but a model that has become slow is found out
        rig.client().ask(infer(0.0))
    assert waits_at_most(rig, 70) == 16


def test_a_smaller_count_goes_before_the_few_that_may_always_wait(build: Build) -> None:
    assert waits_at_most(build(queue_ms_max=80, queue_requests_max=5), 30) == 5


# --- refusing -------------------------------------------------------------------------------------


def test_who_would_only_be_refused_is_refused_before_its_tensors_are_here(build: Build) -> None:
    large = infer(np.zeros((40_000, WIDTH), np.float32), 4)  # 640 KB
    rig = build(queue_requests_max=3)
    client = rig.client()
    client.send(many(range(1, 4)) + large[:300])
    owner = rig.connections()[0]
    rig.worker._intake.readable(owner)
    assert list(rig.worker._admission.refusals.values()) == [[4]]
    assert rig.worker._slots.used_bytes == 3 * ROW_BYTES, "no memory for it"
    client.send(large[300:] + infer(5.0, 5))
    answers = {answer.request_id: answer.code for answer in client.answers()}
    assert answers == {1: "", 2: "", 3: "", 4: "overloaded", 5: ""}
    assert rig.status[page.REFUSED] == 1


def test_all_refusals_of_a_turn_to_a_client_leave_at_once(build: Build) -> None:
    rig = build(queue_requests_max=2)
    client = rig.client()
    sent: list[int] = []
    peers = rig.worker._peers
    real = peers.send

    def counting(owner: Any, data: memoryview, slot: Any) -> None:
        sent.append(len(data))
        real(owner, data, slot)

    peers.send = counting  # type: ignore[method-assign]
    assert len(client.send(many(range(1, 31))).answers()) == 30
    assert len(sent) == 3 and rig.status[page.REFUSED] == 28


def test_a_more_urgent_request_behind_refused_ones_still_gets_in(build: Build) -> None:
    rig = build(queue_requests_max=2)
    client = rig.client()
    client.send(many(range(1, 10)) + infer(50.0, 50, priority=3) + infer(60.0, 60))
    codes = {answer.request_id: answer.code for answer in client.answers()}
    assert [number for number, code in codes.items() if not code] == [50, 1]


def test_a_client_that_leaves_with_refusals_under_way_leaves_nothing_behind(build: Build) -> None:
    rig = build(queue_requests_max=2)
    client = rig.client()
    client.send(many(range(1, 30)))
    client.close()
    rig.settle()
    assert not rig.connections() and not rig.worker._admission.refusals
    assert rig.worker._slots.used_bytes == 0


def test_a_worker_that_drains_sends_its_refusals_first(build: Build) -> None:
    rig = build(queue_requests_max=2)
    client = rig.client()
    client.sock.send(many(range(1, 30)))
    owner = rig.connections()[0]
    rig.worker._intake.readable(owner)
    assert owner.in_flight == 29
    returned = rig.drain()
    assert len(returned) == 1 and len(client._got) + len(client.answers()) == 29
    for _, fds in returned:
        close_all(fds)


# --- the time of a turn ---------------------------------------------------------------------------


def test_when_it_refuses_a_turn_reads_for_a_while_and_the_next_begins_where_it_stopped(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "READ_NS_MAX", -1)  # no time once it refuses
    rig = build(queue_requests_max=2)
    clients = [rig.client() for _ in range(4)]
    for client in clients:
        client.sock.send(many(range(1, 9)))
    order: list[int] = []
    readable = rig.worker._intake.readable

    def noting(owner: Any) -> None:
        order.append(owner.fd)
        readable(owner)

    rig.worker._intake.readable = noting  # type: ignore[method-assign]
    rig.settle()
    assert len(set(order[:4])) == 4, "everybody is read before anybody is read again"
    assert all(len(client.answers()) == 8 for client in clients)


def test_a_turn_runs_for_longer_than_it_read_but_never_for_long() -> None:
    until_ns = Admission.run_until_ns
    assert until_ns(1000, 1100) == 1100 + 100 * admission.RUN_SHARE
    assert until_ns(0, 10_000_000) == 10_000_000 + admission.RUN_NS_MAX


def test_a_model_of_milliseconds_runs_once_between_two_looks(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run would not end in time for a refusal within 10 ms."""
    slow = Slow(monkeypatch, 3.0)
    rig = build(NumpyModel(slow))
    looked: list[int] = []
    poll = rig.stepper.poll
    rig.stepper.poll = lambda wait_s: looked.append(slow.now_ns) or poll(wait_s)  # type: ignore
    rig.client().send(many(range(1, 6))).answers()
    assert max(b - a for a, b in itertools.pairwise(looked)) <= 3_000_000


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 10**9), st.integers(2, 64))
def test_rows_of_a_batch_in_the_loop_stay_within_what_may_be(
    limit: int, rows: int, run_ns: int, rows_max: int
) -> None:
    limit, rows = min(limit, rows_max), min(rows, limit, rows_max)
    found = batching.inline_rows(limit, rows, run_ns, rows_max)
    assert min(2, rows_max) <= max(found, 2) <= rows_max
    if run_ns > 2 * batching.INLINE_RUN_NS_MAX:
        assert found <= max(limit, 2) and found >= rows // 2


def test_batches_in_the_loop_find_the_size_that_takes_their_time() -> None:
    each_ns, limit = 100_000, 4
    for _ in range(40):
        limit = batching.inline_rows(limit, limit, limit * each_ns, 64)
    assert 0.75 <= limit * each_ns / batching.INLINE_RUN_NS_MAX <= 1.25
    assert batching.inline_rows(limit, 3, 3 * each_ns, 64) == limit, "a small one says nothing"
    limit = batching.inline_rows(limit, limit, 10**9, 64)
    assert limit * each_ns >= batching.INLINE_RUN_NS_MAX / 4, "a hiccup halves it at most"
