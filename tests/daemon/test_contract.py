"""What every server owes every client (tests/client/test_contract.py), of the real daemon."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.test_contract import *  # noqa: F403 - the tests themselves
from tests.daemon.world import running


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with running() as daemon:
        daemon.add("affine")
        yield daemon.infer_path
