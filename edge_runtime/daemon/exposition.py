"""The daemon's figures as one document (`status`) and as Prometheus text (`metrics`).

Law of this file: it asks every part for its figures and arranges them; it keeps nothing and counts
nothing. Keys of the document are in docs/metrics.md, names of metrics in `metrics.METRICS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime import __version__, metrics
from edge_runtime.daemon import memory
from edge_runtime.metrics import Sample
from edge_runtime.serving import page

if TYPE_CHECKING:
    from edge_runtime.daemon.memory import Memory
    from edge_runtime.daemon.processes import WorkerProcess
    from edge_runtime.daemon.statistics import Series
    from edge_runtime.daemon.supervisor import Supervisor
    from edge_runtime.store import StoreStatistics

# What a model's worker has now, by the name of the sample.
_GAUGES: dict[str, Callable[[WorkerProcess], int]] = {
    "edge_connections": lambda worker: worker.connections(),
    "edge_requests_waiting": lambda worker: worker.status[page.WAITING],
}


# --- the document ---------------------------------------------------------------------------------


async def daemon_document(daemon: Supervisor) -> dict[str, Any]:
    """The daemon itself and its store."""
    own = memory.of(os.getpid())
    store = await daemon.shelf.read(lambda opened: opened.statistics())
    return {
        "daemon": {
            "version": __version__,
            "pid": os.getpid(),
            "rss_bytes": own.rss_bytes,
            "pss_bytes": own.pss_bytes,
            "uptime_s": _uptime_s(daemon),
            "ready": daemon.ready(),
            **daemon.router.statistics(),
        },
        "profile": daemon.board.summary(),
        "store": msgspec.to_builtins(store),
        "device": device_document(daemon),
    }


def device_document(daemon: Supervisor) -> dict[str, Any] | None:
    """Its heat and memory, and what is given up for them; None: nobody watches."""
    return daemon.governor.describe() if daemon.config.governor.enabled else None


def model_document(daemon: Supervisor, name: str, *, buckets: bool) -> dict[str, Any]:
    """What a model did since the daemon started, and what it has now."""
    now_ns = daemon.clock.monotonic_ns()
    running = [worker for worker, one in daemon.statistics.workers().items() if one.model == name]
    sizes = [worker.memory() for worker in running]
    counted: dict[str, Any] = msgspec.to_builtins(
        daemon.statistics.model(name, now_ns, buckets=buckets)
    )
    return counted | {
        "workers": len(running),
        "connections": sum(worker.connections() for worker in running),
        "waiting": sum(worker.status[page.WAITING] for worker in running),
        "rss_bytes": sum(size.rss_bytes for size in sizes),
        "pss_bytes": sum(size.pss_bytes for size in sizes),
        "private_bytes": sum(size.private_bytes for size in sizes),
    }


# --- the text -------------------------------------------------------------------------------------


async def text(daemon: Supervisor) -> str:
    """Everything, in Prometheus' text format."""
    store = await daemon.shelf.read(lambda opened: opened.statistics())
    return metrics.render(
        [
            *_own(daemon, store),
            *(daemon.governor.samples() if daemon.config.governor.enabled else ()),
            *_models(daemon),
            *_workers(daemon),
            *_trials(daemon),
            *daemon.statistics.samples(daemon.models()),
        ]
    )


def _own(daemon: Supervisor, store: StoreStatistics) -> Iterator[Sample]:
    router = daemon.router.statistics()
    yield Sample("edge_build_info", (__version__,), 1)
    yield Sample("edge_uptime_seconds", (), _uptime_s(daemon))
    yield Sample("edge_daemon_resident_bytes", (), memory.of(os.getpid()).rss_bytes)
    yield Sample("edge_connections_accepted_total", (), router["accepted"])
    yield Sample("edge_connections_refused_total", (), router["refused"])
    yield Sample("edge_connections_waiting", (), router["waiting"])
    yield Sample("edge_store_bytes", (), store.used_bytes)
    yield Sample("edge_store_free_bytes", (), store.free_bytes)
    yield Sample("edge_store_budget_bytes", (), store.byte_budget or 0)


def _models(daemon: Supervisor) -> Iterator[Sample]:
    for one in daemon.deployments():
        yield Sample("edge_model_ready", (one.name,), int(one.state in ("ready", "idle")))
        yield Sample("edge_restarts_total", (one.name,), one.restarts)


def _workers(daemon: Supervisor) -> Iterator[Sample]:
    """What workers have now; those of the same series together."""
    grouped: dict[Series, list[WorkerProcess]] = {}
    for worker, series in daemon.statistics.workers().items():
        grouped.setdefault(series, []).append(worker)
    roles = {worker: role for one in daemon.deployments() for worker, role in one.workers()}
    for series, workers in grouped.items():
        for info in {_info(one, roles.get(one, "leaving")) for one in workers}:
            yield Sample("edge_worker_info", (*series, *info), 1)
        fell_back = any(one.report is not None and one.report.cpu_fallback for one in workers)
        yield Sample("edge_worker_cpu_fallback", series, int(fell_back))
        for name, value in _GAUGES.items():
            yield Sample(name, series, sum(value(worker) for worker in workers))
        yield from _memory(series, [worker.memory() for worker in workers])


def _info(worker: WorkerProcess, state: str) -> tuple[str, str, str]:
    """Backend version, device, state."""
    return worker.backend_version, worker.device, state if worker.serving else worker.phase


def _trials(daemon: Supervisor) -> Iterator[Sample]:
    """Of each model's candidate, or the last one."""
    for one in daemon.deployments():
        if one.trial is not None:
            yield from one.trial.samples()


def _memory(series: Series, sizes: list[Memory]) -> Iterator[Sample]:
    for name, values in (
        ("edge_worker_resident_bytes", [size.rss_bytes for size in sizes]),
        ("edge_worker_proportional_bytes", [size.pss_bytes for size in sizes]),
        ("edge_worker_private_bytes", [size.private_bytes for size in sizes]),
    ):
        yield Sample(name, series, sum(values))


def _uptime_s(daemon: Supervisor) -> float:
    return (daemon.clock.monotonic_ns() - daemon.started_ns) / 1e9
