"""The committed example models, through our backend: they load, and are as good as they say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.tensors import TensorSpec

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
TEST_SET = Path("/usr/share/datasets/fashion-mnist")
MODELS = ("fp32.onnx", "int8.onnx", "pruned.onnx", "pruned_int8.onnx")
BATCH = 100


@pytest.fixture(params=MODELS)
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    return backend("onnxruntime").load(EXAMPLE / name, {})


def test_the_signature_is_what_the_readme_says(model: Any):
    assert model.inputs == (TensorSpec("input", "FP32", (-1, 1, 28, 28)),)
    assert model.outputs == (TensorSpec("logits", "FP32", (-1, 10)),)


def test_nine_of_the_ten_committed_images_at_least_are_classified(model: Any):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    labels = (EXAMPLE / "labels.txt").read_text().splitlines()
    slugs = [label.lower().replace("/", "-").replace(" ", "-") for label in labels]
    files = sorted((EXAMPLE / "images").glob("*.png"))
    assert sorted(file.stem.rpartition("-")[0] for file in files) == sorted(slugs)
    pixels = np.stack([np.asarray(image.open(file)) for file in files])
    answers = model.run({"input": pixels[:, None].astype(np.float32) / 255})["logits"].argmax(1)
    right = [slugs[a] == f.stem.rpartition("-")[0] for a, f in zip(answers, files, strict=True)]
    assert sum(right) >= 9


def _read(name: str, offset: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress((TEST_SET / name).read_bytes()), np.uint8, offset=offset)


@pytest.mark.skipif(not TEST_SET.exists(), reason="package dataset-fashion-mnist is not installed")
def test_all_ten_thousand_test_images_give_the_accuracy_of_the_card(model: Any, name: str):
    images = _read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, BATCH, 1, 28, 28)
    labels = _read("t10k-labels-idx1-ubyte.gz", 8).reshape(-1, BATCH)
    given = np.empty((BATCH, 1, 28, 28), np.float32)
    logits = np.empty((BATCH, 10), np.float32)
    run = model.bind({"input": given}, {"logits": logits})
    right = 0
    for pixels, wanted in zip(images, labels, strict=True):
        given[...] = pixels / np.float32(255)
        run()
        right += int((logits.argmax(axis=1) == wanted).sum())
    card = json.loads((EXAMPLE / "accuracy.json").read_text())["models"][name]
    print(f"{name}: {right} right of {labels.size}")
    # Other processors round otherwise: a few images near a boundary, not one standard error.
    assert abs(right - card["right"]) <= 20
