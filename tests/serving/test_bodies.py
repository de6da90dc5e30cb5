"""Bodies that are announced and do not come."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_runtime.serving import admission, intake

from .rig import WIDTH, Rig
from .rig import infer as frame_of

Build = Callable[..., Rig]


def infer(value: float, request_id: int, rows: int = 1) -> bytes:
    return frame_of(np.full((rows, WIDTH), value, dtype=np.float32), request_id)


def test_a_body_that_does_not_come_gives_way_when_memory_is_short(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = infer(2.0, 2, rows=300)
    one = infer(1.0, 1, rows=300)
    rig = build(queue_bytes_max=3 * len(whole))  # room for one: input and as much output
    silent, honest = rig.client(), rig.client()
    silent.send(one[:-8])  # all but the last bytes: its slot is taken
    rig.settle()
    honest.send(whole)
    assert [answer.code for answer in honest.answers()] == ["overloaded"]
    now_ns = admission._monotonic_ns
    monkeypatch.setattr(admission, "_monotonic_ns", lambda: now_ns() + 2 * admission.BODY_NS_MAX)
    honest.send(whole)
    assert [answer.code for answer in honest.answers()] == [""]
    silent.answers()
    assert silent.closed


def test_a_body_that_takes_its_time_is_left_alone_while_there_is_room(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = build()
    slow, other = rig.client(), rig.client()
    frame = infer(1.0, 1, rows=300)
    slow.send(frame[:-8])
    rig.settle()
    now_ns = admission._monotonic_ns
    monkeypatch.setattr(admission, "_monotonic_ns", lambda: now_ns() + 2 * admission.BODY_NS_MAX)
    other.send(infer(2.0, 2, rows=300))
    assert [answer.code for answer in other.answers()] == [""]
    slow.send(frame[-8:])
    assert [answer.code for answer in slow.answers()] == [""]


def test_headers_too_long_to_be_remembered_are_served_all_the_same(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "HEADER_KEPT_MAX", 8)
    rig = build()
    client = rig.client()
    for value in (1.0, 2.0, 3.0):
        client.send(infer(value, int(value)))
        assert [answer.code for answer in client.answers()] == [""]
    assert rig.worker._intake.plans == {}
