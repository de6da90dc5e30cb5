"""What a run found out: values only.

Law of this file: frozen structs that report, pack and search share; no step that makes them.
Nothing measured is rounded here.
"""

from __future__ import annotations

from typing import Any

import msgspec

from quantize import recipe
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
        size_bytes, packed_bytes: of the file; and compressed, as it travels (an estimate of large
            files, from pieces).
        memory_bytes: private bytes of the worker that served it.
        macs: multiply-accumulates of one sample, of an ONNX model; 0: not known.
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
    macs: int = 0
    placement: tuple[dict[str, Any], ...] = ()
    refusal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether it is the float model as it is: no pass, and no smaller precision asked for."""
        return not self.steps and not recipe.computes_in(self.backend, self.options)


class Clipping(msgspec.Struct, frozen=True):
    """The range that a variant's quantizer keeps of a tensor, and what it cuts off.

    `calibration`, `evaluation`: the share of the float model's values outside, 0 to 1.
    """

    low: float
    high: float
    calibration: float
    evaluation: float


class Activation(msgspec.Struct, frozen=True):
    """A tensor that is quantized, as the float model computes it.

    Attributes:
        low, high: of all bins; calibration, evaluation: counts of equal bins between them.
        seen: smallest and largest value over the calibration samples.
        beyond: the share of evaluation samples with a value outside `seen`.
        clippings: by variant.
    """

    name: str
    low: float
    high: float
    calibration: tuple[int, ...]
    evaluation: tuple[int, ...]
    seen: tuple[float, float]
    beyond: float
    clippings: dict[str, Clipping]


class Layer(msgspec.Struct, frozen=True):
    """What it costs to quantize one node alone.

    `error`: of its output, relative (norm of the difference / norm). `drop`: of the metric, against
    float. `whole_error`: of its output when every node is quantized.
    """

    node: str
    operator: str
    error: float
    drop: float
    whole_error: float = 0.0


class Finding(msgspec.Struct, frozen=True):
    """Something wrong with the data; `fault` is its name in docs/compression.md."""

    fault: str
    text: str


class Outcome(msgspec.Struct, frozen=True):
    """A whole run.

    Attributes:
        reference: name of the float variant that the others are compared with.
        evaluated: every variant, the reference first, shipped or refused.
        calibration: fingerprint of the calibration set. machine: what it was measured on.
        seconds: the run took. evaluation: fingerprint of the samples that judged.
        groups: that the samples are in; 0: each is its own.
        findings: what is wrong with the data. activations: of quantized tensors, where the model
            is ONNX. layers: what a sensitivity analysis found; empty if there was none.
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
    evaluation: dict[str, Any] = {}
    findings: tuple[Finding, ...] = ()
    activations: tuple[Activation, ...] = ()
    layers: tuple[Layer, ...] = ()
    groups: int = 0

    def of(self, name: str) -> Evaluated:
        """The variant of that name."""
        return next(one for one in self.evaluated if one.name == name)

    @property
    def shipped(self) -> tuple[Evaluated, ...]:
        """Those that passed, fastest first."""
        fit = [one for one in self.evaluated if not one.refusal]
        return tuple(sorted(fit, key=lambda one: one.p50_ms))

    @property
    def judged_by(self) -> str:
        """How much judged, for people."""
        return many(self.samples, self.groups)

    @property
    def has_gain(self) -> bool:
        """Whether a variant that was made passed, or none was to be made."""
        made = [one for one in self.evaluated if not one.is_float]
        return not made or any(not one.refusal for one in made)


def many(samples: int, groups: int) -> str:
    """So many samples, for people; 0 groups: each is its own."""
    return f"{samples} samples" + (f" in {groups} groups" if groups else "")


def percent(share: float) -> str:
    """A confidence for people, as it was stated: 99.5 % is not 100 %."""
    return f"{100 * share:.6g}%"
