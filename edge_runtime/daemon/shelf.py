"""The store as the event loop sees it: one call at a time, in a thread.

Law of this file: it adds waiting to `store`, and reads manifests through `bundle`; it decides
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.store import Generation, Store

T = TypeVar("T")


class Shelf:
    """Serialises the daemon's use of its store.

    Reads and switches take turns, and go on during an install, which may copy for minutes: whatever
    dies meanwhile is loaded again, and another version can be made to serve. What removes things
    waits for the install, because what that brings in is not named by anything yet. (The store
    caches nothing, and an install shows only when it is whole.)
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._changes = asyncio.Lock()  # one install or removal at a time
        self._short = asyncio.Lock()  # one short step at a time
        self._under_way: set[asyncio.Future[Any]] = set()
        # A thread each, kept: every further one would have a heap of its own that never shrinks.
        self._thread, self._copier = (
            ThreadPoolExecutor(1, name) for name in ("store", "store-copier")
        )

    async def call(self, step: Callable[[Store], T]) -> T:
        """Run `step(store)` in a thread, alone; a cancelled caller does not interrupt it."""
        return await self._run(self._thread, step, self._changes, self._short)

    async def read(self, step: Callable[[Store], T]) -> T:
        """The same for a step that changes nothing: it does not wait for an install."""
        return await self._run(self._thread, step, self._short)

    async def switch(self, step: Callable[[Store], T]) -> T:
        """The same for a step that says what serves: it does not wait either."""
        return await self._run(self._thread, step, self._short)

    async def install(self, step: Callable[[Store], T]) -> T:
        """The same for a step that installs: reads and switches go on beside it."""
        return await self._run(self._copier, step, self._changes)

    @property
    def changing(self) -> bool:
        """Whether an install or removal is under way; others may wait."""
        return self._changes.locked()

    def interrupt(self) -> None:
        """Have an install under way give up; nothing is installed any more."""
        self.store.interrupt()

    async def close(self) -> None:
        """Wait for every step to end, then unlock the store."""
        self.interrupt()
        while self._under_way:
            await asyncio.wait(self._under_way)
        self.store.close()

    async def _run(
        self, thread: ThreadPoolExecutor, step: Callable[[Store], T], *locks: asyncio.Lock
    ) -> T:
        held: list[asyncio.Lock] = []

        def release() -> None:
            for lock in held:
                lock.release()

        def ended(work: asyncio.Future[T]) -> None:  # which may be later than its caller
            release()
            self._under_way.discard(work)
            if not work.cancelled():
                work.exception()  # seen: a caller that is gone is not told

        try:
            for lock in locks:
                await lock.acquire()
                held.append(lock)
        except BaseException:
            release()
            raise
        work = asyncio.get_running_loop().run_in_executor(thread, step, self.store)
        self._under_way.add(work)
        work.add_done_callback(ended)
        return await asyncio.shield(work)

    async def manifest(self, generation: Generation) -> Manifest:
        """The checked manifest of an installed generation.

        Raises:
            StorageError, BundleError: it is damaged.
        """
        data = await self.read(lambda store: store.read_manifest(generation))
        return manifests.parse(data, f"{generation.name}@{generation.version}: model.yaml")
