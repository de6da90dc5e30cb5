"""`config show` and `config check`.

Law of this file: rows in, text out; what the options are is stated in edge_runtime.config.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import config
from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.cli.control import call

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: Any) -> None:
    """Add the parsers of `config show` and `config check`."""
    parser = subparsers.add_parser("config", description="Show or check the configuration.")
    verbs = parser.add_subparsers(dest="verb", metavar="show|check", required=True)
    show = verbs.add_parser("show", description="Every option with its value, default and reason.")
    show.add_argument(
        "--config", metavar="FILE", type=Path, help="a file; without it, the running daemon's"
    )
    show.add_argument("--defaults", action="store_true", help="the defaults, without a daemon")
    show.set_defaults(handler=_show)
    check = verbs.add_parser("check", description="Exit 0 if the file is right, 2 if not.")
    check.add_argument("file", metavar="FILE", type=Path)
    check.set_defaults(handler=_check)
    for inner in (show, check):
        args.add_global(inner)


def _show(arguments: argparse.Namespace) -> int:
    if arguments.config is not None or arguments.defaults:
        reply = document(config.load(arguments.config), str(arguments.config or "defaults"))
    else:
        running = config.parse(call(arguments, "config")["config"], "the running daemon")
        reply = document(running, "the running daemon")
    if arguments.json:
        output.print_json(reply)
    else:
        print(text(reply, output.terminal_columns(sys.stdout)))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    loaded = config.load(arguments.file)
    changed = [row for row in config.describe(loaded) if row.value != row.default]
    if arguments.json:
        output.print_json(document(loaded, str(arguments.file)))
    else:
        print(f"{arguments.file} is right; it changes {len(changed)} of the defaults")
        for row in changed:
            print(f"  {row.path} = {_shown(row.value, row.unit)}")
    return 0


def document(loaded: config.Config, source: str) -> dict[str, Any]:
    """What `config show --json` prints: the source, and a row for each option."""
    return {"source": source, "options": [row._asdict() for row in config.describe(loaded)]}


def text(reply: dict[str, Any], width: int | None) -> str:
    """The answer as a table; `*` marks what is not the default."""
    headers = ("", "OPTION", "VALUE", "DEFAULT", "WHY")
    rows = [
        (
            " " if row["value"] == row["default"] else "*",
            row["path"],
            _shown(row["value"], row["unit"]),
            _shown(row["default"], row["unit"]),
            row["reason"],
        )
        for row in reply["options"]
    ]
    source = output.printable(reply.get("source", ""))
    return f"configuration: {source}\n\n" + output.table(headers, rows, width)


def _shown(value: Any, unit: str) -> str:
    if value is None or value in ("", [], ()):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if unit == "bytes" and isinstance(value, int):
        return output.size(value) if value else "0"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value} {unit}" if unit in ("s", "ms") else str(value)
