"""Weights in fewer bits in ONNX: what is excluded stays as it is, and names are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from quantize import models, onnx_door, passes
from quantize.passes import Bench
from quantize.passes.weights import Float16, WeightOnly

onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install '.[quantize]')")
WIDE = 32
NODES = [
    ("first", "x", "shared", "a"),
    ("second", "a", "shared", "b"),
    ("third", "b", "own", "y"),
]


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """Three products, of which the first two have the same weights."""
    rng = np.random.Generator(np.random.PCG64(0))
    weights = {name: rng.normal(size=(WIDE, WIDE)).astype("<f4") for name in ("shared", "own")}
    nodes = [
        onnx.helper.make_node("MatMul", [given, weight], [made], name=name)
        for name, given, weight, made in NODES
    ]
    return written(nodes, weights, WIDE, tmp_path / "products.onnx")


def written(nodes: Sequence[Any], weights: dict[str, Any], width: int, path: Path) -> Path:
    ends = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])]
        for name in ("x", "y")
    ]
    given = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", *ends, given)
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def bench(path: Path) -> Bench:
    source = models.read(path)
    return Bench({}, source.inputs, source.outputs, 0, 0, lambda what: None)


def test_weights_that_an_excluded_node_shares_stay_float(products: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    WeightOnly(exclude=("first",)).apply(products, out, bench(products))
    kinds = {
        name: array.dtype.name for name, array in onnx_door.arrays(onnx_door.load(out)).items()
    }
    assert kinds["shared"] == "float32" and kinds["own_int8"] == "int8" and "own" not in kinds


@pytest.mark.parametrize(
    "given",
    [
        {"use": "weight_only", "exclude": ["frist"]},
        {"use": "weight_only", "bits": 4, "exclude": ["frist"]},
        {"use": "float16", "exclude": ["frist"]},
    ],
)
def test_a_name_that_no_node_has_is_refused_with_the_nearest(
    given: dict[str, Any], products: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no node 'frist'; did you mean 'first'"):
        passes.decode(given, "here").apply(products, tmp_path / "out.onnx", bench(products))


def test_with_everything_excluded_nothing_is_called_4_bits(products: Path, tmp_path: Path) -> None:
    every = tuple(name for name, *_ in NODES)
    with pytest.raises(UsageError, match="that is not excluded"):
        WeightOnly(bits=4, exclude=every).apply(products, tmp_path / "out.onnx", bench(products))
    Float16(exclude=("first",)).apply(products, tmp_path / "half.onnx", bench(products))
    made = onnx_door.arrays(onnx_door.load(tmp_path / "half.onnx"))
    assert made["own"].dtype.name == "float16"


def test_nodes_of_one_name_are_told_apart(products: Path) -> None:
    model = onnx_door.load(products)
    model.graph.node[1].name = "first"
    model.graph.node[2].name = "first.1"
    onnx_door.tell_apart(model)
    assert [node.name for node in model.graph.node] == ["first", "first.2", "first.1"]
