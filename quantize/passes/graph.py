"""Clean-up: what a quantizer wants to see before it begins.

Law of this file: the answers stay the same. Shapes are inferred, constants folded, normalizations
folded into convolutions, dead nodes dropped; nothing is rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from quantize import onnx_door, onnxruntime_door
from quantize.passes import FLOAT, ONNX, SHAPED, Bench

OPSET_MIN = 13


class Clean(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """onnxruntime's basic graph optimizations, shape inference, and an operator set that can say
    what a quantizer has to (scales per channel came with 13); an older one is raised to it.
    """

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({SHAPED})
    removes: ClassVar[frozenset[str]] = frozenset()

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        onnxruntime_door.optimize(source, out)
        model = onnx_door.raised(onnx_door.load(out), OPSET_MIN)
        onnx_door.save(onnx_door.infer_shapes(model), out)

    def versions(self) -> dict[str, str]:
        return onnxruntime_door.versions()
