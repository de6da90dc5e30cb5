"""Up to five times too much: what `edge-runtime bench` says, against what was promised for 5x.

Law of this file: the command line measures; here its JSON becomes figures. The worker has the first
core and the generator the last.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import msgspec

from bench import proc
from bench.daemon import Daemon
from bench.scenario import BenchError, Curve, Panel, Result, Setting
from bench.summary import Figure, Target, spread

DURATION_S, QUICK_DURATION_S = 3.0, 0.5
TIMEOUT_S = 120.0
LOADS, LOADS_QUICK = "0.5x,1x,2x,5x", "1x,5x"  # the last one is what was promised


class Case(NamedTuple):
    """What is overloaded, and the patience of its clients."""

    model: str
    deadline_ms: float
    options: tuple[str, ...] = ()


CASES = (Case("camera", 1000.0, ("--shared-memory",)), Case("rows", 250.0))


def measure(setting: Setting) -> Result:
    """All cases. Raises BenchError."""
    far = proc.cores()[0]
    models = "".join(f"  {case.model}:\n    cpuset: '{far}'\n" for case in CASES)
    figures, samples, panels = [], {}, []
    with Daemon(setting.directory, f"models:\n{models}") as daemon:
        for case in CASES:
            daemon.install(setting.bundles[case.model][1])
            setting.say(f"overload of {case.model}")
            report = _report(daemon, case, setting.quick)
            figures += _figures(case, report)
            samples[case.model] = [one["goodput_per_s"] for one in report["loads"]]
            panels += _panels(case, report)
    return Result(figures, samples=samples, panels=panels)


def _panels(case: Case, report: dict[str, Any]) -> list[Panel]:
    """Goodput, and percentiles of answers and refusals, over what was offered."""
    loads = report["loads"]
    offered = [one["offered_per_s"] for one in loads]
    goodput = [one["goodput_per_s"] for one in loads]
    peak = report["peak"]["goodput_per_s"]
    times = []
    for part, name in (("latency_ms", "p50"), ("latency_ms", "p99"), ("refusal_ms", "p99")):
        points = [(x, one[part][name]) for x, one in zip(offered, loads, strict=True)]
        points = [(x, ms) for x, ms in points if ms is not None]
        if points:
            what = "answers" if part == "latency_ms" else "refusals"
            times.append(Curve(f"{what}, {name}", *zip(*points, strict=True)))
    rates = [
        Curve("answered in time", offered, goodput),
        Curve("all that is offered", (0, peak), (0, peak), style=":", colour="gray"),
        Curve("peak", (0, max(offered)), (peak, peak), style="--", colour="gray"),
    ]
    x = "offered, requests/s"
    return [
        Panel(f"{case.model}: goodput under load", x, "answers/s in time", rates),
        Panel(f"{case.model}: latency under load", x, "ms from when due", times, True),
    ]


def _report(daemon: Daemon, case: Case, quick: bool) -> dict[str, Any]:
    duration_s = QUICK_DURATION_S if quick else DURATION_S
    command = ["taskset", "-c", str(proc.cores()[-1]), sys.executable, "-m", "edge_runtime"]
    command += ["--run-dir", str(daemon.run_dir), "--json", "bench", case.model]
    command += ["--load", LOADS_QUICK if quick else LOADS]
    command += ["--duration", str(duration_s), "--deadline", str(case.deadline_ms), *case.options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise BenchError(f"edge-runtime bench {case.model}: {done.stderr.strip()[-1500:]}")
    document: dict[str, Any] = msgspec.json.decode(done.stdout)
    return document


def _figures(case: Case, report: dict[str, Any]) -> list[Figure]:
    peak, load = report["peak"], report["loads"][-1]
    watched_s = load["recovery_watched_s"]
    recovery_s = load["recovery_s"] if load["recovery_s"] is not None else watched_s
    lag_ms, refused = load["lag_ms"]["p99"] or 0.0, sum(load["refused"].values())
    told = f"{refused} of {load['sent']} refused"
    late = f"the generator itself was late: p99 {lag_ms:.3g} ms" if lag_ms > 1 else ""
    name = f"{case.model}, {load['name']}"
    return [
        Figure(f"{case.model}: peak", _one(peak["goodput_per_s"]), "answers/s"),
        Figure(
            f"{name}: goodput / peak",
            _one(load["goodput_per_s"] / peak["goodput_per_s"]),
            "x",
            Target(0.9, at_most=False),
            told,
        ),
        Figure(
            f"{name}: p99 of accepted requests",
            _one(load["latency_ms"]["p99"] or float("inf")),
            "ms",
            Target(case.deadline_ms),
            late,
        ),
        Figure(
            f"{name}: p99 of refusals",
            _one(load["refusal_ms"]["p99"] or 0.0),
            "ms",
            Target(10),
            late,
        ),
        Figure(
            f"{name}: recovery",
            _one(recovery_s),
            "s",
            Target(1.0),
            "" if load["recovery_s"] is not None else f"not seen within {watched_s:g} s",
        ),
    ]


def _one(value: float) -> Any:
    return spread([value])
