"""Who is loaded when, on a device that models share."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from edge_runtime.daemon import hosts
from edge_runtime.daemon.hosts import Place


def worker(model: str, *, ready: bool = True) -> Any:
    return SimpleNamespace(spec=SimpleNamespace(model=model), report=object() if ready else None)


def test_who_was_the_end_of_a_process_comes_back_after_those_that_served() -> None:
    async def scenario() -> None:
        place = Place()
        lost = [worker("good"), worker("better"), worker("bad")]
        place.order_return(lost, [lost[2]])
        waits = asyncio.create_task(place.neighbours_first("bad"))
        for name in ("good", "better"):
            await asyncio.wait_for(place.neighbours_first(name), 1)  # at once
            await asyncio.sleep(0)
            assert not waits.done()
            place.note_back(name)
        await asyncio.wait_for(waits, 1)
        await asyncio.wait_for(place.neighbours_first("bad"), 1)  # once only

    asyncio.run(scenario())


def test_of_one_that_loads_and_one_that_ran_the_one_that_loads_comes_last() -> None:
    async def scenario() -> None:
        place = Place()
        lost = [worker("ran"), worker("loads", ready=False)]
        place.order_return(lost, lost)
        await asyncio.wait_for(place.neighbours_first("ran"), 1)
        waits = asyncio.create_task(place.neighbours_first("loads"))
        await asyncio.sleep(0)
        assert not waits.done()
        place.note_back("ran")
        await asyncio.wait_for(waits, 1)

    asyncio.run(scenario())


def test_neighbours_that_do_not_come_back_are_not_waited_for_for_long(monkeypatch: Any) -> None:
    monkeypatch.setattr(hosts, "NEIGHBOURS_FIRST_S", 0.01)

    async def scenario() -> None:
        place = Place()
        lost = [worker("asleep"), worker("bad")]
        place.order_return(lost, [lost[1]])
        await asyncio.wait_for(place.neighbours_first("bad"), 1)
        await asyncio.wait_for(place.neighbours_first("bad"), 1)

    asyncio.run(scenario())


def test_when_anybody_may_have_been_it_nobody_waits() -> None:
    async def scenario() -> None:
        place = Place()
        lost = [worker("one"), worker("two")]
        place.order_return(lost, lost)
        for name in ("one", "two"):
            await asyncio.wait_for(place.neighbours_first(name), 1)

    asyncio.run(scenario())
