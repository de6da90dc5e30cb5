"""Sensitivity: which layers suffer, and what to leave float."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, save

from quantize import cli, sensitivity
from quantize.report import layers
from quantize.sensitivity import Layer, Question, Sensitivity

MODEL = Path("examples/fashion_mnist/fp32.onnx").resolve()


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four products, and in the third a channel that is a thousand times louder than what counts.

    That channel is not used afterwards; its range swallows all the others' integers.
    """
    folder = tmp_path_factory.mktemp("fragile")
    rng = np.random.Generator(np.random.PCG64(4))
    shapes = [(16, 32), (32, 32), (32, 32), (32, 8)]
    weights = [rng.normal(size=shape).astype(np.float32) / 4 for shape in shapes]
    weights[2][:, 0] *= 3000
    weights[3][0, :] = 0
    nodes, name = [], "x"
    for number in range(4):
        out = "y" if number == 3 else f"h{number}"
        nodes.append(helper.make_node("Gemm", [name, f"w{number}"], [out], name=f"gemm{number}"))
        name = out
    graph = helper.make_graph(
        nodes,
        "fragile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(one, f"w{number}") for number, one in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, str(folder / "fragile.onnx"))
    x = rng.normal(size=(600, 16)).astype(np.float32)
    y = (x @ weights[0] @ weights[1] @ weights[2] @ weights[3]).argmax(axis=1)
    np.savez(folder / "data.npz", x=x, y=y)
    return folder / "fragile.onnx", folder / "data.npz"


def test_a_layer_is_quantized_together_with_the_limit_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One channel reaches +-1000; what counts is the 0 to 6 that Clip lets through."""
    rng = np.random.Generator(np.random.PCG64(4))
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((16, 32), (32, 8))]
    weights[0][:, 0] *= 100
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["wide"], name="first"),
        helper.make_node("Clip", ["wide", "low", "high"], ["kept"], name="limit"),
        helper.make_node("Gemm", ["kept", "w1"], ["y"], name="last"),
    ]
    constants = {"w0": weights[0], "w1": weights[1], "low": np.float32(0), "high": np.float32(6)}
    graph = helper.make_graph(
        nodes,
        "limited",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.asarray(one), name) for name, one in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, str(tmp_path / "limited.onnx"))
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(300, 16)).astype(np.float32))
    words = ["sensitivity", str(tmp_path / "limited.onnx"), "--data", str(tmp_path / "data.npz")]
    assert cli.main([*words, "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["layers"]}
    assert found["first"]["sqnr_db"] > 20


def test_the_layer_that_breaks_the_model_is_found_and_left_out(
    fragile: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sensitivity", str(fragile[0]), "--data", str(fragile[1]), "--drop-max", "0.1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss_all"] > 0.2
    assert {one["name"] for one in found["layers"][:2]} == {"gemm2", "gemm3"}
    assert 1 <= len(found["exclude"]) < 4 and "gemm2" in found["exclude"]
    assert found["loss_excluded"] <= 0.1
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "exclude: [gemm" in text and "####" in text


def test_every_layer_of_the_example_is_judged_also_where_a_relu_was_swallowed(
    tmp_path: Path,
) -> None:
    noise = np.random.Generator(np.random.PCG64(1)).random((90, 1, 28, 28), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=noise)
    found = sensitivity.of_model(
        Question(MODEL, str(tmp_path / "x.npz"), samples=40), lambda _: None
    )
    assert found.metric == "agreement" and found.samples == 40
    names = {one.name for one in found.layers}
    assert names == {"/0/Conv", "/3/Conv", "/7/Conv", "/10/Conv", "/16/Gemm", "/18/Gemm"}
    for one in found.layers:
        assert 10 < one.alone_sqnr_db < 60 and 10 < one.own_sqnr_db < 60
    deep = next(one for one in found.layers if one.name == "/10/Conv")
    assert deep.own_sqnr_db < deep.alone_sqnr_db  # what came before it adds up
    assert sum(one.macs_share for one in found.layers) == pytest.approx(1, abs=0.01)
    ranked = [one.sqnr_db for one in found.layers]
    assert ranked == sorted(ranked)


# --- proposing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", range(1, 9))
def test_the_fewest_that_keep_the_budget_are_proposed(needed: int) -> None:
    ranked = [str(number) for number in range(9)]
    asked: list[int] = []

    def loss_without(names: Sequence[str]) -> float:
        asked.append(len(names))
        return 0.0 if len(names) >= needed else 1.0

    names, loss = sensitivity.propose(ranked, 1.0, 0.5, loss_without)
    assert (list(names), loss) == (ranked[:needed], 0.0)
    assert len(asked) == len(set(asked)) <= 6  # nothing is measured twice


def test_nothing_is_proposed_without_need_and_everything_where_nothing_helps() -> None:
    assert sensitivity.propose(["a", "b"], 0.1, 0.5, lambda _: 1.0) == ((), 0.1)
    assert sensitivity.propose(["a", "b"], 0.9, 0.5, lambda _: 1.0) == (("a", "b"), 0.0)
    assert sensitivity.propose(["a"], 0.9, 0.5, lambda _: 1.0) == (("a",), 0.0)


def test_the_longest_bar_is_the_loudest_and_each_layer_has_one() -> None:
    def layer(name: str, sqnr_db: float) -> Layer:
        return Layer(name, "Conv", sqnr_db, 0.0, 30.0, 0.0, 0.5)

    found = Sensitivity((layer("a", 10), layer("b", 30)), 9, "top1", 0.2, 0.1, ("a",), 0.05)
    lines = layers.text(found).splitlines()
    assert lines[1].endswith("#" * layers.BAR_WIDTH) and lines[2].endswith(" #")
    assert "exclude: [a]" in lines[-1]
    one = Sensitivity((layer("a", 10),), 9, "top1", 0.2, 0.1, ("a",), 0.0)
    assert "leave the model float" in layers.text(one)
    none = Sensitivity((), 9, "top1", 0.0, 0.1, (), 0.0)
    assert "Nothing needs to stay float." in layers.text(none)


def test_pictures_are_read_as_the_model_wants_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `auto` does: one channel of grey for the example's model, without a word of the user."""
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.Generator(np.random.PCG64(4))
    for number in range(40):
        pixels = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    words = ["sensitivity", str(MODEL), "--data", str(tmp_path), "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert cli.main(["compare", str(MODEL), str(MODEL), "--data", str(tmp_path)]) == 0


def test_how_long_it_will_take_is_said_after_the_first_layer(fragile: tuple[Path, Path]) -> None:
    said: list[str] = []
    sensitivity.of_model(Question(fragile[0], str(fragile[1]), samples=32), said.append)
    mine = [one for one in said if one.startswith("layer ")]
    assert mine[0] == "layer 1 of 4: gemm0"
    assert all("left: gemm" in one for one in mine[1:]) and len(mine) == 4
