"""The models that are measured, made here from a seed, and their bundles.

Law of this file: ONNX files in a directory; nothing is run. Weights are random, which changes no
time (no path depends on the data); the shapes are those of real networks.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bench.scenario import BenchError

BUNDLE_TIMEOUT_S = 120.0
EFFICIENTNET = Path(__file__).resolve().parent.parent / "examples/efficientnet_lite0/out/fp32.onnx"


class Spec(NamedTuple):
    """A model: its one FP32 input and output, and how its file comes to be.

    `make` gives None where the model cannot be had on this machine.
    """

    input: str
    shape: tuple[int, ...]
    output: str
    output_shape: tuple[int, ...]
    make: Callable[[], bytes | None]


def tiny() -> bytes:
    """[1,16] through one 16 x 16 matrix: some microseconds, nearly all of it the library's."""
    weights = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": weights},
        ("x", (1, 16)),
        ("y", (1, 16)),
    )


# (channels out, stride) of the depthwise-separable blocks: MobileNetV1's at three quarters width.
_BLOCKS = (
    *((48, 1), (96, 2), (96, 1), (192, 2), (192, 1), (384, 2)),
    *((384, 1),) * 5,
    *((768, 2), (768, 1)),
)


def camera() -> bytes:
    """[1,3,224,224] through MobileNetV1 0.75 to [1,10]; a few milliseconds."""
    net = _Network(np.random.default_rng(1))
    net.convolve(3, 24, kernel=3, stride=2)
    channels = 24
    for out, stride in _BLOCKS:
        net.convolve(channels, channels, kernel=3, stride=stride, groups=channels)
        net.convolve(channels, out, kernel=1)
        channels = out
    net.classify(channels, 10)
    return _model(net.nodes, net.weights, ("x", (1, 3, 224, 224)), ("y", (1, 10)))


def efficientnet() -> bytes | None:
    """EfficientNet-Lite0 with its published weights, where examples/ has built it."""
    return EFFICIENTNET.read_bytes() if EFFICIENTNET.exists() else None


MODELS: Mapping[str, Spec] = {
    "tiny": Spec("x", (1, 16), "y", (1, 16), tiny),
    "tiny2": Spec("x", (1, 16), "y", (1, 16), tiny),
    "camera": Spec("x", (1, 3, 224, 224), "y", (1, 10), camera),
    "lite0": Spec("input", (1, 3, 224, 224), "logits", (1, 1000), efficientnet),
}


def build(names: Iterable[str], directory: Path) -> dict[str, tuple[Path, Path]]:
    """Model and bundle files of those that can be had, made with the command line.

    Raises:
        BenchError: a bundle could not be made.
    """
    made = {}
    for name in names:
        data = MODELS[name].make()
        if data is None:
            continue
        model, bundle = directory / f"{name}.onnx", directory / f"{name}.bundle"
        model.write_bytes(data)
        _create(name, model, bundle)
        made[name] = (model, bundle)
    return made


def _create(name: str, model: Path, bundle: Path) -> None:
    command = [sys.executable, "-m", "edge_runtime", "bundle", "create", str(model)]
    command += ["--name", name, "-o", str(bundle), "--goldens", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BUNDLE_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchError(f"no bundle of {name}: {done.stderr.strip()}")


class _Network:
    """Nodes and weights of a chain of layers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._last = "x"
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def convolve(
        self, channels: int, out: int, *, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        """A convolution with bias and ReLU6."""
        shape = (out, channels // groups, kernel, kernel)
        pad = kernel // 2
        inputs = [self._last, self._weight(shape), self._weight((out,))]
        self._add("Conv", inputs, strides=[stride] * 2, pads=[pad] * 4, group=groups)
        self._add("Clip", [self._last, self._constant(0.0), self._constant(6.0)])

    def classify(self, channels: int, classes: int) -> None:
        """Mean over the image, then a matrix."""
        self._add("GlobalAveragePool", [self._last])
        self._add("Flatten", [self._last])
        inputs = [self._last, self._weight((channels, classes)), self._weight((classes,))]
        self.nodes.append(helper.make_node("Gemm", inputs, ["y"]))

    def _add(self, operator: str, inputs: list[str], **attributes: Any) -> None:
        self._last = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [self._last], **attributes))

    def _weight(self, shape: tuple[int, ...]) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        values = self._rng.normal(scale=(2 / fan_in) ** 0.5, size=shape)
        return self._keep(values.astype(np.float32))

    def _constant(self, value: float) -> str:
        return self._keep(np.array(value, dtype=np.float32))

    def _keep(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = values
        return name


def _model(
    nodes: list[NodeProto],
    weights: Mapping[str, np.ndarray],
    given: tuple[str, tuple[int, ...]],
    wanted: tuple[str, tuple[int, ...]],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
        [helper.make_tensor_value_info(wanted[0], TensorProto.FLOAT, wanted[1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    # The oldest version that has these operators: every onnxruntime we support reads it.
    model: ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    return bytes(model.SerializeToString())
