"""A maker of daemons."""

from __future__ import annotations

from tests.daemon.conftest import make_daemon

__all__ = ["make_daemon"]
