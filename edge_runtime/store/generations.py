"""The rules of the store: what is installed, what serves, what may go.

Law of this file: values in, verdict out. No path, no file, no clock. Every rule about names,
numbers, switching and garbage lives here and nowhere else; `driver.py` only carries the verdicts
out.

No rule depends on a wall clock: devices boot in 1970. Order is counted (`number`, `order`,
`sequence`); times are kept for people.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from edge_runtime.errors import BundleError, ConflictError, RequestError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
NUMBER = re.compile(r"[0-9]{6,12}")


class BlobRef(msgspec.Struct, frozen=True):
    """A blob by its content."""

    sha256: str
    size_bytes: int


class Generation(msgspec.Struct, frozen=True, tag_field="record", tag="generation-1"):
    """An installed version of a model.

    `number` counts the installs of this model and is never given out twice; `order` tells which of
    two installed generations of any models came first.
    """

    name: str
    number: int
    version: int
    manifest_sha256: str
    manifest_size_bytes: int
    blobs: tuple[BlobRef, ...]
    installed_wall_s: float
    order: int

    @property
    def size_bytes(self) -> int:
        """Manifest and blobs; blobs shared with other generations count in each."""
        return self.manifest_size_bytes + sum(blob.size_bytes for blob in self.blobs)


class Switch(msgspec.Struct, frozen=True, tag_field="record", tag="switch-1"):
    """Which generation of a model serves (`active`) and which one a rollback goes to (`previous`).

    `sequence` counts the changes of this record; `generation_last` is the highest number given out
    to a generation that may since have been removed.
    """

    name: str
    active: int | None = None
    previous: int | None = None
    since_wall_s: float = 0.0
    reason: str = ""
    sequence: int = 0
    generation_last: int = 0


def check_name(name: str) -> str:
    """The name, when it is safe as a directory name. Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} is not a model name",
            expected="1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit",
        )
    return name


def check_sha256(sha256: str) -> str:
    """The digest, when it is safe as a file name. Raises BundleError."""
    if not SHA256.fullmatch(sha256):
        raise BundleError(f"{sha256!r} is not a SHA-256", expected="64 lower-case hex digits")
    return sha256


def check_version(version: int) -> int:
    """The version, when it is a counter. Raises RequestError."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RequestError(f"{version!r} is not a version", expected="a whole number from 1")
    return version


def blob_refs(blobs: Iterable[tuple[str, int]]) -> tuple[BlobRef, ...]:
    """Checked and without repeats, in the given order.

    Raises:
        BundleError: a bad digest or size, or one digest with two sizes.
    """
    sizes: dict[str, int] = {}
    for sha256, size_bytes in blobs:
        if size_bytes < 0:
            raise BundleError(f"size {size_bytes} of a blob", where=sha256, expected="0 or more")
        if sizes.setdefault(check_sha256(sha256), size_bytes) != size_bytes:
            raise BundleError(f"two sizes: {sizes[sha256]} and {size_bytes}", where=sha256)
    return tuple(BlobRef(sha256, size) for sha256, size in sizes.items())


def installed(
    known: Iterable[Generation], name: str, version: int, manifest_sha256: str
) -> Generation | None:
    """The generation that already is this version; None when it is new.

    Raises:
        ConflictError: the version is installed with another manifest.
    """
    for generation in known:
        if generation.version == version:
            if generation.manifest_sha256 == manifest_sha256:
                return generation
            raise ConflictError(
                f"version {version} is already installed with other content",
                where=f"{name}@{version}",
                expected=f"the manifest with SHA-256 {generation.manifest_sha256}",
                remedy="give the changed bundle a new version",
            )
    return None


def next_number(switch: Switch, numbers: Iterable[int]) -> int:
    """The number of the next generation: higher than any before it."""
    return max((switch.generation_last, *numbers)) + 1


def next_order(known: Iterable[Generation]) -> int:
    """The place of the next install among those of all models."""
    return max((generation.order for generation in known), default=0) + 1


def winner(first: Switch | None, second: Switch | None) -> Switch | None:
    """The record that counts, of two slots of which torn ones are None: the newest whole one."""
    whole = [slot for slot in (first, second) if slot is not None]
    return max(whole, key=lambda slot: slot.sequence, default=None)


def activated(
    switch: Switch, number: int, now_wall_s: float, reason: str, *, active_is_damaged: bool
) -> Switch:
    """The switch with that generation active; what served until now becomes `previous`.

    Activating what is active changes nothing. With nothing active there is nothing to go back to.

    Args:
        active_is_damaged: what served is known to be damaged on disk: the previous generation then
            stays previous, so that a rollback leads to something whole.
    """
    if switch.active == number:
        return switch
    previous = switch.previous if active_is_damaged else switch.active
    return _changed(switch, number, None if previous == number else previous, now_wall_s, reason)


def rolled_back(switch: Switch, now_wall_s: float, reason: str) -> Switch:
    """The switch with `previous` active.

    Nothing is `previous` afterwards: the generation that was rolled back must not be where the next
    rollback leads, or two bad generations would take turns.

    Raises:
        ConflictError: there is no previous generation.
    """
    if switch.previous is None:
        raise ConflictError(
            "there is no previous generation to roll back to",
            where=switch.name,
            remedy=f"activate a version by name: edge-runtime activate {switch.name}@VERSION",
        )
    return _changed(switch, switch.previous, None, now_wall_s, reason)


def deactivated(switch: Switch, now_wall_s: float, reason: str) -> Switch:
    """The switch with nothing active and nothing to go back to; all its generations may go."""
    if switch.active is None and switch.previous is None:
        return switch
    return _changed(switch, None, None, now_wall_s, reason)


def _changed(
    switch: Switch, active: int | None, previous: int | None, now_wall_s: float, reason: str
) -> Switch:
    return msgspec.structs.replace(
        switch,
        active=active,
        previous=previous,
        since_wall_s=now_wall_s,
        reason=reason,
        sequence=switch.sequence + 1,
    )


def remembering(switch: Switch, numbers: Iterable[int], going: Iterable[int]) -> Switch:
    """The switch that must be on disk before generations go: their numbers are not given out again.

    Numbers below one that stays need no remembering: a full disk can be relieved without a write.

    Args:
        numbers: of all generations of the model.
        going: those to be removed.
    """
    gone = frozenset(going)
    staying = max((number for number in numbers if number not in gone), default=0)
    last = max((switch.generation_last, *gone))
    if last <= max(switch.generation_last, staying):
        return switch
    return msgspec.structs.replace(switch, generation_last=last, sequence=switch.sequence + 1)


def is_protected(switch: Switch, number: int) -> bool:
    """Whether a generation may not be removed: it serves, or a rollback leads to it."""
    return number in (switch.active, switch.previous)


def check_removable(switch: Switch, generation: Generation) -> None:
    """Raises ConflictError for the active and the previous generation."""
    if is_protected(switch, generation.number):
        role = "active" if generation.number == switch.active else "previous"
        raise ConflictError(
            f"the {role} generation cannot be removed",
            where=f"{generation.name}@{generation.version}",
            remedy="activate another version or unload the model first",
        )


def used_bytes(known: Iterable[Generation]) -> int:
    """What generations take together: manifests, and every blob once."""
    manifests = 0
    blobs: dict[str, int] = {}
    for generation in known:
        manifests += generation.manifest_size_bytes
        blobs.update((blob.sha256, blob.size_bytes) for blob in generation.blobs)
    return manifests + sum(blobs.values())


def garbage(
    known: Sequence[Generation],
    switches: dict[str, Switch],
    byte_budget: int | None,
    keep: Mapping[str, Container[int]] = MappingProxyType({}),
) -> tuple[Generation, ...]:
    """The generations to drop, oldest first, until the rest fits the budget.

    The active and the previous generation of every model stay, even over the budget.

    Args:
        known: every installed generation.
        switches: by model name; a model without one has nothing active.
        byte_budget: bytes for all generations together; None: no limit, nothing is dropped.
        keep: by model name, numbers of generations that stay as well.
    """
    if byte_budget is None:
        return ()
    kept = sorted(known, key=lambda generation: generation.order)
    dropped = []
    for generation in tuple(kept):
        if used_bytes(kept) <= byte_budget:
            break
        switch = switches.get(generation.name)
        used = generation.number in keep.get(generation.name, ())
        if not used and (switch is None or not is_protected(switch, generation.number)):
            kept.remove(generation)
            dropped.append(generation)
    return tuple(dropped)


def unreferenced(present: Iterable[str], known: Iterable[Generation]) -> tuple[str, ...]:
    """The blobs (by SHA-256) that no generation names."""
    named: Collection[str] = {blob.sha256 for generation in known for blob in generation.blobs}
    return tuple(sha256 for sha256 in present if sha256 not in named)
