"""Planted faults in calibration data of a real model: each is caught and named, clean data pass.

Fashion-MNIST where it is installed; colour pictures and a small network of ours elsewhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend
from quantize import building, checks, datasets, models, observing, scratch, verdict, workflow
from quantize.datasets import Dataset, Split
from quantize.models import ModelFile
from quantize.observing import Observed
from quantize.recipe import Data, Evaluation, Recipe, Variant

Array = np.ndarray[Any, Any]

EXAMPLE = Path("examples/fashion_mnist").resolve()
DATA = Path("/usr/share/datasets/fashion-mnist")
CALIBRATED = 128


def part(name: str, count: int) -> Dataset:
    spec = importlib.util.spec_from_file_location("fashion_data", EXAMPLE / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, labels = module.load(name)
    return Dataset(
        {"input": module.to_input(images[:count])}, labels[:count].astype(np.int64), name
    )


def answers(source: ModelFile, data: Dataset) -> dict[str, Array]:
    run = backend("onnxruntime").load(source.path, {}).run
    parts = [run(feed) for feed in datasets.batches(data.inputs, 250, source.inputs)]
    return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def look(
    source: ModelFile, calibration: Dataset, evaluation: Dataset, folder: Path, **options: Any
) -> Observed:
    """What a run with one int8 variant would say of its data."""
    variant = Variant("int8", passes=({"use": "clean"}, {"use": "static_int8", **options}))
    (chain,) = building.chains([variant], source)
    kept = scratch.Scratch(folder)
    built = building.build(chain, source, calibration, 0, kept, lambda what: None)
    assert built.refusal == ""
    split = Split(calibration, evaluation)
    given = answers(source, evaluation)
    output = source.outputs[0].name
    return observing.observe(source, split, [built], given, output, lambda what: None)


def faults(observed: Observed) -> list[str]:
    return [one.fault for one in observed.findings]


# --- the real data set and the shipped network ----------------------------------------------------


@pytest.fixture(scope="module")
def source() -> ModelFile:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing: apt-get install dataset-fashion-mnist")
    return models.read(EXAMPLE / "fp32.onnx")


@pytest.fixture(scope="module")
def train(source: ModelFile) -> Dataset:
    return part("train", 2000)


@pytest.fixture(scope="module")
def test(source: ModelFile) -> Dataset:
    return part("t10k", 600)


def test_clean_data_raise_no_alarm(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    clean = train.take(np.arange(CALIBRATED))
    found = look(source, clean, test, tmp_path)
    assert found.findings == ()
    assert {one.name for one in found.activations} >= {"input"}
    assert all(one.clippings["int8"].evaluation < 0.001 for one in found.activations)
    found = look(source, clean, test, tmp_path, method="percentile")
    assert found.findings == ()


def test_clipped_ranges_are_named_with_their_tensors(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    clean = train.take(np.arange(CALIBRATED))
    found = look(source, clean, test, tmp_path, method="percentile", percentile=95.0)
    assert faults(found) == [checks.CLIPPED]
    assert "% of values outside" in found.findings[0].text


def test_eight_samples_are_named_as_too_few(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    found = look(source, train.take(np.arange(8)), test, tmp_path)
    assert faults(found) == [checks.TRUNCATED]


def test_a_calibration_set_cut_to_one_class_is_named_with_labels_and_without(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    assert train.labels is not None
    trousers = train.take(np.flatnonzero(train.labels == 1)[:CALIBRATED])
    for one in (trousers, Dataset(trousers.inputs, None, "no labels")):
        found = look(source, one, test, tmp_path)
        assert set(faults(found)) == {checks.TRUNCATED}
        assert "of 10 classes are missing" in found.findings[-1].text


def test_pixels_of_0_to_255_are_named_as_another_scale_and_nothing_else(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    clean = train.take(np.arange(CALIBRATED))
    other = Dataset({"input": clean.inputs["input"] * np.float32(255)}, clean.labels, "255")
    assert faults(look(source, other, test, tmp_path)) == [checks.SCALE]


def test_labels_one_off_are_named(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    assert test.labels is not None
    off = Dataset(test.inputs, (test.labels + 1) % 10, "off")
    found = look(source, train.take(np.arange(CALIBRATED)), off, tmp_path)
    assert checks.LABELS in faults(found)


def test_a_run_refuses_the_variant_with_the_fault_as_its_likely_cause(
    source: ModelFile, train: Dataset, test: Dataset, tmp_path: Path
) -> None:
    """The whole way: a recipe with the fault in its calibration file, served and judged."""
    assert train.labels is not None and test.labels is not None
    clean = train.inputs["input"][:CALIBRATED] * np.float32(255)
    np.savez(tmp_path / "cal.npz", x=clean, y=train.labels[:CALIBRATED])
    np.savez(tmp_path / "test.npz", x=test.inputs["input"], y=test.labels)
    recipe = Recipe(
        "fashion",
        str(source.path),
        Data(str(tmp_path / "test.npz"), str(tmp_path / "cal.npz")),
        evaluation=Evaluation(rounds=3),
        variants=(Variant("fp32"), Variant("int8", passes=({"use": "static_int8"},))),
    )
    out = tmp_path / "out.bundle"
    done = workflow.run(workflow.prepare(recipe), tmp_path / "work", out, lambda what: None)
    refusal = done.outcome.of("int8").refusal
    assert refusal.startswith(verdict.WORSE) and "likely because of scale:" in refusal
    assert not done.outcome.has_gain and not out.exists()


# --- pictures with three channels and a small network of ours -------------------------------------


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("model") / "colour.onnx"
    path.write_bytes(network())
    return models.read(path)


def test_swapped_channels_in_the_calibration_set_are_named(
    colour: ModelFile, tmp_path: Path
) -> None:
    mine, test = pictures(120, 1), pictures(300, 2)
    assert faults(look(colour, mine, test, tmp_path)) == []
    swapped = Dataset({"image": mine.inputs["image"][:, ::-1].copy()}, None, "BGR")
    found = look(colour, swapped, test, tmp_path)
    assert faults(found)[0] == checks.CHANNEL_ORDER
    assert checks.reason(found.findings, "int8").startswith("channel-order: ")


def test_integer_operators_say_the_same_ranges_as_pairs(tmp_path: Path) -> None:
    """The Relu behind a convolution is gone in both; it must not look like clipping."""
    source = models.read(EXAMPLE / "fp32.onnx")
    noise = np.random.Generator(np.random.PCG64(3)).random((120, 1, 28, 28), dtype=np.float32)
    mine, test = (
        Dataset({"input": noise[:60]}, None, "a"),
        Dataset({"input": noise[60:]}, None, "b"),
    )
    seen = {}
    for kind in ("qdq", "qoperator"):
        found = look(source, mine, test, tmp_path, format=kind)
        assert faults(found) == []
        seen[kind] = {one.name: one.clippings["int8"] for one in found.activations}
    common = seen["qdq"].keys() & seen["qoperator"].keys()
    assert len(common) >= 5 and all(seen["qdq"][one] == seen["qoperator"][one] for one in common)


def test_a_range_before_a_clip_is_not_clipped_by_what_the_clip_cuts_off_itself(
    tmp_path: Path,
) -> None:
    """With signed activations the Clip stays, and the range before it is that of its output."""
    (tmp_path / "net.onnx").write_bytes(network(most=1.0))
    limited = models.read(tmp_path / "net.onnx")
    mine, test = pictures(64, 1), pictures(64, 2)
    signed = {"activations": "s8", "symmetric_activations": True}
    assert faults(look(limited, mine, test, tmp_path, **signed)) == []
    low = {"method": "percentile", "percentile": 60.0}
    assert faults(look(limited, mine, test, tmp_path, **signed, **low)) == [checks.CLIPPED]


def test_histograms_take_a_calibration_set_that_is_no_multiple_of_the_batch(
    colour: ModelFile, tmp_path: Path
) -> None:
    found = look(colour, pictures(76, 1), pictures(100, 2), tmp_path, method="percentile")
    assert len(found.activations) > 2


def test_float16_is_a_graph_in_order_that_runs(colour: ModelFile, tmp_path: Path) -> None:
    variant = Variant("float16", passes=({"use": "float16"},))
    (chain,) = building.chains([variant], colour)
    data = pictures(8, 1)
    built = building.build(chain, colour, data, 0, scratch.Scratch(tmp_path), lambda what: None)
    assert built.refusal == "" and built.path is not None and built.precision == "fp16"
    mine, want = answers(models.read(built.path), data), answers(colour, data)
    assert np.allclose(mine["scores"], want["scores"], atol=0.05)


def pictures(count: int, seed: int) -> Dataset:
    rng = np.random.Generator(np.random.PCG64(seed))
    light = rng.random((count, 1, 4, 4), dtype=np.float32).repeat(4, axis=2).repeat(4, axis=3)
    cast = np.array([0.9, 0.75, 0.6]) + rng.normal(0, 0.08, (count, 3))
    image = np.clip(light * cast[:, :, None, None], 0, 1).astype(np.float32)
    return Dataset({"image": image}, None, "pictures")


def network(most: float = 0.0) -> bytes:
    """Conv, Relu (or Clip from 0 to `most`), mean, Gemm over [N, 3, 16, 16], weights by seed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.Generator(np.random.PCG64(7))
    weights = {
        "w": rng.normal(0, 0.4, (128, 3, 3, 3)),
        "b": rng.normal(0, 0.1, 128),
        "w2": rng.normal(0, 0.5, (128, 5)),
    }
    if most:
        weights |= {"zero": np.array(0.0), "most": np.array(most)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w", "b"], ["c"], "conv"),
            helper.make_node("Clip", ["c", "zero", "most"], ["r"], "limit")
            if most
            else helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("MatMul", ["f", "w2"], ["scores"], "product"),
        ],
        "colour",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
