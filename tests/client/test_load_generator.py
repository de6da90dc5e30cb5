"""The generator against a server with faults: everything sent is accounted for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.client.load import statistics
from edge_runtime.client.load.generator import Generator
from edge_runtime.client.load.request import inputs_of, template
from edge_runtime.client.load.statistics import Load, Observations
from edge_runtime.errors import EdgeError, NotFoundError, RequestError, UnavailableError
from tests.client.server import METADATA, Server

BIG = np.zeros((64, 1024), np.float32)  # 256 KiB: more than a socket takes at once


@contextmanager
def generating(
    server: Server,
    *,
    model: str = "affine",
    inputs: dict[str, Any] | None = None,
    shared_memory: bool = False,
    **options: Any,
) -> Iterator[Generator]:
    inputs = inputs or {"x": np.ones((1, 16), np.float32)}
    request = template(model, "", inputs, shared_memory=shared_memory)
    generator = Generator(
        server.path,
        request,
        now_ns=time.monotonic_ns,
        timeout_s=5,
        **{"connections": 2, **options},
    )
    try:
        yield generator
    finally:
        generator.close()
        request.close()


def at_once(count: int) -> np.ndarray[Any, Any]:
    return np.zeros(count, np.int64)


def counted(seen: Observations) -> Load:
    load = statistics.load(
        seen, name="", begin_ns=0, end_ns=max(1, seen.elapsed_ns), deadline_ms=60_000
    )
    assert load.offered == load.sent + load.unsent
    assert load.accounted == load.sent
    return load


def test_every_request_of_a_schedule_is_answered(server: Server) -> None:
    due_ns = np.arange(200, dtype=np.int64) * 500_000
    with generating(server) as generator:
        seen = generator.open_loop(due_ns, 100_000_000, 10)
    load = counted(seen)
    assert (load.good, load.sent, load.offered) == (200, 200, 200)
    assert (seen.dispatched_ns >= due_ns).all()  # nothing goes before its time
    assert (seen.answered_ns >= seen.dispatched_ns).all()
    assert server.connections_accepted == 2


def test_a_request_waits_for_no_answer(server: Server) -> None:
    """The server holds all answers back until fifty requests are there."""
    with generating(server, connections=1) as generator:
        server.faults.shuffle = 50
        load = counted(generator.open_loop(at_once(50), 1, 10))
    assert load.good == 50


def test_refusals_are_seen_as_they_are_and_nothing_is_retried(server: Server) -> None:
    with generating(server) as generator:
        server.faults.overloaded, server.faults.unavailable = 7, 5
        load = counted(generator.open_loop(at_once(40), 1, 10))
    assert load.refused == {"overloaded": 7, "unavailable": 5}
    assert (load.good, load.sent) == (28, 40)


def test_what_was_in_flight_when_a_connection_ends_is_closed_and_others_go_on(
    server: Server,
) -> None:
    due_ns = np.arange(300, dtype=np.int64) * 1_000_000
    with generating(server) as generator:
        server.faults.close_before_answer = 1
        server.faults.close_inside_answer = 1
        load = counted(generator.open_loop(due_ns, 300_000_000, 10))
    assert load.errors["closed"] >= 2
    assert set(load.errors) == {"closed"}
    assert load.good > 100
    assert server.connections_accepted > 2  # it came back


def test_bytes_that_are_no_frames_end_a_connection_and_not_the_measurement(server: Server) -> None:
    with generating(server) as generator:
        server.faults.nonsense_bytes = 1
        load = counted(generator.open_loop(at_once(20), 1, 5))
    assert load.errors.get("closed", 0) >= 1
    assert load.good + load.errors["closed"] + load.unsent == 20


def test_a_server_that_is_gone_leaves_requests_unsent_and_the_end_comes(tmp_path: Path) -> None:
    server = Server(tmp_path / "infer.sock")
    with generating(server) as generator:
        server.close()
        load = counted(
            generator.open_loop(np.arange(50, dtype=np.int64) * 1_000_000, 50_000_000, 1)
        )
        again = counted(generator.closed_loop(4, 0.05, 1))
    assert load.unsent + load.errors.get("closed", 0) == load.offered == 50
    assert again.good == 0


def test_a_connection_that_could_not_be_opened_is_tried_again_in_the_next_load(
    tmp_path: Path,
) -> None:
    first = Server(tmp_path / "infer.sock")
    with generating(first, connections=1) as generator:
        first.close()
        gone = counted(
            generator.open_loop(np.arange(60, dtype=np.int64) * 5_000_000, 300_000_000, 1)
        )
        second = Server(tmp_path / "infer.sock")
        back = counted(generator.closed_loop(1, 0.25, 5))
        second.close()
    assert gone.unsent > 0 and back.good > 0


def test_a_server_that_does_not_answer_is_waited_for_and_left(server: Server) -> None:
    with generating(server, connections=1) as generator:
        server.faults.delays, server.faults.delay_s = 1, 2.5
        began_s = time.monotonic()
        load = counted(generator.open_loop(at_once(3), 1, 0.2))
        assert time.monotonic() - began_s < 2.4  # not until the server is back
        assert load.unanswered == 3
        late = counted(generator.open_loop(at_once(2), 1, 10))
    assert (late.sent, late.good) == (2, 2)  # answers to the first load are not taken for its own


def test_more_than_may_wait_is_unsent(server: Server) -> None:
    with generating(server, connections=1, outstanding_max=10) as generator:
        server.faults.delays, server.faults.delay_s = 1, 0.2
        load = counted(generator.open_loop(at_once(100), 1, 10))
    assert (load.sent, load.unsent, load.good) == (10, 90, 10)


def test_what_cannot_be_sent_until_its_deadline_is_dropped(server: Server) -> None:
    """The first request keeps the server busy while the others fill the socket."""
    with generating(server, connections=1, model="identity", inputs={"x": BIG}) as generator:
        server.faults.delays, server.faults.delay_s = 1, 0.4
        due_ns = np.arange(40, dtype=np.int64) * 1_000_000
        load = counted(generator.open_loop(due_ns, 40_000_000, 0.2))
    assert load.unsent > 10
    assert load.sent > 0


@pytest.mark.parametrize("shared_memory", [False, True])
def test_large_tensors_travel_in_frames_or_in_shared_memory(
    server: Server, shared_memory: bool
) -> None:
    options: dict[str, Any] = {"model": "identity", "inputs": {"x": BIG, "y": BIG[:1]}}
    with generating(server, shared_memory=shared_memory, **options) as generator:
        load = counted(generator.open_loop(at_once(30), 1, 20))
    assert load.good == 30
    body_size = 0 if shared_memory else BIG.nbytes + BIG[:1].nbytes
    assert {one["body_size"] for one in server.faults.seen} == {body_size}


def test_answers_in_pieces_are_put_together(server: Server) -> None:
    with generating(server) as generator:
        server.faults.trickle = True
        load = counted(generator.open_loop(at_once(20), 1, 10))
    assert load.good == 20


def test_a_closed_loop_never_has_more_in_flight(server: Server) -> None:
    with generating(server) as generator:
        seen = generator.closed_loop(3, 0.2, 10)
    load = counted(seen)
    assert load.good == load.offered > 3
    times = [(int(ns), 1) for ns in seen.dispatched_ns] + [(int(ns), -1) for ns in seen.answered_ns]
    in_flight = np.cumsum([step for _, step in sorted(times)])
    assert 1 <= in_flight.max() <= 3 and in_flight[-1] == 0


def test_an_interrupt_ends_a_load_with_what_there_is(server: Server) -> None:
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    with generating(server) as generator:
        timer.start()
        seen = generator.open_loop(np.arange(3000, dtype=np.int64) * 10_000_000, 30 * 10**9, 10)
    timer.join()
    assert seen.interrupted
    load = counted(seen)
    assert 0 < load.offered < 3000
    assert 0 < load.duration_s < 20  # a loaded machine may hand out little of the 0.2 s


def test_what_is_wrong_with_the_request_is_said_before_the_load(
    server: Server, tmp_path: Path
) -> None:
    cases: list[tuple[type[EdgeError], dict[str, Any]]] = [
        (RequestError, {"inputs": {"z": np.ones((1, 16), np.float32)}}),
        (NotFoundError, {"model": "absent"}),
    ]
    for kind, options in cases:
        with pytest.raises(kind):
            with generating(server, **options):
                pass
    server.faults.refuse_regions = True
    with pytest.raises(EdgeError):
        with generating(server, shared_memory=True):
            pass
    request = template("affine", "", {"x": np.ones((1, 16), np.float32)}, shared_memory=False)
    with pytest.raises(UnavailableError):
        Generator(str(tmp_path / "none"), request, connections=1, now_ns=time.monotonic_ns)


def test_inputs_are_made_from_what_the_model_says() -> None:
    rng = np.random.default_rng(0)
    made = inputs_of(METADATA["affine"], rng)
    assert made["x"].shape == (1, 16) and made["x"].dtype == np.float32
    inputs = [
        {"name": "tokens", "datatype": "INT64", "shape": [1, -1]},
        {"name": "text", "datatype": "BYTES", "shape": [2]},
        {"name": "half", "datatype": "FP16", "shape": [3, 4]},
    ]
    made = inputs_of({"inputs": inputs}, rng)
    assert not made["tokens"].any() and made["tokens"].shape == (1, 1)
    assert made["text"].tolist() == [b"x", b"x"]
    assert made["half"].dtype == np.float16 and (made["half"] <= 1).all()
    with pytest.raises(RequestError, match="--npy"):
        inputs_of({"inputs": []}, rng)
