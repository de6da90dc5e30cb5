"""`edge-quantize sensitivity`: which layers suffer from integers.

Law of this file: words in, one measurement, its text or JSON out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output

METHODS = ("average", "minmax", "entropy", "percentile", "mse")


def add_parser(subparsers: Any) -> None:
    """The command."""
    parser = subparsers.add_parser("sensitivity", help="which layers suffer from integers")
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument(
        "--data", required=True, help=".npz with x and y, folder of images, or module:function"
    )
    parser.add_argument("--calibration", default="", help="other data for calibration alone")
    parser.add_argument("--drop-max", type=float, metavar="LOSS", help="allowed loss of the metric")
    parser.add_argument(
        "--samples", type=args.count, default=0, metavar="N", help="judge each layer by so many"
    )
    parser.add_argument("--method", choices=METHODS, default="", help="how ranges are read")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    import msgspec

    from edge_runtime.cli.progress import Progress
    from quantize import sensitivity
    from quantize.report import layers

    with Progress(sys.stderr, quiet=arguments.json) as progress:
        found = sensitivity.of_model(
            sensitivity.Question(
                arguments.model,
                arguments.data,
                arguments.calibration,
                arguments.drop_max,
                arguments.samples,
                arguments.method,
            ),
            progress.update,
        )
    if arguments.json:
        output.print_json(msgspec.to_builtins(found))
    else:
        print(layers.text(found, output.terminal_columns(sys.stdout)))
    return 0
