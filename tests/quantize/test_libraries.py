"""NNCF and ai-edge-quantizer, each behind its door; run by `make test-quantize`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.errors import UsageError
from quantize import cli, edge_quantizer_door, nncf_door

FOLDER = Path("examples/fashion_mnist").resolve()


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (make test-quantize)")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs of light, labelled by the float model."""
    noise = np.random.Generator(np.random.PCG64(1)).random((450, 1, 7, 7), dtype=np.float32)
    x = noise.repeat(4, axis=2).repeat(4, axis=3)
    answers = backend("onnxruntime").load(FOLDER / "fp32.onnx", {}).run({"input": x})["logits"]
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=x, y=answers.argmax(axis=1))
    return path


RECIPE = """
name: cnn
version: 1
source: {source}
data: {{path: {data}}}
evaluation: {{rounds: 3}}
budgets: {{drop_max: 0.2, speedup_min: 0}}
variants:
  - {{name: fp32}}
  - {{name: int8-nncf, backend: openvino, passes: [{{use: nncf_int8}}]}}
"""


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert cli.main([*words, "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["evaluated"]}


@needs("nncf")
def test_nncf_makes_a_variant_that_openvino_serves_right_and_smaller(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=FOLDER / "fp32.onnx", data=data))
    found = outcome(["run", str(recipe), "-o", str(tmp_path / "out.bundle")], capsys)
    assert found["int8-nncf"]["score"]["value"] > 0.8  # type: ignore[index]
    assert found["int8-nncf"]["size_bytes"] * 3.5 < found["fp32"]["size_bytes"]  # type: ignore[operator]


@needs("ai_edge_quantizer")
def test_a_tflite_model_becomes_int8_with_floats_in_and_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["auto", str(FOLDER / "fp32.tflite"), "--data", str(data), "--drop-max", "0.2"]
    found = outcome([*words, "-o", str(tmp_path / "out.bundle")], capsys)
    assert found["int8-litert"]["refusal"] == ""
    assert found["int8-litert"]["size_bytes"] * 3.5 < found["fp32-litert"]["size_bytes"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("door", "module", "extra"),
    [
        (nncf_door, "nncf", "quantize-openvino"),
        (edge_quantizer_door, "ai_edge_quantizer", "quantize-litert"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_its_extra(
    door: object, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UsageError) as caught:
        door.version()  # type: ignore[attr-defined]
    assert extra in caught.value.remedy
