"""What all commands' parsers share.

Law of this file: the only place that knows how options before the command and options after it come
together. A mistake on the command line is a UsageError like any other, not an exit inside argparse.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RUN_DIR_DEFAULT = "/run/edge-runtime"  # what systemd's RuntimeDirectory=edge-runtime makes
TIMEOUT_MAX_S = 86400.0


class Parser(argparse.ArgumentParser):
    """argparse, but an error is raised, not printed; and options are never abbreviated."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today names two options tomorrow.
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"`{self.prog} --help` shows how it is used")


def parse_global(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words before the command.

    Raises:
        UsageError: an unknown option or a wrong value.
    """
    parser = Parser(prog="edge-runtime", add_help=False)
    add_global(parser)
    return parser.parse_args(words)


def add_global(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Give a command's parser the global options, so that they work after its name too."""
    quiet = argparse.SUPPRESS  # absent unless given: what was said before the command stands
    parser.add_argument(
        "--run-dir", metavar="DIR", default=quiet, help="the daemon's run directory"
    )
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        metavar="S",
        type=seconds,
        default=quiet,
        help="give up after so many seconds",
    )
    if json:
        parser.add_argument(
            "--json", action="store_true", default=quiet, help="print the answer as JSON"
        )


def parse_command(add_parser: Callable[[Any], Any], words: Sequence[str]) -> argparse.Namespace:
    """Parse a command and the words after it with the parser that its module adds."""
    parser = Parser(prog="edge-runtime")
    add_parser(parser.add_subparsers(dest="command", metavar="COMMAND", required=True))
    return parser.parse_args(words)


def merge(general: argparse.Namespace, command: argparse.Namespace) -> argparse.Namespace:
    """One namespace: what was said after the command wins; defaults where nothing was said."""
    default_dir = os.environ.get("EDGE_RUNTIME_RUN_DIR") or RUN_DIR_DEFAULT
    merged = {"run_dir": default_dir, "timeout_s": None, **vars(general), **vars(command)}
    merged["run_dir"] = Path(merged["run_dir"])
    merged["json"] = bool(getattr(general, "json", False) or getattr(command, "json", False))
    return argparse.Namespace(**merged)


# --- values -------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """A duration in seconds: more than 0, at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= TIMEOUT_MAX_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds (more than 0, at most {TIMEOUT_MAX_S:.0f})"
        )
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """A share: 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share (0 to 1)")
    return value


def name_maybe_version(text: str) -> tuple[str, int | None]:
    """`NAME` or `NAME@VERSION`."""
    return name_at_version(text) if "@" in text else (text, None)


def name_at_version(text: str) -> tuple[str, int]:
    """`NAME@VERSION`; the version is the counter, not the label."""
    name, at, version = text.rpartition("@")
    if not (at and name and version.isascii() and version.isdigit() and len(version) < 19):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME@VERSION, such as fashion-mnist@2 (`models` shows the versions)"
        )
    return name, int(version)
