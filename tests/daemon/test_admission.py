"""Who may, how many at once, how long, and in which order."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_runtime.client.control import ControlClient
from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    OverloadedError,
    PermissionDeniedError,
)
from tests.daemon.world import Daemon, filled, infer_frame, running, until

ALICE, BOB, CREW = 12345, 12346, 23456
SLOW_MS = 60


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    config = {
        "access": {"control_mode": "0666"},
        "workers": {"runners": 1},
        "models": {
            "queue": {"queue_requests_max": 4},
            "queue-inline": {"queue_requests_max": 4, "runners": 0},
            "bytes": {"queue_bytes_max": "1 MiB"},
            "flat": {"priority_max": 0},
            "deadline-inline": {"runners": 0},
            "left": {"queue_ms_max": 0},
            "left-inline": {"runners": 0, "queue_ms_max": 0},
            "private": {"access": {"users": [ALICE]}},
            "crew": {"access": {"groups": [CREW]}},
        },
    }
    with running(config) as started:
        yield started


def slow(daemon: Daemon, name: str) -> None:
    """A model whose runs take SLOW_MS."""
    daemon.add(name, options={"run_ms": SLOW_MS})


# --- overload -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["queue", "queue-inline"])
def test_more_than_the_queue_holds_is_refused_at_once_and_the_rest_is_served(daemon, name):
    slow(daemon, name)
    with daemon.raw() as raw:
        began_s = time.monotonic()
        raw.send(b"".join(infer_frame(name, request_id=n) for n in range(1, 21)))
        served, refused, refusal_s = 0, [], 0.0
        for _ in range(20):
            try:
                served += raw.value()[1] == 7.0
            except OverloadedError as error:
                refused.append(error)
                refusal_s = time.monotonic() - began_s
        elapsed_s = time.monotonic() - began_s
    assert 4 <= served <= 6 and served + len(refused) == 20
    assert refusal_s < elapsed_s - 2 * SLOW_MS / 1e3  # not behind the queue
    assert all(0 < error.retry_after_s < 2 for error in refused)
    assert "4 requests" in refused[0].expected
    assert daemon.worker(name)["refused"] == len(refused)
    assert daemon.infer(name) == 7.0


def test_clients_that_come_back_when_told_are_all_served(daemon):
    slow(daemon, "queue")
    failures: list[EdgeError] = []

    def work() -> None:
        with daemon.client(timeout_s=20) as client:
            try:
                for _ in range(3):
                    client.infer("queue", {"x": filled(3)})
            except EdgeError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert daemon.worker("queue")["waiting"] == 0


def test_tensors_that_wait_are_bounded_in_bytes(daemon):
    slow(daemon, "bytes")
    rows = 6000  # 384 kB in, as much out
    with daemon.raw() as raw:
        sender = threading.Thread(
            target=lambda: [
                raw.send(infer_frame("bytes", rows=rows, request_id=n)) for n in range(1, 9)
            ]
        )
        sender.start()
        outcomes = []
        for _ in range(8):
            try:
                outcomes.append(raw.value()[1])
            except OverloadedError as error:
                outcomes.append(error)
        sender.join()
    refused = [one for one in outcomes if isinstance(one, OverloadedError)]
    assert refused and 7.0 in outcomes
    assert daemon.infer("bytes", rows=rows) == 7.0


# --- deadlines and priorities ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deadline", "deadline-inline"])
def test_a_request_whose_deadline_passed_in_the_queue_is_not_run(daemon, name):
    slow(daemon, name)
    soon_ns = time.monotonic_ns() + SLOW_MS * 500_000
    with daemon.raw() as raw:
        raw.send(
            infer_frame(name, request_id=1)
            + infer_frame(name, request_id=2, deadline_ns=soon_ns)
            + infer_frame(name, request_id=3, deadline_ns=soon_ns + 10**10)
            + infer_frame(name, request_id=4, deadline_ns=1)
        )
        answers: dict[int, Any] = {}
        for _ in range(4):
            frame = raw.frame()
            answers[frame.prefix.request_id] = frame.prefix.kind
    assert {number for number, kind in answers.items() if kind == 0xFF} == {2, 4}
    worker = daemon.worker(name)
    assert (worker["requests"], worker["expired"], worker["errors"]) == (2, 2, 0)


@pytest.mark.parametrize("name", ["left", "left-inline"])
def test_requests_of_a_client_that_has_left_are_not_run(daemon, name):
    slow(daemon, name)
    with daemon.raw() as raw:
        raw.send(b"".join(infer_frame(name, request_id=n) for n in range(30)))
        until(lambda: daemon.worker(name)["waiting"] > 20)
    began_s = time.monotonic()
    assert daemon.infer(name) == 7.0
    assert time.monotonic() - began_s < 15 * SLOW_MS / 1e3  # and not behind thirty runs
    assert daemon.worker(name)["requests"] < 15


def test_a_client_gets_a_deadline_error_in_time_and_goes_on(daemon):
    slow(daemon, "deadline")
    with daemon.client() as client:
        began_s = time.monotonic()
        with pytest.raises(DeadlineError):
            client.infer("deadline", {"x": filled(3)}, timeout_s=SLOW_MS / 3e3)
        assert time.monotonic() - began_s < SLOW_MS / 1e3
        assert client.infer("deadline", {"x": filled(3)})["y"][0, 0] == 7.0


def _order(daemon: Daemon, name: str) -> list[int]:
    slow(daemon, name)
    with daemon.raw() as raw:
        raw.send(infer_frame(name, request_id=1))
        until(lambda: daemon.worker(name)["connections"] == 1)
        raw.send(
            b"".join(
                infer_frame(name, request_id=number, priority=priority)
                for number, priority in ((2, 0), (3, 1), (4, 0), (5, 200), (6, 200))
            )
        )
        return [raw.value()[2] for _ in range(6)]


def test_a_higher_priority_goes_first_and_equals_go_in_order(daemon):
    assert _order(daemon, "priority") == [1, 5, 6, 3, 2, 4]


def test_priorities_above_the_models_limit_count_as_the_limit(daemon):
    assert _order(daemon, "flat") == [1, 2, 3, 4, 5, 6]


# --- who may --------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


def as_user(uid: int, groups: list[int], work: Callable[[], Any]) -> Any:
    """`work()` in a child process of another user; what it returned, or the error's code."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        result: Any = "crashed"
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            result = work()
        except EdgeError as error:
            result = error.code
        except OSError as error:
            result = f"errno {error.errno}"
        finally:
            os.write(write_fd, json.dumps(result).encode())
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer


@pytest.mark.root
@needs_root
def test_a_models_rule_admits_whom_it_names_and_nobody_else(daemon):
    for name in ("open", "private", "crew"):
        daemon.add(name)

    def ask(*names: str, path: str = "") -> list[Any]:
        answers: list[Any] = []
        with daemon.raw(path) as raw:  # one connection: the rule is the model's, not the socket's
            for name in names:
                raw.send(infer_frame(name))
                try:
                    answers.append(raw.value()[1])
                except PermissionDeniedError as error:
                    answers.append(error.code)
        return answers

    denied = "permission_denied"
    models = ("open", "private", "crew", "open", "private")
    assert ask(*models) == [7.0] * 5  # root
    assert as_user(ALICE, [], lambda: ask(*models)) == [7.0, 7.0, denied, 7.0, 7.0]
    assert as_user(BOB, [], lambda: ask(*models)) == [7.0, denied, denied, 7.0, denied]
    assert as_user(BOB, [CREW], lambda: ask(*models)) == [7.0, denied, 7.0, 7.0, denied]
    own = str(daemon.run_dir / "models" / "private.sock")
    assert as_user(BOB, [], lambda: ask("private", path=own)) == [denied]
    assert as_user(ALICE, [], lambda: ask("private", path=own)) == [7.0]


@pytest.mark.root
@needs_root
def test_only_root_and_the_daemons_user_control_it(daemon):
    def models() -> int:
        with ControlClient(daemon.control_path, timeout_s=5) as control:
            return len(control.call("models")["models"])

    for _ in range(20):  # whichever is first, its request or our refusal
        assert as_user(BOB, [], models) == "permission_denied"
    assert isinstance(models(), int)


@pytest.mark.root
@needs_root
def test_by_default_others_do_not_even_reach_the_control_socket(make_daemon):
    daemon = make_daemon().start()

    def reach() -> str:
        daemon.raw(daemon.control_path)
        return "reached"

    assert as_user(BOB, [], reach) == "permission_denied"


@pytest.mark.root
@needs_root
def test_a_denied_user_learns_it_for_every_kind_of_frame_about_the_model(daemon):
    daemon.add("private")

    def ask() -> list[str]:
        codes = []
        with daemon.impatient() as client:
            for question in (client.metadata, client.ready):
                try:
                    question("private")
                except EdgeError as error:
                    codes.append(error.code)
        return codes

    assert as_user(BOB, [], ask) == ["permission_denied"] * 2


# --- how many, of one user ------------------------------------------------------------------------


@contextlib.contextmanager
def looking_like(uid: int) -> Iterator[None]:
    """Connections made meanwhile are that user's."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def connections(daemon: Daemon) -> int:
    document = daemon.control("ps")
    return document["daemon"]["waiting"] + sum(one["connections"] for one in document["workers"])


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("uid", [ALICE, 4294967294])
def test_a_user_who_has_its_share_of_connections_is_refused_and_others_are_not(make_daemon, uid):
    daemon = make_daemon({"limits": {"connections_max": 12, "connections_per_user_max": 4}}).start()
    daemon.add("shared")
    daemon.add("shared-too")
    with looking_like(uid):
        held = [daemon.raw() for _ in range(4)]
    for raw, name in zip(held, ("shared", "shared-too", "shared-too"), strict=False):
        raw.send(infer_frame(name))  # two workers have three of them, the daemon has one
        assert raw.value()[1] == 7.0
    with looking_like(uid), daemon.raw() as refused:
        error = refused.error()
    assert isinstance(error, OverloadedError) and error.retry_after_s
    assert "connections_per_user_max" in error.expected and str(uid) in error.message
    daemon.add("shared", version=2)  # handed over to another worker: counted once
    with looking_like(uid), daemon.raw() as refused:
        assert isinstance(refused.error(), OverloadedError)
    assert daemon.infer("shared", version="2") == 7.0  # root's
    for gone, raw in enumerate(held):  # each that ends makes room for one
        raw.sock.close()
        until(lambda left=3 - gone: connections(daemon) <= left)
        with looking_like(uid), daemon.raw() as again:
            again.send(infer_frame("shared"))
            assert again.value()[1] == 7.0
