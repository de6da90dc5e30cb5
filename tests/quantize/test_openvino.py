"""OpenVINO in edge-quantize: IR as a source, bfloat16 as a variant, NNCF on both formats."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from edge_runtime.backends import backend, openvino_library
from edge_runtime.bundle import archive
from edge_runtime.errors import BundleError, ModelError, NotFoundError, UsageError
from examples.fashion_mnist import outlier
from quantize import (
    building,
    causes,
    cli,
    models,
    onnx_door,
    openvino_door,
    passes,
    proposing,
    scores,
    scratch,
    validating,
    workflow,
)
from quantize.building import Built
from quantize.evaluating import Judge
from quantize.passes import FLOAT, INTEGER, OPENVINO, SMALL_WEIGHTS, Bench
from quantize.passes.openvino import NncfInt8, NncfWeights
from quantize.passes.weights import Float16
from quantize.recipe import Budgets, Calibration, Data, Evaluation, Recipe, Variant
from quantize.results import Evaluated
from quantize.workflow import Prepared, prepare, run

pytest.importorskip("openvino", reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None, reason="nncf is not installed (make test-quantize)"
)
CNN = Path("examples/fashion_mnist/fp32.onnx").resolve()


def as_ir(model: Path, path: Path) -> Path:
    """An ONNX model as an .xml file with its .bin beside it."""
    library = openvino_library.library()
    front_end = library.frontend.FrontEndManager().load_by_framework("onnx")
    library.save_model(front_end.convert(front_end.load(str(model))), path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CNN as IR."""
    return as_ir(CNN, tmp_path_factory.mktemp("ir") / "cnn.xml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs of light, labelled by the float model."""
    noise = np.random.Generator(np.random.PCG64(1)).random((300, 1, 7, 7), dtype=np.float32)
    x = noise.repeat(4, axis=2).repeat(4, axis=3)
    answers = backend("onnxruntime").load(CNN, {}).run({"input": x})["logits"]
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=x, y=answers.argmax(axis=1))
    return path


def bench(data: Path, samples: int = 64) -> Bench:
    source = models.read(CNN)
    with np.load(data) as arrays:
        feeds = {"input": arrays["x"][:samples]}
    return Bench(feeds, source.inputs, source.outputs, 0, 0, lambda what: None)


def agreement(path: Path, data: Path) -> float:
    """How often OpenVINO says of this file what the float model says."""
    with np.load(data) as arrays:
        found = backend("openvino").load(path, {}).run({"input": arrays["x"]})["logits"]
        return float((found.argmax(axis=1) == arrays["y"]).mean())


# --- IR as a source -------------------------------------------------------------------------------


def test_ir_of_two_files_is_read_as_one_float_model(ir: Path) -> None:
    one = models.read(ir)
    assert one.traits == {OPENVINO, FLOAT} and one.precision == "fp32" and one.batch_axis == 0
    assert [spec.name for spec in (*one.inputs, *one.outputs)] == ["input", "logits"]
    assert one.path.suffix == ".ir" and models.read(ir).path == one.path


def test_a_run_makes_a_bundle_of_ir(
    ir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out.bundle"
    recipe.write_text(RECIPE.format(source=ir, data=data))
    assert cli.main(["run", str(recipe), "-o", str(out), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    found = {one["name"]: one for one in outcome["evaluated"]}
    assert outcome["reference"] == "fp32"
    assert {one["backend"] for one in found.values()} == {"openvino"}
    assert found["fp16"]["size_bytes"] < 0.6 * found["fp32"]["size_bytes"]
    with archive.open_bundle(out) as bundle:
        assert {one.name for one in bundle.manifest.variants} == {"fp32", "fp16"}


# Samples and rounds are few, and speed is not asked for: this is no measurement.
RECIPE = """
name: cnn
version: 1
source: {source}
data: {{path: {data}}}
evaluation: {{samples: 100, rounds: 3}}
budgets: {{drop_max: 0.2, speedup_min: 0}}
variants:
  - {{name: fp32, backend: openvino}}
  - {{name: fp16, backend: openvino, passes: [{{use: float16}}]}}
"""


def test_auto_plans_for_ir(ir: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["auto", str(ir), "--data", str(data), "--target", "generic-x86_64", "--dry-run"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "fp32-openvino" in said and "fp16-openvino" in said and "onnxruntime" not in said


def test_ir_without_its_weights_is_refused_with_the_missing_file(ir: Path, tmp_path: Path) -> None:
    shutil.copy(ir, tmp_path / "alone.xml")
    with pytest.raises(NotFoundError) as caught:
        models.read(tmp_path / "alone.xml")
    assert "alone.bin" in caught.value.where and ".xml" in caught.value.expected


def test_weights_that_are_cut_off_are_told_by_the_users_own_file(ir: Path, tmp_path: Path) -> None:
    shutil.copy(ir, tmp_path / "short.xml")
    (tmp_path / "short.bin").write_bytes(ir.with_suffix(".bin").read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"refers to \d+ bytes") as caught:
        models.read(tmp_path / "short.xml")
    assert caught.value.where == str(tmp_path / "short.xml")


def test_ir_of_unknown_rank_is_refused(tmp_path: Path) -> None:
    library = openvino_library.library()
    given = library.opset13.parameter(library.PartialShape.dynamic(), np.float32, name="x")
    model = library.Model([library.opset13.relu(given)], [given], "m")
    library.save_model(model, tmp_path / "m.xml")
    with pytest.raises(BundleError, match=r"no datatype or shape that a device could serve"):
        models.read(tmp_path / "m.xml")


def test_ir_that_quantizes_is_refused_as_a_source(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = openvino_library.library()
    sets = library.opset13
    given = sets.parameter([-1, 1, 28, 28], np.float32, name="input")
    edges = [np.float32(edge) for edge in (0, 1, 0, 1)]
    model = library.Model([sets.fake_quantize(given, *edges, 256)], [given], "m")
    library.save_model(model, tmp_path / "m.xml")
    assert cli.main(["auto", str(tmp_path / "m.xml"), "--data", str(data)]) == 2
    assert "is quantized already (int8)" in capsys.readouterr().err


def test_sensitivity_says_that_it_wants_onnx(
    ir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sensitivity", str(ir), "--data", str(data)]) == 2
    assert "not openvino" in capsys.readouterr().err


def test_a_pass_for_onnx_names_the_format_that_it_wants(ir: Path) -> None:
    one = passes.decode({"use": "static_int8"}, "here")
    with pytest.raises(UsageError, match=r"needs a model that is onnx; here it is float, openvino"):
        passes.traits_after(models.read(ir).traits, one, "here")


def test_two_files_of_ir_are_compared(
    ir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.ir"
    Float16().apply(models.read(ir).path, half, bench(data))
    words = ["compare", str(ir), str(half), "--data", str(data), "--samples", "50", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"]["backend"].startswith("openvino ")
    assert found["second"]["size_bytes"] < 0.6 * found["first"]["size_bytes"]


# --- float16 and bfloat16 -------------------------------------------------------------------------


def test_float16_halves_ir_and_answers_alike(ir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.ir"
    Float16().apply(models.read(ir).path, out, bench(data))
    assert models.read(out).precision == "fp16"
    assert agreement(out, data) > 0.99
    with pytest.raises(UsageError, match="exclude list"):
        Float16(exclude=("a",)).apply(models.read(ir).path, out, bench(data))


def test_bfloat16_is_proposed_only_where_the_processor_has_units_for_it() -> None:
    def names(*features: str) -> set[str]:
        found = proposing.propose(
            models.read(CNN), set(), ["openvino"], lambda name: False, features=features
        )
        return {one.name for one in found.variants}

    assert "bf16-openvino" in names("avx512_bf16") and "bf16-openvino" in names("amx_bf16")
    assert "bf16-openvino" not in names("avx2", "avx512f")


@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_auto_tries_nncf_where_it_is_and_cleans_onnx_up_for_it(kind: str, ir: Path) -> None:
    source = models.read(CNN if kind == "onnx" else ir)
    found = proposing.propose(source, set(), ["openvino"], lambda name: name == "nncf").variants
    before = ["clean"] if kind == "onnx" else []
    chains = {one.name: [step["use"] for step in one.passes] for one in found}
    assert chains["int8-nncf"] == [*before, "nncf_int8"]
    assert chains["int8-controlled"] == [*before, "nncf_accuracy"]


def test_bfloat16_is_a_variant_of_the_same_file_held_to_float32(data: Path, tmp_path: Path) -> None:
    variants = (
        Variant("bf16", "openvino", {"precision": "bf16"}),
        Variant("float", "openvino"),
    )
    recipe = Recipe(
        name="m",
        source=str(CNN),
        data=Data(str(data)),
        evaluation=Evaluation(rounds=3),
        budgets=Budgets(drop_max=0.2, speedup_min=0.0),
        variants=variants,
    )
    done = run(prepare(recipe), tmp_path / "work", tmp_path / "m.bundle", lambda what: None)
    assert done.outcome.reference == "float"  # though it stands second
    half, whole = done.outcome.of("bf16"), done.outcome.of("float")
    assert (half.precision, whole.precision) == ("bf16", "fp32")
    assert "f32" in whole.placement[0]["detail"] and "computes in f32" in whole.notes[0]
    assert "computes in bf16, as told" in half.notes[0]
    if causes.processor_features() & causes.BFLOAT16:
        assert "bf16" in half.placement[0]["detail"] and "on this processor" in half.notes[0]
    if not half.refusal:
        with archive.open_bundle(tmp_path / "m.bundle") as bundle:
            first, second = bundle.manifest.variants
            assert first.artifact.sha256 == second.artifact.sha256  # packed once
            assert second.precision == "bf16" and second.tolerance.rtol > first.tolerance.rtol


def test_what_openvino_does_untold_is_said_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Evaluated("fp32", "openvino", "2026.4", "fp32", {}, "m.ir")
    monkeypatch.setattr(causes.platform, "machine", lambda: "aarch64")
    assert re.search("takes f16 on ARM", causes.notes(one, Path("m.ir"))[0])


# --- NNCF -----------------------------------------------------------------------------------------


@needs_nncf
@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_nncf_quantizes_either_format_and_keeps_it(
    kind: str, ir: Path, data: Path, tmp_path: Path
) -> None:
    source = models.read(CNN if kind == "onnx" else ir)
    out = tmp_path / f"out.{kind}"
    NncfInt8().apply(source.path, out, bench(data))
    made = models.read(out)
    assert made.format == source.format and INTEGER in made.traits
    assert (made.inputs, made.outputs) == (source.inputs, source.outputs)
    assert out.stat().st_size * 3 < source.path.stat().st_size
    assert agreement(out, data) > 0.9


@needs_nncf
@pytest.mark.parametrize("bits", [8, 4])
def test_nncf_stores_weights_of_ir_in_fewer_bits(
    bits: Literal[8, 4], ir: Path, data: Path, tmp_path: Path
) -> None:
    source, out = models.read(ir), tmp_path / "out.ir"
    NncfWeights(bits=bits, group=-1).apply(source.path, out, bench(data))
    assert SMALL_WEIGHTS in models.read(out).traits
    assert out.stat().st_size * 3 < source.path.stat().st_size
    assert agreement(out, data) > 0.9


@needs_nncf
@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_a_node_that_is_not_there_is_named_with_the_nearest(
    kind: str, ir: Path, data: Path, tmp_path: Path
) -> None:
    source = models.read(CNN if kind == "onnx" else ir).path
    with pytest.raises(UsageError, match=r"no node '/3/Cony'.*; did you mean '/3/Conv"):
        NncfInt8(exclude=("/3/Cony",)).apply(source, tmp_path / f"o.{kind}", bench(data))


@needs_nncf
@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_an_excluded_node_computes_in_float_where_it_runs(
    kind: str, ir: Path, data: Path, tmp_path: Path
) -> None:
    source, out = models.read(CNN if kind == "onnx" else ir).path, tmp_path / f"out.{kind}"
    name = "/3/Conv" if kind == "onnx" else "/3/Conv/WithoutBiases"
    NncfInt8(exclude=(name,)).apply(source, out, bench(data))
    library = openvino_library.library()
    told = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = library.Core().compile_model(openvino_door.load(out), "CPU", told)
    infos = [one.get_rt_info() for one in compiled.get_runtime_model().get_ordered_ops()]
    found = {
        one["originalLayersNames"].astype(str): one["runtimePrecision"].astype(str)
        for one in infos
        if one["layerType"].astype(str) == "Convolution"
    }
    floats = [names for names, precision in found.items() if precision == "f32"]
    assert len(found) == 4 and len(floats) == 1 and "/3/Conv" in floats[0]


@needs_nncf
def test_4_bits_for_nothing_is_refused(ir: Path, data: Path, tmp_path: Path) -> None:
    """The one product that could have them is more than a thousandth of the weights."""
    with pytest.raises(ModelError, match="no weights were stored in 4 bits"):
        NncfWeights(bits=4, share=0.001).apply(models.read(ir).path, tmp_path / "o.ir", bench(data))


@needs_nncf
def test_nodes_that_share_a_name_are_quantized(data: Path, tmp_path: Path) -> None:
    model = onnx_door.load(CNN)
    for node in model.graph.node:
        node.name = "anon"
    onnx_door.save(model, tmp_path / "anon.onnx")
    NncfInt8().apply(tmp_path / "anon.onnx", tmp_path / "out.onnx", bench(data))
    assert agreement(tmp_path / "out.onnx", data) > 0.9


# --- accuracy control -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CNN with two channels 3,000 times larger: int8 leaves the others nothing."""
    path = tmp_path_factory.mktemp("outliers") / "outliers.onnx"
    outlier.plant(CNN, path, 3000.0)
    return path


def controlled(model: Path, data: Path, calibration: Path, **options: object) -> Prepared:
    variants = (
        Variant("float", "openvino"),
        Variant("int8", "openvino", passes=({"use": "nncf_int8"},)),
        Variant("control", "openvino", passes=({"use": "nncf_accuracy", **options},)),
    )
    recipe = Recipe(
        name="m",
        source=str(model),
        data=Data(str(data), str(calibration)),
        calibration=Calibration(40),
        evaluation=Evaluation(rounds=3),
        budgets=Budgets(drop_max=0.1, speedup_min=0.0),
        variants=variants,
    )
    return prepare(recipe)


def built(ready: Prepared, number: int, folder: Path, said: list[str]) -> Built:
    chain = ready.chains[number]
    return building.build(
        chain,
        ready.source,
        ready.split.calibration,
        0,
        scratch.Scratch(folder),
        said.append,
        workflow.validation(ready, chain),
    )


@pytest.fixture(scope="module")
def apart(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Evaluation and calibration; of the latter 20 samples are the former's too."""
    folder = tmp_path_factory.mktemp("apart")
    with np.load(data) as arrays:
        x, y = arrays["x"], arrays["y"]
    np.savez(folder / "test.npz", x=x[:150], y=y[:150])
    np.savez(folder / "cal.npz", x=x[130:], y=y[130:])
    return folder / "test.npz", folder / "cal.npz"


def test_what_a_pass_chooses_by_neither_calibrates_nor_judges(apart: tuple[Path, Path]) -> None:
    ready = controlled(CNN, *apart)
    seen = workflow.validation(ready, ready.chains[0])()
    sets = [
        {one.tobytes() for one in feeds["input"]}
        for feeds in (seen.calibration, seen.inputs, ready.split.evaluation.feeds)
    ]
    assert len(sets[0]) == 40 and len(sets[1]) >= 100
    assert not sets[1] & sets[0] and not sets[1] & sets[2]
    want = seen.answers(ready.source.path, np.arange(len(seen.inputs["input"])))
    assert seen.score(want, want).mean() == 1.0 and seen.drop_max == 0.05


def test_other_views_of_what_judges_are_not_chosen_by(apart: tuple[Path, Path]) -> None:
    ready = controlled(CNN, *apart)
    assert ready.split.spare is not None
    spare = dataclasses.replace(ready.split.spare, groups=np.arange(len(ready.split.spare)) // 10)
    left = validating._fresh(ready.split._replace(spare=spare))
    assert left is not None and left.groups is not None and spare.groups is not None
    judging_ones = {one.tobytes() for one in ready.split.evaluation.feeds["input"]}
    copies = [one.tobytes() in judging_ones for one in spare.feeds["input"]]
    assert any(copies) and set(left.groups) == set(spare.groups) - set(spare.groups[copies])


def test_without_spare_samples_half_of_the_calibration_set_is_held_apart(
    apart: tuple[Path, Path],
) -> None:
    ready = controlled(CNN, *apart)
    ready = ready._replace(split=ready.split._replace(spare=None))
    seen = workflow.validation(ready, ready.chains[0])()
    assert len(seen.calibration["input"]) == len(seen.inputs["input"]) == 20


def test_the_float_models_answers_stand_for_missing_labels(apart: tuple[Path, Path]) -> None:
    ready = controlled(CNN, *apart)
    assert ready.split.spare is not None and ready.metric == "top1"
    bare = ready.split._replace(spare=ready.split.spare.labelled(None))
    assert workflow.validation(ready._replace(split=bare), ready.chains[0])().metric == "agreement"


def test_too_few_samples_refuse_the_variant_and_not_the_run(
    apart: tuple[Path, Path], tmp_path: Path
) -> None:
    ready = controlled(CNN, *apart)
    few = ready.split._replace(spare=None, calibration=ready.split.calibration.take(np.arange(5)))
    one = built(ready._replace(split=few), 2, tmp_path, [])
    assert "too few to hold some apart" in one.refusal


@needs_nncf
@pytest.mark.parametrize("kind", ["onnx", "ir"])
def test_nncf_puts_back_into_float_what_loses_and_says_which(
    kind: str, outliers: Path, apart: tuple[Path, Path], tmp_path: Path
) -> None:
    model = outliers if kind == "onnx" else as_ir(outliers, tmp_path / "outliers.xml")
    ready, said = controlled(model, *apart), []
    ones = [built(ready, number, tmp_path / "work", said) for number in (1, 2)]
    assert [one.refusal for one in ones] == ["", ""]
    plain, control = (agreement(one.path, apart[0]) for one in ones if one.path)
    assert plain < 0.9 and control > 0.94
    (told,) = [text for text in said if "back in float" in text]
    assert "/7/Conv" in told and "samples that neither calibrate nor judge" in told
    step = {"use": "nncf_accuracy"}
    path = ones[1].path
    assert path is not None
    notes = causes.notes(Evaluated("c", "openvino", "", "int8", {}, str(path), (step,)), path)
    assert told in notes


@needs_nncf
def test_what_was_chosen_by_is_in_the_results_key(apart: tuple[Path, Path]) -> None:
    ready = controlled(CNN, *apart)
    chain = ready.chains[2]
    seen = workflow.validation(ready, chain)()
    given = (chain, ready.source, ready.split.calibration, 0)
    keys = {building.keys(*given, seen)[0], building.keys(*given, seen._replace(key="x"))[0]}
    assert len(keys) == 2


@needs_nncf
def test_a_metric_that_is_0_for_the_float_model_controls_too(
    outliers: Path, apart: tuple[Path, Path], tmp_path: Path
) -> None:
    ready, said = controlled(outliers, *apart, drop_max=1.0), []
    whole = ready.judge
    judge = Judge(whole.recipe, whole.source, whole.data, scores.metric("mse"), whole.output)
    assert ready.split.spare is not None
    bare = ready.split._replace(spare=ready.split.spare.labelled(None))
    ready = ready._replace(judge=judge, metric="mse", split=bare)
    one = built(ready, 2, tmp_path / "work", said)
    (told,) = [text for text in said if "back in float" in text]
    lost = [float(text.split()[0]) for text in told.split("loses ")[1:]]
    assert not one.refusal and lost[0] > 1.0 >= lost[1] > 0


def test_what_a_metric_does_is_in_the_results_key(
    apart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number in (0, 1):
        code = f"def how(answers, labels):\n    return answers[:, {number}]\n"
        (tmp_path / "my_metric.py").write_text(code)
        ready = controlled(CNN, *apart)
        told = msgspec.structs.replace(ready.recipe.evaluation, callable="my_metric:how")
        recipe = msgspec.structs.replace(ready.recipe, evaluation=told)
        made = ready.judge
        judge = Judge(recipe, made.source, made.data, made.metric, made.output)
        ready = ready._replace(recipe=recipe, judge=judge)
        keys.append(workflow.validation(ready, ready.chains[0])().key)
    assert keys[0] != keys[1]
