"""What a search tried, as text for a terminal.

Law of this file: values to lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.cli import output
from quantize.trials import Trial

HEADERS = ("trial", "backend", "what", ">loss", ">time", ">size", "")
FRONT = "front"


def text(trials: Sequence[Trial], front: Sequence[Trial], width: int | None = None) -> str:
    """A row per trial that was measured, and the reasons of those that were not."""
    keys = {one.key for one in front}
    rows = [_row(one, one.key in keys) for one in trials if one.found and not one.refusal]
    lines = [output.table(HEADERS, rows, width), ""]
    lines.append("time: of a run / the float model's on the same backend, measured in turns.")
    lines.append("front: nothing else on its backend is as right, as fast and as small.")
    refused = [one for one in trials if one.refusal]
    if refused:
        lines += ["", "refused:"]
        lines += [f"  {one.variant.name}: {output.printable(one.refusal)}" for one in refused]
    return "\n".join(lines)


def _row(one: Trial, on_front: bool) -> tuple[str, ...]:
    assert one.found is not None
    return (
        one.variant.name,
        one.variant.backend,
        one.why,
        f"{one.found.loss:+.4f} ±{one.found.error:.4f}",
        f"{one.time:.2f}",
        output.size(one.found.size_bytes),
        FRONT if on_front else "",
    )
