"""The daemon on one screen: what `status` prints and `top` redraws.

Law of this file: values in, text out. A document is the answer to the control command `status`; two
of them with buckets give the figures of the time between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime import metrics
from edge_runtime.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Document = Mapping[str, Any]

_MODELS: tuple[str, ...] = ("MODEL", "STATE", ">VERSION", "VARIANT", "DEVICE")
_MODELS += (">REQ/S", ">REQUESTS", ">WAITING", ">CONN", ">MEMORY")
_DURATIONS = ("MODEL", ">REQUEST P50", ">P99", ">QUEUE P50", ">P99", ">COMPUTE P50", ">P99")
_KINDS = ("request", "queue", "compute")
_TROUBLE = [outcome for outcome in metrics.OUTCOMES if outcome != "ok"]


class Figures(NamedTuple):
    """Of a model, over some time: answers per second, and (p50, p99) in s of each duration."""

    per_s: float
    durations: dict[str, tuple[float | None, float | None]]


def figures(model: Document, before: Document | None, elapsed_s: float) -> Figures:
    """Since `before`, the same model `elapsed_s` ago; None: since the daemon started."""
    traffic = model.get("traffic") or {}
    if before is None:
        facts = {kind: traffic.get(kind) or {} for kind in _KINDS}
        durations = {kind: (one.get("p50_s"), one.get("p99_s")) for kind, one in facts.items()}
        return Figures(float(model.get("requests_per_s") or 0), durations)
    between = {
        kind: metrics.since(
            _histogram(traffic, kind), _histogram(before.get("traffic") or {}, kind)
        )
        for kind in _KINDS
    }
    durations = {
        kind: (metrics.quantile_s(one, 0.5), metrics.quantile_s(one, 0.99))
        for kind, one in between.items()
    }
    answered = metrics.count(between["request"])
    return Figures(answered / elapsed_s if elapsed_s > 0 else 0.0, durations)


def _histogram(traffic: Document, kind: str) -> list[int]:
    """As workers keep it; the sum, which nobody asks for here, is 0."""
    histogram = [0] * metrics.WORDS
    for index, count in (traffic.get(kind) or {}).get("buckets") or ():
        histogram[1 + index] = count
    return histogram


def text(now: Document, width: int | None, before: Document | None = None) -> str:
    """The screen; with `before`, rates and durations are of the time since then."""
    models = now.get("models") or []
    parts = ["\n".join(_head(now))]
    if not models:
        parts.append("no model is installed; `edge-runtime install BUNDLE` installs one")
        return "\n\n".join(parts)
    earlier = {one.get("name"): one for one in (before or {}).get("models") or []}
    elapsed_s = (now.get("now_ns", 0) - (before or {}).get("now_ns", 0)) / 1e9
    measured = [figures(one, earlier.get(one.get("name")), elapsed_s) for one in models]
    rows = [_row(one, found) for one, found in zip(models, measured, strict=True)]
    parts.append(output.table(_MODELS, rows, width))
    busy = [
        (
            one.get("name", "?"),
            *(short(value) for kind in _KINDS for value in found.durations[kind]),
        )
        for one, found in zip(models, measured, strict=True)
        if any(value is not None for pair in found.durations.values() for value in pair)
    ]
    if busy:
        parts.append(output.table(_DURATIONS, busy, width))
    notes = [note for one in models for note in _notes(one)]
    if notes:
        parts.append("\n".join(output.printable(note) for note in notes))
    return "\n\n".join(parts)


def _head(now: Document) -> Iterator[str]:
    daemon, store = now.get("daemon") or {}, now.get("store") or {}
    state = "ready" if daemon.get("ready") else "not ready"
    yield output.printable(
        f"edge-runtime {daemon.get('version', '?')}: {state}, pid {daemon.get('pid', '?')}, "
        f"{output.size(daemon.get('rss_bytes'))}, up {output.duration(daemon.get('uptime_s'))}; "
        f"{daemon.get('accepted', 0)} connections accepted, {daemon.get('refused', 0)} refusals"
    )
    profile = now.get("profile") or {}
    if profile.get("name"):
        addons = "".join(f" with {addon}" for addon in profile.get("addons", ()))
        yield output.printable(f"board: {profile['title']} (profile {profile['name']}{addons})")
    budget = store.get("byte_budget")
    of_budget = f" of {output.size(budget)}" if budget else ""
    yield (
        f"store: {output.size(store.get('used_bytes'))}{of_budget}, "
        f"{store.get('generations', 0)} versions of {store.get('models', 0)} models; "
        f"{output.size(store.get('free_bytes'))} free on the disk"
    )
    yield from device(now.get("device") or {})


def device(document: Document) -> Iterator[str]:
    """Heat and memory in a line, and a line for each ladder on which a step is taken."""
    zones = (document.get("temperature_c") or {}).items()
    facts = [f"{zone} {celsius:.1f} C" for zone, celsius in zones if celsius is not None]
    pressures = (document.get("pressure_percent") or {}).items()
    facts += [f"{resource} pressure {percent:g} %" for resource, percent in pressures]
    facts += [*(document.get("throttled") or ()), *(document.get("notes") or ())]
    if facts:
        yield output.printable(f"device: {', '.join(facts)}")
    yield from held_back(document)


def held_back(document: Document) -> Iterator[str]:
    """What is given up now, and why; nothing while nothing is."""
    for name in ("heat", "memory"):
        one = document.get(name) or {}
        if one.get("step"):
            given_up = ", ".join(one.get("given_up") or ())
            yield output.printable(
                f"held back by {name}: step {one['step']} of {one.get('steps')}"
                f" ({one.get('reason')}): {given_up}"
            )


def _row(model: Document, found: Figures) -> tuple[Any, ...]:
    active = model.get("active") or {}
    outcomes = (model.get("traffic") or {}).get("outcomes") or {}
    return (
        model.get("name", "?"),
        model.get("state", "unknown"),
        active.get("version", "-"),
        active.get("variant") or "-",
        model.get("device") or "-",
        rate(found.per_s),
        outcomes.get("ok", 0),
        model.get("waiting", 0),
        model.get("connections", 0),
        output.size(model.get("private_bytes")),
    )


def _notes(model: Document) -> Iterator[str]:
    """What went wrong since the daemon started, in a line."""
    name = model.get("name", "?")
    outcomes = (model.get("traffic") or {}).get("outcomes") or {}
    facts = [f"{outcomes[one]} {one}" for one in _TROUBLE if outcomes.get(one)]
    deaths = model.get("deaths") or {}
    facts += [f"{count} x died: {cause}" for cause, count in sorted(deaths.items())]
    refused = model.get("load_failures") or {}
    facts += [f"{count} x not loaded: {code}" for code, count in sorted(refused.items())]
    if model.get("fallbacks"):
        facts.append(f"{model['fallbacks']} x fell back")
    if facts:
        yield f"{name}: {', '.join(facts)}"
    if model.get("reason") and model.get("state") != "ready":
        yield f"{name} is {model.get('state')}: {model['reason']}"


# --- units ----------------------------------------------------------------------------------------


def rate(per_s: float) -> str:
    """`0` -> `0`, `0.33` -> `0.3`, `12.3` -> `12`, `12345` -> `12345`."""
    return f"{per_s:.1f}" if 0 < per_s < 9.95 else f"{per_s:.0f}"


def short(seconds: float | None) -> str:
    """Three digits at most: `1.9e-5` -> `19 us`, `0.0023` -> `2.3 ms`, `1.5` -> `1.5 s`."""
    if seconds is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
