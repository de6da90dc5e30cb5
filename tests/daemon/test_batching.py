"""Batches, the cache and turns in the real daemon, as `ps` shows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from edge_runtime.errors import OverloadedError
from tests.daemon.world import Daemon, filled, infer_frame, running

CLIENTS, EACH = 8, 20
RUN_MS = 4


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    config = {
        "workers": {"runners": 0},
        "models": {
            "asked": {"batch_rows_max": 8},
            "window": {"batch_rows_max": 8, "batch_window_ms": 150},
            "off": {"batch_rows_max": 1},
            "cached": {"cache_bytes_max": "1 MiB"},
            "full": {"queue_requests_max": 4, "batch_rows_max": 1},
        },
    }
    with running(config) as started:
        yield started


def crowd(daemon: Daemon, name: str) -> list[tuple[float, float]]:
    """What CLIENTS clients at once asked and were answered, one row at a time."""
    outcomes: list[tuple[float, float]] = []
    start = threading.Barrier(CLIENTS)

    def work(who: int) -> None:
        with daemon.client() as client:
            start.wait()
            for turn in range(EACH):
                value = float(100 * who + turn)
                y = client.infer(name, {"x": filled(value)})["y"]
                assert y.shape == (1, 16) and (y == y[0, 0]).all()
                outcomes.append((value, float(y[0, 0])))

    threads = [threading.Thread(target=work, args=(who,)) for who in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == CLIENTS * EACH
    return outcomes


def test_a_model_whose_batches_pay_is_batched_unasked_and_answers_the_same(daemon: Daemon) -> None:
    """The reference model's price is Python's, not the rows'."""
    daemon.add("auto", options={"run_ms": 1})
    worker = daemon.worker("auto")
    assert worker["batch_rows_max"] > 1 and "rows at once" in worker["batch_reason"]
    assert all(y == 2 * x + 1 for x, y in crowd(daemon, "auto"))
    worker = daemon.worker("auto")
    assert worker["requests"] == CLIENTS * EACH
    assert worker["batched"] >= 2 * worker["batches"] > 0


def test_what_is_asked_for_is_what_runs(daemon: Daemon) -> None:
    daemon.add("asked", options={"run_ms": RUN_MS})
    assert daemon.worker("asked")["batch_rows_max"] == 8
    assert daemon.worker("asked")["batch_reason"] == "as configured"
    assert all(y == 2 * x + 1 for x, y in crowd(daemon, "asked"))
    worker = daemon.worker("asked")
    assert 2 * worker["batches"] <= worker["batched"] <= 8 * worker["batches"]


def test_off_is_off(daemon: Daemon) -> None:
    daemon.add("off", options={"run_ms": 1})
    assert all(y == 2 * x + 1 for x, y in crowd(daemon, "off"))
    worker = daemon.worker("off")
    assert worker["batches"] == 0 and worker["batch_reason"] == "off"


def test_a_window_gathers_a_batch_in_the_confined_worker(daemon: Daemon) -> None:
    """Its sleep is a system call of its own, which the sandbox must allow."""
    daemon.add("window")
    connections = [daemon.raw() for _ in range(3)]
    for number, connection in enumerate(connections):
        connection.send(infer_frame("window", number))
    assert [connection.value()[1] for connection in connections] == [1.0, 3.0, 5.0]
    for connection in connections:
        connection.sock.close()
    worker = daemon.worker("window")
    assert worker["batched"] == 3 and worker["batches"] == 1


def test_a_cache_answers_again_and_forgets_with_its_version(daemon: Daemon) -> None:
    daemon.add("cached", options={"run_ms": RUN_MS})
    with daemon.client() as client:
        for _ in range(3):
            assert (client.infer("cached", {"x": filled(3)})["y"] == 7).all()
        assert daemon.worker("cached")["cache_hits"] == 2
        assert daemon.worker("cached")["cache_misses"] == 1
        daemon.add("cached", 2, scale=10.0)
        assert (client.infer("cached", {"x": filled(3)})["y"] == 31).all()


def test_a_client_that_pipelines_makes_way_for_others(daemon: Daemon) -> None:
    daemon.add("full", options={"run_ms": 40})
    with daemon.raw() as greedy, daemon.raw() as modest:
        greedy.send(b"".join(infer_frame("full", n, request_id=n) for n in range(1, 7)))
        modest.send(infer_frame("full", 9))
        assert modest.value()[1] == 19.0
        outcomes = []
        for _ in range(6):
            try:
                outcomes.append(greedy.value()[1])
            except OverloadedError as error:
                assert error.retry_after_s
                outcomes.append(0)
    assert outcomes.count(0) >= 1 and np.count_nonzero(outcomes) >= 3


def test_a_swap_under_batched_load_loses_nothing(daemon: Daemon) -> None:
    daemon.add("asked", 2, options={"run_ms": RUN_MS})
    swaps = threading.Thread(
        target=lambda: [
            daemon.add("asked", version, options={"run_ms": RUN_MS}) for version in (3, 4)
        ]
    )
    swaps.start()
    outcomes = crowd(daemon, "asked")
    swaps.join()
    assert all(y == 2 * x + 1 for x, y in outcomes)
