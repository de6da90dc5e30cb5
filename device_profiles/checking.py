"""A profile against the machine it is used on: what is there, what is missing, what to do.

Law of this file: `look` reads what must be seen of an accelerator; everything else is pure, values
in and findings out. Which backends are installed, and whether they work, is the question of
`edge-runtime doctor`; this says whether the board is what the profile says it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from device_profiles import probe
from device_profiles.ladder import cores
from device_profiles.loading import Resolved
from device_profiles.matching import reasons_for
from device_profiles.schema import Accelerator, Machine, Profile
from device_profiles.versions import satisfies

State = Literal["pass", "warn", "fail"]
# Readable and writable by owner, group, others.
_OWNER, _GROUP, _OTHERS = 0o600, 0o060, 0o006


class Finding(NamedTuple):
    """One thing that was compared."""

    state: State
    what: str  # key path in the profile
    text: str
    remedy: str = ""


class User(NamedTuple):
    """Who will open the nodes: the daemon's user, not root."""

    name: str
    uid: int
    gids: frozenset[int]


class Seen(NamedTuple):
    """What was found of one accelerator."""

    nodes: tuple[probe.Node, ...]  # of its device; empty: it is not there
    present: bool  # what else must exist does
    modules: tuple[str, ...]  # those of its modules that are loaded
    driver_version: str


def look(accelerator: Accelerator, machine: Machine, root: Path = probe.ROOT) -> Seen:
    """The driver: read what `compare` judges."""
    paths = [path for pattern in accelerator.nodes for path in probe.found(pattern, root)]
    paths += [path for one in accelerator.usb for path in machine.usb.get(one, ())]
    nodes = tuple(node for path in paths if (node := probe.node(path, root)) is not None)
    present = not accelerator.present or any(
        probe.found(pattern, root) for pattern in accelerator.present
    )
    loaded = tuple(one for one in accelerator.driver.modules if one in machine.modules)
    file = accelerator.driver.version_file
    return Seen(nodes, present, loaded, probe.version_in(file, root) if file else "")


def available(profile: Profile, seen: Mapping[str, Seen]) -> frozenset[str]:
    """The accelerators that are there."""
    return frozenset(
        name for name, one in seen.items() if name in profile.accelerators and _there(one)
    )


def compare(
    resolved: Resolved, machine: Machine, seen: Mapping[str, Seen], user: User | None = None
) -> list[Finding]:
    """Everything worth saying, in the profile's order.

    Args:
        user: whose permissions count; None: they are not looked at.
    """
    profile = resolved.profile
    findings = [_match(profile, machine)]
    findings += _cores(profile, machine)
    findings += _memory(profile, machine)
    for name, accelerator in profile.accelerators.items():
        findings += _accelerator(f"accelerators.{name}", accelerator, seen[name], user)
    findings += _zones(profile, machine)
    return findings


def versions(profile: Profile, installed: Mapping[str, str]) -> list[Finding]:
    """The version locks of backends. `installed`: backend -> its version; others are not judged."""
    return [
        Finding("pass", f"backends[{index}].versions", f"{choice.backend} {version} is tried here")
        if satisfies(version, choice.versions)
        else Finding(
            "fail",
            f"backends[{index}].versions",
            f"{choice.backend} {version} is not within {choice.versions}",
            f"install a version of {choice.backend} that is within {choice.versions}",
        )
        for index, choice in enumerate(profile.backends)
        if choice.versions and (version := installed.get(choice.backend, ""))
    ]


def worst(findings: Iterable[Finding]) -> State:
    """The state of all of them together."""
    states = {finding.state for finding in findings}
    return next((state for state in ("fail", "warn") if state in states), "pass")


# --- one subject each ---------------------------------------------------------------------------


def _there(seen: Seen) -> bool:
    return bool(seen.nodes) and seen.present


def _match(profile: Profile, machine: Machine) -> Finding:
    reasons = reasons_for(machine, profile.match)
    if reasons:
        return Finding("pass", "match", "; ".join(reason.text for reason in reasons))
    title = machine.title or machine.cpu_model or machine.arch or "it does not say what it is"
    return Finding(
        "warn",
        "match",
        f"this machine ({title}) is not what the profile is for",
        "edge-runtime profile detect names the profiles that fit",
    )


def _cores(profile: Profile, machine: Machine) -> Iterator[Finding]:
    if not machine.cpu_count:
        return
    promised = {core for one in profile.clusters for core in cores(one.cpus)}
    if promised and len(promised) != machine.cpu_count:
        yield Finding(
            "warn",
            "clusters",
            f"the profile has {len(promised)} cores, the machine {machine.cpu_count}",
            "cores may be offline, or kept from this machine by its host",
        )
    elif promised:
        yield Finding("pass", "clusters", f"{machine.cpu_count} cores")
    wanted = sorted(cores(profile.workers.cpuset or ""))
    missing = [core for core in wanted if core >= machine.cpu_count]
    if missing:
        yield Finding(
            "fail",
            "workers.cpuset",
            f"core {missing[0]} is not there: the machine has 0 to {machine.cpu_count - 1}",
            "write a cpuset that fits in a profile of your own that extends this one",
        )


def _memory(profile: Profile, machine: Machine) -> Iterator[Finding]:
    budget_bytes = profile.memory.budget_bytes
    if not budget_bytes or not machine.memory_bytes:
        return
    have, want = machine.memory_bytes >> 20, budget_bytes >> 20
    if budget_bytes > machine.memory_bytes:
        yield Finding(
            "fail",
            "memory.budget_bytes",
            f"{want} MiB for models, but the machine has {have} MiB",
            "lower it, or give a share instead",
        )
    else:
        yield Finding("pass", "memory.budget_bytes", f"{want} of {have} MiB are for models")


def _accelerator(
    path: str, accelerator: Accelerator, seen: Seen, user: User | None
) -> Iterator[Finding]:
    driver = accelerator.driver
    if not _there(seen):
        yield Finding("warn", path, f"{accelerator.title}: not there", _missing(accelerator, seen))
        return
    node = seen.nodes[0]
    if user is not None and not any(_may(one, user) for one in seen.nodes):
        group = accelerator.group
        yield Finding(
            "fail",
            f"{path}.nodes",
            f"{accelerator.title}: {user.name} may not open {node.path} (mode {node.mode:04o})",
            f"usermod -aG {group} {user.name}, then restart the daemon"
            if group
            else f"a udev rule that gives {node.path} to a group of {user.name}",
        )
    elif driver.versions and not satisfies(seen.driver_version, driver.versions):
        yield Finding(
            "fail",
            f"{path}.driver.versions",
            f"{accelerator.title}: driver {seen.driver_version or 'of unknown version'} is not "
            f"within {driver.versions}",
            "install a driver that is, or write your own lock when you have tried this one",
        )
    else:
        version = f", driver {seen.driver_version}" if seen.driver_version else ""
        yield Finding("pass", path, f"{accelerator.title}: {node.path}{version}")


def _missing(accelerator: Accelerator, seen: Seen) -> str:
    modules = accelerator.driver.modules
    if modules and not seen.modules:
        return f"if it is plugged in: load its driver, modprobe {' or '.join(modules)}"
    wanted = accelerator.nodes or tuple(f"a USB device {one}" for one in accelerator.usb)
    return f"expected {' or '.join(wanted)}"


def _zones(profile: Profile, machine: Machine) -> Iterator[Finding]:
    zones = profile.thermal.zones
    if not zones:
        return
    known = [one for one in machine.zones if any(fnmatchcase(one, zone.type) for zone in zones)]
    if known:
        yield Finding("pass", "thermal.zones", f"heat is seen by {', '.join(known)}")
    else:
        yield Finding(
            "warn",
            "thermal.zones",
            "none of the profile's sensors is there, so heat is not noticed",
            "sensors of this machine: " + (", ".join(machine.zones) or "none"),
        )


def _may(node: probe.Node, user: User) -> bool:
    """Read and write, by the permission bits alone."""
    if user.uid == 0:
        return True
    if node.uid == user.uid:
        return node.mode & _OWNER == _OWNER
    if node.gid in user.gids:
        return node.mode & _GROUP == _GROUP
    return node.mode & _OTHERS == _OTHERS
