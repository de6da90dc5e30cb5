"""`top`: the daemon's screen, redrawn until interrupted.

Law of this file: it asks, waits and draws, with a few ANSI sequences and no library; what is drawn
is `overview`'s. Whatever ends it, the terminal is as it was before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output, overview
from edge_runtime.cli.control import call
from edge_runtime.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERVAL_S = 1.0
# Each look costs the daemon some milliseconds: more often is no information.
INTERVAL_S_MIN, INTERVAL_S_MAX = 0.1, 3600.0
# The other screen without a cursor, and back (xterm's ctlseqs, DECSET 1049 and 25).
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, LINE_END, REST = "\x1b[H", "\x1b[K", "\x1b[J"
EXIT_TERMINATED = 143  # 128 + SIGTERM


def add_parser(subparsers: Any) -> None:
    """Add this file's parser."""
    parser = subparsers.add_parser(
        "top", description="Rates and durations are of the time since the last look. ^C ends it."
    )
    parser.set_defaults(handler=_top)
    parser.add_argument(
        "--interval",
        metavar="S",
        type=interval,
        default=INTERVAL_S,
        help=f"seconds between two looks (default {INTERVAL_S:g})",
    )
    parser.add_argument(
        "--once", action="store_true", help="look twice, print the figures between, and end"
    )
    args.add_global(parser)


def interval(text: str) -> float:
    """Seconds between two looks."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not INTERVAL_S_MIN <= value <= INTERVAL_S_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds from {INTERVAL_S_MIN:g} to {INTERVAL_S_MAX:g}"
        )
    return value


def _top(arguments: argparse.Namespace) -> int:
    if arguments.json:
        raise UsageError("top has no JSON", remedy="`edge-runtime status --json` has the counts")
    if not arguments.once and not sys.stdout.isatty():
        raise UsageError("top draws on a terminal", remedy="use --once, or `edge-runtime status`")
    before = _look(arguments)  # without a daemon: an error, not a screen
    if arguments.once:
        time.sleep(arguments.interval)
        print(overview.text(_look(arguments), output.terminal_columns(sys.stdout), before))
        return 0
    with _screen(), contextlib.suppress(KeyboardInterrupt):
        _watch(arguments, before)
    return 0


def _watch(arguments: argparse.Namespace, first: dict[str, Any]) -> None:
    """Look and draw for ever; a daemon that is gone may come back."""
    _draw(overview.text(first, _size().columns))
    before: dict[str, Any] | None = first
    while True:
        time.sleep(arguments.interval)
        try:
            now = _look(arguments)
        except UnavailableError as error:
            before = None
            _draw(output.error_text("edge-runtime", error))
            continue
        _draw(overview.text(now, _size().columns, before))
        before = now


def _look(arguments: argparse.Namespace) -> dict[str, Any]:
    return call(arguments, "status", {"buckets": True})


def _size() -> os.terminal_size:
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return os.terminal_size((80, 24))


def _draw(text: str) -> None:
    """Over what is there: nothing flickers. What does not fit is cut."""
    size = _size()
    lines = [line[: size.columns] for line in text.split("\n")[: max(size.lines - 1, 1)]]
    sys.stdout.write(HOME + "".join(f"{line}{LINE_END}\n" for line in lines) + REST)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The other screen, and back at the end, also when told to terminate."""

    def terminated(*_: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    old = signal.signal(signal.SIGTERM, terminated)
    sys.stdout.write(ENTER)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, old)
