"""The CNN with outliers: in float the same model, in integers not.

Law of this file: one channel of one layer is made larger and what reads it smaller by as much (ReLU
and MaxPool keep factors), as training does by itself in some networks. One scale for the whole
tensor then leaves the other channels a few steps. `python outlier.py` writes out/outlier.onnx.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

FACTOR = 100.0
CHANNELS = (3, 7)
LAYER, READER = ("onnx::Conv_51", "onnx::Conv_52"), "onnx::Conv_54"  # weights and bias; weights


def plant(source: Path, out: Path, factor: float = FACTOR) -> None:
    """Write the model with its two channels `factor` times larger."""
    model = onnx.load(source)
    held = {one.name: one for one in model.graph.initializer}
    for name, times in ((LAYER[0], factor), (LAYER[1], factor), (READER, 1 / factor)):
        array = onnx.numpy_helper.to_array(held[name]).copy()
        rows = array[:, list(CHANNELS)] if name == READER else array[list(CHANNELS)]
        rows = rows * np.float32(times)
        if name == READER:
            array[:, list(CHANNELS)] = rows
        else:
            array[list(CHANNELS)] = rows
        held[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, out)


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "out").mkdir(exist_ok=True)
    plant(folder / "fp32.onnx", folder / "out" / "outlier.onnx")
