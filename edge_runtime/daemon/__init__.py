"""The daemon: supervisor, router, control, deployments.

Law of this package: it owns configuration, store, listening sockets and processes, and is not in
the data path. It never imports numpy or a backend library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_runtime.clock import SystemClock
from edge_runtime.config import Stated

# The daemon speaks no TLS, and `ssl` maps libssl and libcrypto: 4 MiB of an idle daemon. asyncio
# does without it where Python was built without OpenSSL; while it is imported we look like that.
# Whoever imports `ssl` later gets it; only asyncio's own TLS stays away from this process.
_hidden = not {"asyncio", "ssl"} & sys.modules.keys()
if _hidden:
    sys.modules["ssl"] = None  # type: ignore[assignment]
import asyncio  # noqa: E402

if _hidden:
    del sys.modules["ssl"]


def serve(state_dir: Path, run_dir: Path, stated: Stated) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit code.

    The device profile is looked for meanwhile, and its values put beneath what the file states.

    Raises:
        ConflictError: another daemon uses the state directory or the sockets.
        StorageError: a directory cannot be made or written.
        UsageError: the configuration is wrong, or names users, groups or a profile that do not
            exist.
    """
    from edge_runtime.daemon import board as boards

    detection = boards.start(stated.config().profile)  # in a process of its own, while we import
    from edge_runtime.daemon.supervisor import Supervisor

    board = detection.board()
    config = stated.config(board.beneath)

    async def run() -> None:
        await Supervisor(state_dir, run_dir, config, board, SystemClock()).run()

    asyncio.run(run())
    return 0
