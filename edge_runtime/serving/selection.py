"""Which variant serves: candidates in order, and the verdict when all have been measured.

Law of this file: pure. Manifests, preferences and measured times in, orders and verdicts out; no
clock, no process, no disk. Who loads and measures is `daemon.tryout`; what is kept of it is
`store.decisions`, and what still stands of that `serving.standing`.

No regret: the first variant in the preferred order is kept unless another one is better by more
than the noise, and what is worse than the plain variant (fp32 on the CPU) is not chosen at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edge_runtime.bundle.manifest import Manifest, Variant

# A difference smaller than this is none. Four loads of one file had medians up to 2.4 % apart in
# nine of twelve choices on a busy machine, and up to 23 % in the others, where the margin grew to
# 28 to 50 % (docs/selection.md): other pages, other neighbours, other work on the machine.
MARGIN_MIN = 0.10
# Measured one after the other: seconds and degrees apart, what slowed one did not slow the next.
MARGIN_APART = 0.25
# With fewer rounds the noise itself is not known: only what everybody would see counts.
ROUNDS_MIN = 3
MARGIN_FEW = 0.30
# Of memory: pages are counted, not timed. 1 MiB is what two loads of one file differ by.
MEMORY_FLOOR_BYTES = 1 << 20
# How many standard errors of a median are noise: one false alarm in some hundred comparisons.
ERRORS_OF_NOISE = 3.0

# A round gives each variant so much time: some thousand runs of a tiny model, one of a slow one.
SLICE_NS = 20_000_000
RUNS_MAX = 1000
# Odd, so that a median is one of them. More would take longer than the models drift apart.
ROUNDS = 11


# --- who is tried ---------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A variant, and why it is not tried here ("": it is)."""

    variant: Variant
    skipped: str = ""


# (backend, class of device) -> why it cannot run on this machine; "" as far as is known it can.
Runnable = Callable[[str, str], str]


def anything_runs(backend: str, device_class: str) -> str:
    """Nothing is known to be impossible: loading tells."""
    return ""


def candidates(
    manifest: Manifest,
    order: Sequence[tuple[str, str]] = (),
    runnable: Runnable = anything_runs,
) -> tuple[Candidate, ...]:
    """Every variant of a bundle in the order of preference.

    Args:
        order: (backend, class of device), best first, as the machine's profile has them. Variants
            that it does not name come last; among equals the manifest's order counts.
        runnable: says of a backend and a class of device why they cannot run here.
    """

    def place(variant: Variant) -> int:
        line = variant.backend, variant.device_class
        return order.index(line) if line in order else len(order)

    return tuple(
        Candidate(variant, runnable(variant.backend, variant.device_class))
        for variant in sorted(manifest.variants, key=place)
    )


def reference(variants: Sequence[Variant]) -> str:
    """The plain one that others must not be worse than: fp32 on the CPU, else the first."""
    plain = (one for one in variants if one.precision == "fp32" and one.device_class == "cpu")
    return next(plain, variants[0]).name


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two. (`statistics` would cost the daemon 1 MiB.)"""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


# --- how they are measured ------------------------------------------------------------------------


def runs_of_slice(run_ns: float) -> int:
    """How many runs of that length fill a slice."""
    return max(1, min(RUNS_MAX, round(SLICE_NS / max(run_ns, 1.0))))


def turns(count: int, round_number: int) -> list[int]:
    """In which order `count` variants are measured in a round.

    Each begins in turn, and when each has, they go backwards: nobody always runs after the same
    neighbour (whose data fill the cache) or at the same place of a drift.
    """
    order = [(first + round_number) % count for first in range(count)]
    return order[::-1] if round_number // count % 2 else order


class Measured(NamedTuple):
    """What was measured of one variant.

    Attributes:
        run_ns: per round, the median of its runs.
        private_bytes: of its process, when it had been measured.
        energy_uj: per round, of one run; empty where energy cannot be read.
        runs: in all.
    """

    variant: str
    run_ns: tuple[float, ...]
    private_bytes: int = 0
    energy_uj: tuple[float, ...] = ()
    runs: int = 0

    @property
    def run_ms_p50(self) -> float:
        return median(self.run_ns) / 1e6 if self.run_ns else 0.0

    @property
    def run_ms_spread(self) -> float:
        """The median distance of a round from that: half of them lie nearer."""
        if len(self.run_ns) < ROUNDS_MIN:
            return 0.0
        centre = median(self.run_ns)
        return median([abs(one - centre) for one in self.run_ns]) / 1e6


# --- the verdict ----------------------------------------------------------------------------------


class Ruling(NamedTuple):
    """What a variant is to this generation, and why."""

    verdict: str  # chosen, fit or slower, as in store.decisions.Tried
    reason: str


class Verdict(NamedTuple):
    """Attributes as in store.decisions.Decision."""

    order: tuple[str, ...]
    rulings: dict[str, Ruling]
    margin: float


# What each policy compares: a series per variant, one number a round; less is better.
COSTS: dict[str, Callable[[Measured], Sequence[float]]] = {
    "latency": lambda one: one.run_ns,
    "memory": lambda one: (one.private_bytes,),
    "energy": lambda one: one.energy_uj,
}
WORDS = {"latency": "run time", "memory": "private memory", "energy": "energy of a run"}


class Comparison(NamedTuple):
    """One against another: cost as a multiple of the other's, and by how much that must differ."""

    ratio: float
    margin: float

    @property
    def better(self) -> bool:
        return self.ratio < 1 - self.margin

    @property
    def worse(self) -> bool:
        """Symmetric: what costs 1/(1 - margin) or more."""
        return self.ratio * (1 - self.margin) > 1


def compare(policy: str, one: Measured, other: Measured, together: bool = True) -> Comparison:
    """Cost of `one` as a multiple of the cost of `other`, with the margin of noise.

    Measured together, round i of both saw the same machine, so their ratio is taken round by round
    and what slowed both down cancels out.
    """
    mine, theirs = COSTS[policy](one), COSTS[policy](other)
    if policy == "memory":
        floor = MEMORY_FLOOR_BYTES / max(theirs[0], 1.0)
        return Comparison(_ratio(mine[0], theirs[0]), max(MARGIN_MIN, min(floor, 0.9)))
    if not together:
        ratio = _ratio(median(mine), median(theirs))
        return Comparison(ratio, max(MARGIN_APART, _noise(mine) + _noise(theirs)))
    ratios = [_ratio(a, b) for a, b in zip(mine, theirs, strict=False)]
    if len(ratios) < ROUNDS_MIN:
        return Comparison(median(ratios), MARGIN_FEW)
    return Comparison(median(ratios), max(MARGIN_MIN, _noise(ratios)))


def _ratio(one: float, other: float) -> float:
    return one / other if other > 0 else (1.0 if one <= 0 else float("inf"))


def _noise(values: Sequence[float]) -> float:
    """The uncertainty of a median, relative to it: some standard errors, from the median deviation
    (robust: a round that was interrupted counts little). At most 0.9.
    """
    centre = median(values)
    if len(values) < ROUNDS_MIN or centre <= 0:
        return MARGIN_FEW
    deviation = 1.4826 * median([abs(value - centre) for value in values])
    error = 1.2533 * deviation / len(values) ** 0.5  # of a median, for normal noise
    return float(min(ERRORS_OF_NOISE * error / centre, 0.9))


def decide(
    policy: str,
    measured: Sequence[Measured],
    reference_name: str,
    *,
    together: bool = True,
    latency_ms_max: float = 0.0,
) -> Verdict:
    """The order of right variants, best first, and what each is.

    Args:
        measured: every variant that loaded and kept its goldens, in the order of preference.
        reference_name: the plain one; the first of `measured` where it is not among them.
        together: they were measured in turns, not one after the other.
        latency_ms_max: the bundle's budget: what is over it comes after what is not. 0: none.
    """
    assert measured
    plain = next((one for one in measured if one.variant == reference_name), measured[0])
    worse = {
        one.variant: found
        for one in measured
        if one is not plain and (found := compare(policy, one, plain, together)).worse
    }
    late = {one.variant for one in measured if 0 < latency_ms_max < one.run_ms_p50}
    groups: list[list[Measured]] = [[], [], []]
    for one in measured:
        groups[2 if one.variant in worse else one.variant in late].append(one)
    order = [one for group in groups for one in _ranked(policy, group, together)]
    margins = [compare(policy, one, plain, together).margin for one in measured if one is not plain]
    rulings = {}
    for one in order:
        if one.variant in worse:
            rulings[one.variant] = Ruling("slower", _against(policy, worse[one.variant], plain))
            continue
        reasons = [_reason(policy, one, order[0], measured[0], plain, together)]
        if one.variant in late:
            reasons.append(f"over the bundle's budget of {latency_ms_max:g} ms")
        word = "chosen" if one is order[0] else "fit"
        rulings[one.variant] = Ruling(word, "; ".join(reasons))
    return Verdict(tuple(one.variant for one in order), rulings, max(margins, default=MARGIN_MIN))


def _ranked(policy: str, group: list[Measured], together: bool) -> list[Measured]:
    """Best first; among those within the noise the preferred order stays."""
    left, ranked = list(group), []
    while left:
        best = left[0]
        for one in left[1:]:
            if compare(policy, one, best, together).better:
                best = one
        left.remove(best)
        ranked.append(best)
    return ranked


def _reason(
    policy: str, one: Measured, best: Measured, first: Measured, plain: Measured, together: bool
) -> str:
    if one is not best:
        return _against(policy, compare(policy, one, best, together), best)
    if one is first:
        return "first in the preferred order, and none is better by more than the margin"
    other = first if plain is one else plain
    return _against(policy, compare(policy, one, other, together), other)


def _against(policy: str, found: Comparison, other: Measured) -> str:
    what, name, ratio = WORDS[policy], other.variant, found.ratio
    if 0 < ratio < 1:
        return f"{_number(1 / ratio)} times less {what} than {name}"
    return f"{_number(ratio)} times the {what} of {name}"


def _number(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 100 else f"{ratio:,.0f}"
