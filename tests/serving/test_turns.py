"""Turns on a device: one at a time, in the order of asking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from edge_runtime.backends.protocol import Placement
from edge_runtime.serving import page
from edge_runtime.serving.turns import SharedModel, Turns
from tests.daemon.world import until


def test_turns_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = Turns(), []

    def wait(number: int) -> None:
        turns.take()
        order.append(number)
        turns.give()

    turns.take()
    threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda: len(turns._waiting) == number + 1, "its place in the line")  # noqa: B023
    turns.give()
    turns.take()  # at once, as a busy model does: behind all others
    assert order == [0, 1, 2, 3, 4]
    turns.give()
    for thread in threads:
        thread.join(5)


class Fragile:
    """A model that notices when it is run twice at a time."""

    inputs = outputs = ()
    concurrent = True
    keeps_state = False
    facts: Mapping[str, Any] = {"fact": 1}
    placement = (Placement("NPU"),)

    def __init__(self) -> None:
        self._free = threading.Lock()
        self.runs = 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert self._free.acquire(blocking=False), "two runs at a time"
        self.runs += 1
        self._free.release()
        if inputs.get("fail"):
            raise ValueError("on order")
        return {}

    def bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], dict[str, Any]]:
        return lambda: self.run(inputs)


def words() -> memoryview:
    return memoryview(bytearray(page.PAGE_SIZE)).cast("Q")


def test_two_shared_models_never_run_at_the_same_time() -> None:
    device, turns = Fragile(), Turns()
    shared = [SharedModel(device, turns, words()) for _ in range(4)]
    assert not shared[0].concurrent and shared[0].placement == device.placement

    def run_often(run: Callable[[], object]) -> None:
        for _ in range(500):
            run()

    threads = [threading.Thread(target=run_often, args=(one.bind({}, {}),)) for one in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert device.runs == 2000


def test_a_run_that_fails_gives_its_turn_away_and_says_when_it_has_it() -> None:
    status = words()
    seen: list[int] = []

    class Seen(Fragile):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            seen.append(status[page.TURN])
            return super().run(inputs)

    model = SharedModel(Seen(), Turns(), status)
    with pytest.raises(ValueError, match="on order"):
        model.run({"fail": True})
    assert seen[0] > 0 and status[page.TURN] == 0
    assert model.run({}) == {}
