"""Which workers stay in memory: who must go for a newcomer, and who has not been asked for long.

Law of this file: pure. Sizes and times in, names out; who drains and stops is `crew`, who
waits for room is `room`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# A worker's memory beyond its model: interpreter pages that are no longer shared, library state,
# one set of buffers. Measured: 4-8 MB (docs/benchmarks.md).
WORKER_BYTES = 8 * 1024 * 1024
# Weights are unpacked and copied once while a session is made.
ARTIFACT_FACTOR = 2
# A worker stays for so long after its load: it answers whoever waited for it before it may go, or
# two models that fit only one at a time would push each other out without ever answering.
STAY_S = 0.25


class Resident(NamedTuple):
    """A worker with its memory, or with what it is expected to take while it loads."""

    model: str
    warm: bool  # the previous version, kept for a quick roll-back
    private_bytes: int
    last_used_ns: int  # CLOCK_MONOTONIC
    movable: bool  # it may be asked to go now
    leaving: bool = False  # it goes already, its memory comes back soon


def predicted_bytes(stated: int, learned: int, artifact_bytes: int) -> int:
    """What a worker will need: as measured here before, else as stated, else from its artifact."""
    return learned or stated or ARTIFACT_FACTOR * artifact_bytes + WORKER_BYTES


def victims(
    residents: Sequence[Resident],
    need_bytes: int,
    budget_bytes: int,
    newcomer: str,
    *,
    warm_only: bool = False,
) -> list[Resident] | None:
    """Whom to unload so that the newcomer fits; None: it does not fit even so.

    Warm previous versions go first, then the model that was asked for least recently. The version
    of the newcomer's own model that serves now stays: it must answer until the newcomer is ready.

    Args:
        warm_only: nobody has asked for the newcomer, so no model stops serving for it.
    """
    excess = sum(one.private_bytes for one in residents) + need_bytes - budget_bytes
    chosen: list[Resident] = []
    candidates = [
        one
        for one in residents
        if one.movable and (one.warm or (one.model != newcomer and not warm_only))
    ]
    for one in sorted(candidates, key=lambda one: (not one.warm, one.last_used_ns)):
        if excess <= 0:
            break
        chosen.append(one)
        excess -= one.private_bytes
    return chosen if excess <= 0 else None


def is_settled(loaded_ns: int, now_ns: int) -> bool:
    """Whether a worker has been loaded for long enough to be asked to go."""
    return now_ns - loaded_ns > STAY_S * 1e9


def is_idle(last_used_ns: int, now_ns: int, keep_alive_s: float) -> bool:
    """Whether a model has not been asked for longer than it is kept (0: for ever)."""
    return keep_alive_s > 0 and now_ns - last_used_ns > keep_alive_s * 1e9
