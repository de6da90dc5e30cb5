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
    """Serialises the daemon's use of its store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = asyncio.Lock()

    async def call(self, step: Callable[[Store], T]) -> T:
        """Run `step(store)` in a thread, alone; a cancelled caller does not interrupt it."""
        async with self._lock:
            return await asyncio.shield(asyncio.to_thread(step, self.store))

    async def manifest(self, generation: Generation) -> Manifest:
        """The checked manifest of an installed generation.

        Raises:
            StorageError, BundleError: it is damaged.
        """
        data = await self.call(lambda store: store.read_manifest(generation))
        return manifests.parse(data, f"{generation.name}@{generation.version}: model.yaml")
