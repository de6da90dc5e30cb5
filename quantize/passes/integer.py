"""int8 through onnxruntime.quantization: static and dynamic.

Law of this file: options with their reasons; the work is in `onnxruntime_door`. Defaults are what
measured best over our models: activations unsigned and weights signed per channel, because signed
activations (s8s8) run slower than fp32 on x86 and per-tensor weights cost accuracy for nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from quantize import datasets, onnxruntime_door, scratch
from quantize.passes import FLOAT, INTEGER, ONNX, Bench

Bits = Literal["u8", "s8"]


class StaticInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights and activations are integers; ranges of activations come from calibration.

    Attributes:
        format: qdq: QuantizeLinear/DequantizeLinear pairs, which every backend reads; qoperator:
            integer operators of onnxruntime.
        activations: u16 and s16 keep more of the signal; OpenVINO 2026.4 answers WRONGLY with u16.
        method: how a range is read from the calibration histogram.
        percentile: of method `percentile`: what of a histogram is kept.
        symmetric_activations: zero point 0; needed by some accelerators.
        reduce_range: weights in 7 bits: x86 without VNNI cuts sums off at 16 bits.
        exclude: nodes by name that stay float. operators: only these types; empty: all supported.
        samples: calibration samples used; 0: all that the recipe gives.
    """

    format: Literal["qdq", "qoperator"] = "qdq"
    activations: Literal["u8", "s8", "u16", "s16"] = "u8"
    weights: Literal["u8", "s8"] = "s8"
    per_channel: bool = True
    method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.99
    symmetric_activations: bool = False
    reduce_range: bool = False
    exclude: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply. Ranges of activations that another run found are used again."""
        if bench.cache is None:
            onnxruntime_door.quantize_static(source, out, self, bench)
            return
        kept = bench.cache / f"{self._ranges_key(source, bench)}.ranges.json"
        with tempfile.TemporaryDirectory(dir=bench.cache) as temporary:
            found = Path(temporary) / "ranges.json"
            ranges_file = kept if kept.exists() else found
            onnxruntime_door.quantize_static(source, out, self, bench, ranges_file=ranges_file)
            if found.exists():
                found.replace(kept)

    def _ranges_key(self, source: Path, bench: Bench) -> str:
        """Of all that decides the ranges; how weights are rounded does not."""
        bits = self.activations[1:] if self.method == "mse" else ""
        percentile = self.percentile if self.method == "percentile" else 0
        data = datasets.fingerprint(datasets.Dataset(bench.calibration, None, ""))["sha256"]
        how = (self.method, percentile, bits, self.operators, self.samples)
        return scratch.key(scratch.file_sha256(source), data, how, self.versions())

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions()


class DynamicInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights are integers; activations are quantized at each run, so no calibration is needed.

    Convolutions are left out by default: quantized so they ran four times slower than in fp32.
    """

    weights: Bits = "s8"
    per_channel: bool = True
    reduce_range: bool = False
    operators: tuple[str, ...] = ("MatMul", "Gemm", "Attention", "LSTM", "Gather")
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        onnxruntime_door.quantize_dynamic(source, out, self, bench)

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions()
