"""The same network in five files, two of them silently wrong on one library: right ones serve.

Law of this file: real libraries. Fashion-MNIST's network as fp32, static int8, with 16-bit
activations (wrong on OpenVINO, right on onnxruntime) and as .tflite with dynamic-range int8 weights
(wrong on tflite-runtime 2.14, right on LiteRT). Each variant's goldens are what its builder got.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import backend
from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import Blob, Golden, GoldenTensor, Manifest, Tolerance, Variant
from edge_runtime.bundle.source import from_bytes
from edge_runtime.cli import status
from edge_runtime.tensors import TensorSpec
from tests.daemon.world import Daemon

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
Array = np.ndarray[Any, Any]


def pixels() -> Array:
    files = sorted((EXAMPLE / "images").glob("*.png"))
    return np.stack([np.asarray(image.open(file)) for file in files])[:, None].astype("f4") / 255


def sixteen_bit(directory: Path) -> Path:
    """fp32.onnx with 16-bit activations and 8-bit weights, as a user would make it."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnx is not installed")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(pixels())

        def get_next(self) -> dict[str, Array] | None:
            row = next(self.rows, None)
            return None if row is None else {"input": row[None]}

    path = directory / "u16.onnx"
    quantization.quantize_static(
        EXAMPLE / "fp32.onnx",
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt16,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"UseQDQContribOps": True},
    )
    return path


def variants(directory: Path) -> list[tuple[Variant, Path]]:
    """All five. Tolerances: fp32's is tight; a quantized logit may be off by 0.25 of +-10."""
    rounded = Tolerance(rtol=0.0, atol=0.25)
    files = {
        "fp32": ("onnxruntime", "fp32", EXAMPLE / "fp32.onnx", Tolerance()),
        "int8": ("onnxruntime", "int8", EXAMPLE / "int8.onnx", rounded),
        "u16-onnxruntime": ("onnxruntime", "u16", sixteen_bit(directory), rounded),
        "u16-openvino": ("openvino", "u16", sixteen_bit(directory), rounded),
        "dynamic-tflite": ("litert", "int8", EXAMPLE / "dynamic.tflite", rounded),
    }
    return [
        (
            Variant(
                name,
                library,
                Blob(_sha(path.read_bytes()), path.stat().st_size, path.name),
                precision,
                tolerance=tolerance,
            ),
            path,
        )
        for name, (library, precision, path, tolerance) in files.items()
    ]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def bundle(directory: Path) -> Path:
    """All of them, with three images and fp32's answers as goldens."""
    given = variants(directory)
    blobs = {one.artifact.sha256: path.read_bytes() for one, path in given}

    def tensor(name: str, array: Array) -> GoldenTensor:
        data = array.tobytes()
        blobs[_sha(data)] = data
        return GoldenTensor(name, "FP32", array.shape, Blob(_sha(data), len(data)))

    model = backend("onnxruntime").load(EXAMPLE / "fp32.onnx", {})
    manifest = Manifest(
        1,
        "fashion",
        1,
        (TensorSpec("input", "FP32", (1, 1, 28, 28)),),
        (TensorSpec("logits", "FP32", (1, 10)),),
        tuple(one for one, _ in given),
        goldens=tuple(
            Golden(
                (tensor("input", row[None]),),
                (tensor("logits", model.run({"input": row[None]})["logits"]),),
            )
            for row in pixels()[:3]
        ),
    )
    path = directory / "fashion.bundle"
    archive.pack(archive.compose(manifest, {k: from_bytes(v) for k, v in blobs.items()}), path)
    return path


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def test_the_right_files_serve_and_the_silently_wrong_ones_never_do(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    if not installed("openvino"):
        pytest.skip("openvino is not installed")
    daemon = make_daemon().start()
    daemon.install(bundle(tmp_path))
    reply = daemon.control("why", name="fashion")
    tried = {one["variant"]: one for one in reply["decision"]["tried"]}
    print(status.why_text(reply, reply["now_wall_s"], 160).partition("\n20")[0])
    assert tried["u16-openvino"]["verdict"] == "wrong"
    assert "golden 0" in tried["u16-openvino"]["reason"]
    for right in ("fp32", "int8", "u16-onnxruntime"):
        assert tried[right]["verdict"] in ("chosen", "fit", "slower"), tried[right]
    if installed("ai_edge_litert"):
        assert tried["dynamic-tflite"]["verdict"] in ("chosen", "fit", "slower")
    elif installed("tflite_runtime"):
        assert tried["dynamic-tflite"]["verdict"] == "wrong"
        assert "golden" in tried["dynamic-tflite"]["reason"]
    wrong = {name for name, one in tried.items() if one["verdict"] in ("wrong", "failed")}
    assert not wrong & set(reply["decision"]["order"])
    with daemon.client() as client:
        said = [client.infer("fashion", {"input": row[None]})["logits"] for row in pixels()]
    names = sorted(path.stem.rpartition("-")[0] for path in (EXAMPLE / "images").glob("*.png"))
    labels = [
        line.lower().replace("/", "-").replace(" ", "-")
        for line in (EXAMPLE / "labels.txt").read_text().splitlines()
    ]
    assert [labels[int(one.argmax())] for one in said] == names
