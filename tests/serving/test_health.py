"""Verdicts about deaths and restarts."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.serving.health import (
    Cause,
    Resident,
    RestartPolicy,
    after_death,
    classify,
    suspects,
)

S = 1_000_000_000
EXIT_3 = 3 << 8
CORE = 0x80  # waitpid's "dumped core" bit


def verdict(status: int, **known: object) -> tuple[Cause, str]:
    facts = {"stopping": False, "hung_for_s": None, "oom_kills": 0, "failure": "", **known}
    return classify(status, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "known", "cause", "says"),
    [
        (0, {}, Cause.EXITED, "code 0"),
        (EXIT_3, {}, Cause.EXITED, "code 3"),
        (0, {"stopping": True}, Cause.STOPPED, "stopped"),
        (EXIT_3, {"stopping": True}, Cause.EXITED, "code 3"),
        (signal.SIGTERM, {"stopping": True}, Cause.STOPPED, "SIGTERM"),
        (signal.SIGKILL, {"stopping": True}, Cause.STOPPED, "SIGKILL"),
        (signal.SIGKILL, {}, Cause.SIGNAL, "SIGKILL"),
        (signal.SIGKILL, {"oom_kills": 1}, Cause.OUT_OF_MEMORY, "out of memory"),
        (signal.SIGTERM, {"oom_kills": 1}, Cause.SIGNAL, "SIGTERM"),
        (signal.SIGSEGV, {}, Cause.SIGNAL, "memory it does not have"),
        (signal.SIGSEGV | CORE, {}, Cause.SIGNAL, "SIGSEGV"),
        (signal.SIGILL, {}, Cause.SIGNAL, "instruction"),
        (signal.SIGSYS, {}, Cause.SIGNAL, "sandbox"),
        (40, {}, Cause.SIGNAL, "killed by 40"),  # a real-time signal: no name
        (signal.SIGKILL, {"hung_for_s": 3.21}, Cause.HANG, "3.2 s"),
        (signal.SIGKILL, {"hung_for_s": 3.0, "stopping": True}, Cause.HANG, "did not return"),
        (EXIT_3, {"failure": "no such file"}, Cause.FAILED, "no such file"),
        (signal.SIGKILL, {"failure": "no such file"}, Cause.FAILED, "no such file"),
    ],
)
def test_a_death_is_told_apart(
    status: int, known: dict[str, object], cause: Cause, says: str
) -> None:
    death = verdict(status, **known)
    assert death[0] is cause and says in death[1]


def test_the_first_restart_is_at_once_and_later_ones_double() -> None:
    policy = RestartPolicy(backoff_initial_s=0.1, backoff_max_s=1.0, deaths_max=99, window_s=60)
    now_ns = 1000 * S
    waits = [after_death([now_ns] * n, now_ns, policy).restart_after_s for n in range(1, 8)]
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_deaths_outside_the_window_are_forgiven() -> None:
    policy = RestartPolicy(deaths_max=3, window_s=10)
    now_ns = 100 * S
    old = [now_ns - 10 * S - 1] * 50
    assert after_death([*old, now_ns], now_ns, policy) == (0.0, False)
    just_inside = [now_ns - 10 * S] * 2
    assert after_death([*just_inside, now_ns], now_ns, policy).give_up


policies = st.builds(
    RestartPolicy,
    backoff_initial_s=st.floats(0.001, 10),
    backoff_max_s=st.floats(0.001, 100),
    deaths_max=st.integers(1, 20),
    window_s=st.floats(0.1, 1000),
)
times = st.lists(st.integers(0, 2000 * S), max_size=80)


@given(policy=policies, deaths=times, later=st.integers(0, 2000 * S))
def test_one_more_death_never_shortens_the_wait_nor_takes_back_giving_up(
    policy: RestartPolicy, deaths: list[int], later: int
) -> None:
    now_ns = max([*deaths, later])
    before = after_death(deaths, now_ns, policy)
    after = after_death([*deaths, now_ns], now_ns, policy)
    assert after.restart_after_s >= before.restart_after_s
    assert after.give_up or not before.give_up
    assert 0.0 <= after.restart_after_s <= policy.backoff_max_s


@given(policy=policies, deaths=times, wait=st.integers(0, 2000 * S))
def test_time_that_passes_never_lengthens_the_wait(
    policy: RestartPolicy, deaths: list[int], wait: int
) -> None:
    now_ns = 2000 * S
    before = after_death(deaths, now_ns, policy)
    after = after_death(deaths, now_ns + wait, policy)
    assert after.restart_after_s <= before.restart_after_s
    assert before.give_up or not after.give_up


@given(count=st.integers(2, 10_000))
def test_any_number_of_deaths_has_a_finite_wait(count: int) -> None:
    assert after_death([0] * count, 0, RestartPolicy()).restart_after_s <= 30.0


IDLE, RUNS = Resident(False, False, False), Resident(False, True, False)
LOADS, HUNG = Resident(False, False, True), Resident(True, True, False)


@pytest.mark.parametrize(
    ("residents", "suspected"),
    [
        ([IDLE, RUNS, IDLE], [False, True, False]),
        ([IDLE, LOADS], [False, True]),
        ([IDLE, RUNS, LOADS], [False, True, True]),
        ([LOADS, HUNG, IDLE], [False, True, False]),
        ([IDLE, IDLE], [True, True]),
        ([IDLE], [True]),
    ],
)
def test_who_did_something_may_have_been_the_end_of_a_shared_process(
    residents: list[Resident], suspected: list[bool]
) -> None:
    assert suspects(residents) == suspected
