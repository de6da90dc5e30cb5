"""The report as a picture.

Law of this file: the only place of the package that imports matplotlib (extra `plot`), when it
draws; no figure is computed here.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from edge_runtime.client.load.campaign import Report
from edge_runtime.client.load.statistics import Load
from edge_runtime.errors import StorageError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 120
SIZE_INCHES = (15, 4.5)
SHARE_LAST = 0.99999  # the right end at most: shares are drawn by their nines
SHARES_NAMED = (0.5, 0.9, 0.99, 0.999, 0.9999)


def check(path: Path) -> None:
    """Whether a plot can be written there: asked before minutes of measuring.

    Raises:
        UsageError: matplotlib is not installed, another suffix, or no such directory.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"a plot as {path.suffix!r}", where=str(path), expected=", ".join(SUFFIXES)
        )
    if not path.parent.is_dir():
        raise UsageError("there is no such directory", where=str(path.parent))
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a plot needs matplotlib, which is not installed",
            remedy="pip install 'edge-runtime[plot]'",
        )


def draw(report: Report, title: str, path: Path) -> None:
    """Three panels: latency by share of the requests, a curve per load; goodput by offered load;
    percentiles of answers and refusals by offered load.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(title)
    calm = {f"calm ({report.calm.name})": report.calm} if report.calm else {}
    _latencies(left, {**calm, **{one.name: one for one in report.loads}})
    loads = sorted(report.loads, key=lambda one: one.offered_per_s)
    _goodput(middle, loads, report.peak)
    _percentiles(right, loads)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as e:
        raise StorageError(f"the plot cannot be written: {e.strerror}", where=str(path)) from e


def _latencies(axes: Any, loads: dict[str, Load]) -> None:
    for label, one in loads.items():
        last = 1 - 1 / max(one.latency_ms.count, 2)  # where the maximum of so many values stands
        points = [(_nines(min(share, last)), ms) for share, ms in one.latency_curve_ms]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    names = [f"{share * 100:g} %" for share in SHARES_NAMED]
    axes.set_xticks([_nines(share) for share in SHARES_NAMED], names)
    axes.set_yscale("log")
    axes.set_xlabel("share of the answers")
    axes.set_ylabel("latency, ms, from when a request was due")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _nines(share: float) -> float:
    """Where a share stands: 90 % at 1, 99 % at 2, 99.9 % at 3."""
    return -math.log10(1 - min(share, SHARE_LAST))


def _goodput(axes: Any, loads: list[Load], peak: Load | None) -> None:
    offered = [one.offered_per_s for one in loads]
    answered = [one.goodput_per_s for one in loads]
    axes.plot(offered, answered, marker=".", label="answered in time")
    if peak:
        axes.axhline(peak.goodput_per_s, linestyle="--", color="gray", label="peak")
    top = max([*answered, peak.goodput_per_s if peak else 0])
    axes.plot([0, top], [0, top], linestyle=":", color="gray", label="all that is offered")
    axes.set_ylabel("goodput, requests/s")
    axes.set_ylim(bottom=0)
    _over_offered(axes)


# What is drawn over the load: the part of a Load, its percentile, a label, a line style.
_PERCENTILES = (
    ("latency_ms", "p50", "answers, p50", "-"),
    ("latency_ms", "p99", "answers, p99", "-"),
    ("latency_ms", "p999", "answers, p99.9", "-"),
    ("refusal_ms", "p99", "refusals, p99", "--"),
)


def _percentiles(axes: Any, loads: list[Load]) -> None:
    for part, name, label, style in _PERCENTILES:
        values = [(one.offered_per_s, getattr(getattr(one, part), name)) for one in loads]
        points = [(x, ms) for x, ms in values if ms is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linestyle=style, label=label)
    axes.set_ylabel("latency, ms, from when a request was due")
    axes.set_yscale("log")
    _over_offered(axes)


def _over_offered(axes: Any) -> None:
    """What panels over the offered load share."""
    axes.set_xlabel("offered, requests/s")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)  # numbers of six digits must not touch
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
