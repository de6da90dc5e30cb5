"""OpenVINO in edge-quantize: IR as a source, bfloat16 as a variant, NNCF on both formats."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edge_runtime.backends import backend, openvino_library
from edge_runtime.bundle import archive
from edge_runtime.errors import BundleError, NotFoundError, UsageError
from quantize import causes, cli, models, passes, proposing
from quantize.passes import FLOAT, INTEGER, OPENVINO, SMALL_WEIGHTS, Bench
from quantize.passes.openvino import NncfInt8, NncfWeights
from quantize.passes.weights import Float16
from quantize.recipe import Budgets, Data, Evaluation, Recipe, Variant
from quantize.results import Evaluated
from quantize.workflow import prepare, run

pytest.importorskip("openvino", reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None, reason="nncf is not installed (make test-quantize)"
)
CNN = Path("examples/fashion_mnist/fp32.onnx").resolve()


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CNN as an .xml file with its .bin beside it."""
    path = tmp_path_factory.mktemp("ir") / "cnn.xml"
    library = openvino_library.library()
    front_end = library.frontend.FrontEndManager().load_by_framework("onnx")
    library.save_model(front_end.convert(front_end.load(str(CNN))), path, compress_to_fp16=False)
    return path


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


def test_auto_makes_a_bundle_of_ir(
    ir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.bundle"
    words = ["auto", str(ir), "--data", str(data), "--target", "generic-x86_64"]
    assert cli.main([*words, "--drop-max", "0.2", "-o", str(out), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    found = {one["name"]: one for one in outcome["evaluated"]}
    assert outcome["reference"] == "fp32-openvino"
    assert {one["backend"] for one in found.values()} == {"openvino"}
    assert found["fp16-openvino"]["size_bytes"] < 0.6 * found["fp32-openvino"]["size_bytes"]
    with archive.open_bundle(out) as bundle:
        assert bundle.manifest.variants[0].name == "fp32-openvino"


def test_ir_without_its_weights_is_refused_with_the_missing_file(ir: Path, tmp_path: Path) -> None:
    shutil.copy(ir, tmp_path / "alone.xml")
    with pytest.raises(NotFoundError) as caught:
        models.read(tmp_path / "alone.xml")
    assert "alone.bin" in caught.value.where and ".xml" in caught.value.expected


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
def test_a_node_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no_such_node"):
        NncfInt8(exclude=("no_such_node",)).apply(CNN, tmp_path / "o.onnx", bench(data))
