"""onnxruntime's own reporting stays off, whatever the environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys
before = set(os.listdir("/proc/self/task"))
{disable}
import onnxruntime
print(len(set(os.listdir("/proc/self/task")) - before))
"""
BACKEND = CODE.format(
    disable="from edge_runtime.backends import backend; backend('onnxruntime').version()"
)


def _threads_started(code: str, home: Path) -> tuple[int, list[str]]:
    # The library also keeps quiet where it takes the machine for a build server.
    unset = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    environ = {key: value for key, value in os.environ.items() if key not in unset}
    environ |= {"HOME": str(home), "TMPDIR": str(home), "OPENBLAS_NUM_THREADS": "1"}
    environ.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    written = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return int(done.stdout), written


def test_our_backend_starts_no_thread_at_import_and_leaves_no_device_id(tmp_path: Path) -> None:
    threads, written = _threads_started(BACKEND, tmp_path)
    assert threads == 0  # a template that has threads must not fork
    assert written == []
