"""Names that fit.

Law of this file: text to text.
"""

from __future__ import annotations

WIDTH = 44


def short(name: str, width: int = WIDTH) -> str:
    """Names in .tflite files are paths, several of them after a fusion: the end tells most."""
    if len(name) <= width or not {"/", ";"} & set(name):
        return name
    return "…" + name[1 - width :]
