"""Measuring a loaded model: so many runs of a recorded input, through the memory that serves.

Law of this file: it runs the model and reports times; nobody's request is touched. Used by a worker
that serves nobody yet, when the supervisor compares the variants of a bundle. What the times mean
is `serving.selection`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import tensors
from edge_runtime.clock import monotonic_ns
from edge_runtime.serving import page
from edge_runtime.serving.goldens import zeros
from edge_runtime.serving.plan import Planner, Slot
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.wire import messages

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Meter:
    """Runs one input again and again, as a request for it would be run."""

    def __init__(self, spec: WorkerSpec, planner: Planner, status: memoryview) -> None:
        """The input is the first golden's, or zeros where there is none.

        Raises:
            EdgeError: the model does not take it.
        """
        self._status = status
        self._slot = _slot(spec, planner)

    def run(self, runs: int, time_ns_max: int) -> list[int]:
        """The time of each run in ns: `runs` of them, or fewer when the time is over; at least one.

        Raises:
            EdgeError: the model failed.
        """
        times_ns: list[int] = []
        respond, status = self._slot.respond, self._status
        status[page.RUN_BEGAN] = before_ns = monotonic_ns()
        give_up_ns = before_ns + time_ns_max
        try:
            while len(times_ns) < runs and (before_ns < give_up_ns or not times_ns):
                respond()
                now_ns = monotonic_ns()
                times_ns.append(now_ns - before_ns)
                status[page.RUN_BEGAN] = before_ns = now_ns  # each run has its own time limit
        finally:
            status[page.RUN_BEGAN] = 0
        return times_ns


def _slot(spec: WorkerSpec, planner: Planner) -> Slot:
    if spec.goldens:
        given = [(one, Path(one.path).read_bytes()) for one in spec.goldens[0].inputs]
        parts = [(one.name, one.datatype, one.shape, data) for one, data in given]
    else:
        arrays = zeros(spec.inputs)
        parts = [
            (
                one.name,
                one.datatype,
                arrays[one.name].shape,
                bytes(tensors.to_bytes(arrays[one.name])),
            )
            for one in spec.inputs
        ]
    headers = tuple(
        messages.TensorHeader(
            name, datatype, shape, messages.TensorParameters(binary_data_size=len(data))
        )
        for name, datatype, shape, data in parts
    )
    slot = Slot(planner.plan(messages.InferRequest(spec.model, headers), {}))
    slot.body[:] = b"".join(data for *_, data in parts)
    return slot
