"""kill -9 at every system call of a life of the store: old or new, never neither."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store import killer
from tests.store.world import View

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_kill_at_any_system_call_leaves_old_or_new(
    fast_path: Path, record_points: Callable[[str, int], None]
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.store.killer", str(fast_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode == killer.NOT_POSSIBLE:
        pytest.skip(f"ptrace is not possible here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    record_points("kill -9 at every system call", report["points"])
    # Install and activate take hundreds of calls: fewer would mean that they were not counted.
    assert report["points"] > 300
    assert report["states_seen"] == report["states"]


def test_the_kill_proof_notices_a_state_that_no_act_leads_to() -> None:
    old, new = View(1, None, frozenset({1})), View(2, 1, frozenset({1, 2}))
    assert killer.stage(old, [old, new]) == 0
    with pytest.raises(AssertionError, match="at no stage"):
        killer.stage(View(2, None, frozenset({1, 2})), [old, new])
