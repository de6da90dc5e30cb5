"""Commands about two versions side by side: shadow, split, promote.

Law of this file: one control call per command; the daemon's report as lines, or as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.cli.change import answer, call_with_progress, served
from edge_runtime.cli.control import call
from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    Document = Mapping[str, Any]


def add_parser(subparsers: Any) -> None:
    """Add the parsers of this file's commands."""
    for name, handler, what in (
        ("shadow", _shadow, "of the answers that the candidate is shown (default: all)"),
        ("split", _split, "of the requests that the candidate answers (default: 0.1)"),
    ):
        parser = subparsers.add_parser(name)
        parser.add_argument(
            "target",
            metavar="NAME[@VERSION]",
            type=args.name_maybe_version,
            help="the candidate; without a version: what came of it",
        )
        parser.add_argument("--share", type=args.share, metavar="SHARE", help=f"0 to 1, {what}")
        parser.add_argument("--stop", action="store_true", help="end the candidate, and report")
        parser.set_defaults(handler=handler)
    promote = subparsers.add_parser("promote")
    promote.add_argument("name", metavar="NAME")
    promote.set_defaults(handler=_promote)
    for parser in subparsers.choices.values():
        args.add_global(parser)


def _shadow(arguments: argparse.Namespace) -> int:
    reply = _ask(arguments, "shadow")
    return answer(arguments, reply, "\n".join([*head(reply), *shadow_lines(reply["shadow"])]))


def _split(arguments: argparse.Namespace) -> int:
    reply = _ask(arguments, "split")
    return answer(arguments, reply, "\n".join([*head(reply), *split_lines(reply["split"])]))


def _ask(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    name, version = arguments.target
    if version is None:
        if arguments.share is not None:
            raise UsageError("--share needs a version", expected=f"{way} {name}@VERSION --share S")
        return call(arguments, "candidate_stop" if arguments.stop else way, {"name": name})
    if arguments.stop:
        raise UsageError("--stop takes no version", expected=f"{way} {name} --stop")
    payload = {"name": name, "version": version}
    if arguments.share is not None:
        payload["share"] = arguments.share
    return call_with_progress(arguments, way, payload)


def _promote(arguments: argparse.Namespace) -> int:
    reply = call_with_progress(arguments, "promote", {"name": arguments.name})
    return answer(arguments, reply, served(f"{arguments.name}@{reply['version']}", reply))


# --- text ---------------------------------------------------------------------------------------


def head(reply: Document) -> list[str]:
    """Who is compared with whom, and whether it goes on."""
    state = reply["state"] + (f": {reply['reason']}" if reply.get("reason") else "")
    return [
        f"{reply['name']}: candidate {reply['candidate']} beside version {reply['stable']},"
        f" {state} ({output.duration(reply['duration_s'])})",
        f"shares: {reply['shadow_share']:.4g} shown, {reply['split_share']:.4g} answered",
    ]


def shadow_lines(shadow: Document) -> list[str]:
    """The comparison as lines."""
    lines = [
        f"compared {shadow['compared']} of {shadow['sampled']} samples"
        f" ({shadow['dropped']} dropped, {shadow['waiting']} waiting, {shadow['errors']} errors)",
        f"disagreed: {shadow['disagreed']}{_share(shadow['disagreement'])}",
    ]
    if shadow["last_error"]:
        lines.append(f"last error: {shadow['last_error']}")
    rows = [_output_row(name, one) for name, one in shadow["outputs"].items()]
    headers = ("OUTPUT", ">TOP-1", ">OUTSIDE", ">UNLIKE", ">MAX ABS", ">COS MIN", ">COS MEAN")
    lines += ["", output.table(headers, rows), ""]
    return [*lines, *(f"{who} run: {_latency(shadow[key])}" for who, key in _RUNS)]


_RUNS = (("stable   ", "stable_run"), ("candidate", "candidate_run"))


def split_lines(split: Document) -> list[str]:
    """The split as lines."""
    back = split["held"] + split["too_slow"] + split["refused"] + split["lost"]
    return [
        f"answered {split['answered']} of {split['chosen']} requests that were its",
        f"answered by the stable version instead: {back} ({split['held']} held back,"
        f" {split['too_slow']} too slow, {split['refused']} refused, {split['lost']} lost)",
        f"passed on to answered: {_latency(split['round_trip'])}",
    ]


def _output_row(name: str, one: Document) -> tuple[Any, ...]:
    top1 = one["top1_agreement"]
    return (
        name,
        "-" if top1 is None else f"{top1:.2%}",
        one["outside_tolerance"],
        one["unlike"],
        f"{one['max_abs']:.4g}",
        *("-" if one[key] is None else f"{one[key]:.6f}" for key in ("cosine_min", "cosine_mean")),
    )


def _share(value: float | None) -> str:
    return "" if value is None else f" ({value:.2%})"


def _latency(one: Document) -> str:
    if not one["count"]:
        return "-"
    return f"p50 {one['p50_ms']:.3f} ms, p99 {one['p99_ms']:.3f} ms ({one['count']})"
