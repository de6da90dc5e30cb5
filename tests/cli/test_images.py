"""Pixels to tensors, outputs to labels (edge_runtime/client/images.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.bundle.manifest import Postprocess, Preprocess
from edge_runtime.client import images
from edge_runtime.errors import EdgeError, NotFoundError, RequestError, UsageError

PLAIN = Preprocess(input="x", width=2, height=2, pixel_scale=1.0)


def metadata(shape: list[int], preprocess: Any = None, name: str = "x") -> dict[str, Any]:
    return {
        "inputs": [{"name": name, "datatype": "FP32", "shape": shape}],
        "parameters": {"preprocess": preprocess} if preprocess is not None else {},
    }


def save(path: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def test_channels_first_and_last_are_laid_out_from_the_same_pixels() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    first = images.to_tensor(pixels, PLAIN, "FP32", batched=True)
    last = images.to_tensor(
        pixels, msgspec.structs.replace(PLAIN, layout="NHWC"), "FP32", batched=False
    )
    assert (first.shape, last.shape) == ((1, 3, 2, 2), (2, 2, 3))
    assert first[0, 1].tolist() == [[1, 4], [7, 10]]
    assert np.array_equal(last, pixels)


def test_values_are_scaled_then_centred_then_divided() -> None:
    """(x - 127) / 128, as EfficientNet-Lite wants it."""
    pixels = np.array([[[0, 127, 255]]], np.uint8)
    lite = Preprocess(pixel_scale=1.0, mean=(127.0,), std=(128.0,))
    got = images.to_tensor(pixels, lite, "FP32", batched=False).reshape(-1)
    assert got.tolist() == [-127 / 128, 0.0, 1.0]
    per_channel = Preprocess(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    got = images.to_tensor(pixels, per_channel, "FP32", batched=False).reshape(-1)
    assert got == pytest.approx([-1.0, (127 / 255 - 0.25) / 0.25, 1.0])


@pytest.mark.parametrize(
    ("datatype", "expected"), [("UINT8", [0, 128, 255]), ("INT8", [0, 127, 127])]
)
def test_integer_inputs_take_the_nearest_value_in_their_range(
    datatype: str, expected: list[int]
) -> None:
    pixels = np.array([[[0, 128, 255]]], np.uint8)
    got = images.to_tensor(pixels, PLAIN, datatype, batched=False)
    assert got.reshape(-1).tolist() == expected
    assert str(got.dtype) == datatype.lower()


def test_an_image_file_becomes_the_input_in_the_models_colours(tmp_path: Path) -> None:
    red = save(tmp_path / "red.png", np.full((4, 4, 3), (255, 0, 0)))
    for color, expected in (("RGB", [255, 0, 0]), ("BGR", [0, 0, 255]), ("L", [76])):
        chosen = msgspec.structs.replace(PLAIN, color=color)
        tensor = images.load(red, chosen, "FP32", [-1, len(expected), 2, 2])
        assert tensor.shape == (1, len(expected), 2, 2)
        assert tensor[0, :, 0, 0].tolist() == expected


def test_palette_alpha_and_sixteen_bit_images_are_read(tmp_path: Path) -> None:
    kinds = {"p.png": "P", "rgba.png": "RGBA", "la.png": "LA", "one.png": "1", "c.jpg": "CMYK"}
    for name, mode in kinds.items():
        Image.new(mode, (5, 3)).save(tmp_path / name)
        assert images.decode(tmp_path / name, PLAIN).shape == (2, 2, 3)


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    path = save(tmp_path / "grey.png", pixels)
    exact = Preprocess(width=28, height=28, color="L", resize="bicubic")
    assert np.array_equal(images.decode(path, exact)[:, :, 0], pixels)


@pytest.mark.parametrize(
    ("shape", "layout", "size", "color"),
    [
        ([-1, 1, 28, 28], "NCHW", (28, 28), "L"),
        ([1, 3, 224, 200], "NCHW", (224, 200), "RGB"),
        ([1, 224, 200, 3], "NHWC", (224, 200), "RGB"),
        ([28, 30, 1], "NHWC", (28, 30), "L"),
    ],
)
def test_what_the_bundle_does_not_say_is_taken_from_the_inputs_shape(
    shape: list[int], layout: str, size: tuple[int, int], color: str
) -> None:
    name, found = images.preprocess_of(metadata(shape))
    assert (name, found.layout, (found.height, found.width)) == ("x", layout, size)
    assert found.color == color


def test_what_the_bundle_says_stands() -> None:
    stated = {"input": "x", "width": 20, "height": 10, "color": "BGR", "layout": "NHWC"}
    _, found = images.preprocess_of(metadata([1, -1, -1, 3], stated))
    assert (found.width, found.height, found.color, found.layout) == (20, 10, "BGR", "NHWC")


@pytest.mark.parametrize(
    ("described", "input_name"),
    [
        (metadata([1, 16]), ""),
        (metadata([1, 16, 28, 28]), ""),
        (metadata([1, 3, -1, -1]), ""),
        (metadata([1, 3, 1 << 20, 1 << 20]), ""),
        (metadata([1, 3, 8, 8]), "other"),
        (metadata([1, 3, 8, 8], {"width": "wide"}), ""),
        ({"inputs": []}, ""),
    ],
)
def test_an_input_that_takes_no_image_is_refused(
    described: dict[str, Any], input_name: str
) -> None:
    with pytest.raises(RequestError):
        images.preprocess_of(described, input_name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.0, 0.0)},
        {"std": (0.0,)},
        {"std": (1.0, 0.0, 1.0)},
        {"color": "CMYK"},
        {"resize": "lanczos"},
    ],
)
def test_a_wrong_statement_of_the_bundle_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = save(tmp_path / "i.png", np.zeros((2, 2, 3)))
    with pytest.raises(RequestError):
        images.load(path, msgspec.structs.replace(PLAIN, **wrong), "FP32", [1, 3, 2, 2])


@pytest.mark.parametrize("datatype", ["BYTES", "BF16", "BOOL", "NONSENSE"])
def test_an_image_becomes_no_tensor_without_numbers(datatype: str) -> None:
    with pytest.raises(RequestError):
        images.to_tensor(np.zeros((2, 2, 3), np.uint8), PLAIN, datatype, batched=True)


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3))
    whole = save(tmp_path / "whole.png", noise).read_bytes()
    broken = tmp_path / "broken.png"
    for data in (b"", b"hello", whole[:20], whole[: len(whole) // 2]):
        broken.write_bytes(data)
        with pytest.raises(UsageError, match="cannot be read"):
            images.decode(broken, PLAIN)
    with pytest.raises(NotFoundError):
        images.decode(tmp_path / "absent.png", PLAIN)
    with pytest.raises(UsageError):
        images.decode(tmp_path, PLAIN)


@settings(deadline=None)  # the machine may be busy with other tests
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_image_is_read_or_refused_and_nothing_else(
    damage: list[tuple[int, int]],
) -> None:
    import io
    import tempfile

    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9), (1, 2, 3)).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        for offset, value in damage:
            data[offset % len(data)] = value
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            try:
                assert images.decode(Path(file.name), PLAIN).shape == (2, 2, 3)
            except EdgeError:
                pass  # the other allowed outcome


def test_an_image_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UsageError, match="pixels"):
        images.decode(path, PLAIN)


def test_without_pillow_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from pathlib import Path\n"
        "from edge_runtime.bundle.manifest import Preprocess\n"
        "from edge_runtime.client import images\n"
        "try: images.decode(Path('x'), Preprocess())\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UsageError") and "edge-runtime[image]" in done.stdout


def test_the_best_classes_come_first_with_their_labels() -> None:
    logits = np.array([[1.0, 3.0, 2.0, -5.0]], np.float32)
    post = Postprocess(labels=("a", "b", "c"), top_k=2, activation="softmax")
    best = images.classify(logits, post)
    assert [answer.label for answer in best] == ["b", "c"]
    everything = images.classify(logits, post, top=9)
    assert [answer.label for answer in everything] == ["b", "c", "a", "3"]
    assert sum(answer.confidence for answer in everything) == pytest.approx(1.0)
    raw = images.classify(logits, Postprocess())
    assert [(answer.index, answer.confidence) for answer in raw] == [(1, 3), (2, 2), (0, 1)]


def test_activations_do_not_overflow() -> None:
    values = np.array([1e4, -1e4], np.float32)
    for activation, expected in (("softmax", [1.0, 0.0]), ("sigmoid", [1.0, 0.0])):
        got = images.classify(values, Postprocess(activation=activation, top_k=2))
        assert [answer.confidence for answer in got] == expected


def test_an_empty_output_and_an_unknown_activation(tmp_path: Path) -> None:
    assert images.classify(np.zeros((0,), np.float32), Postprocess()) == []
    assert images.classify(np.zeros((0,), np.float32), Postprocess(activation="softmax")) == []
    with pytest.raises(RequestError):
        images.classify(np.zeros(3, np.float32), Postprocess(activation="relu"))
