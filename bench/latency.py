"""Round trips: the peers of a case in interleaved rounds, on one core or on two.

Law of this file: which peers are compared on which cores, and which figures follow, is the table
CASES; `measure` does any row of it. In a round each peer does a few calls, one peer after the other
in an order that changes; a round's value for a peer is the p50 of its calls.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from bench import proc, servers
from bench.child import Child
from bench.daemon import Daemon
from bench.models import MODELS
from bench.peers import PEERS, SPIN_US, Order
from bench.scenario import Latency, Result, Setting
from bench.summary import Figure, Target, per_round, quantile, spread
from edge_runtime.client.sync import SHARED_MEMORY_MIN_BYTES
from edge_runtime.wire import frames, messages

# Calls at the start of a round that are not counted: the others have used the caches meanwhile.
SETTLE_CALLS = 5

Formula = Callable[[Mapping[str, float]], float]


class Ratio(NamedTuple):
    """A figure of a case: a formula over the p50s of one round.

    `needs`: a peer that is not installed everywhere; the figure is left out without it.
    """

    name: str
    formula: Formula
    unit: str = "x"
    target: Target | None = None
    needs: str = ""


class Case(NamedTuple):
    """What is compared.

    Attributes:
        same_core: client and worker on one core, or on one each.
        rounds, calls: how often; together a few seconds for each peer.
        spinning: a model of the same shape, both ends of which spin (peer edge_spin); "": none.
    """

    model: str
    same_core: bool
    peers: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    rounds: int
    calls: int
    spinning: str = ""


def _added(us: Mapping[str, float]) -> float:
    return us["edge"] - us["in_process"]


def _added_in_ping_pongs(us: Mapping[str, float]) -> float:
    return _added(us) / us["ping_pong"]


def _times_our_overhead(peer: str) -> Formula:
    return lambda us: (us[peer] - us["in_process"]) / _added(us)


def _over(peer: str, base: str) -> Formula:
    return lambda us: us[peer] / us[base]


TINY_PEERS = ("in_process", "bound", "ping_pong", "edge")
SERVER_PEERS = ("fastapi", "triton")
IMAGE_PEERS = ("in_process", "bound", "hop", "edge_shared", "edge_copy", "edge_inline")
_ADDED = Ratio("added to the in-process call", _added, "us")
_FASTAPI = Ratio("FastAPI adds, times what we add", _times_our_overhead("fastapi"), needs="fastapi")
_IMAGE_RATIOS = (
    Ratio("copied once / in process", _over("edge_copy", "in_process")),
    Ratio("inside the frame / in process", _over("edge_inline", "in_process")),
    Ratio("bare socket before IOBinding / in process", _over("hop", "in_process")),
    Ratio("by shared memory / bare socket before IOBinding", _over("edge_shared", "hop")),
    Ratio("added by shared memory", lambda us: us["edge_shared"] - us["in_process"], "us"),
)
_BY_SHARED_MEMORY = Ratio(
    "by shared memory / in process", _over("edge_shared", "in_process"), "x", Target(1.05)
)

CASES: Mapping[str, Case] = {
    "tiny-one-core": Case(
        "tiny",
        True,
        (*TINY_PEERS, *SERVER_PEERS),
        (
            Ratio("(p50 - in process) / ping-pong", _added_in_ping_pongs, "x", Target(3.0)),
            Ratio("p50 / ping-pong", _over("edge", "ping_pong")),
            _ADDED,
            _FASTAPI,
            Ratio(
                "Triton's HTTP adds, times what we add",
                _times_our_overhead("triton"),
                "x",
                Target(20, at_most=False),
                "triton",
            ),
        ),
        rounds=40,
        calls=200,
    ),
    "tiny-two-cores": Case(
        "tiny",
        False,
        (*TINY_PEERS, "edge_spin"),
        (
            Ratio("(p50 - in process) / ping-pong", _added_in_ping_pongs, "x", Target(1.2)),
            Ratio(
                "both ends spin: (p50 - in process) / ping-pong",
                lambda us: (us["edge_spin"] - us["in_process"]) / us["ping_pong"],
                "x",
                Target(0.5),
            ),
            Ratio("p50 / ping-pong", _over("edge", "ping_pong")),
            _ADDED,
        ),
        rounds=40,
        calls=150,
        spinning="tiny2",
    ),
    "image-one-core": Case(
        "camera", True, IMAGE_PEERS, (_BY_SHARED_MEMORY, *_IMAGE_RATIOS), rounds=40, calls=15
    ),
    "image-two-cores": Case(
        "camera", False, IMAGE_PEERS, (_BY_SHARED_MEMORY, *_IMAGE_RATIOS), rounds=40, calls=15
    ),
    "lite0-one-core": Case(
        "lite0", True, IMAGE_PEERS, (_BY_SHARED_MEMORY, *_IMAGE_RATIOS), rounds=25, calls=12
    ),
    "lite0-two-cores": Case(
        "lite0", False, IMAGE_PEERS, (_BY_SHARED_MEMORY, *_IMAGE_RATIOS), rounds=25, calls=12
    ),
}


def measure(case: Case, setting: Setting) -> Result:
    """All rounds of a case. Raises BenchError."""
    near, far = _cores(case)
    model, bundle = setting.bundles[case.model]
    config = f"models:\n  {case.model}:\n    cpuset: '{far}'\n"
    if case.spinning:
        config += f"  {case.spinning}:\n    cpuset: '{far}'\n    spin_us: {SPIN_US}\n"
    rounds, calls = (3, 10) if setting.quick else (case.rounds, case.calls)
    with Daemon(setting.directory, config) as daemon, ExitStack() as stack:
        daemon.install(bundle)
        if case.spinning:
            daemon.install(setting.bundles[case.spinning][1])
        running = servers.Servers(stack, setting.directory)
        children = {}
        for peer in case.peers:
            name = case.spinning if peer == "edge_spin" else case.model
            asked = order(peer, name, str(model), str(daemon.infer_socket), near, far)
            complete = running.complete(asked, far)
            if complete is not None:
                children[peer] = stack.enter_context(Child(complete))
                children[peer].wait_until_ready()
        result = _result(case, _rounds(children, rounds, calls))
        return dataclasses.replace(result, remark=running.remark)


def _cores(case: Case) -> tuple[int, int]:
    """Where the client runs, and where the worker and the in-process peers do."""
    cores = proc.cores()
    return (cores[0], cores[0]) if case.same_core else (cores[-1], cores[0])


def order(peer: str, model: str, artifact: str, path: str, near: int, far: int) -> Order:
    """What a peer's child is told; the daemon's socket is at `path`."""
    spec = MODELS[model]
    request, response = frame_sizes(model)
    core = far if peer in ("in_process", "bound") else near  # the model always runs on `far`
    return Order(peer, core, far, model, spec.input, spec.shape, artifact, path, request, response)


def frame_sizes(model: str) -> tuple[int, int]:
    """Bytes of a request and of a response of the model. Large inputs are elsewhere, outputs in
    the frame."""
    spec = MODELS[model]
    tensor = _tensor(spec.input, spec.shape)
    request = messages.encode_header(messages.InferRequest(model, (tensor,)))
    tensor = _tensor(spec.output, spec.output_shape)
    response = messages.encode_header(messages.InferResponse(model, "1", (tensor,)))
    inline = _bytes(spec.shape)
    return (
        frames.PREFIX_SIZE + len(request) + (inline if inline < SHARED_MEMORY_MIN_BYTES else 0),
        frames.PREFIX_SIZE + len(response) + _bytes(spec.output_shape),
    )


def _tensor(name: str, shape: tuple[int, ...]) -> messages.TensorHeader:
    parameters = messages.TensorParameters(binary_data_size=_bytes(shape))
    return messages.TensorHeader(name, "FP32", shape, parameters)


def _bytes(shape: tuple[int, ...]) -> int:
    size = 4
    for dimension in shape:
        size *= dimension
    return size


def _rounds(children: Mapping[str, Child], rounds: int, calls: int) -> dict[str, list[list[int]]]:
    """Nanoseconds: peer -> round -> call."""
    rng = random.Random(0)
    times: dict[str, list[list[int]]] = {peer: [] for peer in children}
    order = list(children)
    for _ in range(rounds):
        rng.shuffle(order)  # nobody always follows the same neighbour
        for peer in order:
            times[peer].append(children[peer].measure(SETTLE_CALLS + calls)[SETTLE_CALLS:])
    return times


def _result(case: Case, times: Mapping[str, list[list[int]]]) -> Result:
    p50_us = {peer: [quantile(one, 0.5) / 1e3 for one in rounds] for peer, rounds in times.items()}
    figures = [
        Figure(ratio.name, per_round(p50_us, ratio.formula), ratio.unit, ratio.target)
        for ratio in case.ratios
        if ratio.needs in p50_us or not ratio.needs
    ]
    latencies = [_latency(peer, p50_us[peer], rounds) for peer, rounds in times.items()]
    return Result(figures, latencies, p50_us)


def _latency(peer: str, p50_us: list[float], rounds: list[list[int]]) -> Latency:
    every_us = [ns / 1e3 for one in rounds for ns in one]
    return Latency(
        peer,
        PEERS[peer].label,
        spread(p50_us),
        quantile(every_us, 0.95),
        quantile(every_us, 0.99),
    )
