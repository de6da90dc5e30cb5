"""Some real test images as PNG -> images/: `python images.py`.

Needs Pillow. No picking: the first test image of each class, whatever the model says of it, named
`CLASS-INDEX.png` by its place in the test set. labels.txt gives the names of the classes in order.
"""

from __future__ import annotations

from pathlib import Path

import data
import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent


def main() -> None:
    images, labels = data.load("t10k")
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for number, label in enumerate(data.LABELS):
        index = int(np.flatnonzero(labels == number)[0])
        name = label.lower().replace("/", "-").replace(" ", "-")
        Image.fromarray(images[index]).save(folder / f"{name}-{index:05d}.png", optimize=True)
        print(f"{label}: test image {index}")
    (HERE / "labels.txt").write_text("\n".join(data.LABELS) + "\n")


if __name__ == "__main__":
    main()
