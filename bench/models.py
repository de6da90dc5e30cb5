"""The models that are measured, made here from a seed, and their bundles.

Law of this file: ONNX files in a directory; nothing is run. Weights are random, which changes no
time (no path depends on the data); the shapes are those of real networks. Those that are swapped
have a second version that answers differently, so that an answer tells who gave it.
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

Array = np.ndarray[Any, Any]

BUNDLE_TIMEOUT_S = 120.0
EFFICIENTNET = Path(__file__).resolve().parent.parent / "examples/efficientnet_lite0/out/fp32.onnx"


# What tells the answers of a version from those of another: they are multiples.
FACTORS = {1: 1.0, 2: 3.0}
LARGE_ELEMENTS = 65536  # 256 KiB: goes by shared memory
# As deep as it takes for about 1 ms, which is what batching is for; see `rows`.
ROWS_BLOCKS, ROWS_WIDTH = 384, 64


class Spec(NamedTuple):
    """A model: its one FP32 input and output, and how its file comes to be.

    `make` gives None where the model cannot be had on this machine. `name` and `version` are the
    bundle's; the name is the key in MODELS where it is empty.
    """

    input: str
    shape: tuple[int, ...]
    output: str
    output_shape: tuple[int, ...]
    make: Callable[[], bytes | None]
    name: str = ""
    version: int = 1


def tiny(version: int = 1) -> bytes:
    """[1,16] through one 16 x 16 matrix: some microseconds, nearly all of it the library's."""
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": tiny_weights(version)},
        ("x", (1, 16)),
        ("y", (1, 16)),
    )


def tiny_weights(version: int) -> Array:
    """The matrix of a version of `tiny`; the second is three times the first."""
    weights = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    return weights * np.float32(FACTORS[version])


def large(version: int = 1) -> bytes:
    """[1,65536], of which the first sixteen are multiplied: a large tensor and no work."""
    bounds = {"from": [0], "to": [16], "axis": [1]}
    weights: dict[str, Array] = {name: np.array(value) for name, value in bounds.items()}
    weights["factor"] = np.array(FACTORS[version], np.float32)
    return _model(
        [
            helper.make_node("Slice", ["x", "from", "to", "axis"], ["part"]),
            helper.make_node("Mul", ["part", "factor"], ["y"]),
        ],
        weights,
        ("x", (1, LARGE_ELEMENTS)),
        ("y", (1, 16)),
    )


def rows() -> bytes:
    """[N,64] through a deep residual MLP: many small layers, so that a run of sixteen rows costs
    little more than one of one. Some 0.7 ms, and seven to nine times the rows per second at N=16.
    """
    rng = np.random.default_rng(3)
    shape = (ROWS_WIDTH, ROWS_WIDTH)
    weights: dict[str, Array] = {"scale": np.ones(ROWS_WIDTH, np.float32)}
    nodes, last = [], "x"
    for i in range(ROWS_BLOCKS):
        for name in (f"a{i}", f"b{i}"):
            weights[name] = rng.normal(scale=0.05, size=shape).astype(np.float32)
        out = "y" if i == ROWS_BLOCKS - 1 else f"s{i}"
        nodes += [
            helper.make_node("LayerNormalization", [last, "scale"], [f"n{i}"]),
            helper.make_node("Gemm", [f"n{i}", f"a{i}"], [f"p{i}"]),
            helper.make_node("Relu", [f"p{i}"], [f"q{i}"]),
            helper.make_node("Gemm", [f"q{i}", f"b{i}"], [f"r{i}"]),
            helper.make_node("Add", [f"r{i}", last], [out]),
        ]
        last = out
    ends = (("x", ("n", ROWS_WIDTH)), ("y", ("n", ROWS_WIDTH)))
    return _model(nodes, weights, *ends, opset=17)


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
    "rows": Spec("x", (1, ROWS_WIDTH), "y", (1, ROWS_WIDTH), rows),
    "large": Spec("x", (1, LARGE_ELEMENTS), "y", (1, 16), large),
    "tiny-2": Spec("x", (1, 16), "y", (1, 16), lambda: tiny(2), "tiny", 2),
    "tiny2-2": Spec("x", (1, 16), "y", (1, 16), lambda: tiny(2), "tiny2", 2),
    "large2": Spec("x", (1, LARGE_ELEMENTS), "y", (1, 16), large),
    "large2-2": Spec("x", (1, LARGE_ELEMENTS), "y", (1, 16), lambda: large(2), "large2", 2),
    "large-2": Spec("x", (1, LARGE_ELEMENTS), "y", (1, 16), lambda: large(2), "large", 2),
    "camera-2": Spec("x", (1, 3, 224, 224), "y", (1, 10), camera, "camera", 2),
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
        _create(MODELS[name].name or name, MODELS[name].version, model, bundle)
        made[name] = (model, bundle)
    return made


def _create(name: str, version: int, model: Path, bundle: Path) -> None:
    command = [sys.executable, "-m", "edge_runtime", "bundle", "create", str(model)]
    command += ["--name", name, "--version", str(version), "-o", str(bundle), "--goldens", "1"]
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
        self.weights: dict[str, Array] = {}

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

    def _keep(self, values: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = values
        return name


def _model(
    nodes: list[NodeProto],
    weights: Mapping[str, Array],
    given: tuple[str, tuple[int | str, ...]],
    wanted: tuple[str, tuple[int | str, ...]],
    opset: int = 13,
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
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    return bytes(model.SerializeToString())
