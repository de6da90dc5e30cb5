"""Outcomes as files: written as JSON, read back, written as a page.

Law of this file: paths and the errors of reading and writing; what a page says is `page`'s. What
is read is checked against the types of `results`, so a foreign file is an error with its key path.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edge_runtime.errors import NotFoundError, StorageError, UsageError
from quantize.results import Layer, Outcome

Kind = TypeVar("Kind")


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
    return _read(path, Outcome, "what `edge-quantize run --out-json FILE` writes")


def with_layers(outcome: Outcome, path: Path) -> Outcome:
    """The outcome with the layers of a kept sensitivity analysis. Raises as `read`."""
    from quantize.sensitivity import Sensitivity

    found = _read(path, Sensitivity, "what `edge-quantize sensitivity --json` prints")
    layers = tuple(
        Layer(one.name, one.operator, 10 ** (-one.alone_sqnr_db / 20), one.loss)
        for one in found.layers
    )
    return msgspec.structs.replace(outcome, layers=layers)


def _read(path: Path, kind: type[Kind], expected: str) -> Kind:
    try:
        data = path.read_bytes()
    except FileNotFoundError as e:
        raise NotFoundError("there is no such file", where=str(path)) from e
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror}", where=str(path)) from e
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as e:
        raise UsageError(f"is something else: {e}", where=str(path), expected=expected) from e


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
        raise StorageError(f"cannot be written: {e.strerror}", where=str(path)) from e
