"""The outcome as text for a terminal.

Law of this file: values to lines. What was refused stands as plainly as what was shipped.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.cli import output
from quantize.report import advice
from quantize.results import Evaluated, Outcome, percent

HEADERS = ("variant", "backend", ">score", ">loss", ">p50", ">speed", ">size", ">memory", "verdict")


def text(outcome: Outcome, width: int | None = None) -> str:
    """Table, reasons and notes."""
    rows = [_row(one, outcome) for one in outcome.evaluated]
    return "\n".join([_head(outcome), "", output.table(HEADERS, rows, width), *_reasons(outcome)])


def _head(outcome: Outcome) -> str:
    machine = outcome.machine
    return (
        f"{outcome.name}: {outcome.metric} on {outcome.judged_by}; a loss of up to"
        f" {outcome.drop_max:g} is allowed, at {percent(outcome.confidence)} confidence\n"
        f"measured on {machine.get('processor') or machine.get('machine')},"
        f" {machine.get('cores')} cores, in {outcome.seconds:.0f} s"
    )


def _row(one: Evaluated, outcome: Outcome) -> tuple[str, ...]:
    score = (
        f"{one.score.value:.4f} ±{(one.score.high - one.score.low) / 2:.4f}" if one.score else "-"
    )
    loss = f"{one.against.drop:+.4f}" if one.against and one.name != outcome.reference else "-"
    return (
        one.name,
        f"{one.backend} {one.backend_version}".strip(),
        score,
        loss,
        f"{one.p50_ms:.3f} ms" if one.p50_ms else "-",
        f"{one.speedup:.2f}x" if one.speedup else "-",
        output.size(one.size_bytes) if one.size_bytes else "-",
        output.size(one.memory_bytes) if one.memory_bytes else "-",
        "reference" if one.name == outcome.reference else "refused" if one.refusal else "shipped",
    )


def _reasons(outcome: Outcome) -> Iterator[str]:
    if outcome.findings:
        yield ""
        yield "wrong with the data:"
        yield from (f"  {one.fault}: {output.printable(one.text)}" for one in outcome.findings)
    refused = [one for one in outcome.evaluated if one.refusal]
    if refused:
        yield ""
        yield "refused:"
        yield from (f"  {one.name}: {output.printable(one.refusal)}" for one in refused)
    next_steps = advice.lines(outcome)
    if next_steps:
        yield ""
        yield "what to do next:"
        yield from (f"  {output.printable(one)}" for one in next_steps)
    noted = [(one.name, note) for one in outcome.evaluated for note in one.notes]
    if noted or outcome.notes:
        yield ""
        yield "notes:"
        yield from (f"  {output.printable(note)}" for note in outcome.notes)
        yield from (f"  {name}: {output.printable(note)}" for name, note in noted)
