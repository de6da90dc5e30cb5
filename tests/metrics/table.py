"""The table of docs/metrics.md, from the code: `python -m tests.metrics.table` writes it there."""

from __future__ import annotations

from pathlib import Path

from edge_runtime import metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- names: begin -->\n", "<!-- names: end -->\n"


def table() -> str:
    lines = ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for name, metric in metrics.METRICS.items():
        labels = ", ".join(metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {labels} | {metric.meaning} |")
    return "\n".join(lines) + "\n"


def documented() -> str:
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
