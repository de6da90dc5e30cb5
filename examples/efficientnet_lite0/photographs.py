"""Photographs as the model's input: `python photographs.py FOLDER -o FILE.npz [--views N]`.

Needs Pillow and numpy. Each photograph gives some views of its own (centre and corners at 7/8 of
the side, and their mirror images): more to compare two models with, not more photographs. The array
`groups` says which belong together, so that no interval counts them as samples of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIDE = 224
CROP = 7 / 8
PLACES = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))  # of the crop, x and y
VIEWS_MAX = 2 * len(PLACES)


def to_input(image: Image.Image) -> np.ndarray:
    """FP32 [3, 224, 224]: RGB, (pixel - 127) / 128, as the network was trained."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return ((pixels.astype(np.float32) - 127) / 128).transpose(2, 0, 1)


def views(image: Image.Image, count: int) -> list[np.ndarray]:
    """Square parts of it, the centre first, then mirrored."""
    side = min(image.size)
    square = ImageOps.fit(image, (side, side))
    cut = round(side * CROP)
    free = side - cut
    found = []
    for picture in (square, ImageOps.mirror(square)):
        for x, y in PLACES:
            left, top = round(free * x), round(free * y)
            found.append(to_input(picture.crop((left, top, left + cut, top + cut))))
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=VIEWS_MAX, help="of each, at most 10")
    parser.add_argument("--glob", default="*.jpg")
    arguments = parser.parse_args()
    files = sorted(file for one in arguments.folders for file in one.glob(arguments.glob))
    parts: list[np.ndarray] = []
    groups: list[int] = []
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        if min(picture.size) >= SIDE:
            parts += views(picture, arguments.views)
            groups += [number] * (len(parts) - len(groups))
    np.savez(arguments.out, x=np.stack(parts), groups=np.array(groups))
    print(f"{arguments.out}: {len(parts)} views of {len(files)} files")


if __name__ == "__main__":
    main()
