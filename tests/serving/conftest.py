"""Fixtures of the serving tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_runtime.serving import admission

from .rig import Rig, open_descriptors


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Makes workers; at the end every slot is free again and every descriptor is closed.

    A turn reads all that is there, however long the processor is somebody else's.
    """
    monkeypatch.setattr(admission, "READ_NS_MAX", 60_000_000_000)
    rigs: list[Rig] = []
    gc.collect()  # what earlier tests left is not this one's
    before = len(open_descriptors())

    def make(*arguments: Any, **options: Any) -> Rig:
        rigs.append(Rig(*arguments, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    rigs.clear()
    gc.collect()
    assert len(open_descriptors()) == before, open_descriptors()
