"""Figures of the real daemon: totals that only grow, what events count, the text and its port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime import metrics
from edge_runtime.daemon import statistics
from edge_runtime.daemon.statistics import ENDED_SERIES_MAX, OLDER, Statistics
from edge_runtime.errors import DeadlineError, EdgeError
from edge_runtime.events import Event, Value
from edge_runtime.serving import page
from tests.daemon.world import QUICK_RESTART, Daemon, filled, infer_frame, until
from tests.metrics import parser
from tests.metrics.parser import Family

Status = dict[str, Any]


def status(daemon: Daemon, name: str, **more: Any) -> Status:
    models = daemon.control("status", **more)["models"]
    return next(one for one in models if one["name"] == name)


def families(daemon: Daemon) -> dict[str, Family]:
    return parser.parse(daemon.control("metrics")["text"])


# --- by itself ------------------------------------------------------------------------------------


class Process:
    """A worker process as `Statistics` sees it."""

    def __init__(self, model: str = "m", version: int = 1) -> None:
        self.spec = SimpleNamespace(model=model, version=version, variant="fp32", backend="b")
        self.status = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answer(self, count: int, each_ns: int = 2_000_000) -> None:
        for _ in range(count):
            self.status[page.REQUESTS] += 1
            page.observe(self.status, page.REQUEST, each_ns)

    async def end(self) -> None:
        self.ended.set_result(None)
        await asyncio.sleep(0)


def event(name: str, **fields: Value) -> Event:
    return Event(name, "", "info", 0.0, 0, fields)


def ok(found: Statistics, model: str = "m") -> int:
    return found.model(model, 0).traffic.outcomes["ok"]


def watched(found: Statistics, *arguments: Any) -> Process:
    process = Process(*arguments)
    found.watch(process)  # type: ignore[arg-type]
    return process


def test_a_worker_is_counted_once_before_while_and_after_it_ends() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        worker = watched(found)
        worker.answer(3)
        assert ok(found) == 3
        worker.ended.set_result(None)  # dead, and not yet added to the others
        assert ok(found) == 3
        await asyncio.sleep(0)
        assert ok(found) == 3 and not found.workers()
        second = watched(found)
        second.answer(2)
        assert ok(found) == 5
        one = found.model("m", 0)
        assert one.traffic.request.count == 5 and one.traffic.request.sum_s == pytest.approx(0.01)
        assert list(one.versions) == ["1 fp32"]

    asyncio.run(scenario())


def test_thirty_versions_are_eight_series_and_a_rest_and_none_is_lost() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        for version in range(1, 31):
            worker = watched(found, "m", version)
            worker.answer(version)
            assert ok(found) == sum(range(1, version + 1))
            await worker.end()
            assert ok(found) == sum(range(1, version + 1))
        kept = found.model("m", 0).versions
        assert set(kept) == {OLDER} | {f"{version} fp32" for version in range(23, 31)}
        assert kept[OLDER].outcomes["ok"] == sum(range(1, 23))
        told = [one.labels[1] for one in found.samples(["m"]) if one.name == "edge_batches_total"]
        assert sorted(told, key=int) == [str(v) for v in range(30 - ENDED_SERIES_MAX + 1, 31)]

    asyncio.run(scenario())


def test_a_version_that_runs_is_not_put_to_the_rest() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        first, again = watched(found, "m", 1), watched(found, "m", 1)
        for worker in (first, again, *(watched(found, "m", number) for number in range(2, 40))):
            worker.answer(1)
            if worker is not again:
                await worker.end()
        versions = found.model("m", 0).versions
        assert versions["1 fp32"].outcomes["ok"] == 2 and len(versions) == 2 + ENDED_SERIES_MAX

    asyncio.run(scenario())


def test_a_worker_that_never_served_takes_no_place() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        worker = watched(found, "m", 1)
        worker.answer(1)
        await worker.end()
        for version in range(2, 40):
            await watched(found, "m", version).end()
        assert list(found.model("m", 0).versions) == ["1 fp32"]

    asyncio.run(scenario())


def test_models_are_told_apart_and_forgotten_with_all_they_had() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        for name in ("m", "n"):
            worker = watched(found, name)
            worker.answer(4)
            await worker.end()
            found.write(event("model_activated", model=name))
            found.write(event("worker_died", model=name, cause="hang"))
        found.write(event("template_died", backend="m"))
        found.forget("m")
        gone, kept = found.model("m", 0), found.model("n", 0)
        assert (gone.traffic.outcomes["ok"], gone.swaps, gone.deaths) == (0, 0, {})
        assert (kept.traffic.outcomes["ok"], kept.swaps, kept.deaths) == (4, 1, {"hang": 1})
        told = {one[:2] for one in found.samples(["n"])}
        assert ("edge_template_deaths_total", ("m",)) in told  # a backend of the same name stays
        assert not any(labels[0] == "m" for name, labels in told if "template" not in name)

    asyncio.run(scenario())


def test_a_rate_is_that_of_the_last_seconds() -> None:
    async def scenario() -> None:
        found = Statistics(0)
        worker = watched(found)
        second = 1_000_000_000
        worker.answer(20)
        assert found.model("m", 2 * second).requests_per_s == pytest.approx(10)
        for now_s in range(1, 60):
            found.look(now_s * second)
        assert found.model("m", 60 * second).requests_per_s == 0
        worker.answer(30)
        assert 3 <= found.model("m", 60 * second).requests_per_s <= 6
        assert found.model("m", 0).requests_per_s == 0  # a clock that stands still divides nothing

    asyncio.run(scenario())


def test_every_event_that_is_counted_has_a_metric_with_its_labels() -> None:
    for _, _, metric, labels in statistics._COUNTED:
        assert metrics.METRICS[metric].labels == labels
    for name in statistics._COUNTERS:
        assert metrics.METRICS[name].labels == metrics.WORKER


def test_a_golden_failure_is_a_load_failure_too() -> None:
    found = Statistics(0)
    found.write(event("variant_refused", model="m", code="golden_mismatch"))
    found.write(event("variant_refused", model="m", code="backend_failed"))
    one = found.model("m", 0)
    assert one.golden_failures == 1
    assert one.load_failures == {"golden_mismatch": 1, "backend_failed": 1}


# --- the daemon -----------------------------------------------------------------------------------


class Looker:
    """Reads a model's totals as fast as it can; none may ever be smaller than before."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon, self._name = daemon, name
        self.looks = 0
        self.failure: str = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        before: dict[str, float] = {}
        while not self._done.is_set():
            one = status(self._daemon, self._name)
            now = {f"outcome {key}": value for key, value in one["traffic"]["outcomes"].items()}
            for kind in ("request", "queue", "compute"):
                now[f"{kind} count"] = one["traffic"][kind]["count"]
                now[f"{kind} sum"] = one["traffic"][kind]["sum_s"]
            now["deaths"] = sum(one["deaths"].values())
            now["swaps"] = one["swaps"]
            fallen = {key: (before[key], now[key]) for key in before if now[key] < before[key]}
            if fallen:
                self.failure = str(fallen)
                return
            before = now
            self.looks += 1

    def finish(self) -> None:
        self._done.set()
        self._thread.join(30)
        assert not self.failure and self.looks > 5, (self.failure, self.looks)


def test_totals_only_grow_through_deaths_and_swaps_and_every_answer_is_counted(
    daemon: Daemon,
) -> None:
    name = "grows"
    for version in (1, 2):
        daemon.add(name, version)
    looker = Looker(daemon, name)
    answered = 0
    try:
        for turn in range(12):
            for _ in range(10):
                assert daemon.infer(name, 3.0) == 7.0
                answered += 1
            if turn % 3 == 0:  # no request is under way: none can be counted and not answered
                os.kill(daemon.worker(name)["pid"], signal.SIGKILL)
                until(lambda: not daemon.worker(name) or daemon.ready(name), "the death")
                until(lambda: daemon.ready(name), "the next worker")
            else:
                daemon.control("activate", name=name, version=1 + turn % 2)
    finally:
        looker.finish()
    one = status(daemon, name)
    assert one["traffic"]["outcomes"]["ok"] == answered
    for kind in ("request", "queue", "compute"):
        assert one["traffic"][kind]["count"] == answered
    assert sum(each["outcomes"]["ok"] for each in one["versions"].values()) == answered
    assert set(one["versions"]) == {"1 fp32", "2 fp32"}
    assert one["deaths"] == {"signal": 4}
    assert one["swaps"] >= 2 and one["requests_per_s"] > 0


def test_what_goes_wrong_is_counted_under_its_name(daemon: Daemon) -> None:
    name = "wrongs"
    daemon.add(name)
    with daemon.impatient() as client, pytest.raises(EdgeError):
        client.infer(name, {"x": filled(1.0, width=3)})
    with daemon.raw() as raw:
        raw.send(infer_frame(name, deadline_ns=1))
        assert isinstance(raw.error(), DeadlineError)
    with pytest.raises(EdgeError):
        daemon.add(name, 2, golden_off=1.0)
    one = status(daemon, name)
    outcomes = {key: count for key, count in one["traffic"]["outcomes"].items() if count}
    assert outcomes == {"invalid": 1, "expired": 1}
    assert one["golden_failures"] == 1 and one["load_failures"] == {"golden_mismatch": 1}
    told = families(daemon)
    assert told["edge_golden_failures_total"].values(model=name) == [1]
    assert told["edge_load_failures_total"].values(model=name, code="golden_mismatch") == [1]
    assert told["edge_requests_total"].values(model=name, outcome="invalid") == [1]
    assert told["edge_requests_total"].values(model=name, outcome="ok") == [0]


def test_the_text_says_the_same_as_the_status(daemon: Daemon) -> None:
    name = "same"
    daemon.add(name)
    for _ in range(7):
        daemon.infer(name)
    one, told = status(daemon, name, buckets=True), families(daemon)
    assert set(told) <= set(metrics.METRICS)
    assert told["edge_requests_total"].values(model=name, outcome="ok") == [7]
    for kind in ("request", "queue", "compute"):
        family = told[f"edge_{kind}_duration_seconds"]
        assert family.values(model=name, le="+Inf") == [7]
        assert sum(count for _, count in one["traffic"][kind]["buckets"]) == 7
    assert told["edge_worker_info"].values(model=name, device="CPU", state="active") == [1]
    assert told["edge_model_ready"].values(model=name) == [1]
    assert told["edge_swaps_total"].values(model=name) == [1]
    assert told["edge_fallbacks_total"].values(model=name) == [0]  # before it ever happened
    (private,) = told["edge_worker_private_bytes"].values(model=name)
    assert 0 < private < 64 << 20
    assert told["edge_store_bytes"].values()[0] > 0
    assert 0 < told["edge_uptime_seconds"].values()[0] < 3600
    daemon.control("unload", name=name)
    gone = families(daemon)
    assert gone["edge_model_ready"].values(model=name) == [0]
    assert gone["edge_requests_total"].values(model=name, outcome="ok") == [7]
    for now in ("edge_worker_info", "edge_connections", "edge_worker_private_bytes"):
        assert now not in gone or gone[now].values(model=name) == []


def test_prometheus_own_parser_reads_the_daemons_text(daemon: Daemon) -> None:
    client = pytest.importorskip("prometheus_client.parser", reason="a second opinion (extra dev)")
    daemon.add("theirs")
    daemon.infer("theirs")
    text = daemon.control("metrics")["text"]
    count = sum(len(one.samples) for one in client.text_string_to_metric_families(text))
    assert count == sum(len(one.samples) for one in parser.parse(text).values())


def test_a_removed_model_leaves_no_series(daemon: Daemon) -> None:
    name = "leaves"
    daemon.add(name)
    daemon.infer(name)
    daemon.control("unload", name=name)
    daemon.control("remove", name=name, version=1)
    for family in families(daemon).values():
        assert family.values(model=name) == []


def test_wrong_arguments_are_refused(daemon: Daemon) -> None:
    for command, arguments in (("status", {"bucket": True}), ("metrics", {"all": True})):
        with pytest.raises(EdgeError) as refused:
            daemon.control(command, **arguments)
        assert refused.value.code == "invalid_request"


# --- the port -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Port:
    """HTTP by hand."""

    def __init__(self, daemon: Daemon, number: int) -> None:
        self.daemon, self.number = daemon, number

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.number), timeout=15)

    def ask(self, request: bytes) -> tuple[int, str, str]:
        """Status, head and body; the server closes after one answer."""
        with self.connect() as sock:
            sock.sendall(request)
            return answer(sock)


def answer(sock: socket.socket) -> tuple[int, str, str]:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    head, _, body = data.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head, body


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    from tests.daemon.world import running

    number = free_port()
    with running({"metrics": {"port": number}, "workers": {"restart": QUICK_RESTART}}) as started:
        started.add("m")
        yield Port(started, number)


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_the_port_answers_a_scraper(port: Port) -> None:
    port.daemon.infer("m")
    code, head, body = port.ask(GET)
    assert code == 200 and "text/plain; version=0.0.4" in head
    assert f"Content-Length: {len(body.encode())}" in head
    assert parser.parse(body)["edge_requests_total"].values(model="m", outcome="ok")[0] >= 1


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"\r\n\r\n", 400),
        (b"EDGE\x01\xff\x00 nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431),
    ],
)
def test_the_port_answers_nothing_else(port: Port, request_bytes: bytes, code: int) -> None:
    assert port.ask(request_bytes)[0] == code


def test_the_port_is_on_loopback_only(port: Port) -> None:
    rows = Path(f"/proc/{port.daemon.pid}/net/tcp").read_text().splitlines()[1:]
    rows += Path(f"/proc/{port.daemon.pid}/net/tcp6").read_text().splitlines()[1:]
    local = [row.split()[1] for row in rows if row.split()[3] == "0A"]  # listening
    assert [one for one in local if one.endswith(f":{port.number:04X}")] == [
        f"0100007F:{port.number:04X}"
    ]


def turned_away(port: Port) -> bool:
    """Closed without a word, although it asked as it should."""
    try:
        with port.connect() as sock:
            sock.sendall(GET)
            return not sock.recv(1)
    except ConnectionError:
        return True


def test_a_crowd_is_turned_away_and_silent_ones_are_let_go(port: Port) -> None:
    began_s = time.monotonic()
    silent = [port.connect() for _ in range(8)]
    try:
        until(lambda: turned_away(port), "a refusal")
        assert port.daemon.infer("m") == 7.0
        for sock in silent:
            assert sock.recv(1) == b""  # no answer: the time is up
        assert 4 < time.monotonic() - began_s < 12
    finally:
        for sock in silent:
            sock.close()
    until(lambda: port.ask(GET)[0] == 200, "an answer")


def test_a_port_that_is_taken_does_not_stop_the_daemon(
    make_daemon: Callable[..., Daemon],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        daemon = make_daemon({"metrics": {"port": number}}).start()
        daemon.add("m")
        assert daemon.infer("m") == 7.0
        assert daemon.events("metrics_port_failed", port=number)
        assert families(daemon)["edge_model_ready"].values(model="m") == [1]


def test_without_a_port_there_is_no_network_and_nothing_is_imported_for_it(daemon: Daemon) -> None:
    inodes = {one.split("[")[1].rstrip("]") for one in links(daemon.pid) if one.startswith("sock")}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        rows = Path(f"/proc/{daemon.pid}/net/{table}").read_text().splitlines()[1:]
        assert not inodes & {row.split()[9] for row in rows}
    code = "import sys, edge_runtime.daemon.supervisor\n"
    code += "print('edge_runtime.daemon.scrape' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def links(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            pass  # closed meanwhile
    return found
