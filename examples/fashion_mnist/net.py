"""The trained network as a torch module: the source of torch.recipe.yaml, and of to_tflite.py.

Needs torch and onnx. The weights are those of fp32.onnx, where normalization is in them already.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import nn

WEIGHTS = Path(__file__).resolve().parent / "fp32.onnx"


class Network(nn.Module):
    """FP32 [N, 1, 28, 28] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *convolution(1, 32),
            *convolution(32, 32),
            nn.MaxPool2d(2),
            *convolution(32, 64),
            *convolution(64, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layers(input)


def convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]


def network() -> Network:
    """Trained, in eval mode. Each layer of the file has weights and biases, in this order."""
    graph = onnx.load(WEIGHTS).graph
    known = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    arrays = [known[name] for node in graph.node for name in node.input if name in known]
    model = Network()
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data = torch.from_numpy(array.copy())
    return model.eval()
