"""Photographs as the model's input: `python photographs.py PLACE... -o FILE.npz [--views N]`.

Needs Pillow and numpy. A place is a folder (searched with its subfolders), an image, or a Qt
resource file (.rcc) with images in it. Each photograph gives some views of its own (centre and
corners at 7/8 of the side, and their mirror images): more to calibrate with, but no further
photographs to judge with; the array `groups` says which belong together, so that no interval counts
them as samples of their own. What is transparent becomes white. Equal images count once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIDE = 224
CROP = 7 / 8
PLACES = ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0))  # of the crop, x and y
VIEWS_MAX = 2 * len(PLACES)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_STARTS = re.compile(rb"\xff\xd8\xff|RIFF....WEBP|\x89PNG\r\n", re.DOTALL)


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


def photographs(places: list[Path], glob: str, without: list[str]) -> Iterator[Image.Image]:
    """Those that are large enough, in the order of their names."""
    for place in places:
        files = sorted(place.rglob(glob)) if place.is_dir() else [place]
        for file in files:
            if any(word in str(file) for word in without):
                continue
            if file.suffix == ".rcc":
                yield from _opened(_inside(file.read_bytes()))
            elif file.suffix.lower() in ENDINGS:
                yield from _opened(iter([file.read_bytes()]))


def _inside(data: bytes) -> Iterator[bytes]:
    """From each place that looks like an image's first bytes to the end."""
    for start in IMAGE_STARTS.finditer(data):
        yield data[start.start() :]


def _opened(sources: Iterator[bytes]) -> Iterator[Image.Image]:
    for data in sources:
        try:
            with Image.open(io.BytesIO(data)) as file:
                image = ImageOps.exif_transpose(file).convert("RGBA")
        except OSError:
            continue  # bytes that only look like an image
        if min(image.size) >= SIDE:
            white = Image.new("RGBA", image.size, "white")
            yield Image.alpha_composite(white, image).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("places", metavar="PLACE", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=VIEWS_MAX, help="of each, at most 10")
    parser.add_argument("--glob", default="*", help="which files of folders")
    parser.add_argument("--without", nargs="*", default=[], help="words in paths to leave out")
    arguments = parser.parse_args()
    known: set[bytes] = set()
    parts: list[np.ndarray] = []
    groups: list[int] = []
    for image in photographs(arguments.places, arguments.glob, arguments.without):
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in known:
            known.add(digest)
            parts += views(image, arguments.views)
            groups += [len(known)] * (len(parts) - len(groups))
    np.savez(arguments.out, x=np.stack(parts), groups=np.array(groups))
    print(f"{arguments.out}: {len(parts)} views of {len(known)} photographs")


if __name__ == "__main__":
    main()
