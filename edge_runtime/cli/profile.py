"""`profile detect | list | show | check | learn`.

Law of this file: arguments in, text or JSON out; what fits is decided in device_profiles, what
follows for the daemon in daemon.board. It works without a daemon. A ProfileError becomes one of
ours here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.cli import arguments as args
from edge_runtime.cli import output
from edge_runtime.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    import argparse

    from device_profiles.checking import Finding, User
    from device_profiles.detection import Detected
    from device_profiles.loading import Resolved
    from device_profiles.matching import Matched

# Whose permissions `check` looks at, where the account exists: packaging/ makes it.
DAEMON_USER = "edge-runtime"
# Of `check`, as of `doctor` and of monitoring plug-ins.
EXIT_CODES = {"pass": 0, "warn": 1, "fail": 2}
LEARN_S = 20.0


def add_parser(subparsers: Any) -> None:
    """Add the parsers of `profile ...`."""
    parser = subparsers.add_parser("profile", description="What this board is and how to use it.")
    verbs = parser.add_subparsers(
        dest="verb", metavar="detect|list|show|check|learn", required=True
    )
    detect = verbs.add_parser("detect", description="Which profile fits this machine, and why.")
    detect.set_defaults(handler=_detect)
    listed = verbs.add_parser("list", description="All profiles; * marks the one that fits.")
    listed.set_defaults(handler=_list)
    show = verbs.add_parser(
        "show", description="A profile: each value, whose it is, and its source."
    )
    show.add_argument("profile", nargs="?", default="auto", metavar="NAME|FILE")
    show.set_defaults(handler=_show)
    check = verbs.add_parser(
        "check", description="Compare a profile with this machine: 0 right, 1 warnings, 2 failures."
    )
    check.add_argument("profile", nargs="?", default="auto", metavar="NAME|FILE")
    check.add_argument("--user", help=f"whose permissions count (default: {DAEMON_USER}, else you)")
    check.set_defaults(handler=_check)
    _add_learn(verbs)
    for inner in verbs.choices.values():
        args.add_global(inner)
    for inner in (detect, listed, show, check):
        inner.add_argument(
            "--root", metavar="DIR", type=Path, default=Path("/"), help="a recorded machine"
        )
        inner.add_argument("--arch", default="", help="of a recorded machine, such as aarch64")


def _add_learn(verbs: Any) -> None:
    learn = verbs.add_parser(
        "learn",
        description="Run a bundle's variants with different numbers of threads on this machine, "
        "and write a profile from the times.",
    )
    learn.add_argument("bundle", metavar="BUNDLE", type=Path)
    learn.add_argument("--name", default="", help="of the new profile (default: BOARD-learned)")
    learn.add_argument("--output", metavar="FILE", type=Path, help="default: NAME.yaml")
    learn.add_argument("--card", metavar="FILE", type=Path, help="write the figures as a card too")
    learn.add_argument("--force", action="store_true", help="overwrite what is there")
    learn.add_argument(
        "--threads-max", metavar="N", type=args.count, help="default: the number of cores"
    )
    learn.add_argument(
        "--seconds",
        metavar="S",
        type=args.seconds,
        default=LEARN_S,
        help="how long to measure (default: %(default)g)",
    )
    learn.set_defaults(handler=_learn)


# --- detect, list ---------------------------------------------------------------------------------


def _detect(arguments: argparse.Namespace) -> int:
    detected = _detected(arguments)
    if detected.resolved is None:
        raise NotFoundError(
            f"no profile fits this machine ({detected.machine.arch or 'unknown processor'})",
            remedy="`edge-runtime profile list` shows all; extend one in a file of your own",
        )
    if arguments.json:
        output.print_json(_detected_document(detected))
    else:
        print(detected_text(detected))
    return 0


def _detected_document(detected: Detected) -> dict[str, Any]:
    verdict = detected.verdict
    assert verdict.board is not None
    return {
        "profile": _matched(verdict.board),
        "addons": [_matched(one) for one in verdict.addons],
        "others": [_matched(one) for one in verdict.others],
        "accelerators": sorted(detected.available),
        "machine": msgspec.to_builtins(detected.machine),
        "problems": [str(one) for one in detected.problems],
    }


def _matched(one: Matched) -> dict[str, Any]:
    return {
        "name": one.resolved.profile.name,
        "title": one.resolved.profile.title,
        "reasons": [reason._asdict() for reason in one.reasons],
        "files": list(one.resolved.files),
    }


def detected_text(detected: Detected) -> str:
    """What fits and why, for people."""
    verdict, machine = detected.verdict, detected.machine
    assert verdict.board is not None
    lines = []
    for kind, one in [("profile", verdict.board), *(("add-on", one) for one in verdict.addons)]:
        profile = one.resolved.profile
        lines.append(f"{kind + ':':<14}{profile.name} ({profile.title})")
        lines += [f"{'':<14}because {reason.text}" for reason in one.reasons]
    if verdict.others:
        names = ", ".join(one.resolved.profile.name for one in verdict.others)
        lines.append(f"{'also fit:':<14}{names}")
    title = machine.title or machine.cpu_model or machine.arch
    memory = f"{machine.memory_bytes >> 20} MiB" if machine.memory_bytes else "memory not known"
    lines.append(f"{'machine:':<14}{title}; {machine.cpu_count} cores, {memory}")
    there = ", ".join(sorted(detected.available)) or "none"
    lines.append(f"{'accelerators:':<14}{there}")
    lines += [f"{'problem:':<14}{one.where}: {one}" for one in detected.problems]
    return "\n".join(output.printable(line) for line in lines)


def _list(arguments: argparse.Namespace) -> int:
    from device_profiles import loading, matching, probe

    good, bad = loading.load_all()
    verdict = matching.choose(probe.describe(arguments.root, arguments.arch), good)
    fitting = [*([verdict.board] if verdict.board else []), *verdict.addons]
    here = {one.resolved.profile.name for one in fitting}
    rows = [
        {
            "name": one.profile.name,
            "here": one.profile.name in here,
            "kind": one.profile.kind,
            "title": one.profile.title,
            "file": one.files[0],
        }
        for one in good
    ]
    if arguments.json:
        output.print_json({"profiles": rows, "problems": [_said(one) for one in bad]})
        return 0
    cells = [
        ("*" if row["here"] else "", row["name"], row["kind"], row["title"], row["file"])
        for row in rows
    ]
    width = output.terminal_columns(sys.stdout)
    print(output.table(("", "NAME", "KIND", "BOARD", "FILE"), cells, width))
    for one in bad:
        print(output.printable(_said(one)))
    return 0


# --- show, check ----------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    resolved = _holds(_detected(arguments))
    rows = [
        {
            "path": path,
            "value": value,
            "file": resolved.origins[path],
            "source": resolved.source(path),
        }
        for path, value in _values(resolved)
    ]
    profile = resolved.profile
    if arguments.json:
        document = {
            "name": profile.name,
            "title": profile.title,
            "files": list(resolved.files),
            "values": rows,
            "unknown": profile.unknown,
            "profile": msgspec.to_builtins(profile),
        }
        output.print_json(document)
        return 0
    print(f"{profile.name}: {output.printable(profile.title)}")
    print("from " + ", then ".join(resolved.files) + "\n")
    cells = [(row["path"], _brief(row["value"]), row["file"], row["source"]) for row in rows]
    width = output.terminal_columns(sys.stdout)
    print(output.table(("KEY", "VALUE", "FROM", "SOURCE"), cells, width))
    for key, why in profile.unknown.items():
        print(output.printable(f"left out: {key}: {why}"))
    return 0


def _values(resolved: Resolved) -> Iterator[tuple[str, Any]]:
    """Every value with its key path, in the order of the schema."""
    whole = msgspec.to_builtins(resolved.profile)
    for key in whole:
        for path in sorted(one for one in resolved.origins if one.partition(".")[0] == key):
            value: Any = whole
            for part in path.split("."):
                value = value[part]
            yield path, value


def _brief(value: Any) -> str:
    """A value in a cell: structures as JSON without what is empty."""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(_without_empty(value)).decode()


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_empty(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one not in ("", None, {}, [], ())}
    return [_without_empty(one) for one in value] if isinstance(value, list | tuple) else value


def _check(arguments: argparse.Namespace) -> int:
    from device_profiles import checking

    detected = _detected(arguments)
    resolved = _holds(detected)
    user = _user(arguments.user)
    findings = checking.compare(resolved, detected.machine, detected.seen, user)
    findings += checking.versions(resolved.profile, _installed())
    state = checking.worst(findings)
    if arguments.json:
        document = {
            "profile": resolved.profile.name,
            "user": user.name,
            "state": state,
            "findings": [one._asdict() for one in findings],
        }
        output.print_json(document)
    else:
        print(f"profile {resolved.profile.name}, for the user {user.name}")
        print("\n".join(line for one in findings for line in _finding_lines(one)))
    return EXIT_CODES[state]


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield output.printable(f"  {finding.state:<5} {finding.what}: {finding.text}")
    if finding.remedy and finding.state != "pass":
        yield output.printable(f"        {finding.remedy}")


def _user(name: str | None) -> User:
    """The account whose permissions count."""
    import pwd

    from device_profiles.checking import User

    for wanted in [name] if name else [DAEMON_USER]:
        try:
            entry = pwd.getpwnam(wanted)
        except KeyError as error:
            if name:
                raise NotFoundError(f"there is no user {name!r}") from error
        else:
            gids = os.getgrouplist(entry.pw_name, entry.pw_gid)
            return User(entry.pw_name, entry.pw_uid, frozenset(gids))
    try:
        own = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without a name
        own = str(os.geteuid())
    return User(own, os.geteuid(), frozenset([os.getegid(), *os.getgroups()]))


# backend -> the distributions that may bring its library, first found counts.
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn"),
    "openvino": ("openvino",),
    "litert": ("ai-edge-litert", "tflite-runtime"),
}


def _installed() -> dict[str, str]:
    """Versions of the backends' libraries by their packages' word; nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for backend, names in _DISTRIBUTIONS.items():
        for name in names:
            try:
                found.setdefault(backend, version(name))
            except PackageNotFoundError:
                continue
    return found


def _learn(arguments: argparse.Namespace) -> int:
    from edge_runtime.cli import learn

    detected = _detected(arguments)
    with _ours():
        return learn.run(arguments, detected.machine, _holds(detected))


# --- what all share -------------------------------------------------------------------------------


def _detected(arguments: argparse.Namespace) -> Detected:
    from device_profiles import detection

    wanted = getattr(arguments, "profile", detection.AUTO)
    root, arch = getattr(arguments, "root", Path("/")), getattr(arguments, "arch", "")
    with _ours():
        return detection.detect(wanted, root, arch=arch)


def _holds(detected: Detected) -> Resolved:
    if detected.resolved is None:
        raise NotFoundError(
            "no profile fits this machine", remedy="name one; `edge-runtime profile list` shows all"
        )
    return detected.resolved


@contextmanager
def _ours() -> Iterator[None]:
    """A ProfileError as one of our errors."""
    from device_profiles.schema import ProfileError

    try:
        yield
    except ProfileError as error:
        raise UsageError(
            error.message, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error


def _said(error: Any) -> str:
    """A ProfileError in a line."""
    return str(UsageError(error.message, where=error.where, remedy=error.remedy))
