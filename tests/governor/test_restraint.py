"""A worker's budget of computing time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.restraint import BURST_NS, PRIORITY_RETRY_NS, Restraint

S, MS = 1_000_000_000, 1_000_000


def serve(restraint, run_ns, seconds, gap_ns):
    """Ask every `gap_ns`, one at a time; how many ran."""
    now_ns, free_ns, ran = 0, 0, 0
    while now_ns < seconds * S:
        if now_ns >= free_ns and not restraint.wait_ns(0, 0, now_ns):
            restraint.ran(run_ns)
            free_ns, ran = now_ns + run_ns, ran + 1
        now_ns += gap_ns
    return ran


@settings(deadline=None)
@given(st.sampled_from([0.05, 0.3, 0.7]), st.sampled_from([50_000, 5 * MS, 400 * MS]))
def test_a_busy_model_computes_for_its_share_of_the_time(share, run_ns):
    seconds = 60 if run_ns > MS else 2
    ran = serve(Restraint(share, 0, "", 1, 0), run_ns, seconds, min(run_ns, MS))
    used = ran * run_ns / S
    assert share * seconds * 0.95 - 0.5 <= used <= share * (seconds + BURST_NS / S) + run_ns / S


def test_a_model_that_is_asked_less_than_its_share_never_notices():
    assert serve(Restraint(0.5, 0, "", 1, 0), 10 * MS, 20, 40 * MS) == 500


def test_what_waits_already_counts():
    restraint = Restraint(0.5, 0, "", 1, 0)  # 125 ms saved
    assert restraint.wait_ns(0, 124 * MS, 0) == 0
    assert restraint.wait_ns(0, 135 * MS, 0) == 20 * MS


def test_who_comes_back_when_told_is_served():
    restraint = Restraint(0.25, 0, "", 1, 0)
    restraint.ran(S)
    wait_ns = restraint.wait_ns(0, 0, 0)
    assert wait_ns > S
    assert restraint.wait_ns(0, 0, round(wait_ns) + MS) == 0


def test_two_lanes_have_twice_the_time():
    restraint = Restraint(0.5, 0, "", 2, 0)  # 250 ms saved
    assert restraint.wait_ns(0, 260 * MS, 0) == 10 * MS


def test_low_priority_is_refused_and_the_rest_is_not():
    restraint = Restraint(1.0, 5, "hot", 1, 0)
    assert restraint.wait_ns(4, 0, 0) == PRIORITY_RETRY_NS
    assert restraint.wait_ns(5, 10 * S, 0) == 0
