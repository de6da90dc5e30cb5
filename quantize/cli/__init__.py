"""`edge-quantize`: the builder's command line.

Law of this file: commands, and the one place where failures become messages and exit codes (those
of docs/cli.md). Words in, one call of `workflow`, its outcome as text or JSON. Nothing heavy is
imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import EdgeError, InternalError

PROGRAM = "edge-quantize"
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = args.Parser(prog=PROGRAM, description="From a trained model to a smaller, proven one.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    auto = commands.add_parser("auto", help="the sensible whole, without a recipe")
    auto.add_argument("model", metavar="MODEL", type=Path)
    auto.add_argument(
        "--data", required=True, help=".npz with x and y, folder of images, or module:function"
    )
    auto.add_argument("--calibration", default="", help="other data for calibration alone")
    auto.add_argument("--target", default="generic-x86_64", help="a device profile")
    auto.add_argument("--name", default="", help="the model's name (default: the file's)")
    auto.add_argument("--version", type=args.count, default=1, metavar="N")
    auto.add_argument("--labels", type=Path, metavar="FILE", help="names of classes, one a line")
    auto.add_argument("--drop-max", type=float, metavar="LOSS", help="allowed loss of the metric")
    auto.add_argument("--samples", type=args.count, default=0, metavar="N", help="judge so many")
    auto.add_argument("--threads", type=args.count, default=1, metavar="N")
    auto.set_defaults(handler=_auto)
    run = commands.add_parser("run", help="run a recipe")
    run.add_argument("recipe", metavar="RECIPE", type=Path)
    run.set_defaults(handler=_run)
    for command in (auto, run):
        command.add_argument("-o", "--out", metavar="BUNDLE", type=Path, help="write what passed")
        command.add_argument("--work", metavar="DIR", type=Path, help="keep intermediate models")
        command.add_argument("--dry-run", action="store_true", help="show the plan, do nothing")
        command.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return parser


def _auto(arguments: argparse.Namespace) -> int:
    from quantize import automatic

    told = {key: getattr(arguments, key) for key in automatic.Wish._fields}
    return _do(arguments, automatic.recipe(automatic.Wish(**told)))


def _run(arguments: argparse.Namespace) -> int:
    from quantize import recipe

    return _do(arguments, recipe.load(arguments.recipe))


def _do(arguments: argparse.Namespace, recipe: Any) -> int:
    import tempfile

    import msgspec

    from edge_runtime.cli.progress import Progress
    from quantize import workflow
    from quantize.report import text

    ready = workflow.prepare(recipe)
    if arguments.dry_run:
        plan = [
            {
                "variant": one.variant.name,
                "backend": one.variant.backend,
                "passes": one.variant.passes,
            }
            for one in ready.chains
        ]
        if arguments.json:
            output.print_json({"plan": plan, "samples": len(ready.split.evaluation)})
        else:
            print(_plan_text(ready))
        return 0
    progress = Progress(sys.stderr, quiet=arguments.json)
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as temporary:
        try:
            done = workflow.run(
                ready,
                arguments.work or Path(temporary),
                arguments.out,
                lambda what: progress.update(what, 0, 0),
            )
        finally:
            progress.close()
    if arguments.json:
        output.print_json(msgspec.to_builtins(done.outcome))
        return 0
    print(text.text(done.outcome, output.terminal_columns(sys.stdout)))
    if done.created is not None:
        print(f"\nwrote {arguments.out}: {len(done.outcome.shipped)} variants")
    return 0


def _plan_text(ready: Any) -> str:
    lines = [
        f"{len(ready.split.calibration)} samples calibrate, {len(ready.split.evaluation)} judge"
    ]
    for one in ready.chains:
        steps = " -> ".join(step["use"] for step in one.variant.passes) or "as it is"
        lines.append(f"  {one.variant.name:<18} {one.variant.backend:<12} {steps}")
    return "\n".join(lines)


def _report(error: EdgeError, as_json: bool) -> int:
    if as_json:
        output.print_json({"error": error.document()})
    else:
        print(output.error_text(PROGRAM, error), file=sys.stderr)
    return error.exit_code
