"""What happens in the booted machine: one boot, every step once, all that was seen in one report.

Runs as root inside. Asserts nothing; test_booted.py does, on /results/report.json. A step that
raises is recorded with its traceback and the next one runs.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RUN = Path("/run/edge-runtime")
COMMAND = "/opt/edge-runtime/bin/edge-runtime"
SERVICE = "edge-runtime.service"
DROP_IN = Path("/run/systemd/system/edge-runtime.service.d/test.conf")
CONFIG = Path("/etc/edge-runtime/config.yaml")
MODEL = "tiny"
STRANGER, APPLICATION = 4141, 4242  # user ids; the application is in the group edge-runtime
WAIT_MAX_S = 20.0
UNTIL_S = 0.02  # between looks

# The unit's own times are for devices; here they only cost test time. Nothing else is overridden.
QUICK = "[Service]\nWatchdogSec=2\nRestartSec=100ms\n"


def run(*command: str, check: bool = False) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=check,
    )
    return done.stdout


def show(unit: str, *names: str) -> dict[str, str]:
    lines = run("systemctl", "show", unit, *(f"--property={name}" for name in names)).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def main_pid() -> int:
    return int(show(SERVICE, "MainPID")["MainPID"])


def restarts() -> int:
    return int(show(SERVICE, "NRestarts")["NRestarts"])


def until(what: Callable[[], object], wait_max_s: float = WAIT_MAX_S) -> float:
    """Seconds until it was true."""
    start_s = time.monotonic()
    while not what():
        if time.monotonic() - start_s > wait_max_s:
            raise TimeoutError(f"not within {wait_max_s} s")
        time.sleep(UNTIL_S)
    return time.monotonic() - start_s


def group_id() -> int:
    return (RUN / "infer.sock").stat().st_gid


def as_user(uid: int, groups: Sequence[int], what: Callable[[], Any]) -> Any:
    """What a process of that user gets: the value, or the error as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            answer = what()
        except BaseException as error:  # noqa: BLE001 - the other side wants to know what it was
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = json.load(stream)
    os.waitpid(child, 0)
    return answer


def live(path: Path = RUN / "infer.sock") -> bool:
    from edge_runtime.client import Client

    with Client(path, timeout_s=WAIT_MAX_S) as client:
        return bool(client.live())


def infer(path: Path = RUN / "infer.sock") -> list[float]:
    """The model doubles its input; waits until it is loaded."""
    import numpy as np

    from edge_runtime.client import Client

    with Client(path, timeout_s=WAIT_MAX_S) as client:
        (output,) = client.infer(MODEL, {"x": np.arange(4, dtype=np.float32)[None]}).values()
    return [float(value) for value in output[0]]


def application(what: Callable[[], Any]) -> Any:
    return as_user(APPLICATION, [group_id()], what)


def members() -> list[int]:
    """The process ids of the service, the supervisor's and all below it."""
    for hierarchy in ("systemd", "unified", "."):
        path = Path("/sys/fs/cgroup", hierarchy, f"system.slice/{SERVICE}/cgroup.procs")
        if path.exists():
            return [int(line) for line in path.read_text().split()]
    return []


def sockets() -> dict[str, list[Any]]:
    return {
        path.name: [stat.filemode(status.st_mode), status.st_uid, status.st_ino]
        for path in sorted(RUN.iterdir())
        for status in [path.stat()]
    }


# --- the steps, in order --------------------------------------------------------------------------


def boot() -> dict[str, Any]:
    return {
        "service": show(SERVICE, "ActiveState")["ActiveState"],
        "sockets": sockets(),
        "verify": run("systemd-analyze", "verify", "--man=no", SERVICE),
    }


def activation() -> dict[str, Any]:
    return {
        "answer": application(live),
        **show(SERVICE, "ActiveState", "SubState", "Type", "NRestarts", "StatusText"),
        "sockets": sockets(),
        "uid": Path(f"/proc/{main_pid()}").stat().st_uid,
    }


def install() -> dict[str, Any]:
    reply = run(COMMAND, "--json", "install", "/bundle", "--activate")
    return {
        "reply": reply,
        "answer": application(infer),
        "own socket": application(lambda: infer(RUN / "models" / f"{MODEL}.sock")),
        "ps": run(COMMAND, "--json", "ps"),
    }


def access() -> dict[str, Any]:
    own = RUN / "models" / f"{MODEL}.sock"
    return {
        "stranger": as_user(STRANGER, [], live),
        "stranger, own socket": as_user(STRANGER, [], lambda: infer(own)),
        "application, control": application(lambda: live(RUN / "control.sock")),
    }


def restart() -> dict[str, Any]:
    DROP_IN.parent.mkdir(parents=True)
    DROP_IN.write_text(QUICK)
    run("systemctl", "daemon-reload", check=True)
    before = sockets()
    run("systemctl", "restart", SERVICE, check=True)
    return {
        "answer": application(infer),
        "same sockets": all(
            before[n][2] == sockets()[n][2] for n in ("infer.sock", "control.sock")
        ),
        **show(SERVICE, "Result", "ActiveState", "WatchdogUSec"),
    }


def healthy() -> dict[str, Any]:
    """More than a watchdog period without anything wrong."""
    before = main_pid()
    time.sleep(3.0)
    return {"same process": before == main_pid() != 0}


def death(number: signal.Signals) -> dict[str, Any]:
    """Signal the supervisor; systemd brings it back and no process of the old one survives."""
    count, before = restarts(), members()
    os.kill(main_pid(), number)
    noticed_s = until(lambda: restarts() > count)
    until(lambda: show(SERVICE, "ActiveState")["ActiveState"] == "active")
    return {
        "noticed_s": noticed_s,
        "answer": application(infer),
        "survivors": sorted(set(before) & set(members())),
        "result": journal("UNIT_RESULT")[-1:],
    }


def stuck() -> dict[str, Any]:
    return death(signal.SIGSTOP)


def killed() -> dict[str, Any]:
    return death(signal.SIGKILL)


def probe() -> dict[str, Any]:
    """A service with the same settings in the daemon's place."""
    run("systemctl", "stop", SERVICE)
    DROP_IN.write_text(
        "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nStandardOutput=file:/results/probe.json\n"
        "ExecStart=\nExecStart=/opt/edge-runtime/bin/python /inside/probe.py\n"
    )
    run("systemctl", "daemon-reload", check=True)
    output = run("systemctl", "start", SERVICE)
    DROP_IN.write_text(QUICK)
    run("systemctl", "daemon-reload", check=True)
    return {"output": output, **json.loads(Path("/results/probe.json").read_text())}


def configuration() -> dict[str, Any]:
    """A file that only root can read, then one with a mistake, then none: it recovers by itself."""
    seen: dict[str, Any] = {}
    CONFIG.write_text("log:\n  level: debug\n")
    CONFIG.chmod(0o600)
    run("systemctl", "restart", SERVICE, check=True)
    seen["shown"] = run(COMMAND, "--json", "config", "show")
    CONFIG.write_text("log:\n  levle: debug\n")
    count = restarts()
    seen["mistake"] = run("systemctl", "restart", SERVICE)
    until(lambda: restarts() > count)
    seen["messages"] = journal("MESSAGE", "_SYSTEMD_UNIT=" + SERVICE)[-20:]
    CONFIG.unlink()
    until(lambda: show(SERVICE, "ActiveState")["ActiveState"] == "active")
    seen["answer"] = application(infer)
    return seen


def stop() -> dict[str, Any]:
    before = members()
    start_s = time.monotonic()
    run("systemctl", "stop", SERVICE)
    seen = {
        "stop_s": time.monotonic() - start_s,
        **show(SERVICE, "Result", "ActiveState"),
        "survivors": [pid for pid in before if Path(f"/proc/{pid}").exists()],
        "sockets": sockets(),
    }
    return seen | {"answer of the next connection": application(infer)}


def sockets_stopped() -> dict[str, Any]:
    run("systemctl", "stop", "edge-runtime-infer.socket", "edge-runtime-control.socket")
    return {**show(SERVICE, "ActiveState", "Result"), "left": [str(p) for p in RUN.glob("**/*")]}


def journal(field: str, *match: str) -> list[Any]:
    lines = run("journalctl", "-o", "json", "--no-pager", *match).splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry[field] for entry in entries if field in entry]


def large_event() -> dict[str, Any]:
    """An entry far over a datagram's size, from a user without privileges, to the real journald."""
    from edge_runtime.clock import SystemClock
    from edge_runtime.events import Events, JournalSink

    def emit() -> int:
        log = Events(JournalSink(identifier="edge-large"), SystemClock())
        log.emit("large", "line\n" * 200_000, level="error", note="a\nb")
        return log.statistics().dropped

    def found() -> list[str]:
        lines = run("journalctl", "-o", "json", "--all", "-t", "edge-large").splitlines()
        return [line for line in lines if line.startswith("{")]

    dropped = as_user(STRANGER, [], emit)
    until(found)
    (entry,) = (json.loads(line) for line in found())
    return {
        "dropped": dropped,
        "message_size": len(entry["MESSAGE"]),
        **{name: entry[name] for name in ("EDGE_NOTE", "PRIORITY", "_UID")},
    }


def events() -> dict[str, Any]:
    lines = run("journalctl", "-o", "json", "--no-pager", "-t", "edge-runtime").splitlines()
    return {"entries": [json.loads(line) for line in lines if line.startswith("{")]}


STEPS = (
    boot,
    activation,
    install,
    access,
    restart,
    healthy,
    stuck,
    killed,
    probe,
    configuration,
    stop,
    sockets_stopped,
    large_event,
    events,
)


def main() -> None:
    report: dict[str, Any] = {}
    for step in STEPS:
        start_s = time.monotonic()
        try:
            report[step.__name__] = step()
        except Exception:  # noqa: BLE001 - recorded, and a test fails on it
            report[step.__name__] = {"failed": traceback.format_exc()}
        print(f"{step.__name__}: {time.monotonic() - start_s:.2f} s", flush=True)
    Path("/results/journal").write_text(run("journalctl", "-o", "short-monotonic", "--no-pager"))
    Path("/results/report.json").write_text(json.dumps(report, indent=1))


main()
