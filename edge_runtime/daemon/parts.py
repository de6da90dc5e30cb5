"""What the daemon gives to everything that looks after one model.

Law of this file: a value. It is made once per model by the supervisor; what is done with it is
decided where one model is looked after: in `deployment`, and in the modules that it is made of.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from edge_runtime.clock import Clock
from edge_runtime.config import Config, WorkerConfig
from edge_runtime.daemon.board import Board
from edge_runtime.daemon.compiled import CompiledModels
from edge_runtime.daemon.hosts import Hosts
from edge_runtime.daemon.machine import Machine
from edge_runtime.daemon.shelf import Shelf
from edge_runtime.events import Events, Value
from edge_runtime.serving import channel

# Takes a connection that a worker hands back, with its descriptors.
Returned = Callable[[channel.Returned, list[int]], None]
# Makes room for a model that needs so many bytes more, or raises NoMemoryError; the third says
# whether somebody asks for it now, so that others may have to go.
MakeRoom = Callable[[str, int, bool], Awaitable[None]]


class Parts(NamedTuple):
    """One model's name, and what of the daemon its keepers use."""

    name: str
    shelf: Shelf
    hosts: Hosts
    config: Config
    board: Board
    events: Events
    clock: Clock
    returned: Returned
    make_room: MakeRoom
    machine: Machine
    compiled: CompiledModels

    @property
    def worker_config(self) -> WorkerConfig:
        """The configuration of this model's workers."""
        return self.config.worker(self.name)

    def emit(self, event: str, message: str, *, level: Any = "info", **fields: Value) -> None:
        """Tell of something that happened to this model."""
        self.events.emit(event, message, level=level, model=self.name, **fields)
