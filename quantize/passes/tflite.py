"""Quantization of .tflite models through ai-edge-quantizer.

Law of this file: options with their reasons; the work is in `edge_quantizer_door`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from quantize import edge_quantizer_door
from quantize.passes import FLOAT, INTEGER, SMALL_WEIGHTS, TFLITE, Bench


class TfliteInt8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights and activations are integers; inputs and outputs stay floats.

    Attributes:
        activations: bits; 16 keep more of the signal and run slower.
        samples: calibration samples used; 0: all.
    """

    activations: Literal[8, 16] = 8
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0

    requires: ClassVar[frozenset[str]] = frozenset({TFLITE, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({INTEGER})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        edge_quantizer_door.quantize_static(source, out, self, bench)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-quantizer": edge_quantizer_door.version()}


class TfliteWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights are small; no calibration.

    Attributes:
        compute: dynamic: activations become integers at each run: faster on LiteRT, and WRONG
            without any error on tflite-runtime 2.14. float: weights become floats at each run.
    """

    bits: Literal[8, 4] = 8
    compute: Literal["dynamic", "float"] = "dynamic"

    requires: ClassVar[frozenset[str]] = frozenset({TFLITE, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SMALL_WEIGHTS})
    removes: ClassVar[frozenset[str]] = frozenset({FLOAT})

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        edge_quantizer_door.quantize_weights(source, out, self)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-quantizer": edge_quantizer_door.version()}
