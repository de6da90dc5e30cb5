"""The daemon: supervisor, router, control, deployments.

Law of this package: it owns configuration, store, listening sockets and processes, and is not in
the data path. It never imports numpy or a backend library.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_runtime.clock import SystemClock
from edge_runtime.config import Config


def serve(state_dir: Path, run_dir: Path, config: Config) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit code.

    Raises:
        ConflictError: another daemon uses the state directory or the sockets.
        StorageError: a directory cannot be made or written.
        UsageError: the configuration names users or groups that do not exist.
    """
    from edge_runtime.daemon.supervisor import Supervisor

    async def run() -> None:
        await Supervisor(state_dir, run_dir, config, SystemClock()).run()

    asyncio.run(run())
    return 0
