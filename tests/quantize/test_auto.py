"""`edge-quantize auto`: one command from a trained model to a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.bundle import archive
from quantize import cli

MODEL = Path("examples/fashion_mnist/fp32.onnx").resolve()
CLASSES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs of light, labelled by the float model itself: it is right by definition."""
    rng = np.random.Generator(np.random.PCG64(1))
    noise = rng.random((600, 1, 7, 7), dtype=np.float32)
    x = noise.repeat(4, axis=2).repeat(4, axis=3)
    answers = backend("onnxruntime").load(MODEL, {}).run({"input": x})["logits"]
    path = tmp_path_factory.mktemp("data") / "samples.npz"
    np.savez(path, x=x, y=answers.argmax(axis=1))
    return path


def test_auto_ships_what_is_right_and_faster_and_names_what_it_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.bundle"
    words = ["auto", str(MODEL), "--data", str(data), "--target", "generic-x86_64"]
    code = cli.main([*words, "--drop-max", "0.2", "--name", "clothes", "-o", str(out), "--json"])
    outcome = json.loads(capsys.readouterr().out)
    assert code == 0, outcome
    assert outcome["metric"] == "top1"
    assert outcome["samples"] == 400  # 200 calibrate: a third
    by_name = {one["name"]: one for one in outcome["evaluated"]}
    reference = by_name[outcome["reference"]]
    assert reference["score"]["value"] > 0.99  # another library may round a tie otherwise
    int8 = by_name["int8"]
    assert int8["size_bytes"] * 3.5 < by_name["fp32"]["size_bytes"]
    assert int8["refusal"] == "" and int8["p50_ms"] > 0 and int8["memory_bytes"] > 0
    with archive.open_bundle(out) as bundle:
        names = [variant.name for variant in bundle.manifest.variants]
        card = bundle.manifest.card
    assert names[0] == outcome["reference"] and "int8" in names
    assert set(card["refused"]) == {n for n, one in by_name.items() if one["refusal"]}
    assert card["drift_baseline"]["inputs"]["input"]["count"] == 400 * 28 * 28


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.bundle"
    words = ["auto", str(MODEL), "--data", str(data), "--target", "raspberry-pi-5"]
    assert cli.main([*words, "-o", str(out), "--dry-run"]) == 0
    assert "static_int8" in capsys.readouterr().out
    assert not out.exists()


def test_a_wrong_target_is_a_usage_error_with_the_nearest_name(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["auto", str(MODEL), "--data", str(data), "--target", "raspberry-pi5"]
    assert cli.main(words) == 2
    assert "raspberry-pi-5" in capsys.readouterr().err


def test_data_without_the_models_input_are_refused_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, x=np.zeros((4, 3, 28, 28), np.float32))
    assert cli.main(["auto", str(MODEL), "--data", str(path)]) == 2
    assert "[samples, 1, 28, 28]" in capsys.readouterr().err
