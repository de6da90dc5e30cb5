"""Versions change under load: is anything lost, how long does it take, what do neighbours feel.

Law of this file: the daemon's own commands in a loop, while `watched` clients count. A swap loads
a fresh worker of the other version each time; a rollback goes to the previous version, which is
warm.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import msgspec
import numpy as np

from bench import proc
from bench.child import Child
from bench.daemon import Daemon
from bench.latency import order
from bench.models import MODELS
from bench.scenario import BenchError, Result, Setting
from bench.summary import Figure, Target, quantile, spread
from bench.watched import Counts, Watch
from edge_runtime.client import Client

CONNECTIONS = 16
# Half of the connections have one request in flight, the others four.
DEPTHS = (1,) * 8 + (4,) * 8
LARGE_DEPTHS = (1,) * 4
LARGE_EVERY = 4  # each fourth swap is that of the model with the large tensor
QUIET_SWAPS = 60
ROLLBACK_TIMEOUT_S = 10.0
NONE = Target(0)


class Effort(NamedTuple):
    """How much is done. A busy machine does less, so that the run stays within its time; the
    report says how much.
    """

    swaps: int
    rollbacks: int
    swaps_s_max: float
    rollbacks_s_max: float
    quiet_swaps: int = QUIET_SWAPS


ORDINARY = Effort(1000, 200, 45.0, 20.0)
QUICK = Effort(30, 10, 45.0, 20.0, quiet_swaps=5)
# What is promised, whole, also on two cores that others use: ten minutes at most.
SOAK = Effort(1000, 200, 400.0, 180.0)
QUICK_SOAK = Effort(8, 4, 20.0, 10.0)


def measure(setting: Setting) -> Result:
    """Swaps, then rollbacks. Raises BenchError."""
    with Daemon(setting.directory, f"models:\n{_cold('tiny', 'large')}") as daemon:
        for name in ("tiny", "tiny-2", "tiny2", "tiny2-2", "large", "large-2"):
            daemon.install(setting.bundles[name][1])
        effort = QUICK if setting.quick else ORDINARY
        figures = _swaps(daemon, setting, effort)
        figures += _quiet(daemon, effort.quiet_swaps)
        figures += _rollbacks(daemon, setting, effort)
    return Result(figures)


def soak(setting: Setting) -> Result:
    """All that is promised of swaps and rollbacks, in one run of one daemon, with pipelined and
    large-tensor clients in both halves. Raises BenchError.

    A machine that stalls for seconds is no overload here: nothing is refused for the time that it
    would wait. (`overload` measures that.)
    """
    effort = QUICK_SOAK if setting.quick else SOAK
    config = f"workers:\n  queue_ms_max: 0\nmodels:\n{_cold('tiny', 'large')}"
    with Daemon(setting.directory, config) as daemon:
        for name in ("tiny", "tiny-2", "large", "large-2"):
            daemon.install(setting.bundles[name][1])
        for name in ("tiny2", "tiny2-2", "large2", "large2-2"):
            daemon.install(setting.bundles[name][1])
        before = proc.memory(daemon.pid)
        figures = _swaps(daemon, setting, effort)
        figures += _rollbacks(daemon, setting, effort, large="large2")
        grown_mib = (proc.memory(daemon.pid).rss - before.rss) / 2**20
    return Result([*figures, Figure("the daemon's memory grew by", spread([grown_mib]), "MiB")])


def _cold(*models: str) -> str:
    """Configuration with which each swap loads."""
    return "".join(f"  {name}:\n    keep_previous_warm: false\n" for name in models)


class _Swap(NamedTuple):
    """What one activation took, as the daemon says and as its caller sees."""

    model: str
    handover_ms: float
    connections: int
    whole_ms: float


def _swaps(daemon: Daemon, setting: Setting, effort: Effort) -> list[Figure]:
    setting.say(f"{effort.swaps} swaps under load")
    done: list[_Swap] = []
    with ExitStack() as stack:
        crowds = [
            _watched(stack, daemon, "tiny", DEPTHS, large=False),
            _watched(stack, daemon, "large", LARGE_DEPTHS, large=True),
        ]
        _tell(crowds, "go")
        serving = {"tiny": 2, "large": 2}
        for number in _within(effort.swaps_s_max, effort.swaps):
            model = "large" if number % LARGE_EVERY == LARGE_EVERY - 1 else "tiny"
            serving[model] = 3 - serving[model]
            done.append(_activate(daemon, model, serving[model]))
        counts = _stop(crowds)
    tiny = [one for one in done if one.connections == CONNECTIONS and one.model == "tiny"]
    return [
        *_losses(f"{len(done)} swaps under load", counts),
        Figure(
            f"handing over {CONNECTIONS} connections under load",
            spread([one.handover_ms for one in tiny] or [float("nan")]),
            "ms",
            Target(3.0),
            f"p99 {quantile([one.handover_ms for one in tiny] or [0.0], 0.99):.3g} ms",
        ),
        Figure(
            "the whole swap under load: command to done",
            spread([one.whole_ms for one in done]),
            "ms",
        ),
    ]


def _quiet(daemon: Daemon, count: int) -> list[Figure]:
    """The same with nobody asking: what is the swap's own."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.infer_socket)) for _ in range(CONNECTIONS)]
        done = []
        for _ in range(count):
            for client in clients:
                client.infer("tiny", {"x": np.ones((1, 16), np.float32)})
            version = int(client.infer_result("tiny", _inputs("tiny")).model_version)
            done.append(_activate(daemon, "tiny", 3 - version))
    assert all(one.connections == CONNECTIONS for one in done)
    return [
        Figure(
            f"handing over {CONNECTIONS} idle connections",
            spread([one.handover_ms for one in done]),
            "ms",
        ),
        Figure("the whole swap, idle", spread([one.whole_ms for one in done]), "ms"),
    ]


def _rollbacks(daemon: Daemon, setting: Setting, effort: Effort, large: str = "") -> list[Figure]:
    """`large`: a model with a large tensor, of which each fourth rollback is; "": none."""
    count = effort.rollbacks
    setting.say(f"{count} rollbacks under load")
    loaded_ms, quiet_ms = [], []
    with ExitStack() as stack:
        crowd = [_watched(stack, daemon, "tiny2", DEPTHS, large=False)]
        if large:
            crowd.append(_watched(stack, daemon, large, LARGE_DEPTHS, large=True))
        client = stack.enter_context(Client(daemon.infer_socket))
        quiet_ms = [_rollback_ms(daemon, client, "tiny2") for _ in range(count // 4 or 1)]
        _tell(crowd, "go")
        for number in _within(effort.rollbacks_s_max, count):
            turn = large if large and number % LARGE_EVERY == LARGE_EVERY - 1 else "tiny2"
            loaded_ms.append(_rollback_ms(daemon, client, turn))
        counts = _stop(crowd)
    name = "rollback to the first answer of the previous version"
    return [
        *_losses(f"{len(loaded_ms)} rollbacks under load", counts),
        Figure(f"{name}, warm", spread(quiet_ms), "ms", Target(5.0)),
        Figure(f"{name}, under load", spread(loaded_ms), "ms"),
    ]


def _within(seconds: float, count: int) -> Iterator[int]:
    """0, 1, 2, ... below `count`, until the time is over."""
    end_s = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end_s, range(count))


def _rollback_ms(daemon: Daemon, client: Client, model: str) -> float:
    """Milliseconds from the command to the first answer of version 1, as a client of the model
    sees it that asks all the time. Version 2 serves again first; version 1 stays warm then."""
    daemon.call("activate", name=model, version=2)
    inputs = _inputs(model)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        began_s = time.perf_counter()
        command = pool.submit(daemon.call, "rollback", name=model)
        while client.infer_result(model, inputs).model_version != "1":
            if time.perf_counter() - began_s > ROLLBACK_TIMEOUT_S:
                command.result()  # says why, if it failed
                raise BenchError("a rollback is done and version 2 goes on answering")
        took_ms = (time.perf_counter() - began_s) * 1e3
        command.result()
    return took_ms


def _activate(daemon: Daemon, model: str, version: int) -> _Swap:
    began_s = time.perf_counter()
    change = daemon.call("activate", name=model, version=version)
    whole_ms = (time.perf_counter() - began_s) * 1e3
    return _Swap(model, change["swap_ms"], change["connections_moved"], whole_ms)


def _inputs(model: str) -> dict[str, object]:
    spec = MODELS[model]
    return {spec.input: np.zeros(spec.shape, np.float32)}


def _watched(
    stack: ExitStack, daemon: Daemon, model: str, depths: tuple[int, ...], *, large: bool
) -> Child:
    watch = Watch(f"watched {model}", str(daemon.infer_socket), model, depths, large)
    child = stack.enter_context(Child(watch, "bench.watched"))
    child.wait_until_ready()
    return child


def _tell(crowds: list[Child], text: str) -> None:
    for crowd in crowds:
        crowd.tell(text)


def _stop(crowds: list[Child]) -> list[Counts]:
    return [msgspec.convert(crowd.ask("stop"), Counts) for crowd in crowds]


def _losses(what: str, counts: list[Counts]) -> list[Figure]:
    def total(name: str) -> float:
        return float(sum(getattr(one, name) for one in counts))

    refused: dict[str, int] = {}
    for one in counts:
        for code, number in one.refused.items():
            refused[code] = refused.get(code, 0) + number
    lost = total("lost") + sum(refused.values())
    told = ", ".join(f"{number} {code}" for code, number in refused.items())
    longest_ms = max(one.max_us for one in counts) / 1e3
    return [
        Figure(f"{what}: requests", spread([total("sent")]), ""),
        Figure(f"{what}: lost or refused", spread([lost]), "", NONE, told),
        Figure(f"{what}: answered twice", spread([total("doubled")]), "", NONE),
        Figure(f"{what}: answered by neither version", spread([total("wrong")]), "", NONE),
        Figure(f"{what}: longest wait of a request", spread([longest_ms]), "ms"),
    ]


# --- a neighbour --------------------------------------------------------------------------------

NEIGHBOUR_ROUNDS, NEIGHBOUR_CALLS = 12, 20_000


def neighbour(setting: Setting) -> Result:
    """The p99 of a model while another one, on the other core, is loaded and swapped.

    The neighbour's client and worker have one core, all else the other: the daemon, its templates,
    the other model, and who commands. To know what of it is the machine's, the same is measured
    while a bare process runs the other model there.
    """
    own, other = proc.cores()[0], proc.cores()[-1]
    config = f"models:\n  tiny:\n    cpuset: '{own}'\n  camera:\n    cpuset: '{other}'\n"
    config += "    keep_previous_warm: false\n"
    rounds, calls = (2, 1000) if setting.quick else (NEIGHBOUR_ROUNDS, NEIGHBOUR_CALLS)
    p99_us: dict[str, list[float]] = {"rest": [], "bare": [], "swap": []}
    swaps = 0
    with Daemon(setting.directory, config, core=other) as daemon, ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {other})
        for name in ("tiny", "camera", "camera-2"):
            daemon.install(setting.bundles[name][1])
        model = str(setting.bundles["tiny"][0])
        asked = order("edge", "tiny", model, str(daemon.infer_socket), own, own)
        child = stack.enter_context(Child(asked))
        camera = order("in_process", "camera", str(setting.bundles["camera"][0]), "", other, other)
        bare = stack.enter_context(Child(camera))
        for one in (child, bare):
            one.wait_until_ready()
        for _ in range(rounds):
            p99_us["rest"].append(_p99_us(child, calls))
            with _Until(lambda: bare.measure(5)):
                p99_us["bare"].append(_p99_us(child, calls))
            with _Until(lambda: _swap_camera(daemon)) as work:
                p99_us["swap"].append(_p99_us(child, calls))
            swaps += work.done
    ratios = {
        name: spread([a / b for a, b in zip(p99_us[name], p99_us["rest"], strict=True)])
        for name in ("bare", "swap")
    }
    return Result(
        [
            Figure(
                "neighbour's p99 during load and swap / at rest",
                ratios["swap"],
                "x",
                Target(1.2),
                f"{swaps} swaps of {setting.bundles['camera'][1].stat().st_size / 2**20:.0f} MiB",
            ),
            Figure(
                "the same while a bare process runs that model / at rest",
                ratios["bare"],
                "x",
                note="what the machine itself does",
            ),
            Figure("p99 at rest", spread(p99_us["rest"]), "us"),
            Figure("p99 during load and swap", spread(p99_us["swap"]), "us"),
        ],
        samples=p99_us,
    )


def _swap_camera(daemon: Daemon) -> None:
    active = daemon.call("why", name="camera")["model"]["active"]["version"]
    daemon.call("activate", name="camera", version=3 - active)


def _p99_us(child: Child, calls: int) -> float:
    return quantile(child.measure(calls), 0.99) / 1e3


class _Until:
    """Does something again and again in a thread, until the block ends."""

    def __init__(self, work: object) -> None:
        self.done = 0
        self._work = work
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Until:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        assert callable(self._work)
        while not self._ending.is_set():
            self._work()
            self.done += 1
