"""Who stays in memory: the rules, and a real daemon that has too little of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.daemon.residency import Resident, is_idle, predicted_bytes, victims

MIB = 1024 * 1024


def _resident(
    model: str, mib: int, used_ns: int = 0, warm: bool = False, movable: bool = True
) -> Resident:
    return Resident(model, warm, mib * MIB, used_ns, movable)


def test_nobody_goes_where_there_is_room() -> None:
    assert victims([_resident("a", 30)], 20 * MIB, 50 * MIB, "b") == []


def test_warm_versions_go_before_serving_ones_and_the_least_recent_first() -> None:
    a, b = _resident("a", 20, used_ns=1), _resident("b", 20, used_ns=2)
    warm = _resident("b", 20, used_ns=9, warm=True)
    assert victims([b, a, warm], 20 * MIB, 60 * MIB, "c") == [warm]
    assert victims([b, a, warm], 40 * MIB, 60 * MIB, "c") == [warm, a]


def test_the_serving_version_of_the_newcomers_own_model_stays() -> None:
    own = _resident("a", 40)
    assert victims([own], 20 * MIB, 50 * MIB, "a") is None
    assert victims([own], 20 * MIB, 50 * MIB, "b") == [own]


def test_what_cannot_move_is_not_chosen_and_nothing_goes_in_vain() -> None:
    stuck = _resident("a", 40, movable=False)
    small = _resident("b", 5)
    assert victims([stuck, small], 20 * MIB, 50 * MIB, "c") is None


def test_measured_memory_counts_more_than_stated_and_stated_more_than_a_guess() -> None:
    assert predicted_bytes(stated=7, learned=5, artifact_bytes=100) == 5
    assert predicted_bytes(stated=7, learned=0, artifact_bytes=100) == 7
    assert predicted_bytes(stated=0, learned=0, artifact_bytes=10 * MIB) > 20 * MIB


def test_a_model_without_keep_alive_is_never_idle() -> None:
    assert not is_idle(0, 10**18, 0.0)
    assert is_idle(0, 2 * 10**9, 1.0)
    assert not is_idle(0, 10**9, 1.0)


residents = st.lists(
    st.builds(
        Resident,
        st.sampled_from("abcd"),
        st.booleans(),
        st.integers(0, 100),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=8,
)


@given(residents, st.integers(0, 200), st.integers(1, 300))
def test_what_is_chosen_is_enough_movable_and_not_more_than_needed(
    loaded: list[Resident], need: int, budget: int
) -> None:
    chosen = victims(loaded, need, budget, "a")
    if chosen is None:
        movable = [one for one in loaded if one.movable and (one.warm or one.model != "a")]
        left = sum(one.private_bytes for one in loaded) - sum(o.private_bytes for o in movable)
        assert left + need > budget
        return
    total = sum(one.private_bytes for one in loaded) + need
    assert total - sum(one.private_bytes for one in chosen) <= budget or not chosen
    assert all(one.movable and (one.warm or one.model != "a") for one in chosen)
    if chosen:  # without the last of them it would not have been enough
        assert total - sum(one.private_bytes for one in chosen[:-1]) > budget
