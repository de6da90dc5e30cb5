"""Progress of long work: a bar on a terminal, plain lines elsewhere.

Law of this file: it draws on the stream that it is given and knows nothing of what is done. Give it
stderr: stdout is for the answer.
"""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from edge_runtime.cli import output

BAR_WIDTH = 24
LINE_STEP = 0.25  # without a terminal: a line per quarter, so that a log stays short


class Progress:
    """Draws `update` after `update`; when it is left, the terminal is on a fresh line."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._columns = output.terminal_columns(stream)
        self._drawn = ""
        self._line = ("", -1)

    def update(self, text: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """Show a step, and of steps with a total how far it is. Redraws only what changed."""
        if self._quiet:
            return
        share = min(max(done_bytes / total_bytes, 0.0), 1.0) if total_bytes > 0 else None
        text = output.printable(text)
        if self._columns is None:
            self._plain(text, share, total_bytes)
        else:
            self._draw(bar(text, share, total_bytes)[: self._columns - 1])

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = ""

    def _draw(self, line: str) -> None:
        if line != self._drawn:
            self._stream.write("\r" + line.ljust(len(self._drawn)))
            self._stream.flush()
            self._drawn = line

    def _plain(self, text: str, share: float | None, total_bytes: int) -> None:
        step = -1 if share is None else int(share / LINE_STEP)
        if (text, step) != self._line:
            self._line = (text, step)
            tail = "" if share is None else f" {share:4.0%} of {output.size(total_bytes)}"
            print(text + tail, file=self._stream, flush=True)


def bar(text: str, share: float | None, total_bytes: int) -> str:
    """`copying  [############------------]  50 % of 3.0 MiB`; without a share the text alone."""
    if share is None:
        return text
    filled = round(share * BAR_WIDTH)
    cells = "#" * filled + "-" * (BAR_WIDTH - filled)
    return f"{text}  [{cells}] {share:4.0%} of {output.size(total_bytes)}"
