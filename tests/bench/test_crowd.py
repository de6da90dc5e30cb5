"""What counts calls and requests: clients at once, the HTTP client, and the watched connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench import latency, models, post, proc, servers
from bench.child import Child
from bench.crowd import Tally
from bench.daemon import Daemon
from bench.models import FACTORS
from bench.peers import Order
from bench.watched import Counts, Watch, answers
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import RESPONSE, Kind
from edge_runtime.wire.reader import FrameReader, TooLarge

SECONDS = 0.3


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("b")
    built = models.build(("tiny", "tiny-2", "large", "large-2"), directory)
    with Daemon(directory / "d") as running:
        for _, bundle in built.values():
            running.install(bundle)
        yield running


def _order(daemon: Daemon, clients: int) -> Order:
    core = proc.cores()[0]
    order = latency.order("edge", "tiny", "", str(daemon.infer_socket), core, core)
    return msgspec.structs.replace(order, clients=clients)


def test_each_client_of_a_crowd_calls_for_as_long_as_told(daemon: Daemon) -> None:
    with Child(_order(daemon, 3), "bench.crowd") as crowd:
        crowd.wait_until_ready()
        tally = msgspec.convert(crowd.ask(str(SECONDS)), Tally)
    assert tally.calls >= 3
    # Three clients were busy nearly all the time: their calls fill it three times.
    assert sum(tally.times_ns) <= 3 * SECONDS * 1e9
    assert tally.calls >= len(tally.times_ns) > 0


@pytest.mark.parametrize("model", ["tiny", "large"])
def test_a_swap_under_watch_loses_nothing_and_both_versions_answer(
    daemon: Daemon, model: str
) -> None:
    watch = Watch("w", str(daemon.infer_socket), model, (1, 1), model == "large")
    with Child(watch, "bench.watched") as child:
        child.wait_until_ready()
        child.tell("go")
        for version in (1, 2, 1):
            daemon.call("activate", name=model, version=version)
        counts = msgspec.convert(child.ask("stop"), Counts)
    assert (counts.lost, counts.doubled, counts.wrong, counts.refused) == (0, 0, 0, {})
    assert counts.sent == counts.answered > 0
    assert set(counts.by_version) == {"1", "2"}


def _faulty(path: Path, fault: str) -> threading.Thread:
    """A server for one connection that answers the first request with a fault and then closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        reader = FrameReader()
        while (frame := reader.next_frame()) is None:
            reader.feed(connection.recv(65536))
        assert not isinstance(frame, TooLarge)
        numbers = np.frombuffer(frame.body, np.float32)
        given = answers("tiny")["1"](numbers) + (1 if fault == "wrong" else 0)
        version = "7" if fault == "neither" else "1"
        tensor = messages.TensorHeader(
            "y", "FP32", (1, 16), messages.TensorParameters(binary_data_size=64)
        )
        header = messages.encode_header(messages.InferResponse("tiny", version, (tensor,)))
        prefix = frames.encode_prefix(
            Kind.INFER | RESPONSE, len(header), 64, frame.prefix.request_id
        )
        answer = prefix + header + given.astype(np.float32).tobytes()
        if fault != "lost":
            connection.sendall(answer * (2 if fault == "doubled" else 1))
        time.sleep(0.1)  # so that the answer is seen before the end
        connection.close()
        listener.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("fault", ["wrong", "neither", "doubled", "lost"])
def test_a_faulty_server_is_noticed(tmp_path: Path, fault: str) -> None:
    served = _faulty(tmp_path / "s", fault)
    watch = Watch("w", str(tmp_path / "s"), "tiny", (1,), large=False)
    with Child(watch, "bench.watched") as child:
        child.wait_until_ready()
        child.tell("go")
        served.join(10)
        counts = msgspec.convert(child.ask("stop"), Counts)
    assert counts.wrong == (1 if fault in ("wrong", "neither") else 0)
    assert counts.doubled == (1 if fault == "doubled" else 0)
    # The connection ended with the first request or the one after it unanswered.
    assert counts.lost >= 1


def test_versions_are_told_apart_by_what_they_compute() -> None:
    numbers = np.ones(16, np.float32)
    for model in ("tiny", "large"):
        first, second = (answers(model)[str(version)](numbers) for version in FACTORS)
        assert np.abs(second - first).max() > 0.1


def _http(answer: bytes) -> int:
    """A server that answers one request, byte by byte at first; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        for at in range(20):
            connection.sendall(answer[at : at + 1])
        connection.sendall(answer[20:])
        connection.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def test_the_http_client_finds_the_body_however_it_arrives() -> None:
    port = _http(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello")
    assert bytes(post.call(port, "/", {}, b"x")()) == b"hello"


def test_the_http_client_refuses_other_answers() -> None:
    port = _http(b"HTTP/1.1 500 Internal\r\nContent-Length: 5\r\n\r\nhello")
    with pytest.raises(RuntimeError, match="500"):
        post.call(port, "/", {}, b"x")()


def test_a_server_that_is_not_installed_is_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = servers.Kind(lambda: False, lambda order: [])
    monkeypatch.setattr(servers, "SERVERS", {"triton": missing})
    from contextlib import ExitStack

    with ExitStack() as stack:
        running = servers.Servers(stack, tmp_path)
        order = Order("triton", 0, 0, "tiny", "x", (1, 16), "", "", 0, 0)
        assert running.complete(order, 0) is None
    assert "Triton" in running.remark
