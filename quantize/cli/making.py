"""`edge-quantize auto` and `run`: from a model to a bundle.

Law of this file: words in, one call of `workflow`, its outcome as text, JSON or a page. Exit code 5
says that nothing but the float model passed: what was asked for does not exist.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import ModelError, StorageError

if TYPE_CHECKING:
    from quantize.passes import Say
    from quantize.recipe import Recipe
    from quantize.workflow import Finished, Prepared


def add_parser(subparsers: Any) -> None:
    """Both commands."""
    auto = subparsers.add_parser("auto", help="the sensible whole, without a recipe")
    add_wish(auto)
    auto.set_defaults(handler=_auto)
    run = subparsers.add_parser("run", help="run a recipe")
    run.add_argument("recipe", metavar="RECIPE", type=Path)
    run.set_defaults(handler=_run)
    for command in (auto, run):
        command.add_argument("-o", "--out", metavar="BUNDLE", type=Path, help="write what passed")
        command.add_argument("--work", metavar="DIR", type=Path, help="keep intermediate models")
        command.add_argument("--report", metavar="FILE.html", type=Path, help="write a page")
        command.add_argument(
            "--out-json", metavar="FILE.json", type=Path, help="write the outcome, for `report`"
        )
        command.add_argument(
            "--executor",
            default="local",
            metavar="NAME",
            help="where a search's trials run: local, ray",
        )
        command.add_argument(
            "--workers",
            type=args.count,
            default=0,
            metavar="N",
            help="trials at a time (default: local 1, ray all of the cluster's processors)",
        )
        command.add_argument("--dry-run", action="store_true", help="show the plan, do nothing")
        command.add_argument("--json", action="store_true", help="print the outcome as JSON")


def add_wish(parser: argparse.ArgumentParser) -> None:
    """What a user says of model, data and target where there is no recipe yet."""
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument(
        "--data", required=True, help=".npz with x and y, folder of images, or module:function"
    )
    parser.add_argument("--calibration", default="", help="other data for calibration alone")
    parser.add_argument("--target", default="generic-x86_64", help="a device profile")
    parser.add_argument("--name", default="", help="the model's name (default: the file's)")
    parser.add_argument("--version", type=args.count, default=1, metavar="N")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="names of classes, one a line")
    parser.add_argument("--drop-max", type=float, metavar="LOSS", help="allowed loss of the metric")
    parser.add_argument(
        "--metric", default="auto", help="how right an answer is (default: what fits the labels)"
    )
    parser.add_argument("--output", default="", metavar="NAME", help="the output that is judged")
    parser.add_argument("--samples", type=args.count, default=0, metavar="N", help="judge so many")
    parser.add_argument("--threads", type=args.count, default=1, metavar="N")
    parser.add_argument(
        "--search",
        type=args.seconds,
        default=0.0,
        dest="search_s",
        metavar="SECONDS",
        help="search for so long for more than the libraries' own settings",
    )


def wished(
    arguments: argparse.Namespace, folder: Path | None = None, say: Say = lambda what: None
) -> Recipe:
    """The recipe of what `add_wish` read; a torch source is exported into the folder."""
    from quantize import automatic

    told = {key: getattr(arguments, key) for key in automatic.Wish._fields}
    return automatic.recipe(automatic.Wish(**told), folder, say)


def _auto(arguments: argparse.Namespace) -> int:
    return _do(arguments, lambda folder, say: wished(arguments, folder, say))


def _run(arguments: argparse.Namespace) -> int:
    from quantize import recipe

    return _do(arguments, lambda folder, say: recipe.load(arguments.recipe))


def _do(arguments: argparse.Namespace, given: Callable[[Path, Say], Recipe]) -> int:
    import tempfile

    from edge_runtime.cli.progress import Progress
    from quantize import origins, workflow

    for path in (arguments.out, arguments.report, arguments.out_json):
        _check_place(path)
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as temporary:
        folder = arguments.work or Path(temporary)
        with Progress(sys.stderr, quiet=arguments.json) as progress:
            say = progress.update
            recipe = origins.exported(given(folder, say), folder, say)
            ready = workflow.prepare(recipe)
            done = None if arguments.dry_run else _work(arguments, recipe, ready, folder, say)
        if done is None:
            return _plan(ready, as_json=arguments.json)
    return _shown(arguments, recipe, done)


def _check_place(path: Path | None) -> None:
    """Raises: StorageError where no file can be written: now, not after an hour of work."""
    if path is None:
        return
    if path.is_dir():
        raise StorageError("is a folder", where=str(path), expected="the name of a file")
    if not os.access(path.parent, os.W_OK):
        there = path.parent.is_dir()
        raise StorageError(
            "cannot be written: " + ("its folder is read-only" if there else "there is no folder"),
            where=str(path),
        )


def _shown(arguments: argparse.Namespace, recipe: Recipe, done: Finished) -> int:
    _show(arguments, done)
    if done.failed is not None:
        raise done.failed
    if not done.outcome.has_gain:
        raise ModelError(
            "nothing but the float model passed; no bundle is written",
            where=recipe.name,
            remedy="read the reasons above; allow more with budgets, give more data, or other"
            " passes",
        )
    return 0


def _work(
    arguments: argparse.Namespace, recipe: Recipe, ready: Prepared, folder: Path, say: Say
) -> Finished:
    from quantize import executors, search, workflow

    if recipe.search is None:
        return workflow.run(ready, folder, arguments.out, say)
    with executors.executor(arguments.executor, arguments.workers) as executor:
        found = search.search(recipe, folder, executor, say)
    done = workflow.run(workflow.prepare(found.recipe), folder, arguments.out, say)
    return done._replace(outcome=search.explained(done.outcome, found))


def _show(arguments: argparse.Namespace, done: Finished) -> None:
    import msgspec

    from quantize.report import saved, text

    if arguments.out_json is not None:
        saved.write(done.outcome, arguments.out_json)
    if arguments.report is not None:
        saved.write_page(done.outcome, arguments.report)
    if arguments.json:
        output.print_json(msgspec.to_builtins(done.outcome))
        return
    print(text.text(done.outcome, output.terminal_columns(sys.stdout)))
    if done.created is not None:
        print(f"\nwrote {arguments.out}: {len(done.outcome.shipped)} variants, each served once")


def _plan(ready: Prepared, *, as_json: bool) -> int:
    from quantize import expecting

    expected = expecting.expect(ready)
    if as_json:
        plan = [
            {
                "variant": one.variant.name,
                "backend": one.variant.backend,
                "passes": one.variant.passes,
                "seconds": seconds,
            }
            for one, seconds in zip(ready.chains, expected.by_variant, strict=True)
        ]
        output.print_json(
            {
                "plan": plan,
                "samples": len(ready.split.evaluation),
                "seconds": expected.seconds,
                "run_ms": expected.run_ms,
            }
        )
        return 0
    print(f"{len(ready.split.calibration)} samples calibrate, {len(ready.split.evaluation)} judge")
    for one, seconds in zip(ready.chains, expected.by_variant, strict=True):
        steps = " -> ".join(step["use"] for step in one.variant.passes) or "as it is"
        print(f"  {one.variant.name:<18} {one.variant.backend:<12} {steps:<34} {seconds:6.0f} s")
    limits = ready.recipe.search
    if limits is not None:
        print(
            f"before: a search of at most {limits.trials_max} trials in"
            f" {output.duration(limits.time_s_max)}; up to {limits.keep} finalists per backend"
        )
    print(
        f"about {output.duration(expected.seconds)}: one run of the float model takes"
        f" {expected.run_ms:.2f} ms here (measured)"
    )
    return 0
