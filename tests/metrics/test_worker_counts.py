"""What the worker loop counts: durations in the histograms, every request under one outcome."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime import metrics
from edge_runtime.serving import page
from tests.serving.rig import NumpyModel, Rig, double_plus_one, infer

Build = Callable[..., Rig]
OUTCOMES = {
    "ok": page.REQUESTS,
    "invalid": page.INVALID,
    "failed": page.FAILED,
    "refused": page.REFUSED,
    "expired": page.EXPIRED,
    "cancelled": page.CANCELLED,
}


def outcomes(rig: Rig) -> dict[str, int]:
    return {name: rig.status[word] for name, word in OUTCOMES.items() if rig.status[word]}


def counted(rig: Rig, word: int) -> list[int]:
    return rig.status[word : word + metrics.WORDS].tolist()


def slow(inputs: Any) -> Any:
    time.sleep(0.003)
    return double_plus_one(inputs)


@pytest.mark.parametrize("runners", [0, 2])
def test_each_answered_request_is_in_all_three_histograms(build: Build, runners: int) -> None:
    rig = build(NumpyModel(slow), runners=runners)
    client = rig.client()
    for number in range(5):
        client.ask(infer(float(number), number))
    request, queue, compute = (counted(rig, w) for w in (page.REQUEST, page.QUEUE, page.COMPUTE))
    assert [metrics.count(one) for one in (request, queue, compute)] == [5, 5, 5]
    assert compute[0] >= 5 * 3_000_000
    assert queue[0] + compute[0] <= request[0]
    assert outcomes(rig) == {"ok": 5}


def test_the_frame_tells_the_time_that_the_histogram_has(build: Build) -> None:
    rig = build()
    client = rig.client()
    client.send(infer(1.0, 1))
    rig.settle()
    frame = client.sock.recv(65536)
    told_ns = int.from_bytes(frame[24:32], "little")
    assert counted(rig, page.REQUEST)[0] == told_ns


def test_the_time_to_receive_a_large_body_is_not_the_requests(build: Build) -> None:
    rig = build()
    client = rig.client()
    frame = infer(np.ones((100_000, 4), np.float32), 1)
    client.send(frame[:500_000])
    rig.settle()
    time.sleep(0.05)  # a slow sender
    client.send(frame[500_000:])
    assert not client.answers()[0].code
    assert counted(rig, page.REQUEST)[0] < 50_000_000


def test_pipelined_requests_wait_longer_the_later_they_come(build: Build) -> None:
    rig = build(NumpyModel(slow), batch_axis=None)
    rig.client().send(b"".join(infer(1.0, number) for number in range(4))).answers()
    queue = counted(rig, page.QUEUE)
    assert metrics.count(queue) == 4
    assert queue[0] >= (0 + 1 + 2 + 3) * 3_000_000


@pytest.mark.parametrize("runners", [0, 1])
def test_a_batch_is_one_run_of_several_requests(build: Build, runners: int) -> None:
    rig = build(NumpyModel(slow), runners=runners, batch_rows_max=8)
    rig.client().send(b"".join(infer(1.0, number) for number in range(6))).answers()
    request, queue, compute = (counted(rig, w) for w in (page.REQUEST, page.QUEUE, page.COMPUTE))
    assert metrics.count(request) == metrics.count(queue) == 6
    runs = 6 - rig.status[page.BATCHED] + rig.status[page.BATCHES]
    assert metrics.count(compute) == runs < 6
    assert 3_000_000 * runs <= compute[0] < request[0]


def test_an_answer_from_the_cache_did_not_wait_and_did_not_run(build: Build) -> None:
    rig = build(cache_bytes_max=1 << 20)
    client = rig.client()
    assert [client.ask(infer(1.0, number)).code for number in range(3)] == [""] * 3
    found = [metrics.count(counted(rig, w)) for w in (page.REQUEST, page.QUEUE, page.COMPUTE)]
    assert found == [3, 1, 1] and rig.status[page.CACHE_HITS] == 2


def fails_on_13(inputs: Any) -> Any:
    if inputs["x"].reshape(-1)[0] == 13:
        raise ValueError("a bug in a backend")
    return double_plus_one(inputs)


def test_every_request_has_one_outcome(build: Build) -> None:
    rig = build(NumpyModel(fails_on_13), queue_requests_max=2)
    client = rig.client()
    client.ask(infer(1.0, 1))
    client.ask(infer(13.0, 2))
    client.ask(infer(np.ones((1, 7), np.float32), 3))  # a wrong shape
    client.ask(infer(1.0, 4, deadline_ns=1))
    assert outcomes(rig) == {"ok": 1, "failed": 1, "invalid": 1, "expired": 1}
    assert rig.status[page.ERRORS] == 2
    client.send(b"".join(infer(1.0, number) for number in range(5, 15)))
    codes = [answer.code for answer in client.answers()]
    assert outcomes(rig)["refused"] == codes.count("overloaded") > 0
    assert sum(outcomes(rig).values()) == 4 + 10
    client.send(b"garbage" * 10).answers()
    assert outcomes(rig)["invalid"] == 2


@pytest.mark.parametrize("runners", [0, 1])
def test_requests_of_a_client_that_left_are_cancelled(build: Build, runners: int) -> None:
    rig = build(NumpyModel(slow), runners=runners, batch_axis=None)
    client = rig.client()
    client.send(b"".join(infer(1.0, number) for number in range(4)))
    client.sock.shutdown(socket.SHUT_RDWR)
    client.close()
    rig.settle()
    found = outcomes(rig)
    assert sum(found.values()) == 4 and found["cancelled"] == (4 if runners else 3)
