"""The decision alone: calm under noise, one step at a time, always back."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_profiles.ladder import Ladder, Step, Zone
from device_profiles.loading import load, names
from edge_runtime.serving import governing
from edge_runtime.serving.governing import Cause, Limits, Rung, State, Timing

LADDER = Ladder(
    zones=(Zone("cpu-thermal"),),
    steps=(
        Step(enter_c=70, run_share=0.6),
        Step(enter_c=78, cpus="0-1", variant="smaller"),
        Step(enter_c=85, run_share=0.3, refuse_priority_below=5),
    ),
)
RUNGS = governing.heat_rungs(LADDER)
TIMING = Timing(LADDER.down_s, LADDER.up_s)
INTERVAL_S = 2.0


def play(values, interval_s=INTERVAL_S, rungs=RUNGS, timing=TIMING, state=None):
    """The moves as (time, move), and the last state."""
    state, moves = state or State(), []
    for index, value in enumerate(values):
        state, move = governing.decide(state, value, rungs, timing, index * interval_s)
        if move is not None:
            moves.append((index * interval_s, move))
    return moves, state


def episode(noise_c, seed, peak_c=92.0):
    """An hour: warm, hot for half of it, warm again."""
    rng = random.Random(seed)
    for index in range(1800):
        share = math.sin(math.pi * index / 1800)
        yield 50 + (peak_c - 50) * share + rng.uniform(-noise_c, noise_c)


def test_a_hot_episode_takes_each_step_once_down_and_once_up():
    for seed in range(30):
        moves, state = play(episode(1.5, seed))
        assert [move.step for _, move in moves] == [1, 2, 3, 2, 1, 0]
        assert state.step == 0


@pytest.mark.parametrize("board", [name for name in names() if load(name).profile.thermal.steps])
def test_every_board_s_ladder_rides_a_hot_episode_without_flapping(board: str) -> None:
    ladder = load(board).profile.thermal
    depth = len(ladder.steps)
    hot = episode(1.5, board, peak_c=ladder.steps[-1].enter_c + 6)
    timing = Timing(ladder.down_s, ladder.up_s)
    moves, _ = play(hot, rungs=governing.heat_rungs(ladder), timing=timing)
    down, up = list(range(1, depth + 1)), list(range(depth - 1, -1, -1))
    assert [move.step for _, move in moves] == down + up


def test_a_single_glitch_takes_no_step():
    assert play([50.0] * 10 + [120.0] * 2 + [50.0] * 10)[0] == []


def test_the_step_down_comes_with_the_third_hot_reading():
    moves, _ = play([71.0] * 3)
    assert moves == [(4.0, governing.Move(True, 1, Cause.ABOVE))]


def test_between_the_thresholds_nothing_moves():
    _, state = play([71.0] * 5)
    assert play([67.0] * 5000, state=state)[0] == []


def test_heat_that_comes_straight_back_makes_the_next_step_up_wait_longer():
    """A model that heats the board above the first threshold whenever it may run freely."""
    state, now_s, celsius, ups = State(), 0.0, 60.0, []
    for _ in range(6 * 1800):
        celsius += ((76 if state.step == 0 else 58) - celsius) * 0.05
        state, move = governing.decide(state, celsius, RUNGS, TIMING, now_s)
        if move is not None and not move.down:
            ups.append(now_s)
        now_s += INTERVAL_S
    gaps = [later - before for before, later in itertools.pairwise(ups)]
    assert gaps[0] < 200
    assert gaps[-1] > 480
    assert len(ups) < 6 * 3600 / 480 + 5


def test_after_a_calm_time_patience_is_forgotten():
    _, state = play([71.0] * 3 + [50.0] * 200)
    state = state._replace(patience=8)
    later = 10_000.0
    for offset in range(3):
        state, _ = governing.decide(state, 71.0, RUNGS, TIMING, later + offset)
    assert state.step == 1
    assert state.patience == 1


def test_a_lost_sensor_gives_back_one_step_after_the_other():
    _, state = play([90.0] * 30)
    assert state.step == 3
    moves, state = play([None] * 1000, state=state._replace(moved_s=0.0))
    assert [(at_s, move.cause) for at_s, move in moves] == [
        (300.0, Cause.BLIND),
        (600.0, Cause.BLIND),
        (900.0, Cause.BLIND),
    ]
    assert state.step == 0


values = st.one_of(st.none(), st.floats(-40, 125))


@settings(deadline=None)
@given(st.lists(values, max_size=300), st.floats(0.5, 30), st.floats(0.1, 60), st.floats(0.1, 60))
def test_there_is_never_more_than_one_step_in_the_time_of_one(readings, interval_s, down_s, up_s):
    moves, _ = play(readings, interval_s, timing=Timing(down_s, up_s))
    for (before_s, _), (at_s, move) in itertools.pairwise(moves):
        wait_s = down_s if move.down else up_s
        assert at_s - before_s >= wait_s - 1e-6
    steps = [0, *(move.step for _, move in moves)]
    assert all(abs(a - b) == 1 for a, b in itertools.pairwise(steps))
    assert all(0 <= step <= len(RUNGS) for step in steps)


@settings(deadline=None)
@given(
    st.integers(0, 3),
    st.floats(30, 100),
    st.lists(st.floats(-2.4, 2.4), min_size=50, max_size=400),
)
def test_noise_smaller_than_the_hysteresis_moves_it_at_most_once_a_step(step, middle_c, noise):
    moves, _ = play([middle_c + c for c in noise], 5.0, state=State(step))
    assert len(moves) <= len(RUNGS)
    assert len({move.down for _, move in moves}) <= 1  # one direction only


@settings(deadline=None)
@given(st.lists(values, max_size=100), st.floats(0, 60))
def test_when_it_is_cold_everything_comes_back(readings, cold_c):
    _, state = play(readings)
    begin_s = len(readings) * INTERVAL_S
    longest_s = len(RUNGS) * TIMING.up_s * governing.PATIENCE_MAX + INTERVAL_S * 10
    for index in range(round(longest_s / INTERVAL_S)):
        state, _ = governing.decide(state, cold_c, RUNGS, TIMING, begin_s + index * INTERVAL_S)
    assert state.step == 0


# --- readings -------------------------------------------------------------------------------------


def test_what_no_sensor_reads_is_no_reading():
    assert governing.celsius(45_250) == 45.25
    for raw in (None, 0, 127, -127, 45, 127_000, -274_000, 2_147_483_647, 125_001):
        assert governing.celsius(raw) is None
    assert governing.celsius(-5_000) == -5.0
    assert governing.celsius(60_000, offset_c=-3) == 57


def watched(*looks):
    """The sensors after looks of (time, readings)."""
    sensors = {}
    for now_s, readings in looks:
        sensors = governing.watch(sensors, readings, now_s)
    return sensors


def test_a_sensor_that_sticks_while_another_moves_is_not_believed():
    sensors = watched((0, {"a": 80.0, "b": 40.0}), (1900, {"a": 80.0, "b": 46.0}))
    assert governing.stuck(sensors["a"], 1900)
    assert governing.hottest(sensors, 1900) == 46.0
    sensors = governing.watch(sensors, {"a": 80.1, "b": 46.0}, 1902)
    assert governing.hottest(sensors, 1902) == 80.1


def test_a_sensor_that_sticks_alone_or_in_a_steady_room_is_believed_and_said():
    for others in ({}, {"b": 41.0}):
        sensors = watched((0, {"a": 80.0} | others), (1900, {"a": 80.0} | others))
        assert governing.stuck(sensors["a"], 1900)
        assert governing.hottest(sensors, 1900) == 80.0


def test_without_any_sensor_there_is_no_temperature():
    assert governing.hottest(watched((0, {"a": None})), 0) is None
    assert governing.hottest({}, 0) is None


def test_a_device_that_throttles_itself_is_at_least_at_the_first_threshold():
    assert governing.heat(LADDER, 40.0, throttled=True) == 70
    assert governing.heat(LADDER, None, throttled=True) == 70
    assert governing.heat(LADDER, 90.0, throttled=True) == 90
    assert governing.heat(LADDER, 40.0, throttled=False) == 40
    assert governing.heat(Ladder(), None, throttled=True) is None


def test_the_next_smaller_variant_comes_first_and_the_others_stand_by():
    sizes = {"fp32": 100, "fp16": 50, "int8": 25}
    names = ["fp32", "int8", "fp16"]
    assert governing.slimmed(names, sizes) == ["fp16", "fp32", "int8"]
    assert governing.slimmed(names, sizes, slower={"fp16"}) == ["int8", "fp32", "fp16"]
    assert governing.slimmed(["int8", "fp32"], sizes) == ["int8", "fp32"]
    assert governing.slimmed(["int8"], sizes) == ["int8"]


# --- memory ---------------------------------------------------------------------------------------


def test_pressure_that_lasts_gives_up_one_thing_after_the_other():
    rungs = governing.memory_rungs(10, refuse=True)
    moves, state = play([15.0] * 40, rungs=rungs, timing=Timing(10, 60))
    assert [at_s for at_s, _ in moves] == [4.0, 14.0, 24.0]
    assert governing.reliefs(state.step) == tuple(governing.Relief)
    assert len(governing.memory_rungs(10, refuse=False)) == 2
    assert rungs[0] == Rung(10, 5)


def test_a_cgroup_at_its_limit_is_pressure_whatever_the_figures_say():
    assert governing.shortage(3.0, None, False, 10) == 3.0
    assert governing.shortage(0.5, None, True, 10) == 10
    assert governing.shortage(None, None, True, 10) == 10
    assert governing.shortage(None, None, False, 10) is None


def test_without_pressure_the_available_memory_says_short_calm_or_neither():
    (rung, *_) = governing.memory_rungs(10, refuse=False)
    assert governing.shortage(None, 0.04, False, 10) >= rung.enter
    assert rung.leave <= governing.shortage(None, 0.07, False, 10) < rung.enter
    assert governing.shortage(None, 0.11, False, 10) < rung.leave
    assert governing.shortage(0.0, 0.01, False, 10) == 0.0


# --- what holds -----------------------------------------------------------------------------------


def test_a_deeper_step_never_gives_anything_back():
    assert governing.limits(LADDER, 0) == Limits()
    assert governing.limits(LADDER, 1) == Limits(run_share=0.6)
    assert governing.limits(LADDER, 2) == Limits(0.6, "0-1", True, 0)
    assert governing.limits(LADDER, 3) == Limits(0.3, "0-1", True, 5)
