"""Time from nothing to an answer: a daemon's start, a second model's load.

Law of this file: wall time as a client sees it, from the command to the first answer, page cache
warm; each figure over several fresh starts or loads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from bench.daemon import POLL_S, START_TIMEOUT_S, Daemon
from bench.models import MODELS
from bench.scenario import BenchError, Result, Setting
from bench.summary import Figure, Target, spread
from edge_runtime.client import Client
from edge_runtime.client.retry import RetryPolicy
from edge_runtime.errors import UnavailableError

STARTS = 7
LOADS = 15


def measure(setting: Setting) -> Result:
    """Starts and loads. Raises BenchError."""
    daemon = Daemon(setting.directory)
    with daemon:
        daemon.install(setting.bundles["tiny"][1])
    starts_s = [_start_s(daemon) for _ in range(2 if setting.quick else STARTS)]
    with daemon:
        installs_ms = [_install_ms(daemon, setting)]
        loads_ms = [_load_ms(daemon, "tiny2") for _ in range(2 if setting.quick else LOADS)]
    figures = [
        Figure("daemon start to first answer", spread(starts_s), "s", Target(0.8)),
        Figure(
            "second model of the backend: activate to first answer",
            spread(loads_ms),
            "ms",
            Target(80),
        ),
        Figure(
            "second model of the backend: install and activate to first answer",
            spread(installs_ms),
            "ms",
            note="one time",
        ),
    ]
    return Result(figures, samples={"starts_s": starts_s, "loads_ms": loads_ms})


def _start_s(daemon: Daemon) -> float:
    """Seconds from starting a daemon with an active model to the first answer."""
    began_s = time.perf_counter()
    daemon.start()
    try:
        _first_answer(daemon, "tiny")
        return time.perf_counter() - began_s
    finally:
        daemon.stop()


def _load_ms(daemon: Daemon, name: str) -> float:
    """Milliseconds from `activate` of an installed, unloaded model to the first answer."""
    daemon.call("unload", name=name)
    return _timed_ms(daemon, name, lambda: daemon.call("activate", name=name, version=1))


def _install_ms(daemon: Daemon, setting: Setting) -> float:
    """Milliseconds from `install --activate` of a new bundle to the first answer."""
    bundle = setting.bundles["tiny2"][1]
    return _timed_ms(daemon, "tiny2", lambda: daemon.install(bundle))


def _timed_ms(daemon: Daemon, name: str, command: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    command()
    _first_answer(daemon, name)
    return (time.perf_counter() - began_s) * 1e3


def _first_answer(daemon: Daemon, name: str) -> None:
    """Ask until there is an answer; asks every millisecond, where a client would wait longer."""
    spec = MODELS[name]
    inputs = {spec.input: np.zeros(spec.shape, np.float32)}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with Client(daemon.infer_socket, retry=RetryPolicy(enabled=False)) as client:
        while time.monotonic() < deadline_s:
            try:
                client.infer(name, inputs)
                return
            except UnavailableError:
                daemon.check_alive()
                time.sleep(POLL_S)
    raise BenchError(f"{name} does not answer")
