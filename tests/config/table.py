"""The table of docs/config.md, from the code: `python -m tests.config.table` writes it there."""

from __future__ import annotations

from pathlib import Path

from edge_runtime import config
from edge_runtime.cli import output

DOCS = Path(__file__).parents[2] / "docs" / "config.md"
BEGIN, END = "<!-- options: begin -->\n", "<!-- options: end -->\n"


def table() -> str:
    lines = ["| option | default | unit | reason |", "|---|---|---|---|"]
    for row in config.describe(config.Config()):
        lines.append(f"| `{row.path}` | {_shown(row)} | {row.unit} | {row.reason} |")
    return "\n".join(lines) + "\n"


def _shown(row: config.Row) -> str:
    if row.default is None or row.default in ("", (), []):
        return "(empty)"
    if row.unit == "bytes" and isinstance(row.default, int) and row.default:
        return f"{output.size(row.default)} ({row.default})"
    if isinstance(row.default, bool):
        return str(row.default).lower()
    return f"{row.default:g}" if isinstance(row.default, float) else str(row.default)


def documented() -> str:
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
