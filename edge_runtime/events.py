"""What happened, as structured events: one `Events` per process, sinks that write them somewhere.

Law of this file: an event is a value; a sink writes it and knows nothing else. Nothing here decides
what is worth an event, and no sink may take the daemon down: whatever a sink raises is caught in
`Events.emit`, counted, and the event goes to standard error instead. Sinks are called from one
thread. Formats: text for people, JSON lines for collectors, the native protocol for the journal
(systemd, "Native Journal Protocol").
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TextIO

import msgspec

from edge_runtime.clock import Clock

Level = Literal["debug", "info", "warning", "error"]
Value = str | int | float | bool | None

# Level -> (rank for filtering, syslog priority of RFC 5424).
LEVELS: dict[Level, tuple[int, int]] = {
    "debug": (10, 7),
    "info": (20, 6),
    "warning": (30, 4),
    "error": (40, 3),
}

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
# After EDGE_; journald takes 64 characters in all.
JOURNAL_FIELD_CHARACTERS_MAX = 59
# How long a log stream may refuse a line before the line is dropped: a reader that is busy needs a
# moment, but one that stalls (a full pipe, a terminal stopped with ^S, a stuck journald) must cost
# events, not answers.
STREAM_WAIT_S = 0.01


class Event(msgspec.Struct, frozen=True):
    """One thing that happened. `message` is for people, `name` and `fields` for programs."""

    name: str  # snake_case, e.g. worker_died
    message: str
    level: Level
    wall_s: float  # seconds since 1970; may jump
    monotonic_ns: int  # CLOCK_MONOTONIC; orders the events of one boot
    fields: dict[str, Value]


class Sink(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None:
        """Write one event; may raise anything, `Events` catches it."""


class EventsStatistics(msgspec.Struct, frozen=True):
    """How many events were given to the sink, and how many it failed to take."""

    emitted: int
    dropped: int


class Events:
    """The one door through which a process says what happened.

    Args:
        sink: gets every event.
        clock: stamps the events.
    """

    def __init__(self, sink: Sink, clock: Clock) -> None:
        self._sink = sink
        self._clock = clock
        self._emitted = 0
        self._dropped = 0

    def emit(self, name: str, message: str, /, *, level: Level = "info", **fields: Value) -> Event:
        """Stamp and write an event; never raises for what the sink does."""
        now_s, now_ns = self._clock.wall_s(), self._clock.monotonic_ns()
        event = Event(name, message, level, now_s, now_ns, fields)
        self._emitted += 1
        try:
            self._sink.write(event)
        except Exception as error:  # noqa: BLE001 - the law of this file: no sink stops the daemon
            self._dropped += 1
            _last_resort(event, error)
        return event

    def statistics(self) -> EventsStatistics:
        return EventsStatistics(emitted=self._emitted, dropped=self._dropped)


def _last_resort(event: Event, error: Exception) -> None:
    """To standard error, if there is one that takes it; there is nowhere left to complain."""
    try:
        _write_line(sys.stderr, f"{text_line(event)} [sink failed: {error!r}]")
    except (OSError, ValueError, AttributeError):
        pass  # closed, full or no stderr at all: the drop is counted, that is all we can do


def _write_line(stream: TextIO, line: str) -> None:
    """Write and flush, or raise BlockingIOError when the reader takes nothing for STREAM_WAIT_S.

    Lines up to PIPE_BUF (4 KiB) never block after the check; a longer one to a full pipe may.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # in memory: never blocks
        descriptor = None
    if descriptor is not None:
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        if not ready.poll(STREAM_WAIT_S * 1000):
            raise BlockingIOError(errno.EAGAIN, "the log stream takes nothing")
    stream.write(line + "\n")
    stream.flush()


# --- text -----------------------------------------------------------------------------------------


def text_line(event: Event) -> str:
    """`12:03:01 warning worker_died killed by SIGSEGV pid=123`; always one line, local time."""
    stamp = time.strftime("%H:%M:%S", time.localtime(event.wall_s))
    pairs = "".join(f" {key}={_plain(value)}" for key, value in event.fields.items())
    return f"{stamp} {event.level} {event.name} {_escaped(event.message)}{pairs}"


def _plain(value: Value) -> str:
    """A field value that can be told apart from its neighbours: quoted where it must be."""
    if value is None:
        return "-"
    if not isinstance(value, str):
        return str(value)
    text = _escaped(value)
    quoted = not text or any(character in text for character in ' "=')
    return '"' + text.replace('"', '\\"') + '"' if quoted else text


def _escaped(text: str) -> str:
    """Printable: a message from a model or a library must not forge lines or drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextSink:
    """One line an event, for people."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, event: Event) -> None:
        _write_line(self._stream, text_line(event))


# --- JSON -----------------------------------------------------------------------------------------


def json_line(event: Event) -> str:
    """One JSON object with the event's own keys, `fields` nested; no newline; NaN becomes null."""
    try:
        return msgspec.json.encode(event).decode()
    except UnicodeEncodeError:  # lone surrogates: a file name that is not UTF-8
        fields = {k: _utf8(v) if isinstance(v, str) else v for k, v in event.fields.items()}
        return msgspec.json.encode(
            msgspec.structs.replace(event, message=_utf8(event.message), fields=fields)
        ).decode()


def _utf8(text: str) -> str:
    """The text with what UTF-8 cannot carry written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class JsonSink:
    """One JSON object a line, for collectors."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, event: Event) -> None:
        _write_line(self._stream, json_line(event))


# --- the journal ----------------------------------------------------------------------------------


def journal_entry(event: Event, identifier: str) -> bytes:
    """The event in journald's native form: MESSAGE, PRIORITY, EDGE_EVENT and EDGE_<FIELD> each.

    A single-line value is `KEY=value\\n`; one with a newline is `KEY\\n`, its length as 64-bit
    little-endian, the value, `\\n`.
    """
    own = {
        "MESSAGE": event.message,
        "PRIORITY": str(LEVELS[event.level][1]),
        "SYSLOG_IDENTIFIER": identifier,
        "EDGE_EVENT": event.name,
        "EDGE_MONOTONIC_NS": str(event.monotonic_ns),
    }
    given = {
        f"EDGE_{_journal_key(key)}": _journal_value(value)
        for key, value in event.fields.items()
        if value is not None
    }
    return b"".join(_journal_field(key, value) for key, value in {**given, **own}.items())


def _journal_key(key: str) -> str:
    """journald takes A-Z, 0-9 and _ and silently drops an entry's other fields."""
    upper = "".join(c if c.isascii() and c.isalnum() else "_" for c in key).upper()
    return upper[:JOURNAL_FIELD_CHARACTERS_MAX]


def _journal_value(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _journal_field(key: str, value: str) -> bytes:
    data = _utf8(value).encode()
    if b"\n" in data:
        return key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return key.encode() + b"=" + data + b"\n"


class JournalSink:
    """Native journald datagrams; a large entry travels as a sealed memfd.

    Args:
        path: journald's socket.
        identifier: SYSLOG_IDENTIFIER of the entries.

    Raises:
        OSError: there is no socket at `path`.
    """

    def __init__(self, path: Path = JOURNAL_SOCKET, identifier: str = "edge-runtime") -> None:
        self._path = path
        self._identifier = identifier
        self._socket = self._connected()

    def _connected(self) -> socket.socket:
        # Not blocking: a stuck journald must cost events, not answers.
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            made.connect(str(self._path))
        except OSError:
            made.close()
            raise
        return made

    def write(self, event: Event) -> None:
        entry = journal_entry(event, self._identifier)
        try:
            self._send(entry)
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            # journald restarted: its socket is another one now. Once; a second failure is a drop.
            self._socket.close()
            self._socket = self._connected()
            self._send(entry)

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.send(entry)
            return
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
        descriptor = _sealed_memfd(entry)
        try:
            socket.send_fds(self._socket, [b""], [descriptor])
        finally:
            os.close(descriptor)


def _sealed_memfd(entry: bytes) -> int:
    """A memfd that nobody can change: journald takes no other from an unprivileged user."""
    descriptor = os.memfd_create("edge-event", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(entry)
        while view:
            view = view[os.write(descriptor, view) :]
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# --- several sinks, and memory --------------------------------------------------------------------


class RingSink:
    """Keeps the newest `limit` events in memory, for `edge-runtime why`.

    Args:
        limit: events kept; the oldest goes when it is full. 1,000 events are about 0.5 MB.
    """

    def __init__(self, limit: int = 1000) -> None:
        assert limit > 0
        self._events: deque[Event] = deque(maxlen=limit)

    def write(self, event: Event) -> None:
        self._events.append(event)

    def newest(self, count: int | None = None, **fields: Value) -> tuple[Event, ...]:
        """The newest `count` events (all: None) whose fields equal those given, oldest first."""
        match = [e for e in self._events if all(e.fields.get(k) == v for k, v in fields.items())]
        return tuple(match if count is None else match[max(0, len(match) - count) :])


class LevelSink:
    """Passes on the events of a level and above; the others end here."""

    def __init__(self, sink: Sink, level: Level) -> None:
        self._sink = sink
        self._rank = LEVELS[level][0]

    def write(self, event: Event) -> None:
        if LEVELS[event.level][0] >= self._rank:
            self._sink.write(event)


class TeeSink:
    """Writes to every sink, also when one before it fails; then raises the failures together."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, event: Event) -> None:
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.write(event)
            except Exception as error:  # noqa: BLE001 - raised below, after the others had their turn
                failures.append(error)
        if failures:
            raise ExceptionGroup("sinks failed", failures)


# --- which one ------------------------------------------------------------------------------------


def sink_for(
    stream: TextIO,
    environ: Mapping[str, str],
    style: str = "auto",
    *,
    journal: Path = JOURNAL_SOCKET,
) -> Sink:
    """The sink for a daemon whose log stream is `stream`.

    `auto`: the journal where systemd connected `stream` to it, else text. `text` and `json` are
    obeyed. The journal is left for text when its socket is not there.
    """
    assert style in ("auto", "text", "json"), style
    if style == "json":
        return JsonSink(stream)
    if style == "auto" and is_journal(stream, environ):
        try:
            return JournalSink(journal)
        except OSError:
            pass  # a container that sees the variable but not the socket: text goes the same way
    return TextSink(stream)


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether JOURNAL_STREAM (`device:inode`, systemd.exec) names this very stream.

    The variable alone is not enough: it is inherited by children whose stderr goes elsewhere.
    """
    named = environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or a stream without descriptor
        return False
    return named == f"{status.st_dev}:{status.st_ino}"
