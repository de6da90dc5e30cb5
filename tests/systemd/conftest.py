"""The booted machine, once for all tests that look at what happened in it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.systemd import machine


def bundle(directory: Path) -> Path:
    """A bundle of the smallest real model: y = x + x for x [N,4] FP32."""
    onnx = pytest.importorskip("onnx")
    shape, kind = ["N", 4], onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "tiny",
        [onnx.helper.make_tensor_value_info("x", kind, shape)],
        [onnx.helper.make_tensor_value_info("y", kind, shape)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model, target = directory / "tiny.onnx", directory / "tiny.bundle"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), model)
    command = ["bundle", "create", str(model), "--name", "tiny", "-o", str(target)]
    subprocess.run([sys.executable, "-m", "edge_runtime", *command], check=True, timeout=60)
    return target


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What inside/scenario.py saw, step by step; one boot also for several pytest-xdist workers.

    A lock and not an `xdist_group` mark: pytest-xdist 3.8 ignores that mark with pytest 9.2.
    """
    if reason := machine.missing():
        pytest.skip(reason)
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # of this run, common to its workers
    directory /= "machine"
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            directory.mkdir()
            machine.boot(directory / "boot", read_only={bundle(directory): "/bundle"})
    results = directory / "boot/results"
    found = results / "report.json"
    if not found.exists():
        pytest.fail("\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(results.iterdir())))
    return dict(json.loads(found.read_text()))
