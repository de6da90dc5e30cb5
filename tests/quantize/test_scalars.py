"""A model with an input without axes (a sample rate, a threshold): judged, packed and served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx import save as onnx_save

from edge_runtime.bundle import archive
from quantize import cli

RATE = 16_000


def network(path: Path) -> None:
    """x [1, 64], rate INT64 [] -> p [1, 4]: scores that depend on both."""
    rng = np.random.Generator(np.random.PCG64(0))
    wide, back = (rng.normal(0, 0.3, size).astype(np.float32) for size in ((64, 256), (256, 4)))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["rate"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "unit"], ["factor"]),
            helper.make_node("Mul", ["x", "factor"], ["scaled"]),
            helper.make_node("MatMul", ["scaled", "wide"], ["hidden"], name="first"),
            helper.make_node("Relu", ["hidden"], ["positive"]),
            helper.make_node("MatMul", ["positive", "back"], ["p"], name="second"),
        ],
        "rate",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64]),
            helper.make_tensor_value_info("rate", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 4])],
        [
            numpy_helper.from_array(wide, "wide"),
            numpy_helper.from_array(back, "back"),
            numpy_helper.from_array(np.array(RATE, np.float32), "unit"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx_save(model, path)


@pytest.mark.parametrize("one_for_all", [False, True])
def test_a_bundle_of_a_model_with_a_scalar_input_is_judged_packed_and_proven(
    tmp_path: Path, one_for_all: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    network(tmp_path / "rate.onnx")
    rate = np.array(RATE) if one_for_all else rng.choice([8_000, RATE], 90)
    x = rng.normal(size=(90, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, rate=rate)
    recipe = {
        "name": "rate",
        "source": "rate.onnx",
        "data": {"path": "data.npz"},
        "evaluation": {"metric": "cosine", "rounds": 3},
        "budgets": {"speedup_min": 0, "drop_max": 0.2},
        "variants": [{"name": "int8", "passes": [{"use": "clean"}, {"use": "static_int8"}]}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = tmp_path / "rate.bundle"
    code = cli.main(["run", str(tmp_path / "recipe.yaml"), "-o", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == 0, said
    assert {one["name"]: one["refusal"] for one in said["evaluated"]} == {"fp32": "", "int8": ""}
    with archive.open_bundle(out) as bundle:
        goldens = bundle.manifest.goldens
        shapes = {one.name: tuple(one.shape) for one in bundle.manifest.inputs}
    assert shapes == {"x": (1, 64), "rate": ()} and len(goldens) == 6
