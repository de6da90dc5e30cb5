"""Quantization of .tflite models through ai-edge-quantizer.

Law of this file: options with their reasons; the work is in `edge_quantizer_door`. An operator is
named by the tensor that it makes (`edge-quantize sensitivity` lists the names); `*` in a name
stands for any text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from quantize import datasets, edge_quantizer_door, scratch
from quantize.passes import FLOAT, INTEGER, SMALL_WEIGHTS, TFLITE, Bench


class TfliteInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights and activations are integers; inputs and outputs stay floats.

    Attributes:
        activations: bits; with 16, LiteRT has no fast kernels on CPUs: convolutions run forty times
            slower than in float.
        method: how ranges are read from the calibration set. average: a moving average of each
            sample's extremes, as the library itself does it; it cut off 14 % of the logits of the
            Fashion-MNIST CNN, and half of the range of a small product.
        percentile: of method `percentile`: what of a histogram is kept.
        exclude: operators that stay float.
        four_bits: convolutions and fully connected operators whose weights are stored in 4 bits: a
            fully connected one keeps its speed, a convolution is slower than in float.
        sixteen_bits: operators with 16-bit activations; see `activations`.
        samples: calibration samples used; 0: all.
    """

    activations: Literal[8, 16] = 8
    method: Literal["average", "minmax", "percentile", "mse"] = "minmax"
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.99
    exclude: tuple[str, ...] = ()
    four_bits: tuple[str, ...] = ()
    sixteen_bits: tuple[str, ...] = ()
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0

    requires: ClassVar[frozenset[str]] = frozenset({TFLITE, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply. Ranges of activations that another run found are used again."""
        if bench.cache is None:
            edge_quantizer_door.quantize_static(source, out, self, bench)
            return
        kept = bench.cache / f"{self._ranges_key(source, bench)}.ranges.json"
        with tempfile.TemporaryDirectory(dir=bench.cache) as temporary:
            found = Path(temporary) / "ranges.json"
            ranges_file = kept if kept.exists() else found
            edge_quantizer_door.quantize_static(source, out, self, bench, ranges_file=ranges_file)
            if found.exists():
                found.replace(kept)

    def _ranges_key(self, source: Path, bench: Bench) -> str:
        """Of all that decides the ranges; how weights are rounded does not."""
        bits = self.activations if self.method == "mse" else 0
        percentile = self.percentile if self.method == "percentile" else 0
        data = datasets.fingerprint(datasets.Dataset(bench.calibration, None, ""))["sha256"]
        how = (self.method, percentile, bits, self.samples)
        return scratch.key(scratch.file_sha256(source), data, how, self.versions())

    def versions(self) -> dict[str, str]:
        return {"ai-edge-quantizer": edge_quantizer_door.version()}


class TfliteWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights are small; no calibration.

    Attributes:
        compute: dynamic: activations become integers at each run: faster on LiteRT, and WRONG
            without any error on tflite-runtime 2.14. float: weights become floats at each run.
        exclude: operators that stay float. four_bits: those whose weights are stored in 4 bits.
    """

    bits: Literal[8, 4] = 8
    compute: Literal["dynamic", "float"] = "dynamic"
    exclude: tuple[str, ...] = ()
    four_bits: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({TFLITE, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        edge_quantizer_door.quantize_weights(source, out, self)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-quantizer": edge_quantizer_door.version()}


class TfliteFloat16(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights are stored as 16-bit floats: half the file. XNNPACK computes in them where the
    processor does (ARM v8.2), elsewhere in 32 bits.

    Attributes:
        exclude: operators whose weights stay as they are.
    """

    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({TFLITE, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        edge_quantizer_door.to_float16(source, out, self)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-quantizer": edge_quantizer_door.version()}
