"""Memory: the idle daemon, and what each further model adds.

Law of this file: figures from smaps_rollup after real requests. What a model's weights and arena
take is measured, not guessed: a process of its own (`python -m bench.memory A B`) loads a small
model first, so that nothing is counted that the library needs once, and then the one in question;
what the loader has freed is given back before each reading.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench import proc
from bench.daemon import Daemon
from bench.models import MODELS
from bench.scenario import BenchError, Result, Setting
from bench.summary import Figure, Target, spread
from edge_runtime.client import Client

MIB = 2**20
REQUESTS = 200  # a worker in its stride: every lazy allocation has happened
IDLE_S = 1.0  # after the start, before the idle daemon is looked at
REFERENCE_TIMEOUT_S = 60.0
_FURTHER = ("tiny2", "camera")  # the second and the third model


def measure(setting: Setting) -> Result:
    """All memory figures. Raises BenchError."""
    figures = []
    with Daemon(setting.directory) as daemon:
        time.sleep(IDLE_S)
        figures += _idle(daemon.pid)
        for name in ("tiny", *_FURTHER):
            setting.say(name)
            daemon.install(setting.bundles[name][1])
            _use(daemon, name, 20 if setting.quick else REQUESTS)
        processes = daemon.call("ps")
        figures += _further(processes, setting.bundles)
        figures += _together(daemon.pid, processes)
    return Result(figures)


def _idle(pid: int) -> list[Figure]:
    memory = proc.memory(pid)
    found = proc.libraries(pid)
    return [
        _mib("idle daemon without models, RSS", memory.rss, Target(30)),
        _mib("idle daemon without models, PSS", memory.pss),
        _mib("idle daemon without models, private", memory.private),
        Figure(
            "libraries mapped by the idle daemon",
            spread([float(len(found))]),
            "",
            Target(0),
            ", ".join(found) or "neither numpy nor a backend",
        ),
    ]


def _use(daemon: Daemon, name: str, requests: int) -> None:
    spec = MODELS[name]
    with Client(daemon.infer_socket) as client:
        array = np.zeros(spec.shape, np.float32)
        for _ in range(requests):
            client.infer(name, {spec.input: array})


def _further(processes: Mapping[str, Any], bundles: Mapping[str, Any]) -> list[Figure]:
    private = {one["model"]: one["private_bytes"] for one in processes["workers"]}
    figures = []
    for place, name in zip(("second", "third"), _FURTHER, strict=True):
        own = _weights_and_arena(bundles["tiny"][0], bundles[name][0])
        figures += [
            _mib(f"{place} model ({name}), private", private[name]),
            _mib(f"{place} model ({name}), weights and arena", own),
            _mib(
                f"{place} model ({name}), private beyond weights and arena",
                private[name] - own,
                Target(8),
            ),
        ]
    return figures


def _weights_and_arena(small: Path, artifact: Path) -> int:
    """What loading and running a model adds to a process that already runs another."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", str(small), str(artifact)],
        capture_output=True,
        text=True,
        timeout=REFERENCE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"reference process: {done.stderr.strip()[-1500:]}")
    return int(done.stdout)


def _together(pid: int, processes: Mapping[str, Any]) -> list[Figure]:
    """PSS adds up without counting a shared page twice."""
    templates = sum(one["pss_bytes"] for one in processes["templates"])
    workers = sum(one["pss_bytes"] for one in processes["workers"])
    daemon = proc.memory(pid)
    return [
        _mib("daemon with three models, RSS", daemon.rss),
        _mib(
            "daemon, template and three workers, PSS",
            daemon.pss + templates + workers,
            Target(round(120e6 / MIB, 1)),  # promised as 120 MB
        ),
    ]


def _mib(name: str, size: int, target: Target | None = None) -> Figure:
    return Figure(name, spread([size / MIB]), "MiB", target)


def reference(small: str, artifact: str) -> int:
    """Private bytes that a second session adds; for a process that does nothing else."""
    import onnxruntime

    def use(path: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            path, sess_options=options, providers=["CPUExecutionProvider"]
        )
        given = session.get_inputs()[0]
        shape = [1 if not isinstance(size, int) else size for size in given.shape]
        array = np.zeros(shape, np.float32)
        for _ in range(REQUESTS):
            session.run(None, {given.name: array})
        return session

    def private() -> int:
        # Without it, what parsing left behind counts as the model's: 12 MiB of 32 for `camera`.
        ctypes.CDLL(None).malloc_trim(0)
        return proc.memory().private

    keep = [use(small)]
    before = private()
    keep.append(use(artifact))
    return private() - before


if __name__ == "__main__":
    print(reference(sys.argv[1], sys.argv[2]))
