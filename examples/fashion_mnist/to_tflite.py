"""fp32.onnx -> fp32.tflite, dynamic.tflite, static.tflite: `python to_tflite.py`.

Needs torch, litert-torch, ai-edge-quantizer and onnx, in an environment of its own (2 GB). The same
weights as fp32.onnx; the batch is 1, as .tflite files are most often made. dynamic.tflite (weights
int8, activations quantized while it runs) is here because tflite-runtime 2.14 answers wrongly with
it and says nothing: goldens are there to notice that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data
import litert_torch
import net
import numpy as np
import torch
from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe
from torch import nn

HERE = Path(__file__).resolve().parent
CALIBRATION_IMAGES = 1024  # the first of the training images, as in to_int8.py


class Named(nn.Module):
    """The network with the name that the .onnx file gives its output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = net.network()

    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.network(input)}


def calibration() -> dict[str, list[dict[str, Any]]]:
    images, _ = data.load("train")
    inputs = data.to_input(images[:CALIBRATION_IMAGES])
    return {"serving_default": [{"input": one[np.newaxis]} for one in inputs]}


def quantized(path: Path, how: Any, samples: Any | None, out: Path) -> None:
    made = quantizer.Quantizer(str(path), how)
    for edge in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        # Floats in and out, so that the variants can stand for each other.
        made.update_quantization_recipe(
            ".*", edge, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    ranges = made.calibrate(samples) if samples else None
    out.unlink(missing_ok=True)
    made.quantize(ranges).export_model(str(out))


def main() -> None:
    float_path = HERE / "fp32.tflite"
    example = {"input": torch.zeros(1, 1, 28, 28)}
    litert_torch.convert(Named().eval(), sample_kwargs=example).export(str(float_path))
    quantized(float_path, recipe.dynamic_wi8_afp32(), None, HERE / "dynamic.tflite")
    quantized(float_path, recipe.static_wi8_ai8(), calibration(), HERE / "static.tflite")
    for path in (float_path, HERE / "dynamic.tflite", HERE / "static.tflite"):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
