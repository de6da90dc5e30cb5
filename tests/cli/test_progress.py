"""Progress: a bar on a real pseudo-terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.cli import progress

from .conftest import Done, FakeDaemon, Reply, run_process

EVENTS: tuple[dict[str, Any], ...] = (
    *(
        {"event": "progress", "text": "copying", "done": done, "total": 1 << 20}
        for done in range(0, (1 << 20) + 1, 1 << 14)
    ),
    {"event": "progress", "text": "comparing goldens"},
)
INSTALLED = Reply(
    {"name": "m", "version": 2, "generation": 3, "new": True, "activated": True}, EVENTS
)


def test_a_bar_shows_its_share() -> None:
    assert progress.bar("copying", 0.5, 3 << 20) == (
        "copying  [############------------]  50% of 3.0 MiB"
    )
    assert progress.bar("loading", None, 0) == "loading"


def test_without_a_terminal_there_is_a_line_per_quarter() -> None:
    stream = io.StringIO()
    with progress.Progress(stream) as shown:
        for event in EVENTS:
            shown.update(event["text"], event.get("done", 0), event.get("total", 0))
    assert stream.getvalue().split("\n") == [
        "copying   0% of 1.0 MiB",
        "copying  25% of 1.0 MiB",
        "copying  50% of 1.0 MiB",
        "copying  75% of 1.0 MiB",
        "copying 100% of 1.0 MiB",
        "comparing goldens",
        "",
    ]


def test_numbers_that_make_no_sense_draw_nothing_worse_than_a_full_bar() -> None:
    stream = io.StringIO()
    shown = progress.Progress(stream)
    shown.update("copying", 200, 100)
    shown.update("copying", -5, 100)
    shown.update("copying", 5, -100)
    assert "100%" in stream.getvalue() and "  0%" in stream.getvalue()


def test_install_through_a_pipe_prints_plain_lines(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.replies["install"] = INSTALLED
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"x")
    done = run_process("install", bundle, "--activate")
    assert done.returncode == 0
    assert "\r" not in done.stderr and "copying  50% of 1.0 MiB\n" in done.stderr
    assert "m@2 is active" in done.stdout


def test_with_json_there_is_no_progress(
    daemon: FakeDaemon, edge: Callable[..., Done], tmp_path: Path
) -> None:
    daemon.replies["install"] = INSTALLED
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"x")
    done = edge("install", bundle, "--json")
    assert (done.code, done.err) == (0, "")


def test_install_on_a_terminal_draws_one_bar_within_its_width(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.replies["install"] = INSTALLED
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"x")
    code, screen = on_a_terminal("install", bundle, columns=40)
    assert code == 0
    drawn = screen.partition("\r\n")[0].split("\r")
    assert any("[############" in line for line in drawn)
    assert drawn[-1].rstrip() == "comparing goldens"
    assert max(len(line) for line in drawn) < 40
    assert "installed m@2" in screen


def test_an_error_after_a_bar_starts_on_a_line_of_its_own(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    from edge_runtime.errors import GoldenError

    daemon.replies["install"] = Reply(GoldenError("wrong answers"), EVENTS)
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"x")
    code, screen = on_a_terminal("install", bundle, columns=80)
    assert code == 5
    assert "\r\nedge-runtime: error: wrong answers" in screen


def on_a_terminal(*words: object, columns: int) -> tuple[int, str]:
    """Exit code and screen of a command whose stdout and stderr are a pseudo-terminal."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "edge_runtime", *map(str, words)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        parts = []
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # EIO: the last one at the other end closed it
                break
            if not part:
                break
            parts.append(part)
        code = process.wait(timeout=30)
    os.close(master)
    return code, b"".join(parts).decode()
