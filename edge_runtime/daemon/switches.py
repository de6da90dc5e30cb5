"""The disk's word on which generation of one model serves.

Law of this file: it asks the store and has it switch; what follows in memory is `deployment`'s. The
caller holds the model's lock wherever something is changed.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.daemon.parts import Parts
from edge_runtime.errors import ConflictError, EdgeError
from edge_runtime.store import Generation, Store, Switch


class Switches:
    """Of one model."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._name = parts.name
        self._shelf = parts.shelf

    async def active(self) -> int | None:
        """The number of the generation that serves; None: none does."""
        return (await self._shelf.read(lambda store: store.current(self._name))).active

    async def generation(self, number: int) -> Generation:
        """What is installed under that number."""
        return await self._shelf.read(lambda store: store.generation(self._name, number))

    async def previous(self) -> Generation:
        """The generation that a roll-back goes to.

        Raises:
            ConflictError: there is none.
        """
        return await self._shelf.read(self._previous)

    def _previous(self, store: Store) -> Generation:
        number = store.current(self._name).previous
        if number is None:
            raise ConflictError(
                f"{self._name} has no previous generation",
                remedy="activate a version instead",
            )
        return store.generation(self._name, number)

    async def switch(
        self,
        active: Generation | None,
        generation: Generation | None,
        step: Callable[[Store], Switch],
    ) -> Switch:
        """Have the disk say that `generation` serves (None: that none does) instead of `active`.

        When it says so although the step failed (the slot has its name, and the directory was not
        synced), that holds: what serves in memory must be what a restart finds.
        """
        before = active.number if active is not None else None
        try:
            return await self._shelf.switch(step)
        except EdgeError as error:
            switch = await self._shelf.read(lambda store: store.current(self._name))
            after = generation.number if generation is not None else None
            if switch.active != after or after == before:
                raise
            name = f"{self._name}@{generation.version}" if generation else "nothing"
            self._parts.emit(
                "switch_not_synced",
                f"{name} serves; a power cut may bring the version before back: {error}",
                level="error",
                code=error.code,
            )
            return switch

    async def settle(self) -> None:
        """Copy the switch, now that nobody waits for it. Without the copy it stands as well."""
        try:
            await self._shelf.switch(lambda store: store.settle(self._name))
        except EdgeError as error:
            self._parts.emit("switch_not_copied", str(error), level="warning", code=error.code)
