"""Fixtures of the backend tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend

from . import contract


@pytest.fixture
def weights() -> np.ndarray:
    rng = np.random.RandomState(7)
    return rng.standard_normal((contract.WIDTH, contract.CLASSES)).astype(np.float32)


@pytest.fixture(params=contract.rows())
def row(request: Any) -> contract.Row:
    contract.require(request.param.library)
    return request.param


@pytest.fixture
def linear(row: contract.Row, tmp_path: Path, weights: np.ndarray) -> Any:
    """The row's linear model, loaded."""
    return backend(row.name).load(row.linear(tmp_path, weights), {})


@pytest.fixture
def pair(row: contract.Row, tmp_path: Path) -> Any:
    """The row's model of two inputs and two outputs, loaded."""
    return backend(row.name).load(row.pair(tmp_path), {})
