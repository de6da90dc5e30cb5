"""Turns: who is next, who makes way when there is no room, and that nobody is forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving import admission, page
from edge_runtime.serving.waiting import Line

from .rig import WIDTH, Client, NumpyModel, Rig, infer

Build = Callable[..., Rig]
ROW_BYTES = 2 * WIDTH * 4  # of a request of one row, in and out


def many(values: range, **options: Any) -> bytes:
    """Pipelined requests whose ids are their values."""
    return b"".join(infer(float(value), value, **options) for value in values)


# --- connections ----------------------------------------------------------------------------------


def test_a_single_request_waits_for_one_turn_of_a_client_that_pipelines(build: Build) -> None:
    rig = build(queue_requests_max=100)
    greedy, modest = rig.client(), rig.client()
    greedy.send(many(range(1, 61)))
    modest.send(infer(100.0))
    assert modest.answers()[0].code == ""
    assert rig.model.ran.index(100.0) <= 1
    assert [value for value in rig.model.ran if value != 100] == list(range(1, 61))


def test_it_waits_no_longer_when_the_others_are_half_done(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "RUN_SHARE", 0)  # read after every run

    def then(inputs: Any) -> Any:
        if inputs["x"][0, 0] == 30:
            modest.send(infer(100.0))
        return {"y": inputs["x"]}

    rig = build(NumpyModel(then), queue_requests_max=100)
    greedy, modest = rig.client(), rig.client()
    greedy.send(many(range(1, 61)))
    rig.settle()
    assert rig.model.ran.index(100.0) <= rig.model.ran.index(30.0) + 2


def test_clients_that_pipeline_take_turns(build: Build) -> None:
    rig = build(queue_requests_max=100)
    clients = [rig.client() for _ in range(3)]
    for index, client in enumerate(clients):
        client.send(many(range(100 * index, 100 * index + 10)))
    rig.settle()
    assert rig.model.ran[:6] == [0, 100, 200, 1, 101, 201]
    assert len(rig.model.ran) == 30


def test_one_that_was_away_gains_nothing(build: Build) -> None:
    rig = build(queue_requests_max=100)
    busy, away = rig.client(), rig.client()
    for number in range(50):
        busy.ask(infer(float(number)))
    away.send(many(range(100, 110)))
    busy.send(many(range(200, 210)))
    rig.settle()
    assert rig.model.ran[50:54] in ([100, 200, 101, 201], [200, 100, 201, 101])


def test_a_lead_at_one_priority_is_not_held_against_a_client_at_another(build: Build) -> None:
    """Turns are counted for each priority by itself."""
    rig = build(queue_requests_max=300)
    mixed, other = rig.client(), rig.client()
    mixed.send(many(range(1, 61)) + infer(500.0, priority=5))
    other.send(many(range(100, 110), priority=5))
    rig.settle()
    assert rig.model.ran.index(500.0) <= 1


def test_a_long_lead_of_an_urgent_client_does_not_shut_it_out_later(build: Build) -> None:
    rig = build(queue_requests_max=300)
    first, second = rig.client(), rig.client()
    low = rig.client().send(many(range(1, 21)))
    first.send(many(range(100, 150), priority=5))
    rig.settle()
    assert len(low.answers()) == 20
    second.send(many(range(200, 210), priority=5))
    first.send(infer(300.0, priority=5))
    rig.settle()
    assert rig.model.ran[70:].index(300.0) <= 1


# --- a full queue ---------------------------------------------------------------------------------


def codes(client: Client) -> dict[int, str]:
    return {answer.request_id: answer.code for answer in client.answers()}


def test_when_the_queue_is_full_the_heaviest_clients_last_request_makes_way(build: Build) -> None:
    rig = build(queue_requests_max=4)
    greedy, modest = rig.client(), rig.client()
    greedy.send(many(range(1, 5)))
    modest.send(infer(100.0, 100))
    assert codes(modest) == {100: ""}
    assert codes(greedy) == {1: "", 2: "", 3: "", 4: "overloaded"}
    assert rig.status[page.REFUSED] == 1 and rig.worker._slots.used_bytes == 0


def test_among_equals_who_came_first_stays(build: Build) -> None:
    rig = build(queue_requests_max=4)
    clients = [rig.client() for _ in range(6)]
    for number, client in enumerate(clients):
        client.send(infer(float(number), number))
    got = [codes(client)[number] for number, client in enumerate(clients)]
    assert got == [""] * 4 + ["overloaded"] * 2


def test_a_higher_priority_gets_in_and_a_lower_does_not(build: Build) -> None:
    rig = build(queue_requests_max=3)
    low, high = rig.client(), rig.client()
    low.send(many(range(1, 4)))
    high.send(many(range(100, 103), priority=7))
    assert codes(high) == dict.fromkeys((100, 101, 102), "")
    assert codes(low) == dict.fromkeys((1, 2, 3), "overloaded")
    high.send(many(range(100, 103), priority=7))
    low.send(infer(4.0, 4))
    assert codes(low) == {4: "overloaded"} and set(codes(high).values()) == {""}


def test_a_client_makes_way_for_its_own_more_urgent_request(build: Build) -> None:
    rig = build(queue_requests_max=2)
    client = rig.client()
    client.send(many(range(1, 3)) + infer(3.0, 3, priority=7))
    assert codes(client) == {1: "", 2: "overloaded", 3: ""}


def test_who_was_refused_is_not_put_back_further_each_time(build: Build) -> None:
    rig = build(queue_requests_max=2)
    greedy, modest = rig.client(), rig.client()
    for _ in range(30):
        assert len(greedy.send(many(range(1, 40))).answers()) == 39
    owner = next(one for one in rig.connections() if one.turns.get(0, 0) > 0)
    assert owner.turns[0] <= rig.worker._line._turns[0] + 2
    modest.send(many(range(50, 52)))
    greedy.send(infer(60.0))
    rig.settle()
    assert 60.0 in rig.model.ran[-2:]


def test_bytes_are_shared_like_places(build: Build) -> None:
    rig = build(queue_bytes_max=10 * ROW_BYTES)
    greedy, modest = rig.client(), rig.client()
    greedy.send(many(range(1, 11)))
    modest.send(infer(np.full((3, WIDTH), 100, np.float32), 100))
    assert codes(modest) == {100: ""}
    refused = sorted(number for number, code in codes(greedy).items() if code)
    assert refused == [8, 9, 10]


def test_nobody_is_sent_away_for_one_who_would_not_fit_even_then(build: Build) -> None:
    rig = build(queue_bytes_max=10 * ROW_BYTES)
    greedy, urgent, modest = rig.client(), rig.client(), rig.client()
    urgent.send(infer(np.full((5, WIDTH), 1, np.float32), 1, priority=5))
    greedy.send(many(range(1, 6)))
    modest.send(infer(np.full((6, WIDTH), 100, np.float32), 100))
    assert codes(modest) == {100: "overloaded"}
    assert set(codes(greedy).values()) == {""} and codes(urgent) == {1: ""}


@pytest.mark.parametrize("limit", [{"queue_requests_max": 3}, {"queue_bytes_max": 3 * ROW_BYTES}])
@pytest.mark.parametrize("own", [True, False])
def test_who_makes_way_may_be_gone(build: Build, limit: dict[str, int], own: bool) -> None:
    """The refusal finds nobody: the connection closes while room is made, its own newcomer too."""
    rig = build(**limit)
    leaver, stayer = rig.client(), rig.client()
    newcomer = infer(np.full((2, WIDTH), 9, np.float32), 9, priority=7)
    leaver.send(many(range(1, 4)) + (newcomer if own else b""))
    if not own:
        stayer.send(newcomer)
    leaver.close()
    rig.settle()
    assert codes(stayer) == ({} if own else {9: ""})
    assert rig.worker._slots.used_bytes == 0 and not rig.worker._pending
    assert stayer.ask(infer(1.0)).code == "" and len(rig.connections()) == 1


@pytest.mark.parametrize("limit", [{"queue_requests_max": 3}, {"queue_bytes_max": 3 * ROW_BYTES}])
def test_half_a_newcomer_of_a_client_that_is_gone_holds_nothing(
    build: Build, limit: dict[str, int]
) -> None:
    rig = build(**limit)
    leaver = rig.client()
    newcomer = infer(np.full((2, WIDTH), 9, np.float32), 9, priority=7)
    leaver.send(many(range(1, 4)) + newcomer[:-10])
    leaver.close()
    rig.settle()
    assert rig.worker._slots.used_bytes == 0 and not rig.connections()


# --- any mix --------------------------------------------------------------------------------------

ACTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # who
        st.integers(1, 12),  # how many
        st.sampled_from([0, 0, 0, 3, 9]),  # priority
        st.integers(1, 4),  # rows
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("lanes", [0, 2], ids=["inline", "runners"])
@settings(max_examples=120, deadline=None)
@given(
    acts=ACTS,
    places=st.integers(1, 20),
    rows_of_bytes=st.integers(4, 40),
    batch=st.sampled_from([1, 4]),
    leaves=st.booleans(),
)
def test_of_any_mix_nothing_is_lost_or_doubled_and_the_bounds_hold(
    lanes: int,
    acts: list[tuple[int, int, int, int]],
    places: int,
    rows_of_bytes: int,
    batch: int,
    leaves: bool,
) -> None:
    limits = {"queue_requests_max": places, "queue_bytes_max": rows_of_bytes * ROW_BYTES}
    rig = Rig(runners=lanes, batch_rows_max=batch, **limits)
    with contextlib.closing(rig):
        clients = [rig.client() for _ in range(4)]
        sent: dict[int, int] = {}
        for who, count, priority, rows in acts:
            for _ in range(count):
                number = len(sent) + 1
                sent[number] = who
                x = np.full((rows, WIDTH), number, np.float32)
                clients[who].send(infer(x, number, priority=priority))
        if leaves:
            clients[0].close()
        got: dict[int, str] = {}
        for who, client in enumerate(clients):
            for answer in client.answers() if not client.closed else ():
                assert sent[answer.request_id] == who and answer.request_id not in got
                got[answer.request_id] = answer.code
                if not answer.code:
                    assert (answer.array() == 2 * answer.request_id + 1).all()
        assert got.keys() == {number for number, who in sent.items() if who or not leaves}
        assert set(got.values()) <= {"", "overloaded"}
        refused = sum(code == "overloaded" for code in got.values())
        assert rig.status[page.REFUSED] == refused or leaves
        assert not rig.worker._pending and not rig.worker._slots.used_bytes


ACTIONS = ["put", "pop", "last", "gone"]


class Someone:
    """As much of a connection as the line looks at."""

    def __init__(self) -> None:
        self.turns: dict[int, int] = {}


def waiting(owner: Someone, number: int, priority: int = 0, slot_bytes: int = 1) -> Any:
    plan = SimpleNamespace(batch_key=None, rows=1, slot_bytes=slot_bytes)
    return SimpleNamespace(connection=owner, number=number, priority=priority, plan=plan)


@given(st.lists(st.integers(0, 4), max_size=80), st.integers(0, 80))
def test_a_newcomer_waits_for_one_turn_of_each_other_and_the_end_of_a_round(
    owners: list[int], served: int
) -> None:
    line, people = Line(255), [Someone() for _ in range(5)]
    for number, who in enumerate(owners):
        line.put(waiting(people[who], number))
    for _ in range(min(served, len(owners))):
        line.pop()
    line.put(newcomer := waiting(Someone(), 99))
    before = []
    while (request := line.pop()) is not newcomer:
        before.append(people.index(request.connection))
    most = max((before.count(who) for who in before), default=0)
    assert most <= (1 if len(set(owners)) == 1 else 2), "a round under way is finished first"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "pop", "last", "gone"]), st.integers(0, 3), st.integers(0, 2)
        ),
        max_size=60,
    )
)
def test_whoever_waits_is_served_before_newcomers_fill_more_than_a_round(
    steps: list[tuple[str, int, int]],
) -> None:
    line, people = Line(1), [Someone() for _ in range(4)]
    inside: set[int] = set()
    for number, (what, who, priority) in enumerate(steps):
        if what == "put":
            line.put(waiting(people[who], number, priority))
            inside.add(number)
        elif not line.entries:
            continue
        elif what == "pop":
            best = max(entry[3].priority for entry in line.entries)
            request = line.pop()
            assert request.priority == best <= 1, "urgent first, and capped"
            inside.remove(request.number)
        elif what == "last":
            request = line.last()
            line.remove([request])
            inside.remove(request.number)
        else:
            going = line.of(people[who])
            line.remove(going)
            inside -= {request.number for request in going}
        assert {entry[3].number for entry in line.entries} == inside
        for someone in people:  # nobody's turn lies further off than what it has waiting
            for level, turn in someone.turns.items():
                mine = sum(
                    e[3].connection is someone and e[3].priority == level for e in line.entries
                )
                assert turn <= line._turns[level] + mine
    assert {line.pop().number for _ in range(len(line.entries))} == inside


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 5)), max_size=30),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(1, 20),
)
def test_who_must_go_are_the_last_and_no_more_than_needed(
    queue: list[tuple[int, int, int]], who: int, priority: int, size: int
) -> None:
    line, people = Line(255), [Someone() for _ in range(4)]
    for number, (owner, level, slot_bytes) in enumerate(queue):
        line.put(waiting(people[owner], number, level, slot_bytes))
    going = line.must_go(people[who], priority, size)  # type: ignore[arg-type]
    sizes = [request.plan.slot_bytes for request in going]
    last_first = sorted(line.entries, reverse=True)
    assert [entry[3] for entry in last_first[: len(going)]] == going
    line.put(newcomer := waiting(people[who], 99, priority, size))
    behind = [e for e in sorted(line.entries, reverse=True) if e[3] is not newcomer]
    mine = next(e for e in line.entries if e[3] is newcomer)
    behind = [e for e in behind if e[:2] > mine[:2]]
    if going:
        assert sum(sizes) >= size > sum(sizes[:-1])
        assert all(request in [e[3] for e in behind] for request in going)
    else:
        assert sum(e[3].plan.slot_bytes for e in behind) < size
