"""A daemon of one's own: the real program on sockets in a private folder, for as long as a `with`.

Law of this file: it starts, waits until it answers, and ends it; what is asked of it is the
caller's. It ends with the caller too, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError, UnavailableError
from edge_runtime.serving import sandbox

START_S_MAX = 30.0  # a daemon is there after 0.3 s; a slow card is slower
STOP_S_MAX = 20.0
POLL_S = 0.02
# What the service manager gave whoever called us is not for this daemon.
_NOT_INHERITED = ("NOTIFY_SOCKET", "LISTEN_FDS")


@contextlib.contextmanager
def daemon(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A running daemon; its run directory, with `infer.sock` and `control.sock`.

    Args:
        folder: empty, and with a short path: a unix socket's name has at most 107 bytes.
        config: as the configuration file says it.

    Raises:
        UnavailableError: it does not start; says the last that it wrote.
    """
    process = _start(folder, config)
    try:
        _wait_until_ready(process, folder)
        yield folder / "run"
    finally:
        _stop(process)


def _start(folder: Path, config: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    path = folder / "config.json"  # YAML, of which JSON is a part
    path.write_bytes(msgspec.json.encode(config))
    words = [sys.executable, "-P", "-m", "edge_runtime", "serve", "--config", str(path)]
    words += ["--state-dir", str(folder / "state"), "--run-dir", str(folder / "run")]
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    with (folder / "daemon.log").open("wb") as log:
        # If we are killed, nobody else would end it.
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=lambda: sandbox.die_with_parent(signal.SIGTERM),
        )


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path) -> None:
    control, until_s = folder / "run" / "control.sock", time.monotonic() + START_S_MAX
    while process.poll() is None and time.monotonic() < until_s:
        try:
            with ControlClient(control, timeout_s=START_S_MAX) as client:
                client.call("models")
                return
        except EdgeError:
            time.sleep(POLL_S)
    said = (folder / "daemon.log").read_text(errors="replace").strip().splitlines()
    raise UnavailableError(
        "the daemon that measures did not start: " + (said or ["no word"])[-1], where=str(control)
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
