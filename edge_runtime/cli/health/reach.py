"""Whether a daemon can be reached, and as whom.

Law of this file: it asks the sockets the way a client does, bounded in time, and returns what
happened; what that means is said in `verdicts.py`. No numpy.
"""

from __future__ import annotations

import grp
import pwd
import stat
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edge_runtime.cli import readiness
from edge_runtime.cli.health.facts import World
from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError, PermissionDeniedError

TIMEOUT_S = 2.0  # a daemon that is well answers in less than a millisecond

State = Literal["absent", "refused", "forbidden", "silent", "answers"]


class Owner(NamedTuple):
    """Whose a file is; empty where it could not be seen."""

    user: str = ""
    group: str = ""
    mode: str = ""  # octal


class Socket(NamedTuple):
    """What became of a question to a socket.

    Attributes:
        state: absent: no such file; refused: nobody listens; forbidden: not as this user; silent:
            no answer, or a wrong one.
        owner: of the file, or of the directory that hides it.
    """

    path: str
    state: State
    detail: str = ""
    answer_s: float = 0.0
    owner: Owner = Owner()


class Daemon(NamedTuple):
    """What the daemon says of itself over its control socket."""

    pid: int
    profile: str  # as its configuration says: auto, none, a name or a path
    models: tuple[tuple[str, str, str], ...]  # name, state, reason


def infer_socket(world: World) -> Socket:
    """Ask SERVER_LIVE, as any client may."""
    return _ask(
        world.at(world.run_dir / "infer.sock"), lambda path: readiness.ask_live(path, TIMEOUT_S)
    )


def control_socket(world: World) -> tuple[Socket, Daemon | None]:
    """Ask who serves what, as the daemon's user and root may."""
    said: list[Daemon] = []

    def ask(path: Path) -> None:
        with ControlClient(path, timeout_s=TIMEOUT_S) as client:
            ps, models = client.call("ps"), client.call("models")
            config = client.call("config")
        said.append(_daemon(ps, models, config))

    socket = _ask(world.at(world.run_dir / "control.sock"), ask)
    return socket, said[0] if said else None


def _daemon(ps: dict[str, Any], models: dict[str, Any], config: dict[str, Any]) -> Daemon:
    daemon = ps.get("daemon") or {}
    return Daemon(
        int(daemon.get("pid") or 0),
        str((config.get("config") or {}).get("profile") or ""),
        tuple(
            (str(one.get("name")), str(one.get("state")), str(one.get("reason") or ""))
            for one in models.get("models") or []
        ),
    )


def _ask(path: Path, question: Any) -> Socket:
    try:
        owner = owner_of(path)
    except FileNotFoundError:
        return Socket(str(path), "absent")
    except OSError as error:  # the directory may not be searched
        return Socket(str(path), "forbidden", error.strerror or "", 0.0, _hidden_by(path))
    began_s = time.monotonic()
    try:
        question(path)
    except PermissionDeniedError as error:
        return Socket(str(path), "forbidden", str(error), 0.0, owner)
    except EdgeError as error:
        refused = isinstance(error.__cause__, ConnectionRefusedError)
        return Socket(str(path), "refused" if refused else "silent", str(error), 0.0, owner)
    return Socket(str(path), "answers", "", time.monotonic() - began_s, owner)


def _hidden_by(path: Path) -> Owner:
    """The nearest directory above that can be seen."""
    for directory in path.parents:
        try:
            return owner_of(directory)
        except OSError:
            continue
    return Owner()


def owner_of(path: Path) -> Owner:
    """Whose a file is, by name where there are names. Raises: OSError."""
    found = path.stat()
    return Owner(_user(found.st_uid), group(found.st_gid), f"{stat.S_IMODE(found.st_mode):04o}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a dynamic user has no name
        return str(uid)


def group(gid: int) -> str:
    """A group's name, or its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
