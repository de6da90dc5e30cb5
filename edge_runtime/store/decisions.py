"""Decisions: which variant of a generation serves on this machine, and what that rests on.

Law of this file: the values, and where they lie: one record beside each generation's own. A
decision can always be made again, so a record that is missing, torn, altered or another program
version's is no decision and never an error. How one is made is `serving.selection`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.errors import NotFoundError, StorageError
from edge_runtime.files import write_atomic
from edge_runtime.store import records
from edge_runtime.store.disk import Disk

FILE_NAME = "decision"


class Tried(msgspec.Struct, frozen=True):
    """What was found out about one variant.

    Attributes:
        verdict: chosen; fit (right, and not the best); slower (right, and worse than the
            reference: the last to serve); wrong (a golden refused it); failed (it did not load,
            ended or hung); skipped (it cannot run here, and was not tried).
        reason: why it has that verdict, a sentence.
        golden_deviation: the largest |got - want| / tolerance of its goldens at load; 1: the limit.
        run_ms_p50: the median of its rounds' medians; 0.0: not measured.
        run_ms_spread: the median distance of a round from that.
        energy_uj: of one run, with what else the processor did meanwhile; 0.0: not read.
        placement: where it ran, as its worker said.
    """

    variant: str
    backend: str
    verdict: str
    reason: str = ""
    backend_version: str = ""
    loaded: bool = False
    goldens: int = 0
    golden_deviation: float = 0.0
    run_ms_p50: float = 0.0
    run_ms_spread: float = 0.0
    runs: int = 0
    private_bytes: int = 0
    energy_uj: float = 0.0
    placement: list[dict[str, Any]] = []


class Left(msgspec.Struct, frozen=True):
    """A variant that served and was left: not used again until a new decision."""

    variant: str
    reason: str
    cause: str  # serving.health.Cause
    at_wall_s: float


class Decision(msgspec.Struct, frozen=True):
    """Which variants of a generation may serve here, best first.

    Attributes:
        fingerprint: what it depends on; another one makes it stale.
        policy: what "best" meant: latency, memory, energy, or off (the order as preferred).
        order: the variants that may serve, best first.
        reference: the plain variant that others had to beat.
        margin: the smallest relative difference that counts.
        rounds: how often each was measured in turn.
        together: all were loaded at once and measured in turns; false: one after the other.
        note: what else a reader should know: no room, no time, no goldens.
    """

    name: str
    generation: int
    fingerprint: dict[str, str]
    policy: str
    order: tuple[str, ...]
    tried: tuple[Tried, ...]
    reference: str = ""
    margin: float = 0.0
    rounds: int = 0
    together: bool = True
    note: str = ""
    left: tuple[Left, ...] = ()
    decided_wall_s: float = 0.0
    took_s: float = 0.0


def path(disk: Disk, name: str, number: int) -> Path:
    """Where the decision about a generation lies: in its directory, to vanish with it."""
    return disk.generation(name, number) / FILE_NAME


def read(disk: Disk, name: str, number: int) -> Decision | None:
    """The decision about a generation; None when there is none that can be used."""
    try:
        data = disk.files.read(path(disk, name, number), records.RECORD_SIZE_MAX)
        decision = records.decode(data, Decision)
    except (NotFoundError, StorageError):
        return None
    if decision is None or (decision.name, decision.generation) != (name, number):
        return None
    return decision


def write(disk: Disk, decision: Decision) -> None:
    """Keep a decision, durable on return.

    Raises:
        NotFoundError: the generation is not installed (any more).
        StorageError: the disk did not take it; the decision before it, if any, is still there.
    """
    directory = disk.generation(decision.name, decision.generation)
    if disk.files.entry(directory) is None:
        raise NotFoundError(f"no generation {decision.generation}", where=decision.name)
    target = path(disk, decision.name, decision.generation)
    write_atomic(disk.files, target, records.encode(decision))
