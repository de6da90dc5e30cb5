"""`edge-quantize`: the builder's command line.

Law of this file: the table of commands, and the one place where failures become messages and exit
codes (those of docs/cli.md). A command lives in its own file; nothing heavy is imported before a
command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import EdgeError, InternalError

PROGRAM = "edge-quantize"
EXIT_INTERRUPTED = 130
# Each has `add_parser(subparsers)`, in the order in which help shows them.
COMMANDS = (
    "quantize.cli.making",
    "quantize.cli.starting",
    "quantize.cli.sensitivity",
    "quantize.cli.trials",
    "quantize.cli.comparing",
    "quantize.cli.reporting",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _tidy_when_told_to_end():
            arguments = _parser().parse_args(words)
            return int(arguments.handler(arguments))
    except SystemExit as stop:  # argparse, after it printed a --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except EdgeError as error:
        return _report(error, "--json" in words)
    except Exception as error:  # the last door: the user gets a line, not a stack
        if os.environ.get("EDGE_RUNTIME_DEBUG") == "1":
            raise
        first = str(error).partition("\n")[0]
        unexpected = InternalError(
            f"unexpected {type(error).__name__}: {first}",
            remedy="please report it; EDGE_RUNTIME_DEBUG=1 shows where it happened",
        )
        return _report(unexpected, "--json" in words)


@contextlib.contextmanager
def _tidy_when_told_to_end() -> Iterator[None]:
    """SIGTERM unwinds like an interrupt: the private daemon ends and temporary folders go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = args.Parser(prog=PROGRAM, description="From a trained model to a smaller, proven one.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).add_parser(commands)
    return parser


def _report(error: EdgeError, as_json: bool) -> int:
    if as_json:
        output.print_json({"error": error.document()})
    else:
        print(output.error_text(PROGRAM, error), file=sys.stderr)
    return error.exit_code
