"""The report as a picture.

Law of this file: the only place of the package that imports matplotlib (extra `plot`), when it
draws; no figure is computed here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edge_runtime.client.load.campaign import Report
from edge_runtime.client.load.statistics import Load
from edge_runtime.errors import StorageError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 120
SIZE_INCHES = (11, 4.5)
SHARE_LAST = 0.9999  # the curve's right end: shares are drawn by their nines


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
    """Left: latency by share of the requests, a curve per load. Right: goodput by offered load.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    _latencies(left, report.loads)
    _goodput(right, report)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as e:
        raise StorageError(f"the plot cannot be written: {e.strerror}", where=str(path)) from e


def _latencies(axes: Any, loads: tuple[Load, ...]) -> None:
    shares = (0.5, 0.9, 0.99, 0.999, SHARE_LAST)
    for one in loads:
        points = [(_nines(share), ms) for share, ms in one.latency_curve_ms]
        axes.plot(*zip(*points, strict=True), marker=".", label=one.name) if points else None
    axes.set_xticks([_nines(share) for share in shares], [f"{share * 100:g} %" for share in shares])
    axes.set_yscale("log")
    axes.set_xlabel("share of the answers")
    axes.set_ylabel("latency, ms, from when a request was due")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _nines(share: float) -> float:
    """Where a share stands: 90 % at 1, 99 % at 2, 99.9 % at 3."""
    import math

    return -math.log10(1 - min(share, SHARE_LAST))


def _goodput(axes: Any, report: Report) -> None:
    loads = sorted(report.loads, key=lambda one: one.offered_per_s)
    offered = [one.offered_per_s for one in loads]
    axes.plot(offered, [one.goodput_per_s for one in loads], marker="o", label="answered in time")
    if report.peak:
        axes.axhline(report.peak.goodput_per_s, linestyle="--", color="gray", label="peak")
    axes.set_xlabel("offered, requests/s")
    axes.set_ylabel("goodput, requests/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
