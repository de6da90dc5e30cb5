"""Outcomes as files: written as JSON, read back, written as a page.

Law of this file: paths and the errors of reading and writing; what a page says is `page`'s. What
is read is checked against the types of `results`, so a foreign file is an error with its key path.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.errors import NotFoundError, StorageError, UsageError
from quantize.results import Outcome


def write(outcome: Outcome, path: Path) -> None:
    """The outcome as JSON, everything that was measured. Raises: StorageError."""
    text = msgspec.json.format(msgspec.json.encode(outcome), indent=1)
    _write(path, text + b"\n")


def write_page(outcome: Outcome, path: Path) -> None:
    """The outcome as one HTML page that asks nothing of a network. Raises: StorageError."""
    from quantize.report import page

    _write(path, page.page(outcome).encode())


def read(path: Path) -> Outcome:
    """An outcome that `write` wrote.

    Raises:
        NotFoundError: no such file. UsageError: it is none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise NotFoundError("there is no such outcome", where=str(path)) from e
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", where=str(path)) from e
    try:
        return msgspec.json.decode(data, type=Outcome)
    except msgspec.DecodeError as e:
        raise UsageError(
            f"is no outcome of a run: {e}",
            where=str(path),
            expected="what `edge-quantize run --out-json FILE` writes",
        ) from e


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
        raise StorageError(f"cannot be written: {e.strerror}", where=str(path)) from e
