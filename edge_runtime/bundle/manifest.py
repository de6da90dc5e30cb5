"""`model.yaml`: what a bundle says of itself.

Law of this file: values only. It turns a document (YAML or JSON mapping) into a checked, frozen
`Manifest` and back, and knows no file system, archive or runtime. Unknown fields survive a round
trip; every error names the key path.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge_runtime.tensors import TensorSpec

SCHEMA = 1


class Blob(msgspec.Struct, frozen=True):
    """A file of the bundle, named by its content."""

    sha256: str
    size: int
    filename: str = ""


class Tolerance(msgspec.Struct, frozen=True):
    """How far an output may lie from its golden: |got - want| <= atol + rtol * |want|."""

    rtol: float = 1e-3
    atol: float = 1e-4


class Variant(msgspec.Struct, frozen=True):
    """One artifact for one backend, precision and class of device."""

    name: str
    backend: str
    artifact: Blob
    precision: str = ""
    device_class: str = "cpu"
    options: dict[str, Any] = {}
    tolerance: Tolerance = Tolerance()


class GoldenTensor(msgspec.Struct, frozen=True):
    """A recorded tensor: raw little-endian bytes in a blob, with its datatype and concrete shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    blob: Blob


class Golden(msgspec.Struct, frozen=True):
    """A recorded input and the outputs that every variant must give for it."""

    inputs: tuple[GoldenTensor, ...]
    outputs: tuple[GoldenTensor, ...]


class Preprocess(msgspec.Struct, frozen=True):
    """How an image becomes the input: resize, colour, then (x / scale_divisor - mean) / std.

    `pixel_scale` multiplies 0..255 pixels first (1/255 by default gives 0..1); `mean` and `std` are
    per channel (one value: all channels).
    """

    input: str = ""
    width: int = 0
    height: int = 0
    color: str = "RGB"  # RGB, BGR or L (grey)
    layout: str = "NCHW"
    resize: str = "bilinear"  # bilinear, nearest, bicubic
    pixel_scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Postprocess(msgspec.Struct, frozen=True):
    """What the output means."""

    output: str = ""
    labels: tuple[str, ...] = ()
    top_k: int = 3
    activation: str = "none"  # none, softmax, sigmoid: applied before printing confidences


class Budgets(msgspec.Struct, frozen=True):
    """What the model may cost; 0 is "not stated"."""

    latency_ms: float = 0.0
    memory_bytes: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """The typed view of `model.yaml`. `document` keeps everything, also what we do not know."""

    schema: int
    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    label: str = ""
    batch_axis: int | None = None
    preprocess: Preprocess | None = None
    postprocess: Postprocess | None = None
    goldens: tuple[Golden, ...] = ()
    budgets: Budgets = Budgets()
    card: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    document: dict[str, Any] = {}
