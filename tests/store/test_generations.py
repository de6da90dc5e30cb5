"""The store's rules, without a disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConflictError
from edge_runtime.store import BlobRef, Generation, Switch, generations

BLOBS = tuple(BlobRef(f"{n:064x}", 10 * (n + 1)) for n in range(6))


def generation(number: int, *blobs: BlobRef, name: str = "m", order: int = 0) -> Generation:
    return Generation(name, number, number, "ab" * 32, 5, blobs, 0.0, order or number)


@st.composite
def stores(draw: st.DrawFn) -> tuple[tuple[Generation, ...], dict[str, Switch]]:
    """Some models with generations that share blobs, and what serves of them."""
    known: list[Generation] = []
    switches = {}
    for name in draw(st.sets(st.sampled_from("abc"), min_size=1)):
        numbers = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
        for number in numbers:
            blobs = draw(st.lists(st.sampled_from(BLOBS), unique=True, max_size=3))
            known.append(generation(number, *blobs, name=name, order=len(known) + 1))
        active, previous = draw(st.tuples(*[st.none() | st.sampled_from(numbers)] * 2))
        switches[name] = Switch(name, active, previous)
    return tuple(known), switches


def protected(known: tuple[Generation, ...], switches: dict[str, Switch]) -> set[Generation]:
    return {g for g in known if g.number in (switches[g.name].active, switches[g.name].previous)}


@given(stores(), st.none() | st.integers(0, 300))
def test_garbage_is_never_what_serves_and_no_more_than_needed(
    world: tuple[tuple[Generation, ...], dict[str, Switch]], byte_budget: int | None
) -> None:
    known, switches = world
    dropped = generations.garbage(known, switches, byte_budget)
    kept = set(known) - set(dropped)
    assert protected(known, switches) <= kept
    if byte_budget is None:
        assert dropped == ()
        return
    over = generations.used_bytes(kept) > byte_budget
    assert not over or kept == protected(known, switches)
    if dropped:  # without the last one dropped it would not have fitted
        assert generations.used_bytes([*kept, dropped[-1]]) > byte_budget
    free = set(known) - protected(known, switches)
    assert list(dropped) == sorted(free, key=lambda g: g.order)[: len(dropped)]


@given(stores())
def test_a_named_blob_is_never_unreferenced(
    world: tuple[tuple[Generation, ...], dict[str, Switch]],
) -> None:
    known, _ = world
    loose = generations.unreferenced((blob.sha256 for blob in BLOBS), known)
    named = {blob.sha256 for g in known for blob in g.blobs}
    assert set(loose) == {blob.sha256 for blob in BLOBS} - named


def test_shared_blobs_are_counted_once() -> None:
    known = [generation(1, BLOBS[0], BLOBS[1]), generation(2, BLOBS[0])]
    assert generations.used_bytes(known) == 5 + 5 + 10 + 20


commands = st.lists(st.sampled_from([1, 2, 3, "rollback", "deactivate"]), max_size=12)


@given(commands, st.data())
def test_a_switch_never_has_the_same_generation_twice_and_its_sequence_rises(
    steps: list[int | str], draw: st.DataObject
) -> None:
    switch = Switch("m")
    for step in steps:
        before = switch
        if step == "deactivate":
            switch = generations.deactivated(switch, 1.0, "")
        elif isinstance(step, int):
            switch = generations.activated(
                switch, step, 1.0, "", active_is_damaged=draw.draw(st.booleans())
            )
            assert switch.active == step
        elif switch.previous is not None:
            switch = generations.rolled_back(switch, 1.0, "")
            assert switch.active == before.previous
        assert switch.active is None or switch.active != switch.previous
        assert (switch == before) == (switch.sequence == before.sequence)
        assert switch.sequence - before.sequence in (0, 1)


def test_two_bad_generations_do_not_take_turns() -> None:
    switch = Switch("m", active=8, previous=7)
    with pytest.raises(ConflictError, match="no previous generation"):
        generations.rolled_back(generations.rolled_back(switch, 0.0, ""), 0.0, "")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (None, None, None),
        (Switch("m", sequence=1), None, 1),
        (None, Switch("m", sequence=1), 1),
        (Switch("m", sequence=2), Switch("m", sequence=1), 2),
        (Switch("m", sequence=1), Switch("m", sequence=2), 2),
        (Switch("m", sequence=0), None, 0),
    ],
)
def test_the_newest_whole_slot_wins(
    first: Switch | None, second: Switch | None, expected: int | None
) -> None:
    winner = generations.winner(first, second)
    assert (winner.sequence if winner else None) == expected


@given(st.integers(0, 9), st.sets(st.integers(1, 9), min_size=1), st.data())
def test_a_number_is_never_given_out_twice(
    last: int, numbers: set[int], data: st.DataObject
) -> None:
    switch = Switch("m", generation_last=last)
    going = data.draw(st.sets(st.sampled_from(sorted(numbers))))
    after = generations.remembering(switch, numbers, going)
    assert generations.next_number(after, numbers - going) == generations.next_number(
        switch, numbers
    )
    if max(numbers) not in going:
        assert after == switch
