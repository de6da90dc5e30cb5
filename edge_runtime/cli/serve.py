"""`serve`: read the configuration, run the daemon.

Law of this file: nothing but the hand-over; what the daemon is made of is decided in `daemon`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import arguments as args

if TYPE_CHECKING:
    import argparse

STATE_DIR_DEFAULT = "/var/lib/edge-runtime"  # what systemd's StateDirectory=edge-runtime makes


def add_parser(subparsers: Any) -> None:
    """Add the parser of `serve`."""
    parser = subparsers.add_parser("serve", description="Run the daemon until it is told to stop.")
    state_dir = os.environ.get("EDGE_RUNTIME_STATE_DIR") or STATE_DIR_DEFAULT
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=Path(state_dir),
        help="where installed models are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="configuration; without it, the defaults"
    )
    args.add_global(parser)
    parser.set_defaults(handler=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from edge_runtime import config, daemon

    return daemon.serve(arguments.state_dir, arguments.run_dir, config.read(arguments.config))
