"""The report of a run: Markdown for people, JSON for programs, a plot when matplotlib is there.

Law of this file: values in, text or files out; nothing is measured and no figure is computed.
matplotlib is imported in one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.scenario import Latency, Panel, Result
from bench.summary import Figure, Spread, Target

FORMAT = 1  # of the JSON; keys are added, never changed
DOTS_PER_INCH = 110


class Measured(NamedTuple):
    """A scenario that has run, or the reason why it has not (`result` is None)."""

    name: str
    title: str
    result: Result | None
    seconds: float
    problem: str = ""
    failed: bool = False  # as opposed to not possible here


def document(machine: Mapping[str, Any], measured: Sequence[Measured]) -> dict[str, Any]:
    """What goes into the JSON file."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "scenarios": {
            one.name: {
                "title": one.title,
                "seconds": round(one.seconds, 2),
                "problem": one.problem,
                "remark": one.result.remark if one.result else "",
                "figures": [_figure_document(figure) for figure in _figures(one)],
                "latencies": [
                    msgspec.to_builtins(latency._asdict()) for latency in _latencies(one)
                ],
                "samples": dict(one.result.samples) if one.result else {},
                "panels": [_panel_document(panel) for panel in _panels(one)],
            }
            for one in measured
        },
    }


def markdown(machine: Mapping[str, Any], measured: Sequence[Measured]) -> str:
    """The report as people read it; the verdicts first."""
    parts = ["# Benchmark report", _machine_line(machine), "## Targets", _targets(measured)]
    for one in measured:
        parts.append(f"## {one.name}: {one.title}")
        if one.result is None:
            parts.append(f"Not measured: {one.problem}")
            continue
        if one.result.remark:
            parts.append(one.result.remark[0].upper() + one.result.remark[1:] + ".")
        if one.result.latencies:
            parts.append(_latency_table(one.result.latencies))
        parts.append(_figure_table(one.result.figures))
    return "\n\n".join(parts) + "\n"


def verdicts(measured: Sequence[Measured]) -> tuple[int, int]:
    """How many promised figures were met, and how many there are."""
    met = [figure.met for one in measured for figure in _figures(one) if figure.met is not None]
    return sum(met), len(met)


def _figures(one: Measured) -> Sequence[Figure]:
    return one.result.figures if one.result else ()


def _latencies(one: Measured) -> Sequence[Latency]:
    return one.result.latencies if one.result else ()


def _panels(one: Measured) -> Sequence[Panel]:
    return one.result.panels if one.result else ()


def _panel_document(panel: Panel) -> dict[str, Any]:
    return {**panel._asdict(), "curves": [curve._asdict() for curve in panel.curves]}


def _figure_document(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        **figure.spread._asdict(),
        "target": figure.target._asdict() if figure.target else None,
        "met": figure.met,
        "note": figure.note,
    }


def _machine_line(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in machine.items())


def _targets(measured: Sequence[Measured]) -> str:
    rows = [
        (one.name, figure.name, _value(figure), _target(figure.target), _verdict(figure))
        for one in measured
        for figure in _figures(one)
        if figure.target
    ]
    return table(("scenario", "figure", "measured", "target", ""), rows)


def _latency_table(latencies: Iterable[Latency]) -> str:
    rows = [
        (
            one.label,
            _number(one.p50_us.median),
            f"{_number(one.p50_us.low)} to {_number(one.p50_us.high)}",
            _number(one.p95_us),
            _number(one.p99_us),
        )
        for one in latencies
    ]
    return table(("one call, us", "p50", "half of the rounds", "p95", "p99"), rows)


def _figure_table(figures: Iterable[Figure]) -> str:
    rows = [
        (figure.name, _value(figure), _between(figure.spread), _target(figure.target), figure.note)
        for figure in figures
    ]
    return table(("figure", "median", "half of the rounds", "target", ""), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first row names the columns."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _value(figure: Figure) -> str:
    return f"{_number(figure.spread.median)} {figure.unit}".strip()


def _between(spread: Spread) -> str:
    if spread.rounds == 1:
        return ""
    return f"{_number(spread.low)} to {_number(spread.high)}"


def _target(target: Target | None) -> str:
    if target is None:
        return ""
    return f"{'<=' if target.at_most else '>='} {target.value:g}"


def _verdict(figure: Figure) -> str:
    return "met" if figure.met else "**missed**"


def _number(value: float) -> str:
    """Three figures, and not more than the measurement is worth."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(measured: Sequence[Measured], latencies: Path, load: Path) -> bool:
    """Two pictures; False: matplotlib is not installed.

    Args:
        latencies: each round's p50 of each peer as boxes.
        load: the scenarios' panels: rates and latencies over clients and over offered load.
    """
    try:
        from matplotlib.figure import Figure as Picture  # not pyplot: no display, no global state
    except ImportError:
        return False
    shown = [one for one in measured if _latencies(one)]
    if shown:
        picture = Picture(figsize=(9, 1.2 + 1.7 * len(shown)), layout="constrained")
        for one, axes in zip(shown, picture.subplots(len(shown), squeeze=False)[:, 0], strict=True):
            _draw_boxes(axes, one)
        picture.savefig(latencies, dpi=DOTS_PER_INCH)
    panels = [panel for one in measured for panel in _panels(one)]
    if panels:
        rows = -(-len(panels) // 2)
        picture = Picture(figsize=(12, 3.8 * rows), layout="constrained")
        places = picture.subplots(rows, 2, squeeze=False).flat
        for panel, axes in zip_longest(panels, places):
            _draw_panel(axes, panel) if panel else axes.set_axis_off()
        picture.savefig(load, dpi=DOTS_PER_INCH)
    return True


def _draw_boxes(axes: Any, one: Measured) -> None:
    assert one.result is not None
    latencies = list(reversed(one.result.latencies))
    axes.boxplot(
        [one.result.samples[latency.peer] for latency in latencies],
        orientation="horizontal",
        tick_labels=[latency.label.replace("`", "") for latency in latencies],
        widths=0.6,
        showfliers=False,
    )
    axes.set_title(f"{one.name}: {one.title}", fontsize="small", loc="left")
    axes.set_xlabel("microseconds a call: p50 of each round")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for curve in panel.curves:
        look = {"linestyle": curve.style, "color": curve.colour}
        axes.plot(curve.x, curve.y, marker=".", label=curve.label.replace("`", ""), **look)
        if curve.between:
            axes.fill_between(curve.x, *zip(*curve.between, strict=True), alpha=0.2)
    axes.set_title(panel.title, fontsize="small", loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_xlim(left=0)
    axes.set_yscale("log") if panel.logarithmic else axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
