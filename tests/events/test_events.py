"""Events and their sinks: what is written, and that no sink can stop the daemon."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import events
from edge_runtime.clock import ManualClock
from edge_runtime.events import Event, Events, JournalSink, RingSink, TeeSink, TextSink

VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TEXTS = st.text(st.characters())  # lone surrogates and control characters too


class FailingSink:
    def write(self, event: Event) -> None:
        raise OSError(28, "no space left")


def event(message: str = "killed by SIGSEGV", /, **fields: events.Value) -> Event:
    return Event("worker_died", message, "warning", 1_700_000_000.0, 5, dict(fields))


def unpacked(entry: bytes) -> dict[str, bytes]:
    """A reader of journald's native form, written from its specification."""
    fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        if b"=" in line:
            key, _, value = line.partition(b"=")
        else:
            key, (size,) = line, struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert key.decode() not in fields
        fields[key.decode()], entry = value, rest
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    """A socket in journald's place."""
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.settimeout(5)
        yield server, path


def test_an_event_carries_its_time_level_and_fields() -> None:
    ring = RingSink()
    emitted = Events(ring, ManualClock(7, 99.5)).emit(
        "worker_died", "killed", level="error", model="m", pid=3
    )
    assert emitted == Event("worker_died", "killed", "error", 99.5, 7, {"model": "m", "pid": 3})
    assert ring.newest() == (emitted,)


def test_fields_may_be_called_name_and_message() -> None:
    emitted = Events(RingSink(), ManualClock()).emit("a", "b", name="x", message="y")
    assert (emitted.name, emitted.fields) == ("a", {"name": "x", "message": "y"})


def test_events_below_the_level_are_not_written() -> None:
    log, everything = RingSink(), RingSink()
    emitter = Events(TeeSink([everything, events.LevelSink(log, "warning")]), ManualClock())
    for level in ("debug", "info", "warning", "error"):
        emitter.emit(level, "", level=level)  # type: ignore[arg-type]
    assert [e.name for e in log.newest()] == ["warning", "error"]
    assert len(everything.newest()) == 4
    assert emitter.statistics() == events.EventsStatistics(emitted=4, dropped=0)


def test_a_failing_sink_costs_the_event_only_and_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = Events(FailingSink(), ManualClock())
    log.emit("disk_full", "no room", model="m")
    assert log.statistics().dropped == 1
    assert "disk_full" in (err := capsys.readouterr().err) and "no space left" in err


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_a_failing_sink_without_a_stderr_is_only_counted(
    monkeypatch: pytest.MonkeyPatch, stderr: str | None
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", stderr and closed)
    log = Events(FailingSink(), ManualClock())
    log.emit("a", "b")
    assert log.statistics().dropped == 1


def test_a_stalled_reader_costs_events_and_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(reader, "rb"), os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)  # the last resort is stalled as well
        log = Events(TextSink(stream), ManualClock())
        for _ in range(40):
            log.emit("tick", "x" * 200)
        assert 0 < log.statistics().dropped < 40


def test_text_is_one_line_with_quoted_fields() -> None:
    line = events.text_line(event(model="fashion-mnist", reason='said "no"', code=None, note=""))
    assert line[8:] == (
        " warning worker_died killed by SIGSEGV"
        ' model=fashion-mnist reason="said \\"no\\"" code=- note=""'
    )


@given(TEXTS, TEXTS)
def test_text_never_forges_a_line_or_drives_a_terminal(message: str, field: str) -> None:
    assert events.text_line(event(message, field=field)).isprintable()


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    events.JsonSink(stream).write(event("two\nlines", pid=3, share=float("nan"), ok=True))
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line) == {
        "name": "worker_died",
        "message": "two\nlines",
        "level": "warning",
        "wall_s": 1_700_000_000.0,
        "monotonic_ns": 5,
        "fields": {"pid": 3, "share": None, "ok": True},
    }


@given(TEXTS, st.dictionaries(st.text(min_size=1), VALUES | TEXTS))
def test_json_takes_every_text(message: str, fields: dict[str, events.Value]) -> None:
    line = events.json_line(event(message, **fields))
    assert "\n" not in line and json.loads(line)["name"] == "worker_died"


@given(TEXTS, st.dictionaries(st.text(), VALUES | TEXTS))
def test_a_journal_entry_can_be_taken_apart_again(
    message: str, fields: dict[str, events.Value]
) -> None:
    found = unpacked(events.journal_entry(event(message, **fields), "edge-runtime"))
    assert found["PRIORITY"] == b"4" and found["EDGE_EVENT"] == b"worker_died"
    assert all(len(key) <= 64 and key.isascii() for key in found)


def test_the_journal_gets_upper_case_fields(journal: tuple[socket.socket, Path]) -> None:
    server, path = journal
    JournalSink(path).write(event("two\nlines", model="m@2", pid=3, ok=True, gone=None))
    assert unpacked(server.recv(65536)) == {
        "MESSAGE": b"two\nlines",
        "PRIORITY": b"4",
        "SYSLOG_IDENTIFIER": b"edge-runtime",
        "EDGE_EVENT": b"worker_died",
        "EDGE_MONOTONIC_NS": b"5",
        "EDGE_MODEL": b"m@2",
        "EDGE_PID": b"3",
        "EDGE_OK": b"true",
    }


def test_a_large_entry_reaches_the_journal_as_a_sealed_memfd(
    journal: tuple[socket.socket, Path],
) -> None:
    server, path = journal
    JournalSink(path).write(event("x" * 1_000_000))
    data, (descriptor,), _, _ = socket.recv_fds(server, 10, 1)
    with os.fdopen(descriptor, "r+b") as memory:
        assert data == b""
        assert len(unpacked(os.pread(descriptor, 2_000_000, 0))["MESSAGE"]) == 1_000_000
        with pytest.raises(PermissionError):
            memory.truncate(0)


def test_a_restarted_journal_loses_nothing(journal: tuple[socket.socket, Path]) -> None:
    server, path = journal
    sink = JournalSink(path)
    server.close()
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.bind(str(path))
        sink.write(event())
        again.settimeout(5)
        assert b"killed by SIGSEGV" in again.recv(65536)


def test_a_gone_or_full_journal_is_a_counted_drop(
    journal: tuple[socket.socket, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server, path = journal
    log = Events(JournalSink(path), ManualClock())
    for _ in range(5000):  # nobody reads
        log.emit("tick", "x")
    assert (full := log.statistics().dropped) > 0
    server.close()
    path.unlink()
    log.emit("tick", "x")
    log.emit("tick", "x")
    assert log.statistics().dropped == full + 2
    assert "FileNotFoundError" in capsys.readouterr().err


def test_the_ring_keeps_the_newest_and_finds_by_field() -> None:
    ring = RingSink(3)
    for number in range(5):
        ring.write(event(str(number), model="ab"[number % 2]))
    assert [e.message for e in ring.newest()] == ["2", "3", "4"]
    assert [e.message for e in ring.newest(model="a")] == ["2", "4"]
    assert [e.message for e in ring.newest(1, model="a")] == ["4"]
    assert ring.newest(0) == ()


def test_a_tee_writes_to_all_also_when_one_fails(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = RingSink(), RingSink()
    log = Events(TeeSink([first, FailingSink(), last]), ManualClock())
    log.emit("a", "b")
    assert len(first.newest()) == len(last.newest()) == log.statistics().dropped == 1


def environment(stream: TextIO) -> dict[str, str]:
    status = os.fstat(stream.fileno())
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_the_journal_is_chosen_only_for_the_stream_that_systemd_connected(
    tmp_path: Path, journal: tuple[socket.socket, Path]
) -> None:
    with (tmp_path / "a").open("w") as ours, (tmp_path / "b").open("w") as other:
        assert isinstance(events.sink_for(ours, environment(ours), journal=journal[1]), JournalSink)
        assert isinstance(events.sink_for(other, environment(ours), journal=journal[1]), TextSink)
        assert isinstance(events.sink_for(ours, {}), TextSink)
        assert isinstance(events.sink_for(ours, environment(ours), "text"), TextSink)
        assert isinstance(events.sink_for(ours, environment(ours), "json"), events.JsonSink)
        assert isinstance(events.sink_for(io.StringIO(), environment(ours)), TextSink)


def test_a_journal_without_its_socket_is_text(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as stream:
        assert isinstance(
            events.sink_for(stream, environment(stream), journal=tmp_path / "no"), TextSink
        )
