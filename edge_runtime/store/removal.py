"""Removal: how a generation and its blobs leave the disk.

Law of this file: order of steps; what may go was decided in `generations.py`. Before a generation
goes, both slots of the switch are on the medium and agree that it is free. Before a blob goes, the
absence of every generation that named it is on the medium. While it is not known what a damaged
generation needs, no blob goes.
"""

from __future__ import annotations

import msgspec

from edge_runtime.store import generations
from edge_runtime.store.disk import Disk, Survey
from edge_runtime.store.generations import Generation


class Freed(msgspec.Struct, frozen=True):
    """What a removal gave back."""

    size_bytes: int = 0
    generations: tuple[Generation, ...] = ()
    blobs: tuple[str, ...] = ()  # SHA-256
    held_back: str = ""  # not empty: why blobs that nothing names were kept


def drop(disk: Disk, survey: Survey, doomed: tuple[Generation, ...]) -> Freed:
    """Remove generations, then the blobs that nothing names any more.

    Raises:
        StorageError: a step failed; what went until then is gone, the rest can go later.
    """
    for name in {generation.name for generation in doomed}:
        _settle(disk, name, [each.number for each in doomed if each.name == name])
    for generation in doomed:
        disk.unpublish(generation.name, generation.number)
    kept = tuple(each for each in survey.generations if each not in doomed)
    blobs = drop_blobs(disk, survey._replace(generations=kept))
    manifests_bytes = sum(generation.manifest_size_bytes for generation in doomed)
    return together(Freed(manifests_bytes, doomed), blobs)


def drop_blobs(disk: Disk, survey: Survey) -> Freed:
    """Remove the blobs that nothing in the survey names. Raises StorageError as `drop`."""
    if survey.unreadable:
        damaged = ", ".join(str(path) for path in survey.unreadable)
        return Freed(held_back=f"blobs stay, because what these need is not known: {damaged}")
    blobs = generations.unreferenced(disk.blobs.present(), survey.generations)
    if not blobs:
        return Freed()
    for name in disk.names():
        if disk.numbers(name):
            disk.files.sync_directory(disk.generations(name))
    size_bytes = sum(disk.blobs.drop(sha256) for sha256 in blobs)
    disk.blobs.sync()
    return Freed(size_bytes, blobs=blobs)


def together(first: Freed, second: Freed) -> Freed:
    """Two removals as one."""
    return Freed(
        first.size_bytes + second.size_bytes,
        first.generations + second.generations,
        first.blobs + second.blobs,
        first.held_back or second.held_back,
    )


def _settle(disk: Disk, name: str, going: list[int]) -> None:
    """Both slots agree, durably, and remember the numbers that go."""
    disk.sync_chain(name)
    switch = disk.switch(name)
    disk.write_switch(generations.remembering(switch, disk.numbers(name), going))
