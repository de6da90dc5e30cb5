"""How answers look: tables, units, ages, errors, JSON.

Law of this file: values in, text out; only `print_json` writes. Text that came from elsewhere (a
label of a bundle, a name in an error) passes `printable` before a terminal sees it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.errors import EdgeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

COLUMN_WIDTH_MIN = 6  # a cut column still shows this much


def print_json(document: Any) -> None:
    """One JSON document on stdout, indented for people, in the order it was built."""
    try:
        text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    except UnicodeEncodeError:  # half a character: a file name or argument that is not UTF-8
        import json

        text = json.dumps(msgspec.to_builtins(document), indent=2)
    print(text)


def error_text(program: str, error: EdgeError) -> str:
    """An error as one paragraph: what, where, expected, what to do."""
    lines = [f"{program}: error: {printable(error.message)}"]
    parts = {"where": error.where, "expected": error.expected, "do": error.remedy}
    lines += [f"  {name + ':':<10}{printable(text)}" for name, text in parts.items() if text]
    if error.retry_after_s is not None:
        lines.append(f"  retry:    in {duration(error.retry_after_s)}")
    return "\n".join(lines)


def printable(text: Any) -> str:
    """The text with control characters made visible: a label must not drive the terminal."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in plain
    )


def terminal_columns(stream: TextIO) -> int | None:
    """The width of the terminal behind a stream; None if it is not one (then nothing is cut)."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], width: int | None = None) -> str:
    """Aligned columns: numbers to the right, the widest text cut with `…` to fit `width`.

    A header that begins with `>` is of a column to be aligned to the right.
    """
    right = [header.startswith(">") for header in headers]
    cells = [[header.lstrip(">") for header in headers]]
    cells += [[printable(cell) for cell in row] for row in rows]
    widths = _fit([max(len(row[i]) for row in cells) for i in range(len(headers))], right, width)
    return "\n".join(_line(row, widths, right) for row in cells)


def _fit(widths: list[int], right: list[bool], limit: int | None) -> list[int]:
    """Take from the widest text column until all fit, or none can give more."""
    while limit is not None and sum(widths) + 2 * (len(widths) - 1) > limit:
        texts = [i for i, is_right in enumerate(right) if not is_right]
        widest = max(texts, key=lambda i: widths[i], default=-1)
        if widest < 0 or widths[widest] <= COLUMN_WIDTH_MIN:
            break
        widths[widest] -= 1
    return widths


def _line(row: Sequence[str], widths: list[int], right: list[bool]) -> str:
    cut = [
        cell if len(cell) <= width else cell[: width - 1] + "…"
        for cell, width in zip(row, widths, strict=True)
    ]
    padded = [
        cell.rjust(width) if is_right else cell.ljust(width)
        for cell, width, is_right in zip(cut, widths, right, strict=True)
    ]
    return "  ".join(padded).rstrip()


# --- units --------------------------------------------------------------------------------------


def size(size_bytes: float | None) -> str:
    """`1536` -> `1.5 KiB`; None -> `-`."""
    if size_bytes is None:
        return "-"
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float | None) -> str:
    """`0.0007` -> `0.7 ms`, `0.25` -> `250 ms`, `200` -> `3 min`; None -> `-`."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    for limit, divisor, unit in _DURATIONS:
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


_DURATIONS = ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h"))


def age(then_s: float, now_s: float) -> str:
    """How long ago, for people: `3 min ago`. The wall clock may have jumped."""
    if then_s > now_s + 1:
        return f"{duration(then_s - now_s)} ahead of this clock"
    return "just now" if now_s - then_s < 1 else f"{duration(now_s - then_s)} ago"


def moment(wall_s: float) -> str:
    """Local date and time to the second."""
    import time

    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))
    except (OverflowError, OSError, ValueError):  # a clock that was never set can say anything
        return f"@{wall_s:.0f}"
