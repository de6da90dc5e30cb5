"""Where intermediate models are kept: named by what made them, so that nothing is made twice.

Law of this file: keys and paths. A file is complete or absent: it is written under another name
first. What made a file is the source's hash, the passes with their options, the calibration set's
hash, and the versions of the libraries that the passes use.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Scratch:
    """A folder of finished intermediate files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def made(self, key: str, ending: str, make: Callable[[Path], None]) -> Path:
        """The file of that key; `make` writes it if it is not there yet."""
        path = self.folder / f"{key}{ending}"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            draft = Path(temporary) / f"draft{ending}"
            make(draft)
            draft.replace(path)
        return path


def key(*parts: Any) -> str:
    """A short name for what `parts` say; the same parts give the same name."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
