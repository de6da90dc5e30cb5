"""fp32.onnx -> int8.onnx, static: `python to_int8.py`.

Needs onnx and onnxruntime. Activations are unsigned, weights signed and per output channel: signed
activations are slower than fp32 on x86. Weights use 7 of their 8 bits (`reduce_range`), because on
x86 processors without VNNI the sum of two products is cut off at 16 bits, which gives other answers
there than on the machine that made the goldens.
"""

from __future__ import annotations

import logging
from pathlib import Path

import data
import numpy as np
from onnxruntime import quantization

HERE = Path(__file__).resolve().parent
CALIBRATION_IMAGES = 1024  # the first of the training images; the test images are not touched
BATCH = 128


class TrainingImages(quantization.CalibrationDataReader):
    """The first training images, in batches."""

    def __init__(self, count: int) -> None:
        images, _ = data.load("train")
        self._batches = iter(np.split(data.to_input(images[:count]), count // BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


def main() -> None:
    # It advises to fold and to infer shapes first; the export has done both.
    logging.getLogger().setLevel(logging.ERROR)
    path = HERE / "int8.onnx"
    quantization.quantize_static(
        HERE / "fp32.onnx",
        path,
        TrainingImages(CALIBRATION_IMAGES),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
