"""`edge-quantize trials`: what a search tried, from its work folder, also while it runs.

Law of this file: words in, the journal as text or JSON out; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_runtime.cli import output
from edge_runtime.errors import NotFoundError


def add_parser(subparsers: Any) -> None:
    """The command."""
    parser = subparsers.add_parser("trials", help="what a search tried, and its front")
    parser.add_argument("work", metavar="DIR", type=Path, help="the search's --work")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Read and print."""
    import msgspec

    from quantize import search, trials
    from quantize.report import trials as report

    path = arguments.work / search.JOURNAL
    if not path.exists():
        raise NotFoundError(
            f"holds no {search.JOURNAL}",
            where=str(arguments.work),
            expected="the --work folder of a run whose recipe has a section `search`",
        )
    found = trials.read(path)
    front = search.front(found)
    if arguments.json:
        names = [one.variant.name for one in front]
        output.print_json({"trials": msgspec.to_builtins(found), "front": names})
    else:
        print(report.text(found, front, output.terminal_columns(sys.stdout)))
    return 0
