"""Models that share a device: one run at a time, first come, first served.

Law of this file: the order of runs and a model that keeps to it. It knows no device and starts no
thread. The time that a model waits for its turn is not time that it uses the device: only the one
whose turn it is can be hanging.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edge_runtime.clock import monotonic_ns
from edge_runtime.serving import page

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.backends.protocol import Model

    Array = np.ndarray[Any, Any]


class Turns:
    """A lock that is handed to who has waited longest.

    `threading.Lock` is taken by whoever comes by when it is free: a busy model that asks again at
    once would keep the others waiting for as long as it is busy.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def take(self) -> None:
        """Wait for the turn."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until `give` releases it

    def give(self) -> None:
        """The next one's turn."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class SharedModel:
    """A loaded model whose runs take turns with those of others on the same device."""

    concurrent = False

    def __init__(self, model: Model, turns: Turns, status: memoryview) -> None:
        """See above.

        Args:
            status: of its worker's page, which tells since when it uses the device.
        """
        self.inputs = model.inputs
        self.outputs = model.outputs
        self.keeps_state = model.keeps_state
        self.facts: Mapping[str, Any] = model.facts
        self.placement = model.placement
        self._model = model
        self._turns = turns
        self._status = status

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See protocol.Model.run."""
        with self._turn():
            return self._model.run(inputs)

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """See protocol.Model.bind. Binding takes no turn: it may compile, which takes long."""
        bound = self._model.bind(inputs, outputs)

        def run_bound() -> dict[str, Array]:
            with self._turn():
                return bound()

        return run_bound

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._turns.take()
        self._status[page.TURN] = monotonic_ns()
        try:
            yield
        finally:
            self._status[page.TURN] = 0
            self._turns.give()
