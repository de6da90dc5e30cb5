"""fine_tune: the graph as a torch module answers as onnxruntime does, learns, and is written back.

Needs torch (the extra quantize-torch); skipped by name without it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.backends import backend
from edge_runtime.errors import ModelError, UsageError
from quantize import onnx_door, passes, torch_door, torch_rules
from quantize.passes import Bench

torch = pytest.importorskip("torch", reason="torch is not installed (extra quantize-torch)")

MODEL = Path("examples/fashion_mnist/fp32.onnx").resolve()
RNG = np.random.Generator(np.random.PCG64(5))


def f(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


IMAGE = (2, 4, 9, 10)
PLAIN = (
    "HardSwish Selu Softplus Softsign Mish Identity Relu Sigmoid Tanh Exp Neg Abs Erf Reciprocal"
    " Log Sqrt"
)
# operator -> cases: (shape of the input, constants after it (None: left out), attributes).
Case = tuple[tuple[int, ...], list[np.ndarray | None], dict[str, Any]]
CASES: dict[str, list[Case]] = {
    "Conv": [
        (IMAGE, [f(6, 4, 3, 3), f(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        (IMAGE, [f(4, 1, 3, 3)], {"group": 4, "dilations": [2, 1]}),
        (IMAGE, [f(6, 4, 3, 2), f(6)], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        (IMAGE, [f(6, 4, 2, 4), f(6)], {"auto_pad": "SAME_LOWER"}),
        (IMAGE, [f(6, 4, 2, 4), f(6)], {"auto_pad": "VALID"}),
        ((2, 3, 16), [f(5, 3, 3)], {"pads": [2, 0]}),
        ((1, 2, 5, 6, 7), [f(3, 2, 2, 2, 2), f(3)], {}),
    ],
    "ConvTranspose": [
        (IMAGE, [f(4, 3, 3, 3), f(3)], {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
        (IMAGE, [f(4, 2, 2, 2)], {"strides": [2, 3], "output_padding": [1, 1], "group": 2}),
    ],
    "Gemm": [
        ((3, 5), [f(5, 4), f(4)], {"alpha": 0.5, "beta": 2.0}),
        ((5, 3), [f(4, 5)], {"transA": 1, "transB": 1}),
    ],
    "MatMul": [((2, 3, 5), [f(5, 4)], {})],
    "BatchNormalization": [
        (IMAGE, [f(4), f(4), f(4), np.abs(f(4)) + 0.5], {"epsilon": 1e-3}),
    ],
    "InstanceNormalization": [(IMAGE, [f(4), f(4)], {"epsilon": 1e-3})],
    "LayerNormalization": [
        ((2, 3, 8), [f(8), f(8)], {}),
        ((2, 3, 8), [f(3, 8)], {"axis": 1, "epsilon": 1e-3}),
    ],
    "LRN": [((2, 7, 4, 4), [], {"size": 5, "alpha": 0.1, "beta": 0.6, "bias": 1.5})],
    "Softmax": [(IMAGE, [], {"axis": 1}), (IMAGE, [], {})],
    "LogSoftmax": [(IMAGE, [], {"axis": 1})],
    "Dropout": [(IMAGE, [], {}), (IMAGE, [np.array(0.3, np.float32)], {})],
    "MaxPool": [
        (IMAGE, [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
        (IMAGE, [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        (IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
    "AveragePool": [
        (IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2]}),
        (IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1]}),
        (IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1], "count_include_pad": 1}),
    ],
    "GlobalAveragePool": [(IMAGE, [], {})],
    "GlobalMaxPool": [(IMAGE, [], {})],
    "ReduceMean": [
        (IMAGE, [i(2, 3)], {"keepdims": 0}),
        (IMAGE, [], {}),
        (IMAGE, [], {"noop_with_empty_axes": 1}),
    ],
    "ReduceSum": [(IMAGE, [i(-1)], {})],
    "ReduceMax": [(IMAGE, [i(1, 2)], {})],
    "ReduceMin": [(IMAGE, [i(1)], {"keepdims": 0})],
    "ReduceL2": [(IMAGE, [i(2, 3)], {})],
    "Flatten": [(IMAGE, [], {}), (IMAGE, [], {"axis": 2}), (IMAGE, [], {"axis": 0})],
    "Reshape": [(IMAGE, [i(0, 2, -1)], {}), (IMAGE, [i(-1, 4)], {})],
    "Squeeze": [((2, 1, 3, 1), [i(1)], {}), ((2, 1, 3, 1), [], {})],
    "Unsqueeze": [((2, 3), [i(-1, 1)], {})],
    "Transpose": [(IMAGE, [], {"perm": [0, 2, 3, 1]}), (IMAGE, [], {})],
    "Concat": [(IMAGE, [f(2, 3, 9, 10)], {"axis": 1})],
    "Split": [(IMAGE, [i(1, 3)], {"axis": 1}), (IMAGE, [], {"axis": 3, "num_outputs": 2})],
    "Slice": [
        (IMAGE, [i(1, -4), i(3, 2**62), i(1, 3)], {}),
        (IMAGE, [i(8, -1), i(1, -(2**62)), i(2, 3), i(-3, -1)], {}),
        (IMAGE, [i(0, 1), i(1, 3)], {}),
    ],
    "Gather": [(IMAGE, [i(2, -1, 0)], {"axis": 1}), (IMAGE, [np.array(1)], {"axis": -1})],
    "Shape": [(IMAGE, [], {}), (IMAGE, [], {"start": 1, "end": -1})],
    "Pad": [
        (IMAGE, [i(0, 0, 1, 2, 0, 1, 0, 3), np.array(0.5, np.float32)], {}),
        (IMAGE, [i(1, -1, 2, 0), None, i(2, 3)], {}),
        (IMAGE, [i(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "reflect"}),
        (IMAGE, [i(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "edge"}),
    ],
    "Resize": [
        (IMAGE, [None, f(0), i(2, 4, 18, 30)], {}),
        (
            IMAGE,
            [None, np.array([1, 1, 2, 2], np.float32)],
            {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        ),
        (IMAGE, [None, f(0), i(2, 4, 13, 21)], {"mode": "linear"}),
        (
            IMAGE,
            [None, f(0), i(2, 4, 13, 21)],
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        ),
    ],
    "DepthToSpace": [
        ((2, 12, 3, 4), [], {"blocksize": 2}),
        ((2, 12, 3, 4), [], {"blocksize": 2, "mode": "CRD"}),
    ],
    "SpaceToDepth": [((2, 3, 6, 8), [], {"blocksize": 2})],
    "Add": [(IMAGE, [f(4, 1, 1)], {})],
    "Sub": [(IMAGE, [f(4, 1, 1)], {})],
    "Mul": [(IMAGE, [f(4, 1, 1)], {})],
    "Div": [(IMAGE, [np.abs(f(4, 1, 1)) + 1], {})],
    "Pow": [(IMAGE, [np.array(2, np.float32)], {})],
    "Min": [(IMAGE, [f(4, 1, 1), f(10)], {})],
    "Max": [(IMAGE, [f(4, 1, 1)], {})],
    "Sum": [(IMAGE, [f(4, 1, 1), f(10)], {})],
    "Clip": [
        (IMAGE, [np.array(0, np.float32), np.array(0.5, np.float32)], {}),
        (IMAGE, [None, np.array(0.5, np.float32)], {}),
        (IMAGE, [], {}),
    ],
    "Cast": [(IMAGE, [], {"to": TensorProto.INT32})],
    "PRelu": [(IMAGE, [f(4, 1, 1)], {})],
    "LeakyRelu": [(IMAGE, [], {"alpha": 0.2})],
    "HardSigmoid": [(IMAGE, [], {}), (IMAGE, [], {"alpha": 1 / 6})],
    "Elu": [(IMAGE, [], {"alpha": 0.7})],
    "Celu": [(IMAGE, [], {"alpha": 0.7})],
    "Gelu": [(IMAGE, [], {}), (IMAGE, [], {"approximate": "tanh"})],
    **{op: [(IMAGE, [], {})] for op in PLAIN.split()},
}


def graph(case: tuple[str, Case], path: Path, opset: int = 20) -> Path:
    op, (shape, constants, attributes) = case
    names = [f"c{place}" if one is not None else "" for place, one in enumerate(constants)]
    weights = [
        numpy_helper.from_array(one, f"c{place}")
        for place, one in enumerate(constants)
        if one is not None
    ]
    outputs = ["y", "z"] if op == "Split" else ["y"]
    node = helper.make_node(op, ["x", *names], outputs, name="it", **attributes)
    kind = {"Shape": TensorProto.INT64, "Cast": TensorProto.INT32}.get(op, TensorProto.FLOAT)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    made = helper.make_graph([node], "one", [x], found, weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def bench(said: list[str] | None = None) -> Bench:
    return Bench({}, (), (), 0, 0, (said if said is not None else []).append)


def answers(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    loaded = backend("onnxruntime").load(path, {"graph_level": "disabled"})
    return loaded.run({loaded.inputs[0].name: x})


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(torch_rules.RULES)


@pytest.mark.parametrize("op", sorted(CASES))
def test_a_rule_computes_what_onnxruntime_computes(op: str, tmp_path: Path) -> None:
    for case in CASES[op]:
        path = graph((op, case), tmp_path / "one.onnx")
        x = f(*case[0])
        x = np.abs(x) + 0.5 if op in ("Log", "Sqrt") else x
        want = answers(path, x)
        module = torch_door.module_of(onnx_door.load(path)).eval()
        with torch.no_grad():
            got = module(torch.from_numpy(x))
        got = got if isinstance(got, tuple) else (got,)
        for have, name in zip(got, want, strict=True):
            assert have.shape == want[name].shape, case
            np.testing.assert_allclose(
                have.numpy(), want[name], rtol=1e-5, atol=1e-5, err_msg=str(case[2])
            )


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_softmax_of_old_opsets_takes_the_last_axes_as_one(axis: int, tmp_path: Path) -> None:
    path = graph(("Softmax", (IMAGE, [], {"axis": axis})), tmp_path / "old.onnx", opset=11)
    x = f(*IMAGE)
    got = torch_door.module_of(onnx_door.load(path))(torch.from_numpy(x))
    np.testing.assert_allclose(got.numpy(), answers(path, x)["y"], atol=1e-5)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("Resize", (IMAGE, [None, f(0), i(2, 4, 13, 21)], {})),
        ("Resize", (IMAGE, [None, f(0), i(2, 4, 18, 20)], {"mode": "cubic"})),
        ("Pad", (IMAGE, [i(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "wrap"})),
        ("ConvTranspose", (IMAGE, [f(4, 3, 3, 3)], {"output_shape": [12, 12]})),
        ("AveragePool", (IMAGE, [], {"kernel_shape": [2, 2], "dilations": [2, 2]})),
    ],
)
def test_a_case_that_no_rule_knows_is_refused_not_approximated(
    op: str, case: Case, tmp_path: Path
) -> None:
    module = torch_door.module_of(onnx_door.load(graph((op, case), tmp_path / "one.onnx")))
    with pytest.raises(UsageError, match=f"{op} it with .* cannot be trained here"):
        module(torch.from_numpy(f(*case[0])))


def test_operators_without_a_rule_are_named(tmp_path: Path) -> None:
    path = graph(("CumSum", ((2, 9), [np.array(1)], {})), tmp_path / "one.onnx")
    model = onnx_door.load(path)
    with pytest.raises(UsageError, match="CumSum"):
        torch_door.module_of(model)
    pool = onnx_door.load(
        graph(("MaxPool", (IMAGE, [], {"kernel_shape": [2, 2]})), tmp_path / "pool.onnx")
    )
    pool.graph.node[0].output.append("places")
    with pytest.raises(UsageError, match="MaxPool with 2 outputs"):
        torch_door.module_of(pool)
    model.graph.node[0].domain = "com.example"
    model.graph.node[0].op_type = "Relu"
    with pytest.raises(UsageError, match=r"those of com\.example"):
        torch_door.module_of(model)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def user() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Makes a function importable, as a user's own module is."""
    module = types.ModuleType("own_training")
    sys.modules["own_training"] = module

    def given(function: Callable[..., Any]) -> str:
        module.train = function  # type: ignore[attr-defined]
        return "own_training:train"

    yield given
    del sys.modules["own_training"]


def tuned(function: str, source: Path, out: Path, said: list[str] | None = None) -> Path:
    how = passes.decode({"use": "fine_tune", "train": function}, "passes[0]")
    how.apply(source, out, bench(said))
    return out


def normalized(path: Path) -> Path:
    """Conv, BatchNormalization, x + 3 clipped to 6, over 6, flattened by a Constant node, Gemm."""
    weights = {
        "conv.weight": f(4, 1, 3, 3),
        "scale": np.ones(4, np.float32),
        "shift": np.zeros(4, np.float32),
        "mean": np.zeros(4, np.float32),
        "variance": np.ones(4, np.float32),
        "three": np.array(3, np.float32),
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
        "dense": f(4, 3),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["b"]),
        helper.make_node("Add", ["b", "three"], ["c"]),
        helper.make_node("Clip", ["c", "zero", "six"], ["d"]),
        helper.make_node("Div", ["d", "six"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["g"]),
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, 4]),
        helper.make_node("Reshape", ["g", "shape"], ["h"]),
        helper.make_node("MatMul", ["h", "dense"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    items = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "net", [x], [y], items),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx_door.save(model, path)
    return path


def test_the_graph_learns_and_the_file_answers_like_the_trained_module(
    tmp_path: Path, user: Callable[[Callable[..., Any]], str]
) -> None:
    images = torch.from_numpy(f(64, 1, 8, 8))
    wanted = images.flatten(1)[:, :3]
    kept: dict[str, Any] = {}

    def train(model: Any, seed: int) -> None:
        assert model.training
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(40):
            loss = (model(images) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(one.grad is not None and one.grad.any() for one in model.parameters())
            optimizer.step()
            print(f"step {step}: {loss.item():.3f}", end="\n" if step % 2 else "\r")
            kept.setdefault("first", loss.item())
            kept["last"] = loss.item()
        kept["module"] = model.eval()

    source, said = normalized(tmp_path / "net.onnx"), list[str]()
    out = tuned(user(train), source, tmp_path / "tuned.onnx", said)
    assert kept["last"] < 0.9 * kept["first"]
    assert [line.split(":")[0] for line in said] == [f"step {step}" for step in range(40)]
    with torch.no_grad():
        want = kept["module"](images).numpy()
    np.testing.assert_allclose(answers(out, images.numpy())["y"], want, atol=1e-5)
    before, after = (onnx_door.arrays(onnx_door.load(path)) for path in (source, out))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    # The numbers of the formula stay; the statistics follow the batches.
    assert changed == {"conv.weight", "scale", "shift", "mean", "variance", "dense"}
    old, new = onnx_door.load(source).graph, onnx_door.load(out).graph
    assert (new.input, new.output) == (old.input, old.output)


def test_statistics_stand_still_in_eval_mode(
    tmp_path: Path, user: Callable[[Callable[..., Any]], str]
) -> None:
    def train(model: Any, seed: int) -> Any:
        model.eval()
        model(torch.from_numpy(f(4, 1, 8, 8))).sum().backward()
        return model

    source = normalized(tmp_path / "net.onnx")
    out = tuned(user(train), source, tmp_path / "same.onnx")
    before, after = (onnx_door.arrays(onnx_door.load(path)) for path in (source, out))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_untrained_model_comes_back_with_the_same_answers(
    tmp_path: Path, user: Callable[[Callable[..., Any]], str]
) -> None:
    out = tuned(user(lambda model, seed: None), MODEL, tmp_path / "same.onnx")
    x = RNG.random((3, 1, 28, 28), dtype=np.float32)
    assert np.array_equal(answers(out, x)["logits"], answers(MODEL, x)["logits"])


@pytest.mark.parametrize("kind", ["half", "double"])
def test_a_model_that_was_trained_in_other_floats_comes_back_in_the_graphs(
    kind: str, tmp_path: Path, user: Callable[[Callable[..., Any]], str]
) -> None:
    out = tuned(user(lambda model, seed: getattr(model, kind)()), MODEL, tmp_path / "same.onnx")
    x = RNG.random((3, 1, 28, 28), dtype=np.float32)
    want = answers(MODEL, x)["logits"]
    np.testing.assert_allclose(answers(out, x)["logits"], want, atol=1e-2 * np.abs(want).max())


def test_the_seed_decides_what_torch_draws(
    tmp_path: Path, user: Callable[[Callable[..., Any]], str]
) -> None:
    drawn = []
    name = user(lambda model, seed: drawn.append((seed, torch.rand(1).item())))
    for _ in range(2):
        tuned(name, MODEL, tmp_path / "x.onnx")
    assert drawn[0] == drawn[1]


def _raises(model: Any, seed: int) -> None:
    raise ValueError("no data\nsecond line")


def _diverges(model: Any, seed: int) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(float("nan"))


def _widens(model: Any, seed: int) -> None:
    first = next(model.parameters())
    first.data = torch.zeros(64, 1, 5, 5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_raises, "own_training:train failed: ValueError: no data$"),
        (_diverges, "not finite"),
        (lambda model, seed: torch.nn.ReLU(), "returned a ReLU"),
        (lambda model: None, "TypeError"),
        (lambda model, seed: sys.exit(0), "failed: SystemExit: 0"),
        (_widens, r"became \[64, 1, 5, 5\], it was \[\d+, 1, 3, 3\]"),
    ],
)
def test_a_training_that_fails_is_our_error_and_writes_nothing(
    function: Callable[..., Any],
    message: str,
    tmp_path: Path,
    user: Callable[[Callable[..., Any]], str],
) -> None:
    with pytest.raises(ModelError, match=message):
        tuned(user(function), MODEL, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("name", ["nowhere:train", "math:nothing", "math:pi", "noname"])
def test_a_function_that_is_none_is_a_usage_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        tuned(name, MODEL, tmp_path / "x.onnx")


def test_a_result_of_other_code_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changing", raising=False)
    how = passes.decode({"use": "fine_tune", "train": "changing:train"}, "passes[0]")
    (tmp_path / "changing.py").write_text("def train(model, seed): ...\n")
    first = how.versions()
    (tmp_path / "changing.py").write_text("def train(model, seed): print(seed)\n")
    assert how.versions() != first
