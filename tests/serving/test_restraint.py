"""A worker that is held back: what it refuses, what it says, what it goes on doing."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from edge_runtime.errors import OverloadedError, ThrottledError
from edge_runtime.serving import channel, page

from .rig import NumpyModel, Rig, close_all, infer

Build = Callable[..., Rig]
HOT = "the device is hot"


def slow(inputs):
    time.sleep(0.02)
    return {"y": inputs["x"]}


def test_low_priority_is_refused_with_the_reason_and_a_time_to_come_back(build: Build) -> None:
    rig = build()
    rig.tell(channel.Restrain(priority_min=3, reason=HOT))
    client = rig.client()
    error = client.ask(infer(1.0, 1)).error()
    assert isinstance(error, ThrottledError)
    assert isinstance(error, OverloadedError)  # clients that know only that one retry as well
    assert error.message == HOT
    assert error.retry_after_s == 1.0
    assert client.ask(infer(2.0, 2, priority=3)).array()[0, 0] == 5.0
    assert rig.model.ran == [2.0]
    assert rig.status[page.REFUSED] == rig.status[page.HELD] == 1
    assert rig.status[page.ERRORS] == 0


def test_a_priority_that_a_client_may_not_claim_does_not_help_it(build: Build) -> None:
    rig = build(priority_max=2)
    rig.tell(channel.Restrain(priority_min=3, reason=HOT))
    assert rig.client().ask(infer(1.0, 1, priority=200)).code == "throttled"


@pytest.mark.parametrize("runners", [0, 2])
def test_a_share_of_the_time_is_kept_and_given_back(build: Build, runners: int) -> None:
    rig = build(NumpyModel(slow), runners=runners)
    client = rig.client()
    rig.tell(channel.Restrain(run_share=0.05, reason=HOT))
    answers = [client.ask(infer(float(one), one)) for one in range(1, 8)]
    codes = [answer.code for answer in answers]
    assert codes[0] == ""  # what was saved up
    assert codes[-1] == "throttled"
    assert 0 < (answers[-1].error().retry_after_s or 0) < 10
    rig.tell(channel.Restrain())
    assert [client.ask(infer(float(one), one)).code for one in range(1, 8)] == [""] * 7


def test_what_waits_already_is_answered(build: Build) -> None:
    rig = build(NumpyModel(slow))
    client = rig.client()
    client.send(infer(1.0, 1) + infer(2.0, 2))
    channel.send(rig.control, channel.Restrain(priority_min=9, reason=HOT))
    assert [answer.code for answer in client.answers()] == ["", ""]


def test_answers_that_are_known_cost_no_time_and_are_given(build: Build) -> None:
    rig = build(cache_bytes_max=1 << 20)
    client = rig.client()
    assert client.ask(infer(1.0, 1)).code == ""
    rig.tell(channel.Restrain(priority_min=9, reason=HOT))
    assert client.ask(infer(1.0, 2)).code == ""
    assert client.ask(infer(2.0, 3)).code == "throttled"


def test_a_refused_connection_is_handed_back_like_any_other(build: Build) -> None:
    rig = build()
    rig.tell(channel.Restrain(priority_min=9, reason=HOT))
    rig.client().send(infer(1.0, 1))
    rig.settle()
    ((_, fds),) = rig.drain()
    close_all(fds)
