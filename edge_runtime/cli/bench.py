"""`bench`: offer a model more and more requests, and show what comes of it.

Law of this file: it turns arguments into a plan, and a report into text or JSON. What is offered
and how it is counted is in client/load. numpy is imported when the command is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli import EXIT_INTERRUPTED, infer, output
from edge_runtime.cli import arguments as args
from edge_runtime.clock import SystemClock
from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime.client.load.campaign import Plan, Report
    from edge_runtime.client.load.statistics import Load, Quantiles

    Array = np.ndarray[Any, Any]

TIMEOUT_S = 10.0  # of connecting and of the first answer; --timeout changes it
FACTORS = (1.0, 2.0, 5.0)
DURATION_S = 5.0
# A client's patience: an answer after it counts as late. What the examples of the client use.
DEADLINE_MS = 1000.0
CLIENTS = 8  # connections: enough for fairness to show, few to wait on
VALUES_MAX = 20  # loads of one run: more is a script's business
IN_FLIGHT_MAX = 4096


def add_parser(subparsers: Any) -> None:
    """Add the parser of `bench`."""
    parser = subparsers.add_parser(
        "bench",
        description="Measure a model's peak, offer multiples of it whatever the answers are (open "
        "loop), and report goodput, latency, refusals and recovery. The daemon is under full load "
        "meanwhile.",
    )
    parser.add_argument(
        "target", metavar="NAME", type=infer.name_and_version, help="the model, or NAME@VERSION"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--load", type=_factors, metavar="1x,2x,5x", help="multiples of the peak (the default)"
    )
    load.add_argument("--rate", type=_rates, metavar="R1,R2", help="requests per second")
    load.add_argument(
        "--concurrency",
        type=_in_flight,
        metavar="1,4,16",
        help="closed loop instead: so many in flight, the next when one is answered",
    )
    parser.add_argument(
        "--duration", type=args.seconds, default=DURATION_S, metavar="S", help="of each load (5)"
    )
    parser.add_argument(
        "--deadline",
        type=_milliseconds,
        default=DEADLINE_MS,
        metavar="MS",
        help="of each request, from when it is due; later answers are not goodput (1000)",
    )
    parser.add_argument(
        "--clients", type=args.count, default=CLIENTS, metavar="N", help="connections (8)"
    )
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "uniform"),
        default="poisson",
        help="at random, or at equal distances",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of arrivals and inputs")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, metavar="FILE", help="send this image")
    source.add_argument("--npy", type=Path, metavar="FILE", help="send this .npy or .npz")
    parser.add_argument("--input", default="", metavar="NAME", help="for --image or a .npy")
    parser.add_argument(
        "--shared-memory", action="store_true", help="inputs by shared memory, not in the frames"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    args.add_global(parser)
    parser.set_defaults(handler=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from edge_runtime.client.load import plot
    from edge_runtime.client.load.campaign import Campaign
    from edge_runtime.client.load.generator import CONNECTIONS_MAX, Generator
    from edge_runtime.client.load.request import template

    if arguments.clients > CONNECTIONS_MAX:
        raise UsageError(f"{arguments.clients} clients", expected=f"<= {CONNECTIONS_MAX}")
    plan = _plan(arguments)
    if arguments.plot:
        plot.check(arguments.plot)
    name, version = arguments.target
    request = template(name, version, _inputs(arguments), shared_memory=arguments.shared_memory)
    generator: Generator | None = None
    try:
        generator = Generator(
            str(arguments.run_dir / "infer.sock"),
            request,
            connections=arguments.clients,
            now_ns=SystemClock().monotonic_ns,
            timeout_s=arguments.timeout_s or TIMEOUT_S,
        )
        report = Campaign(generator, plan, _teller(arguments.json)).run()
    finally:
        if generator:
            generator.close()
        request.close()
    how = "in shared memory" if arguments.shared_memory else "in the frame"
    title = f"{name}{'@' + version if version else ''}, {request.tensor_bytes} bytes of input {how}"
    _show(report, title, arguments)
    if arguments.plot:
        plot.draw(report, title, arguments.plot)
    return EXIT_INTERRUPTED if report.interrupted else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    from edge_runtime.client.load import schedule
    from edge_runtime.client.load.campaign import Plan

    given = arguments.rate or arguments.concurrency
    for rate in arguments.rate or (1.0,):
        schedule.check(schedule.Segment(rate, arguments.duration))
    return Plan(
        factors=arguments.load or (() if given else FACTORS),
        rates_per_s=arguments.rate or (),
        in_flight=arguments.concurrency or (),
        duration_s=arguments.duration,
        deadline_ms=arguments.deadline,
        arrivals=arguments.arrivals,
        seed=arguments.seed,
    )


def _inputs(arguments: argparse.Namespace) -> dict[str, Array]:
    """From the file that was given, or made up from the model's own description."""
    import numpy as np

    from edge_runtime.client import Client, RetryPolicy, images
    from edge_runtime.client.load.request import inputs_of

    path, timeout_s = arguments.run_dir / "infer.sock", arguments.timeout_s or TIMEOUT_S
    with Client(path, timeout_s=timeout_s, retry=RetryPolicy(enabled=False)) as client:
        name, version = arguments.target
        metadata = client.metadata(name, version=version)
    if arguments.image:
        name, preprocess = images.preprocess_of(metadata, arguments.input)
        tensor = next(item for item in metadata["inputs"] if item["name"] == name)
        return {name: images.load(arguments.image, preprocess, tensor["datatype"], tensor["shape"])}
    if arguments.npy:
        inputs = dict(infer.read_arrays(arguments.npy))
        if "" in inputs:
            inputs = {arguments.input or metadata["inputs"][0]["name"]: inputs[""]}
        return inputs
    return inputs_of(metadata, np.random.default_rng(arguments.seed))


def _teller(as_json: bool) -> Callable[[str], None]:
    return lambda text: None if as_json else print(text, file=sys.stderr, flush=True)


# --- the report ---------------------------------------------------------------------------------


def _show(report: Report, title: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        output.print_json(
            {
                "model": arguments.target[0],
                "model_version": arguments.target[1],
                "clients": arguments.clients,
                "shared_memory": arguments.shared_memory,
                "plan": report.plan,
                "interrupted": report.interrupted,
                "peak": report.peak,
                "calm": report.calm,
                "loads": report.loads,
            }
        )
        return
    print(text(report, title, arguments.clients))


def text(report: Report, title: str, clients: int) -> str:
    """The report for people: what was offered and came of it, how long it took, remarks."""
    plan = report.plan
    lines = [
        f"{title}; {clients} connections, deadline {plan.deadline_ms:g} ms, {plan.arrivals} "
        f"arrivals, seed {plan.seed}"
    ]
    if report.peak:
        lines.append(
            f"peak: {report.peak.goodput_per_s:.0f} answers/s (closed loop, {report.peak.name})"
        )
    rows = (*((report.calm,) if report.calm else ()), *report.loads)
    lines += ["", output.table(_COUNT_HEADERS, [_counts(row, report.peak) for row in rows])]
    lines += ["", "ms, from when a request was due:"]
    lines += [output.table(_TIME_HEADERS, [_times(row) for row in rows])]
    remarks = [remark for row in rows for remark in _remarks(row)]
    if report.interrupted:
        remarks.append("interrupted: the last load was shorter than asked for")
    return "\n".join([*lines, *(["", *remarks] if remarks else [])])


_COUNT_HEADERS = (
    *("LOAD", ">OFFERED/s", ">SENT/s", ">GOODPUT/s", ">OF PEAK", ">SENT", ">IN TIME", ">LATE"),
    *(">REFUSED", ">EXPIRED", ">ERRORS", ">NO ANSWER", ">UNSENT"),
)
_TIME_HEADERS = (
    *("LOAD", ">p50", ">p90", ">p99", ">p99.9", ">max", ">REFUSAL p50", ">p99", ">RECOVERY"),
    *(">GENERATOR LAG p99", ">ITS CPU"),
)


def _counts(row: Load, peak: Load | None) -> tuple[Any, ...]:
    of_peak = f"{row.goodput_per_s / peak.goodput_per_s:.0%}" if peak else "-"
    rates = [f"{rate:.0f}" for rate in (row.offered_per_s, row.sent_per_s, row.goodput_per_s)]
    failed = sum(row.errors.values())
    counts = (row.sent, row.good, row.late, sum(row.refused.values()), row.expired, failed)
    return (row.name, *rates, of_peak, *counts, row.unanswered, row.unsent)


def _times(row: Load) -> tuple[Any, ...]:
    took, refused = row.latency_ms, row.refusal_ms
    return (
        row.name,
        *(_ms(took, name) for name in ("p50", "p90", "p99", "p999", "max")),
        *(_ms(refused, name) for name in ("p50", "p99")),
        _recovery(row),
        _ms(row.lag_ms, "p99"),
        f"{row.generator_cpu:.0%}",
    )


def _ms(values: Quantiles, name: str) -> str:
    value: float | None = getattr(values, name)
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _recovery(row: Load) -> str:
    if not row.recovery_watched_s:
        return "-"
    if row.recovery_s is None:
        return f"> {row.recovery_watched_s:g} s"
    return output.duration(row.recovery_s) if row.recovery_s else "at once"


def _remarks(row: Load) -> list[str]:
    found = []
    if row.generator_lagged:
        found.append(
            f"{row.name}: the generator itself was late (p99 {_ms(row.lag_ms, 'p99')} ms, "
            f"{row.generator_cpu:.0%} of a core): the times of this row are not the server's alone"
        )
    if row.unsent:
        found.append(
            f"{row.name}: {row.unsent} requests could not be sent, because the server's sockets "
            "were full until their deadline or too many waited"
        )
    codes = {**row.refused, **row.errors}
    if codes:
        told = ", ".join(f"{count} {code}" for code, count in codes.items())
        found.append(f"{row.name}: {told}")
    return found


# --- values -------------------------------------------------------------------------------------


def _numbers(text: str, number: Callable[[str], float], what: str) -> tuple[float, ...]:
    try:
        values = tuple(number(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not 0 < len(values) <= VALUES_MAX or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return values


def _factors(text: str) -> tuple[float, ...]:
    return _numbers(text, lambda part: float(part.removesuffix("x")), "multiples such as 1x,2x,5x")


def _rates(text: str) -> tuple[float, ...]:
    return _numbers(text, float, "requests per second such as 100,200")


def _in_flight(text: str) -> tuple[int, ...]:
    counts = _numbers(text, int, "numbers of requests such as 1,4,16")
    if max(counts) > IN_FLIGHT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {IN_FLIGHT_MAX} in flight")
    return tuple(int(count) for count in counts)


def _milliseconds(text: str) -> float:
    return _numbers(text, float, "a number of milliseconds")[0]


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
