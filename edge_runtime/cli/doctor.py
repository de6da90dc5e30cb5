"""`doctor`: is this machine fit to serve, and what to do where it is not.

Law of this file: parse, call, print. What is looked at and what is thought of it is in `health/`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import health, output
from edge_runtime.cli.serve import STATE_DIR_DEFAULT

if TYPE_CHECKING:
    import argparse

    from edge_runtime.cli.health import Check, Verdict

MARKS: dict[Verdict, str] = {"pass": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
MARKS["unknown"] = "?"
_COLOURS: dict[Verdict, str] = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_COLOURS["unknown"] = "2"
_INDENT = " " * 8  # of what belongs to a line


def add_parser(subparsers: Any) -> None:
    """Add the parser of `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        description="Look at the machine, the backends and the daemon, and say what to do. "
        "Exit code: 0 nothing wrong, 1 warnings, 2 something failed.",
    )
    parser.add_argument(
        "--root",
        metavar="PATH",
        type=Path,
        default=Path("/"),
        help="examine the machine recorded below PATH; backends are not tried then",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("EDGE_RUNTIME_STATE_DIR") or STATE_DIR_DEFAULT),
        help="where installed models are kept (default: %(default)s)",
    )
    args.add_global(parser)
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from edge_runtime.backends.probing import TIMEOUT_S
    from edge_runtime.cli.health import examination
    from edge_runtime.cli.health.facts import World

    state_dir, run_dir = arguments.state_dir.absolute(), arguments.run_dir.absolute()
    world = World(arguments.root.absolute(), state_dir, run_dir)
    began_s = time.monotonic()
    checks = examination.examine(world, arguments.timeout_s or TIMEOUT_S)
    took_s = time.monotonic() - began_s
    if arguments.json:
        output.print_json(document(checks, took_s))
    else:
        print(text(checks, took_s, colours=_wants_colours()))
    return health.exit_code(checks)


def document(checks: list[Check], took_s: float) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "verdict": health.overall(checks),
        "counts": health.counts(checks),
        "took_s": round(took_s, 3),
        "checks": checks,
    }


def text(checks: list[Check], took_s: float, *, colours: bool) -> str:
    """The report: a heading for each group, a line for each check, what to do below it."""
    lines: list[str] = []
    group = ""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        if check.group != group:
            group = check.group
            lines += ["", group] if lines else [group]
        lines.append(_line(check, width, colours))
        if check.remedy and check.verdict in ("warn", "fail"):
            lines.append(f"{_INDENT}{'':<{width}}  do: {output.printable(check.remedy)}")
    return "\n".join([*lines, "", _summary(checks, took_s, colours)])


def _line(check: Check, width: int, colours: bool) -> str:
    mark = _coloured(f"{MARKS[check.verdict]:<4}", check.verdict, colours)
    return f"  {mark}  {check.name:<{width}}  {output.printable(check.summary)}"


def _summary(checks: list[Check], took_s: float, colours: bool) -> str:
    counts = health.counts(checks)
    words = {"pass": "passed", "warn": "warnings", "fail": "failed"}
    parts = [f"{counts[verdict]} {word}" for verdict, word in words.items()]
    parts += [f"{counts['skip']} do not apply", f"{counts['unknown']} not known"]
    said = _coloured(health.overall(checks), health.overall(checks), colours)
    return f"{said}: {', '.join(parts)} ({took_s:.1f} s)"


def _coloured(word: str, verdict: Verdict, colours: bool) -> str:
    return f"\x1b[{_COLOURS[verdict]}m{word}\x1b[0m" if colours else word


def _wants_colours() -> bool:
    """On a terminal, unless the user says no (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
