"""What a run found out: values only.

Law of this file: frozen structs that report, pack and search share; no step that makes them.
Nothing measured is rounded here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from quantize.scores import Difference, Interval


class Evaluated(msgspec.Struct, frozen=True):
    """One variant on one backend, as measured.

    Attributes:
        path: the model file; empty if there is none.
        steps: the passes with all their options.
        score: of the metric, larger is better; against: the loss compared with the float model.
        p50_ms, p95_ms, spread_ms: of one run at batch 1 in the backend, all variants interleaved.
        speedup: the float model's latency on the same backend / this one's, same rounds; 0: the
            float model does not run there, so it is compared with the reference backend's.
        size_bytes, packed_bytes: of the file; and compressed, as it travels.
        memory_bytes: private bytes of the worker that served it.
        refusal: why it is not shipped; empty if it is.
        notes: what a person should know: what the backend did silently, why it is slower.
    """

    name: str
    backend: str
    backend_version: str
    precision: str
    options: dict[str, Any]
    path: str
    steps: tuple[dict[str, Any], ...] = ()
    score: Interval | None = None
    against: Difference | None = None
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    spread_ms: float = 0.0
    load_ms: float = 0.0
    speedup: float = 0.0
    size_bytes: int = 0
    packed_bytes: int = 0
    memory_bytes: int = 0
    placement: tuple[dict[str, Any], ...] = ()
    refusal: str = ""
    notes: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """A whole run.

    Attributes:
        reference: name of the float variant that the others are compared with.
        evaluated: every variant, the reference first, shipped or refused.
        calibration: fingerprint of the calibration set. machine: what it was measured on.
        versions: libraries. seconds: the run took.
    """

    name: str
    metric: str
    samples: int
    confidence: float
    drop_max: float
    reference: str
    evaluated: tuple[Evaluated, ...]
    calibration: dict[str, Any]
    machine: dict[str, Any]
    recipe: dict[str, Any]
    source_sha256: str
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> Evaluated:
        """The variant of that name."""
        return next(one for one in self.evaluated if one.name == name)

    @property
    def shipped(self) -> tuple[Evaluated, ...]:
        """Those that passed, fastest first."""
        fit = [one for one in self.evaluated if not one.refusal]
        return tuple(sorted(fit, key=lambda one: one.p50_ms))
