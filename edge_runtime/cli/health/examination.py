"""Which look belongs to which judgement, and looking at everything side by side.

Law of this file: LOOKS is the list of what is examined, in the order of the report. Looks run in
threads of their own, so that a disk or a driver that does not answer costs its own lines only: what
is not there in time is not known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_runtime.backends import diagnosis, probing
from edge_runtime.backends.diagnosis import Diagnosis
from edge_runtime.backends.probe import names
from edge_runtime.cli.health import Check, Finding, Unknown, facts, hardware, reach, verdicts
from edge_runtime.cli.health.facts import World
from edge_runtime.cli.health.hardware import Attempt, Hardware

GROUPS = (
    "backends",
    "accelerators",
    "profile",
    "daemon",
    "clock",
    "disk",
    "memory",
    "limits",
    "kernel",
    "software",
)
LOOK_TIMEOUT_S = 5.0  # for what is no probe: the slowest part is a bad disk
PROBES_AT_ONCE = 2  # each takes a core and, with OpenVINO, 100 MB

Judge = Callable[[Any], Finding]


class Look(NamedTuple):
    """One thing to look at, and the lines that come of it."""

    group: str
    look: Callable[[World], Any]
    lines: tuple[tuple[str, Judge], ...]


LOOKS: tuple[Look, ...] = (
    Look("daemon", reach.infer_socket, (("infer socket", verdicts.infer_socket),)),
    Look("clock", facts.clock, (("date", verdicts.year), ("synchronised", verdicts.synchronised))),
    Look("disk", facts.space, (("space", verdicts.room), ("file system", verdicts.file_system))),
    Look("disk", facts.sync, (("sync", verdicts.sync_time),)),
    Look(
        "memory",
        facts.memory_of,
        (
            ("available", verdicts.available),
            ("group limit", verdicts.cgroup),
            ("out of memory", verdicts.oom_kills),
        ),
    ),
    Look("memory", facts.swaps, (("swap", verdicts.swap),)),
    Look(
        "limits",
        facts.limits,
        (("open files", verdicts.open_files), ("pinned memory", verdicts.locked_memory)),
    ),
    Look(
        "kernel",
        facts.kernel,
        (
            ("landlock", verdicts.landlock),
            ("seccomp", verdicts.seccomp),
            ("shared memory", verdicts.sealed_memory),
            ("pressure", verdicts.pressure),
        ),
    ),
    Look(
        "software", facts.software, (("python", verdicts.python), ("packages", verdicts.packages))
    ),
)

# Looked at before all others: whoever serves has the limits and the permissions that count.
CONTROL = (
    Look(
        "daemon",
        reach.control_socket,
        (("control socket", verdicts.control_socket), ("models", verdicts.models)),
    ),
)


def examine(world: World, probe_timeout_s: float = probing.TIMEOUT_S) -> list[Check]:
    """Every check, in the order of the report.

    Args:
        probe_timeout_s: for each probe of a backend.
    """
    at_once = min(PROBES_AT_ONCE, os.cpu_count() or 1)
    rooms = threading.Semaphore(at_once)
    tried = [Attempt(name, name) for name in names()] if world.live else []
    probes = [(one, Task(_probe(one, probe_timeout_s, rooms))) for one in tried]
    control = Task(lambda: reach.control_socket(world)).wait(LOOK_TIMEOUT_S)
    world = _beside(world, control)
    looks = [(row, Task(_looking(row, world))) for row in LOOKS]
    board = Task(lambda: hardware.look(world)).wait(LOOK_TIMEOUT_S)
    if world.live and isinstance(board, Hardware):
        more = hardware.attempts(board)
        probes += [(one, Task(_probe(one, probe_timeout_s, rooms))) for one in more]
    checks = [line for row, task in looks for line in _lines(row, task.wait(LOOK_TIMEOUT_S))]
    checks += [line for row in CONTROL for line in _lines(row, control)]
    checks += _board(board)
    # So many at a time: the last one has waited for all before it.
    until_s = time.monotonic() + 1 + probe_timeout_s * (len(probes) + 1) / at_once
    outcomes = [(one, task.wait(max(0.1, until_s - time.monotonic()))) for one, task in probes]
    checks += _backends(outcomes, board, world)
    return sorted(checks, key=lambda check: GROUPS.index(check.group))


class Task:
    """A call in a thread that the program's end does not wait for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = Unknown("it did not answer in time")
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._result = call()
        except Exception as error:  # noqa: BLE001 - a look that fails is a line of the report
            self._result = Unknown(f"looking failed ({type(error).__name__}: {error})")

    def wait(self, timeout_s: float) -> Any:
        """What the call returned, or an Unknown."""
        self._thread.join(timeout_s)
        return self._result


def _looking(row: Look, world: World) -> Callable[[], Any]:
    return lambda: row.look(world)


def _lines(row: Look, fact: Any) -> list[Check]:
    return [Check(row.group, name, *verdicts.known(judge)(fact)) for name, judge in row.lines]


def _probe(
    one: Attempt, timeout_s: float, rooms: threading.Semaphore
) -> Callable[[], diagnosis.Outcome]:
    def run() -> diagnosis.Outcome:
        with rooms:
            return probing.probe(one.probe, one.options, timeout_s=timeout_s)

    return run


def _beside(world: World, control: Any) -> World:
    """The world with what its daemon said of itself."""
    daemon = None if isinstance(control, Unknown) else control[1]
    return world._replace(daemon_pid=daemon.pid, profile=daemon.profile) if daemon else world


def _board(board: Any) -> list[Check]:
    if isinstance(board, Hardware):
        return hardware.checks(board)
    return [Check("profile", "in force", "unknown", f"not known: {board.why}")]


def _backends(outcomes: list[tuple[Attempt, Any]], board: Any, world: World) -> list[Check]:
    if not world.live:
        return [Check("backends", "any", "unknown", f"not known: {facts.RECORDED.why}")]
    found: list[tuple[str, Diagnosis]] = []
    checks = []
    for one, outcome in outcomes:
        if isinstance(outcome, Unknown):
            finding = Finding("unknown", f"not known: {outcome.why}")
        else:
            verdict = _diagnosed(one, outcome, board)
            found.append((one.probe, verdict))
            finding = verdicts.backend(verdict)
        group = "accelerators" if one.accelerator else "backends"
        checks.append(Check(group, one.name, *finding))
    return [Check("backends", "any", *verdicts.any_backend(found)), *checks]


def _diagnosed(one: Attempt, outcome: diagnosis.Outcome, board: Any) -> Diagnosis:
    if not isinstance(board, Hardware):
        return diagnosis.diagnose(outcome, diagnosis.Processor())
    version = outcome.answer.version if outcome.answer else ""
    backend = diagnosis.probe_of(one.probe).backend
    lock = hardware.broken_lock(board.detected, backend, version, one.accelerator)
    wanted = diagnosis.Wanted(one.device_class, one.options, lock)
    return diagnosis.diagnose(outcome, hardware.processor(board.detected.machine), wanted)
