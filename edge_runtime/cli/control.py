"""The one place where commands reach the daemon's control socket.

Law of this file: commands say what they want (`call`); how the socket is found is said here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    Event = Mapping[str, Any]

# Longest silence of the daemon during a command: the first compile of a model takes minutes.
SILENCE_MAX_S = 600.0


def call(
    arguments: argparse.Namespace,
    command: str,
    payload: Mapping[str, Any] | None = None,
    *,
    fds: Sequence[int] = (),
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Ask the daemon of `arguments.run_dir` to do one thing.

    Args:
        fds: descriptors passed with the request; they stay the caller's to close.
        on_event: called for each event that comes before the answer.

    Raises:
        EdgeError: the daemon's, or UnavailableError when there is none.
    """
    from edge_runtime.client.control import ControlClient

    timeout_s = arguments.timeout_s or SILENCE_MAX_S
    with ControlClient(arguments.run_dir / "control.sock", timeout_s=timeout_s) as client:
        return client.call(command, payload, fds=fds, on_event=on_event)
