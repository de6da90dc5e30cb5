"""shadow, split, promote: what they ask for and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from edge_runtime.serving import page, trial

from .conftest import Asked, Done, FakeDaemon

Edge = Callable[..., Done]
NOTHING = memoryview(bytes(page.PAGE_SIZE)).cast("Q")


def report(**more: object) -> dict[str, object]:
    """A report as the daemon makes it."""
    return {
        "name": "m",
        "candidate": 2,
        "variant": "int8",
        "stable": 1,
        "state": "running",
        "reason": "",
        "shadow_share": 1.0,
        "split_share": 0.25,
        "duration_s": 12.0,
        **trial.report(NOTHING, NOTHING, ["y"]),
        **more,
    }


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("shadow", "m@2"), Asked("shadow", {"name": "m", "version": 2}, [])),
        (
            ("split", "m@2", "--share", "0.25"),
            Asked("split", {"name": "m", "version": 2, "share": 0.25}, []),
        ),
        (("shadow", "m"), Asked("shadow", {"name": "m"}, [])),
        (("split", "m"), Asked("split", {"name": "m"}, [])),
        (("shadow", "m", "--stop"), Asked("candidate_stop", {"name": "m"}, [])),
        (("split", "m", "--stop"), Asked("candidate_stop", {"name": "m"}, [])),
    ],
)
def test_each_asks_for_itself_and_reports(edge: Edge, daemon: FakeDaemon, words, asked) -> None:
    daemon.replies[asked.command] = report()
    done = edge(*words)
    assert (done.code, daemon.asked) == (0, [asked])
    assert "m: candidate 2 beside version 1, running" in done.out
    assert json.loads(edge(*words, "--json").out)["candidate"] == 2


def test_a_shadow_tells_of_classes_distances_and_times(edge: Edge, daemon: FakeDaemon) -> None:
    candidate = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
    stable = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
    reals = trial.numbers(candidate)
    stable[trial.SHOWN], stable[trial.DROPPED_FULL] = 100, 20
    candidate[trial.COMPARED], candidate[trial.DISAGREED], candidate[trial.ERRORS] = 80, 4, 1
    for word, value in ((trial.COUNT, 80), (trial.ROWS, 80), (trial.AGREED, 76)):
        candidate[trial.OUTPUT + word] = value
    candidate[trial.OUTPUT + trial.COSINES] = 80
    reals[trial.OUTPUT + trial.MAX_ABS] = 0.125
    reals[trial.OUTPUT + trial.COSINE_MIN] = 0.5
    reals[trial.OUTPUT + trial.COSINE_SUM] = 60.0
    trial.write_text(candidate, "out of luck")
    page.observe(candidate, trial.CANDIDATE_RUN, 2_000_000)
    daemon.replies["shadow"] = report(**trial.report(stable, candidate, ["y"]))
    lines = edge("shadow", "m").out.split("\n")
    assert "compared 80 of 120 samples (20 dropped, 19 waiting, 1 errors)" in lines
    assert "disagreed: 4 (5.00%)" in lines
    assert "last error: out of luck" in lines
    assert ["y", "95.00%", "0", "0", "0.125", "0.500000", "0.750000"] in [
        line.split() for line in lines
    ]
    assert any(line.startswith("candidate run: p50 2.0") for line in lines)


def test_a_split_tells_who_answered_instead(edge: Edge, daemon: FakeDaemon) -> None:
    stable = memoryview(bytearray(page.PAGE_SIZE)).cast("Q")
    stable[trial.CHOSEN], stable[trial.ANSWERED], stable[trial.TOO_SLOW] = 10, 7, 3
    daemon.replies["split"] = report(**trial.report(stable, NOTHING, ["y"]))
    out = edge("split", "m").out
    assert "answered 7 of 10 requests" in out
    assert "instead: 3 (0 held back, 3 too slow, 0 refused, 0 lost)" in out


def test_promote_is_an_activation(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["promote"] = {"name": "m", "version": 2, "variant": "int8", "swap_ms": 0.4}
    done = edge("promote", "m")
    assert daemon.asked == [Asked("promote", {"name": "m"}, [])]
    assert done.out.strip() == "m@2 is active (variant int8, switched in 0.4 ms)"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("shadow",), "required: NAME"),
        (("shadow", "m@x"), "NAME@VERSION"),
        (("shadow", "m@2", "--share", "1.5"), "not a share"),
        (("split", "m@2", "--share", "nan"), "not a share"),
        (("split", "m", "--share", "0.5"), "--share needs a version"),
        (("split", "m@2", "--stop"), "--stop takes no version"),
        (("promote",), "required: NAME"),
    ],
)
def test_a_mistake_is_explained_with_exit_code_2(edge: Edge, words, says: str) -> None:
    done = edge(*words)
    assert done.code == 2 and says in done.err
