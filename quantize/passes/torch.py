"""Pruning of the torch module itself, with training between the rounds.

Law of this file: options, and the order of steps; the work is in `torch_pruning_door`. What comes
out is exported and compared as any torch source is.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np

from quantize import origins, scratch, torch_door, torch_modules, torch_pruning_door
from quantize.passes import FLOAT, PRUNED, TORCH, Bench

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
SAMPLES = 32  # that the pruned module's export is compared on


class TorchPrune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whole channels of the module go; then `train` is called with (module, seed).

    Attributes:
        ratio: share of the channels of each group that goes (with `across`: of all channels).
        across: rank the channels of all layers together: thin layers may lose little.
        importance: what decides who goes: the size of a group's weights (l2, l1), or that beside
            what is left of their layer (lamp).
        rounds: the ratio is reached in so many equal steps, with training after each.
        keep_min: of each layer, the share that stays in any case.
        multiple: channels kept are a multiple of this, rounded down.
        exclude: names of modules whose channels stay (model.named_modules()).
        train: `module:function`, as of fine_tune; it gets the user's own module. Empty: none.
        round: part of the name of the result, as of fine_tune.
    """

    ratio: Share = 0.5
    across: bool = False
    importance: Literal["l2", "l1", "lamp"] = "l2"
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    keep_min: Share = 0.1
    multiple: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    exclude: tuple[str, ...] = ()
    train: str = ""
    round: int = 0

    requires: ClassVar[frozenset[str]] = frozenset({TORCH, FLOAT})
    ensures: ClassVar[frozenset[str]] = frozenset({PRUNED})
    removes: ClassVar[frozenset[str]] = frozenset()

    def apply(self, source: Path, out: Path, bench: Bench) -> None:
        """See passes.Pass.apply. Pruned and trained once for all formats."""
        assert bench.cache is not None
        made = torch_modules.load(bench.module)
        first = [bench.calibration[spec.name][: torch_modules.ROWS_TRACED] for spec in bench.inputs]
        key = scratch.key(
            "torch_prune",
            [self, self.versions(), made.source, made.code_sha256, made.weights_sha256],
            torch_modules.answers_sha256(made, torch_modules.alone(first)),
            [bench.seed, bench.batch_axis],
        )
        program = scratch.Scratch(bench.cache).made(
            key, torch_modules.PROGRAM, lambda draft: self._write(made, draft, bench)
        )
        with tempfile.TemporaryDirectory() as folder:
            samples = Path(folder) / "samples.npz"
            some: dict[str, Any] = {k: one[:SAMPLES] for k, one in bench.calibration.items()}
            np.savez(samples, **some)
            shutil.copyfile(origins.of_program(program, samples, source, bench), out)

    def _write(self, made: torch_modules.Module, out: Path, bench: Bench) -> None:
        given = [bench.calibration[spec.name] for spec in bench.inputs]
        pruned = torch_pruning_door.pruned(made, given, self, bench)
        torch_modules.save_program(pruned, given, out, free=bench.batch_axis == 0)

    def versions(self) -> dict[str, str]:
        """torch, torch-pruning and the file of the function that trains."""
        found = {"torch": torch_door.version(), "torch-pruning": torch_pruning_door.version()}
        return found | ({self.train: torch_door.code_sha256(self.train)} if self.train else {})
