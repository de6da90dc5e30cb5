"""What is no source, said where torch is not installed too; and two files of one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import UsageError
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
def test_a_torch_source_without_torch_names_the_extra(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["auto", "nets:small", "--data", str(data)]) == 2
    assert "edge-runtime[quantize-torch]" in capsys.readouterr().err


def test_a_command_that_does_not_export_says_which_do(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sensitivity", "nets:small", "--data", str(data)]) == 2
    assert "has to be exported first" in capsys.readouterr().err


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
