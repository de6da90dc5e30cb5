"""Activation under load: nothing lost, nothing doubled, every answer by one of the two versions."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from edge_runtime.errors import EdgeError, NotFoundError
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.regions import create_region
from tests.daemon.world import Daemon, filled, infer_frame, until

SWAPS = 60


class Client:
    """One kind of client in a thread; each answer is checked and its version counted."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon, self.name = daemon, name
        self.asked = 0
        self.answers: dict[str, int] = {}
        self.failure: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._guarded)
        self._thread.start()

    def work(self) -> None:
        raise NotImplementedError

    def going(self) -> bool:
        return not self._done.is_set()

    def count(self, value: float, got: float) -> None:
        """Version 1 multiplies by 1, version 2 by 2; both add 1."""
        version = {value + 1: "1", 2 * value + 1: "2"}.get(got)
        assert version is not None, f"{got} is no version's answer to {value}"
        self.answers[version] = self.answers.get(version, 0) + 1

    def finish(self) -> None:
        self._done.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), f"{type(self).__name__} hangs after {self.answers}"

    def _guarded(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - reported by the test, whatever it was
            self.failure = error


class Single(Client):
    def work(self) -> None:
        with self.daemon.impatient() as client:  # no retries: a loss would be an error
            while self.going():
                value = float(1 + self.asked % 90)
                self.asked += 1
                y = client.infer(self.name, {"x": filled(value)})["y"]
                self.count(value, float(y[0, 0]))


class OwnSocket(Client):
    def work(self) -> None:
        path = str(self.daemon.run_dir / "models" / f"{self.name}.sock")
        with self.daemon.raw(path) as raw:
            while self.going():
                value = float(1 + self.asked % 90)
                self.asked += 1
                raw.send(infer_frame(self.name, value, request_id=self.asked))
                _, got, request_id = raw.value()
                assert request_id == self.asked
                self.count(value, got)


class Pipelined(Client):
    """Thirty-two requests under way; runners may answer them in any order, each once."""

    def work(self) -> None:
        with self.daemon.raw() as raw:
            waiting: dict[int, float] = {}
            while self.going() or waiting:
                while self.going() and len(waiting) < 32:
                    self.asked += 1
                    waiting[self.asked] = value = float(1 + self.asked % 90)
                    raw.send(infer_frame(self.name, value, request_id=self.asked))
                _, got, request_id = raw.value()
                self.count(waiting.pop(request_id), got)


class Dribbling(Client):
    """Sends frames in small pieces, so that many are half read when the connection moves."""

    def work(self) -> None:
        rng = np.random.default_rng(7)
        with self.daemon.raw() as raw:
            while self.going():
                waiting: dict[int, float] = {}
                data = b""
                for rows in (1, 3000, 2):  # one body outgrows the worker's read buffer
                    self.asked += 1
                    waiting[self.asked] = value = float(1 + self.asked % 90)
                    data += infer_frame(self.name, value, rows=rows, request_id=self.asked)
                cuts = sorted([*rng.integers(0, len(data), 12).tolist(), 16, 40, 100])
                for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                    raw.send(data[begin:end])
                    time.sleep(0.0005)
                while waiting:
                    _, got, request_id = raw.value()
                    self.count(waiting.pop(request_id), got)


class Shared(Client):
    """Input and output in one shared memory region, announced once."""

    def work(self) -> None:
        with self.daemon.client(timeout_s=15) as client:
            x = client.tensor((5000, 16), np.float32)
            while self.going():
                value = float(1 + self.asked % 90)
                x[...] = value
                self.asked += 1
                y = client.infer(self.name, {"x": x}, copy=False)["y"]
                assert (y == y[0, 0]).all()
                self.count(value, float(y[0, 0]))


class Asking(Client):
    """Inference and questions about another model and the server, in turn."""

    def work(self) -> None:
        live = messages.encode_document(Kind.SERVER_LIVE, {}, request_id=1)
        with self.daemon.raw() as raw:
            while self.going():
                self.asked += 1
                raw.send(infer_frame(self.name, 5.0) + live + infer_frame("bystander", 4.0))
                self.count(5.0, raw.value()[1])
                assert raw.frame().prefix.kind == Kind.SERVER_LIVE | frames.RESPONSE
                assert raw.value()[1] == 3 * 4 + 1


class Versioned(Client):
    """Asks for version 1 by its number: active or warm, it is always there."""

    def work(self) -> None:
        with self.daemon.impatient() as client:
            while self.going():
                self.asked += 1
                result = client.infer_result(self.name, {"x": filled(5)}, version="1")
                assert result.model_version == "1"
                self.count(5.0, float(result.outputs["y"][0, 0]))


KINDS = (Single, OwnSocket, Pipelined, Dribbling, Shared, Asking, Versioned)


@pytest.mark.parametrize("runners", [0, 2], ids=["inline", "runners"])
def test_sixty_swaps_under_load_lose_and_double_nothing(make_daemon, record_property, runners):
    daemon = make_daemon({"workers": {"runners": runners}}).start()
    daemon.add("bystander", scale=3.0)
    daemon.add("swap", 1, scale=1.0)
    daemon.add("swap", 2, scale=2.0)
    clients = [kind(daemon, "swap") for kind in KINDS]
    until(lambda: all(sum(c.answers.values()) > 3 or c.failure for c in clients))
    swaps, moved = [], 0
    fds = 0
    for swap in range(SWAPS):
        change = daemon.control("activate", name="swap", version=1 + swap % 2)
        assert change["warm"] is True
        swaps.append(change["swap_ms"])
        moved += change["connections_moved"]
        fds = fds or daemon.fds()
        time.sleep(0.02)  # some traffic on each version
    for client in clients:
        client.finish()
    answers = {type(client).__name__: client.answers for client in clients}
    print(
        f"{SWAPS} swaps, {moved} connections moved, median {sorted(swaps)[SWAPS // 2]:.2f} ms,"
        f" longest {max(swaps):.1f} ms; {answers}"
    )
    record_property("points", ("swaps under load", SWAPS))
    failures = [client.failure for client in clients if client.failure]
    assert not failures, failures[0]
    for client in clients:
        assert sum(client.answers.values()) == client.asked
        if not isinstance(client, Versioned):
            assert set(client.answers) == {"1", "2"}
    assert moved > 2 * SWAPS
    assert not daemon.events("worker_died") and not daemon.events("drain_timeout")
    until(lambda: daemon.fds() <= fds, f"{fds} descriptors, {daemon.descriptors()}")


def test_new_versions_under_load_come_and_go_and_nothing_is_lost(make_daemon):
    daemon = make_daemon().start()
    daemon.add("bystander", scale=3.0)
    daemon.add("grow", 1, scale=1.0)
    clients = [kind(daemon, "grow") for kind in (Single, Pipelined, Dribbling, Shared, Asking)]
    for version in range(2, 9):  # each with a new process; the one before the last one ends
        change = daemon.add("grow", version, scale=float(1 + version % 2))
        assert change["warm"] is False and change["previous"] == version - 1
    for client in clients:
        client.finish()
        assert client.failure is None
        assert sum(client.answers.values()) == client.asked
    workers = [w for w in daemon.control("ps")["workers"] if w["model"] == "grow"]
    assert sorted((w["version"], w["state"]) for w in workers) == [(7, "warm"), (8, "active")]


def test_a_refused_version_under_load_is_not_noticed(make_daemon):
    daemon = make_daemon().start()
    daemon.add("calm", 1, scale=1.0)
    clients = [kind(daemon, "calm") for kind in (Single, Pipelined)]
    for version in range(2, 6):
        with pytest.raises(EdgeError):
            daemon.add("calm", version, scale=9.0, golden_off=1.0)
    for client in clients:
        client.finish()
        assert client.failure is None and set(client.answers) == {"1"}


def test_a_slow_run_delays_the_handover_of_its_own_connection_only(make_daemon):
    daemon = make_daemon({"workers": {"runners": 1}}).start()
    daemon.add("slow", 1, scale=1.0, options={"run_ms": 400})
    daemon.add("slow", 2, scale=2.0, options={"run_ms": 0})
    daemon.control("activate", name="slow", version=1)
    with daemon.raw() as busy, daemon.raw() as other:
        live = messages.encode_document(Kind.MODEL_READY, {"model_name": "slow"}, request_id=5)
        other.ask(live)
        busy.send(infer_frame("slow", request_id=1))
        until(lambda: daemon.worker("slow")["connections"] == 2)
        thread = threading.Thread(target=lambda: daemon.control("activate", name="slow", version=2))
        thread.start()
        other.send(infer_frame("slow", request_id=2))
        assert other.value()[1] in (4.0, 7.0)
        assert busy.value() == ("1", 4.0, 1)
        thread.join()
        busy.send(infer_frame("slow", request_id=3))
        assert busy.value() == ("2", 7.0, 3)


def test_a_version_that_goes_for_good_answers_what_was_asked_of_it_by_number(make_daemon):
    daemon = make_daemon({"workers": {"runners": 1}}).start()
    daemon.add("old", 1, scale=1.0, options={"run_ms": 200})
    daemon.add("old", 2, scale=2.0)
    with daemon.raw() as raw:
        raw.send(infer_frame("old", version="1", request_id=1))
        until(lambda: daemon.worker("old", "warm")["connections"] == 1)
        daemon.add("old", 3, scale=3.0)  # version 2 stays warm, version 1 ends
        assert raw.value() == ("1", 4.0, 1)
        raw.send(infer_frame("old", version="1", request_id=2))
        with pytest.raises(NotFoundError):
            raw.value()
        raw.send(infer_frame("old", request_id=3))
        assert raw.value() == ("3", 10.0, 3)


def test_a_large_body_half_received_travels_with_its_connection(make_daemon):
    daemon = make_daemon().start()
    daemon.add("half", 1, scale=1.0)
    daemon.add("half", 2, scale=2.0)
    for rows in (1, 100, 20_000):
        data = infer_frame("half", 3.0, rows=rows)
        for cut in (1, 31, 32, 33, 100, len(data) // 2, len(data) - 1):
            version = daemon.model("half")["active"]["version"]
            with daemon.raw() as raw:
                raw.send(infer_frame("half", request_id=9))
                assert raw.value()[2] == 9  # now it is the worker's
                raw.send(data[:cut])
                change = daemon.control("activate", name="half", version=3 - version)
                assert change["connections_moved"] >= 1
                raw.send(data[cut:])
                answered, value, _ = raw.value()
                # A frame begun belongs to whoever has all of it.
                assert (answered, value) == (str(3 - version), 4.0 if version == 2 else 7.0)


def test_regions_and_a_pending_descriptor_survive_a_swap(make_daemon):
    import mmap
    import os

    daemon = make_daemon().start()
    daemon.add("memory", 1, scale=1.0)
    daemon.add("memory", 2, scale=2.0)
    size = 64
    fd = create_region(1 << 20)
    memory = mmap.mmap(fd, 1 << 20)
    np.frombuffer(memory, np.float32, 16)[:] = 3.0
    add = messages.encode_frame(
        Kind.REGION_ADD, messages.encode_header(messages.RegionAdd("memory", 0, 1 << 20))
    )
    place = messages.TensorParameters(shared_memory_region=0, shared_memory_byte_size=size)
    answer = messages.TensorParameters(
        shared_memory_region=0, shared_memory_offset=4096, shared_memory_byte_size=size
    )
    header = messages.encode_header(
        messages.InferRequest(
            "memory",
            (messages.TensorHeader("x", "FP32", (1, 16), place),),
            outputs=(messages.RequestedOutput("y", answer),),
        )
    )
    request = messages.encode_frame(Kind.INFER, header, request_id=4)
    with daemon.raw() as raw:
        # The descriptor comes with the first byte; the swap happens before the frame is whole.
        raw.send(infer_frame("memory"))
        assert raw.value()[0] == "2"
        raw.send(add[:7], [fd])
        assert daemon.control("activate", name="memory", version=1)["connections_moved"] == 1
        raw.send(add[7:])
        assert raw.frame().prefix.kind == Kind.REGION_ADD | frames.RESPONSE
        for version, want in (2, 7.0), (1, 4.0), (2, 7.0):
            daemon.control("activate", name="memory", version=version)
            frame = raw.ask(request)
            assert frame.prefix.kind == Kind.INFER | frames.RESPONSE, frame.header
            assert (np.frombuffer(memory, np.float32, 16, 4096) == want).all()
    os.close(fd)
