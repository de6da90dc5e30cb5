"""The machine's profile, its accelerators, and whether the daemon may and can use them.

Law of this file: which board this is and what is missing of it is found out and judged by
`device_profiles`; here its findings become lines of the report, and its choices of backends become
probes to run. Reads only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from device_profiles import checking, detection, loading, matching
from device_profiles.checking import Seen, User
from device_profiles.detection import Detected
from device_profiles.loading import Resolved
from device_profiles.schema import Machine, ProfileError
from device_profiles.versions import satisfies
from edge_runtime.backends.diagnosis import Processor
from edge_runtime.cli.health import Check
from edge_runtime.cli.health.facts import World

NO_PROFILE = "none"  # of the configuration: then the one that would fit is examined
DROP_IN = "docs/install.md has the drop-in (PrivateDevices=no, DeviceAllow=...)"


class Attempt(NamedTuple):
    """A probe to run: of a library by itself, or of a backend on an accelerator."""

    name: str  # of the line: "openvino on npu"
    probe: str  # of backends.probe.PROBES
    options: Mapping[str, Any] = {}
    device_class: str = "cpu"
    accelerator: str = ""  # of the profile


class Hardware(NamedTuple):
    """What was detected, and what of it is in the daemon's reach."""

    detected: Detected
    strangers: tuple[tuple[str, str, str], ...]  # title, node, profile that knows it
    user: User | None  # whose permissions count
    hidden: tuple[str, ...]  # nodes that the daemon does not see


def look(world: World) -> Hardware:
    """Detect the board (or take the daemon's profile) and look at its accelerators."""
    directories = (world.at(loading.OWN), loading.BUILT_IN)
    wanted = detection.AUTO if world.profile in ("", NO_PROFILE) else world.profile
    try:
        detected = detection.detect(wanted, world.root, directories)
    except ProfileError as error:  # the daemon's is gone, or was changed since it started
        detected = detection.detect(detection.AUTO, world.root, directories)
        detected = detected._replace(problems=(error, *detected.problems))
    return Hardware(
        detected,
        tuple(_strangers(loading.load_all(directories)[0], detected, world)),
        _user(world),
        tuple(_hidden(world, detected.seen)),
    )


def processor(machine: Machine) -> Processor:
    """The machine's processor, as diagnoses want it."""
    parts = " and ".join(f"a core of part {one.part}" for one in machine.clusters)
    return Processor(machine.arch, machine.cpu_model or parts, frozenset(machine.cpu_flags))


def attempts(hardware: Hardware) -> list[Attempt]:
    """Each backend on each accelerator that is there, as the profile would use it. A choice without
    options asks for no device: what runs on an Edge TPU is said by the model, which a tiny one is
    not made for.
    """
    profile = hardware.detected.profile
    return [
        Attempt(
            f"{choice.backend} on {choice.accelerator}",
            choice.backend,
            choice.options,
            choice.device_class,
            choice.accelerator,
        )
        for choice in (profile.backends if profile else ())
        if choice.accelerator in hardware.detected.available and choice.options
    ]


def broken_lock(detected: Detected, backend: str, version: str, accelerator: str = "") -> str:
    """The profile's version lock that a backend does not keep; "": it keeps it, or has none.

    Args:
        accelerator: where it is to run; "": on the CPU.
    """
    choices = detected.profile.backends if detected.profile and version else ()
    mine = [
        one.versions for one in choices if one.backend == backend and one.accelerator == accelerator
    ]
    broken = [lock for lock in mine if not satisfies(version, lock)]
    # Of several choices, one that allows it is enough.
    return broken[0] if broken and len(broken) == len(mine) else ""


def checks(hardware: Hardware) -> list[Check]:
    """The lines of the groups `profile` and `accelerators`."""
    detected = hardware.detected
    lines = [_profile(detected)]
    lines += [
        Check("profile", "files", "warn", str(error), error.remedy or f"correct {error.where}")
        for error in detected.problems
    ]
    if detected.resolved is not None:
        for found in checking.compare(
            detected.resolved, detected.machine, detected.seen, hardware.user
        ):
            if found.what != "match" or found.state != "pass":  # else it is in the line above
                lines.append(_line(found))
    lines += [
        Check(
            "accelerators",
            node,
            "fail",
            "the daemon does not see it: its unit hides devices",
            DROP_IN,
        )
        for node in hardware.hidden
    ]
    lines += [
        Check(
            "accelerators",
            node,
            "skip",
            f"{title} is there, but this machine's profile does not use it",
            f"`edge-runtime profile show {profile}` shows a profile that does",
        )
        for title, node, profile in hardware.strangers
    ]
    if not detected.seen and not hardware.strangers:
        lines.append(Check("accelerators", "any", "skip", "none is there: models run on the CPU"))
    return lines


def _profile(detected: Detected) -> Check:
    if detected.resolved is None:
        return Check(
            "profile",
            "in force",
            "warn",
            matching.FALLBACK,
            "the daemon's defaults are used; `edge-runtime profile learn` measures better ones",
        )
    board, addons = detected.verdict.board, detected.verdict.addons
    chosen = detected.resolved.profile.name
    name = " with ".join([chosen, *(one.resolved.profile.name for one in addons)])
    if board is None or board.resolved.profile.name != chosen:
        return Check("profile", "in force", "pass", f"{name}, as the configuration says")
    why = "; ".join(reason.text for reason in board.reasons)
    return Check("profile", "in force", "pass", f"{name}: {why}")


def _line(found: checking.Finding) -> Check:
    group, _, rest = found.what.partition(".")
    if group == "accelerators":
        return Check("accelerators", rest.partition(".")[0], found.state, found.text, found.remedy)
    return Check("profile", found.what, found.state, found.text, found.remedy)


def _strangers(
    profiles: list[Resolved], detected: Detected, world: World
) -> list[tuple[str, str, str]]:
    """Accelerators that only other profiles know, one line for each node."""
    known = {node.path for one in detected.seen.values() for node in one.nodes}
    found: dict[str, tuple[str, str, str]] = {}
    for resolved in profiles:
        for accelerator in resolved.profile.accelerators.values():
            one = checking.look(accelerator, detected.machine, world.root)
            if one.nodes and one.present and one.nodes[0].path not in known:
                path = one.nodes[0].path
                found.setdefault(path, (accelerator.title, path, resolved.profile.name))
    return list(found.values())


def _user(world: World) -> User | None:
    """The daemon's user, else the one who asks. None: not known, or root, who may do everything
    and as whom no daemon should run.
    """
    if world.daemon_pid:
        return user_of(world, world.daemon_pid)
    if os.geteuid() == 0:
        return None
    return User("this user", os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def user_of(world: World, pid: int) -> User | None:
    """Whose permissions a process has, from /proc."""
    try:
        text = world.at(f"proc/{pid}/status").read_text()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}
    uid, gid = int(fields["Uid"][1]), int(fields["Gid"][1])
    return User(
        f"the daemon's user ({uid})", uid, frozenset({gid, *map(int, fields.get("Groups", ()))})
    )


def _hidden(world: World, seen: Mapping[str, Seen]) -> list[str]:
    """Nodes that are there, but not in the daemon's own view of the file system."""
    if not world.daemon_pid:
        return []
    view = world.at(f"proc/{world.daemon_pid}/root")
    if not os.access(view, os.X_OK):
        return []  # only root and the daemon's user may look through its eyes
    paths = [node.path for one in seen.values() for node in one.nodes]
    return [path for path in paths if not (view / path.lstrip("/")).exists()]
