"""Everything at once, by chance but from a seed: whatever meets, what serves is right and known.

Law of this file: a round is a few random commands at the same time, then rest, then the invariants.
EDGE_STRESS_SEED and EDGE_STRESS_S make other and longer runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import Blob, Golden, GoldenTensor, Manifest, Variant
from edge_runtime.bundle.source import from_bytes
from edge_runtime.errors import EdgeError, InternalError
from edge_runtime.files import SystemFiles
from edge_runtime.store.disk import Disk
from edge_runtime.tensors import TensorSpec
from tests.daemon.world import WIDTH, Daemon, affine, fault, filled, until
from tests.governor.machine import Machine

SEED = int(os.environ.get("EDGE_STRESS_SEED", "1"))
TIME_S = float(os.environ.get("EDGE_STRESS_S", "10"))
MODELS = {"one": ("fp32",), "two": ("fp32", "int8"), "three": ("fp32",)}
VERSIONS = (1, 2, 3, 4)
DYING, WRONG = 3, 4  # version 3 dies of its 30th run, version 4 never keeps its golden
SIZES = {"fp32": 4000, "int8": 1000}
LADDER = {
    "zones": [{"type": "cpu-thermal"}],
    "steps": [{"enter_c": 70, "variant": "smaller"}],
    "down_s": 0.1,
    "up_s": 0.2,
}
WORKERS = {
    "restart": {
        "backoff_initial_s": 0.01,
        "backoff_max_s": 0.1,
        "deaths_max": 3,
        "variant_deaths_max": 2,
        "window_s": 5,
    },
    "keep_alive_s": 1.5,
}


def scale(model: str, version: int) -> float:
    """What its answers are known by."""
    return float(10 * list(MODELS).index(model) + version)


def packed(directory: Path, model: str, version: int) -> Path:
    """A version, y = scale x + 1, with a golden."""
    document = json.dumps(affine(scale(model, version))).encode()
    x = np.ones((1, WIDTH), np.float32)
    y = x * np.float32(scale(model, version)) + np.float32(1 + (version == WRONG))
    blobs = {_sha(one.tobytes()): one.tobytes() for one in (x, y)}
    variants = []
    for label in MODELS[model]:
        data = document.ljust(SIZES[label])
        blobs[_sha(data)] = data
        options = fault("segv", first_run=30) if version == DYING else {}
        blob = Blob(_sha(data), len(data), f"{label}.reference.json")
        variants.append(Variant(label, "reference", blob, label, options=options))
    tensors = (
        GoldenTensor(name, "FP32", one.shape, Blob(_sha(one.tobytes()), one.nbytes))
        for name, one in (("x", x), ("y", y))
    )
    shape = (-1, WIDTH)
    manifest = Manifest(
        schema=1,
        name=model,
        version=version,
        inputs=(TensorSpec("x", "FP32", shape),),
        outputs=(TensorSpec("y", "FP32", shape),),
        batch_axis=0,
        variants=tuple(variants),
        goldens=(Golden((next(tensors),), (next(tensors),)),),
    )
    path = directory / f"{model}-{version}.bundle"
    archive.pack(
        archive.compose(manifest, {sha: from_bytes(data) for sha, data in blobs.items()}), path
    )
    return path


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Chaos:
    """A daemon, its machine, and what may be done to both."""

    def __init__(self, daemon: Daemon, machine: Machine) -> None:
        self.daemon, self.machine = daemon, machine
        self.bundles = {
            (model, version): packed(daemon.bundles, model, version)
            for model in MODELS
            for version in VERSIONS
        }
        self.did: list[str] = []
        self._one = threading.Lock()  # writes a file of the machine at a time

    def act(self, rng: random.Random) -> None:
        """One thing; a refusal is an answer."""
        model, version = rng.choice(list(MODELS)), rng.choice(VERSIONS)
        deeds: list[tuple[int, str, Callable[[], Any]]] = [
            (4, f"activate {model}@{version}", lambda: self._ask("activate", model, version)),
            (2, f"install {model}@{version}", lambda: self._install(model, version, rng)),
            (3, f"rollback {model}", lambda: self._ask("rollback", model)),
            (2, f"shadow {model}@{version}", lambda: self._ask("shadow", model, version)),
            (2, f"split {model}@{version}", lambda: self._ask("split", model, version)),
            (2, f"promote {model}", lambda: self._ask("promote", model)),
            (1, f"stop trial of {model}", lambda: self._ask("candidate_stop", model)),
            (1, f"unload {model}", lambda: self._ask("unload", model)),
            (1, f"remove {model}@{version}", lambda: self._ask("remove", model, version)),
            (1, "gc", lambda: self.daemon.control("gc")),
            (6, "kill", lambda: self._kill(rng)),
            (2, "heat", lambda: self._weather(celsius=rng.choice((50, 80)))),
            (2, "memory", lambda: self._weather(pressure=rng.choice((0, 0, 40)))),
            (1, "rest", lambda: time.sleep(rng.random())),
        ]
        _, name, deed = rng.choices(deeds, [weight for weight, _, _ in deeds])[0]
        self.did.append(name)
        try:
            deed()
        except InternalError:
            raise
        except EdgeError as error:
            self.did.append(f"{name}: {error.code}")

    def _ask(self, command: str, model: str, version: int | None = None) -> None:
        given: dict[str, Any] = {"name": model}
        self.daemon.control(command, **given, **({"version": version} if version else {}))

    def _install(self, model: str, version: int, rng: random.Random) -> None:
        self.daemon.install(self.bundles[model, version], activate=rng.random() < 0.7)

    def _kill(self, rng: random.Random) -> None:
        workers = self.daemon.control("ps")["workers"]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers)["pid"], signal.SIGKILL)

    def _weather(self, celsius: int | None = None, pressure: int | None = None) -> None:
        with self._one:
            if celsius is not None:
                self.machine.zone(0, "cpu-thermal", celsius)
            if pressure is not None:
                self.machine.pressure(memory=pressure)

    def crash(self) -> None:
        """The daemon is killed, and started again."""
        self.did.append("crash")
        self.daemon.kill()
        self.daemon.start()

    # -- the invariants

    def check(self) -> None:
        """At rest: disk, memory, answers and processes agree."""
        until(self._rests, f"rest after {self.did[-12:]}; {self._told()}", timeout_s=20)
        # A version that dies of being asked may fall back just now: they agree a moment later.
        until(self._agree, f"agreement after {self.did[-12:]}; {self._told()}")
        for one in self.daemon.control("models")["models"]:
            if one["active"] is not None:
                self._answers(one["name"])

    def _agree(self) -> bool:
        disk = Disk(SystemFiles(), self.daemon.state_dir)
        return all(
            disk.switch(one["name"]).active == (one["active"] or {}).get("generation")
            for one in self.daemon.control("models")["models"]
        )

    def _rests(self) -> bool:
        models = self.daemon.control("models")["models"]
        workers = self.daemon.control("ps")
        known = {self.daemon.pid} | {one["pid"] for one in workers["templates"]}
        known |= {one["pid"] for one in workers["workers"]}
        rest = all(
            one["state"] in (("ready", "idle") if one["active"] else ("stopped",)) for one in models
        )
        return rest and not set(self.daemon.relatives()) - known

    def _answers(self, model: str) -> None:
        """The version that the disk names answers; it may be one that dies and falls back."""
        with self.daemon.client(timeout_s=10) as client:
            result = client.infer_result(model, {"x": filled(3.0)})
        right(model, result)

    def _told(self) -> str:
        return json.dumps(
            [
                [one["name"], one["state"], one["reason"]]
                for one in self.daemon.control("models")["models"]
            ]
        )


def right(model: str, result: Any) -> None:
    """Its version's numbers, and no other's."""
    expected = 3 * scale(model, int(result.model_version)) + 1
    assert (result.outputs["y"] == expected).all(), (model, result)
    assert int(result.model_version) != WRONG


class Clients:
    """Those that ask all the time; an error is an answer, a wrong number is not."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon, self._stop = daemon, threading.Event()
        self.answered = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Clients:
        self._threads = [threading.Thread(target=self._ask, args=(model,)) for model in MODELS]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, model: str) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(EdgeError), self._daemon.client(timeout_s=1) as client:
                while not self._stop.wait(0.01):
                    result = client.infer_result(model, {"x": filled(3.0)})
                    self.answered += 1
                    try:
                        right(model, result)
                    except AssertionError as wrong:
                        self.wrong.append(str(wrong))
            self._stop.wait(0.05)


@contextlib.contextmanager
def chaos(root: Path) -> Iterator[Chaos]:
    machine = Machine(root)
    machine.zone(0, "cpu-thermal", 50)
    governor = {"interval_s": 0.05, "root": str(root), "ladder": LADDER, "memory_idle_s": 0.2}
    governor |= {"memory_down_s": 0.1, "memory_up_s": 0.2}
    config = {
        "governor": governor,
        "workers": WORKERS,
        "memory": {"budget_bytes": 60 << 20},
        "selection": {"time_max_s": 0.2},
    }
    daemon = Daemon(config)
    try:
        daemon.start()
        yield Chaos(daemon, machine)
        daemon.stop()
    finally:
        daemon.remove()


def unloaded(world: Chaos) -> int:
    """Nothing serves; the descriptors that the daemon has then."""
    daemon = world.daemon
    for model in MODELS:
        with contextlib.suppress(EdgeError):
            daemon.control("unload", name=model)
    until(lambda: not daemon.control("ps")["workers"], "the end of all workers")
    until(world._rests, f"no processes that nobody knows {daemon.relatives()}")
    return daemon.fds()


def test_whatever_meets_what_serves_is_right_and_nothing_is_left(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    with chaos(tmp_path) as world:
        daemon = world.daemon
        for model in MODELS:
            for version in (1, 2):
                daemon.install(world.bundles[model, version])
            daemon.install(world.bundles[model, DYING], activate=False)
        before_fds = unloaded(world)
        for model in MODELS:
            daemon.control("activate", name=model, version=1)
        began_s, rounds, crashed = time.monotonic(), 0, False
        with Clients(daemon) as clients, ThreadPoolExecutor(4) as hands:
            while time.monotonic() - began_s < TIME_S:
                seeds = [rng.random() for _ in range(rng.randint(1, 4))]
                list(hands.map(lambda seed: world.act(random.Random(seed)), seeds))
                world.check()
                rounds += 1
                if not crashed and time.monotonic() - began_s > TIME_S / 2:
                    crashed = True
                    world.crash()
                    world.check()
        print(f"{rounds} rounds, {len(world.did)} commands, {clients.answered} answers")
        assert not clients.wrong and clients.answered > rounds
        world.machine.pressure(memory=0)
        until(lambda: unloaded(world) <= before_fds, f"{before_fds}, {daemon.descriptors()}")
