"""Bundles from real models with the real onnxruntime: what is derived, recorded and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_runtime import tensors
from edge_runtime.backends import reference
from edge_runtime.bundle import archive, create
from edge_runtime.bundle.create import Created, Options
from edge_runtime.bundle.describe import describe
from edge_runtime.bundle.manifest import Manifest, Postprocess, Preprocess
from edge_runtime.errors import BackendError, BundleError, EdgeError, NotFoundError, UsageError
from tests.bundle.conftest import (
    CLASSES,
    WIDTH,
    linear,
    linear_int8,
    load_with_backend,
    model_of,
    saved,
    weights,
)

FLOAT = TensorProto.FLOAT


@pytest.fixture
def make(tmp_path):
    """Create a bundle of models; without a name they are called a.onnx, b.onnx, ..."""

    def run(*models: Any, load: Any = load_with_backend, **options: Any) -> Created:
        paths = [
            model if isinstance(model, Path) else saved(model, tmp_path / f"{chr(97 + i)}.onnx")
            for i, model in enumerate(models)
        ]
        settings = Options(**{"name": "tiny", **options})
        return create.create(paths, settings, tmp_path / "out.bundle", load and load())

    return run


def golden_array(path: Path, tensor: Any) -> np.ndarray[Any, Any]:
    with archive.open_bundle(path) as bundle:
        data = bundle.read(tensor.blob.sha256)
    return tensors.from_bytes(data, tensor.datatype, tensor.shape)


def test_the_manifest_is_derived_from_the_model(make, tmp_path):
    made = make(linear(), label="1.0", version=7)
    manifest = made.manifest
    assert (manifest.name, manifest.version, manifest.label) == ("tiny", 7, "1.0")
    assert [(s.name, s.datatype, s.shape) for s in manifest.inputs] == [
        ("input", "FP32", (-1, WIDTH))
    ]
    assert [(s.name, s.datatype, s.shape) for s in manifest.outputs] == [
        ("output", "FP32", (-1, CLASSES))
    ]
    assert manifest.batch_axis == 0
    assert [(v.name, v.backend, v.precision) for v in manifest.variants] == [
        ("fp32", "onnxruntime", "fp32")
    ]
    assert manifest.provenance["models"][0]["producer"] == "tests"
    assert len(manifest.goldens) == create.GOLDENS_DEFAULT
    with archive.open_bundle(tmp_path / "out.bundle") as bundle:
        bundle.verify()
        assert bundle.manifest == manifest
        json.dumps(describe(bundle))


def test_goldens_hold_what_the_model_answers(make, tmp_path):
    manifest = make(linear()).manifest
    for golden in manifest.goldens:
        given = golden_array(tmp_path / "out.bundle", golden.inputs[0])
        got = golden_array(tmp_path / "out.bundle", golden.outputs[0])
        np.testing.assert_allclose(got, given @ weights(), rtol=1e-5, atol=1e-6)
    inputs = {golden.inputs[0].blob.sha256 for golden in manifest.goldens}
    assert len(inputs) == len(manifest.goldens)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(make, tmp_path):
    first = make(linear(), linear_int8(), seed=5)
    data = (tmp_path / "out.bundle").read_bytes()
    assert make(linear(), linear_int8(), seed=5).sha256 == first.sha256
    assert (tmp_path / "out.bundle").read_bytes() == data
    assert make(linear(), linear_int8(), seed=6).sha256 != first.sha256


def test_an_int8_variant_has_its_own_goldens_and_a_tolerance_from_its_scale(make, tmp_path):
    made = make(linear(), linear_int8(0.05))
    full, int8 = made.manifest.variants
    assert (full.name, int8.name, int8.precision) == ("fp32", "int8", "int8")
    assert int8.tolerance.rtol == 0
    assert int8.tolerance.atol == pytest.approx(0.1)  # two steps of the output
    assert full.tolerance.atol < 1e-3
    golden = made.manifest.goldens[0]
    path = tmp_path / "out.bundle"
    own = golden_array(path, golden.expected("int8")[0])
    reference_answer = golden_array(path, golden.expected("fp32")[0])
    assert 0 < np.abs(own - reference_answer).max() < 0.1
    assert any("int8 lies at most" in note for note in made.notes)


def test_a_tolerance_too_wide_to_notice_anything_is_told(make):
    made = make(linear(), linear_int8(output_scale=4.0))
    assert any("notices little" in note for note in made.notes)


def test_variants_of_one_precision_are_named_by_their_files(make, tmp_path):
    paths = [
        saved(linear(seed), tmp_path / name)
        for seed, name in enumerate(("Model A.onnx", "b.onnx", "model-a.onnx"))
    ]
    names = [variant.name for variant in make(*paths).manifest.variants]
    assert names == ["model-a", "b", "model-a-2"]


def test_models_with_other_inputs_are_no_variants(make):
    other = model_of(
        [helper.make_node("Relu", ["input"], ["output"])],
        {},
        {"input": (FLOAT, ["N", 5])},
        {"output": (FLOAT, ["N", 5])},
    )
    with pytest.raises(BundleError, match=r"has other inputs than a\.onnx") as caught:
        make(linear(), other)
    assert caught.value.where.endswith("b.onnx")


# --- batch axis ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "output_batch", "tried", "trusted"),
    [
        ("N", "N", 0, 0),
        ("N", "M", 0, None),  # exporters that lose the name: only a trial can tell
        (None, None, 0, None),
        (1, 1, None, None),
    ],
)
def test_the_batch_axis_is_found_by_name_or_by_trial(make, batch, output_batch, tried, trusted):
    model = linear(batch=batch, output_batch=output_batch)
    assert make(model).manifest.batch_axis == tried
    assert make(model, load=None).manifest.batch_axis == trusted


def test_rows_that_influence_each_other_are_no_batch(make):
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["input", "mean"], ["output"]),
    ]
    made = make(model_of(nodes, {}, None, {"output": (FLOAT, ["N", WIDTH])}))
    assert made.manifest.batch_axis is None
    assert any("no batch axis" in note for note in made.notes)


def test_a_size_fixed_inside_the_model_is_no_batch(make):
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"])]
    model = model_of(
        nodes, {"shape": np.int64([1, WIDTH])}, None, {"output": (FLOAT, ["N", WIDTH])}
    )
    assert make(model).manifest.batch_axis is None


def test_an_output_that_does_not_grow_with_the_batch_is_no_batch(make):
    nodes = [helper.make_node("Identity", ["w"], ["output"])]
    assert make(model_of(nodes, {"w": weights()[:1]})).manifest.batch_axis is None


def test_one_golden_is_enough_to_try_the_batch(make):
    assert make(linear(), goldens=1).manifest.batch_axis == 0


# --- inputs --------------------------------------------------------------------------------------


def identity(kind: int, shape: list[Any]) -> Any:
    return model_of(
        [helper.make_node("Identity", ["input"], ["output"])],
        {},
        {"input": (kind, shape)},
        {"output": (kind, shape)},
    )


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "FP64", "INT8", "UINT8", "INT64", "BOOL"])
def test_inputs_are_made_up_for_every_common_datatype(make, tmp_path, datatype):
    kinds = {"FP32": 1, "FP16": 10, "FP64": 11, "INT8": 3, "UINT8": 2, "INT64": 7, "BOOL": 9}
    manifest = make(identity(kinds[datatype], ["N", 3])).manifest
    golden = manifest.goldens[0]
    assert golden.inputs[0].datatype == golden.outputs[0].datatype == datatype
    assert golden.inputs[0].blob == golden.outputs[0].blob  # each content once


def test_free_sizes_get_a_default_or_what_the_user_says(make):
    model = identity(FLOAT, ["N", "time", 2])
    assert make(model).manifest.goldens[0].inputs[0].shape == (1, create.FREE_SIZE, 2)
    given = make(model, shapes={"input": (1, 7, 2)}).manifest
    assert given.goldens[0].inputs[0].shape == (1, 7, 2)
    with pytest.raises(UsageError, match="does not fit"):
        make(model, shapes={"input": (1, 7, 3)})
    with pytest.raises(UsageError, match="no input 'z'"):
        make(model, shapes={"z": (1,)})


def test_text_inputs_need_samples(make, tmp_path):
    model = identity(TensorProto.STRING, ["N", 1])
    with pytest.raises(UsageError, match="BYTES"):
        make(model)
    samples = tmp_path / "text.npz"
    np.savez(samples, input=np.array([["a"], ["bcd"]]))
    assert make(model, goldens=0).manifest.goldens == ()
    golden = make(model, samples=samples).manifest.goldens[1]
    assert golden.inputs[0].blob.size == 4 + 3


def test_samples_become_golden_inputs(make, tmp_path):
    rows = np.arange(5 * WIDTH, dtype=np.float32).reshape(5, WIDTH)
    np.savez(tmp_path / "named.npz", input=rows)
    np.save(tmp_path / "plain.npy", rows)
    for name in ("named.npz", "plain.npy"):
        manifest = make(linear(), samples=tmp_path / name, goldens=4).manifest
        assert len(manifest.goldens) == 4
        second = golden_array(tmp_path / "out.bundle", manifest.goldens[1].inputs[0])
        np.testing.assert_array_equal(second, rows[1:2])
        assert manifest.batch_axis == 0
    assert len(make(linear(), samples=tmp_path / "plain.npy", goldens=9).manifest.goldens) == 5


def test_samples_of_models_without_a_batch_are_stacked(make, tmp_path):
    rows = np.ones((2, 3, 4), np.float32)
    np.save(tmp_path / "x.npy", rows)
    made = make(identity(FLOAT, [3, 4]), samples=tmp_path / "x.npy").manifest
    assert [golden.inputs[0].shape for golden in made.goldens] == [(3, 4), (3, 4)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": np.zeros((2, WIDTH))}, "samples for 'input' are FP64"),
        ({"input": np.zeros((2, 5), np.float32)}, "samples for 'input' are FP32"),
        ({"input": np.zeros((0, WIDTH), np.float32)}, "or none"),
        ({"a": np.zeros(1), "b": np.zeros(1)}, "an array for each of input"),
        ({"input": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_samples_that_do_not_fit_are_refused(make, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BundleError, match=message):
        make(linear(), samples=tmp_path / "bad.npz")


def test_samples_that_are_no_arrays_are_refused(make, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"hello")
    for path in (tmp_path / "bad.npz", tmp_path / "missing.npz"):
        with pytest.raises(BundleError, match="cannot be read"):
            make(linear(), samples=path)


# --- refusals ------------------------------------------------------------------------------------


def test_lint_comes_before_the_loader(make):
    model = linear()
    model.graph.node.append(helper.make_node("Evil", ["input"], ["z"], domain="evil"))

    def never(variant, path):
        raise AssertionError("loaded")

    with pytest.raises(BundleError, match="evil::Evil"):
        make(model, load=lambda: never)


def test_a_wrong_name_is_told_before_the_model_is_loaded(make):
    def never(variant, path):
        raise AssertionError("loaded")

    with pytest.raises(BundleError, match="is not a name"):
        make(linear(), name="Tiny Model", load=lambda: never)


def test_a_random_model_cannot_have_goldens(make):
    node = helper.make_node("RandomUniformLike", ["input"], ["output"])
    model = model_of([node], {}, None, {"output": (FLOAT, ["N", WIDTH])})
    with pytest.raises(BundleError, match="differs from run to run"):
        make(model)
    assert make(model, goldens=0).manifest.goldens == ()


def test_an_answer_that_is_not_finite_cannot_be_a_golden(make):
    nodes = [helper.make_node("Div", ["input", "zero"], ["output"])]
    model = model_of(nodes, {"zero": np.float32(0)}, None, {"output": (FLOAT, ["N", WIDTH])})
    with pytest.raises(BundleError, match="not finite"):
        make(model)


def test_a_model_that_does_not_run_says_where_and_what_to_do(make):
    node = helper.make_node("Gather", ["table", "input"], ["output"])
    model = model_of(
        [node],
        {"table": np.zeros((1, 2), np.float32)},
        {"input": (TensorProto.INT64, ["N"])},
        {"output": (FLOAT, ["N", 2])},
    )
    with pytest.raises(EdgeError) as caught:
        make(model)  # index 1 is outside the table
    assert "--samples" in caught.value.remedy


def test_a_model_that_does_not_load_is_the_backends_error(make):
    model = model_of([helper.make_node("NoSuchOperator", ["input"], ["output"])], {})
    with pytest.raises(BackendError):
        make(model)


def test_what_a_manifest_cannot_say_is_refused(make):
    unranked = linear()
    unranked.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(BundleError, match="how many dimensions"):
        make(unranked)
    with pytest.raises(BundleError, match="no name for"):
        make(identity(TensorProto.COMPLEX64, ["N"]))
    sequence = linear()
    value = helper.make_tensor_sequence_value_info("output", FLOAT, None)
    sequence.graph.output[0].CopyFrom(value)
    with pytest.raises(BundleError, match="is a sequence"):
        make(sequence)


def test_missing_files_and_no_models_are_refused(make, tmp_path):
    with pytest.raises(NotFoundError):
        make(tmp_path / "missing.onnx")
    with pytest.raises(UsageError):
        make()
    (tmp_path / "x.tflite").write_bytes((8).to_bytes(4, "little") + b"TFL3" + bytes(100))
    with pytest.raises(BundleError, match="not a TFLite model"):
        make(tmp_path / "x.tflite")


def test_a_failed_creation_leaves_no_file(make, tmp_path):
    with pytest.raises(BundleError):
        make(linear(), postprocess=Postprocess(output="nothing"))
    assert list(tmp_path.glob("*.bundle")) == []


# --- the rest ------------------------------------------------------------------------------------


def test_image_sizes_come_from_the_input(make):
    model = identity(FLOAT, ["N", 3, 8, 6])
    manifest = make(model, preprocess=Preprocess(mean=(0.5,))).manifest
    step = manifest.preprocess
    assert step is not None
    assert (step.input, step.width, step.height) == ("input", 6, 8)


def test_a_reference_model_makes_a_bundle_too(make, tmp_path):
    path = tmp_path / "tiny.reference.json"
    path.write_text(json.dumps(reference.tiny()))
    manifest = make(path).manifest
    assert manifest.variants[0].backend == "reference"
    assert manifest.batch_axis == 0
    assert len(manifest.goldens) == create.GOLDENS_DEFAULT


@pytest.mark.parametrize(
    ("make_model", "precision"),
    [
        (linear, "fp32"),
        (linear_int8, "int8"),
        (lambda: model_of([], {"w": weights().astype(np.float16)}), "fp16"),
        (lambda: model_of([], {"w": weights().astype(np.float64)}), "fp64"),
        (lambda: model_of([helper.make_node("QLinearConv", [], ["output"])], {}), "int8"),
        (lambda: model_of([helper.make_node("MatMulNBits", [], ["output"])], {}), "int4"),
        (lambda: model_of([], {}), "fp32"),
    ],
)
def test_precision_is_guessed_from_weights_and_operators(make_model, precision):
    from edge_runtime.bundle import onnx_graph, source

    graph = onnx_graph.read(source.from_bytes(make_model().SerializeToString()))
    assert create.guess_precision(graph) == precision


def test_tolerances_follow_precision_scale_and_deviation():
    limit = create.tolerance("fp32", 20.0, 30.0, 0.0, 0.0)
    assert (limit.rtol, limit.atol) == (1e-3, pytest.approx(2e-4))
    assert create.tolerance("fp32", 0.1, 0.1, 0.0, 0.0).atol == 1e-4
    assert create.tolerance("int8", 9.0, 10.0, 0.05, 0.3).atol == pytest.approx(0.3)
    assert create.tolerance("int8", 9.0, 10.0, 0.05, 0.01).atol == pytest.approx(0.1)
    assert create.tolerance("int8", 9.0, 10.0, 0.0, 0.0).atol == pytest.approx(0.2)
    assert create.tolerance("int8", 0.0, 0.0, 0.0, 0.0).atol == 1e-4


def test_integer_outputs_do_not_widen_the_tolerance(make):
    def with_class(model):
        model.graph.node.append(helper.make_node("ArgMax", ["output"], ["class"], axis=1))
        model.graph.output.append(
            helper.make_tensor_value_info("class", TensorProto.INT64, ["N", 1])
        )
        return model

    manifest: Manifest = make(with_class(linear()), with_class(linear_int8())).manifest
    assert all(variant.tolerance.atol < 1 for variant in manifest.variants)


def test_another_way_to_compute_stays_within_the_tolerance_and_a_wrong_answer_does_not(
    make, tmp_path
):
    manifest = make(linear(), linear_int8()).manifest
    for variant in manifest.variants:
        path = tmp_path / variant.artifact.filename
        plain = msgspec.structs.replace(variant, options={"graph_level": "disabled"})
        run = load_with_backend()(plain, path)
        for golden in manifest.goldens:
            given = golden_array(tmp_path / "out.bundle", golden.inputs[0])
            want = golden_array(tmp_path / "out.bundle", golden.expected(variant.name)[0])
            limit = variant.tolerance.atol + variant.tolerance.rtol * np.abs(want)
            assert (np.abs(run({"input": given})["output"] - want) <= limit).all()
            assert not (np.abs(np.roll(want, 1) - want) <= limit).all()
