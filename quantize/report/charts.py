"""The charts of the page: what an outcome holds, drawn with `svg`.

Law of this file: values of `results` in, HTML out; no chart computes a figure that the outcome does
not hold. A value outside a chart's scale is drawn at its edge and told as text: one variant that
answers nonsense must not flatten the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from edge_runtime.cli import output
from quantize.report import names, svg
from quantize.results import Activation, Evaluated, Layer, Outcome

HEIGHT = 300.0  # of the Pareto chart, in pixels
ROW = 20.0
ROW_NAME = 27  # characters of a name that fit beside a row
LABEL_GAP = 15.0  # pixels between two labels
LABEL_WIDTH = 0.3  # of the width, at most, on a telephone
LEFT_FROM = 0.6  # of the width: further right a label stands left of its point
LOG_FROM = 6.0  # largest latency / smallest: from there the axis is logarithmic
WORSE_SHOWN = 6.0  # scores are shown down to so many times the allowed loss
TENSORS_SHOWN = 12


def kind(one: Evaluated, outcome: Outcome) -> str:
    """How a variant is coloured: reference, refused or shipped."""
    if one.name == outcome.reference:
        return "reference"
    return "refused" if one.refusal else "shipped"


# --- accuracy against latency ---------------------------------------------------------------------


def pareto(outcome: Outcome) -> str:
    """Score over latency with intervals; a circle's area is the file's size."""
    shown = [one for one in outcome.evaluated if one.score and one.p50_ms]
    if not shown:
        return ""
    times = [one.p50_ms for one in shown]
    low_ms, high_ms = min(times) / 1.25, max(times) * 1.15
    is_log = high_ms / low_ms > LOG_FROM
    across = (svg.logarithmic if is_log else svg.linear)(low_ms if is_log else 0.0, high_ms)
    marks = svg.log_ticks(low_ms, high_ms) if is_log else svg.ticks(0.0, high_ms)
    bottom, top = _scores_shown(outcome, shown)
    height = svg.linear(bottom, top)

    def down(value: float) -> float:
        return HEIGHT * (1 - height(value))

    parts = [*_axes(across, marks, down, svg.ticks(bottom, top))]
    parts += _front(shown, across, down)
    largest = max(one.size_bytes for one in shown)
    for one in shown:
        parts += _point(one, outcome, across(one.p50_ms), down, bottom, largest)
    parts += _labels(shown, outcome, across, down)
    said = f"{outcome.metric} over latency of {len(shown)} variants"
    return f'<div class="plot">{svg.drawing(HEIGHT, parts, said)}</div>'


def _scores_shown(outcome: Outcome, shown: Sequence[Evaluated]) -> tuple[float, float]:
    reference = outcome.of(outcome.reference).score
    assert reference is not None
    floor = reference.value - max(
        WORSE_SHOWN * outcome.drop_max, 3 * (reference.value - reference.low)
    )
    lows = [one.score.low for one in shown if one.score and one.score.low > floor]
    highs = [one.score.high for one in shown if one.score]
    low, high = min([reference.low, *lows]), max(highs)
    margin = 0.12 * (high - low) or 0.01
    return low - margin, high + margin


def _axes(
    across: svg.Scale, marks: Sequence[float], down: svg.Scale, levels: Sequence[float]
) -> list[str]:
    parts = []
    for mark in marks:
        parts.append(svg.line(across(mark), 0, across(mark), HEIGHT, "grid"))
        parts.append(svg.words(across(mark), HEIGHT + 16, f"{mark:g}", anchor="middle"))
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]))) if len(levels) > 1 else 3
    for level in levels:
        parts.append(svg.line(0, down(level), 1, down(level), "grid"))
        parts.append(svg.words(0, down(level) + 4, f"{level:.{digits}f}", "", "end", -8))
    parts.append(svg.line(0, HEIGHT, 1, HEIGHT, "axis"))
    parts.append(svg.words(1, HEIGHT + 32, "milliseconds a run (p50)", anchor="end"))
    return parts


def front(shown: Sequence[Evaluated]) -> list[Evaluated]:
    """Those that nothing beats in score and latency both, fastest first."""
    best: list[Evaluated] = []
    for one in sorted(shown, key=lambda each: (each.p50_ms, -(each.score or _NONE).value)):
        if not best or (one.score or _NONE).value > (best[-1].score or _NONE).value:
            best.append(one)
    return best


class _NONE:
    value = -math.inf


def _front(shown: Sequence[Evaluated], across: svg.Scale, down: svg.Scale) -> list[str]:
    points = [
        (across(one.p50_ms), down(one.score.value)) for one in front(shown) if one.score is not None
    ]
    parts = []
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        parts += [svg.line(x1, y1, x2, y1, "front"), svg.line(x2, y1, x2, y2, "front")]
    return parts


def _point(
    one: Evaluated,
    outcome: Outcome,
    x: float,
    down: svg.Scale,
    bottom: float,
    largest: int,
) -> list[str]:
    assert one.score is not None
    colour, radius = kind(one, outcome), 3 + 9 * math.sqrt(one.size_bytes / largest)
    title = f"{one.name}: {one.score.value:.4f}, {one.p50_ms:.3f} ms, {output.size(one.size_bytes)}"
    if one.score.value < bottom:
        return [svg.dot(x, HEIGHT, radius, colour, title)]
    return [
        svg.line(x, down(one.score.low), x, down(one.score.high), colour),
        svg.dot(x, down(one.score.value), radius, colour, title),
    ]


def _labels(
    shown: Sequence[Evaluated], outcome: Outcome, across: svg.Scale, down: svg.Scale
) -> list[str]:
    """Names beside the points, moved down where another may be: widths are not known here."""
    parts: list[str] = []
    placed: list[tuple[float, float]] = []
    for one in sorted(shown, key=lambda each: down((each.score or _NONE).value)):
        assert one.score is not None
        x, y = across(one.p50_ms), down(one.score.value)
        left = x > LEFT_FROM
        middle, at = x + (-LABEL_WIDTH if left else LABEL_WIDTH) / 2, y
        while any(abs(middle - m) < LABEL_WIDTH and abs(at - a) < LABEL_GAP for m, a in placed):
            at += 1.0
        placed.append((middle, at))
        text = one.name if y < HEIGHT else f"{one.name} ({one.score.value:.3f})"
        shift, anchor = (-18.0, "end") if left else (18.0, "start")
        parts.append(svg.words(x, at + 4, text, kind(one, outcome), anchor, shift))
    return parts


# --- rows -----------------------------------------------------------------------------------------


def losses(outcome: Outcome) -> str:
    """What each variant loses, with its interval, and the loss that is allowed."""
    shown = [one for one in outcome.evaluated if one.against and one.name != outcome.reference]
    if not shown:
        return ""
    allowed = outcome.drop_max
    ends = [abs(end) for one in shown if one.against for end in (one.against.low, one.against.high)]
    reach = max(1.3 * allowed, min(1.1 * max(ends), WORSE_SHOWN * max(allowed, 1e-9)), 1e-9)
    across = svg.linear(-reach, reach)
    rows = []
    for one in shown:
        assert one.against is not None
        middle, colour = ROW / 2, kind(one, outcome)
        parts = [
            svg.line(across(0), 0, across(0), ROW, "axis"),
            svg.line(across(allowed), -3, across(allowed), ROW + 3, "limit"),
            svg.line(across(one.against.low), middle, across(one.against.high), middle, colour),
            svg.dot(across(one.against.drop), middle, 4, colour),
        ]
        said = f"{one.against.drop:+.4f} (p {one.against.p_value:.2g})"
        rows.append(_row(one.name, svg.drawing(ROW, parts, f"loss {said}"), said))
    return _rows(rows)


def latencies(outcome: Outcome) -> str:
    """p50 as a bar, p95 as a mark, the spread between rounds as a line."""
    shown = [one for one in outcome.evaluated if one.p50_ms]
    if not shown:
        return ""
    across = svg.linear(0, 1.25 * max(one.p50_ms for one in shown))
    rows = []
    for one in shown:
        colour, middle = kind(one, outcome), ROW / 2
        around = across(one.p50_ms - one.spread_ms), across(one.p50_ms + one.spread_ms)
        parts = [
            svg.box(0, 3, across(one.p50_ms), ROW - 6, f"{colour} bar"),
            svg.line(around[0], middle, around[1], middle, "axis"),
            svg.line(across(one.p95_ms), 2, across(one.p95_ms), ROW - 2, "axis"),
        ]
        said = f"{one.p50_ms:.3f} / {one.p95_ms:.3f} ±{one.spread_ms:.3f}"
        rows.append(_row(one.name, svg.drawing(ROW, parts, said), said))
    return _rows(rows)


def sizes(outcome: Outcome) -> str:
    """The file as it lies, pale, and compressed as it travels, full."""
    shown = [one for one in outcome.evaluated if one.size_bytes]
    if not shown:
        return ""
    across = svg.linear(0, max(one.size_bytes for one in shown))
    rows = []
    for one in shown:
        colour = kind(one, outcome)
        parts = [
            svg.box(0, 3, across(one.size_bytes), ROW - 6, f"{colour} pale"),
            svg.box(0, 3, across(one.packed_bytes), ROW - 6, f"{colour} bar"),
        ]
        said = f"{output.size(one.size_bytes)}, {output.size(one.packed_bytes)} packed"
        rows.append(_row(one.name, svg.drawing(ROW, parts, said), said))
    return _rows(rows)


def layers(found: Sequence[Layer], shown: int = 24) -> str:
    """Relative error of a node quantized alone; worst first."""
    worst = sorted(found, key=lambda one: -one.error)[:shown]
    across = svg.linear(0, max((one.error for one in worst), default=1.0))
    rows = []
    for one in worst:
        bar = svg.drawing(
            ROW, [svg.box(0, 3, across(one.error), ROW - 6, "shipped bar")], f"{one.error:.3g}"
        )
        said = f"{one.error:.2%}, loss {one.drop:+.4f}"
        rows.append(_row(f"{one.node} ({one.operator})", bar, said))
    return _rows(rows)


def saturations(found: Sequence[Activation], shown: int = 16) -> str:
    """The share of a tensor's values that the worst variant's range cuts off, worst first."""
    pairs = [(worst_clipping(one), one) for one in found if one.clippings]
    pairs.sort(key=lambda pair: -pair[0][1])
    across = svg.linear(0, max([0.01, *(share for (_, share), _ in pairs)]))
    rows = []
    for (variant, share), one in pairs[:shown]:
        bar = [svg.box(0, 3, across(share), ROW - 6, "refused bar")]
        said = f"{share:.2%} {variant}" if share else "0 %"
        rows.append(_row(one.name, svg.drawing(ROW, bar, said), said))
    return _rows(rows)


def worst_clipping(one: Activation) -> tuple[str, float]:
    """The variant that cuts off most of the tensor on evaluation data, and the share."""
    name = max(one.clippings, key=lambda each: one.clippings[each].evaluation)
    return name, one.clippings[name].evaluation


def _row(name: str, drawing: str, value: str) -> str:
    said = escape(name, quote=True)
    return (
        f'<div class="name" title="{said}">{escape(names.short(name, ROW_NAME))}</div>'
        f"<div>{drawing}</div>"
        f'<div class="value">{escape(value)}</div>'
    )


def _rows(rows: Sequence[str]) -> str:
    return f'<div class="rows">{"".join(rows)}</div>' if rows else ""


# --- histograms -----------------------------------------------------------------------------------


def histograms(found: Sequence[Activation], shown: int = TENSORS_SHOWN) -> str:
    """Small pictures of the tensors of which most is cut off or unseen."""
    ranked = sorted(found, key=lambda one: (-_trouble(one), found.index(one)))
    return f'<div class="small">{"".join(_histogram(one) for one in ranked[:shown])}</div>'


def _trouble(one: Activation) -> float:
    return max(one.beyond, worst_clipping(one)[1] if one.clippings else 0.0)


def _histogram(one: Activation, height: float = 84.0) -> str:
    across = svg.linear(one.low, one.high)
    first, second = _heights(one.calibration, height), _heights(one.evaluation, height)
    width = 1 / len(first)
    parts = [
        svg.box(index * width, height - tall, width, tall, "first")
        for index, tall in enumerate(first)
        if tall
    ]
    parts += _steps(second, width, height)
    said = ""
    if one.clippings:
        variant, share = worst_clipping(one)
        cut = one.clippings[variant]
        left, right = across(cut.low), across(cut.high)
        parts += [svg.box(0, 0, left, height, "cut"), svg.box(right, 0, 1 - right, height, "cut")]
        parts += [svg.line(x, 0, x, height, "edge") for x in (left, right) if 0 < x < 1]
        said = f"{variant} keeps {cut.low:.3g} to {cut.high:.3g}, cuts {share:.2%}"
    parts.append(svg.line(0, height, 1, height, "axis"))
    parts.append(svg.words(0, height + 14, f"{one.low:.3g}"))
    parts.append(svg.words(1, height + 14, f"{one.high:.3g}", anchor="end"))
    name = escape(one.name, quote=True)
    return (
        f'<div><div class="name" title="{name}">{escape(names.short(one.name))}</div>'
        f"{svg.drawing(height + 18, parts, one.name)}"
        f'<p class="why">{escape(said)}</p></div>'
    )


def _heights(counts: Sequence[int], height: float) -> list[float]:
    """Of bars, by the logarithm of shares: most values of an activation are near zero."""
    total = max(sum(counts), 1)
    logs = [math.log1p(1e5 * count / total) for count in counts]
    return [height * one / math.log1p(1e5) for one in logs]


def _steps(tall: Sequence[float], width: float, height: float) -> list[str]:
    parts, before = [], 0.0
    for index, one in enumerate(tall):
        x = index * width
        parts.append(svg.line(x, height - before, x, height - one, "second"))
        if one:
            parts.append(svg.line(x, height - one, x + width, height - one, "second"))
        before = one
    return parts
