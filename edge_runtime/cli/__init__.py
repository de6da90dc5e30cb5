"""The command line: parse, call, print.

Law of this package: commands are thin. They turn arguments into one call of the client (or of a
part below), and its answer into text or JSON; what is decided is decided elsewhere. This file finds
the command, and maps every failure to a message and an exit code (docs/cli.md). It imports as
little as it can, because every command pays for it: a command's module is imported when it is run.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime.errors import EdgeError, InternalError, StorageError, UsageError, did_you_mean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PROGRAM = "edge-runtime"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: whoever read our output went away


class Command(NamedTuple):
    """Where a command lives. The module's `add_parser(subparsers)` adds it, with its handler."""

    module: str
    summary: str


# In the order of --help. A command that comes later gets a line here and a module.
COMMANDS: dict[str, Command] = {
    "serve": Command("edge_runtime.cli.serve", "run the daemon"),
    "install": Command("edge_runtime.cli.change", "install a bundle"),
    "activate": Command("edge_runtime.cli.change", "serve an installed version: NAME@VERSION"),
    "rollback": Command("edge_runtime.cli.change", "serve the version that served before"),
    "shadow": Command("edge_runtime.cli.trial", "show answers to a candidate: NAME[@VERSION]"),
    "split": Command("edge_runtime.cli.trial", "have a candidate answer a share: NAME[@VERSION]"),
    "promote": Command("edge_runtime.cli.trial", "serve the candidate"),
    "unload": Command("edge_runtime.cli.change", "stop serving a model and free its memory"),
    "remove": Command("edge_runtime.cli.change", "delete an installed version: NAME@VERSION"),
    "gc": Command("edge_runtime.cli.change", "delete what the byte budget does not allow"),
    "status": Command("edge_runtime.cli.status", "the daemon and its models on one screen"),
    "top": Command("edge_runtime.cli.top", "the same, redrawn every second"),
    "models": Command("edge_runtime.cli.status", "what is installed and what serves"),
    "ps": Command("edge_runtime.cli.status", "the processes and what they use"),
    "why": Command("edge_runtime.cli.status", "how a model came to its state"),
    "ready": Command("edge_runtime.cli.status", "exit 0 if a model answers, 6 if not"),
    "metrics": Command("edge_runtime.cli.status", "every figure as Prometheus reads it"),
    "infer": Command("edge_runtime.cli.infer", "run a model on images, arrays or JSON"),
    "bench": Command("edge_runtime.cli.bench", "offer a model more than it can take, and measure"),
    "config": Command("edge_runtime.cli.configuration", "show or check the configuration"),
    "profile": Command("edge_runtime.cli.profile", "what this board is, and how to use it"),
    "bundle": Command("edge_runtime.cli.bundle", "create, inspect, lint or extract a bundle"),
    "doctor": Command("edge_runtime.cli.doctor", "is this machine fit to serve, and what to do"),
    "version": Command("edge_runtime.cli.status", "the version of this program"),
}

# Options of every command, before or after its name: flag -> the name of its value, or none.
GLOBAL_OPTIONS = {"--run-dir": "DIR", "--timeout": "S", "--json": ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises but for programmer errors in tests."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = any(word == "--json" or word.startswith("--json=") for word in words)
    try:
        _never_fail_to_encode()
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after it printed a --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except EdgeError as error:
        return _report(error, as_json)
    except Exception as error:  # the last door: the user gets a line, not a stack
        if os.environ.get("EDGE_RUNTIME_DEBUG") == "1":
            raise
        return _report(_unexpected(error), as_json)


def _run(words: list[str]) -> int:
    before, name, after = split(words)
    if name is None:
        return _without_command(before)
    handler, arguments = parse(before, name, after)
    return int(handler(arguments))


def split(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The words before the command, the command (None if there is none), and the words after it."""
    takes_value = False
    for index, word in enumerate(words):
        if takes_value:
            takes_value = False
        elif not word.startswith("-"):
            return list(words[:index]), word, list(words[index + 1 :])
        else:
            takes_value = bool(GLOBAL_OPTIONS.get(word))
    return list(words), None, []


def parse(before: list[str], name: str, after: list[str]) -> tuple[Any, argparse.Namespace]:
    """The command's handler and its arguments, with `run_dir`, `timeout_s` and `json` filled in.

    Raises:
        UsageError: no such command or option, or a wrong value.
    """
    import importlib

    if name not in COMMANDS:
        raise _no_such_command(name)
    from edge_runtime.cli import arguments as args

    general = args.parse_global(before)
    module = importlib.import_module(COMMANDS[name].module)
    parsed = args.parse_command(module.add_parser, [name, *after])
    handler = parsed.handler
    return handler, args.merge(general, parsed)


def _no_such_command(name: str) -> UsageError:
    near = did_you_mean(name, COMMANDS)
    expected = "" if near else "one of " + ", ".join(COMMANDS)
    return UsageError(f"there is no command {name!r}", expected=expected, remedy=near)


def _without_command(words: list[str]) -> int:
    """`--version`, `--help`, or a usage error."""
    if "--version" in words:
        from edge_runtime import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if {"-h", "--help"} & set(words):
        print(_help())
        return 0
    from edge_runtime.cli import arguments as args

    args.parse_global(words)
    raise UsageError("no command is given", remedy=f"`{PROGRAM} --help` lists them")


def _help() -> str:
    lines = [
        f"usage: {PROGRAM} [--run-dir DIR] [--timeout S] [--json] COMMAND ...",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "options, before or after the command:",
        "  --run-dir DIR  where the daemon's sockets are "
        "(default: $EDGE_RUNTIME_RUN_DIR, else /run/edge-runtime)",
        "  --timeout S    give up after so many seconds",
        "  --json         print the answer as JSON, also an error",
        "  --version      print the version",
        "",
        f"`{PROGRAM} COMMAND --help` says more about one command.",
    ]
    return "\n".join(lines)


# --- failures -----------------------------------------------------------------------------------


def _report(error: EdgeError, as_json: bool) -> int:
    """Print an error for a person on stderr, or for a program on stdout; its exit code."""
    from edge_runtime.cli import output

    try:
        if as_json:
            output.print_json({"error": error.document()})
        else:
            print(output.error_text(PROGRAM, error), file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # nobody listens: the exit code still tells
        _discard_stdout()
    return error.exit_code


# What a bare install leaves out: module -> the extra that brings it.
_EXTRAS = {"numpy": "numpy", "PIL": "image"}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def _unexpected(error: Exception) -> EdgeError:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        # Every door below turns its OSErrors into ours; what is left is our own printing.
        _discard_stdout()
        return StorageError(f"the output cannot be written: {error.strerror}", where="stdout")
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return UsageError(
            f"this command needs {error.name}, which is not installed",
            remedy=f"pip install 'edge-runtime[{_EXTRAS[error.name]}]'",
        )
    first = str(error).partition("\n")[0]
    return InternalError(
        f"unexpected {type(error).__name__}: {first}",
        remedy="please report it; EDGE_RUNTIME_DEBUG=1 shows where it happened",
    )


def _never_fail_to_encode() -> None:
    """A terminal without UTF-8 gets an escape for `µ`, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
