"""The outcome as one HTML page: charts, tables, reasons; a person can look at it and decide.

Law of this file: the order of sections and their words. The page asks nothing of a network and runs
no script (its policy forbids both); whatever came from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import msgspec

from edge_runtime.cli import output
from quantize.report import advice, charts
from quantize.report.style import CSS
from quantize.results import Evaluated, Outcome, percent

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
HEADERS = (
    "variant",
    "verdict",
    "backend",
    ">score",
    ">loss",
    ">at most",
    ">p50",
    ">p95",
    ">speed",
    ">file",
    ">smaller",
    ">memory",
)


def page(outcome: Outcome) -> str:
    """The whole document."""
    title = escape(f"{outcome.name}: compressed variants")
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{title}</title><style>{CSS}</style></head><body><main>",
            *_sections(outcome),
            "</main></body></html>\n",
        ]
    )


def _sections(outcome: Outcome) -> Iterator[str]:
    yield f"<h1>{escape(outcome.name)}</h1>"
    yield f'<p class="dim">{escape(_conditions(outcome))}</p>'
    yield f'<p class="lead">{escape(verdict(outcome))}</p>'
    yield from _findings(outcome)
    yield from _next(outcome)
    yield f'<section><h2>Variants</h2><div class="scroll">{_table(outcome)}</div></section>'
    yield _figure(
        f"{outcome.metric} against latency",
        "Up and left is better. Bars are confidence intervals, a circle's area is the file's size,"
        " the dotted line is the Pareto front. Colours: blue shipped, red refused, grey the float"
        " reference.",
        charts.pareto(outcome),
    )
    yield '<div class="two">'
    yield _figure(
        "Loss against the float model",
        f"Of the same samples, with its {percent(outcome.confidence)} interval; p: chance of"
        f" such a difference between equals. Dashed: what is allowed, {outcome.drop_max:g}.",
        charts.losses(outcome),
    )
    yield _figure(
        "Latency",
        "Milliseconds of one run at batch 1, all variants in turn: bar p50, mark p95, line the"
        " spread between rounds.",
        charts.latencies(outcome),
    )
    yield _figure("Size", "Pale: the file. Full: compressed, as it travels.", charts.sizes(outcome))
    yield _reasons(outcome)
    yield "</div>"
    if outcome.layers:
        yield _figure(
            "Sensitivity by layer",
            "Relative error of a node's output when it alone is quantized, and what the metric"
            " loses by it; worst first.",
            charts.layers(outcome.layers),
        )
    if outcome.activations:
        yield from _activations(outcome)
    yield from _notes(outcome)
    yield _machine(outcome)


def _conditions(outcome: Outcome) -> str:
    return (
        f"{outcome.metric} on {outcome.judged_by}; a loss of up to {outcome.drop_max:g} is"
        f" allowed at {percent(outcome.confidence)} confidence; measured on"
        f" {outcome.machine.get('processor') or outcome.machine.get('machine', 'this machine')}"
    )


def verdict(outcome: Outcome) -> str:
    """The outcome in a sentence: the fastest made variant that passed, or that none did."""
    made = [one for one in outcome.shipped if not one.is_float]
    refused = sum(1 for one in outcome.evaluated if one.refusal)
    if not made:
        return f"Nothing but the float model passed; {refused} variants are refused."
    best = made[0]
    assert best.against is not None
    text = f"{best.name} on {best.backend} is the fastest that passed: "
    text += f"{best.speedup:.2f} times as fast as float there, "
    text += (
        f"a file {_smaller(best, outcome):.1f} times smaller, a loss of {best.against.drop:+.4f}"
    )
    text += f" (at most {best.against.bound:.4f}). "
    return text + f"{len(outcome.shipped)} variants passed, {refused} are refused."


def _findings(outcome: Outcome) -> Iterator[str]:
    if outcome.findings:
        yield '<div class="warn"><h2>Wrong with the data</h2>'
        for one in outcome.findings:
            yield f"<p><b>{escape(one.fault)}</b>: {escape(one.text)}</p>"
        yield "</div>"


def _next(outcome: Outcome) -> Iterator[str]:
    steps = advice.lines(outcome)
    if steps:
        yield "<section><h2>What to do next</h2>"
        yield from (f"<p>{escape(one)}</p>" for one in steps)
        yield "</section>"


def _smaller(one: Evaluated, outcome: Outcome) -> float:
    reference = outcome.of(outcome.reference)
    return reference.size_bytes / one.size_bytes if one.size_bytes else 0.0


def _table(outcome: Outcome) -> str:
    head = "".join(
        f'<th class="n">{name[1:]}</th>' if name.startswith(">") else f"<th>{name}</th>"
        for name in HEADERS
    )
    return (
        f"<table><tr>{head}</tr>{''.join(_row(one, outcome) for one in outcome.evaluated)}</table>"
    )


def _row(one: Evaluated, outcome: Outcome) -> str:
    lost = one.against if one.name != outcome.reference else None
    colour = charts.kind(one, outcome)
    cells = (
        f"{one.backend} {one.backend_version}",
        f"{one.score.value:.4f}" if one.score else "-",
        f"{lost.drop:+.4f}" if lost else "-",
        f"{lost.bound:.4f}" if lost else "-",
        f"{one.p50_ms:.3f} ms" if one.p50_ms else "-",
        f"{one.p95_ms:.3f} ms" if one.p95_ms else "-",
        f"{one.speedup:.2f}x" if one.speedup else "-",
        output.size(one.size_bytes or None),
        f"{_smaller(one, outcome):.2f}x" if one.size_bytes else "-",
        output.size(one.memory_bytes or None),
    )
    numbers = [name.startswith(">") for name in HEADERS[2:]]
    shown = "".join(
        f'<td class="n">{escape(cell)}</td>' if number else f"<td>{escape(cell)}</td>"
        for cell, number in zip(cells, numbers, strict=True)
    )
    said = f'<td>{escape(one.name)}</td><td class="tag {colour}">{colour}</td>'
    return f"<tr>{said}{shown}</tr>"


def _figure(title: str, caption: str, drawing: str) -> str:
    if not drawing:
        return ""
    return (
        f"<figure><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>"
        f"{drawing}</figure>"
    )


def _reasons(outcome: Outcome) -> str:
    refused = [(one.name, one.refusal) for one in outcome.evaluated if one.refusal]
    if not refused:
        return ""
    return f"<section><h2>Refused</h2>{_pairs(refused)}</section>"


def _notes(outcome: Outcome) -> Iterator[str]:
    noted = [("", note) for note in outcome.notes]
    noted += [(one.name, note) for one in outcome.evaluated for note in one.notes]
    if noted:
        yield (
            "<section><h2>Notes</h2>"
            '<p class="why">What backends do without being asked, and why a variant is slow.</p>'
            f"{_pairs(noted)}</section>"
        )


def _pairs(pairs: list[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><td class="key">{escape(name)}</td><td class="wide">{escape(text)}</td></tr>'
        for name, text in pairs
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _activations(outcome: Outcome) -> Iterator[str]:
    count = len(outcome.activations)
    shown = min(count, charts.TENSORS_SHOWN)
    yield (
        "<section><h2>Calibrated tensors</h2>"
        f'<p class="why">Of {shown} of {count} quantized tensors, most troubled first; shares on a'
        ' logarithmic scale.<span class="key-first"></span>calibration'
        '<span class="key-second"></span>evaluation'
        '<span class="key-cut"></span>cut off by the narrowest variant</p>'
        f"{charts.histograms(outcome.activations)}</section>"
    )
    yield '<div class="two">'
    yield _figure(
        "Saturation by tensor",
        "The share of values on evaluation data that the variant named cuts off by more than one"
        " step. Above 1 % it is reported as a fault.",
        charts.saturations(outcome.activations),
    )
    beyond = [one for one in outcome.activations if one.beyond]
    beyond.sort(key=lambda one: -one.beyond)
    pairs = [
        (f"{one.beyond:.1%}", f"{one.name}: {one.seen[0]:.3g} to {one.seen[1]:.3g}")
        for one in beyond[:16]
    ] or [("none", "every evaluation sample stays within")]
    yield (
        "<section><h2>Beyond what calibration showed</h2>"
        '<p class="why">The share of evaluation samples with a value outside the range of the'
        f" calibration set.</p>{_pairs(pairs)}</section>"
    )
    yield "</div>"


def _machine(outcome: Outcome) -> str:
    facts = [(key, _plain(value)) for key, value in outcome.machine.items()]
    facts += [
        ("source", outcome.source_sha256),
        ("calibration", _plain(outcome.calibration)),
        ("evaluation", _plain(outcome.evaluation)),
        ("seconds", f"{outcome.seconds:.0f}"),
    ]
    recipe = msgspec.json.format(msgspec.json.encode(outcome.recipe), indent=2).decode()
    return (
        f"<section><h2>Measured on</h2>{_pairs(facts)}"
        f"<details><summary>recipe</summary><pre>{escape(recipe)}</pre></details></section>"
    )


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
