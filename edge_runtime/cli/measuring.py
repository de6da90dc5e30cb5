"""What a bundle's variants take of this machine, measured the way they will be served.

Law of this file: a real daemon in a directory of its own, one variant at a time, and its own words
about the worker (`ps`). Nothing is imitated, so that the sandbox, warm-up and batches are counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError, UnavailableError

START_TIMEOUT_S = 20.0  # a daemon is there after 0.3 s; a slow card is slower
LOAD_TIMEOUT_S = 600.0  # the first compile for an accelerator takes minutes
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02

# A budget is refused when a device needs more, so that it must hold for other processors and
# library versions too: half as much again, and 4 MiB for what small models cost everywhere.
_FACTOR, _EXTRA_BYTES, _STEP_BYTES = 1.5, 4 << 20, 1 << 20


class Measured(NamedTuple):
    """Private memory of a worker that serves the variant; or why it could not be measured."""

    variant: str
    private_bytes: int
    problem: str = ""


def measure(bundle: Path, name: str, variant: str) -> Measured:
    """Serve one variant with a daemon of its own, and ask what it took."""
    with tempfile.TemporaryDirectory(prefix="edge-measure-", dir="/tmp") as directory:
        root = Path(directory)  # in /tmp: a socket's path has 108 bytes
        config = root / "config.json"  # YAML, of which JSON is a part
        config.write_bytes(msgspec.json.encode({"models": {name: {"variant": variant}}}))
        process = _start(root, config)
        try:
            return Measured(variant, _served(root / "run" / "control.sock", process, bundle))
        except EdgeError as error:
            return Measured(variant, 0, str(error))
        finally:
            _stop(process)


def budget_bytes(measured: list[Measured]) -> int:
    """What the manifest states for variants that took so much; 0: none was measured."""
    most = max((one.private_bytes for one in measured), default=0)
    if not most:
        return 0
    wanted = most * _FACTOR + _EXTRA_BYTES
    return -(-round(wanted) // _STEP_BYTES) * _STEP_BYTES


def _start(root: Path, config: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-P", "-m", "edge_runtime", "serve", "--config", str(config)]
    words += ["--state-dir", str(root / "state"), "--run-dir", str(root / "run")]
    with (root / "log").open("wb") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _served(control: Path, process: subprocess.Popen[bytes], bundle: Path) -> int:
    _wait(control, process)
    with ControlClient(control, timeout_s=LOAD_TIMEOUT_S) as client:
        fd = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            client.call("install", {"activate": True, "filename": bundle.name}, fds=(fd,))
        finally:
            os.close(fd)
        (worker,) = client.call("ps")["workers"]
        return int(worker["private_bytes"])


def _wait(control: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the daemon answers. Raises: UnavailableError: it ended, or did not in time."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            with ControlClient(control, timeout_s=START_TIMEOUT_S) as client:
                client.call("config")
            return
        except EdgeError:
            time.sleep(POLL_S)
    raise UnavailableError("the daemon that measures did not start", where=str(control))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
