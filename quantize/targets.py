"""What a target profile means for a run: its backends, and whether this machine is of its kind.

Law of this file: profiles are read, nothing is measured, no library of a backend is imported.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence

from device_profiles import loading
from device_profiles.schema import Profile, ProfileError
from edge_runtime.errors import UsageError

# The module that a backend needs here, on the builder's machine, to be measured at all.
MODULES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "litert": ("ai_edge_litert", "tflite_runtime"),
}


def profile(target: str, where: str = "--target") -> Profile:
    """A profile by name or path. Raises: UsageError, with the nearest name."""
    try:
        return loading.load(target).profile
    except ProfileError as e:
        raise UsageError(
            e.message, where=e.where or where, expected=e.expected, remedy=e.remedy
        ) from e


def backends(target: str) -> list[str]:
    """The CPU backends of a profile, in its order. Raises: UsageError: no such profile."""
    cpu = [one.backend for one in profile(target).backends if one.device_class == "cpu"]
    return list(dict.fromkeys(cpu))


def is_here(backend: str) -> bool:
    """Whether the backend's library is installed on this machine."""
    return any(map(can_import, MODULES.get(backend, ())))


def can_import(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None


def other_kinds(target: str, where: str = "--target", machine: str = "") -> tuple[str, ...]:
    """Kinds of processor that a profile is for, as uname names them, where this machine is of none
    of them; empty: it is. `machine`: as uname names it; empty: this one. See profile."""
    kinds = profile(target, where).match.arch
    return () if (machine or platform.machine()) in kinds else kinds


def notes(targets: Sequence[str], machine: str = "") -> list[str]:
    """What a reader must know where the times are not of the target's kind of processor.

    Args:
        targets: profiles. machine: as uname names it; empty: this one.

    Raises:
        UsageError: no such profile; names the recipe's key path.
    """
    machine = machine or platform.machine()
    said = []
    for index, target in enumerate(targets):
        kinds = other_kinds(target, f"targets[{index}]", machine)
        if kinds:
            said.append(
                f"times are of this {machine}; {target} is {' or '.join(kinds)}: another variant"
                " can be the fastest there, and what was refused here as slow may be fast. The"
                " device measures what is in the bundle when it installs it; for a verdict of its"
                " own, run the same recipe on the board"
            )
    return said
