"""A real daemon with too little memory: who sleeps, who wakes, who goes, and what clients see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    ModelError,
    NoMemoryError,
    OverloadedError,
    UnavailableError,
)
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind
from tests.daemon.test_regions import add_frame, infer_region, memfd
from tests.daemon.world import (
    QUICK_RESTART,
    Daemon,
    RawConnection,
    bundle,
    fault,
    filled,
    infer_frame,
    running,
    until,
)

MB = 1_000_000
KEEP_S = 0.2
LOAD_MS = 1000.0  # of a slow model: what comes in between comes well before
Maker = Callable[..., Daemon]


def sized(size_mb: int, **more: Any) -> dict[str, Any]:
    """Options of a model that takes so much memory, and some 6 MB for its worker."""
    return {**fault("allocate", at="load", size_mb=size_mb), **more}


def budget(size_mb: int, **more: Any) -> dict[str, Any]:
    return {"memory": {"budget_bytes": size_mb * MB}, "workers": {"restart": QUICK_RESTART}, **more}


@pytest.fixture(scope="module")
def sleepy() -> Iterator[Daemon]:
    """A daemon whose models sleep soon. `slow*` load slowly."""
    workers = {"keep_alive_s": KEEP_S, "restart": QUICK_RESTART}
    with running({"workers": workers}) as daemon:
        daemon.add("quick", options=sized(20))
        daemon.add("slow", options={"load_ms": LOAD_MS})
        yield daemon


def state(daemon: Daemon, name: str) -> str:
    return str(daemon.model(name)["state"])


def asleep(daemon: Daemon, *names: str) -> None:
    for name in names:
        until(lambda name=name: state(daemon, name) == "idle", f"{name} asleep")


def loads(daemon: Daemon, name: str) -> int:
    return len(daemon.events("worker_ready", model=name))


def ready_frame(name: str) -> bytes:
    header = messages.encode_header(messages.ModelRef(name))
    return messages.encode_frame(Kind.MODEL_READY, header, request_id=7)


def soon_ns(seconds: float) -> int:
    return time.monotonic_ns() + round(seconds * 1e9)


# --- asleep and awake -----------------------------------------------------------------------------


def test_a_model_that_nobody_asks_gives_its_memory_back_and_says_so(sleepy):
    sleepy.infer("quick")
    assert sleepy.worker("quick")["private_bytes"] > 20 * MB
    asleep(sleepy, "quick")
    until(lambda: not sleepy.worker("quick"))
    event = until(lambda: sleepy.events("model_idle", model="quick"))[-1]
    assert event["fields"]["freed_bytes"] > 20 * MB
    why = sleepy.control("why", name="quick")
    assert why["summary"] == f"version 1 is idle: not asked for {KEEP_S:g} s"
    assert any(one["event"] == "model_idle" for one in why["history"])


def test_a_request_wakes_a_model_and_is_answered_within_its_deadline(sleepy):
    asleep(sleepy, "quick")
    with sleepy.raw() as raw:
        raw.send(infer_frame("quick", deadline_ns=soon_ns(5)))
        assert raw.value() == ("1", 7.0, 1)
    assert sleepy.model("quick")["reason"] == "asked for again"
    assert not sleepy.events("worker_died")


def test_whether_a_sleeping_model_is_ready_is_answered_without_waking_it(sleepy):
    asleep(sleepy, "slow")
    before = loads(sleepy, "slow")
    with sleepy.raw() as raw:
        answer = raw.ask(ready_frame("slow"))
        assert messages.decode_document(answer.header)["ready"] is True
        assert sleepy.control("models") and state(sleepy, "slow") == "idle"
    assert loads(sleepy, "slow") == before


def test_an_old_connection_keeps_its_regions_and_its_order_over_a_sleep(sleepy):
    with sleepy.raw() as raw:
        fd = memfd()
        answer = raw.ask(add_frame(1, 4096, "quick"), [fd])
        assert answer.prefix.kind == Kind.REGION_ADD | frames.RESPONSE
        asleep(sleepy, "quick")
        raw.send(
            infer_region("quick", input_at=(1, 0))
            + b"".join(infer_frame("quick", n, request_id=n) for n in range(2, 40))
        )
        assert raw.value() == ("1", 1.0, 1)
        assert [raw.value()[1:] for _ in range(2, 40)] == [(2 * n + 1, n) for n in range(2, 40)]


def test_many_who_ask_at_once_wake_it_once(sleepy):
    asleep(sleepy, "slow")
    before = loads(sleepy, "slow")
    waiting = [sleepy.raw() for _ in range(20)]
    for raw in waiting:
        raw.send(infer_frame("slow") * 2)
    for raw in waiting:
        with raw:
            assert raw.value()[1] == raw.value()[1] == 7.0
    assert loads(sleepy, "slow") == before + 1


def test_a_deadline_shorter_than_the_load_is_told_in_time_and_the_connection_goes_on(sleepy):
    asleep(sleepy, "slow")
    before = loads(sleepy, "slow")
    with sleepy.raw() as raw:
        began_s = time.monotonic()
        raw.send(infer_frame("slow", deadline_ns=soon_ns(0.1)) + infer_frame("slow", request_id=2))
        assert isinstance(raw.error(), DeadlineError)
        assert time.monotonic() - began_s > 0.09 and loads(sleepy, "slow") == before
        assert raw.value()[1:] == (7.0, 2)


def test_a_request_that_is_late_already_wakes_nobody(sleepy):
    asleep(sleepy, "slow")
    with sleepy.raw() as raw:
        raw.send(infer_frame("slow", deadline_ns=time.monotonic_ns() - 1))
        assert isinstance(raw.error(), DeadlineError)
        assert state(sleepy, "slow") == "idle"


def test_a_client_that_leaves_while_it_waits_is_dropped_at_once(sleepy):
    asleep(sleepy, "slow")
    before = loads(sleepy, "slow")
    with sleepy.raw() as raw:
        raw.send(infer_frame("slow", rows=2000))
        until(lambda: sleepy.control("ps")["daemon"]["waiting"] == 1)
    until(lambda: sleepy.control("ps")["daemon"]["waiting"] == 0)
    assert loads(sleepy, "slow") == before
    until(lambda: sleepy.ready("slow"))


def test_a_model_that_runs_for_longer_than_it_is_kept_is_in_use(sleepy):
    sleepy.add("long", options={"run_ms": 550.0})
    with ThreadPoolExecutor() as pool:
        running = pool.submit(sleepy.infer, "long")
        until(lambda: sleepy.worker("long").get("connections") == 1)
        while not running.done():
            assert state(sleepy, "long") == "ready" or running.done()
        assert running.result() == 7.0


def test_the_previous_version_does_not_stay_when_the_active_one_sleeps(sleepy):
    sleepy.add("pair", 1, scale=1.0)
    sleepy.add("pair", 2)
    asleep(sleepy, "pair")
    until(lambda: not sleepy.worker("pair", "warm"))
    assert sleepy.control("rollback", name="pair")["version"] == 1
    assert sleepy.infer("pair") == 4.0


def test_a_sleeping_model_that_does_not_load_any_more_is_failed_and_clients_are_told(sleepy):
    sleepy.add("broken", scale=5.5)
    asleep(sleepy, "broken")
    for path in (sleepy.state_dir / "blobs").rglob("*"):
        if path.is_file() and b'"scale": 5.5' in path.read_bytes():
            path.unlink()
    with sleepy.impatient() as client:
        with pytest.raises(UnavailableError, match="broken is not ready"):
            client.infer("broken", {"x": filled(3)})
        assert client.infer("quick", {"x": filled(3)})["y"][0, 0] == 7.0
    assert until(lambda: state(sleepy, "broken") == "failed")
    assert sleepy.events("model_failed", model="broken")
    sleepy.control("unload", name="broken")


# --- commands that come in between ----------------------------------------------------------------


def waiting_client(daemon: Daemon, name: str) -> RawConnection:
    """A client whose request waits for a model that is being loaded."""
    asleep(daemon, name)
    raw = daemon.raw()
    raw.send(infer_frame(name))
    until(lambda: state(daemon, name) == "loading")
    return raw


def test_an_unload_does_not_wait_for_a_model_that_wakes(sleepy):
    before = loads(sleepy, "slow")
    with waiting_client(sleepy, "slow") as raw:
        sleepy.control("unload", name="slow")
        assert isinstance(raw.error(), UnavailableError)
        assert loads(sleepy, "slow") == before
        assert state(sleepy, "slow") == "stopped"
    sleepy.control("activate", name="slow", version=1)


def test_activate_and_rollback_supersede_a_model_that_wakes(sleepy):
    sleepy.add("turn", 1, scale=1.0)
    sleepy.add("turn", 2, options={"load_ms": LOAD_MS})
    for command, arguments in (("rollback", {}), ("activate", {"version": 1})):
        if command == "activate":
            sleepy.control("activate", name="turn", version=2)
        slow_loads = len(sleepy.events("worker_ready", model="turn", version=2))
        with waiting_client(sleepy, "turn") as raw:
            assert sleepy.control(command, name="turn", **arguments)["version"] == 1
            assert len(sleepy.events("worker_ready", model="turn", version=2)) == slow_loads
            assert isinstance(raw.error(), UnavailableError)
            raw.send(infer_frame("turn", request_id=2))
            assert raw.value() == ("1", 4.0, 2)


def test_a_failed_activation_leaves_a_sleeping_model_asleep_and_one_that_wakes_waking(sleepy):
    sleepy.add("calm", 1, options={"load_ms": LOAD_MS})
    asleep(sleepy, "calm")
    with pytest.raises(EdgeError, match="fault on order"):
        sleepy.add("calm", 2, options=fault("raise", at="load"))
    assert state(sleepy, "calm") == "idle"
    with waiting_client(sleepy, "calm"):
        with pytest.raises(EdgeError, match="fault on order"):
            sleepy.control("activate", name="calm", version=2)
        until(lambda: sleepy.ready("calm"))
    assert sleepy.infer("calm") == 7.0


def test_sigterm_while_models_wake_and_sleep_ends_in_time(make_daemon):
    daemon = make_daemon(
        budget(50, models={"slow": {"keep_alive_s": KEEP_S}}),
    ).start()
    daemon.add("busy", options=sized(20, run_ms=300.0))
    daemon.add("slow", options={"load_ms": 1000.0})
    asleep(daemon, "slow")
    with daemon.raw() as answered, daemon.raw() as dropped:
        answered.send(infer_frame("busy"))
        until(lambda: daemon.worker("busy")["connections"] == 1)
        dropped.send(infer_frame("slow"))
        until(lambda: state(daemon, "slow") == "loading")
        daemon.stop(timeout_s=10)
        assert answered.value()[1] == 7.0
        assert isinstance(dropped.error(), UnavailableError) and dropped.is_closed()


def test_a_model_that_makes_room_answers_what_it_has_first(make_daemon):
    daemon = make_daemon(budget(40)).start()
    daemon.add("first", options=sized(20, run_ms=300.0))
    with daemon.raw() as raw, ThreadPoolExecutor() as pool:
        raw.send(infer_frame("first"))
        until(lambda: daemon.worker("first")["connections"] == 1)
        second = pool.submit(daemon.add, "second", options=sized(20))
        asleep(daemon, "first")  # but its run goes on
        daemon.control("unload", name="first")
        assert raw.value()[1] == 7.0
        second.result()
    assert (state(daemon, "first"), state(daemon, "second")) == ("stopped", "ready")
    assert not daemon.events("worker_died")


# --- who goes, who is refused ---------------------------------------------------------------------


def test_warm_versions_go_first_then_the_model_asked_for_least_recently(make_daemon):
    daemon = make_daemon(budget(85)).start()
    daemon.add("a", 1, options=sized(20))
    daemon.add("a", 2, options=sized(20))
    daemon.add("b", options=sized(20))
    assert daemon.worker("a", "warm")
    daemon.add("c", options=sized(20))
    assert not daemon.worker("a", "warm")
    assert daemon.events("previous_unloaded", model="a")
    for name in "cab":
        assert daemon.infer(name) == 7.0
        time.sleep(0.3)  # use is noted by a look every 0.25 s; there is no event to wait for
    daemon.add("d", options=sized(20))
    assert [state(daemon, name) for name in "abcd"] == ["ready", "ready", "idle", "ready"]
    assert daemon.control("why", name="c")["summary"] == "version 1 is idle: made room for d"
    assert daemon.infer("c") == 7.0
    assert [state(daemon, name) for name in "abcd"] == ["idle", "ready", "ready", "ready"]


def test_a_version_without_room_is_refused_and_the_old_one_serves(make_daemon):
    daemon = make_daemon(budget(60)).start()
    daemon.add("model", 1, options=sized(20), scale=1.0)
    for step in ("unexpectedly", "as it was measured"):
        with pytest.raises(NoMemoryError, match="no room in memory: with model") as refused:
            daemon.install(bundle(daemon.bundles, "model", 2, options=sized(40)))
        assert refused.value.code == "no_memory", step
        assert refused.value.expected == f"<= {60 * MB} bytes (memory.budget_bytes)"
        assert (refused.value.retry_after_s, refused.value.where) == (1.0, "model")
    with daemon.raw() as raw:
        assert raw.ask(infer_frame("model")) and state(daemon, "model") == "ready"
    assert daemon.infer("model") == 4.0
    assert daemon.model("model")["restarts"] == 0
    assert not daemon.events("worker_died") and not daemon.events("fell_back")


def test_a_version_that_takes_more_than_its_bundle_states_is_refused_and_the_old_one_serves(
    make_daemon,
):
    daemon = make_daemon().start()
    daemon.add("model", 1, options=sized(20), memory_bytes=60 * MB, scale=1.0)
    with pytest.raises(ModelError, match=r"takes \d+ bytes of memory") as refused:
        daemon.add("model", 2, options=sized(20), memory_bytes=15 * MB)
    assert refused.value.expected == f"<= {15 * MB} bytes (model.yaml: budgets.memory_bytes)"
    assert daemon.infer("model") == 4.0
    assert not daemon.events("worker_died")


def test_what_does_not_fit_at_a_start_waits_until_it_is_asked_for(make_daemon):
    daemon = make_daemon(budget(200)).start()
    for name in "abc":
        daemon.add(name, options=sized(20))
    daemon.stop()
    again = make_daemon(budget(65), state_dir=daemon.state_dir).start()
    until(lambda: "loading" not in {one["state"] for one in again.control("models")["models"]})
    states = {name: state(again, name) for name in "abc"}
    assert sorted(states.values()) == ["idle", "ready", "ready"]
    late = next(name for name, one in states.items() if one == "idle")
    assert "no room in memory" in again.model(late)["reason"]
    assert again.infer(late) == 7.0
    assert sorted(state(again, name) for name in "abc") == ["idle", "ready", "ready"]


def test_a_model_that_never_fits_is_refused_at_once_tried_seldom_and_no_failure(make_daemon):
    daemon = make_daemon(budget(200)).start()
    daemon.add("big", options=sized(70))
    daemon.stop()
    again = make_daemon(budget(65), state_dir=daemon.state_dir).start()
    asleep(again, "big")
    attempts = len(again.events("variant_refused", model="big"))
    with again.impatient() as client:
        for _ in range(20):
            with pytest.raises(NoMemoryError, match="no room in memory: with big"):
                client.infer("big", {"x": filled(3)})
    assert len(again.events("variant_refused", model="big")) <= attempts + 2
    assert (state(again, "big"), again.model("big")["restarts"]) == ("idle", 0)
    assert not again.events("worker_died")


def test_two_models_that_fit_one_at_a_time_are_both_served(make_daemon):
    daemon = make_daemon(budget(40)).start()
    for name, scale in (("a", 1.0), ("b", 2.0)):
        daemon.add(name, options=sized(20), scale=scale)

    def ask(name: str) -> list[float]:
        with daemon.impatient() as client:
            return [float(client.infer(name, {"x": filled(3)})["y"][0, 0]) for _ in range(200)]

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, name) for name in "aabb"]
        a, _, b, _ = (one.result(timeout=30) for one in answers)
    assert set(a) == {4.0} and set(b) == {7.0}
    assert not daemon.events("worker_died")


def test_two_changes_that_wait_for_each_others_room_are_refused_and_not_stuck(make_daemon):
    daemon = make_daemon(budget(70)).start()
    paths = {}
    for name in "ab":
        daemon.add(name, 1, options=sized(20), scale=1.0)
        paths[name] = bundle(daemon.bundles, name, 2, options=sized(40), memory_bytes=55 * MB)
    until(lambda: daemon.control("models"))
    began_s = time.monotonic()
    with ThreadPoolExecutor() as pool:
        changes = [pool.submit(daemon.install, paths[name]) for name in "ab"]
        refused = [one.exception(timeout=15) for one in changes]
    assert time.monotonic() - began_s < 5
    assert any(isinstance(one, NoMemoryError) for one in refused), refused
    assert daemon.infer("a") in (4.0, 7.0) and daemon.infer("b") in (4.0, 7.0)


def test_what_is_promised_to_a_load_is_not_promised_to_another(make_daemon):
    daemon = make_daemon(budget(80)).start()
    slow = sized(20, load_ms=400.0)
    paths = [
        bundle(daemon.bundles, name, options=slow, memory_bytes=50 * MB) for name in ("a", "b")
    ]
    with ThreadPoolExecutor() as pool:
        installs = [pool.submit(daemon.install, path) for path in paths]
        while not all(one.done() for one in installs):
            at_it = [one["name"] for one in daemon.control("models")["models"] if one["loading"]]
            assert len(at_it) < 2
        assert [one.result()["activated"] for one in installs] == [True, True]
    assert sorted(state(daemon, name) for name in "ab") == ["ready", "ready"]


def test_clients_that_wait_for_a_model_count_as_connections(make_daemon):
    limits = {"connections_max": 4}
    workers = {"keep_alive_s": KEEP_S}
    daemon = make_daemon({"limits": limits, "workers": workers}).start()
    daemon.add("slow", options={"load_ms": LOAD_MS})
    asleep(daemon, "slow")
    waiting = [daemon.raw() for _ in range(4)]
    for raw in waiting:
        raw.send(infer_frame("slow"))
    until(lambda: daemon.control("ps")["daemon"]["waiting"] == 4)
    with daemon.raw() as fifth:
        assert isinstance(fifth.error(), OverloadedError)
    for raw in waiting:
        with raw:
            assert raw.value()[1] == 7.0


def test_a_hundred_sleeps_leave_no_descriptor_and_no_memory(make_daemon):
    # A short history, full before the measurement: what `why` remembers is no leak.
    config = {"workers": {"keep_alive_s": 0.01}, "limits": {"history_events_max": 50}}
    daemon = make_daemon(config).start()
    names = [f"m{n}" for n in range(10)]
    for name in names:
        daemon.add(name)

    def cycle() -> None:
        with daemon.client() as client:
            for name in names:
                client.infer(name, {"x": filled(3)})
        until(lambda: not daemon.control("ps")["workers"])

    def all_gone() -> bool:
        return len(daemon.events("worker_stopped")) == len(daemon.events("worker_ready"))

    # The allocator's heap finds its size: 1 MB in the first 250 sleeps, another in the next 250,
    # and then half a kilobyte a sleep over a thousand (measured).
    for _ in range(10):
        cycle()
    until(all_gone)
    fds, rss = daemon.fds(), daemon.rss_bytes()
    for _ in range(10):
        cycle()
    until(all_gone)
    assert len(daemon.events("model_idle")) >= 100
    until(lambda: daemon.fds() <= fds, f"{fds} descriptors: {daemon.descriptors()}")
    assert daemon.rss_bytes() - rss < 1.5 * MB
