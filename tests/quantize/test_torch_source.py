"""A torch module as a source: exported once, compared with torch's own answers, then a file.

Needs torch and onnxscript (the extra quantize-torch), the .tflite also litert-torch
(quantize-torch-litert); skipped by name without them.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.bundle import archive
from edge_runtime.errors import EdgeError, ModelError, UsageError
from quantize import cli, models, onnx_door, origins, torch_modules, torch_programs
from quantize.recipe import Data, Export, Recipe, Variant

torch = pytest.importorskip("torch", reason="torch is not installed (extra quantize-torch)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra quantize-torch)")

from tests.quantize import nets  # noqa: E402

NETS = "tests.quantize.nets"
litert_torch = pytest.mark.skipif(
    not origins.tflite_is_possible(),
    reason="litert-torch is not installed (extra quantize-torch-litert)",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.Generator(np.random.PCG64(3))
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    x = rng.random((300, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        torch.manual_seed(0)
        y = nets.small()(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(path, x=x, y=y)
    return path


def recipe(function: str, data: Path, how: Export | None = None, *backends: str) -> Recipe:
    return Recipe(
        "net",
        f"{NETS}:{function}" if "/" not in function else function,
        Data(str(data)),
        export=how or Export(),
        variants=tuple(Variant(f"float-{one}", one) for one in backends),
    )


def test_a_function_becomes_an_onnx_file_with_clean_names_that_answers_like_torch(
    data: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("small", data), tmp_path)
    file = origins.read(made)
    assert [(one.name, one.shape) for one in file.inputs] == [("image", (-1, 1, 8, 8))]
    assert [(one.name, one.shape) for one in file.outputs] == [("output", (-1, 4))]
    assert "torch" in file.traits and file.module == f"{NETS}:small"
    assert made.origin is not None and made.origin.differences["onnx"] < 1e-5
    x = np.load(data)["x"][:5]
    torch.manual_seed(0)  # as for every source: the same weights
    with torch.no_grad():
        want = nets.small()(torch.from_numpy(x)).numpy()
    have = backend("onnxruntime").load(file.path, {}).run({"image": x})["output"]
    np.testing.assert_allclose(have, want, atol=1e-5)
    graph = onnx_door.load(file.path).graph
    assert str(Path(nets.__file__).parent).encode() not in file.path.read_bytes()
    assert {node.op_type for node in graph.node} & {"Dropout"} == set()


def test_the_same_module_is_exported_once_and_other_weights_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = origins.export(recipe("small", data), tmp_path)
    stamp = Path(first.source).stat().st_mtime_ns
    again = origins.export(recipe("small", data), tmp_path)
    assert again == first and Path(first.source).stat().st_mtime_ns == stamp

    def other() -> torch.nn.Module:
        module = nets.Small().eval()
        module.last.bias.data.fill_(1.0)
        return module

    monkeypatch.setattr(nets, "small", other)
    assert origins.export(recipe("small", data), tmp_path).source != first.source


def test_modules_that_only_an_attribute_tells_apart_are_exported_each(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.load(data)["x"][:3]

    def answer(made: Recipe) -> np.ndarray:
        return backend("onnxruntime").load(Path(made.source), {}).run({"image": x})["output"]

    for function, scale in (("doubled", 2), ("tripled", 3)):
        np.testing.assert_allclose(
            answer(origins.export(recipe(function, data), tmp_path)), x * scale
        )
    # Not even the first answers differ: both are zero for the example.
    monkeypatch.setattr(nets, "doubled", lambda: (nets.Scaled(2.0).eval(), torch.zeros(1, 1, 8, 8)))
    origins.export(recipe("doubled", data), tmp_path)
    monkeypatch.setattr(nets, "doubled", lambda: (nets.Scaled(4.0).eval(), torch.zeros(1, 1, 8, 8)))
    np.testing.assert_allclose(answer(origins.export(recipe("doubled", data), tmp_path)), x * 4)


def test_a_module_whose_answers_hang_on_the_batch_takes_one_sample_at_a_time(
    data: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("of_a_batch", data), tmp_path)
    assert origins.read(made).inputs[0].shape[0] == 1
    assert made.origin is not None and "depends on those beside it" in made.origin.notes[0]


def test_the_same_infinity_is_no_difference(data: Path, tmp_path: Path) -> None:
    made = origins.export(recipe("masked", data), tmp_path)
    assert made.origin is not None and made.origin.differences["onnx"] == 0
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    assert origins.difference(np.array([inf, 2]), np.array([inf, 3])) == 0.5
    assert origins.difference(np.array([inf, 2]), np.array([1, 2])) == inf
    assert np.isnan(origins.difference(np.array([1, 2]), np.array([1, nan])))


def test_names_are_the_recipes_where_it_gives_some(data: Path, tmp_path: Path) -> None:
    how = Export(inputs=("pixels",), outputs=("logits",), batch="one")
    file = origins.read(origins.export(recipe("with_example", data, how), tmp_path))
    assert (file.inputs[0].name, file.outputs[0].name) == ("pixels", "logits")
    assert file.inputs[0].shape == (1, 1, 8, 8) and file.batch_axis is None
    with pytest.raises(UsageError, match="names 2 outputs"):
        origins.export(recipe("small", data, Export(outputs=("a", "b"))), tmp_path)
    with pytest.raises(UsageError, match="'a' is there twice"):
        origins.export(recipe("small", data, Export(inputs=("a",), outputs=("a",))), tmp_path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.npz"
    rng = np.random.Generator(np.random.PCG64(4))
    ids = rng.integers(0, 50, (40, 6))
    np.savez(path, ids=ids, weight=rng.random((40, 6), dtype=np.float32))
    return path


def test_several_inputs_and_a_dictionary_of_outputs_keep_their_names_and_order(
    pairs: Path, tmp_path: Path
) -> None:
    file = origins.read(origins.export(recipe("two", pairs), tmp_path))
    assert [(one.name, one.datatype) for one in file.inputs] == [
        ("ids", "INT64"),
        ("weight", "FP32"),
    ]
    assert [one.name for one in file.outputs] == ["total", "each"]


def test_a_module_without_a_batch_takes_one_sample_at_a_time_and_says_so(
    data: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("joined", data), tmp_path)
    assert origins.read(made).inputs[0].shape == (1, 1, 8, 8)
    assert made.origin is not None and "one sample at a time" in made.origin.notes[0]
    with pytest.raises(ModelError, match="first axis of an output"):
        origins.export(recipe("joined", data, Export(batch="free")), tmp_path)


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("absent", UsageError, "cannot be imported"),
        ("weights", UsageError, "returned a OrderedDict.*load_state_dict"),
        ("failing", UsageError, r"FileNotFoundError: weights\.safetensors"),
        ("in_training", UsageError, r"training mode: itself.*Dropout.*return module\.eval"),
        ("eigen", ModelError, r"aten\.linalg_eig.*custom_translation_table"),
        ("branch", ModelError, r"torch\.where"),
        ("chance", ModelError, "answers otherwise than torch: output 'output' differs by"),
        ("wide", UsageError, r"weight 'weight' is float64.*return module\.float"),
        ("empty", UsageError, r"weight 'weight' has no values.*load_state_dict"),
        ("brief", ModelError, r"takes or returns bfloat16.*float32"),
        ("imaginary", ModelError, r"takes or returns complex64.*view_as_real"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_what_to_do(
    function: str, kind: type[EdgeError], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        origins.export(recipe(function, data), tmp_path)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert not list(tmp_path.glob("*.onnx"))


def test_an_export_whose_process_is_killed_says_so_after_one_try(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"ended with signal 9 \(loading the weights\)") as caught:
        origins.exported(recipe("dying", data), tmp_path, lambda what: None)
    assert "memory that ran out" in caught.value.remedy and "times" not in caught.value.message


# --- exported programs ----------------------------------------------------------------------------


def program(path: Path, module: torch.nn.Module) -> Path:
    axes = {"image": {0: torch.export.Dim("N")}}
    made = torch.export.export(module, (torch.rand(2, 1, 8, 8),), dynamic_shapes=axes)
    torch.export.save(made, path)
    return path


def test_a_module_that_refuses_two_samples_takes_one_at_a_time(data: Path, tmp_path: Path) -> None:
    made = origins.export(recipe("lone", data), tmp_path)
    assert origins.read(made).inputs[0].shape == (1, 1, 8, 8)
    assert made.origin is not None and "one sample at a time" in made.origin.notes[0]


def test_an_exported_program_is_a_source_too(data: Path, tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2", nets.small())
    made = origins.export(recipe(str(path), data), tmp_path / "work")
    file = origins.read(made)
    assert (file.inputs[0].name, file.inputs[0].shape) == ("image", (-1, 1, 8, 8))
    assert made.origin is not None and made.origin.differences["onnx"] < 1e-5
    assert "torch" not in file.traits  # there are no layers to be cut


def test_an_exported_program_in_training_mode_is_refused(data: Path, tmp_path: Path) -> None:
    path = program(tmp_path / "net.pt2", nets.in_training())
    with pytest.raises(UsageError, match="training mode: aten::"):
        origins.export(recipe(str(path), data), tmp_path / "work")


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def test_a_program_that_would_run_code_when_opened_is_refused(data: Path, tmp_path: Path) -> None:
    good = program(tmp_path / "good.pt2", nets.small())
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(good) as before, zipfile.ZipFile(bad, "w") as after:
        for name in before.namelist():
            planted = name.endswith("sample_inputs/model.pt")
            after.writestr(name, pickle.dumps(Planted()) if planted else before.read(name))
    with pytest.raises(UsageError, match="opening it may run code"):
        origins.export(recipe(str(bad), data), tmp_path / "work")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(UsageError, match="is no exported program"):
        origins.export(recipe(str(tmp_path / "text.pt2"), data), tmp_path / "work")


GRAPH = "good/models/model.json"


def size(graph: dict[str, Any], code: str) -> None:
    axis = graph["graph_module"]["graph"]["tensor_values"]["image"]["sizes"][0]
    axis["as_expr"]["expr_str"] = code


def target(graph: dict[str, Any], code: str) -> None:
    node = {"inputs": [{"name": "x", "arg": {"as_string": code}, "kind": 1}], "outputs": []}
    node |= {"target": "torch.os.system", "metadata": {}, "name": "planted"}
    graph["graph_module"]["graph"]["nodes"].insert(0, node)


def keys(graph: dict[str, Any], code: str) -> None:
    spec = graph["graph_module"]["module_call_graph"][0]["signature"]
    spec["out_spec"] = json.dumps([1, {"context": {"__enum__": True, "fqn": "planted:It"}}])


def replanted(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A program whose graph was changed behind torch's back."""
    good, bad = program(folder / "good.pt2", nets.small()), folder / "bad.pt2"
    with zipfile.ZipFile(good) as before, zipfile.ZipFile(bad, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name == GRAPH:
                graph = json.loads(content)
                change(graph)
                content = json.dumps(graph).encode()
            after.writestr(name, content)
    return bad


@pytest.mark.parametrize("plant", [size, target, keys])
def test_a_program_whose_graph_is_code_is_refused(
    plant: Callable[[dict[str, Any], str], None], data: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    bad = replanted(tmp_path, lambda graph: plant(graph, code))
    with pytest.raises(UsageError, match=r"models/model\.json: .*opening it may run code"):
        origins.export(recipe(str(bad), data), tmp_path / "work")
    assert not ran.exists()


def test_guards_that_stand_in_a_program_as_text_do_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(ran)!r}).touch() is None"
    bad = replanted(tmp_path, lambda graph: graph.update(guards_code=[code]))
    made = torch_modules.load(str(bad))
    assert torch_modules.outputs(made, made.examples)[0][1].shape == (2, 4)
    assert not ran.exists()


def test_torch_is_given_the_members_that_were_checked(tmp_path: Path) -> None:
    good, bad = program(tmp_path / "good.pt2", nets.small()), tmp_path / "bad.pt2"
    pickled = "good/data/sample_inputs/model.pt"
    with zipfile.ZipFile(good) as before, zipfile.ZipFile(bad, "w") as after:
        after.writestr(pickled, pickle.dumps(Planted()))  # the first of two with one name
        after.writestr(pickled.upper(), pickle.dumps(Planted()))
        for name in before.namelist():
            with warnings.catch_warnings(action="ignore"):
                after.writestr(name, before.read(name))
    made = torch_modules.load(str(bad))
    assert torch_modules.outputs(made, made.examples)[0][1].shape == (2, 4)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Pow(Max(Integer(1), Symbol('s0', positive=True, integer=True)), Integer(2))", True),
        ("TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s0'))))", True),
        ("s0 // 2 + 1", True),
        ("exec('x')", False),
        ("Symbol('s0').func", False),
        ("Symbol('print(1)')", False),
        ("Lambda(x, x)(2)", False),
        ("[1 for x in y]", False),
        ("(lambda: 1)()", False),
        ("Symbol('__class__')", False),
        ("1 +", False),
        ("", False),
    ],
)
def test_a_size_is_arithmetic_or_refused(text: str, is_one: bool) -> None:
    assert torch_programs.is_size(text) == is_one


# --- the whole ------------------------------------------------------------------------------------


def test_a_run_from_a_function_ends_in_a_bundle_that_names_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, out = tmp_path / "net.yaml", tmp_path / "net.bundle"
    written.write_text(
        f"name: net\nsource: {NETS}:small\ndata: {{path: {data}}}\n"
        "budgets: {drop_max: 0.9, speedup_min: 0, confidence: 0.6}\nevaluation: {rounds: 3}\n"
        "variants:\n  - {name: fp32}\n  - {name: int8, passes: [{use: static_int8}]}\n"
    )
    assert cli.main(["run", str(written), "-o", str(out), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert any(f"exported from {NETS}:small with torch" in note for note in outcome["notes"])
    with archive.open_bundle(out) as bundle:
        origin = bundle.manifest.provenance["recipe"]["origin"]
        assert bundle.manifest.inputs[0].name == "image"
    assert origin["source"] == f"{NETS}:small" and len(origin["code_sha256"]) == 64
    assert origin["versions"]["torch"] == torch.__version__


def test_layers_of_a_module_and_a_comparison_with_it_need_no_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(data), "--samples", "60", "--json"]
    assert cli.main(["sensitivity", f"{NETS}:small", *words]) == 0
    layers = [one["operator"] for one in json.loads(capsys.readouterr().out)["layers"]]
    assert sorted(layers) == ["Add", "Conv", "Conv", "Gemm", "Gemm"]
    file = origins.export(recipe("small", data), tmp_path).source
    assert cli.main(["compare", f"{NETS}:small", file, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"]["path"] == f"{NETS}:small" and found["loss"]["drop"] == 0


@litert_torch
def test_a_tflite_of_the_same_module_has_the_same_inputs_and_outputs(
    data: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("small", data, None, "onnxruntime", "litert"), tmp_path)
    file = origins.read(made)
    twin = file.on("litert")
    assert (twin.format, file.on("onnxruntime").format) == ("tflite", "onnx")
    assert (twin.inputs, twin.outputs) == (file.inputs, file.outputs)
    assert made.origin is not None and made.origin.differences["tflite"] < 1e-5
    assert "variants must be interchangeable" in made.origin.notes[0]
    with pytest.raises(UsageError, match="one sample at a time"):
        origins.export(recipe("small", data, Export(batch="free"), "litert"), tmp_path)


@litert_torch
def test_a_run_with_litert_ends_in_variants_of_both_formats(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, out = tmp_path / "net.yaml", tmp_path / "net.bundle"
    written.write_text(
        f"name: net\nsource: {NETS}:small\ndata: {{path: {data}}}\n"
        "budgets: {drop_max: 0.9, speedup_min: 0, confidence: 0.6}\n"
        "evaluation: {rounds: 3, samples: 60}\n"
        "variants:\n  - {name: fp32}\n  - {name: fp32-litert, backend: litert}\n"
        "  - {name: int8, passes: [{use: static_int8}]}\n"
    )
    assert cli.main(["run", str(written), "-o", str(out), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    scores = {one["name"]: one["score"]["value"] for one in outcome["evaluated"]}
    assert scores["fp32-litert"] == scores["fp32"]
    with archive.open_bundle(out) as bundle:
        assert {one.backend for one in bundle.manifest.variants} >= {"litert"}
        assert bundle.manifest.inputs[0].shape[0] == 1
        assert "tflite" in bundle.manifest.provenance["recipe"]["origin"]["differences"]


@litert_torch
def test_wide_integers_and_the_order_of_outputs_are_kept_in_a_tflite(
    pairs: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("two", pairs, None, "litert"), tmp_path)
    file = origins.read(made)
    assert file.on("litert").inputs == file.inputs
    assert [one.name for one in file.on("litert").outputs] == ["total", "each"]


def test_a_recipe_with_an_origin_says_the_same_after_a_round_trip(
    data: Path, tmp_path: Path
) -> None:
    made = origins.export(recipe("small", data), tmp_path)
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(made)), Recipe)
    assert again == made and origins.read(again).path == models.read(Path(made.source)).path
