"""`status`, `top` and `metrics`: what is on the screen, and the terminal before and after."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_runtime import metrics
from edge_runtime.cli import overview, top
from tests.daemon.world import Daemon, running, until
from tests.metrics import parser

from .conftest import Done

WAIT_S_MAX = 15.0


# --- the text -------------------------------------------------------------------------------------


def durations(*values_s: float) -> dict[str, Any]:
    buckets: dict[int, int] = {}
    for value_s in values_s:
        index = metrics.bucket(round(value_s * 1e9))
        buckets[index] = buckets.get(index, 0) + 1
    middle = sorted(values_s)[len(values_s) // 2] if values_s else None
    found = {"count": len(values_s), "p50_s": middle, "p99_s": max(values_s, default=None)}
    return found | {"buckets": [[index, count] for index, count in sorted(buckets.items())]}


def document(*values_s: float, now_s: float = 100.0, **more: Any) -> dict[str, Any]:
    """A daemon with one model that answered within these times."""
    kinds = {kind: durations(*values_s) for kind in ("request", "queue", "compute")}
    traffic = {"outcomes": {"ok": len(values_s), "refused": 0}, **kinds}
    model = {"name": "light", "state": "ready", "device": "CPU", "traffic": traffic, **more}
    return {"daemon": {"ready": True, "pid": 7}, "models": [model], "now_ns": int(now_s * 1e9)}


def test_rates_and_times_are_those_between_two_looks() -> None:
    before = document(*[0.5] * 1000, now_s=100)
    now = document(*[0.5] * 1000, *[0.002] * 50, now_s=102)
    screen = overview.text(now, None, before)
    assert re.search(r"light +ready .* 25 +1050 ", screen)
    assert re.search(r"light +2\.0 ms +2\.0 ms", screen)
    assert re.search(r"light +500 ms +500 ms", overview.text(now, None))


def test_a_daemon_that_was_restarted_between_two_looks_is_counted_from_its_start() -> None:
    before, now = document(*[0.5] * 1000, now_s=100), document(0.002, 0.002, now_s=101)
    figures = overview.figures(now["models"][0], before["models"][0], 1.0)
    assert figures.per_s == 2
    p50_s, p99_s = figures.durations["request"]
    assert p50_s == p99_s == pytest.approx(0.002, rel=1 / 16)


def test_a_model_that_came_between_two_looks_is_on_the_screen() -> None:
    assert "light" in overview.text(document(0.1), None, {"models": [], "now_ns": 0})


def test_a_model_without_requests_has_no_times() -> None:
    screen = overview.text(document(), None, document(now_s=99))
    assert re.search(r"light +ready .* 0 +0 ", screen) and "REQUEST P50" not in screen


def test_what_went_wrong_is_said_and_what_did_not_is_not() -> None:
    calm = overview.text(document(0.1), None)
    assert "died" not in calm and "refused" not in calm
    wrong = document(0.1, deaths={"hang": 2}, load_failures={"no_memory": 1}, fallbacks=3)
    wrong["models"][0] |= {"state": "failed", "reason": "a \x1b[31mred\x1b[0m reason"}
    wrong["models"][0]["traffic"]["outcomes"]["refused"] = 5
    screen = overview.text(wrong, None)
    assert "light: 5 refused, 2 x died: hang, 1 x not loaded: no_memory, 3 x fell back" in screen
    assert "light is failed: a \\x1b[31mred" in screen and "\x1b" not in screen


def test_an_empty_answer_is_a_screen_too() -> None:
    for empty in ({}, {"models": []}, {"models": [{}]}):
        assert overview.text(empty, 80).startswith("edge-runtime ?: not ready")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, "-"), (0.0, "0.0 us"), (2.7e-6, "2.7 us"), (1.94e-5, "19 us")),
        *((0.000_999_6, "1.0 ms"), (0.0123, "12 ms"), (1.5, "1.5 s"), (137.4, "137 s")),
    ],
)
def test_times_have_three_digits_at_most(seconds: float | None, text: str) -> None:
    assert overview.short(seconds) == text


@pytest.mark.parametrize("text", ["0", "-1", "0.05", "1e9", "soon", "nan", "inf", ""])
def test_an_interval_is_a_sensible_number(edge: Callable[..., Done], text: str) -> None:
    done = edge("top", f"--interval={text}")
    assert done.code == 2 and "0.1 to 3600" in done.err
    assert top.interval("0.5") == 0.5


# --- the daemon -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as started:
        started.add("light")
        yield started


class Traffic:
    """A client that asks without a pause."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._done.is_set():
            self._daemon.infer("light")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(WAIT_S_MAX)


def test_status_shows_the_model_and_its_requests(daemon: Daemon, edge: Callable[..., Done]) -> None:
    before = daemon.control("status")["models"][0]["traffic"]["outcomes"]["ok"]
    for _ in range(5):
        daemon.infer("light")
    done = edge("--run-dir", daemon.run_dir, "status")
    assert done.code == 0 and f"pid {daemon.pid}" in done.out
    assert re.search(rf"light +ready +1 +fp32 +CPU +\S+ +{before + 5} ", done.out)
    assert edge("--run-dir", daemon.run_dir, "status", "--json").out.startswith("{")


def test_metrics_prints_the_text_alone(daemon: Daemon, edge: Callable[..., Done]) -> None:
    done = edge("--run-dir", daemon.run_dir, "metrics")
    assert done.code == 0 and "edge_requests_total" in parser.parse(done.out)


def test_once_looks_twice_and_needs_no_terminal(daemon: Daemon, edge: Callable[..., Done]) -> None:
    with Traffic(daemon):
        done = edge("--run-dir", daemon.run_dir, "top", "--once", "--interval", "0.3")
    assert done.code == 0 and "\x1b" not in done.out
    row = re.search(r"light +ready +1 +fp32 +CPU +(\d+) ", done.out)
    assert row and int(row[1]) > 10


def test_without_a_terminal_top_says_what_to_do(daemon: Daemon, edge: Callable[..., Done]) -> None:
    done = edge("--run-dir", daemon.run_dir, "top")
    assert done.code == 2 and "--once" in done.err
    done = edge("--run-dir", daemon.run_dir, "top", "--json")
    assert done.code == 2 and "status --json" in done.out


class Terminal:
    """`top` on a pseudo-terminal; what it wrote so far is in `text`."""

    def __init__(self, daemon: Daemon, *words: str, columns: int = 120, lines: int = 40) -> None:
        self._master, terminal = pty.openpty()
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
        self.settings = termios.tcgetattr(terminal)
        command = [sys.executable, "-m", "edge_runtime", "--run-dir", str(daemon.run_dir)]
        self.process = subprocess.Popen(
            [*command, "top", "--interval", "0.1", *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        self._terminal = terminal
        self.text = ""

    def read(self) -> bool:
        """Take what there is, within a moment."""
        if not select.select([self._master], [], [], 0.05)[0]:
            return False
        self.text += os.read(self._master, 65536).decode()
        return True

    def until(self, condition: Callable[[str], Any], what: str) -> None:
        deadline_s = time.monotonic() + WAIT_S_MAX
        while not condition(self.text):
            assert time.monotonic() < deadline_s, f"{what} did not come: {self.text[-2000:]!r}"
            self.read()

    def frames(self) -> list[str]:
        """The screens drawn whole, the newest last; before the first an empty one."""
        return ["", *self.text.split(top.HOME)[1:-1]]

    def end(self, number: int) -> int:
        """Its exit code; what it writes is read meanwhile, or it could not end."""
        self.process.send_signal(number)
        self.until(lambda _: self.process.poll() is not None, "its end")
        while self.read():
            pass
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._terminal)


@pytest.fixture
def on_terminal(daemon: Daemon) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*words: str, of: Daemon = daemon, **size: int) -> Terminal:
        made.append(Terminal(of, *words, **size))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_top_redraws_with_the_rates_of_now(
    daemon: Daemon, on_terminal: Callable[..., Terminal]
) -> None:
    screen = on_terminal()
    screen.until(lambda text: len(text.split(top.HOME)) > 3, "the third screen")
    assert screen.text.startswith(top.ENTER)
    with Traffic(daemon):
        busy = r"light +ready +1 +fp32 +CPU +[1-9]\d\d* "
        screen.until(lambda _: re.search(busy, screen.frames()[-1]), "a rate")
    calm = r"light +ready +1 +fp32 +CPU +0 "
    screen.until(lambda _: re.search(calm, screen.frames()[-1]), "silence")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_whatever_ends_it_the_terminal_is_as_before(
    on_terminal: Callable[..., Terminal], number: int, code: int
) -> None:
    screen = on_terminal()
    screen.until(lambda text: top.REST in text, "a screen")
    assert screen.end(number) == code
    assert screen.text.endswith(top.LEAVE) and "Traceback" not in screen.text
    assert termios.tcgetattr(screen._terminal) == screen.settings


def test_a_small_terminal_gets_what_fits(on_terminal: Callable[..., Terminal]) -> None:
    screen = on_terminal(columns=40, lines=5)
    screen.until(lambda text: len(text.split(top.HOME)) > 2, "a second screen")
    lines = screen.frames()[-1].removesuffix(top.REST).split("\r\n")
    assert len(lines) <= 5 and all(len(line.removesuffix(top.LINE_END)) <= 40 for line in lines)


def test_a_daemon_that_goes_is_said_and_one_that_comes_is_shown(
    on_terminal: Callable[..., Terminal],
) -> None:
    with contextlib.ExitStack() as stack:
        other = Daemon()
        stack.callback(other.remove)
        other.start().add("light")
        screen = on_terminal(of=other)
        screen.until(lambda text: "light  " in text, "a screen")
        other.stop()
        screen.until(lambda _: "error:" in screen.frames()[-1], "the error")
        other.start()
        until(lambda: other.ready("light"))
        screen.until(lambda _: "light  " in screen.frames()[-1], "the model")
        assert screen.end(signal.SIGINT) == 0
        other.stop()


def test_without_a_daemon_there_is_an_error_and_no_screen(
    tmp_path: Any, on_terminal: Callable[..., Terminal], daemon: Daemon
) -> None:
    screen = on_terminal("--run-dir", str(tmp_path))
    assert screen.process.wait(WAIT_S_MAX) == 6
    while screen.read():
        pass
    assert "error" in screen.text and "\x1b" not in screen.text
