"""Starts a probe and waits for it, but not for ever.

Law of this file: one child process per probe, bounded in time, and nothing of it outlives the call.
What its end means is decided in `diagnosis.py`. It imports no backend and no numpy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

import msgspec

from edge_runtime.backends.diagnosis import Outcome
from edge_runtime.backends.probe import STEP, Answer

# A cold import from a slow SD card takes 10 s; what takes longer than this is told apart from a
# hang by giving more time (`edge-runtime doctor --timeout`).
TIMEOUT_S = 30.0
STDERR_BYTES_MAX = 16 * 1024  # of its end: a dying library's last words


def probe(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run the probe `name` in a process of its own; how it ended.

    Args:
        options: as in a variant of that backend.
        environment: beside this process's own.
    """
    words = [sys.executable, "-P", "-m", "edge_runtime.backends.probe", name]
    if options:
        words += ["--options", json.dumps(dict(options))]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            exit_code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _end(process)
        text = _tail(err)
        return Outcome(
            name=name,
            exit_code=exit_code,
            waited_s=timeout_s,
            step=_last_step(text),
            answer=_answer(_tail(out)),
            stderr=text,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """The probe and all it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it left nothing behind
    process.wait()


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - STDERR_BYTES_MAX))
    return file.read().decode(errors="replace")


def _last_step(stderr: str) -> str:
    steps = [line.removeprefix(STEP) for line in stderr.splitlines() if line.startswith(STEP)]
    return steps[-1] if steps else ""


def _answer(stdout: str) -> Answer | None:
    try:
        return msgspec.json.decode(stdout, type=Answer)
    except (msgspec.DecodeError, UnicodeError):
        return None
