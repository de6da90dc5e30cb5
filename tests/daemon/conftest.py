"""Daemons for tests: one that tests of a module share, and a maker of special ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.world import QUICK_RESTART, Daemon, running


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon with quick restarts and the odd backends, shared by the tests of a module."""
    with running({"workers": {"restart": QUICK_RESTART}}, odd_backends=True) as started:
        yield started


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    """Makes daemons (not started); stops those that still run, and removes them."""
    made: list[Daemon] = []

    def make(config: dict[str, Any] | None = None, **options: Any) -> Daemon:
        made.append(Daemon(config, **options))
        return made[-1]

    yield make
    try:
        for one in made:
            if one.process is not None and one.process.poll() is None:
                one.stop()
    finally:
        for one in made:
            one.remove()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path
