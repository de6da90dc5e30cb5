"""Arm's compiler for Ethos-U NPUs: what it writes is recognised as needing its delegate."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import lint, source
from edge_runtime.bundle.manifest import Blob, Manifest, Variant
from edge_runtime.bundle.tflite_graph import TfliteGraph
from edge_runtime.tensors import TensorSpec
from tests import tflite_writer

VELA = "import sys; from ethosu.vela.vela import main; main(sys.argv[1:])"


def test_what_vela_compiles_is_refused_without_its_delegate_and_taken_with_it(tmp_path: Path):
    if importlib.util.find_spec("ethosu") is None:
        pytest.skip("ethos-u-vela is not installed: make test-accelerators")
    weights = np.random.RandomState(3).standard_normal((16, 4)).astype(np.float32)
    (tmp_path / "m.tflite").write_bytes(tflite_writer.linear_int8(weights))
    words = ["--accelerator-config", "ethos-u55-128", "--output-dir", str(tmp_path)]
    command = [sys.executable, "-c", VELA, *words, str(tmp_path / "m.tflite")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    compiled = source.from_path(tmp_path / "m_vela.tflite")
    graph = lint.lint_artifact(compiled, "m_vela.tflite").graph
    assert isinstance(graph, TfliteGraph)
    assert graph.custom_operators == {"ethos-u": 1}
    (error,) = errors(compiled, {})
    assert "libethosu_delegate.so" in error.remedy
    assert errors(compiled, {"delegate": {"library": "libethosu_delegate.so"}}) == []


def errors(artifact: source.Source, options: dict[str, object]) -> list[lint.Finding]:
    blob = Blob(artifact.sha256(), artifact.size, "m_vela.tflite")
    variant = Variant("npu", "litert", blob, "int8", "npu", options)
    inputs, outputs = (
        (TensorSpec("input", "FP32", (-1, 16)),),
        (TensorSpec("output", "FP32", (-1, 4)),),
    )
    manifest = Manifest(1, "m", 1, inputs=inputs, outputs=outputs, variants=(variant,))
    found = lint.lint_variant(manifest, variant, lambda _: artifact)
    return [finding for finding in found if finding.severity == "error"]
