"""The report of a run: Markdown for people, JSON for programs, a plot when matplotlib is there.

Law of this file: values in, text or files out; nothing is measured and no figure is computed.
matplotlib is imported in one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.scenario import Latency, Result
from bench.summary import Figure, Spread, Target

FORMAT = 1  # of the JSON; keys are added, never changed


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


def plot(measured: Sequence[Measured], path: Path) -> bool:
    """Each round's p50 of each peer as boxes; False: matplotlib is not installed."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    shown = [one for one in measured if one.result and one.result.latencies]
    if not shown:
        return True
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(9, 1.2 + 1.7 * len(shown)), squeeze=False, layout="constrained"
    )
    for one, panel in zip(shown, panels[:, 0], strict=True):
        assert one.result is not None
        latencies = list(reversed(one.result.latencies))
        panel.boxplot(
            [one.result.samples[latency.peer] for latency in latencies],
            orientation="horizontal",
            tick_labels=[latency.label.replace("`", "") for latency in latencies],
            widths=0.6,
            showfliers=False,
        )
        panel.set_title(f"{one.name}: {one.title}", fontsize="small", loc="left")
        panel.set_xlabel("microseconds a call: p50 of each round")
        panel.set_xlim(left=0)
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
