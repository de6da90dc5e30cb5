"""Candidates beside a real daemon's versions: compared, dying, hanging, slow, promoted, stopped."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from edge_runtime.errors import ConflictError, EdgeError, NotFoundError, RequestError
from tests.daemon.test_swap import Client, Pipelined, Shared, Single
from tests.daemon.world import QUICK_RESTART, Daemon, bundle, fault, filled, running, until
from tests.metrics import parser


@pytest.fixture(scope="module")
def daemon():
    with running({"workers": {"restart": QUICK_RESTART}}) as started:
        yield started


def place(daemon: Daemon, name: str, version: int, **given) -> None:
    """Install a version without activating it."""
    daemon.install(bundle(daemon.bundles, name, version, **given), activate=False)


def ask(daemon: Daemon, name: str, count: int, rows: int = 1) -> dict[str, int]:
    """So many requests on one connection; how many each version answered."""
    versions: dict[str, int] = {}
    with daemon.impatient() as client:
        for index in range(count):
            x = filled(float(index % 50), rows)
            x[:, 0] += 1  # the classes differ
            result = client.infer_result(name, {"x": x})
            versions[result.model_version] = versions.get(result.model_version, 0) + 1
    return versions


def compared(daemon: Daemon, name: str, count: int = 1) -> dict:
    """The report, when so many samples are through."""

    def looked_at():
        report = daemon.control("shadow", name=name)
        shadow = report["shadow"]
        done = shadow["compared"] + shadow["errors"] >= count and not shadow["waiting"]
        return report if done else None

    return until(looked_at, f"{count} comparisons")


def test_an_agreeing_candidate_agrees_and_is_promoted(daemon):
    daemon.add("agree", 1)
    place(daemon, "agree", 2)
    begun = daemon.control("shadow", name="agree", version=2)
    assert (begun["state"], begun["shadow_share"], begun["stable"]) == ("running", 1.0, 1)
    assert daemon.model("agree")["candidate"]["version"] == 2
    assert daemon.worker("agree", "candidate")["version"] == 2
    assert ask(daemon, "agree", 200) == {"1": 200}
    shadow = compared(daemon, "agree", 200)["shadow"]
    assert (shadow["seen"], shadow["disagreed"], shadow["errors"]) == (200, 0, 0)
    assert shadow["outputs"]["y"]["top1_agreement"] == 1.0
    assert shadow["stable_run"]["p99_ms"] > 0 and shadow["candidate_run"]["p50_ms"] > 0
    change = daemon.control("promote", name="agree")
    assert (change["version"], change["warm"]) == (2, True)
    assert ask(daemon, "agree", 3) == {"2": 3}
    report = daemon.control("shadow", name="agree")
    assert (report["state"], report["reason"]) == ("ended", "promoted")
    assert report["shadow"]["compared"] == 200  # the numbers stay
    assert daemon.model("agree")["candidate"] is None
    with daemon.client() as client:
        for label, version in (("stable", "2"), ("previous", "1"), ("2", "2")):
            result = client.infer_result("agree", {"x": filled(1)}, version=label)
            assert result.model_version == version
    assert daemon.events("trial_ended", model="agree") or daemon.events("trial_ended")


def test_a_disagreeing_candidate_is_measured_and_stopped(daemon):
    daemon.add("differ", 1, scale=1.0)
    place(daemon, "differ", 2, scale=-1.0)
    daemon.control("shadow", name="differ", version=2)
    assert ask(daemon, "differ", 100) == {"1": 100}
    output = compared(daemon, "differ", 100)["shadow"]["outputs"]["y"]
    assert output["top1_agreement"] == 0 and output["max_abs"] == 100
    report = daemon.control("candidate_stop", name="differ")
    assert (report["state"], report["shadow"]["disagreed"]) == ("ended", 100)
    assert not daemon.worker("differ", "candidate")
    with pytest.raises(ConflictError):
        daemon.control("candidate_stop", name="differ")
    with pytest.raises(ConflictError):
        daemon.control("promote", name="differ")
    assert ask(daemon, "differ", 1) == {"1": 1}


def test_prometheus_is_told_what_the_report_says_while_it_runs_and_afterwards(daemon):
    def told(metric: str, **labels: str) -> float:
        families = parser.parse(daemon.control("metrics")["text"])
        (value,) = families[metric].values(model="told", **labels)
        return value

    daemon.add("told", 1, scale=1.0)
    place(daemon, "told", 2, scale=-1.0)
    daemon.control("shadow", name="told", version=2)
    daemon.control("split", name="told", version=2, share=0.5)
    assert told("edge_trial_running", version="2") == 1
    assert told("edge_worker_info", version="2", state="candidate") == 1
    assert told("edge_worker_info", version="1", state="active") == 1
    by_version = ask(daemon, "told", 60)
    compared(daemon, "told", by_version["1"])
    report = daemon.control("candidate_stop", name="told")
    shadow = report["shadow"]
    wanted = {
        "edge_trial_running": 0,
        "edge_trial_shown_total": by_version["1"] - shadow["dropped"],
        "edge_trial_compared_total": shadow["compared"],
        "edge_trial_disagreed_total": shadow["disagreed"],
        "edge_trial_errors_total": 0,
    }
    assert {name: told(name) for name in wanted} == wanted and shadow["disagreed"] > 10
    assert told("edge_trial_requests_total", outcome="answered") == by_version["2"] > 0
    assert told("edge_trial_dropped_total", reason="full") == shadow["dropped_full"]
    assert told("edge_trial_round_trip_seconds", le="+Inf") == by_version["2"]
    for side in ("stable", "candidate"):
        count = told("edge_trial_run_duration_seconds", side=side, le="+Inf")
        assert count == shadow[f"{side}_run"]["count"] > 0
    assert [told("edge_trial_share", way=way) for way in ("shadow", "split")] == [0, 0]


def test_a_candidate_is_another_installed_version_beside_one_that_serves(daemon):
    with pytest.raises(NotFoundError):
        daemon.control("shadow", name="nobody", version=1)
    place(daemon, "rules", 1)
    with pytest.raises(NotFoundError, match="no candidate"):
        daemon.control("shadow", name="rules")
    with pytest.raises(ConflictError, match="no version serves"):
        daemon.control("shadow", name="rules", version=1)
    daemon.control("activate", name="rules", version=1)
    with pytest.raises(ConflictError, match="it serves"):
        daemon.control("shadow", name="rules", version=1)
    with pytest.raises(NotFoundError):
        daemon.control("shadow", name="rules", version=2)
    place(daemon, "rules", 2)
    place(daemon, "rules", 3)
    for share in (-0.1, 1.1):
        with pytest.raises(RequestError):
            daemon.control("split", name="rules", version=2, share=share)
    daemon.control("shadow", name="rules", version=2, share=0.5)
    both = daemon.control("split", name="rules", version=2, share=0.25)
    assert (both["shadow_share"], both["split_share"]) == (0.5, 0.25)
    with pytest.raises(ConflictError, match="rules@2 is the candidate"):
        daemon.control("shadow", name="rules", version=3)
    with pytest.raises(ConflictError, match="is the candidate"):
        daemon.control("remove", name="rules", version=2)
    daemon.control("candidate_stop", name="rules")


def test_a_candidate_that_fails_its_goldens_is_never_one(daemon):
    daemon.add("golden", 1)
    place(daemon, "golden", 2, golden_off=1.0)
    with pytest.raises(EdgeError, match="golden"):
        daemon.control("shadow", name="golden", version=2)
    assert daemon.model("golden")["candidate"] is None
    assert ask(daemon, "golden", 5) == {"1": 5}


def test_the_previous_version_can_be_the_candidate_and_is_warm_again_after(daemon):
    daemon.add("back", 1)
    daemon.add("back", 2)
    pid = daemon.worker("back", "warm")["pid"]
    daemon.control("shadow", name="back", version=1)
    assert daemon.worker("back", "candidate")["pid"] == pid
    ask(daemon, "back", 10)
    compared(daemon, "back", 10)
    daemon.control("candidate_stop", name="back")
    assert daemon.worker("back", "warm")["pid"] == pid
    assert daemon.control("rollback", name="back")["warm"] is True


def test_a_split_gives_the_candidate_its_share_also_of_large_tensors(daemon):
    daemon.add("split", 1, scale=1.0)
    place(daemon, "split", 2, scale=2.0)
    daemon.control("split", name="split", version=2, share=0.5)
    split = split_among(daemon, "split", Single, Shared)
    assert split["answered"] > 0.5 * split["chosen"] > 100
    daemon.control("candidate_stop", name="split")


def test_who_sends_more_than_the_candidate_can_take_gets_every_answer_once(daemon):
    daemon.add("flood", 1, scale=1.0)
    place(daemon, "flood", 2, scale=2.0)
    daemon.control("split", name="flood", version=2, share=0.5)
    split = split_among(daemon, "flood", Single, Pipelined, Shared)
    assert split["answered"]  # how many depends on who has the processors
    daemon.control("candidate_stop", name="flood")


def split_among(daemon: Daemon, name: str, *kinds: type[Client]) -> dict[str, int]:
    """The figures of a split after such clients had 300 answers each, every one of them right."""
    clients = [kind(daemon, name) for kind in kinds]
    until(lambda: all(sum(one.answers.values()) > 300 or one.failure for one in clients))
    for one in clients:
        one.finish()
        assert one.failure is None and sum(one.answers.values()) == one.asked
        assert set(one.answers) == {"1", "2"} or isinstance(one, Pipelined)
    split: dict[str, int] = daemon.control("split", name=name)["split"]
    assert split["chosen"] == split["answered"] + split["held"] + split["too_slow"]
    assert not split["lost"] + split["refused"]
    return split


def test_the_clients_keys_decide_who_answers(daemon):
    daemon.add("keyed", 1)
    place(daemon, "keyed", 2, scale=5.0)
    daemon.control("split", name="keyed", version=2, share=0.5)
    by_key: dict[str, set[str]] = {}
    for _ in range(3):  # each time on a new connection, with other request ids
        with daemon.client() as client:
            for number in range(24):
                key = f"camera-{number}"
                result = client.infer_result("keyed", {"x": filled(1.0)}, routing_key=key)
                by_key.setdefault(key, set()).add(result.model_version)
    daemon.control("candidate_stop", name="keyed")
    assert all(len(versions) == 1 for versions in by_key.values()), by_key
    assert set.union(*by_key.values()) == {"1", "2"}


@pytest.mark.parametrize("way", ["shadow", "split"])
def test_a_dying_candidate_ends_the_trial_and_nothing_else(daemon, way):
    name = f"dying-{way}"
    daemon.add(name, 1, scale=1.0)
    place(daemon, name, 2, scale=1.0, options=fault("segv", on_value=40.0))
    daemon.control(way, name=name, version=2, share=1.0)
    pid = daemon.worker(name)["pid"]
    client = Single(daemon, name)  # its values go from 1 to 90
    ended = until(lambda: daemon.control(way, name=name)["state"] == "ended" or client.failure)
    assert ended
    before = client.asked
    until(lambda: client.asked > before + 100 or client.failure)
    client.finish()
    assert client.failure is None and sum(client.answers.values()) == client.asked
    report = daemon.control(way, name=name)
    assert "SIGSEGV" in report["reason"]
    assert report["shadow"]["compared"] > 0 or report["split"]["answered"] > 0
    assert daemon.worker(name)["pid"] == pid and not daemon.worker(name, "candidate")
    assert daemon.events("worker_died", version=2, serving=False)
    with pytest.raises(NotFoundError):
        daemon.impatient().infer(name, {"x": filled(1)}, version="candidate")


def test_a_hanging_candidate_is_ended_and_its_requests_are_answered():
    config = {"workers": {"run_time_max_ms": 1500}}
    with running(config) as daemon:
        daemon.add("hang", 1, scale=1.0)
        place(daemon, "hang", 2, scale=2.0, options=fault("hang", on_value=40.0))
        daemon.control("split", name="hang", version=2, share=1.0)
        with daemon.impatient(timeout_s=1.0) as client:
            for value in (1.0, 40.0, 2.0):
                began_s = time.monotonic()
                result = client.infer_result("hang", {"x": filled(value)})
                took_s = time.monotonic() - began_s
                if value == 40.0:  # half of the deadline, then the stable version
                    assert result.model_version == "1" and 0.4 < took_s < 0.9
                elif value == 2.0:  # and nothing waits behind it
                    assert result.model_version == "1" and took_s < 0.4
        split = daemon.control("split", name="hang")["split"]
        assert split["too_slow"] == 1 and split["held"] == 1
        until(lambda: daemon.control("split", name="hang")["state"] == "ended")
        assert "did not return" in daemon.control("split", name="hang")["reason"]


def test_a_slow_candidate_drops_samples_and_delays_nobody(daemon):
    daemon.add("slow", 1, scale=1.0)
    place(daemon, "slow", 2, scale=1.0, options={"run_ms": 20})
    quiet = latencies(daemon, "slow", 400, rows=500)
    daemon.control("shadow", name="slow", version=2)
    shown = latencies(daemon, "slow", 400, rows=500)
    shadow = daemon.control("candidate_stop", name="slow")["shadow"]
    print(f"p50, p99 ms alone {quiet}, with a slow shadow {shown}; dropped {shadow['dropped']}")
    assert shadow["sampled"] == 400
    assert shadow["dropped_full"] > 300  # a sample is 64 KB, the ring 1 MiB
    assert shown[0] < 20  # nobody waited for the candidate's 20 ms


def latencies(daemon: Daemon, name: str, count: int, rows: int) -> tuple[float, float]:
    """p50 and p99 in ms of requests in the frame, one after the other."""
    times = []
    with daemon.impatient(shared_memory_min_bytes=1 << 30) as client:
        x = filled(1.0, rows)
        for _ in range(count):
            began_s = time.perf_counter()
            client.infer(name, {"x": x})
            times.append((time.perf_counter() - began_s) * 1e3)
    p50, p99 = np.percentile(times, [50, 99])
    return round(float(p50), 3), round(float(p99), 3)


def test_large_tensors_are_compared_whole(daemon):
    daemon.add("large", 1, scale=1.0, width=16)
    place(daemon, "large", 2, scale=1.0)
    daemon.control("shadow", name="large", version=2)
    for rows in (1, 1000, 3000):  # in the frame, and in shared memory
        ask(daemon, "large", 5, rows=rows)
    shadow = compared(daemon, "large", 10)["shadow"]
    assert shadow["disagreed"] == 0 and shadow["compared"] == 15 - shadow["dropped"]
    ask(daemon, "large", 2, rows=20_000)  # 2.5 MB: half of the ring is 512 KiB
    assert daemon.control("candidate_stop", name="large")["shadow"]["dropped_large"] == 2


def test_the_serving_worker_may_die_and_its_successor_goes_on_showing(daemon):
    daemon.add("heir", 1, scale=1.0)
    place(daemon, "heir", 2, scale=1.0)
    daemon.control("shadow", name="heir", version=2)
    ask(daemon, "heir", 50)
    compared(daemon, "heir", 50)
    pid = daemon.worker("heir")["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.worker("heir").get("pid", pid) != pid and daemon.ready("heir"))
    ask(daemon, "heir", 50)
    report = compared(daemon, "heir", 100)
    assert report["state"] == "running" and report["shadow"]["compared"] == 100
    daemon.control("candidate_stop", name="heir")


@pytest.mark.parametrize("change", ["activate", "rollback", "unload"])
def test_a_change_of_what_serves_ends_the_trial(daemon, change):
    name = f"change-{change}"
    for version in (1, 2):
        daemon.add(name, version, scale=1.0)
    place(daemon, name, 3, scale=1.0)
    place(daemon, name, 4, scale=1.0)
    daemon.control("shadow", name=name, version=3)
    daemon.control("split", name=name, version=3, share=0.5)
    ask(daemon, name, 20)
    arguments = {"version": 4} if change == "activate" else {}
    daemon.control(change, name=name, **arguments)
    report = daemon.control("shadow", name=name)
    assert report["state"] == "ended" and report["reason"]
    assert not daemon.worker(name, "candidate")
    if change != "unload":
        assert set(ask(daemon, name, 20)) == {"4" if change == "activate" else "1"}


def test_promotions_under_load_lose_nothing_and_leave_nothing(make_daemon):
    daemon = make_daemon().start()
    daemon.add("flow", 1, scale=1.0)
    place(daemon, "flow", 2, scale=2.0)
    clients = [kind(daemon, "flow") for kind in (Single, Pipelined, Shared)]
    fds, rounds = 0, 14
    for turn in range(rounds):
        version = 2 - turn % 2
        daemon.control("shadow", name="flow", version=version, share=1.0)
        daemon.control("split", name="flow", version=version, share=0.5)
        time.sleep(0.05)  # some traffic of each kind
        change = daemon.control("promote", name="flow")
        assert change["version"] == version
        seen = sum(sum(one.answers.values()) for one in clients)
        until(lambda seen=seen: sum(sum(one.answers.values()) for one in clients) > seen + 50)
        if turn == 3:
            fds = daemon.fds()
    for client in clients:
        client.finish()
    failures = [client.failure for client in clients if client.failure]
    assert not failures, failures[0]
    for client in clients:
        assert sum(client.answers.values()) == client.asked
    print({type(one).__name__: one.answers for one in clients}, f"{rounds} promotions")
    until(lambda: daemon.fds() <= fds, f"{fds} descriptors, {daemon.descriptors()}")
    workers = [one for one in daemon.control("ps")["workers"] if one["model"] == "flow"]
    assert sorted(one["state"] for one in workers) == ["active", "warm"]
    for one in workers:
        assert daemon.fds(one["pid"]) < 30
    assert not daemon.events("worker_died") and not daemon.events("drain_timeout")


def test_a_trial_leaves_no_memory_and_no_descriptor(make_daemon):
    daemon = make_daemon().start()
    daemon.add("flat", 1, scale=1.0)
    place(daemon, "flat", 2, scale=1.0)
    seen = []
    for _ in range(12):
        daemon.control("shadow", name="flat", version=2)
        daemon.control("split", name="flat", version=2, share=0.3)
        ask(daemon, "flat", 60, rows=700)
        daemon.control("candidate_stop", name="flat")
        active = daemon.worker("flat")
        seen.append((daemon.fds(), daemon.fds(active["pid"]), active["private_bytes"]))
    print(seen)
    settled = seen[4:]
    assert max(one[0] for one in settled) <= min(one[0] for one in settled) + 8
    assert len({one[1] for one in settled}) <= 2
    assert max(one[2] for one in settled) < settled[0][2] + 2 * 1024 * 1024


def test_threads_that_shadow_and_split_at_once(daemon):
    """Ten commands at a time: each is done or refused, and the model serves."""
    daemon.add("crowd", 1, scale=1.0)
    place(daemon, "crowd", 2, scale=1.0)
    place(daemon, "crowd", 3, scale=1.0)
    failures = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(6):
            version = int(rng.integers(2, 4))
            commands = (
                ("shadow", {"version": version, "share": 0.5}),
                ("split", {"version": version, "share": 0.5}),
                ("candidate_stop", {}),
                ("promote", {}),
                ("activate", {"version": int(rng.integers(1, 4))}),
            )
            command, arguments = commands[int(rng.integers(len(commands)))]
            try:
                daemon.control(command, name="crowd", **arguments)
            except ConflictError:
                pass
            except EdgeError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        ask(daemon, "crowd", 5)
    for thread in threads:
        thread.join(60)
    assert not failures
    assert sum(ask(daemon, "crowd", 20).values()) == 20
    workers = [one for one in daemon.control("ps")["workers"] if one["model"] == "crowd"]
    assert len(workers) <= 3
