"""init, run, compare: the commands with a recipe, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import archive
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Tolerance
from edge_runtime.errors import EdgeError, StorageError
from quantize import cli, evaluating, packing, workflow, writing
from quantize import recipe as recipes
from tests.quantize.test_faults import network, pictures

MODEL = "colour.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data without labels: agreement with the float model judges."""
    path = tmp_path_factory.mktemp("project")
    (path / MODEL).write_bytes(network())
    np.savez(path / "data.npz", x=pictures(500, 1).inputs["image"])
    return path


def recipe(folder: Path, **changes: Any) -> Path:
    """A small one with an int8 variant; speed may be anything."""
    given = {
        "name": "colour",
        "source": MODEL,
        "data": {"path": "data.npz"},
        "evaluation": {"rounds": 3},
        "budgets": {"speedup_min": 0, "drop_max": 0.2},
        "variants": [{"name": "fp32"}, {"name": "int8", "passes": [{"use": "static_int8"}]}],
    }
    path = folder / "small.yaml"
    path.write_text(json.dumps(given | changes))
    return path


def test_init_writes_a_recipe_with_comments_that_run_understands(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "recipe.yaml"
    words = ["init", str(folder / MODEL), "--data", str(folder / "data.npz"), "--drop-max", "0.02"]
    assert cli.main([*words, "-o", str(out)]) == 0
    text = out.read_text()
    assert 'source: "colour.onnx"  # the model' in text
    loaded = recipes.load(out)
    assert loaded.source == str(folder / MODEL) and loaded.budgets.drop_max == 0.02
    assert {one.name for one in loaded.variants} >= {"fp32", "int8"}
    capsys.readouterr()
    assert cli.main(["run", str(out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] >= sum(one["seconds"] for one in plan["plan"]) > 0
    assert cli.main([*words, "-o", str(out)]) == 10  # never over what a person changed
    assert out.read_text() == text


def test_what_is_written_is_read_back_equal(folder: Path) -> None:
    given = recipes.load(recipe(folder))
    path = folder / "again.yaml"
    path.write_text(writing.text(given, folder))
    assert recipes.load(path) == given


def test_a_run_leaves_bundle_page_and_outcome_and_every_variant_was_served(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.bundle"
    words = ["run", str(recipe(folder)), "-o", str(out), "--report", str(tmp_path / "o.html")]
    assert cli.main([*words, "--out-json", str(tmp_path / "o.json")]) == 0
    assert "each served once" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.html", "o.json", "out.bundle"]
    with archive.open_bundle(out) as bundle:
        manifest = bundle.manifest
        assert [one.name for one in manifest.variants] == ["fp32", "int8"]
        assert len(manifest.goldens) == 6 and all(one.tolerance for one in manifest.variants)
        assert set(manifest.card) >= {"drift_baseline", "variants", "refused", "findings"}
        # A variant that does not answer as recorded is found by serving it.
        tight = tuple(
            msgspec.structs.replace(one, tolerance=Tolerance(0.0, 0.0)) for one in manifest.variants
        )
        goldens = tuple(
            msgspec.structs.replace(one, variant_outputs={}) for one in manifest.goldens
        )
        wrong = msgspec.structs.replace(manifest, variants=tight, goldens=goldens)
        kept = {sha256: bundle.blob(sha256) for sha256 in manifests.blobs(wrong)}
        archive.pack(archive.compose(wrong, kept), tmp_path / "wrong.bundle")
    with pytest.raises(EdgeError, match="golden") as caught:
        packing.prove(tmp_path / "wrong.bundle")
    assert "variant int8" in str(caught.value)


def test_goldens_are_the_hardest_and_the_surest_of_many_classes_each_once() -> None:
    answers = np.zeros((40, 4))
    for index in range(40):
        answers[index, index % 3] = 1.0 + index  # a sample is the surer the later
    chosen = packing.choose_goldens(answers, None, 8)
    assert len(set(chosen)) == 8
    assert set(chosen[:4]) == {0, 1, 2, 3}
    assert {index % 3 for index in chosen[4:]} == {0, 1, 2}
    assert sorted(packing.choose_goldens(answers[:3], None, 6)) == [0, 1, 2]


def test_nothing_but_the_float_model_is_exit_code_5_and_no_bundle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(folder, budgets={"size_bytes_max": 1, "speedup_min": 0, "drop_max": 0.5})
    out = tmp_path / "out.bundle"
    assert cli.main(["run", str(path), "-o", str(out), "--report", str(tmp_path / "o.html")]) == 5
    said = capsys.readouterr()
    assert "allowed are 1" in said.out and "nothing but the float model passed" in said.err
    assert not out.exists() and (tmp_path / "o.html").exists()


def test_a_state_whose_first_axis_is_no_batch_is_a_sample_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an LSTM: x [1, 4], state [2, 1, 4] -> y [1, 4], next [2, 1, 4]."""
    (tmp_path / "state.onnx").write_bytes(with_state())
    rng = np.random.Generator(np.random.PCG64(1))
    x, state = rng.random((200, 4), np.float32), rng.random((200, 2, 1, 4), np.float32)
    np.savez(tmp_path / "data.npz", x=x, state=state)
    path = recipe(
        tmp_path, source="state.onnx", evaluation={"metric": "cosine", "rounds": 3, "output": "y"}
    )
    path.write_text(path.read_text().replace("static_int8", "dynamic_int8"))
    assert cli.main(["run", str(path), "-o", str(tmp_path / "o.bundle"), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["evaluated"][1]["score"]["value"] > 0.99


def with_state() -> bytes:
    """y = x @ w + the mean of the state, next = state + y."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.Generator(np.random.PCG64(2)).normal(0, 1, (4, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["wide"]),
            helper.make_node("MatMul", ["wide", "back"], ["narrow"]),
            helper.make_node("ReduceMean", ["state"], ["mean"], axes=[0], keepdims=0),
            helper.make_node("Add", ["narrow", "mean"], ["y"]),
            helper.make_node("Add", ["state", "y"], ["next"]),
        ],
        "state",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 1, 4]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4]),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 1, 4]),
        ],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.ascontiguousarray(weights.T), "back"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def test_the_packed_size_of_a_large_file_is_estimated_from_pieces_spread_over_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model"
    rng = np.random.Generator(np.random.PCG64(1))
    half = evaluating.PACKED_BYTES_MAX
    data = bytes(half) + rng.bytes(half)  # one half packs to nothing, the other not at all
    path.write_bytes(data)
    assert evaluating.packed_size(path) == pytest.approx(half, rel=0.05)
    path.write_bytes(data[-1000:])
    assert evaluating.packed_size(path) > 900


def test_two_models_are_compared_on_the_same_samples(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(folder / MODEL), str(folder / MODEL)]
    assert cli.main(words) == 2  # no data
    capsys.readouterr()
    data = ["--data", str(folder / "data.npz"), "--samples", "100", "--json"]
    assert cli.main([*words, *data]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"]["drop"] == 0 and found["samples"] == 100
    assert found["first"]["size_bytes"] == found["second"]["size_bytes"]


def difference(is_swapped: bool) -> bytes:
    """first = a - b, second = b [N, 3]; swapped: the same, inputs and outputs in another order."""
    from onnx import TensorProto, helper

    def values(*names: str) -> list[Any]:
        ordered = reversed(names) if is_swapped else names
        return [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["N", 3]) for one in ordered]

    nodes = [
        helper.make_node("Sub", ["a", "b"], ["first"]),
        helper.make_node("Identity", ["b"], ["second"]),
    ]
    graph = helper.make_graph(nodes, "g", values("a", "b"), values("first", "second"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def test_models_with_tensors_in_another_order_are_compared_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for path, is_swapped in zip(paths, (False, True), strict=True):
        path.write_bytes(difference(is_swapped))
    rng = np.random.Generator(np.random.PCG64(0))
    np.savez(tmp_path / "d.npz", **{name: rng.random((50, 3), np.float32) for name in ("a", "b")})
    words = ["compare", *map(str, paths), "--data", str(tmp_path / "d.npz"), "--metric", "mse"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"]["drop"] == found["loss"]["bound"] == 0
    assert any("only output 'first'" in note for note in found["notes"])


@pytest.mark.parametrize("option", ["-o", "--report", "--out-json"])
def test_a_place_where_nothing_can_be_written_is_told_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    words = ["run", str(recipe(folder)), option]
    assert cli.main([*words, str(tmp_path / "none" / "x")]) == 9
    assert cli.main([*words, str(tmp_path)]) == 9
    said = capsys.readouterr()
    assert "there is no folder" in said.err and "is a folder" in said.err and not said.out


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        (
            {"evaluation": {"metric": "top11"}},
            "evaluation.metric",
            "one of agreement, auto, callable, cosine",
        ),
        ({"export": {"batch": "two"}}, "export.batch", "one of auto, free, one"),
        ({"also": {"onnx": "m"}}, "also", "one of tflite"),
        (
            {"variants": [{"name": "a", "backend": "opnvino"}]},
            "].backend",
            "did you mean 'openvino'",
        ),
        (
            {"variants": [{"name": "a", "options": {"thread": 1}}]},
            "].options.thread",
            "did you mean 'threads'",
        ),
        (
            {"variants": [{"name": "a", "passes": [{"use": "static_int8", "method": "msee"}]}]},
            "passes[0].method",
            "one of entropy, minmax, mse, percentile",
        ),
    ],
)
def test_a_typo_in_a_recipe_is_found_before_any_work_and_the_choices_are_named(
    folder: Path, changes: dict[str, Any], where: str, says: str
) -> None:
    with pytest.raises(EdgeError) as caught:
        workflow.prepare(recipes.load(recipe(folder, **changes)))
    error = caught.value
    assert where in error.where and says in f"{error.expected} {error.remedy}"


def test_what_was_measured_is_kept_when_the_bundle_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space left on device", where="the bundle")

    monkeypatch.setattr(packing, "pack", full)
    kept = folder / "kept.json"
    words = ["run", str(recipe(folder)), "-o", str(folder / "o.bundle"), "--out-json", str(kept)]
    assert cli.main(words) == StorageError.exit_code
    said = capsys.readouterr()
    assert "no space left" in said.err and "shipped" in said.out
    assert json.loads(kept.read_text())["name"] == "colour"
