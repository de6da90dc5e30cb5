"""A bundle's variants in a real daemon: tried, measured, chosen, and left when they fail.

Law of this file: every variant is the same model on the `reference` backend, told to misbehave.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.cli import status
from edge_runtime.daemon import energy
from edge_runtime.daemon.tryout import SLICE_S_MIN
from edge_runtime.errors import ConnectionClosedError, EdgeError, ModelError, UnavailableError
from tests.daemon.world import QUICK_RESTART, Daemon, fault, filled, running, until

Variants = list[tuple[str, dict[str, Any]]]
SLOW = {"run_ms": 3, "busy": True}
WORKERS = {"restart": QUICK_RESTART | {"variant_deaths_max": 2, "deaths_max": 4}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running({"workers": WORKERS}) as started:
        yield started


def add(daemon: Daemon, name: str, variants: Variants, version: int = 1, **more: Any) -> Any:
    """Install and activate; every variant has the golden x -> 2 x + 1."""
    return daemon.add(name, version, golden_off=0.0, variants=variants, **more)


def decision(daemon: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = daemon.control("why", name=name)["decision"]
    return found


def verdicts(daemon: Daemon, name: str) -> dict[str, str]:
    return {one["variant"]: one["verdict"] for one in decision(daemon, name)["tried"]}


def why(daemon: Daemon, name: str) -> str:
    reply = daemon.control("why", name=name)
    return status.why_text(reply, reply["now_wall_s"], 200)


def serving(daemon: Daemon, name: str) -> str:
    return str(daemon.worker(name).get("variant", ""))


# --- chosen ---------------------------------------------------------------------------------------


def test_the_best_right_variant_serves_and_every_other_has_its_reason(daemon: Daemon) -> None:
    variants = [
        ("slow", SLOW),
        ("wrong", fault("wrong")),
        ("quick", {}),
        ("broken", fault("raise", at="load")),
        ("dying", fault("segv", first_run=20)),
    ]
    assert add(daemon, "zoo", variants)["variant"] == "quick"
    assert daemon.infer("zoo") == 7.0
    assert verdicts(daemon, "zoo") == {
        "slow": "fit",
        "wrong": "wrong",
        "quick": "chosen",
        "broken": "failed",
        "dying": "failed",
    }
    text = why(daemon, "zoo")
    assert "times less run time than slow" in text
    assert "golden 0" in text and "killed by SIGSEGV" in text and "fault on order" in text
    found = decision(daemon, "zoo")
    assert found["order"] == ["quick", "slow"] and found["reference"] == "slow"
    chosen = next(one for one in found["tried"] if one["variant"] == "quick")
    assert chosen["private_bytes"] > 0 and chosen["runs"] > 100 and chosen["backend_version"]
    assert len([w for w in daemon.control("ps")["workers"] if w["model"] == "zoo"]) == 1


def test_a_variant_that_hangs_while_it_is_measured_is_refused_and_costs_little_time(
    daemon: Daemon,
) -> None:
    variants = [("plain", {}), ("stuck", fault("hang", first_run=20))]
    began_s = time.monotonic()
    assert add(daemon, "stuck", variants)["variant"] == "plain"
    assert time.monotonic() - began_s < 20  # twice 3 s for its answer, on a busy machine
    assert verdicts(daemon, "stuck") == {"plain": "chosen", "stuck": "failed"}


def test_a_variant_that_stands_still_once_while_it_is_measured_is_measured_again(
    daemon: Daemon,
) -> None:
    def pid_of_stalled() -> int:
        try:
            history = daemon.control("why", name="stalls")["history"]
        except EdgeError:
            return 0  # not installed yet
        ready = [one["fields"] for one in history if one["event"] == "worker_ready"]
        return next((one["pid"] for one in ready if one["variant"] == "stalled"), 0)

    def stall() -> None:
        pid = until(pid_of_stalled)
        os.kill(pid, signal.SIGSTOP)
        threading.Event().wait(SLICE_S_MIN + 0.7)
        os.kill(pid, signal.SIGCONT)

    stalling = threading.Thread(target=stall)
    stalling.start()
    add(daemon, "stalls", [("plain", SLOW), ("stalled", {})])
    stalling.join()
    assert verdicts(daemon, "stalls")["stalled"] == "chosen"


def test_equal_variants_keep_the_first_and_one_variant_costs_nothing(daemon: Daemon) -> None:
    # Of runs of microseconds chance makes one better; 4 ms are alike to within the margin.
    variants = [("a", {"run_ms": 4}), ("b", {"run_ms": 4})]
    assert add(daemon, "same", variants)["variant"] == "a"
    assert "none is better by more than the margin" in why(daemon, "same")
    add(daemon, "single", [("only", {})])
    assert decision(daemon, "single") is None
    assert not daemon.events("variant_selected", model="single")


def test_when_no_variant_is_right_nothing_serves_and_the_answer_names_each(daemon: Daemon) -> None:
    variants = [("a", fault("wrong")), ("b", fault("raise", at="load"))]
    with pytest.raises(ModelError) as caught:
        add(daemon, "bad", variants)
    assert "a:" in str(caught.value) and "golden 0" in str(caught.value)
    assert "b:" in str(caught.value)


def test_what_serves_goes_on_while_the_next_versions_variants_are_measured(daemon: Daemon) -> None:
    add(daemon, "busy", [("only", {})])
    answers: list[float] = []
    failures: list[EdgeError] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(daemon.infer("busy"))
            except EdgeError as error:
                failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    variants = [("slow", SLOW), ("wrong", fault("wrong")), ("quick", {})]
    assert add(daemon, "busy", variants, 2)["variant"] == "quick"
    stop.set()
    thread.join()
    assert not failures and set(answers) == {7.0} and len(answers) > 5


def test_when_what_serves_dies_meanwhile_measuring_stops_and_the_newcomer_takes_over(
    daemon: Daemon,
) -> None:
    add(daemon, "hurry", [("only", {})])
    slow = {"run_ms": 100}
    thread = threading.Thread(target=lambda: add(daemon, "hurry", [("a", slow), ("b", slow)], 2))
    thread.start()  # a round takes 0.2 s: 2.4 s in all
    until(lambda: daemon.events("worker_ready", model="hurry", variant="b"), "the measurement")
    os.kill(daemon.worker("hurry")["pid"], signal.SIGKILL)
    assert daemon.infer("hurry") == 7.0
    thread.join()
    assert "stopped after" in decision(daemon, "hurry")["note"]
    daemon.control("activate", name="hurry", version=2)
    again = daemon.events("variant_selected", model="hurry")[-1]
    assert "in a hurry" in again["message"] and not decision(daemon, "hurry")["note"]


def test_a_variant_that_is_configured_is_served_unmeasured_and_off_measures_nothing(
    make_daemon: Callable[..., Daemon],
) -> None:
    config = {"models": {"pinned": {"variant": "slow"}}, "selection": {"policy": "off"}}
    daemon = make_daemon(config).start()
    variants = [("slow", SLOW), ("quick", {})]
    assert add(daemon, "pinned", variants)["variant"] == "slow"
    assert decision(daemon, "pinned") is None
    assert add(daemon, "unmeasured", [("wrong", fault("wrong")), *variants])["variant"] == "slow"
    found = decision(daemon, "unmeasured")
    assert found["order"] == ["slow", "quick"] and found["note"] == "not measured"


def test_where_energy_cannot_be_read_time_decides_and_the_decision_says_so(
    make_daemon: Callable[..., Daemon],
) -> None:
    if energy.read_uj() is not None:
        pytest.skip("this processor counts its energy")
    daemon = make_daemon({"selection": {"policy": "energy"}}).start()
    assert add(daemon, "m", [("slow", SLOW), ("quick", {})])["variant"] == "quick"
    assert decision(daemon, "m")["note"] == "energy cannot be read here: by latency"


def test_memory_too_small_for_all_at_once_has_them_measured_one_after_the_other(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon({"memory": {"budget_bytes": 12 << 20}}).start()
    assert add(daemon, "m", [("slow", SLOW), ("quick", {})])["variant"] == "quick"
    found = decision(daemon, "m")
    assert not found["together"] and "one after the other" in found["note"]
    assert verdicts(daemon, "m") == {"slow": "fit", "quick": "chosen"}
    assert daemon.infer("m") == 7.0


# --- kept -----------------------------------------------------------------------------------------


def records(daemon: Daemon, name: str) -> list[Path]:
    return sorted((daemon.state_dir / "models" / name).rglob("decision"))


def test_a_decision_survives_a_restart_and_is_made_again_when_damaged_or_out_of_date(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon({"workers": WORKERS}).start()
    variants = [("slow", SLOW), ("quick", {})]
    add(daemon, "m", variants)
    first = decision(daemon, "m")
    daemon.stop()

    daemon.start()
    until(lambda: daemon.ready("m"), "ready")
    assert serving(daemon, "m") == "quick" and decision(daemon, "m") == first
    assert len(daemon.events("variant_selected")) == 1
    daemon.stop()

    (record,) = records(daemon, "m")
    record.chmod(0o644)
    record.write_bytes(record.read_bytes()[:-9])
    daemon.start()  # serves the first in order at once, and the better one a moment later
    until(lambda: len(daemon.events("variant_selected")) == 2, "a new decision")
    until(lambda: serving(daemon, "m") == "quick", "the best variant again")
    assert daemon.infer("m") == 7.0
    daemon.stop()

    daemon._config["workers"] = WORKERS | {"cpuset": "0"}
    daemon.start()
    until(lambda: len(daemon.events("variant_selected")) == 3, "a new decision")
    assert "cpuset: none -> 0" in daemon.events("variant_selected")[-1]["message"]
    assert daemon.model("m")["state"] == "ready"
    daemon.stop()


# --- left -----------------------------------------------------------------------------------------


def kill(daemon: Daemon, name: str) -> None:
    """SIGKILL its worker; back when something serves again."""
    pid = until(lambda: daemon.worker(name).get("pid"), "a worker")
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.events("worker_died", pid=pid), "its death")
    until(lambda: daemon.ready(name), "ready")


class Asker:
    """Clients that ask one after the other, without retries; what came of it."""

    def __init__(self, daemon: Daemon, name: str, clients: int = 4) -> None:
        self.answers: list[tuple[float, float]] = []  # (when, what)
        self.lost: list[tuple[float, str]] = []  # in flight, and without an answer
        self.refused = 0
        self._daemon, self._name, self._stop = daemon, name, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        client = self._daemon.impatient()
        while not self._stop.is_set():
            try:
                y = client.infer(self._name, {"x": filled(3.0)})["y"]
                self.answers.append((time.monotonic(), float(y[0, 0])))
            except ConnectionClosedError as error:
                self.lost.append((time.monotonic(), str(error)))
            except UnavailableError:
                self.refused += 1
                self._stop.wait(0.002)
        client.close()

    def __enter__(self) -> Asker:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.answers) > 20, "answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def gap_ms(self) -> float:
        """The longest time without an answer."""
        times = sorted(at for at, _ in self.answers)
        return 1e3 * max(b - a for a, b in pairwise(times))


def test_a_variant_that_is_killed_again_and_again_is_left_and_clients_go_on_with_the_next(
    daemon: Daemon, record_property: Callable[[str, object], None]
) -> None:
    add(daemon, "killed", [("quick", {}), ("slow", SLOW)])
    with Asker(daemon, "killed") as asker:
        kill(daemon, "killed")
        kill(daemon, "killed")
        until(lambda: serving(daemon, "killed") == "slow", "the next variant")
        seen = len(asker.answers)
        until(lambda: len(asker.answers) > seen + 20, "its answers")
    assert {value for _, value in asker.answers} == {7.0}
    assert len(asker.lost) <= 2 * 4, asker.lost  # those in flight at two deaths
    (event,) = daemon.events("variant_failed_over", model="killed")
    assert event["fields"]["left"] == "quick" and event["fields"]["variant"] == "slow"
    assert 0 < event["fields"]["gap_ms"] < 5000
    print(f"killed: {len(asker.lost)} lost, next answer after {asker.gap_ms():.0f} ms")
    left = decision(daemon, "killed")["left"]
    assert [one["variant"] for one in left] == ["quick"]
    assert "left" in why(daemon, "killed") and "serves" in why(daemon, "killed")
    assert "killed has left quick; see `why`" in status.models_text(daemon.control("models"), 200)
    daemon.control("activate", name="killed", version=1)  # a new decision
    assert serving(daemon, "killed") == "quick" and not decision(daemon, "killed")["left"]


def test_a_variant_that_hangs_once_is_left_at_once(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon({"workers": WORKERS | {"run_time_max_ms": 300}}).start()
    add(daemon, "m", [("quick", fault("hang", on_value=13.0)), ("slow", SLOW)])
    with Asker(daemon, "m") as asker:
        poison = threading.Thread(target=lambda: poisoned(daemon, "m"))
        poison.start()
        until(lambda: serving(daemon, "m") == "slow", "the next variant")
        seen = len(asker.answers)
        until(lambda: len(asker.answers) > seen + 20, "its answers")
        poison.join()
    assert len(asker.lost) <= 4 and {value for _, value in asker.answers} == {7.0}
    print(f"hung: {len(asker.lost)} lost, next answer after {asker.gap_ms():.0f} ms")
    assert daemon.events("variant_failed_over")[0]["fields"]["cause"] == "hang"
    daemon.stop()
    daemon.start()  # and it stays left after a restart
    until(lambda: daemon.ready("m"), "ready")
    assert serving(daemon, "m") == "slow"
    assert [one["variant"] for one in decision(daemon, "m")["left"]] == ["quick"]


def poisoned(daemon: Daemon, name: str) -> None:
    with daemon.impatient() as client, pytest.raises(EdgeError):
        client.infer(name, {"x": filled(13.0)})


def test_a_variant_that_begins_to_lie_is_found_by_the_heartbeat_and_left(
    make_daemon: Callable[..., Daemon],
) -> None:
    """It lies from its 3,000th run on: after its selection, and while it is asked."""
    daemon = make_daemon({"workers": WORKERS | {"heartbeat_idle_s": 0.2}}).start()
    lying = fault("wrong", first_run=20_000)
    add(daemon, "m", [("quick", lying), ("slow", SLOW)])
    assert serving(daemon, "m") == "quick"
    with Asker(daemon, "m", clients=1) as asker:
        until(lambda: serving(daemon, "m") == "slow", "the next variant", timeout_s=30)
        found_s = time.monotonic()
        seen = len(asker.answers)
        until(lambda: len(asker.answers) > seen + 20, "its answers")
    wrong = [at for at, value in asker.answers if value != 7.0]
    assert wrong, "it did not lie before it was found: the test proves nothing"
    assert max(wrong) < found_s and not asker.lost
    (event,) = daemon.events("variant_failed_over")
    assert event["fields"]["cause"] == "golden" and "golden 0" in event["message"]
    assert "golden 0" in why(daemon, "m")
    print(f"lied: found after {len(wrong)} wrong answers, {asker.gap_ms():.0f} ms without any")


def test_a_variant_that_answers_nothing_but_errors_any_more_is_left(
    make_daemon: Callable[..., Daemon],
) -> None:
    """As with an accelerator that has gone: every run fails, the goldens too."""
    daemon = make_daemon({"workers": WORKERS}).start()
    add(daemon, "m", [("quick", fault("raise", first_run=15_000)), ("slow", SLOW)])
    failures = 0
    with daemon.client() as client:
        for _ in range(20_000):
            try:
                client.infer("m", {"x": filled(3.0)})
            except ModelError:
                failures += 1
            if failures and serving(daemon, "m") == "slow":
                break
        assert failures and float(client.infer("m", {"x": filled(3.0)})["y"][0, 0]) == 7.0
    (event,) = daemon.events("variant_failed_over")
    assert event["fields"]["cause"] == "golden" and "3 goldens all failed" in event["message"]


def test_a_lone_variant_that_begins_to_lie_is_replaced_by_a_fresh_worker(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon({"workers": {"heartbeat_idle_s": 0.1}}).start()
    add(daemon, "m", [("only", fault("wrong", first_run=200))])
    before = daemon.worker("m")["pid"]
    for _ in range(200):
        daemon.infer("m")
    death = until(lambda: daemon.events("worker_died", model="m"), "its end")[0]
    assert death["fields"]["cause"] == "golden" and death["fields"]["pid"] == before
    until(lambda: daemon.ready("m"), "ready")
    assert daemon.infer("m") == 7.0 and daemon.worker("m")["restarts"] == 1
    text = daemon.control("metrics")["text"]
    assert 'edge_golden_failures_total{model="m"} 1' in text
    assert 'edge_goldens_total{model="m"' in text


def test_after_the_last_variant_the_previous_version_takes_over(daemon: Daemon) -> None:
    add(daemon, "last", [("only", {})])
    add(daemon, "last", [("a", {}), ("b", {})], 2)
    for _ in range(12):
        if daemon.model("last")["active"]["version"] == 1:
            break
        kill(daemon, "last")
    assert daemon.model("last")["active"]["version"] == 1
    left = [one["fields"]["variant"] for one in daemon.events("variant_left", model="last")]
    assert left == ["a"]
    assert daemon.infer("last") == 7.0
