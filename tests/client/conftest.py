"""`server`: the test server. `endpoint`: what the contract tests run against."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "infer.sock")
    yield started
    started.close()


@pytest.fixture
def endpoint(server: Server) -> str:
    """Path of a socket whose server has the models `affine` and `identity` of server.py."""
    return server.path
