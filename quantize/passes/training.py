"""Training again after pruning, by the user's own function.

Law of this file: options; the work is in `torch_door`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from edge_runtime.errors import UsageError
from quantize import recipe, torch_door
from quantize.passes import FLOAT, ONNX, Bench


class FineTune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model is trained by `module:function`, which gets (torch module, seed).

    Attributes:
        train: the function. round: part of the name of the result: another number trains anew where
            something changed that neither recipe nor the function's own file shows (its data).
    """

    train: str
    round: int = 0

    requires: ClassVar[frozenset[str]] = frozenset({ONNX, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply."""
        if not recipe.is_callable(self.train):
            raise UsageError(
                f"{self.train!r} names no function", where="train", expected="module:function"
            )
        torch_door.fine_tune(source, out, self.train, bench.seed, bench.say)

    def versions(self) -> dict[str, str]:
        """torch, and the file of the function: a result of other code is not taken again."""
        return {"torch": torch_door.version(), self.train: torch_door.code_sha256(self.train)}
