"""The sensitivity of layers as text for a terminal.

Law of this file: values to lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from edge_runtime.cli import output
from quantize.noise import SQNR_DB_MAX
from quantize.report import names
from quantize.sensitivity import Layer, Sensitivity

HEADERS = ("layer", "operator", ">answer", ">loss", ">alone", ">in all", ">work", "noise")
BAR_WIDTH = 20
_PLAIN = re.compile(r"[\w/.;-]+")  # needs no quotes in a recipe


def text(found: Sensitivity, width: int | None = None) -> str:
    """A row per layer with a bar of the noise that it adds, and the proposal."""
    quietest = max((one.sqnr_db for one in found.layers), default=0.0)
    loudest = min((one.sqnr_db for one in found.layers), default=0.0)
    rows = [_row(one, loudest, quietest) for one in found.layers]
    return "\n".join([output.table(HEADERS, rows, width), "", *_verdict(found)])


def _row(one: Layer, loudest: float, quietest: float) -> tuple[str, ...]:
    return (
        names.short(one.name),
        one.operator,
        _decibels(one.sqnr_db),
        f"{one.loss:+.4f}",
        _decibels(one.alone_sqnr_db),
        _decibels(one.own_sqnr_db),
        f"{one.macs_share:.1%}",
        bar(one.sqnr_db, loudest, quietest),
    )


def bar(sqnr_db: float, loudest: float, quietest: float) -> str:
    """The longest for the loudest; every layer has at least one sign."""
    share = (quietest - sqnr_db) / max(quietest - loudest, 1e-9)
    return "#" * max(1, round(share * BAR_WIDTH))


def _decibels(value: float) -> str:
    if not value:
        return "-"
    return "silent" if value >= SQNR_DB_MAX else f"{value:.1f} dB"


def _verdict(found: Sensitivity) -> Iterator[str]:
    yield from map(output.printable, found.notes)
    yield (
        "Signal to noise, less is worse: of the model's answer and (alone) of the layer's output"
        " when only this layer is"
    )
    yield "in integers; in all: of its output when every layer is. work: share of multiplications."
    yield (
        f"All in integers: {found.metric} loses {found.loss_all:+.4f} on {found.samples} samples,"
        f" {found.drop_max:g} is allowed."
    )
    if not found.exclude:
        yield "Nothing needs to stay float."
    elif len(found.exclude) == len(found.layers):
        yield "No exclude list keeps the budget: leave the model float, or allow a larger loss."
    else:
        yield (
            f"Leaving {len(found.exclude)} of {len(found.layers)} float loses"
            f" {found.loss_excluded:+.4f}:"
        )
        yield "  exclude: [" + ", ".join(map(_quoted, found.exclude)) + "]"


def _quoted(name: str) -> str:
    """As it stands in a recipe."""
    return name if _PLAIN.fullmatch(name) else json.dumps(output.printable(name))
