"""The client examples run as their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "says"), [("client_sync.py", "100 answers"), ("client_async.py", "20 answers")]
)
def test_the_example_runs(endpoint, name, says):
    command = [sys.executable, str(EXAMPLES / name), endpoint, "affine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
