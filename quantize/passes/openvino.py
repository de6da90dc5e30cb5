"""int8 through NNCF, for OpenVINO (and whatever else reads quantize/dequantize pairs).

Law of this file: options with their reasons; the work is in `nncf_door`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from quantize import nncf_door, onnx_door
from quantize.passes import FLOAT, INTEGER, ONNX, Bench


class NncfInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Post-training quantization with bias correction.

    Attributes:
        preset: mixed: activations asymmetric, weights symmetric: more right after ReLU, GELU and
            the like; performance: all symmetric.
        fast_bias_correction: false: every layer's own correction: slower, at times more right.
        model_type: transformer keeps what attention needs in float.
        exclude: nodes by name that stay float.
    """

    preset: Literal["mixed", "performance"] = "mixed"
    fast_bias_correction: bool = True
    model_type: Literal["any", "transformer"] = "any"
    exclude: tuple[str, ...] = ()

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        nncf_door.quantize(source, out, self, bench)

    def versions(self) -> dict[str, str]:
        return {"nncf": nncf_door.version(), "onnx": onnx_door.version()}
