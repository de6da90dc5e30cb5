"""Small pieces of SVG whose x is a share of the width, so that a chart flows with the page.

Law of this file: numbers to elements; it knows no outcome. x runs from 0 to 1 and becomes per cent,
y is in pixels; text keeps its size whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

Scale = Callable[[float], float]  # a value to 0..1


def linear(low: float, high: float) -> Scale:
    """From low..high to 0..1, cut off at both ends."""
    span = high - low if high > low else 1.0
    return lambda value: min(max((value - low) / span, 0.0), 1.0)


def logarithmic(low: float, high: float) -> Scale:
    """As linear, of logarithms; low > 0."""
    scale = linear(math.log(low), math.log(high))
    return lambda value: scale(math.log(max(value, 1e-12)))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * unit for unit in (1, 2, 2.5, 5, 10) if size * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [unit * 10.0**power for power in powers for unit in (1, 2, 5)]
    return [one for one in every if low <= one <= high]


def drawing(height: float, parts: Iterable[str], label: str) -> str:
    """An image `height` pixels high, as wide as its place; `label` says it in words."""
    return (
        f'<svg height="{height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line; `kind` is its class in the style sheet."""
    return f'<line x1="{_x(x1)}" y1="{y1:.4g}" x2="{_x(x2)}" y2="{y2:.4g}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled box."""
    return (
        f'<rect x="{_x(x)}" y="{y:.4g}" width="{_x(max(width, 0.0))}" height="{max(height, 0):.4g}"'
        f' class="{kind}"/>'
    )


def dot(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    """A circle that says `title` under the pointer."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{_x(x)}" cy="{y:.4g}" r="{radius:.3g}" class="{kind}">{inner}</circle>'


def words(
    x: float, y: float, text: str, kind: str = "", anchor: str = "start", shift: float = 0.0
) -> str:
    """Text, `shift` pixels to the right of x; anchor start, middle or end."""
    return (
        f'<text x="{_x(x)}" y="{y:.4g}" dx="{shift:g}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(text)}</text>"
    )


def _x(value: float) -> str:
    return f"{100 * value:.5g}%"
