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

SWAPS, ROLLBACKS = 1000, 200
QUICK_SWAPS, QUICK_ROLLBACKS = 30, 10
CONNECTIONS = 16
# Half of the connections have one request in flight, the others four.
DEPTHS = (1,) * 8 + (4,) * 8
LARGE_DEPTHS = (1,) * 4
LARGE_EVERY = 4  # each fourth swap is that of the model with the large tensor
QUIET_SWAPS = 60
# A busy machine does fewer, so that the run stays within its time; the report says how many.
SWAPS_S_MAX, ROLLBACKS_S_MAX = 45.0, 20.0
ROLLBACK_TIMEOUT_S = 10.0
NONE = Target(0)


def measure(setting: Setting) -> Result:
    """Swaps, then rollbacks. Raises BenchError."""
    config = "".join(
        f"  {name}:\n    keep_previous_warm: false\n" for name in ("tiny", "large")
    )  # so that each swap loads
    with Daemon(setting.directory, f"models:\n{config}") as daemon:
        for name in ("tiny", "tiny-2", "tiny2", "tiny2-2", "large", "large-2"):
            daemon.install(setting.bundles[name][1])
        figures = _swaps(daemon, setting, QUICK_SWAPS if setting.quick else SWAPS)
        figures += _quiet(daemon, 5 if setting.quick else QUIET_SWAPS)
        figures += _rollbacks(daemon, setting, QUICK_ROLLBACKS if setting.quick else ROLLBACKS)
    return Result(figures)


class _Swap(NamedTuple):
    """What one activation took, as the daemon says and as its caller sees."""

    model: str
    handover_ms: float
    connections: int
    whole_ms: float


def _swaps(daemon: Daemon, setting: Setting, count: int) -> list[Figure]:
    setting.say(f"{count} swaps under load")
    done: list[_Swap] = []
    with ExitStack() as stack:
        crowds = [
            _watched(stack, daemon, "tiny", DEPTHS, large=False),
            _watched(stack, daemon, "large", LARGE_DEPTHS, large=True),
        ]
        _tell(crowds, "go")
        serving = {"tiny": 2, "large": 2}
        for number in _within(SWAPS_S_MAX, count):
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


def _rollbacks(daemon: Daemon, setting: Setting, count: int) -> list[Figure]:
    setting.say(f"{count} rollbacks under load")
    loaded_ms, quiet_ms = [], []
    with ExitStack() as stack:
        crowd = [_watched(stack, daemon, "tiny2", DEPTHS, large=False)]
        client = stack.enter_context(Client(daemon.infer_socket))
        quiet_ms = [_rollback_ms(daemon, client) for _ in range(count // 4 or 1)]
        _tell(crowd, "go")
        loaded_ms = [_rollback_ms(daemon, client) for _ in _within(ROLLBACKS_S_MAX, count)]
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


def _rollback_ms(daemon: Daemon, client: Client) -> float:
    """Milliseconds from the command to the first answer of version 1, as a client of the model
    sees it that asks all the time. Version 2 serves again first; version 1 stays warm then."""
    daemon.call("activate", name="tiny2", version=2)
    inputs = _inputs("tiny2")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        began_s = time.perf_counter()
        command = pool.submit(daemon.call, "rollback", name="tiny2")
        while client.infer_result("tiny2", inputs).model_version != "1":
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
