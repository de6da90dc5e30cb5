"""The daemon's use of its store: what waits for what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from edge_runtime.daemon.shelf import Shelf
from edge_runtime.store import Store

LONG_S = 10.0  # no step takes longer
SOON_S = 0.05  # what has not begun by then waits


def step(began: threading.Event, go_on: threading.Event) -> Any:
    def run(_: Store) -> str:
        began.set()
        assert go_on.wait(LONG_S)
        return "done"

    return run


class Steps:
    """One step under way, and a way to ask whether another waits for it."""

    def __init__(self) -> None:
        self.shelf = Shelf(cast(Store, None))
        self.began, self.go_on = threading.Event(), threading.Event()

    async def under_way(self, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        task = asyncio.create_task(work)
        assert await asyncio.to_thread(self.began.wait, LONG_S)
        return task

    async def waits(self, second: str) -> bool:
        began = threading.Event()
        task = asyncio.create_task(getattr(self.shelf, second)(step(began, self.go_on)))
        at_once = await asyncio.to_thread(began.wait, SOON_S)
        self.go_on.set()
        assert await task == "done"
        return not at_once


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ("install", "read", False),
        ("install", "switch", False),
        ("switch", "install", False),
        ("switch", "read", True),
        ("switch", "call", True),
        ("call", "switch", True),
        ("install", "call", True),
        ("install", "install", True),
        ("call", "read", True),
        ("call", "call", True),
        ("read", "call", True),
        ("read", "install", False),
    ],
)
def test_only_an_install_goes_on_beside_reads_and_switches(
    first: str, second: str, waits: bool
) -> None:
    async def scenario() -> None:
        steps = Steps()
        task = await steps.under_way(getattr(steps.shelf, first)(step(steps.began, steps.go_on)))
        assert await steps.waits(second) is waits
        assert await task == "done"

    asyncio.run(scenario())


@pytest.mark.parametrize("first", ["call", "read", "switch", "install"])
def test_a_step_whose_caller_was_cancelled_still_keeps_others_waiting(first: str) -> None:
    async def scenario() -> None:
        steps = Steps()
        task = await steps.under_way(getattr(steps.shelf, first)(step(steps.began, steps.go_on)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await steps.waits("call")
        assert await steps.shelf.call(lambda _: "free") == "free"

    asyncio.run(scenario())


def test_a_caller_cancelled_while_it_waits_leaves_nothing_locked() -> None:
    async def scenario() -> None:
        steps = Steps()
        task = await steps.under_way(steps.shelf.read(step(steps.began, steps.go_on)))
        second = asyncio.create_task(steps.shelf.call(lambda _: "never"))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        steps.go_on.set()
        assert await task == "done"
        assert await asyncio.wait_for(steps.shelf.call(lambda _: "free"), LONG_S) == "free"

    asyncio.run(scenario())


class Closable:
    """A store that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def interrupt(self) -> None:
        self.told.append("interrupt")

    def close(self) -> None:
        self.told.append("close")


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_store_is_unlocked_when_every_step_has_ended(cancelled: bool) -> None:
    async def scenario() -> None:
        store = Closable()
        steps = Steps()
        steps.shelf = Shelf(cast(Store, store))
        task = await steps.under_way(steps.shelf.install(step(steps.began, steps.go_on)))
        if cancelled:  # whoever asked for it is gone, the thread is not
            task.cancel()
        closing = asyncio.create_task(steps.shelf.close())
        await asyncio.wait([closing], timeout=SOON_S)
        assert store.told == ["interrupt"] and not closing.done()
        steps.go_on.set()
        await asyncio.wait_for(closing, LONG_S)
        assert store.told[-1] == "close"
        await asyncio.wait([task])

    asyncio.run(scenario())
