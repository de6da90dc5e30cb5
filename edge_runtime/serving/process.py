"""From a forked template to a serving worker, step by step.

Law of this file: `become_worker` is the ordered list of what happens in a new worker; nothing is
served before its last step, and a failure at any step is reported with its name and ends the
process. The loop itself is `worker`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.backends import placement
from edge_runtime.backends.protocol import Caching
from edge_runtime.clock import monotonic_ns, suspended_ns
from edge_runtime.errors import BackendError, BundleError, EdgeError, PlacementError
from edge_runtime.serving import batching, channel, compiled, goldens, page, plan, sandbox
from edge_runtime.serving.batching import Choice
from edge_runtime.serving.heartbeat import Heart
from edge_runtime.serving.spec import WorkerSpec
from edge_runtime.serving.worker import Worker

if TYPE_CHECKING:
    from edge_runtime.backends.protocol import Backend, Model

Array = np.ndarray[Any, Any]

EXIT_FAILED = 70  # sysexits.h EX_SOFTWARE: the reason went over the channel
# On one core a runner brings no throughput, only refusals and new connections while the model runs,
# and costs a few system calls and two switches of threads a request: for slow models only.
ONE_CORE_THRESHOLD_MS = 8.0
# A model that computes for this share of its quickest run, in the thread that calls it, is measured
# in that thread's processor time: on a machine that is busy at load, wall time says more about the
# others. (The rest of a run would be a device or other threads at work.)
COMPUTES_SHARE = 0.8
# How long a worker waits to be handed from its dying intermediate parent to the supervisor.
ADOPTION_S_MAX = 5.0


# Gives a worker its place, name and bounds before any model is touched; what really protects.
Settle = Callable[[WorkerSpec], list[str]]
# The model as it may be used here, given the words of the worker's page.
Share = Callable[["Model", memoryview], "Model"]


def become_worker(
    backend: Backend,
    spec: WorkerSpec,
    control: socket.socket,
    page_fd: int,
    settle: Settle | None = None,
    share: Share | None = None,
) -> int:
    """Everything a worker does; returns its exit code.

    Args:
        settle: in place of a process's own way to it, where it is one of several in a process.
        share: for a model that takes turns with others. The process then goes on without the
            worker, which leaves nothing behind but `control` and `page_fd`.
    """
    phase = "start"

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        status[page.RUN_BEGAN] = 0
        channel.send(control, channel.Phase(name))

    try:
        status = page.words(page_fd)
        measures = (settle or _settle)(spec)
        enter("load")
        began_ns = monotonic_ns()
        _verify(spec)
        if spec.compiled_dir and isinstance(backend, Caching):
            backend.cache = compiled.Cache(Path(spec.compiled_dir), control)
        model = backend.load(Path(spec.artifact), spec.options)
        if share is not None:
            model = share(model, status)
        plan.check_signature(model, spec.inputs, spec.outputs)
        fallen_back = _check_placement(spec, model)
        spec = _for_state(_with_facts(spec, model, fallen_back), model)
        load_ms = _ms_since(began_ns)
        enter("warmup")
        began_ns = monotonic_ns()
        warm = _warm_up(model, spec)
        warmup_ms = _ms_since(began_ns)
        enter("goldens")
        worst = goldens.check(model.run, spec.goldens, spec.rtol, spec.atol)
        runners = _runners(spec, warm.fastest_ms, model.concurrent)
        batch = _batching(model, spec, warm.clock_ns)
        planner = plan.Planner(
            model,
            spec.model,
            spec.version,
            spec.batch_axis,
            spec.inputs,
            spec.outputs,
            warm.free,
            batch.rows_max,
            min(spec.limits.queue_bytes_max, plan.ANSWER_BYTES_MAX),
        )
        heart = Heart(model.run, spec, monotonic_ns(), suspended_ns)
        worker = Worker(
            spec,
            planner,
            control,
            status,
            runners,
            batch.rows_max,
            warm.run_ms,
            batch.tried,
            heart,
        )
        channel.send(
            control,
            channel.Ready(
                load_ms=load_ms,
                warmup_ms=warmup_ms,
                run_ms_p50=warm.run_ms,
                goldens=len(spec.goldens),
                runners=runners,
                batch_rows_max=batch.rows_max,
                batch_reason=batch.reason,
                placement=[msgspec.to_builtins(place) for place in model.placement],
                cpu_fallback=fallen_back,
                golden_deviation=worst,
                sandbox=measures,
            ),
        )
    except EdgeError as error:
        return _fail(control, phase, error)
    except MemoryError:
        return _fail(control, phase, _too_little_memory(spec))
    except Exception as error:  # noqa: BLE001 - a worker says why it ends, whatever it was
        return _fail(control, phase, BackendError(f"{type(error).__name__}: {error}"))
    try:
        return EXIT_FAILED if worker.serve() else 0
    finally:
        if share is not None:
            worker.close()


def _check_placement(spec: WorkerSpec, model: Model) -> str:
    """What runs on the CPU although an accelerator was asked for; "": nothing, or it is allowed.

    Raises:
        PlacementError: the policy refuses it.
    """
    fallback = placement.fallen_back(spec.device_class, spec.options, model.placement)
    if fallback is None:
        return ""
    verdict = placement.action(spec.cpu_fallback, spec.device_class, fallback)
    if verdict == "refuse":
        raise PlacementError(
            fallback.reason,
            where=f"{spec.model}@{spec.version} variant {spec.variant}",
            remedy="see `edge-runtime doctor`; or set cpu_fallback: alarm for this model",
        )
    return fallback.reason if verdict == "alarm" else ""


def _with_facts(spec: WorkerSpec, model: Model, fallen_back: str) -> WorkerSpec:
    """The answer to MODEL_METADATA tells where the model really runs, and what its backend adds."""
    metadata = msgspec.json.decode(spec.metadata)
    facts = {
        **model.facts,
        "device": placement.device(model.placement),
        "cpu_fallback": fallen_back,
    }
    metadata.setdefault("parameters", {}).update({key: fact for key, fact in facts.items() if fact})
    return msgspec.structs.replace(spec, metadata=msgspec.json.encode(metadata))


def _for_state(spec: WorkerSpec, model: Model) -> WorkerSpec:
    """A model that keeps a state answers each request by itself: no batches, no cached answers."""
    if not model.keeps_state:
        return spec
    return msgspec.structs.replace(spec, batch_rows_max=1, cache_bytes_max=0)


def _fail(control: socket.socket, phase: str, error: EdgeError) -> int:
    try:
        channel.send(control, channel.Failed(phase, error.document()))
    except OSError:
        pass  # nobody is left to tell
    return EXIT_FAILED


def _too_little_memory(spec: WorkerSpec) -> BackendError:
    limit = spec.limits.memory_bytes_max
    return BackendError(
        "not enough memory",
        where=f"{spec.model}@{spec.version}",
        expected=f"<= {limit} bytes" if limit else "",
        remedy="raise memory_bytes_max or use a smaller variant",
    )


def belong_to(supervisor_pid: int) -> None:
    """Become the supervisor's child and end with it."""
    deadline_ns = monotonic_ns() + round(ADOPTION_S_MAX * 1e9)
    while os.getppid() != supervisor_pid:  # the intermediate process is about to end
        if monotonic_ns() > deadline_ns:
            raise BackendError(f"not adopted by the supervisor {supervisor_pid}")
        time.sleep(0.0002)
    sandbox.die_with_parent(signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        sys.exit(0)


def _settle(spec: WorkerSpec) -> list[str]:
    """A process of its own."""
    belong_to(spec.supervisor_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the supervisor's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sandbox.set_limits(spec.limits.memory_bytes_max, spec.limits.open_files_max)
    return confine(spec)


def confine(spec: WorkerSpec) -> list[str]:
    """Name, place and bounds of the calling thread and those that it will start."""
    sandbox.set_name(f"edge:{spec.model}")
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    if spec.nice:
        os.nice(spec.nice)
    if not spec.sandbox:
        return ["off by configuration"]
    files = [Path(spec.artifact)]
    files += [Path(one.path) for pair in spec.goldens for one in (*pair.inputs, *pair.outputs)]
    if spec.compiled_dir:
        files.append(Path(spec.compiled_dir))
    return sandbox.apply(files, map(Path, spec.devices))


def _verify(spec: WorkerSpec) -> None:
    """No native loader sees bytes that changed since they were installed."""
    with Path(spec.artifact).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != spec.artifact_sha256:
        raise BundleError(
            f"the artifact changed on disk: its sha256 is {found}",
            where=spec.artifact,
            expected=spec.artifact_sha256,
            remedy="install the bundle again to repair it; check the medium",
        )


class Warm(NamedTuple):
    """What the warm-up tells.

    Attributes:
        run_ms: of a run, the median; `fastest_ms`: at best.
        free: the outputs whose shape cannot be known before a run.
        clock_ns: what runs of this model are to be compared with.
    """

    run_ms: float
    fastest_ms: float
    free: frozenset[str]
    clock_ns: Callable[[], int]


def _warm_up(model: Model, spec: WorkerSpec) -> Warm:
    """Run a few times with recorded (or else zero) inputs."""
    inputs = goldens.inputs_of(spec.goldens[0]) if spec.goldens else goldens.zeros(spec.inputs)
    times_ms = []
    for _ in range(max(spec.warmup_runs, 1)):
        began_ns, computed_ns = monotonic_ns(), time.thread_time_ns()
        outputs = model.run(inputs)
        computed_ms = (time.thread_time_ns() - computed_ns) / 1e6
        times_ms.append((_ms_since(began_ns), computed_ms))
    free = plan.free_outputs(spec.outputs, spec.batch_axis, inputs, outputs)
    fastest_ms, computed_ms = min(times_ms)
    computes = computed_ms >= COMPUTES_SHARE * fastest_ms
    clock_ns = time.thread_time_ns if computes else monotonic_ns
    run_ms = statistics.median(wall_ms for wall_ms, _ in times_ms)
    return Warm(run_ms, fastest_ms, free, clock_ns)


def _runners(spec: WorkerSpec, run_ms: float, concurrent: bool) -> int:
    most = page.RUNNERS_MAX if concurrent else 1
    if spec.runners >= 0:
        return min(spec.runners, most)
    cores = len(os.sched_getaffinity(0))
    threshold_ms = spec.runner_threshold_ms
    if cores == 1:
        threshold_ms = max(threshold_ms, ONE_CORE_THRESHOLD_MS)
    return 0 if run_ms < threshold_ms else min(cores, most)


def _batching(model: Model, spec: WorkerSpec, clock_ns: Callable[[], int]) -> Choice:
    """How many rows a batch may have: as configured, or as measured."""
    if spec.batch_axis != 0 or spec.batch_rows_max in (0, 1):
        return Choice(1, "the model declares no batch axis 0" if spec.batch_axis != 0 else "off")
    recorded = spec.goldens[: batching.REPEATS]
    samples = [goldens.inputs_of(pair) for pair in recorded] or [goldens.zeros(spec.inputs)]
    asked = max(spec.batch_rows_max, 0)
    return batching.measure(model, samples, spec.rtol, spec.atol, clock_ns, asked)


def _ms_since(began_ns: int) -> float:
    return (monotonic_ns() - began_ns) / 1e6
