"""Accuracy on all 10,000 test images -> accuracy.json: `python evaluate.py`.

Needs onnxruntime. One number per artifact and runtime, never per artifact alone: other runtimes
have given silently wrong answers for the same file.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from pathlib import Path

import data
import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
BATCH = 100
LATENCY_RUNS = 1000
MODELS = ("fp32.onnx", "int8.onnx", "pruned.onnx", "pruned_int8.onnx")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answers(model: onnxruntime.InferenceSession, inputs: np.ndarray) -> np.ndarray:
    """The class of each image."""
    batches = np.split(inputs, len(inputs) // BATCH)
    return np.concatenate([model.run(["logits"], {"input": b})[0].argmax(axis=1) for b in batches])


def latency_us_p50(model: onnxruntime.InferenceSession, one: np.ndarray) -> float:
    times_ns = []
    for _ in range(LATENCY_RUNS):
        began_ns = time.perf_counter_ns()
        model.run(["logits"], {"input": one})
        times_ns.append(time.perf_counter_ns() - began_ns)
    return statistics.median(times_ns[LATENCY_RUNS // 10 :]) / 1000


def report(path: Path, inputs: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    model = session(path)
    right = int((answers(model, inputs) == labels).sum())
    share = right / len(labels)
    return {
        "right": right,
        "of": len(labels),
        "accuracy_percent": round(100 * share, 2),
        "standard_error_points": round(100 * math.sqrt(share * (1 - share) / len(labels)), 2),
        "size_bytes": path.stat().st_size,
        "latency_us_p50": round(latency_us_p50(model, inputs[:1])),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    known = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return f"{platform.machine()} ({', '.join(flag for flag in known if flag in flags)})"


def main() -> None:
    images, labels = data.load("t10k")
    inputs = data.to_input(images)
    found = {
        "data": "Fashion-MNIST test images, all 10,000",
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider, 1 thread",
        "processor": processor(),
        "models": {name: report(HERE / name, inputs, labels) for name in MODELS},
    }
    text = json.dumps(found, indent=2)
    (HERE / "accuracy.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
