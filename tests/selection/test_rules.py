"""The rules of a choice: who is tried in which order, what noise is, who wins, who is left."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle.manifest import Blob, Manifest, Variant
from edge_runtime.serving import selection, standing
from edge_runtime.serving.health import Cause
from edge_runtime.serving.selection import Candidate, Measured
from edge_runtime.store.decisions import Decision, Left
from edge_runtime.tensors import TensorSpec

X = TensorSpec("x", "FP32", (1, 4))


def variant(name: str, backend: str = "onnxruntime", **more: str) -> Variant:
    return Variant(name, backend, Blob("0" * 64, 1), **more)


def manifest(*variants: Variant) -> Manifest:
    return Manifest(1, "m", 1, (X,), (X,), variants)


def names(candidates: tuple[Candidate, ...]) -> list[str]:
    return [one.variant.name for one in candidates]


def timed(name: str, ms: float, noise: float = 0.0, seed: int = 0, rounds: int = 11) -> Measured:
    """Rounds around `ms`, each off by at most the share `noise`."""
    rng = random.Random(seed)
    return Measured(name, tuple(ms * 1e6 * (1 + rng.uniform(-noise, noise)) for _ in range(rounds)))


# --- candidates -----------------------------------------------------------------------------------


def test_without_a_profile_the_order_is_the_manifests() -> None:
    assert names(selection.candidates(manifest(variant("b"), variant("a")))) == ["b", "a"]


def test_a_profiles_order_comes_first_and_the_manifests_among_equals() -> None:
    bundle = manifest(
        variant("ort-a"),
        variant("ov-cpu", "openvino"),
        variant("ort-b"),
        variant("ov-npu", "openvino", device_class="npu"),
        variant("tfl", "litert"),
    )
    order = (("openvino", "npu"), ("onnxruntime", "cpu"), ("openvino", "cpu"))
    found = names(selection.candidates(bundle, order))
    assert found == ["ov-npu", "ort-a", "ort-b", "ov-cpu", "tfl"]


def test_what_cannot_run_here_keeps_its_place_and_its_reason() -> None:
    def runnable(backend: str, device_class: str) -> str:
        return "there is no /dev/accel/accel0" if device_class == "npu" else ""

    bundle = manifest(variant("npu", "openvino", device_class="npu"), variant("cpu"))
    found = selection.candidates(bundle, (), runnable)
    assert [one.skipped for one in found] == ["there is no /dev/accel/accel0", ""]


def test_the_reference_is_fp32_on_the_cpu_and_else_the_first() -> None:
    int8, fp32 = variant("int8", precision="int8"), variant("fp32", precision="fp32")
    gpu = variant("gpu", precision="fp32", device_class="gpu")
    assert selection.reference([int8, gpu, fp32]) == "fp32"
    assert selection.reference([int8, gpu]) == "int8"


# --- measuring ------------------------------------------------------------------------------------


@given(st.integers(1, 12))
def test_each_variant_has_one_turn_a_round_and_not_always_the_same_neighbour(count: int) -> None:
    rounds = [selection.turns(count, number) for number in range(2 * count)]
    assert all(sorted(one) == list(range(count)) for one in rounds)
    assert {one[0] for one in rounds[:count]} == set(range(count))
    if count > 2:
        assert len({pair for one in rounds for pair in pairwise(one)}) > count


@pytest.mark.parametrize(
    ("run_ns", "runs"), [(1e3, 1000), (1e6, 20), (9e6, 2), (3e9, 1), (0, 1000)]
)
def test_a_slice_holds_as_many_runs_as_fit_and_at_least_one(run_ns: float, runs: int) -> None:
    assert selection.runs_of_slice(run_ns) == runs


# --- the verdict ----------------------------------------------------------------------------------


def test_a_clearly_faster_variant_wins_and_says_by_how_much() -> None:
    verdict = selection.decide(
        "latency", [timed("fp32", 3.0, 0.05), timed("int8", 1.0, 0.05)], "fp32"
    )
    assert verdict.order == ("int8", "fp32")
    assert verdict.rulings["int8"].verdict == "chosen"
    assert "times less run time than fp32" in verdict.rulings["int8"].reason


def test_within_the_margin_the_first_in_order_stays() -> None:
    measured = [timed("fp32", 1.0), timed("int8", 0.93)]
    assert selection.decide("latency", measured, "fp32").order == ("fp32", "int8")
    assert selection.decide("latency", measured[::-1], "fp32").order == ("int8", "fp32")


def test_a_difference_smaller_than_the_noise_of_this_machine_is_none() -> None:
    """25 % faster in the median, in rounds that differ by a factor of three."""
    slow = Measured("a", tuple(1e6 * one for one in (1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 2)))
    fast = Measured("b", tuple(1e6 * one for one in (3, 1, 1, 1, 3, 1, 3, 1, 1, 3, 1.5)))
    verdict = selection.decide("latency", [slow, fast], "a")
    assert verdict.order[0] == "a" and verdict.margin > selection.MARGIN_MIN


def test_what_slows_both_down_does_not_hide_the_difference() -> None:
    """The machine is three times slower in half of the rounds; round by round b is 1.5 x faster."""
    load = [1, 3, 1, 1, 3, 3, 1, 3, 1, 3, 1]
    a = Measured("a", tuple(3e6 * one for one in load))
    b = Measured("b", tuple(2e6 * one for one in load))
    assert selection.decide("latency", [a, b], "a").order[0] == "b"


def test_a_variant_slower_than_the_plain_one_is_not_chosen_though_it_is_preferred() -> None:
    verdict = selection.decide("latency", [timed("int8", 2.0), timed("fp32", 1.0)], "fp32")
    assert verdict.order == ("fp32", "int8")
    assert verdict.rulings["int8"] == ("slower", "2 times the run time of fp32")


def test_with_few_rounds_only_what_everybody_would_see_counts() -> None:
    for ms, first in ((0.8, "a"), (0.5, "b")):
        measured = [timed("a", 1.0, rounds=1), timed("b", ms, rounds=1)]
        assert selection.decide("latency", measured, "a").order[0] == first


def test_by_memory_the_smaller_wins_unless_it_is_over_the_bundles_budget_of_time() -> None:
    large = timed("fp32", 1.0)._replace(private_bytes=90 << 20)
    small = timed("int8", 20.0)._replace(private_bytes=30 << 20)
    assert selection.decide("memory", [large, small], "fp32").order == ("int8", "fp32")
    verdict = selection.decide("memory", [large, small], "fp32", latency_ms_max=10)
    assert verdict.order == ("fp32", "int8")
    assert "over the bundle's budget of 10 ms" in verdict.rulings["int8"].reason


def test_a_megabyte_more_or_less_is_no_difference_of_memory() -> None:
    a = timed("a", 1.0)._replace(private_bytes=5_000_000)
    b = timed("b", 1.0)._replace(private_bytes=4_200_000)
    assert selection.decide("memory", [a, b], "a").order[0] == "a"


def test_by_energy_the_more_frugal_wins() -> None:
    a = timed("a", 1.0)._replace(energy_uj=(900.0,) * 11)
    b = timed("b", 1.5)._replace(energy_uj=(400.0,) * 11)
    assert selection.decide("energy", [a, b], "a").order[0] == "b"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_every_variant_is_ruled_once_and_the_chosen_is_not_worse_than_the_plain_one(
    times_ms: list[float], seed: int, together: bool
) -> None:
    measured = [timed(str(i), ms, 0.3, seed + i) for i, ms in enumerate(times_ms)]
    plain = measured[seed % len(measured)]
    verdict = selection.decide("latency", measured, plain.variant, together=together)
    assert sorted(verdict.order) == sorted(one.variant for one in measured)
    assert [verdict.rulings[one].verdict == "chosen" for one in verdict.order].count(True) == 1
    chosen = next(one for one in measured if one.variant == verdict.order[0])
    assert verdict.rulings[chosen.variant].verdict == "chosen"
    assert not selection.compare("latency", chosen, plain, together).worse
    assert not (
        chosen is not measured[0]
        and selection.compare("latency", measured[0], chosen, together).better
    )


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.3])
def test_of_two_equal_variants_the_preferred_one_is_kept_in_98_of_100_choices(noise: float) -> None:
    pairs = [
        (timed("a", 1.0, noise, seed), timed("b", 1.0, noise, -seed - 1)) for seed in range(800)
    ]
    changed = sum(selection.decide("latency", pair, "a").order[0] == "b" for pair in pairs)
    assert changed <= 16


# --- afterwards -----------------------------------------------------------------------------------


def decision(*order: str, left: tuple[Left, ...] = ()) -> Decision:
    return Decision(
        "m", 1, {"kernel": "6.1", "backend x": "x-1.0"}, "latency", order, (), left=left
    )


def test_a_decision_is_stale_when_what_it_rests_on_changed_and_says_what() -> None:
    now = {"kernel": "6.1", "backend x": "x-1.1", "order": "x:npu"}
    assert standing.changed(decision("a"), {"kernel": "6.1", "backend x": "x-1.0"}) == ""
    words = standing.changed(decision("a"), now)
    assert words == "backend x: x-1.0 -> x-1.1; order: none -> x:npu"


def test_what_was_left_is_not_loaded_while_another_remains() -> None:
    some = standing.without(decision("a", "b", "c"), Left("a", "died", "signal", 0.0))
    assert standing.to_load(some) == ("b", "c")


def test_when_all_were_left_those_that_only_died_are_tried_before_those_that_lied() -> None:
    lied, died = Left("a", "golden", Cause.GOLDEN, 0.0), Left("b", "died", "signal", 0.0)
    every = standing.without(standing.without(decision("a", "b"), lied), died)
    assert standing.remaining(every) == () and standing.to_load(every) == ("b", "a")


@pytest.mark.parametrize(
    ("cause", "deaths", "leaves"),
    [
        (Cause.SIGNAL, 1, False),
        (Cause.EXITED, 2, False),
        (Cause.SIGNAL, 3, True),
        (Cause.HANG, 1, True),
        (Cause.GOLDEN, 1, True),
    ],
)
def test_a_variant_is_left_after_one_lie_or_hang_and_after_a_few_deaths(
    cause: Cause, deaths: int, leaves: bool
) -> None:
    assert standing.must_leave(cause, deaths, 3) is leaves
