"""Whatever a model, library or driver does to its process: told apart, logged, mended."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import (
    BackendError,
    ConnectionClosedError,
    EdgeError,
    InternalError,
    ModelError,
    OverloadedError,
    UnavailableError,
)
from tests.daemon.world import QUICK_RESTART, Daemon, bundle, fault, filled, running, until

MIB = 1 << 20
TRIGGER = 66.0
# One after the other: an out-of-memory kill is the machine's news, and would explain other deaths.
pytestmark = pytest.mark.xdist_group("deaths")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    config = {
        "workers": {"restart": QUICK_RESTART},
        "models": {
            "run-hang": {"run_time_max_ms": 300},
            "run-spin": {"run_time_max_ms": 300, "runners": 1},
            "load-hang": {"load_time_max_s": 1},
            "load-spin": {"load_time_max_s": 1},
            "import-hang": {"load_time_max_s": 1},
            "lean-load": {"memory_bytes_max": 64 * MIB},
            "lean-run": {"memory_bytes_max": 64 * MIB},
            "careless-runner": {"runners": 1},
        },
    }
    with running(config, odd_backends=True) as started:
        yield started


def trigger(daemon: Daemon, name: str) -> None:
    """A request that the model does not survive; its client loses this one and no other."""
    with daemon.impatient() as client, pytest.raises(ConnectionClosedError):
        client.infer(name, {"x": filled(TRIGGER)})


# --- told apart -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "cause", "words"),
    [
        ("exit", "exited", "exited with code 3"),
        ("segv", "signal", "killed by SIGSEGV"),
        ("ill", "signal", "killed by SIGILL: the library uses an instruction"),
        ("abort", "signal", "killed by SIGABRT"),
        ("hang", "hang", "did not return for 0."),
        ("spin", "hang", "did not return for 0."),
    ],
)
def test_each_death_in_a_run_is_told_apart_and_the_worker_returns(daemon, action, cause, words):
    name = f"run-{action}"
    daemon.add(name, options=fault(action, on_value=TRIGGER, exit_code=3))
    before = daemon.worker(name)["pid"]
    trigger(daemon, name)
    assert daemon.infer(name) == 7.0  # the client waits for the next worker
    death = daemon.events("worker_died", model=name)[-1]
    assert death["fields"]["cause"] == cause and words in death["message"]
    assert death["fields"]["pid"] == before and death["level"] == "error"
    worker = daemon.worker(name)
    assert worker["pid"] != before and worker["restarts"] == 1
    history = daemon.control("why", name=name)["history"]
    assert any(one["event"] == "worker_died" and words in one["message"] for one in history)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("exit", "died during load: exited with code 3"),
        ("segv", "died during load: killed by SIGSEGV"),
        ("ill", "died during load: killed by SIGILL"),
        ("raise", "fault on order"),
        ("memory_error", "not enough memory"),
        ("hang", "load took longer than 1 s"),
        ("spin", "load took longer than 1 s"),
    ],
)
def test_each_failure_at_load_is_an_answer_with_its_reason(daemon, action, words):
    name = f"load-{action}"
    with pytest.raises(ModelError) as caught:
        daemon.add(name, options=fault(action, at="load", exit_code=3))
    assert words in str(caught.value)
    assert not [w for w in daemon.control("ps")["workers"] if w["model"] == name]
    assert words in str(daemon.control("why", name=name)["history"])


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("ill-at-import", "ill-at-import library died at import: killed by SIGILL"),
        ("raises-at-import", "AttributeError: _ARRAY_API not found"),
    ],
)
def test_a_library_that_fails_at_import_is_a_diagnosis_and_no_outage(daemon, backend, words):
    daemon.add("neighbour")
    fds = None
    for _ in range(4):
        with pytest.raises(BackendError) as caught:
            daemon.add(backend, backend=backend)
        assert words in str(caught.value)
        fds = fds or daemon.fds()
    until(lambda: daemon.fds() <= fds, f"{fds} descriptors, {daemon.descriptors()}")
    died = daemon.events("template_died", backend=backend)
    assert len(died) >= 4 and words in died[-1]["message"]
    assert daemon.infer("neighbour") == 7.0


def test_a_library_that_hangs_at_import_ends_with_the_models_load_time(daemon):
    daemon.add("neighbour-of-hang")
    with pytest.raises(ModelError) as caught:
        daemon.add("import-hang", backend="hangs-at-import")
    assert "import took longer than 1 s" in str(caught.value)
    assert daemon.infer("neighbour-of-hang") == 7.0


def test_a_template_that_died_is_made_anew_for_the_next_load(make_daemon, tmp_path):
    environment = {"EDGE_TEST_DIES_ONCE": str(tmp_path / "flag")}
    daemon = make_daemon(odd_backends=True, environment=environment).start()
    with pytest.raises(BackendError, match="SIGSEGV"):
        daemon.add("twice", backend="dies-once")
    assert daemon.control("activate", name="twice", version=1)["version"] == 1
    assert daemon.infer("twice") == 7.0


def test_a_template_killed_while_idle_costs_the_running_workers_nothing(make_daemon):
    daemon = make_daemon().start()
    daemon.add("stays", 1)
    template = daemon.control("ps")["templates"][0]
    worker = daemon.worker("stays")["pid"]
    os.kill(template["pid"], signal.SIGKILL)
    until(lambda: daemon.events("template_died"))
    assert daemon.infer("stays") == 7.0 and daemon.worker("stays")["pid"] == worker
    daemon.add("stays", 2, scale=3.0)
    assert daemon.infer("stays") == 10.0
    os.kill(daemon.worker("stays")["pid"], signal.SIGKILL)
    assert daemon.infer("stays") == 10.0


@pytest.mark.parametrize("name", ["careless", "careless-runner"])
def test_a_foreign_exception_in_a_run_is_an_error_answer_and_no_death(daemon, name):
    daemon.add(name, backend="careless")
    with daemon.impatient() as client:
        with pytest.raises(InternalError, match="ZeroDivisionError: thirteen"):
            client.infer(name, {"x": filled(13)})
        assert client.infer(name, {"x": filled(3)})["y"][0, 0] == 7.0
    assert daemon.worker(name)["restarts"] == 0


def test_an_error_that_the_model_raises_is_the_answer_and_no_death(daemon):
    daemon.add("raises", options=fault("raise", on_value=TRIGGER))
    with daemon.impatient() as client:
        with pytest.raises(BackendError, match="fault on order"):
            client.infer("raises", {"x": filled(TRIGGER)})
        assert client.infer("raises", {"x": filled(3)})["y"][0, 0] == 7.0
    assert daemon.worker("raises")["errors"] == 1


# --- memory ---------------------------------------------------------------------------------------


def test_a_load_over_the_memory_limit_of_its_model_is_refused_with_the_limit(daemon):
    with pytest.raises(BackendError) as caught:
        daemon.add("lean-load", options=fault("allocate", at="load", size_mb=200))
    assert "not enough memory" in str(caught.value) and str(64 * MIB) in str(caught.value)


def test_a_run_over_the_memory_limit_is_refused_and_the_next_one_served(daemon):
    daemon.add("lean-run", options=fault("allocate", on_value=TRIGGER, size_mb=200))
    with daemon.impatient() as client:
        with pytest.raises(OverloadedError, match="not enough memory"):
            client.infer("lean-run", {"x": filled(TRIGGER)})
        assert client.infer("lean-run", {"x": filled(3)})["y"][0, 0] == 7.0


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup with a limit; skips where this machine lets us make none."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a memory cgroup")
    v1 = Path("/sys/fs/cgroup/memory")
    parent, knob = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v1.parent, "memory.max")
    group = parent / f"edge-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / knob).write_text(str(limit_bytes))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        until(lambda: _removed(group), "the cgroup's removal")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False  # its last process is still ending
    return True


@pytest.mark.root
def test_an_out_of_memory_kill_is_told_from_any_other_and_takes_the_worker_only(make_daemon):
    with memory_cgroup(300 * MIB) as group:
        daemon = make_daemon({"workers": {"restart": QUICK_RESTART}})
        daemon.start(enter=lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None)
        daemon.add("greedy", options=fault("allocate", on_value=TRIGGER, size_mb=600))
        trigger(daemon, "greedy")
        assert daemon.infer("greedy") == 7.0
        death = daemon.events("worker_died", model="greedy")[-1]
        assert death["fields"]["cause"] == "out_of_memory"
        assert "killed by the kernel: out of memory" in death["message"]
        # A kill -9 that has nothing to do with memory is not blamed on the one above.
        time.sleep(5.5)  # what the supervisor looks back; there is no event to wait for
        os.kill(daemon.worker("greedy")["pid"], signal.SIGKILL)
        until(lambda: len(daemon.events("worker_died", model="greedy")) == 2)
        assert daemon.events("worker_died", model="greedy")[-1]["fields"]["cause"] == "signal"
        daemon.stop()


# --- restarts -------------------------------------------------------------------------------------


def test_a_generation_that_keeps_dying_gives_way_to_the_previous_one_for_good(make_daemon):
    daemon = make_daemon({"workers": {"restart": QUICK_RESTART}}).start()
    daemon.add("flaky", 1, scale=1.0)
    daemon.add("flaky", 2, options=fault("segv", on_value=TRIGGER))
    for death in range(3):
        until(lambda: daemon.ready("flaky"))
        trigger(daemon, "flaky")
        until(lambda count=death + 1: len(daemon.events("worker_died", model="flaky")) == count)
    until(lambda: daemon.events("fell_back", model="flaky"))
    assert daemon.infer("flaky") == 4.0
    why = daemon.control("why", name="flaky")
    assert why["model"]["active"]["version"] == 1
    assert "died 3 times" in why["summary"] and "SIGSEGV" in why["summary"]
    daemon.stop()
    daemon.start()
    until(lambda: daemon.ready("flaky"))
    assert daemon.infer("flaky") == 4.0 and daemon.model("flaky")["active"]["version"] == 1


def test_without_a_previous_generation_it_keeps_trying_with_growing_pauses(daemon):
    daemon.add("stubborn", options=fault("exit", on_value=TRIGGER))
    for death in range(6):
        until(lambda: daemon.worker("stubborn"))
        trigger(daemon, "stubborn")
        until(lambda count=death + 1: len(daemon.events("worker_died", model="stubborn")) == count)
    assert daemon.infer("stubborn") == 7.0
    died = [one["monotonic_ns"] for one in daemon.events("worker_died", model="stubborn")]
    back = [one["monotonic_ns"] for one in daemon.events("worker_ready", model="stubborn")][1:]
    pauses_s = [(end - begin) / 1e9 for begin, end in zip(died, back, strict=True)]
    print("pauses after deaths:", " ".join(f"{pause:.3f}" for pause in pauses_s), "s")
    for pause_s, least_s in zip(pauses_s, [0, 0.02, 0.04, 0.08, 0.16, 0.3], strict=True):
        assert least_s <= pause_s < least_s + 1.0
    assert daemon.worker("stubborn")["restarts"] == 6


def test_a_model_that_cannot_be_loaded_any_more_says_so_and_is_tried_again(daemon):
    daemon.add("rotten")
    spec = daemon.control("models")  # the artifact's blob is the one file that holds this document
    assert spec
    blobs = [
        path
        for path in daemon.state_dir.rglob("*")
        if path.is_file() and b'"offset": 1.0' in path.read_bytes()
    ]
    assert len(blobs) == 1  # content-addressed: every model of this shape shares it
    with damaged(blobs[0]):
        os.kill(daemon.worker("rotten")["pid"], signal.SIGKILL)
        until(lambda: daemon.model("rotten")["state"] == "failed")
        assert "changed on disk" in daemon.model("rotten")["reason"]
        with daemon.impatient() as client, pytest.raises(UnavailableError):
            client.infer("rotten", {"x": filled(3)})
    assert daemon.infer("rotten") == 7.0


@pytest.fixture
def slow_restart(make_daemon) -> tuple[Daemon, float]:
    """A daemon whose model is being restarted, and how long that takes, in seconds."""
    load_s = 1.2
    daemon = make_daemon().start()
    daemon.add("slow", 1, scale=1.0)
    daemon.add("slow", 2, options={"load_ms": load_s * 1000})
    os.kill(daemon.worker("slow")["pid"], signal.SIGKILL)
    until(lambda: daemon.model("slow")["state"] == "loading")
    return daemon, load_s


def test_a_rollback_does_not_wait_for_a_slow_restart(slow_restart):
    daemon, load_s = slow_restart
    began_s = time.monotonic()
    assert daemon.control("rollback", name="slow")["version"] == 1
    assert time.monotonic() - began_s < load_s / 2
    assert daemon.infer("slow") == 4.0
    assert daemon.model("slow")["loading"] is None


def test_an_unload_does_not_wait_for_a_slow_restart(slow_restart):
    daemon, load_s = slow_restart
    began_s = time.monotonic()
    daemon.control("unload", name="slow")
    assert time.monotonic() - began_s < load_s / 2
    assert daemon.model("slow")["state"] == "stopped"
    until(lambda: not [w for w in daemon.control("ps")["workers"] if w["model"] == "slow"])


def test_a_command_that_fails_lets_the_restart_go_on(slow_restart):
    daemon, _ = slow_restart
    with pytest.raises(ModelError):
        daemon.add("slow", 3, golden_off=1.0)
    assert daemon.infer("slow") == 7.0 and daemon.model("slow")["active"]["version"] == 2


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """The file with other bytes, and with its own again afterwards."""
    mode, data = path.stat().st_mode, path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data.replace(b"1.0", b"9.0"))
    try:
        yield
    finally:
        path.write_bytes(data)
        path.chmod(mode)


# --- two hundred kills ----------------------------------------------------------------------------

KILLS = 200


class Traffic:
    """Clients in threads that check every answer and count."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon, self.name = daemon, name
        self.failures: list[BaseException] = []
        self.answers = dict.fromkeys(("single", "pipelined", "large", "impatient"), 0)
        self.lost = 0
        self.done = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,))
            for work in (self._single, self._pipelined, self._large, self._impatient)
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _guarded(self, work) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - reported by the test, whatever it was
            self.failures.append(error)

    def _single(self) -> None:
        with self.daemon.client(timeout_s=20) as client:
            while not self.done.is_set():
                value = float(self.answers["single"] % 50)
                y = client.infer(self.name, {"x": filled(value)})["y"]
                assert (y == 2 * value + 1).all()
                self.answers["single"] += 1
                time.sleep(0.001)  # leaves the two processors to the others, too

    def _pipelined(self) -> None:
        with self.daemon.client(timeout_s=20) as client:
            while not self.done.is_set():
                values = [float(n) for n in range(100)]
                inputs = ({"x": filled(value)} for value in values)
                outputs = client.infer_many(self.name, inputs, window=8)
                for value, output in zip(values, outputs, strict=True):
                    assert (output["y"] == 2 * value + 1).all()
                    self.answers["pipelined"] += 1
                time.sleep(0.005)

    def _large(self) -> None:
        with self.daemon.client(timeout_s=20) as client:
            x = client.tensor((4000, 16), np.float32)
            while not self.done.is_set():
                x[...] = self.answers["large"] % 50
                y = client.infer(self.name, {"x": x})["y"]
                assert (y == 2 * (self.answers["large"] % 50) + 1).all()
                self.answers["large"] += 1
                time.sleep(0.002)

    def _impatient(self) -> None:
        while not self.done.is_set():
            with self.daemon.impatient(timeout_s=20) as client:
                try:
                    while not self.done.is_set():
                        assert client.infer(self.name, {"x": filled(3)})["y"][0, 0] == 7.0
                        self.answers["impatient"] += 1
                        time.sleep(0.001)
                except ConnectionClosedError:
                    self.lost += 1
                except UnavailableError:
                    time.sleep(0.005)


def test_two_hundred_kills_under_traffic_cost_requests_in_flight_only(make_daemon, record_property):
    restart = {"backoff_initial_s": 0, "backoff_max_s": 0, "deaths_max": 1000, "window_s": 5}
    daemon = make_daemon({"workers": {"restart": restart}}).start()
    daemon.add("victim")
    rng = random.Random(20240607)
    traffic = Traffic(daemon, "victim")
    fds = rss = 0
    began_s = time.monotonic()
    for kill in range(KILLS):
        pid = until(lambda: daemon.worker("victim").get("pid"))
        if kill == 40:
            fds, rss = daemon.fds(), daemon.rss_bytes()
        time.sleep(rng.random() * 0.02)  # the random moment
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until(lambda old=pid: daemon.worker("victim").get("pid") != old)
    elapsed_s = time.monotonic() - began_s
    until(lambda: daemon.worker("victim"))
    before = dict(traffic.answers)
    until(lambda: all(traffic.answers[k] > before[k] for k in before))
    traffic.finish()
    grown = daemon.rss_bytes() - rss
    print(
        f"{KILLS} kills in {elapsed_s:.1f} s; answers {traffic.answers}; the client that does not"
        f" retry lost {traffic.lost}; daemon grew {grown} bytes in {KILLS - 40} kills"
    )
    record_property("points", ("kills of a worker under traffic", KILLS))
    assert not traffic.failures, traffic.failures[0]
    # A request may also be lost between a kill and its discovery, on a second connection.
    assert traffic.lost <= 2 * KILLS
    deaths = daemon.events("worker_died", model="victim")
    assert len(deaths) == KILLS
    assert {one["fields"]["cause"] for one in deaths} == {"signal"}
    assert daemon.fds() <= fds + 4, daemon.descriptors()  # a connection may wait at this moment
    assert grown < MIB
    assert daemon.worker("victim")["restarts"] == KILLS


def test_a_worker_killed_while_it_loads_is_an_error_answer(daemon):
    path = bundle(daemon.bundles, "killed-loading", options={"load_ms": 5000})
    caught: list[EdgeError] = []

    def install() -> None:
        try:
            daemon.install(path)
        except EdgeError as error:
            caught.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    pid = until(lambda: loading_pid("edge:killed-loa"))
    os.kill(pid, signal.SIGKILL)
    thread.join(10)
    assert re.search("died during (fork|load): killed by SIGKILL", str(caught[0]))


def loading_pid(name: str) -> int:
    """The process of that name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text().strip() == name:
                    return int(entry.name)
    return 0
