"""Jobs that succeed, fail and die, for the tests of executors."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError


def square(order: dict[str, Any]) -> int:
    return int(order["number"]) ** 2


def refuse(order: dict[str, Any]) -> None:
    raise ModelError("nothing was quantized", where="here")


def stumble(order: dict[str, Any]) -> None:
    raise ZeroDivisionError("of course")


def die(order: dict[str, Any]) -> str:
    """As a library does that crashes: the first `times` times, counted in a file."""
    count = Path(order["count"])
    before = int(count.read_text()) if count.exists() else 0
    count.write_text(str(before + 1))
    if before < order["times"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def beget(order: dict[str, Any]) -> str:
    child = subprocess.Popen(["sleep", "100"])
    Path(order["pid"]).write_text(str(child.pid))
    return "gone before its child"


def hang(order: dict[str, Any]) -> None:
    Path(order["pid"]).write_text(str(os.getpid()))
    while True:
        signal.pause()
