"""Power cuts on a real ext4, after every step: old or new, and new once the call has returned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.store import power_cut

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting ext4 images needs root"),
    pytest.mark.skipif(
        not all(shutil.which(tool) for tool in ("mkfs.ext4", "mount", "umount", "unshare")),
        reason="mkfs.ext4, mount, umount or unshare is missing",
    ),
]


def cut(path: Path, syncing: str, broken: str = "-") -> dict[str, Any]:
    """A life with power cuts, in a mount namespace of its own: nothing stays mounted after it."""
    run = subprocess.run(
        ["unshare", "--mount", sys.executable, "-m", power_cut.__name__, path, syncing, broken],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if run.returncode == power_cut.NOT_POSSIBLE or "unshare:" in run.stderr:
        pytest.skip(f"no loop mounts here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("syncing", ["plain", "journal"])
def test_a_power_cut_after_any_step_leaves_old_or_new(
    syncing: str, fast_path: Path, record_points: Callable[[str, int], None]
) -> None:
    report = cut(fast_path, syncing)
    assert report["failures"] == []
    assert report["images"] > 100
    record_points("power cuts on a real ext4", report["images"])


@pytest.mark.parametrize(("syncing", "broken"), [("journal", "sync"), ("plain", "sync_directory")])
def test_a_store_that_forgets_an_fsync_is_caught(
    syncing: str, broken: str, fast_path: Path
) -> None:
    assert cut(fast_path, syncing, broken)["failures"]
