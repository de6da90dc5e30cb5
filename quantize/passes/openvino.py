"""Quantization through NNCF, for OpenVINO (and whatever else reads quantize/dequantize pairs).

Law of this file: options with their reasons; the work is in `nncf_door`. A result has the source's
format: ONNX stays ONNX, OpenVINO IR stays IR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from quantize import nncf_door
from quantize.passes import FLOAT, INTEGER, ONNX, OPENVINO, SMALL_WEIGHTS, Bench


class NncfInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Post-training quantization with bias correction.

    Attributes:
        preset: mixed: activations asymmetric, weights symmetric: more right after ReLU, GELU and
            the like; performance: all symmetric.
        fast_bias_correction: false: every layer's own correction: slower, at times more right.
        model_type: transformer keeps what attention needs in float.
        ranges: mean: of activations the average of the samples' extremes, which cuts off outliers;
            minmax: the extremes of all.
        exclude: nodes by name that stay float.
    """

    preset: Literal["mixed", "performance"] = "mixed"
    fast_bias_correction: bool = True
    model_type: Literal["any", "transformer"] = "any"
    ranges: Literal["mean", "minmax"] = "mean"
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, OPENVINO, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        nncf_door.quantize(source, out, self, bench)

    def versions(self) -> dict[str, str]:
        return nncf_door.versions()


class NncfAccuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As nncf_int8, then back into float, group by group, until the answers are right enough.

    They are judged by the recipe's metric on the backend of the variant, by samples that neither
    calibrate nor judge it: what the calibration data hold beyond `calibration.samples`, or else a
    half of these. Without labels the float model's answers stand for the truth.

    Attributes:
        drop_max: the loss of the metric on those samples at which it stops; null: half of the
            budget, because the verdict wants its upper bound kept.
        steps_max: groups put back at most; each costs a run over those samples. 0: all there are.
        preset, fast_bias_correction, model_type, ranges, exclude: as in nncf_int8.
    """

    drop_max: Annotated[float, msgspec.Meta(ge=0)] | None = None
    steps_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    preset: Literal["mixed", "performance"] = "mixed"
    fast_bias_correction: bool = True
    model_type: Literal["any", "transformer"] = "any"
    ranges: Literal["mean", "minmax"] = "mean"
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, OPENVINO, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})
    validates: ClassVar[bool] = True

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        nncf_door.quantize_with_control(source, out, self, bench)

    def versions(self) -> dict[str, str]:
        return nncf_door.versions()


class NncfWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of OpenVINO IR in 8 or 4 bits, activations as they were; no calibration.

    Not of ONNX: there NNCF 3.4 writes scales for convolutions that OpenVINO 2026.4 does not read
    ("needs to be a scalar or a vector"); the pass `weight_only` is for ONNX.

    Attributes:
        bits: 8: one scale per output channel, everything with weights, embeddings too. 4: products
            (MatMul, Gemm), in groups; embeddings and the last layer stay at 8.
        symmetric: no zero point: a little smaller, a little less right.
        group: weights that share a scale, with 4 bits; -1: a whole channel.
        share: of the weights that get 4 bits, the rest stays at 8; the least sensitive come first.
        exclude: nodes by name that keep their weights.
    """

    bits: Literal[8, 4] = 8
    symmetric: bool = False
    group: Annotated[int, msgspec.Meta(ge=-1, le=1024)] = 64
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({OPENVINO, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        nncf_door.compress_weights(source, out, self)

    def versions(self) -> dict[str, str]:
        return nncf_door.versions()
