"""What the device profile says to the daemon, as plain values.

Law of this file: the only place of the daemon that knows device profiles. They are read once, in a
forked child that ends when it has told: reading YAML takes 6 MB which an idle daemon need not keep.
Everything else asks `Board`, which is a value, and pure.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec

from device_profiles.ladder import Ladder, cores
from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    from device_profiles.detection import Detected
    from device_profiles.schema import Profile, ProfileError

NONE = "none"
# Reading all profiles and looking at the machine takes 0.1 s; a /sys that hangs must not keep the
# daemon from serving, which it can do without a profile.
DETECT_S_MAX = 10.0
# Of the machine's or cgroup's memory, for models: the rest is the system's, the daemon's, the
# templates' and the page cache's. A profile may say otherwise.
MEMORY_SHARE = 0.7
USB = "/dev/bus/usb"
# Backends whose options have `threads`; a profile's threads are for those.
TAKES_THREADS = frozenset({"onnxruntime", "openvino", "litert"})


class Line(msgspec.Struct, frozen=True):
    """A backend that may be tried, best first: see docs/selection.md."""

    backend: str
    device_class: str = "cpu"
    options: dict[str, Any] = {}  # beneath the variant's own
    missing: str = ""  # why it cannot run: its accelerator is not there


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """The profile in force. The empty one is no profile."""

    name: str = ""
    title: str = ""
    addons: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()  # why this one
    files: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    order: tuple[Line, ...] = ()
    exclusive: tuple[str, ...] = ()  # device classes whose models must share one worker
    # device class -> nodes of the accelerators of that class that are there
    devices: dict[str, tuple[str, ...]] = {}
    threads: int | None = None
    workers: dict[str, Any] = {}  # `workers` of the configuration, beneath the file
    origins: dict[str, str] = {}  # key path of the configuration -> the profile's file
    memory_share: float | None = None
    memory_bytes: int | None = None
    ladder: Ladder = Ladder()

    @property
    def beneath(self) -> dict[str, Any]:
        """What the configuration says where its file says nothing."""
        return {"workers": self.workers} if self.workers else {}

    def budget_bytes(self, limit_bytes: int) -> int:
        """What all models may take of a machine or cgroup with so much memory."""
        share_bytes = round(limit_bytes * (self.memory_share or MEMORY_SHARE))
        stated_bytes = self.memory_bytes
        return (
            share_bytes if stated_bytes is None else min(share_bytes or stated_bytes, stated_bytes)
        )

    def options(self, backend: str, device_class: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """A variant's options over the profile's."""
        beneath: dict[str, Any] = {}
        if self.threads is not None and device_class == "cpu" and backend in TAKES_THREADS:
            beneath["threads"] = self.threads
        line = next(
            (
                one
                for one in self.order
                if (one.backend, one.device_class) == (backend, device_class)
            ),
            None,
        )
        return {**beneath, **(line.options if line else {}), **own}

    def runnable(self, backend: str, device_class: str) -> str:
        """Why a backend cannot run on a class of device here; "": as far as is known it can."""
        lines = [
            one for one in self.order if (one.backend, one.device_class) == (backend, device_class)
        ]
        return "" if not lines or any(not one.missing for one in lines) else lines[0].missing

    def summary(self) -> dict[str, Any]:
        """As `status` and `config` tell it."""
        return {
            "name": self.name,
            "title": self.title,
            "addons": list(self.addons),
            "reasons": list(self.reasons),
            "files": list(self.files),
            "values": {f"workers.{key}": value for key, value in self.workers.items()},
            "origins": self.origins,
        }


class _Told(msgspec.Struct, frozen=True):
    """What the child tells: a board, or what was wrong with the one that was named."""

    board: Board = Board()
    error: dict[str, str] = {}


class Detection(NamedTuple):
    """A detection under way."""

    pid: int  # 0: there is none
    told: int  # descriptor

    def board(self, timeout_s: float = DETECT_S_MAX) -> Board:
        """Its outcome; without one, the empty board with the problem.

        Raises:
            UsageError: the profile that the configuration names is not there, or is wrong.
        """
        if not self.pid:
            return Board()
        try:
            data = _read_all(self.told, timeout_s)
        finally:
            os.close(self.told)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        try:
            told = msgspec.json.decode(data, type=_Told)
        except msgspec.DecodeError:
            return Board(problems=("the machine could not be looked at; no profile is in force",))
        if told.error:
            raise _usage_error(told.error)
        return told.board


def start(wanted: str) -> Detection:
    """Begin to detect, in a child. No thread may run yet: it is a plain fork.

    Args:
        wanted: `auto`, `none`, a name, or a path.
    """
    if wanted == NONE:
        return Detection(0, -1)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _tell(wanted, tell)
    os.close(tell)
    return Detection(pid, told)


def _tell(wanted: str, tell: int) -> NoReturn:
    """In the child: whatever happens, it ends here and the parent sees the pipe close."""
    try:
        with os.fdopen(tell, "wb") as pipe:
            pipe.write(msgspec.json.encode(_look(wanted)))
    finally:
        os._exit(0)


def _read_all(descriptor: int, timeout_s: float) -> bytes:
    """Until the end, or nothing came for so long."""
    data = b""
    while select.select([descriptor], [], [], timeout_s)[0]:
        more = os.read(descriptor, 65536)
        if not more:
            return data
        data += more
    return b""


# --- from a detection to a board ----------------------------------------------------------------


def _look(wanted: str) -> _Told:
    from device_profiles.detection import detect
    from device_profiles.schema import ProfileError

    try:
        return _Told(describe(detect(wanted), wanted, os.sched_getaffinity(0)))
    except ProfileError as error:
        return _Told(error=_document(error))


def describe(detected: Detected, wanted: str, allowed: set[int]) -> Board:
    """The board of a detection.

    Args:
        wanted: what the configuration asks for.
        allowed: the cores that this process may use; a cpuset with others is not taken.
    """
    problems = [_line(error) for error in detected.problems]
    resolved, profile = detected.resolved, detected.profile
    if resolved is None or profile is None:
        arch = detected.machine.arch or "unknown"
        return Board(problems=(*problems, f"no profile fits this machine ({arch})"))
    workers = {
        key: value
        for key in ("cpuset", "runners")
        if (value := getattr(profile.workers, key)) is not None
    }
    if not cores(workers.get("cpuset", "")) <= allowed:
        problems.append(f"cores {workers.pop('cpuset')} are not all there; models may use any")
    board, addons = detected.verdict.board, detected.verdict.addons
    reasons = [f"the configuration says profile: {wanted}"]
    if board is not None and board.resolved.profile.name == profile.name and wanted == "auto":
        reasons = [reason.text for reason in board.reasons]
    return Board(
        name=profile.name,
        title=profile.title,
        addons=tuple(one.resolved.profile.name for one in addons),
        reasons=(*reasons, *(reason.text for one in addons for reason in one.reasons)),
        files=resolved.files,
        problems=tuple(problems),
        order=tuple(
            Line(one.backend, one.device_class, one.options, _missing(one.accelerator, detected))
            for one in profile.backends
        ),
        exclusive=tuple(
            sorted({one.device_class for one in profile.accelerators.values() if one.exclusive})
        ),
        devices=_devices(profile, detected),
        threads=profile.workers.threads,
        workers=workers,
        origins={f"workers.{key}": resolved.origins[f"workers.{key}"] for key in workers},
        memory_share=profile.memory.share,
        memory_bytes=profile.memory.budget_bytes,
        ladder=profile.thermal,
    )


def _missing(accelerator: str, detected: Detected) -> str:
    if not accelerator or accelerator in detected.available:
        return ""
    assert detected.profile is not None
    return f"{detected.profile.accelerators[accelerator].title}: not there"


def _devices(profile: Profile, detected: Detected) -> dict[str, tuple[str, ...]]:
    """The nodes by device class. A USB device gets a new node when its firmware is loaded, so a
    model that runs on one may use the whole bus.
    """
    nodes: dict[str, tuple[str, ...]] = {}
    for name in sorted(detected.available):
        one = profile.accelerators[name]
        paths = (node.path for node in detected.seen[name].nodes)
        mine = (USB if path.startswith(USB) else path for path in paths)
        nodes[one.device_class] = tuple(dict.fromkeys([*nodes.get(one.device_class, ()), *mine]))
    return nodes


def _document(error: ProfileError) -> dict[str, str]:
    return {
        "message": error.message,
        "where": error.where or "config: profile",
        "expected": error.expected,
        "remedy": error.remedy,
    }


def _line(error: ProfileError) -> str:
    return str(_usage_error(_document(error)))


def _usage_error(document: Mapping[str, str]) -> UsageError:
    return UsageError(
        document["message"],
        where=document["where"],
        expected=document["expected"],
        remedy=document["remedy"],
    )
