"""`python -m bench [--quick | --long] [--only NAME ...] [--json] [--out DIR]`.

Law of this file: the table of scenarios and the order of steps: build models, run each scenario,
write the report. A scenario that fails is reported with its reason and makes the exit code 1; a
target that is missed does not, because another machine or a loud neighbour is no fault of the code.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import (
    backends,
    latency,
    memory,
    models,
    overload,
    proc,
    reload,
    report,
    startup,
    swap,
    throughput,
)
from bench.report import Measured
from bench.scenario import BenchError, Scenario, Setting
from edge_runtime.errors import EdgeError


def _latency(name: str, title: str) -> Scenario:
    case = latency.CASES[name]
    cores = 1 if case.same_core else 2
    models = (case.model, case.spinning) if case.spinning else (case.model,)
    return Scenario(name, title, models, functools.partial(latency.measure, case), cores)


def _throughput(name: str, title: str) -> Scenario:
    case = throughput.CASES[name]
    return Scenario(
        name,
        title,
        (case.model,),
        functools.partial(throughput.measure, case),
        2 if case.pinned else 1,
    )


SCENARIOS: tuple[Scenario, ...] = (
    _latency("tiny-one-core", "tiny model [1,16], client and worker on one core"),
    _latency("tiny-two-cores", "tiny model [1,16], client and worker on a core each"),
    _latency("image-one-core", "conv net [1,3,224,224], client and worker on one core"),
    _latency("image-two-cores", "conv net [1,3,224,224], client and worker on a core each"),
    _latency("lite0-one-core", "EfficientNet-Lite0, client and worker on one core"),
    _latency("lite0-two-cores", "EfficientNet-Lite0, client and worker on a core each"),
    _throughput("tiny-clients", "tiny model, 1, 4 and 16 clients on the other core"),
    _throughput("rows-clients", "[N,64], a row a request, 1, 4 and 16 clients on the other core"),
    _throughput("image-clients", "conv net, 1 and 4 clients, all cores"),
    Scenario("backends", "each backend against calls of its own library", (), backends.measure),
    Scenario("memory", "resident memory", ("tiny", "tiny2", "camera"), memory.measure),
    Scenario(
        "swap",
        "swaps and rollbacks under load",
        ("tiny", "tiny-2", "tiny2", "tiny2-2", "large", "large-2"),
        swap.measure,
    ),
    Scenario(
        "soak",
        f"{swap.SOAK.swaps} swaps and {swap.SOAK.rollbacks} rollbacks under load",
        ("tiny", "tiny-2", "large", "large-2", "tiny2", "tiny2-2", "large2", "large2-2"),
        swap.soak,
        by_name=True,
    ),
    Scenario(
        "neighbour",
        "tiny model on one core while another is loaded and swapped on the other",
        ("tiny", "camera", "camera-2"),
        swap.neighbour,
        2,
    ),
    Scenario("overload", "up to five times the peak", ("camera", "rows"), overload.measure, 2),
    Scenario("reload", "unload and load, again and again", ("tiny",), reload.measure),
    Scenario("startup", "start and load to first answer", ("tiny", "tiny2"), startup.measure),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    options = _parse(arguments)
    say = functools.partial(print, file=sys.stderr, flush=True)
    machine = proc.machine() | {"quick": options.quick}
    chosen = chosen_scenarios(options.only or ())
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as scratch:
        measured = run(chosen, Path(scratch), quick=options.quick, long=options.long, say=say)
    _write(machine, measured, options.out, say)
    if options.json:
        print(msgspec.json.encode(report.document(machine, measured)).decode())
    else:
        print(report.markdown(machine, measured))
    return 1 if any(one.failed for one in measured) else 0


def chosen_scenarios(names: Sequence[str]) -> list[Scenario]:
    """Those that were named; without any name all but those that have to be."""
    return [one for one in SCENARIOS if (one.name in names if names else not one.by_name)]


def run(
    scenarios: Sequence[Scenario],
    scratch: Path,
    *,
    quick: bool,
    say: Callable[[str], None],
    long: bool = False,
) -> list[Measured]:
    """Build what they need, then run one after the other; a failure ends only its own."""
    say("building models and bundles")
    names = dict.fromkeys(name for one in scenarios for name in one.models)
    bundles = models.build(names, scratch)
    measured = []
    for number, scenario in enumerate(scenarios):
        setting = Setting(scratch / str(number), bundles, quick, say, long)
        measured.append(_run(scenario, setting))
        say(f"{scenario.name}: {measured[-1].problem or f'{measured[-1].seconds:.1f} s'}")
    return measured


def _run(scenario: Scenario, setting: Setting) -> Measured:
    missing = [name for name in scenario.models if name not in setting.bundles]
    if missing:
        problem = f"{', '.join(missing)} is not built on this machine"
        return Measured(scenario.name, scenario.title, None, 0.0, problem)
    if len(proc.cores()) < scenario.cores:
        problem = f"needs {scenario.cores} cores"
        return Measured(scenario.name, scenario.title, None, 0.0, problem)
    began_s = time.monotonic()
    try:
        result = scenario.run(setting)
    except (BenchError, EdgeError) as e:
        seconds = time.monotonic() - began_s
        return Measured(scenario.name, scenario.title, None, seconds, str(e), failed=True)
    return Measured(scenario.name, scenario.title, result, time.monotonic() - began_s)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="a few rounds: does it work at all")
    length.add_argument(
        "--long", action="store_true", help=f"{reload.LONG_RELOADS} reloads, not {reload.RELOADS}"
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=[one.name for one in SCENARIOS],
        help="a scenario; may be given again: " + ", ".join(one.name for one in SCENARIOS),
    )
    parser.add_argument("--json", action="store_true", help="print JSON and not Markdown")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR")
    return parser.parse_args(arguments)


def _write(
    machine: Mapping[str, Any], measured: Sequence[Measured], out: Path, say: Callable[[str], None]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report.markdown(machine, measured))
    document = msgspec.json.encode(report.document(machine, measured))
    (out / "report.json").write_bytes(msgspec.json.format(document))
    if not report.plot(measured, out / "report.png", out / "load.png"):
        say("no plot: matplotlib is not installed (pip install '.[bench]')")
    met, promised = report.verdicts(measured)
    say(f"{met} of {promised} targets met; report in {out}/")


if __name__ == "__main__":
    sys.exit(main())
