"""What all tests share: the counts of what the proofs tried, printed in the summary.

A test calls `record_property("points", ("what was tried", how_many))`; the counts of the same words
are added up.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

# Tests that use onnxruntime beside our backend: no report to its maker, and no thread of its own.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    points: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", ()):
            if name == "points" and report.when == "call":
                what, count = value
                points[what] += count
    if points:
        terminalreporter.write_sep("=", "points tried")
        for what, count in points.items():
            terminalreporter.write_line(f"{count:7,} {what}")
