"""Measured cards: what a model took on a board, when and with what; docs/hardware.md shows them.

Law of this file: the shape of a card, and reading the ones that we ship. A figure is in a card only
if somebody ran it; what was not measured is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from device_profiles.loading import read_yaml
from device_profiles.schema import Name, ProfileError

MEASURED = Path(__file__).parent / "measured"
DATE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variant of one model, batch 1."""

    model: str
    variant: str
    backend: Name
    version: str  # of the backend's library
    device: str  # where it really ran, as the backend reports it
    threads: int | None = None
    p50_ms: Annotated[float, Meta(gt=0)]
    spread: Annotated[float, Meta(ge=0)] = 0.0  # between the quartiles of the rounds, of the median
    private_bytes: Annotated[int, Meta(ge=0)] = 0  # of a process of its own, with its library
    temperature_c: float | None = None  # of the hottest zone at the end; None: no sensor


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One sitting on one machine."""

    board: Name  # the profile
    machine: str  # what it really was
    date: Annotated[str, Meta(pattern=DATE_PATTERN)]
    runtime: str  # version of edge-runtime
    kernel: str = ""
    notes: str = ""
    results: tuple[Result, ...] = ()


def load(path: Path) -> Card:
    """A card.

    Raises:
        ProfileError: it cannot be read or is wrong.
    """
    document: Any = read_yaml(path)
    try:
        return msgspec.convert(document, Card)
    except msgspec.ValidationError as error:
        text = str(error)
        raise ProfileError(f"wrong card: {text[:1].lower()}{text[1:]}", where=str(path)) from error


def load_all(directory: Path = MEASURED) -> list[Card]:
    """Every card that we ship, by file name.

    Raises:
        ProfileError: as `load`.
    """
    return [load(path) for path in sorted(directory.glob("*.yaml"))]
