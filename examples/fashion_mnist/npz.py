"""The data as `edge-quantize` reads them -> test.npz, train.npz: `python npz.py`.

test.npz: all 10,000 test images. train.npz: the first 2,048 training images, to calibrate with.
"""

from __future__ import annotations

from pathlib import Path

import data
import numpy as np

HERE = Path(__file__).resolve().parent
CALIBRATION_IMAGES = 2048


def main() -> None:
    for part, name, count in (("t10k", "test", None), ("train", "train", CALIBRATION_IMAGES)):
        images, labels = data.load(part)
        np.savez(HERE / f"{name}.npz", x=data.to_input(images[:count]), y=labels[:count])
        print(f"{name}.npz: {len(labels[:count])} images")


if __name__ == "__main__":
    main()
