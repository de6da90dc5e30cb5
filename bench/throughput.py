"""Many clients: calls per second and what each of them waits, the peers in interleaved rounds.

Law of this file: what is compared is the table CASES; `measure` does any row of it. A contender is
a peer with a number of clients; in a round each contender has the machine for a fraction of a
second, in an order that changes. Where cores are named, whatever runs the model has the first and
the clients have the last.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from bench import latency, proc, servers
from bench.child import Child
from bench.crowd import Tally
from bench.daemon import Daemon
from bench.peers import PEERS
from bench.scenario import Curve, Latency, Panel, Result, Setting
from bench.summary import Figure, Target, per_round, quantile, spread

ALL_CORES = -1


class Contender(NamedTuple):
    """A peer with a number of clients; `rows` in each of its requests."""

    peer: str
    clients: int
    rows: int = 1

    @property
    def name(self) -> str:
        return f"{self.peer}/{self.clients}" + (f"/{self.rows} rows" if self.rows > 1 else "")

    @property
    def label(self) -> str:
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        rows = f", {self.rows} rows at once" if self.rows > 1 else ""
        return f"{PEERS[self.peer].label}, {clients}{rows}"


class Ratio(NamedTuple):
    """A figure: the rows per second of one contender over another's, or p50 over p50."""

    name: str
    over: str
    under: str
    target: Target | None = None
    of: str = "rows"  # or p50


class Case(NamedTuple):
    """What is compared. `pinned`: the model on the first core and the clients on the last."""

    model: str
    pinned: bool
    contenders: tuple[Contender, ...]
    ratios: tuple[Ratio, ...]
    rounds: int
    seconds: float


CLIENTS = (1, 4, 16)
_HTTP = tuple(Contender(peer, n) for peer in ("fastapi", "triton") for n in CLIENTS)
_AT_LEAST = False

CASES: Mapping[str, Case] = {
    "tiny-clients": Case(
        "tiny",
        True,
        (*(Contender("edge", n) for n in CLIENTS), *_HTTP),
        tuple(
            Ratio(f"{PEERS[peer].label.split(',')[0]}: ours / theirs, {n} clients", *pair)
            for peer in ("fastapi", "triton")
            for n in CLIENTS
            for pair in [(f"edge/{n}", f"{peer}/{n}")]
        ),
        rounds=8,
        seconds=0.25,
    ),
    "rows-clients": Case(
        "rows",
        True,
        (
            Contender("in_process", 1),
            Contender("in_process", 1, 16),
            *(Contender("edge", n) for n in CLIENTS),
            *(one for one in _HTTP if one.clients != 4),
        ),
        (
            Ratio(
                "16 clients / one in-process thread, N=1",
                "edge/16",
                "in_process/1",
                Target(6.0, _AT_LEAST),
            ),
            Ratio("the limit: in process N=16 / N=1", "in_process/1/16 rows", "in_process/1"),
            Ratio("16 clients / the limit", "edge/16", "in_process/1/16 rows"),
            Ratio("FastAPI, 16 clients / one in-process thread", "fastapi/16", "in_process/1"),
            Ratio("Triton, 16 clients / one in-process thread", "triton/16", "in_process/1"),
            Ratio("1 client: p50 / in process", "edge/1", "in_process/1", None, "p50"),
        ),
        rounds=8,
        seconds=0.35,
    ),
    "image-clients": Case(
        "camera",
        False,
        (
            Contender("in_process", 1),
            Contender("in_process", 4),
            Contender("edge_shared", 1),
            Contender("edge_shared", 4),
        ),
        (
            Ratio(
                "4 clients by shared memory / 4 threads in process",
                "edge_shared/4",
                "in_process/4",
                Target(0.95, _AT_LEAST),
            ),
            Ratio("1 client / 1 thread in process", "edge_shared/1", "in_process/1"),
        ),
        rounds=10,
        seconds=0.6,
    ),
}


def measure(case: Case, setting: Setting) -> Result:
    """All rounds of a case. Raises BenchError."""
    cores = proc.cores()
    near, far = (cores[-1], cores[0]) if case.pinned else (ALL_CORES, ALL_CORES)
    model, bundle = setting.bundles[case.model]
    config = f"models:\n  {case.model}:\n    cpuset: '{far}'\n" if case.pinned else ""
    rounds, seconds = (2, 0.1) if setting.quick else (case.rounds, case.seconds)
    with Daemon(setting.directory, config) as daemon, ExitStack() as stack:
        daemon.install(bundle)
        running = servers.Servers(stack, setting.directory)
        crowds = {}
        for one in case.contenders:
            asked = latency.order(
                one.peer, case.model, str(model), str(daemon.infer_socket), near, far
            )
            order = running.complete(asked, far)
            if order is not None:
                shape = (one.rows, *order.shape[1:])
                order = msgspec.structs.replace(order, clients=one.clients, shape=shape)
                crowds[one] = stack.enter_context(Child(order, "bench.crowd"))
                crowds[one].wait_until_ready()
        result = _result(case, list(crowds), _rounds(crowds, rounds, seconds), seconds)
        return dataclasses.replace(result, remark=running.remark)


def _rounds(
    crowds: Mapping[Contender, Child], rounds: int, seconds: float
) -> dict[str, list[Tally]]:
    """Contender's name -> a tally for each round."""
    rng = random.Random(0)
    found: dict[str, list[Tally]] = {one.name: [] for one in crowds}
    turns = list(crowds)
    for _ in range(rounds):
        rng.shuffle(turns)
        for one in turns:
            found[one.name].append(msgspec.convert(crowds[one].ask(str(seconds)), Tally))
    return found


def _result(
    case: Case, contenders: list[Contender], found: Mapping[str, list[Tally]], seconds: float
) -> Result:
    rates = {
        one.name: [tally.calls * one.rows / seconds for tally in found[one.name]]
        for one in contenders
    }
    p50_us = {
        name: [quantile(tally.times_ns, 0.5) / 1e3 for tally in tallies]
        for name, tallies in found.items()
    }
    values = {"rows": rates, "p50": p50_us}
    figures = [
        Figure(
            ratio.name, per_round(values[ratio.of], _over(ratio.over, ratio.under)), "x",
            ratio.target,
        )
        for ratio in case.ratios
        if {ratio.over, ratio.under} <= rates.keys()
    ]  # fmt: skip
    unit = "rows/s" if case.model == "rows" else "calls/s"
    figures += [Figure(one.label, spread(rates[one.name]), unit) for one in contenders]
    latencies = [_latency(one, p50_us[one.name], found[one.name]) for one in contenders]
    samples = {**p50_us, **{f"{name} {unit}": rate for name, rate in rates.items()}}
    return Result(figures, latencies, samples, _panels(case, contenders, rates, latencies, unit))


def _panels(
    case: Case,
    contenders: list[Contender],
    rates: Mapping[str, list[float]],
    latencies: list[Latency],
    unit: str,
) -> list[Panel]:
    """Rates and latencies over the number of clients, a curve for each peer."""
    kinds = dict.fromkeys((one.peer, one.rows) for one in contenders)
    of_name = {one.peer: one for one in latencies}
    rate_curves, latency_curves = [], []
    for number, (peer, rows) in enumerate(kinds):
        colour = f"C{number}"
        mine = [one for one in contenders if (one.peer, one.rows) == (peer, rows)]
        label = PEERS[peer].label + (f", {rows} rows at once" if rows > 1 else "")
        clients = [one.clients for one in mine]
        spreads = [spread(rates[one.name]) for one in mine]
        middle = [each.median for each in spreads]
        between = [(each.low, each.high) for each in spreads]
        rate_curves.append(Curve(label, clients, middle, between, colour=colour))
        if len(mine) > 1:  # percentiles of one number of clients are in the table
            found = [of_name[one.name] for one in mine]
            p50 = [each.p50_us.median for each in found]
            p99 = [each.p99_us for each in found]
            latency_curves += [Curve(f"{label}: p50", clients, p50, colour=colour)]
            latency_curves += [Curve(f"{label}: p99", clients, p99, style="--", colour=colour)]
    return [
        Panel(f"{case.model}: {unit}", "clients", unit, rate_curves),
        Panel(f"{case.model}: latency", "clients", "us a call", latency_curves, True),
    ]


def _over(over: str, under: str) -> Callable[[Mapping[str, float]], float]:
    return lambda values: values[over] / values[under]


def _latency(one: Contender, p50_us: list[float], tallies: list[Tally]) -> Latency:
    every_us = [ns / 1e3 for tally in tallies for ns in tally.times_ns]
    return Latency(
        one.name, one.label, spread(p50_us), quantile(every_us, 0.95), quantile(every_us, 0.99)
    )
