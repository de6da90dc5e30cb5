"""Commands over control.sock: answers, events, descriptors, errors; and never a second try."""

from __future__ import annotations

import os

import pytest

from edge_runtime.client.control import ControlClient
from edge_runtime.errors import (
    ConflictError,
    ConnectionClosedError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
)


@pytest.fixture
def client(server):
    with ControlClient(server.path, timeout_s=5) as made:
        yield made


def test_a_command_gets_its_arguments_and_its_answer_comes_back(server, client):
    server.control["add"] = lambda event, fds, a, b: {"sum": a + b}
    assert client.call("add", {"a": 2, "b": 3}) == {"sum": 5}
    assert client.call("add", {"a": 4, "b": 3}) == {"sum": 7}
    assert server.connections_accepted == 1


def test_events_arrive_in_order_before_the_answer(server, client):
    def install(event, fds):
        for done in range(100):
            event(event="progress", text="copy", done=done, total=100)
        return {"installed": True}

    server.control["install"] = install
    seen = []
    assert client.call("install", on_event=seen.append) == {"installed": True}
    assert [event["done"] for event in seen] == list(range(100))
    assert client.call("install") == {"installed": True}  # events may be ignored


def test_files_are_passed_as_descriptors(server, client, tmp_path):
    (tmp_path / "bundle").write_bytes(b"content")
    server.control["read"] = lambda event, fds: {"text": os.read(fds[0], 100).decode()}
    with (tmp_path / "bundle").open("rb") as file:
        assert client.call("read", fds=[file.fileno()]) == {"text": "content"}
        assert file.read() == b"", "the descriptor is still open, its offset shared"


def test_an_answer_larger_than_a_header_arrives(server, client):
    server.control["why"] = lambda event, fds: {"history": ["x" * 100] * 5000}
    assert len(client.call("why")["history"]) == 5000


def test_an_error_is_raised_as_what_it_is_and_the_connection_stays(server, client):
    def fail(event, fds):
        raise ConflictError("same version, other content", where="m@7", remedy="raise the version")

    server.control["install"] = fail
    with pytest.raises(ConflictError) as caught:
        client.call("install")
    assert caught.value.exit_code == 10 and caught.value.remedy == "raise the version"
    with pytest.raises(NotFoundError):
        client.call("no-such-command")
    assert server.connections_accepted == 1


def test_a_lost_connection_is_not_retried_and_the_next_call_connects_again(server, client):
    calls = []

    def die(event, fds):
        calls.append(1)
        server.drop_connections()
        return {}

    server.control["die"] = die
    server.control["ok"] = lambda event, fds: {"ok": True}
    with pytest.raises(ConnectionClosedError):
        client.call("die")
    assert client.call("ok") == {"ok": True}
    assert calls == [1]


def test_silence_is_a_deadline(server):
    import threading

    release = threading.Event()
    server.control["slow"] = lambda event, fds: {"done": release.wait(5)}
    with ControlClient(server.path, timeout_s=0.05) as client:
        with pytest.raises(DeadlineError, match="slow"):
            client.call("slow")
    release.set()


def test_nobody_listening_is_unavailable_at_once(tmp_path):
    with ControlClient(tmp_path / "control.sock") as client:
        with pytest.raises(UnavailableError, match="nobody listens"):
            client.call("models")
