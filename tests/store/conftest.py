"""What the store's tests share: directories, a store, and the count of points tried."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.clock import ManualClock
from edge_runtime.files import SystemFiles
from edge_runtime.store import Store

MEMORY = Path("/dev/shm")


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory where fsync costs nothing: for faults that need no medium."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="edge-store-", dir=MEMORY))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def root(fast_path: Path) -> Path:
    return fast_path / "state"


@pytest.fixture
def store(root: Path, clock: ManualClock) -> Iterator[Store]:
    """An open, empty store."""
    store = Store(root, SystemFiles(), clock)
    store.open()
    yield store
    store.close()


@pytest.fixture
def record_points(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Note how many points a proof tried; the terminal's summary adds them up."""
    return lambda what, points: record_property("points", (f"store: {what}", points))
