"""Fashion-MNIST as arrays, from the files that Debian's `dataset-fashion-mnist` installs.

Law of this file: it reads files, and alone says how pixels become the model's input.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

FOLDER = Path("/usr/share/datasets/fashion-mnist")
# In the order of the label numbers, as the data set's own README lists them.
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PARTS = {"train": 60_000, "t10k": 10_000}


def load(part: str, folder: Path = FOLDER) -> tuple[np.ndarray, np.ndarray]:
    """Images UINT8 [N, 28, 28] (0: background) and labels UINT8 [N]; part is "train" or "t10k"."""
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    if images.shape != (PARTS[part], 28, 28) or labels.shape != (PARTS[part],):
        raise SystemExit(f"{folder}: {part} is not Fashion-MNIST: {images.shape} {labels.shape}")
    return images, labels


def to_input(images: np.ndarray) -> np.ndarray:
    """The model's input: FP32 [N, 1, 28, 28], pixels divided by 255."""
    return (images.astype(np.float32) / np.float32(255))[:, np.newaxis]


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, rank, big-endian sizes, then the elements."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist")
    data = gzip.decompress(path.read_bytes())
    zeros, kind, rank = struct.unpack_from(">HBB", data)
    if zeros or kind != 8:
        raise SystemExit(f"{path} is not an IDX file of bytes")
    shape = struct.unpack_from(f">{rank}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
