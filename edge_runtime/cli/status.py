"""Commands that look: status, models, ps, why, ready, metrics, version.

Law of this file: it asks and prints; nothing here changes what serves. With `--json` the answer is
printed as it came.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.cli.control import call
from edge_runtime.clock import SystemClock

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    Document = Mapping[str, Any]


def add_parser(subparsers: Any) -> None:
    """Add the parsers of this file's commands."""
    subparsers.add_parser("status").set_defaults(handler=_status)
    metrics = subparsers.add_parser("metrics", description="Everything, as Prometheus reads it.")
    metrics.set_defaults(handler=_metrics)
    subparsers.add_parser("models").set_defaults(handler=_models)
    subparsers.add_parser("ps").set_defaults(handler=_ps)
    subparsers.add_parser("version").set_defaults(handler=_version)
    why = subparsers.add_parser("why", description="How a model came to its state, newest last.")
    why.set_defaults(handler=_why)
    ready = subparsers.add_parser("ready", description="Exit 0 if the model answers, 6 if not.")
    ready.set_defaults(handler=_ready)
    ready.add_argument(
        "--wait", action="store_true", help="ask again until it is ready or --timeout has passed"
    )
    for parser in (why, ready):
        parser.add_argument("name", metavar="NAME")
    for parser in subparsers.choices.values():
        args.add_global(parser)


def _status(arguments: argparse.Namespace) -> int:
    from edge_runtime.cli import overview

    reply = call(arguments, "status")
    columns = output.terminal_columns(sys.stdout)
    return _answer(arguments, reply, lambda: overview.text(reply, columns))


def _metrics(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "metrics")
    return _answer(arguments, reply, lambda: str(reply["text"]).rstrip("\n"))


def _models(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "models")
    return _answer(
        arguments, reply, lambda: models_text(reply, output.terminal_columns(sys.stdout))
    )


def _ps(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "ps")
    return _answer(arguments, reply, lambda: ps_text(reply, output.terminal_columns(sys.stdout)))


def _why(arguments: argparse.Namespace) -> int:
    reply = call(arguments, "why", {"name": arguments.name})
    now_s = reply.get("now_wall_s") or SystemClock().wall_s()
    width = output.terminal_columns(sys.stdout)
    return _answer(arguments, reply, lambda: why_text(reply, now_s, width))


def _ready(arguments: argparse.Namespace) -> int:
    from edge_runtime.cli import readiness

    timeout_s = arguments.timeout_s or readiness.TIMEOUT_S
    path = arguments.run_dir / "infer.sock"
    readiness.ask(path, arguments.name, timeout_s, wait=arguments.wait, clock=SystemClock())
    reply = {"name": arguments.name, "ready": True}
    return _answer(arguments, reply, lambda: f"{arguments.name} is ready")


def _version(arguments: argparse.Namespace) -> int:
    import platform

    from edge_runtime import __version__

    reply = {"name": "edge-runtime", "version": __version__, "python": platform.python_version()}
    return _answer(arguments, reply, lambda: "{name} {version} (Python {python})".format(**reply))


def _answer(arguments: argparse.Namespace, reply: Document, text: Any) -> int:
    if arguments.json:
        output.print_json(reply)
    else:
        print(text())
    return 0


# --- text ---------------------------------------------------------------------------------------

_MODELS = (
    "MODEL",
    "STATE",
    ">VERSION",
    "LABEL",
    "VARIANT",
    "BACKEND",
    "DEVICE",
    ">PREVIOUS",
    ">INSTALLED",
)
_TEMPLATES = ("TEMPLATE", ">PID", "VERSION", "STATE", ">RSS")
_WORKERS: tuple[str, ...] = ("MODEL", ">VERSION", "VARIANT", "BACKEND", "STATE", ">PID")
_WORKERS += (">RSS", ">PRIVATE", ">CONN", ">REQUESTS", ">ERRORS", ">RESTARTS", ">UPTIME")


def models_text(reply: Document, width: int | None) -> str:
    """The `models` answer as a table; a model that does not serve says why below it."""
    models = reply.get("models") or []
    if not models:
        return "no model is installed; `edge-runtime install BUNDLE` installs one"
    lines = [output.table(_MODELS, [_model_row(model) for model in models], width)]
    lines += [
        output.printable(f"{model.get('name')}: {active['cpu_fallback']}")
        for model in models
        if (active := model.get("active") or {}).get("cpu_fallback")
    ]
    lines += [
        output.printable(f"{model.get('name')} is {model.get('state')}: {model['reason']}")
        for model in models
        if model.get("reason") and model.get("state") != "ready"
    ]
    lines += [
        output.printable(f"{model.get('name')} has left {', '.join(model['left'])}; see `why`")
        for model in models
        if model.get("left")
    ]
    return "\n".join(lines)


def _model_row(model: Document) -> tuple[Any, ...]:
    active = model.get("active") or {}
    previous = model.get("previous") or {}
    precision = active.get("precision")
    variant = active.get("variant", "-")
    return (
        model.get("name", "?"),
        model.get("state", "unknown"),
        active.get("version", "-"),
        active.get("label") or "-",
        variant if not precision or precision in variant else f"{variant} ({precision})",
        active.get("backend", "-"),
        model.get("device") or "-",
        previous.get("version", "-"),
        len(model.get("installed") or []),
    )


def ps_text(reply: Document, width: int | None) -> str:
    """The `ps` answer: the daemon in a line, templates and workers as tables."""
    daemon = reply.get("daemon") or {}
    up = output.duration(daemon.get("uptime_s"))
    memory = output.size(daemon.get("rss_bytes"))
    parts = [f"daemon: pid {daemon.get('pid', '?')}, {memory}, up {up}"]
    templates = reply.get("templates") or []
    workers = reply.get("workers") or []
    if templates:
        parts.append(output.table(_TEMPLATES, [_template_row(item) for item in templates], width))
    if workers:
        parts.append(output.table(_WORKERS, [_worker_row(item) for item in workers], width))
    else:
        parts.append("no worker is running")
    return "\n\n".join(parts)


def _template_row(item: Document) -> tuple[Any, ...]:
    known = (item.get(key, "-") for key in ("backend", "pid", "version", "state"))
    return (*known, output.size(item.get("rss_bytes")))


def _worker_row(item: Document) -> tuple[Any, ...]:
    known = (
        item.get(key, "-") for key in ("model", "version", "variant", "backend", "state", "pid")
    )
    counts = (item.get(key, "-") for key in ("connections", "requests", "errors", "restarts"))
    sizes = (output.size(item.get(key)) for key in ("rss_bytes", "private_bytes"))
    return (*known, *sizes, *counts, output.duration(item.get("uptime_s")))


def why_text(reply: Document, now_s: float, width: int | None = None) -> str:
    """The `why` answer: what was decided about its variants, then the story, newest last."""
    from edge_runtime.cli import decision, overview

    summary = reply.get("summary")
    head = f"{reply.get('name')} is {reply.get('state', 'unknown')}"
    head += f": {summary}" if summary else ""
    active = (reply.get("model") or {}).get("active") or {}
    if active.get("placement"):
        head += f"\n{_placement(active)}"
    history = reply.get("history") or []
    lines = list(_story(history, now_s)) or ["nothing has happened to it since the daemon started"]
    device = overview.held_back(reply.get("device") or {})
    chosen = decision.text(reply, now_s, width)
    return "\n".join([*map(output.printable, head.splitlines()), *device, "", *chosen, *lines])


def _placement(active: Document) -> str:
    """Where the active version really runs, and what was expected instead."""
    parts = [
        f"{place.get('device')} ({place.get('detail')}"
        + (f", {place['nodes']} nodes)" if place.get("nodes") else ")")
        for place in active["placement"]
    ]
    text = "runs on " + " and ".join(parts)
    return f"{text}\n{active['cpu_fallback']}" if active.get("cpu_fallback") else text


def _story(history: list[Document], now_s: float) -> Iterator[str]:
    ages = [output.age(float(entry.get("wall_s") or 0), now_s) for entry in history]
    width = max((len(text) for text in ages), default=0)
    for entry, text in zip(history, ages, strict=True):
        when = output.moment(float(entry.get("wall_s") or 0))
        yield output.printable(
            f"{when}  {text:>{width}}  {entry.get('message', entry.get('event'))}"
        )
