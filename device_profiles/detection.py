"""From a root directory to the profile that holds there: look, choose, combine.

Law of this file: the order of these steps, for whoever needs the whole; each of them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from device_profiles import checking, loading, matching, probe
from device_profiles.checking import Seen
from device_profiles.loading import Resolved
from device_profiles.matching import Verdict
from device_profiles.schema import Machine, Profile, ProfileError

AUTO = "auto"  # the profile that fits best


class Detected(NamedTuple):
    """The machine, which profiles fit it, and the one that holds with its add-ons."""

    machine: Machine
    verdict: Verdict
    resolved: Resolved | None  # None: none fits
    seen: dict[str, Seen]  # of each accelerator of the profile
    problems: tuple[ProfileError, ...]  # files that could not be read

    @property
    def profile(self) -> Profile | None:
        return self.resolved.profile if self.resolved else None

    @property
    def available(self) -> frozenset[str]:
        """The accelerators that are there."""
        return checking.available(self.profile, self.seen) if self.profile else frozenset()


def detect(
    wanted: str = AUTO,
    root: Path = probe.ROOT,
    directories: Sequence[Path] = loading.DIRECTORIES,
    arch: str = "",
) -> Detected:
    """The profile `wanted`, by name or path, or the one that fits; with every add-on that is there.

    Raises:
        ProfileError: the one that was named is not there, or is wrong.
    """
    machine = probe.describe(root, arch)
    profiles, problems = loading.load_all(directories)
    verdict = matching.choose(machine, profiles)
    if wanted == AUTO:
        board = verdict.board.resolved if verdict.board else None
    else:
        board = loading.load(wanted, directories)
    if board is None:
        return Detected(machine, verdict, None, {}, tuple(problems))
    resolved = loading.compose(board, [one.resolved for one in verdict.addons])
    seen = {
        name: checking.look(one, machine, root)
        for name, one in resolved.profile.accelerators.items()
    }
    return Detected(machine, verdict, resolved, seen, tuple(problems))
