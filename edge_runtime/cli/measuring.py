"""What a bundle's variants take of this machine, measured the way they will be served.

Law of this file: a real daemon in a directory of its own, one variant at a time, and its own words
about the worker (`ps`). Nothing is imitated, so that the sandbox, warm-up and batches are counted.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from edge_runtime.cli import private
from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError

LOAD_TIMEOUT_S = 600.0  # the first compile for an accelerator takes minutes

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
        config = {"models": {name: {"variant": variant}}}
        try:
            # In /tmp: a socket's path has 108 bytes.
            with private.daemon(Path(directory), config) as run_dir:
                return Measured(variant, _served(run_dir / "control.sock", bundle))
        except EdgeError as error:
            return Measured(variant, 0, str(error))


def budget_bytes(measured: list[Measured]) -> int:
    """What the manifest states for variants that took so much; 0: none was measured."""
    most = max((one.private_bytes for one in measured), default=0)
    if not most:
        return 0
    wanted = most * _FACTOR + _EXTRA_BYTES
    return -(-round(wanted) // _STEP_BYTES) * _STEP_BYTES


def _served(control: Path, bundle: Path) -> int:
    with ControlClient(control, timeout_s=LOAD_TIMEOUT_S) as client:
        fd = os.open(bundle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            client.call("install", {"activate": True, "filename": bundle.name}, fds=(fd,))
        finally:
            os.close(fd)
        (worker,) = client.call("ps")["workers"]
        return int(worker["private_bytes"])
