"""Channels are removed with everything that hangs on them, or left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.backends import backend
from edge_runtime.errors import UsageError
from quantize import cli, onnx_door, passes
from quantize.passes import Bench, pruning
from quantize.pruning import choosing, cutting, work
from quantize.pruning.seen import Read, Sums, going

MODEL = Path("examples/fashion_mnist/fp32.onnx").resolve()
LITE0 = Path("examples/efficientnet_lite0/out/fp32.onnx").resolve()
SIDE = 8


class Net:
    """Builds small convolutional graphs, value by value."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.consumers: list[tuple[str, int]] = []  # (weight, the axis of its incoming channels)

    def add(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{name}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = (self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, into: int, out: int, group: int = 1) -> str:
        weight, bias = self.weight(out, into // group, 3, 3), self.weight(out)
        if group == 1:
            self.consumers.append((weight, 1))
        return self.add("Conv", [x, weight, bias], pads=[1, 1, 1, 1], group=group)

    def deconv(self, x: str, into: int, out: int) -> str:
        weight, bias = self.weight(into, out, 3, 3), self.weight(out)
        self.consumers.append((weight, 0))
        return self.add("ConvTranspose", [x, weight, bias], pads=[1, 1, 1, 1])

    def integers(self, *values: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def norm(self, x: str, channels: int) -> str:
        scale = self.weight(channels)
        bias, mean = self.weight(channels), self.weight(channels)
        variance = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ones(channels, np.float32) * 1.5, variance))
        return self.add("BatchNormalization", [x, scale, bias, mean, variance])

    def gemm(self, x: str, into: int, out: int) -> str:
        weight, bias = self.weight(out, into), self.weight(out)
        self.consumers.append((weight, 1))
        return self.add("Gemm", [x, weight, bias], transB=1)

    def model(self, out: str, path: Path) -> Path:
        self.nodes.append(helper.make_node("Identity", [out], ["y"], name="last"))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", None])
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def grow(net: Net, steps: list[int]) -> tuple[str, int]:
    """A network of these steps; its last value [N, C, H, W] and C."""
    x, channels = net.conv("x", 3, 16), 16
    for step in steps:
        if step == 0:
            x, channels = net.add("Relu", [net.conv(x, channels, 24)]), 24
        elif step == 1:  # residual
            x = net.add("Add", [net.conv(net.add("Relu", [x]), channels, channels), x])
        elif step == 2:  # two branches side by side
            x, channels = net.add("Concat", [x, net.conv(x, channels, 8)], axis=1), channels + 8
        elif step == 3:  # depthwise and normalization
            x = net.norm(net.conv(x, channels, channels, group=channels), channels)
        elif step == 4:  # squeeze and excitation
            pooled = net.add("GlobalAveragePool", [x])
            x = net.add("Mul", [x, net.add("Sigmoid", [net.conv(pooled, channels, channels)])])
        elif step == 5:
            x = net.add("Clip", [net.norm(net.conv(x, channels, 16), 16)])
            channels = 16
        elif step == 6:  # channels apart and together again in another order
            x = shuffled(net, x, channels)
        elif step == 7:  # the same, added: channels of one value go together
            x = net.add("Add", [x, shuffled(net, x, channels)])
        elif step == 8:
            x, channels = net.deconv(x, channels, 12), 12
        elif step == 9:  # one map of attention for all channels
            x = net.add("Mul", [x, net.add("Sigmoid", [net.conv(x, channels, 1)])])
        elif step == 10:  # a wider image, and the middle of it
            wide = net.add("Pad", [x, net.integers(0, 0, 1, 1, 0, 0, 1, 1)])
            slope = net.weight(channels, 1, 1)
            x = net.add(
                "PRelu",
                [
                    net.add(
                        "Slice",
                        [wide, net.integers(1, 1), net.integers(-1, -1), net.integers(2, 3)],
                    ),
                    slope,
                ],
            )
        elif step == 11:
            x = net.add("InstanceNormalization", [x, net.weight(channels), net.weight(channels)])
    return x, channels


def shuffled(net: Net, x: str, channels: int) -> str:
    """The last channels first."""
    first, second = f"first{len(net.nodes)}", f"second{len(net.nodes)}"
    sizes = net.integers(8, channels - 8)
    net.nodes.append(helper.make_node("Split", [x, sizes], [first, second], axis=1))
    return net.add("Concat", [second, first], axis=1)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return backend("onnxruntime").load(path, {"graph_level": "disabled"}).run({"x": x})["y"]


def bench(path: Path) -> Bench:
    return Bench({}, (), (), 0, 0, lambda what: None)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(0, 11), max_size=6),
    flatten=st.booleans(),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_channels_that_nothing_listens_to_can_go_and_no_answer_changes(
    steps: list[int], flatten: bool, seed: int, data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("prune")
    net = Net(seed)
    x, channels = grow(net, steps)
    if flatten:
        x = net.gemm(
            net.add("Flatten", [net.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])]),
            channels * SIDE * SIDE // 4,
            5,
        )
    else:
        x = net.gemm(net.add("Flatten", [net.add("GlobalAveragePool", [x])]), channels, 5)
    path = net.model(x, folder / "net.onnx")
    model = onnx_door.load(path)
    found, weights = pruning.understand(model)
    # Only the last layer's channels are the model's own.
    assert set(found.frozen.values()) == {"it is an output of the model"}
    kept = {}
    for group in found.prunable:
        size = found.sizes[group]
        gone = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
        kept[group] = np.array([index for index in range(size) if index not in gone])
    # Deaf first: whoever reads a channel that goes gets zero weights for it.
    deaf = onnx_door.load(path)
    for one in found.cuts:
        if (one.weight, one.axis) not in net.consumers:
            continue
        stays = cutting.indices(one, found, kept)
        for item in deaf.graph.initializer:
            if item.name == one.weight:
                values = np.zeros_like(weights[one.weight])
                index = (slice(None),) * one.axis + (stays,)
                values[index] = numpy_helper.to_array(item)[index]
                item.CopyFrom(numpy_helper.from_array(values, item.name))
    onnx.save(deaf, folder / "deaf.onnx")
    cutting.cut(model, found, kept, weights)
    onnx_door.save(onnx_door.infer_shapes(model), folder / "cut.onnx")
    samples = np.random.Generator(np.random.PCG64(seed)).random(
        (2, 3, SIDE, SIDE), dtype=np.float32
    )
    want, got = run(folder / "deaf.onnx", samples), run(folder / "cut.onnx", samples)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_half_of_the_channels_make_a_quarter_of_the_work(tmp_path: Path) -> None:
    how = passes.decode({"use": "prune_channels", "ratio": 0.5}, "passes[0]")
    how.apply(MODEL, tmp_path / "half.onnx", bench(MODEL))
    before, after = work.macs(MODEL), work.macs(tmp_path / "half.onnx")
    assert before > 18e6
    assert 3.5 < before / after < 4.2
    x = np.zeros((3, 1, 28, 28), np.float32)
    answer = backend("onnxruntime").load(tmp_path / "half.onnx", {}).run({"input": x})
    assert answer["logits"].shape == (3, 10)


def test_the_model_s_outputs_keep_their_channels_and_shared_weights_stay(tmp_path: Path) -> None:
    net = Net(1)
    weight, bias = net.weight(16, 16, 3, 3), net.weight(16)
    first = net.conv("x", 3, 16)
    shared = [net.add("Conv", [first, weight, bias], pads=[1, 1, 1, 1])]
    shared.append(net.add("Conv", [shared[0], weight, bias], pads=[1, 1, 1, 1]))
    path = net.model(net.add("Flatten", [shared[1]]), tmp_path / "shared.onnx")
    found, _ = pruning.understand(onnx_door.load(path))
    assert found.prunable == ()
    assert any("shared" in reason or "output" in reason for reason in found.frozen.values())
    with pytest.raises(UsageError, match="no channel can go"):
        passes.decode({"use": "prune_channels"}, "p").apply(path, tmp_path / "x.onnx", bench(path))


def test_a_node_that_is_not_understood_freezes_what_reaches_it(tmp_path: Path) -> None:
    net = Net(2)
    x = net.add("Softmax", [net.conv("x", 3, 16)], axis=1)
    path = net.model(net.gemm(net.add("Flatten", [x]), 16 * SIDE * SIDE, 4), tmp_path / "s.onnx")
    found, _ = pruning.understand(onnx_door.load(path))
    assert found.prunable == ()
    assert "Softmax" in " ".join(found.frozen.values())


def test_a_sum_of_a_concatenation_and_one_convolution_splits_the_convolution(
    tmp_path: Path,
) -> None:
    net = Net(3)
    both = net.add("Concat", [net.conv("x", 3, 16), net.conv("x", 3, 24)], axis=1)
    total = net.add("Add", [both, net.conv("x", 3, 40)])
    pooled = net.add("Flatten", [net.add("GlobalAveragePool", [total])])
    path = net.model(net.gemm(pooled, 40, 5), tmp_path / "net.onnx")
    found, weights = pruning.understand(onnx_door.load(path))
    assert sorted(found.sizes[group] for group in found.prunable) == [16, 24]
    parts = sorted(
        (one.start, found.sizes[group])
        for group in found.prunable
        for one in found.made_by[group]
        if weights[one.weight].shape[one.axis] == 40
    )
    assert parts == [(0, 16), (16, 24)]


def test_a_value_that_a_subgraph_uses_keeps_its_channels(tmp_path: Path) -> None:
    net = Net(4)
    x = net.conv("x", 3, 16)
    inner = helper.make_graph(
        [helper.make_node("Relu", [x], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    net.weights.append(numpy_helper.from_array(np.array(True), "yes"))
    chosen = net.add("If", ["yes"], then_branch=inner, else_branch=inner)
    del chosen
    path = tmp_path / "if.onnx"
    model = net.model(net.gemm(net.add("Flatten", [x]), 16 * SIDE * SIDE, 4), path)
    found, _ = pruning.understand(onnx_door.load(model))
    assert found.prunable == ()
    assert any(reason.startswith("If ") for reason in found.frozen.values())


def test_sizes_that_an_export_computes_are_folded_first(tmp_path: Path) -> None:
    """`x.view(x.size(0), -1)` as torch exports it."""
    net = Net(5)
    x = net.conv("x", 3, 16)
    net.weights.append(numpy_helper.from_array(np.array(0), "first"))
    batch = net.add("Gather", [net.add("Shape", [x]), "first"], axis=0)
    one = net.add("Unsqueeze", [batch, net.integers(0)])
    target = net.add("Concat", [one, net.integers(-1)], axis=0)
    flat = net.add("Reshape", [x, target])
    path = net.model(net.gemm(flat, 16 * SIDE * SIDE, 4), tmp_path / "view.onnx")
    how = passes.decode({"use": "prune_channels", "ratio": 0.5}, "p")
    how.apply(path, tmp_path / "half.onnx", bench(path))
    assert work.macs(path) == 0  # not known, and not guessed
    assert work.macs(tmp_path / "half.onnx") == 8 * 3 * 9 * SIDE**2 + 8 * SIDE**2 * 4
    assert run(tmp_path / "half.onnx", np.zeros((3, 3, SIDE, SIDE), np.float32)).shape == (3, 4)


def test_weights_that_are_inputs_with_a_default_are_cut_with_their_declared_shape(
    tmp_path: Path,
) -> None:
    net = Net(6)
    x = net.add("Relu", [net.conv("x", 3, 16)])
    path = net.model(net.gemm(net.add("Flatten", [x]), 16 * SIDE * SIDE, 4), tmp_path / "old.onnx")
    model = onnx_door.load(path)
    for item in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        )
    model.ir_version = 3
    found, weights = pruning.understand(model)
    cutting.cut(model, found, {found.prunable[0]: np.arange(8)}, weights)
    onnx.checker.check_model(model, full_check=True)
    arrays = onnx_door.arrays(model)
    for info in model.graph.input[1:]:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        assert dims == list(arrays[info.name].shape)


def test_channels_that_calibration_never_lights_go_first(tmp_path: Path) -> None:
    """Large weights behind a bias that keeps them dark: only activations tell."""
    net = Net(7)
    x = net.add("Relu", [net.conv("x", 3, 16)])
    path = net.model(
        net.gemm(net.add("Flatten", [net.add("GlobalAveragePool", [x])]), 16, 4),
        tmp_path / "net.onnx",
    )
    model, dark = onnx_door.load(path), [1, 4, 5, 9, 10, 11, 14, 15]
    for item in model.graph.initializer[:2]:
        values = numpy_helper.to_array(item).copy()
        values[dark] = values[dark] * 50 if values.ndim > 1 else -1e6
        item.CopyFrom(numpy_helper.from_array(values, item.name))
    onnx.save(model, path)
    samples = net.rng.random((40, 3, SIDE, SIDE), dtype=np.float32)
    how = {"use": "prune_channels", "ratio": 0.5, "importance": "activations"}
    seen = bench(path)._replace(calibration={"x": samples})
    passes.decode(how, "p").apply(path, tmp_path / "half.onnx", seen)
    np.testing.assert_allclose(run(tmp_path / "half.onnx", samples), run(path, samples), atol=1e-5)
    passes.decode(how | {"importance": "weights"}, "p").apply(path, tmp_path / "w.onnx", seen)
    assert np.abs(run(tmp_path / "w.onnx", samples) - run(path, samples)).max() > 0.01
    with pytest.raises(UsageError, match="needs calibration samples"):
        passes.decode(how, "p").apply(path, tmp_path / "x.onnx", bench(path))


@given(size=st.integers(1, 300), share=st.floats(0, 0.99), multiple=st.integers(1, 64))
def test_what_is_kept_is_a_multiple_never_nothing_and_never_more(
    size: int, share: float, multiple: int
) -> None:
    count = choosing.kept_count(size, share, multiple)
    assert 1 <= count <= size
    assert count >= size - int(size * share) - 1
    if size >= 2 * multiple and count < size:
        assert count % multiple == 0


def test_thinned_weights_are_as_many_zeros_as_asked_and_the_largest_stay() -> None:
    from quantize.passes import pruning

    values = np.arange(1, 101, dtype=np.float32).reshape(10, 10) - 50.5
    thin = pruning.thinned(values, 0.3)
    assert (thin == 0).sum() == 30
    assert np.abs(values[thin == 0]).max() <= np.abs(thin[thin != 0]).min()


def test_a_channel_that_never_changes_is_compensated_for_by_the_next_bias(tmp_path: Path) -> None:
    """The largest channels of all, always the same: their bias alone speaks."""
    net = Net(8)
    x = net.add("Relu", [net.conv("x", 3, 16)])
    pooled = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    path = net.model(net.gemm(pooled, 16, 4), tmp_path / "net.onnx")
    model, still = onnx_door.load(path), [0, 2, 3, 6, 7, 8, 12, 13]
    for item in model.graph.initializer[:2]:
        values = numpy_helper.to_array(item).copy()
        values[still] = 0 if values.ndim > 1 else 30
        item.CopyFrom(numpy_helper.from_array(values, item.name))
    onnx.save(model, path)
    samples = net.rng.random((40, 3, SIDE, SIDE), dtype=np.float32)
    seen = bench(path)._replace(calibration={"x": samples})
    how = {"use": "prune_channels", "ratio": 0.5, "importance": "activations"}
    passes.decode(how, "p").apply(path, tmp_path / "half.onnx", seen)
    want = run(path, samples)
    np.testing.assert_allclose(run(tmp_path / "half.onnx", samples), want, atol=1e-3)
    passes.decode(how | {"compensate": False}, "p").apply(path, tmp_path / "lost.onnx", seen)
    assert np.abs(run(tmp_path / "lost.onnx", samples) - want).max() > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_are_sums_of_others_go_and_no_answer_changes(
    tmp_path: Path, bias: bool
) -> None:
    """Of 16 channels eight say what the others say, in parts: the weights behind take it on."""
    net = Net(9)
    x = net.conv("x", 3, 16)
    pooled = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    path = net.model(net.gemm(pooled, 16, 4), tmp_path / "net.onnx")
    model = onnx_door.load(path)
    mixed = net.rng.normal(size=(8, 8)).astype(np.float32)
    for item in model.graph.initializer[:2]:
        values = numpy_helper.to_array(item).copy()
        values[::2] = np.tensordot(mixed, values[1::2], 1)
        item.CopyFrom(numpy_helper.from_array(values, item.name))
    if not bias:
        del model.graph.node[-1].input[2:]
    onnx.save(model, path)
    samples = net.rng.random((60, 3, SIDE, SIDE), dtype=np.float32)
    seen = bench(path)._replace(calibration={"x": samples})
    how = {"use": "prune_channels", "ratio": 0.5, "importance": "activations"}
    passes.decode(how, "p").apply(path, tmp_path / "half.onnx", seen)
    want = run(path, samples)
    assert work.macs(tmp_path / "half.onnx") < 0.55 * work.macs(path)
    error = np.abs(run(tmp_path / "half.onnx", samples) - want).max()
    assert error < 0.02 * np.abs(want).max()
    passes.decode(how | {"compensate": False}, "p").apply(path, tmp_path / "lost.onnx", seen)
    assert np.abs(run(tmp_path / "lost.onnx", samples) - want).max() > 5 * error


@pytest.mark.parametrize(("axis", "block"), [(1, 1), (1, 6), (-1, 1)])
def test_what_is_seen_in_batches_is_what_is_seen_at_once(axis: int, block: int) -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    values = rng.normal(size=(50, 12) if block > 1 else (50, 12, 12)) + 3
    sums = Sums(axis, block)
    for part in np.array_split(values, 7):
        sums.add(part)
    seen = sums.seen()
    rows = np.moveaxis(values, axis, 0).reshape(12, -1)
    np.testing.assert_allclose(seen.mean, rows.mean(axis=1))
    np.testing.assert_allclose(seen.square, np.square(rows).mean(axis=1))
    centred = (rows - rows.mean(axis=1, keepdims=True)).reshape(12 // block, -1)
    np.testing.assert_allclose(seen.together, centred @ centred.T / centred.shape[1], atol=1e-9)


def test_of_two_channels_that_say_the_same_one_goes_first_and_the_other_last() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    values = rng.normal(size=(500, 6))
    values[:, 4] = 2 * values[:, 1]
    values[:, 3] *= 0.1
    sums = Sums(1, 1)
    sums.add(values)
    costs = going([Read(sums.seen(), np.ones(6), np.arange(6), constant=True)])
    order = np.argsort(costs)
    assert order[0] in (1, 4) and order[1] == 3
    assert costs[1 if order[0] == 4 else 4] > costs[3]


@given(size=st.integers(1, 300), share=st.floats(0, 0.99), multiple=st.integers(1, 64))
def test_rounds_end_where_one_cut_would(size: int, share: float, multiple: int) -> None:
    count = choosing.kept_count(size, share, multiple)
    steps = [choosing.partway(size, count, part / 5, multiple) for part in range(6)]
    assert steps[0] == size and steps[-1] == count
    assert steps == sorted(steps, reverse=True)


def test_half_of_the_channels_go_and_what_is_left_still_answers(tmp_path: Path) -> None:
    """Not trained again; by their weights alone the answers would be lost. Rounds cost no work."""
    rng = np.random.Generator(np.random.PCG64(1))
    x = rng.random((100, 1, 7, 7), dtype=np.float32).repeat(4, axis=2).repeat(4, axis=3)
    want, errors, counts = run_named(MODEL, x), [], []
    for more in ({"rounds": 1}, {"rounds": 2}, {"importance": "weights"}):
        how = {"use": "prune_channels", "ratio": 0.5, "importance": "activations"} | more
        out = tmp_path / "half.onnx"
        passes.decode(how, "p").apply(MODEL, out, bench(MODEL)._replace(calibration={"input": x}))
        errors.append(float(np.square(run_named(out, x) - want).mean() / want.var()))
        counts.append(work.macs(out))
    assert len(set(counts)) == 1
    assert max(errors[:2]) < 0.3 < errors[2]


def run_named(path: Path, x: np.ndarray) -> np.ndarray:
    return backend("onnxruntime").load(path, {}).run({"input": x})["logits"]


def test_a_run_tells_what_pruning_changed_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.Generator(np.random.PCG64(1)).random((80, 1, 28, 28), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    recipe = tmp_path / "prune.yaml"
    recipe.write_text(
        f"""
name: clothes
source: {MODEL}
data: {{path: data.npz}}
budgets: {{drop_max: 1, speedup_min: 0}}
variants:
  - {{name: fp32}}
  - {{name: zeros, passes: [{{use: prune_weights, ratio: 0.7}}]}}
  - {{name: thin, passes: [{{use: prune_channels, ratio: 0.5, importance: activations}}]}}
"""
    )
    assert cli.main(["run", str(recipe), "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["evaluated"]}
    fp32, thin, zeros = found["fp32"], found["thin"], found["zeros"]
    assert fp32["macs"] == zeros["macs"] == work.macs(MODEL)
    assert thin["macs"] * 3.5 < fp32["macs"]
    assert any("times fewer" in note for note in thin["notes"])
    assert any("runs are not faster" in note for note in zeros["notes"])
    # The same file size, but less to carry: nothing else of this backend replaces it.
    assert zeros["size_bytes"] > 0.97 * fp32["size_bytes"]
    assert zeros["packed_bytes"] < 0.7 * fp32["packed_bytes"]
    assert zeros["refusal"] == ""


@pytest.mark.skipif(not LITE0.exists(), reason="examples/efficientnet_lite0/build.py was not run")
def test_all_of_efficientnet_lite0_but_its_outputs_can_lose_channels(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "thin.onnx"
    how = passes.decode({"use": "prune_channels", "ratio": 0.3}, "p")
    how.apply(LITE0, out, bench(LITE0)._replace(say=said.append))
    assert "385.19 -> 219.21 million" in said[0]
    found, _ = pruning.understand(onnx_door.load(out))
    assert len(found.prunable) == 24 and len(found.sizes) == 25
    loaded = backend("onnxruntime").load(out, {})
    answer = loaded.run({"input": np.zeros((2, 3, 224, 224), np.float32)})["logits"]
    assert answer.shape == (2, 1000) and np.isfinite(answer).all()
