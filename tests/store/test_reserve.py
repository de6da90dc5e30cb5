"""The room that an install must leave free."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.errors import StorageError
from edge_runtime.files import SystemFiles
from edge_runtime.store import Store


def test_an_install_leaves_the_reserve_free_or_writes_nothing(tmp_path: Path) -> None:
    data = b"weights" * 1000
    sha256 = hashlib.sha256(data).hexdigest()
    free_bytes = SystemFiles().free_bytes(tmp_path)
    greedy = Store(tmp_path, SystemFiles(), ManualClock(), reserve_bytes=2 * free_bytes)
    greedy.open()
    with pytest.raises(StorageError, match="are free"):
        greedy.install("m", 1, b"{}", [(sha256, len(data), [data])])
    assert greedy.models() == ()
    greedy.close()
    modest = Store(tmp_path, SystemFiles(), ManualClock(), reserve_bytes=0)
    modest.open()
    assert modest.install("m", 1, b"{}", [(sha256, len(data), [data])]).version == 1
    modest.close()
