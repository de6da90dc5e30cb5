"""The store as the event loop sees it: one call at a time, in a thread.

Law of this file: it adds waiting to `store`, and reads manifests through `bundle`; it decides
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.store import Generation, Store

T = TypeVar("T")


class Shelf:
    """Serialises the daemon's use of its store.

    Reads take turns with short changes, and go on during an install, which may copy for minutes:
    whatever dies meanwhile is loaded again. (The store caches nothing, and an install shows only
    when it is whole.)
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._changes = asyncio.Lock()  # one change at a time, installs included
        self._short = asyncio.Lock()  # one short step at a time

    async def call(self, step: Callable[[Store], T]) -> T:
        """Run `step(store)` in a thread, alone; a cancelled caller does not interrupt it."""
        return await self._run(step, self._changes, self._short)

    async def read(self, step: Callable[[Store], T]) -> T:
        """The same for a step that changes nothing: it does not wait for an install."""
        return await self._run(step, self._short)

    async def install(self, step: Callable[[Store], T]) -> T:
        """The same for a step that installs: reads go on beside it."""
        return await self._run(step, self._changes)

    async def _run(self, step: Callable[[Store], T], *locks: asyncio.Lock) -> T:
        held: list[asyncio.Lock] = []

        def release(_: object = None) -> None:
            for lock in held:
                lock.release()

        try:
            for lock in locks:
                await lock.acquire()
                held.append(lock)
        except BaseException:
            release()
            raise
        work = asyncio.ensure_future(asyncio.to_thread(step, self.store))
        work.add_done_callback(release)  # when it has ended, not when the caller has
        return await asyncio.shield(work)

    async def manifest(self, generation: Generation) -> Manifest:
        """The checked manifest of an installed generation.

        Raises:
            StorageError, BundleError: it is damaged.
        """
        data = await self.read(lambda store: store.read_manifest(generation))
        return manifests.parse(data, f"{generation.name}@{generation.version}: model.yaml")
