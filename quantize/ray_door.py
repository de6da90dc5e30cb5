"""The door to Ray: jobs on a cluster instead of this machine.

Law of this file: the only one that imports ray. The cluster is the one that RAY_ADDRESS names;
without it one is started here and ended with the executor. Retries are `executors.run`'s, so Ray's
own are off, and what Ray lost is told as lost. Ray's reports of use are switched off.
Every machine of the cluster needs the same edge-runtime and libraries, and the work folder and data
under the same paths (a shared file system).
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, Self

import msgspec

from edge_runtime.errors import UnavailableError, UsageError
from quantize import executors
from quantize.executors import Job, Said


class RayExecutor:
    """See executors.Executor. One fresh worker process per job, as on one machine.

    `workers`: 0: as many as the cluster has processors.
    """

    def __init__(self, workers: int = 0) -> None:
        self._ray = _library()
        elsewhere = bool(os.environ.get("RAY_ADDRESS"))
        more: dict[str, Any] = (
            {} if elsewhere else {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self._ray.init(log_to_driver=False, logging_level="ERROR", **more)
        except Exception as e:
            raise UnavailableError(
                f"Ray does not start: {' '.join(str(e).split())[:300]}",
                remedy="check RAY_ADDRESS, or leave it out to start a cluster here",
            ) from e
        self.workers = workers or max(int(self._ray.cluster_resources().get("CPU", 1)), 1)
        self._call = self._ray.remote(num_cpus=1, max_retries=0, max_calls=1)(executors.call_json)
        self._keys: dict[Any, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """See Executor."""
        self._keys[self._call.remote(msgspec.json.encode(job))] = job.key

    def wait(self, timeout_s: float) -> list[tuple[str, Said | str]]:
        """See Executor."""
        ready, _ = self._ray.wait(list(self._keys), num_returns=1, timeout=timeout_s)
        return [(self._keys.pop(one), self._ended(one)) for one in ready]

    def cancel(self, key: str) -> None:
        """See Executor."""
        (found,) = [one for one, own in self._keys.items() if own == key]
        del self._keys[found]
        self._ray.cancel(found, force=True)

    def close(self) -> None:
        """See Executor. A cluster that others started goes on."""
        for key in list(self._keys.values()):
            self.cancel(key)
        self._ray.shutdown()

    def _ended(self, one: Any) -> Said | str:
        try:
            return msgspec.json.decode(self._ray.get(one), type=Said)
        # Worker, node or object died, or somebody cancelled it: `call` answers every other failure.
        except self._ray.exceptions.RayError as e:
            return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def _library() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.exceptions
    except ImportError as e:
        raise UsageError(
            f"ray does not import: {e}", remedy="pip install 'edge-runtime[quantize-ray]'"
        ) from e
    return ray
