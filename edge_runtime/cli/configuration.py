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
from edge_runtime.documents import Row

if TYPE_CHECKING:
    import argparse


# Where a value comes from -> its mark; others come from the device profile.
_MARKS = {"default": " ", "configuration": "*"}


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
        answer = call(arguments, "config")
        running = config.parse(answer["config"], "the running daemon")
        reply = document(running, "the running daemon", answer.get("profile") or {})
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


def document(
    loaded: config.Config, source: str, profile: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `config show --json` prints: the source, and a row for each option.

    Args:
        profile: the device profile beneath the file, as the daemon tells it.
    """
    profile = profile or {}
    origins = profile.get("origins") or {}
    options = [
        {**row._asdict(), "from": _origin(row, profile.get("values") or {}, origins)}
        for row in config.describe(loaded)
    ]
    return {"source": source, "profile": profile.get("name", ""), "options": options}


def _origin(row: Row, values: dict[str, Any], origins: dict[str, str]) -> str:
    """Who says a value: the default, a file of the device profile, or the configuration."""
    if row.value == row.default:
        return "default"
    if row.path in origins and row.value == values.get(row.path):
        return f"profile ({origins[row.path]})"
    return "configuration"


def text(reply: dict[str, Any], width: int | None) -> str:
    """The answer as a table; `*` marks what is not the default, `+` what the profile says."""
    headers = ("", "OPTION", "VALUE", "DEFAULT", "WHY")
    rows = [
        (
            _MARKS.get(row.get("from", ""), "+"),
            row["path"],
            _shown(row["value"], row["unit"]),
            _shown(row["default"], row["unit"]),
            row["reason"],
        )
        for row in reply["options"]
    ]
    head = f"configuration: {output.printable(reply.get('source', ''))}"
    if reply.get("profile"):
        head += f"; + marks what the device profile {output.printable(reply['profile'])} says"
    return f"{head}\n\n" + output.table(headers, rows, width)


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
