"""`edge-quantize report`: an outcome that was kept, shown again as text or as a page.

Law of this file: words in, calls of `report`; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_runtime.cli import output


def add_parser(subparsers: Any) -> None:
    """The command."""
    report = subparsers.add_parser("report", help="show an outcome again")
    report.add_argument("outcome", metavar="OUTCOME.json", type=Path)
    report.add_argument("-o", "--out", metavar="FILE.html", type=Path, help="write a page")
    report.add_argument(
        "--sensitivity",
        metavar="FILE.json",
        type=Path,
        help="show layers too: what `edge-quantize sensitivity --json` printed",
    )
    report.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    from quantize.report import saved, text

    outcome = saved.read(arguments.outcome)
    if arguments.sensitivity is not None:
        outcome = saved.with_layers(outcome, arguments.sensitivity)
    if arguments.out is None:
        print(text.text(outcome, output.terminal_columns(sys.stdout)))
        return 0
    saved.write_page(outcome, arguments.out)
    print(f"wrote {arguments.out}")
    return 0
