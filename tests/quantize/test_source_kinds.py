"""What is no source, said where torch is not installed too; and two files of one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ModelError, NotFoundError, UsageError
from quantize import cli, models, origins, recipe
from quantize.recipe import Data, Recipe

EXAMPLE = Path("examples/fashion_mnist").resolve()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    rng = np.random.Generator(np.random.PCG64(1))
    x = rng.random((120, 1, 28, 28), dtype=np.float32)
    np.savez(path, x=x)
    return path


@pytest.mark.parametrize("ending", models.WEIGHTS)
def test_weights_alone_are_refused_with_what_to_write_instead(
    ending: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"\x80\x02.")
    assert cli.main(["auto", str(path), "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert "a pickle runs code" in said and "module:function" in said


@pytest.mark.skipif(bool(importlib.util.find_spec("torch")), reason="torch is installed here")
@pytest.mark.parametrize("words", [["auto"], ["sensitivity"], ["compare", "net.onnx"]])
def test_a_torch_source_without_torch_names_the_extra(
    words: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "nets:small", "--data", str(data)]) == 2
    assert "edge-runtime[quantize-torch]" in capsys.readouterr().err


def test_a_torch_source_is_no_other_format_of_a_model(data: Path) -> None:
    with pytest.raises(UsageError, match="has to be exported first"):
        models.read(Path("nets:small"))


def test_only_a_function_or_an_exported_program_is_torch() -> None:
    assert origins.is_torch("nets:small") and origins.is_torch("/some/where/net.pt2")
    assert not origins.is_torch("net.onnx") and not origins.is_torch("C:/net.onnx")


def test_a_recipe_says_how_a_module_is_exported() -> None:
    given = {"name": "net", "source": "nets:small", "data": {"path": "d.npz"}}
    read = recipe.parse({**given, "export": {"inputs": ["x"], "batch": "one"}}, "r.yaml")
    assert (read.export.inputs, read.export.batch) == (("x",), "one")
    with pytest.raises(UsageError, match=r"export\.inputs"):
        recipe.parse({**given, "export": {"inputs": ["no name"]}}, "r.yaml")


def test_two_files_of_one_model_must_have_the_same_inputs(data: Path) -> None:
    also = {"tflite": str(Path("examples/wake_word/okay_nabu.tflite").resolve())}
    given = Recipe("net", str(EXAMPLE / "fp32.onnx"), Data(str(data)), also=also)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected those of fp32\.onnx"):
        origins.read(given)


# --- an ONNX model whose weights lie in another file ----------------------------------------------


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """The example's model as torch writes large ones: .onnx and .onnx.data."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    model = onnx.load(str(EXAMPLE / "fp32.onnx"))
    onnx.save(
        model, str(path), save_as_external_data=True, location="net.onnx.data", size_threshold=0
    )
    return path


def test_weights_in_another_file_are_made_one_file_with_the_same_answers(apart: Path) -> None:
    backend = pytest.importorskip("edge_runtime.backends").backend("onnxruntime")
    read = models.read(apart)
    assert read.path != apart and read.path.stat().st_size > 100_000
    assert models.read(apart).path == read.path, "made once"
    feeds = {read.inputs[0].name: np.ones((2, 1, 28, 28), np.float32)}
    want = backend.load(EXAMPLE / "fp32.onnx", {}).run(feeds)
    have = backend.load(read.path, {}).run(feeds)
    assert all(np.array_equal(want[name], have[name]) for name in want)


def test_after_the_weights_changed_the_file_is_made_anew(apart: Path) -> None:
    data = apart.with_name("net.onnx.data")
    before = models.read(apart).path.read_bytes()
    data.write_bytes(bytes(data.stat().st_size))
    assert models.read(apart).path.read_bytes() != before


def test_a_missing_file_of_weights_is_named(apart: Path) -> None:
    apart.with_name("net.onnx.data").rename(apart.with_name("other.data"))
    with pytest.raises(NotFoundError, match=r"keeps weights in it") as caught:
        models.read(apart)
    assert caught.value.where.endswith("net.onnx.data")


def test_weights_that_do_not_fit_into_one_file_are_refused_before_they_are_read(
    apart: Path,
) -> None:
    with apart.with_name("net.onnx.data").open("r+b") as file:
        file.truncate(1 << 31)  # a hole: it takes no room
    with pytest.raises(ModelError, match=r"has 2147\d+ bytes with the weights"):
        models.read(apart)


def test_a_file_of_weights_that_was_cut_off_is_said(apart: Path) -> None:
    with apart.with_name("net.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="weights in other files cannot be read"):
        models.read(apart)


def test_a_model_in_two_files_goes_from_auto_into_a_bundle_of_single_files(
    apart: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"name: net\nsource: {apart.name}\ndata: {{path: {data.name}}}\n"
        "budgets: {drop_max: 1.0, speedup_min: 0}\nevaluation: {samples: 40, rounds: 5}\n"
        "variants: [{name: int8, backend: onnxruntime, passes: [{use: clean}, {use: static_int8}]}]"
    )
    out = tmp_path / "net.bundle"
    assert cli.main(["run", str(recipe_file), "-o", str(out)]) == 0
    assert out.exists()
