"""Images in, input tensors out; output tensors in, labels out.

Law of this file: the only door to Pillow (extra `image`), imported when an image is decoded. What a
model wants is said by its bundle (`Preprocess`, `Postprocess`); nothing is guessed beyond what the
input's shape says. Arithmetic is numpy's, in float32, so that builder and device agree.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from edge_runtime.bundle.manifest import Postprocess, Preprocess
from edge_runtime.errors import NotFoundError, RequestError, UsageError
from edge_runtime.tensors import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Array = np.ndarray[Any, Any]

# Pixels of one image: 64 megapixels is more than any camera of an edge box gives, and a small file
# that unpacks to more is an attack on memory ("decompression bomb").
PIXELS_MAX = 64_000_000
_T = TypeVar("_T")
_MODES = {"RGB": "RGB", "BGR": "RGB", "L": "L"}  # colour of the model -> Pillow's mode
_RESIZES = {"bilinear": "BILINEAR", "nearest": "NEAREST", "bicubic": "BICUBIC"}


class Answer(msgspec.Struct, frozen=True):
    """One class of an output: its index, its label (or the index as text) and its value."""

    index: int
    label: str
    confidence: float


def preprocess_of(metadata: Mapping[str, Any], input_name: str = "") -> tuple[str, Preprocess]:
    """The input for an image and how it is made, from a model's metadata.

    What the bundle does not say (size, channels, layout) is taken from the input's shape.

    Raises:
        RequestError: there is no such input, or its shape is not that of an image.
    """
    given = (metadata.get("parameters") or {}).get("preprocess") or {}
    stated = _typed(given, Preprocess, "preprocess")
    inputs = {str(item["name"]): item for item in metadata.get("inputs") or ()}
    name = input_name or stated.input or next(iter(inputs), "")
    if name not in inputs:
        raise RequestError(
            f"the model has no input {name!r}", expected="one of " + ", ".join(inputs)
        )
    shape = tuple(inputs[name]["shape"])
    layout = stated.layout if given.get("layout") else _layout(shape, name)
    height, width, channels = _image_size(shape, layout, name)
    color = stated.color if given.get("color") else ("L" if channels == 1 else "RGB")
    filled = msgspec.structs.replace(
        stated,
        input=name,
        layout=layout,
        color=color,
        width=stated.width or width,
        height=stated.height or height,
    )
    if filled.width <= 0 or filled.height <= 0:
        raise RequestError(f"the input {name!r} has a free size and the bundle states none")
    if filled.width * filled.height > PIXELS_MAX:
        raise RequestError(
            f"an input of {filled.width} x {filled.height} pixels", expected=f"at most {PIXELS_MAX}"
        )
    return name, filled


def postprocess_of(metadata: Mapping[str, Any]) -> Postprocess:
    """What the outputs mean, from a model's metadata; nothing is known if it says nothing."""
    given = (metadata.get("parameters") or {}).get("postprocess") or {}
    return _typed(given, Postprocess, "postprocess")


def load(path: Path, preprocess: Preprocess, datatype: str, shape: Sequence[int]) -> Array:
    """An image file as the input tensor of its model.

    Args:
        preprocess: complete, as `preprocess_of` gives it.
        datatype, shape: of the input; -1 in the shape is free. A leading batch axis becomes 1.

    Raises:
        UsageError: Pillow is not installed, or the file is not an image that it can read.
        NotFoundError: there is no such file.
    """
    pixels = decode(path, preprocess)
    return to_tensor(pixels, preprocess, datatype, batched=len(shape) == 4)


def decode(path: Path, preprocess: Preprocess) -> Array:
    """The image at the model's size: uint8 (height, width, channels), channels in its order.

    Raises:
        UsageError, NotFoundError: as `load`.
        RequestError: the bundle names a colour or resize method that we do not know.
    """
    mode = _known(preprocess.color, _MODES, "color")
    method = _known(preprocess.resize, _RESIZES, "resize")
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "reading images needs Pillow, which is not installed",
            remedy="pip install 'edge-runtime[image]'",
        ) from error
    size = (preprocess.width, preprocess.height)
    try:
        with Image.open(path) as image:
            _check_pixels(image.size, path)
            # A JPEG may be decoded at 1/2, 1/4 or 1/8, as long as there is twice the size left.
            image.draft(mode, (2 * size[0], 2 * size[1]))
            plain = image.convert(mode)
        if plain.size != size:
            plain = plain.resize(size, Image.Resampling[method])
    except FileNotFoundError as error:
        raise NotFoundError("there is no such image", where=str(path)) from error
    except (*_PARSING_ERRORS, Image.DecompressionBombError) as error:
        raise UsageError(
            f"the image cannot be read: {error}",
            where=str(path),
            expected="a file that Pillow reads (PNG, JPEG, BMP, ...)",
        ) from error
    pixels = np.asarray(plain, dtype=np.uint8).reshape(size[1], size[0], -1)
    return pixels[:, :, ::-1] if preprocess.color == "BGR" else pixels


def to_tensor(pixels: Array, preprocess: Preprocess, datatype: str, *, batched: bool) -> Array:
    """Scale, normalise and lay out pixels: (x * pixel_scale - mean) / std, then the layout.

    Args:
        pixels: uint8 (height, width, channels).
        datatype: of the input. Integer inputs take the result rounded, within their range.

    Raises:
        RequestError: mean or std do not fit the channels, or the datatype takes no pixels.
    """
    channels = pixels.shape[2]
    mean = _per_channel(preprocess.mean, channels, "mean")
    std = _per_channel(preprocess.std, channels, "std")
    if not np.all(std):
        raise RequestError("a std of 0", where="preprocess.std")
    if datatype not in DATATYPES or datatype in ("BYTES", "BF16", "BOOL"):
        raise RequestError(f"an image cannot become a {datatype} input")
    dtype = np.dtype(DATATYPES[datatype][0])
    values = (pixels.astype(np.float32) * np.float32(preprocess.pixel_scale) - mean) / std
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    if preprocess.layout.endswith("CHW"):
        values = values.transpose(2, 0, 1)
    tensor = np.ascontiguousarray(values, dtype=dtype)
    return tensor[np.newaxis] if batched else tensor


def classify(output: Array, postprocess: Postprocess, top: int = 0) -> list[Answer]:
    """The best classes of one sample's output, best first.

    Args:
        output: any shape; it is flattened, a class for each element.
        top: how many; 0: as the bundle says.
    """
    activation = _known(postprocess.activation, _ACTIVATIONS, "activation")
    values = activation(np.asarray(output, dtype=np.float64).reshape(-1))
    order = np.argsort(-values, kind="stable")[: max(top or postprocess.top_k, 1)]
    return [Answer(int(i), _label(postprocess.labels, int(i)), float(values[i])) for i in order]


# --- parts --------------------------------------------------------------------------------------

# Pillow's readers raise whatever their parsing of a damaged file runs into.
_PARSING_ERRORS = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError)


def _check_pixels(size: tuple[int, int], path: Path) -> None:
    if math.prod(size) > PIXELS_MAX:
        raise UsageError(
            f"the image has {size[0]} x {size[1]} pixels",
            where=str(path),
            expected=f"at most {PIXELS_MAX} pixels",
        )


def _softmax(values: Array) -> Array:
    exponents = np.exp(values - values.max(initial=-np.inf))
    return np.asarray(exponents / exponents.sum())


def _sigmoid(values: Array) -> Array:
    # tanh does not overflow where exp(-x) would
    return np.asarray(0.5 * (1.0 + np.tanh(values / 2)))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": np.asarray,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
}


def _label(labels: tuple[str, ...], index: int) -> str:
    return labels[index] if index < len(labels) else str(index)


def _typed(given: Any, kind: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"the model's metadata is wrong: {error}", where=where) from error


def _known(name: str, table: Mapping[str, _T], what: str) -> _T:
    if name not in table:
        raise RequestError(
            f"{what} {name!r} is not known", where=what, expected="one of " + ", ".join(table)
        )
    return table[name]


def _layout(shape: tuple[int, ...], name: str) -> str:
    """NCHW or NHWC, by where the 1 or 3 channels are; NCHW if they could be at either end."""
    if len(shape) in (3, 4):
        if shape[-3] in (1, 3):
            return "NCHW"
        if shape[-1] in (1, 3):
            return "NHWC"
    raise _not_an_image(shape, name)


def _image_size(shape: tuple[int, ...], layout: str, name: str) -> tuple[int, int, int]:
    """(height, width, channels) of a 3- or 4-dimensional input; -1 where it is free."""
    if len(shape) not in (3, 4):
        raise _not_an_image(shape, name)
    if layout.endswith("CHW"):
        return shape[-2], shape[-1], shape[-3]
    return shape[-3], shape[-2], shape[-1]


def _not_an_image(shape: tuple[int, ...], name: str) -> RequestError:
    return RequestError(
        f"the input {name!r} of shape {list(shape)} does not take an image",
        expected="[N,C,H,W] or [N,H,W,C] with 1 or 3 channels",
        remedy="give an array with --npy, or name another input with --input",
    )


def _per_channel(values: tuple[float, ...], channels: int, what: str) -> Array:
    if len(values) not in (1, channels):
        raise RequestError(
            f"{len(values)} values for {channels} channels",
            where=f"preprocess.{what}",
            expected=f"1 or {channels}",
        )
    return np.asarray(values, dtype=np.float32)
