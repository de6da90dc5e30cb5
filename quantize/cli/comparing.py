"""`edge-quantize compare`: two outcomes, or two model files on the same data.

Law of this file: words in, one call of `quantize.comparing`, lines out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    from quantize.comparing import Compared, Pair
    from quantize.results import Evaluated

HEADERS = ("variant", ">score", ">then", ">size", ">then", ">speed", "verdict")


def add_parser(subparsers: Any) -> None:
    """The command."""
    compare = subparsers.add_parser("compare", help="two outcomes, or two models on the same data")
    compare.add_argument("first", metavar="A", type=Path, help="OUTCOME.json or a model")
    compare.add_argument("second", metavar="B", type=Path)
    compare.add_argument("--data", default="", help="for models: as in `auto`")
    compare.add_argument("--samples", type=args.count, default=0, metavar="N", help="judge so many")
    compare.add_argument(
        "--metric", default="auto", help="how right an answer is (default: what fits the labels)"
    )
    compare.add_argument("--threads", type=args.count, default=1, metavar="N")
    compare.add_argument("--confidence", type=args.share, default=0.95, metavar="SHARE")
    compare.add_argument("--json", action="store_true", help="print as JSON")
    compare.set_defaults(handler=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    kinds = {path.suffix == ".json" for path in (arguments.first, arguments.second)}
    if kinds == {True}:
        return _outcomes(arguments)
    if len(kinds) > 1:
        raise UsageError("an outcome and a model cannot be compared", where=str(arguments.second))
    if not arguments.data:
        raise UsageError("two models need data to be compared on", where="--data")
    return _models(arguments)


def _outcomes(arguments: argparse.Namespace) -> int:
    import msgspec

    from quantize import comparing
    from quantize.report import saved

    pairs, cautions = comparing.outcomes(saved.read(arguments.first), saved.read(arguments.second))
    if arguments.json:
        document = [msgspec.to_builtins(pair._asdict()) for pair in pairs]
        output.print_json({"variants": document, "cautions": cautions})
        return 0
    width = output.terminal_columns(sys.stdout)
    print(output.table(HEADERS, [_row(pair) for pair in pairs], width))
    for caution in cautions:
        print(f"note: {caution}")
    return 0


def _row(pair: Pair) -> tuple[str, ...]:
    first, second = pair.first, pair.second
    return (
        pair.name,
        _score(first),
        _score(second) + (" *" if pair.changed else ""),
        _size(first),
        _size(second),
        f"{pair.speedup:.2f}x" if pair.speedup else "-",
        " -> ".join(dict.fromkeys((_verdict(first), _verdict(second)))),
    )


def _score(one: Evaluated | None) -> str:
    return f"{one.score.value:.4f}" if one and one.score else "-"


def _size(one: Evaluated | None) -> str:
    return output.size(one.size_bytes) if one and one.size_bytes else "-"


def _verdict(one: Evaluated | None) -> str:
    return "absent" if one is None else "refused" if one.refusal else "passed"


def _models(arguments: argparse.Namespace) -> int:
    import msgspec

    from edge_runtime.cli.progress import Progress
    from quantize import comparing
    from quantize.recipe import Evaluation

    with Progress(sys.stderr, quiet=arguments.json) as progress:
        found = comparing.model_files(
            (arguments.first, arguments.second),
            arguments.data,
            Evaluation(_metric(arguments.metric), samples=arguments.samples),
            arguments.confidence,
            arguments.threads,
            progress.update,
        )
    if arguments.json:
        output.print_json(msgspec.to_builtins(found))
    else:
        print(_text(found))
    return 0


def _metric(name: str) -> Any:
    """Raises: UsageError for none that can be named here."""
    from quantize import recipe

    known = [one for one in recipe.METRICS if one not in ("callable", "wer")]
    if name not in known:
        raise UsageError(f"{name!r} is no metric", where="--metric", expected=", ".join(known))
    return name


def _text(found: Compared) -> str:
    from quantize import results

    sides = [found.first, found.second]
    rows = [
        (
            Path(side.path).name,
            side.backend,
            f"{side.score.value:.4f} ({side.score.low:.4f}..{side.score.high:.4f})",
            f"{side.p50_ms:.3f} ms",
            output.size(side.size_bytes),
        )
        for side in sides
    ]
    loss = found.loss
    meaning = "is no proven difference" if loss.low <= 0 <= loss.high else "is a real difference"
    return "\n".join(
        [
            f"{found.metric} on {results.many(found.samples, found.groups)},"
            f" {results.percent(found.confidence)} confidence",
            output.table(("model", "backend", f">{found.metric}", ">p50", ">size"), rows),
            f"the second loses {loss.drop:+.4f} ({loss.low:+.4f}..{loss.high:+.4f}): worse on"
            f" {loss.worse} samples, better on {loss.better}, p = {loss.p_value:.2g};"
            f" that {meaning}",
            f"the second is {found.speedup:.2f} times as fast, and its file"
            f" {found.first.size_bytes / found.second.size_bytes:.2f} times smaller",
            *map(output.printable, found.notes),
        ]
    )
