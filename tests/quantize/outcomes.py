"""Outcomes for tests: every kind of variant, made by hand.

Law of this file: values only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from quantize.results import Activation, Clipping, Evaluated, Finding, Layer, Outcome
from quantize.scores import Difference, Interval

STEPS = ({"use": "clean"}, {"use": "static_int8", "method": "minmax"})


def variant(name: str, score: float, p50_ms: float, size_bytes: int, **more: Any) -> Evaluated:
    one = Evaluated(
        name,
        "onnxruntime",
        "1.32.0",
        "fp32",
        {"threads": 1},
        f"{name}.onnx",
        score=Interval(score, score - 0.005, score + 0.005),
        against=Difference(0.93 - score, 0.928 - score, 0.932 - score, 0.9316 - score, 0.5, 9, 7),
        p50_ms=p50_ms,
        p95_ms=p50_ms * 1.2,
        spread_ms=p50_ms * 0.01,
        speedup=0.2 / p50_ms,
        size_bytes=size_bytes,
        packed_bytes=size_bytes * 9 // 10,
        memory_bytes=1 << 24,
    )
    return msgspec.structs.replace(one, **more)


def outcome() -> Outcome:
    """A float model, one that ships, one that is wrong, one that is not served."""
    evaluated = (
        variant("fp32", 0.93, 0.2, 1_000_000, notes=("computes in f32 <as told>",)),
        variant("int8", 0.929, 0.08, 260_000, steps=STEPS),
        variant("wrong", 0.1, 0.07, 260_000, steps=STEPS, refusal="answers are worse: 0.1"),
        Evaluated(
            "broken", "openvino", "", "int8", {}, "", STEPS, refusal="openvino does not serve it"
        ),
    )
    clippings = {"int8": Clipping(0.0, 4.0, 0.0, 0.02), "wrong": Clipping(0.0, 1.0, 0.2, 0.25)}
    tensors = tuple(
        Activation(
            f"/{number}/Relu", 0.0, 5.0, tuple(range(64)), (1,) * 64, (0.0, 4.5), 0.03, clippings
        )
        for number in range(14)
    )
    return Outcome(
        "clothes <b>&amp;",
        "top1",
        1000,
        0.95,
        0.01,
        "fp32",
        evaluated,
        {"samples": 512, "sha256": "c" * 64},
        {"machine": "x86_64", "processor": "a processor", "cores": 2},
        {"name": "clothes"},
        "5" * 64,
        12.0,
        ("not tried: what nncf could do",),
        {"samples": 1000, "sha256": "e" * 64},
        (Finding("clipped-ranges", "wrong: ranges of 14 tensors are clipped"),),
        tensors,
        (Layer("/conv", "Conv", 0.05, 0.001), Layer("/fc", "Gemm", 0.01, 0.0)),
    )
