"""Reloads without end: does memory, latency or the number of descriptors creep.

Law of this file: unload, activate, ask; after each reload the daemon and its template are looked
at. A slope is that of the least squares line with its 95 % interval; it counts as none when the
interval reaches 0. The first fifth is left out: lazy allocations happen there. The daemon
keeps few events, because a list of a thousand takes 300 reloads to fill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import proc
from bench.daemon import Daemon
from bench.models import MODELS
from bench.scenario import Result, Setting
from bench.summary import Figure, Spread, Target, quantile, spread
from edge_runtime.client import Client

RELOADS, LONG_RELOADS, QUICK_RELOADS = 200, 2000, 20
TIME_S_MAX = 45.0  # a busy machine does fewer, and the report says so; not with `--long`
MODEL = "tiny"
CONFIG = "limits:\n  history_events_max: 20\n"
CALLS = 200  # after each reload: their p50 is one point of the line
WARMUP_SHARE = 0.2
Z95 = 1.96


def measure(setting: Setting) -> Result:
    """All reloads. Raises BenchError."""
    count = LONG_RELOADS if setting.long else QUICK_RELOADS if setting.quick else RELOADS
    seen: dict[str, list[float]] = {"daemon": [], "template": [], "worker": [], "p50": []}
    fds: dict[str, list[float]] = {"daemon": [], "template": []}
    began_s = time.monotonic()
    with Daemon(setting.directory, CONFIG) as daemon:
        daemon.install(setting.bundles[MODEL][1])
        for _ in range(count):
            if time.monotonic() - began_s > TIME_S_MAX and not setting.long:
                break
            daemon.call("unload", name=MODEL)
            daemon.call("activate", name=MODEL, version=1)
            seen["p50"].append(_p50_us(daemon))
            processes = daemon.call("ps")
            (template,), (worker,) = processes["templates"], processes["workers"]
            for name, pid in (("daemon", daemon.pid), ("template", template["pid"])):
                seen[name].append(proc.memory(pid).private / 1024)
                fds[name].append(float(len(list(Path(f"/proc/{pid}/fd").iterdir()))))
            seen["worker"].append(worker["private_bytes"] / 1024)
    count = len(seen["p50"])
    each_ms = (time.monotonic() - began_s) / count * 1e3
    figures = [
        _slope(f"{name}: private memory", seen[name], "KiB") for name in ("daemon", "template")
    ]
    figures += [
        _slope("worker after each load: private memory", seen["worker"], "KiB"),
        _slope("p50 of a call after each load", seen["p50"], "us"),
    ]
    for name, values in fds.items():
        half = values[len(values) // 2 :]
        more, told = half[-1] - half[0], f"{half[-1]:.0f} open"
        what = f"{name}: descriptors, at the end more than at half time"
        figures.append(Figure(what, spread([more]), "", Target(0), told))
    figures.append(
        Figure("a reload, 200 calls and a look", spread([each_ms]), "ms", note=f"{count} reloads")
    )
    return Result(figures, samples=seen)


def _p50_us(daemon: Daemon) -> float:
    spec = MODELS[MODEL]
    inputs = {spec.input: np.zeros(spec.shape, np.float32)}
    times = []
    with Client(daemon.infer_socket) as client:
        for _ in range(CALLS):
            began = time.perf_counter_ns()
            client.infer(MODEL, inputs)
            times.append(time.perf_counter_ns() - began)
    return quantile(times, 0.5) / 1e3


def _slope(name: str, values: Sequence[float], unit: str) -> Figure:
    kept = values[int(len(values) * WARMUP_SHARE) :]
    per_thousand, margin = slope(kept)
    return Figure(
        f"{name}: slope (95 % interval)",
        Spread(per_thousand, per_thousand - margin, per_thousand + margin, len(kept)),
        f"{unit}/1,000 reloads",
        Target(0.0, of="low"),
        f"{kept[0]:.0f} at first, {kept[-1]:.0f} {unit} at last",
    )


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Least squares slope in units per thousand steps, and half of its 95 % interval.

    Points near each other resemble each other, so the interval is widened by the lag-1
    autocorrelation of what the line leaves over (as for n (1 - r) / (1 + r) points).
    """
    assert len(values) >= 3
    steps = np.arange(len(values), dtype=float) / 1000
    centred = steps - steps.mean()
    per_thousand = float((centred * np.array(values)).sum() / (centred**2).sum())
    rest = np.array(values) - np.mean(values) - per_thousand * centred
    variance = float((rest**2).sum() / (len(values) - 2))
    scale = float((rest**2).sum())
    alike = float((rest[1:] * rest[:-1]).sum() / scale) if scale > 0 else 0.0
    alike = min(max(alike, 0.0), 0.99)
    error = math.sqrt(variance / float((centred**2).sum()) * (1 + alike) / (1 - alike))
    return round(per_thousand, 9), round(Z95 * error, 9)  # a constant's slope is 0, not 1e-14
