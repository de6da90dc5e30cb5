"""What a search tries: first every setting that the libraries offer in one shot, then more.

Law of this file: pure; finished trials in, ideas out. What follows from a trial is decided by its
loss, size and count of multiplications, never by a time that was measured: so the same seed tries
the same things in the same order on every machine. Randomness is by seed and round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from quantize import pareto
from quantize.kernels import Slow
from quantize.passes import ONNX, OPENVINO, TFLITE
from quantize.recipe import Search, Variant
from quantize.trials import Trial

CLEAN: dict[str, Any] = {"use": "clean"}
PARENTS = 2  # of each backend that stages build upon: the best ranges method is not known before
SIDESTEPS = 8  # random neighbours proposed per round, to find some that are new
RATIO_STEP, LAYER_STEP = 0.0625, 0.125  # of all layers, and of one


class Facts(NamedTuple):
    """What is known of the model.

    Attributes:
        operators: kinds of its nodes. slow: nodes to leave float for speed. layers: nodes that can
            be quantized, the most sensitive first. four: of a .tflite model those whose weights may
            have 4 bits, in its order; connected: the fully connected ones among them. also: other
            formats that there are of the model. channels: of each group of channels that may go, a
            node that makes it.
    """

    format: str
    operators: frozenset[str]
    slow: Slow = Slow()
    layers: tuple[str, ...] = ()
    four: tuple[str, ...] = ()
    connected: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()


class Idea(NamedTuple):
    """Something to try; the variant has no name yet."""

    variant: Variant
    why: str


class _Shot(NamedTuple):
    """A setting of a library. `needs`: module; `operators`: as in proposing."""

    why: str
    step: dict[str, Any]
    needs: str = ""
    operators: frozenset[str] = frozenset()


def _static(why: str, **options: Any) -> _Shot:
    return _Shot(f"onnxruntime {why}", {"use": "static_int8", **options})


def _nncf(why: str, **options: Any) -> _Shot:
    return _Shot(f"NNCF {why}", {"use": "nncf_int8", **options}, "nncf")


def _nncf_weights(why: str, **options: Any) -> _Shot:
    return _Shot(f"NNCF {why}", {"use": "nncf_weights", **options}, "nncf")


def _edge(why: str, **step: Any) -> _Shot:
    return _Shot(f"ai-edge-quantizer {why}", step, "ai_edge_quantizer")


_PRODUCTS = frozenset({"MatMul", "Gemm", "LSTM", "GRU", "Attention"})
_PAIRS = (
    _static("minmax", method="minmax"),
    _static("minmax per tensor", method="minmax", per_channel=False),
    _static("entropy", method="entropy"),
    _static("percentile", method="percentile"),
    _static("mse", method="mse"),
)
_BY_NNCF = (
    _nncf("mixed"),
    _nncf("performance", preset="performance"),
    _nncf("slow bias correction", fast_bias_correction=False),
)
_CONTROLLED = _Shot("NNCF accuracy-controlled", {"use": "nncf_accuracy"}, "nncf")
# OpenVINO 2026.4 answers wrongly with 16-bit activations, so they are not tried there.
SHOTS: dict[tuple[str, str], tuple[_Shot, ...]] = {
    (ONNX, "onnxruntime"): (
        *_PAIRS,
        _static("minmax s8 activations", activations="s8"),
        _static("minmax u16 activations", activations="u16"),
        _static("minmax QOperator", format="qoperator"),
        _Shot("onnxruntime dynamic", {"use": "dynamic_int8"}, "", _PRODUCTS),
        _Shot("8-bit weights", {"use": "weight_only"}),
        *_BY_NNCF,
    ),
    (ONNX, "openvino"): (*_PAIRS, *_BY_NNCF, _CONTROLLED),
    (OPENVINO, "openvino"): (
        *_BY_NNCF,
        _CONTROLLED,
        _nncf_weights("weights"),
        _nncf_weights("4-bit weights", bits=4),
        _Shot("float16", {"use": "float16"}),
    ),
    (TFLITE, "litert"): (
        _edge("static", use="tflite_int8", method="average"),
        _edge("static minmax", use="tflite_int8", method="minmax"),
        _edge("static percentile", use="tflite_int8", method="percentile"),
        _edge("static mse", use="tflite_int8", method="mse"),
        _edge("static a16w8", use="tflite_int8", activations=16),
        _edge("dynamic", use="tflite_weights"),
        _edge("weights", use="tflite_weights", compute="float"),
        _edge("4-bit weights", use="tflite_weights", bits=4),
        _edge("float16", use="tflite_float16"),
    ),
}
_RANGES: tuple[dict[str, Any], ...] = (
    {"method": "minmax"},
    {"method": "entropy"},
    {"method": "mse"},
    {"method": "percentile", "percentile": 99.9},
    {"method": "percentile", "percentile": 99.99},
    {"method": "percentile", "percentile": 99.999},
)
_TFLITE_RANGES = ({"method": "average"}, *(one for one in _RANGES if one["method"] != "entropy"))
_EXCLUDING = ("static_int8", "nncf_int8", "tflite_int8")
_FEWER_BITS = ("tflite_int8", "tflite_weights")


def single_shots(
    facts: Facts, backends: Sequence[str], is_here: Callable[[str], bool]
) -> list[Idea]:
    """Every setting whose library is installed."""
    return [
        Idea(
            Variant("", backend, passes=(*((CLEAN,) if kind == ONNX else ()), shot.step)), shot.why
        )
        for backend in backends
        for kind in (facts.format, *facts.also)
        for shot in SHOTS.get((kind, backend), ())
        if (not shot.operators or shot.operators & facts.operators)
        and (not shot.needs or is_here(shot.needs))
    ]


# --- stages: each is told what was found before it ------------------------------------------------


def for_speed(facts: Facts, found: Sequence[Trial], _: Search) -> list[Idea]:
    """Leave float what integer kernels serve badly."""
    thin, depthwise, last = facts.slow
    sets = {
        "few input channels stay float": thin,
        "depthwise stays float": depthwise,
        "few input channels and depthwise stay float": (*thin, *depthwise) if depthwise else (),
        "few input channels and the last stay float": (*thin, *last) if thin else (),
        "the last stays float": last,
    }
    return [
        Idea(_excluding(parent.variant, names), f"{parent.variant.name}: {why}")
        for parent in parents(found)
        for why, names in sets.items()
        if names
    ]


def by_sensitivity(facts: Facts, found: Sequence[Trial], _: Search) -> list[Idea]:
    """Leave float the 1, 2, 4, ... most sensitive, with and without the slow ones."""
    counts = [1 << bit for bit in range(10) if 1 << bit <= len(facts.layers) // 2]
    ideas = []
    for parent in parents(found):
        for count in counts:
            for slow in dict.fromkeys(((), facts.slow.thin)):
                names = tuple(dict.fromkeys((*facts.layers[:count], *slow)))
                also = ", and few input channels" if slow else ""
                why = f"{parent.variant.name}: the {count} most sensitive stay float{also}"
                ideas.append(Idea(_excluding(parent.variant, names), why))
    return ideas


def in_four_bits(facts: Facts, found: Sequence[Trial], _: Search) -> list[Idea]:
    """Weights of 4 bits: of all operators that can, and of all but the most sensitive ones.

    Fully connected operators come last in most networks, and are the ones that keep their speed.
    """
    ideas = []
    for parent in parents(found):
        if parent.variant.passes[-1]["use"] not in _FEWER_BITS:
            continue
        for why, names in _four_bit_sets(facts).items():
            variant = _with(parent.variant, four_bits=list(names))
            ideas.append(Idea(variant, f"{parent.variant.name}: {why} in 4 bits"))
    return ideas


def _four_bit_sets(facts: Facts) -> dict[str, tuple[str, ...]]:
    """Names by what they are; the same set is there once."""
    sets = {"weights that can be": facts.four, "fully connected": facts.connected}
    for count in (1, 2, 4):
        tough = set(facts.layers[:count])
        sets[f"connected but the {count} most sensitive"] = tuple(
            one for one in facts.connected if one not in tough
        )
    once = {names: why for why, names in reversed(sets.items()) if names}
    return {why: names for names, why in reversed(once.items())}


def pruned(facts: Facts, found: Sequence[Trial], search: Search) -> list[Idea]:
    """Fewer channels before integers."""
    if facts.format != ONNX:
        return []
    best = {one.variant.backend: one for one in reversed(parents(found))}
    return [
        Idea(
            _pruned(variant, {"ratio": ratio}, search.train),
            f"{parent.variant.name}: {ratio:g} pruned",
        )
        for parent in best.values()
        for variant in (parent.variant, _excluding(parent.variant, facts.slow.thin))
        for ratio in search.ratios
    ]


STAGES: tuple[Callable[[Facts, Sequence[Trial], Search], list[Idea]], ...] = (
    for_speed,
    pruned,
    by_sensitivity,
    in_four_bits,
)


def parents(found: Sequence[Trial]) -> list[Trial]:
    """The best 8-bit trials of each backend that take an exclude list and leave nothing out yet."""
    plain = [one for one in found if one.found and _plain(one.variant)]
    ranked = sorted(plain, key=lambda one: (_costs(one), one.number))
    counts: dict[str, int] = {}
    kept = []
    for one in ranked:
        counts[one.variant.backend] = counts.get(one.variant.backend, 0) + 1
        if counts[one.variant.backend] <= PARENTS:
            kept.append(one)
    return kept


def _plain(variant: Variant) -> bool:
    last = variant.passes[-1] if variant.passes else {}
    return (
        last.get("use") in _EXCLUDING
        and not last.get("exclude")
        and last.get("activations", "u8") in ("u8", 8)
        and not last.get("four_bits")
        and last.get("format", "qdq") == "qdq"
        and not any(step["use"] == "prune_channels" for step in variant.passes)
    )


# --- neighbours of the front ----------------------------------------------------------------------


def neighbours(facts: Facts, found: Sequence[Trial], search: Search, seed: int) -> list[Idea]:
    """Random steps from members of the front, by the seed (which holds the round's number)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    front = front_of(found)
    ideas = []
    for _ in range(SIDESTEPS if front else 0):
        parent = front[int(rng.integers(len(front)))]
        steps = list(_steps(facts, parent.variant, search, rng))
        if steps:
            variant, what = steps[int(rng.integers(len(steps)))]
            ideas.append(Idea(variant, f"{parent.variant.name}: {what}"))
    return ideas


def front_of(found: Sequence[Trial]) -> list[Trial]:
    """Trials that no other of their backend beats in loss, size and multiplications at once."""
    kept: list[Trial] = []
    for backend in dict.fromkeys(one.variant.backend for one in found):
        mine = [one for one in found if one.variant.backend == backend and one.found]
        kept += [mine[index] for index in pareto.front([_costs(one) for one in mine])]
    return sorted(kept, key=lambda one: one.number)


def _costs(one: Trial) -> pareto.Costs:
    assert one.found is not None
    return one.found.loss, float(one.found.work), float(one.found.size_bytes)


def _steps(
    facts: Facts, variant: Variant, search: Search, rng: np.random.Generator
) -> Iterator[tuple[Variant, str]]:
    """One step of each kind that is possible from here."""
    last = variant.passes[-1]
    if last["use"] in _EXCLUDING and facts.layers:
        name = facts.layers[int(rng.integers(len(facts.layers)))]
        names = set(last.get("exclude", ())) ^ {name}
        if len(names) < len(facts.layers):
            yield _with(variant, exclude=sorted(names)), f"{name} changes sides"
    if last["use"] == "static_int8":
        ranges = _RANGES[int(rng.integers(len(_RANGES)))]
        plain = {key: value for key, value in last.items() if key not in ("method", "percentile")}
        changed = (*variant.passes[:-1], {**plain, **ranges})
        yield Variant("", variant.backend, variant.options, changed), "other ranges"
        yield _with(variant, per_channel=not last.get("per_channel", True)), "other weight scales"
    if last["use"] == "tflite_int8":
        ranges = _TFLITE_RANGES[int(rng.integers(len(_TFLITE_RANGES)))]
        plain = {key: value for key, value in last.items() if key not in ("method", "percentile")}
        changed = (*variant.passes[:-1], {**plain, **ranges})
        yield Variant("", variant.backend, variant.options, changed), "other ranges"
    if last["use"] in _FEWER_BITS and facts.four and last.get("bits", 8) == 8:
        name = facts.four[int(rng.integers(len(facts.four)))]
        small = sorted({*last.get("four_bits", ())} ^ {name})
        yield _with(variant, four_bits=small), f"{name} changes bits"
    if last["use"] == "nncf_int8":
        slow = not last.get("fast_bias_correction", True)
        yield _with(variant, fast_bias_correction=slow), "other bias correction"
    cut = next((step for step in variant.passes if step["use"] == "prune_channels"), None)
    if cut:
        ratio = cut["ratio"] + RATIO_STEP * (1 if rng.integers(2) else -1)
        if 0 < ratio < 1:
            yield _pruned(variant, {**cut, "ratio": ratio}, search.train), f"{ratio:g} pruned"
    if cut and facts.channels:
        name = facts.channels[int(rng.integers(len(facts.channels)))]
        ratios = cut.get("ratios", {})
        own = ratios.get(name, cut["ratio"]) + LAYER_STEP * (1 if rng.integers(2) else -1)
        if 0 <= own < 1:
            uneven = {**cut, "ratios": {**ratios, name: own}}
            yield _pruned(variant, uneven, search.train), f"{own:g} of {name} pruned"


# --- variants -------------------------------------------------------------------------------------


def _excluding(variant: Variant, names: Sequence[str]) -> Variant:
    return _with(variant, exclude=sorted(names)) if names else variant


def _with(variant: Variant, **options: Any) -> Variant:
    changed = (*variant.passes[:-1], {**variant.passes[-1], **options})
    return Variant("", variant.backend, variant.options, changed)


def _pruned(variant: Variant, shares: dict[str, Any], train: str) -> Variant:
    """The variant behind clean-up, pruning and, with `train`, training again."""
    kept = [s for s in variant.passes if s["use"] not in ("clean", "prune_channels", "fine_tune")]
    # By activations much less is lost without training; a long one ends no better for it.
    by = "weights" if train else "activations"
    before = [CLEAN, {**shares, "use": "prune_channels", "importance": by}]
    if train:
        before.append({"use": "fine_tune", "train": train})
    return Variant("", variant.backend, variant.options, (*before, *kept))


def label(variant: Variant) -> str:
    """A few words for a name: the last pass and what is special about it."""
    last = variant.passes[-1] if variant.passes else {"use": "fp32"}
    words = [_LABELS.get(last["use"], last["use"].replace("_", "-"))]
    if any(step["use"] == "prune_channels" for step in variant.passes):
        words.append(pruning_label(variant))
    words += [
        str(last[key]) for key in ("method", "activations", "format", "preset") if key in last
    ]
    if last.get("per_channel") is False:
        words.append("per-tensor")
    if last.get("four_bits"):
        words.append("w4")
    if last.get("exclude"):
        words.append("mixed")
    return "-".join(words)


def pruning_label(variant: Variant) -> str:
    """How much is pruned, in percent; some other passes' work may be trained too."""
    cut = next((step for step in variant.passes if step["use"] == "prune_channels"), None)
    if cut is None:
        return "training"
    return f"pruned{100 * cut.get('ratio', 0.5):g}" + ("-uneven" if cut.get("ratios") else "")


_LABELS = {
    "static_int8": "int8",
    "nncf_int8": "nncf",
    "nncf_accuracy": "nncf-controlled",
    "tflite_int8": "int8",
    "weight_only": "w8",
}
