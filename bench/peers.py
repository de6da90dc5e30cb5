"""The peers: what one call is, for each way to get an answer.

Law of this file: a table from a peer's name to a function that makes its call; a call does one
inference (or one round trip) and is as quick as a careful user would write it. Each peer runs in a
process of its own (`child`), pinned to a core before anything is imported.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench import post

Call = Callable[[], object]
# More than any tensor here: nothing goes by shared memory.
_NEVER = 1 << 40
SPIN_US = 50  # more than a round trip takes when nobody has to be woken


class Order(msgspec.Struct, frozen=True):
    """What a child is to measure.

    Attributes:
        peer: a key of PEERS.
        core: where the child runs; `far_core`: where its counterpart does, if it has one.
        model, input, shape, artifact: what is inferred.
        socket: of the daemon.
        port: of the peer's HTTP server on the loopback; 0: it has none.
        clients: how many at once (`crowd`).
        request_bytes, response_bytes: sizes of whole frames, for the bare ping-pong.
    """

    peer: str
    core: int
    far_core: int
    model: str
    input: str
    shape: tuple[int, ...]
    artifact: str
    socket: str
    request_bytes: int
    response_bytes: int
    port: int = 0
    clients: int = 1


class Peer(NamedTuple):
    """A row of the table."""

    label: str
    make: Callable[[Order], Call]
    threads: bool = False  # of several clients: threads that share what `make` made


def in_process(order: Order) -> Call:
    """`InferenceSession.run`, the call that every tutorial shows."""
    session, feed = _session(order), {order.input: _image(order.shape)}
    return lambda: session.run(None, feed)


def bound(order: Order) -> Call:
    """`run_with_iobinding` on memory bound once: the least that the library takes."""
    session = _session(order)
    binding = session.io_binding()
    array = _image(order.shape)
    binding.bind_cpu_input(order.input, array)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    run = session.run_with_iobinding

    def call(_alive: object = array) -> object:
        return run(binding)

    return call


def ping_pong(order: Order) -> Call:
    """Two processes and a stream socket pair; frames of our sizes, nothing looked at."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork() == 0:
        near.close()
        os.sched_setaffinity(0, {order.far_core})
        _echo(far, order, lambda: None)
    far.close()
    return _ask(near, order)


def _ask(sock: socket.socket, order: Order) -> Call:
    request, inbox = bytes(order.request_bytes), bytearray(order.response_bytes)

    def call() -> None:
        sock.send(request)
        sock.recv_into(inbox)

    return call


def _echo(sock: socket.socket, order: Order, work: Call) -> None:
    """Do `work` and answer, until the other end closes. Never returns."""
    inbox, response = bytearray(order.request_bytes), bytes(order.response_bytes)
    try:
        while sock.recv_into(inbox):
            work()
            sock.send(response)
    finally:
        os._exit(0)


def hop(order: Order) -> Call:
    """As `ping_pong`, with the bound model run between receiving and sending: the least that a
    process of its own costs, however it is written (inputs lie in its memory already)."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork() == 0:
        near.close()
        os.sched_setaffinity(0, {order.far_core})
        _echo(far, order, bound(order))
    far.close()
    return _ask(near, order)


def shared(order: Order) -> Call:
    """The client with a tensor that it keeps in shared memory: nothing is copied."""
    client = _client(order)
    tensor = client.tensor(order.shape, np.float32)
    tensor[...] = _image(order.shape)
    inputs = {order.input: tensor}
    return lambda: client.infer(order.model, inputs)


def ordinary(order: Order) -> Call:
    """The client with an ordinary array: large ones are copied into shared memory once."""
    client, inputs = _client(order), {order.input: _image(order.shape)}
    return lambda: client.infer(order.model, inputs)


def spinning(order: Order) -> Call:
    """The client that looks for its answer before it sleeps; the worker is configured alike."""
    client, inputs = _client(order, spin_us=SPIN_US), {order.input: _image(order.shape)}
    return lambda: client.infer(order.model, inputs)


def inline(order: Order) -> Call:
    """The client with everything inside the frame."""
    client, inputs = (
        _client(order, shared_memory_min_bytes=_NEVER),
        {order.input: _image(order.shape)},
    )
    return lambda: client.infer(order.model, inputs)


def fastapi(order: Order) -> Call:
    """`bench.http_server` over a kept connection; raw bytes in and out."""
    body = _image(order.shape).tobytes()
    return post.call(order.port, "/infer", {}, body)


def triton(order: Order) -> Call:
    """Triton's HTTP with the binary extension, so that no tensor is written as text."""
    body = _image(order.shape).tobytes()
    given = {
        "name": order.input,
        "shape": order.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(body)},
    }
    wanted = {"name": "y", "parameters": {"binary_data": True}}
    header = msgspec.json.encode({"inputs": [given], "outputs": [wanted]})
    sizes = {"Inference-Header-Content-Length": str(len(header))}
    return post.call(order.port, f"/v2/models/{order.model}/infer", sizes, header + body)


PEERS: Mapping[str, Peer] = {
    "in_process": Peer("in process, `InferenceSession.run`", in_process, threads=True),
    "fastapi": Peer("FastAPI, raw bytes", fastapi),
    "triton": Peer("Triton, HTTP", triton),
    "bound": Peer("in process, IOBinding", bound),
    "ping_pong": Peer("bare socket ping-pong", ping_pong),
    "hop": Peer("bare socket before IOBinding", hop),
    "edge": Peer("Edge Runtime", ordinary),
    "edge_spin": Peer(f"Edge Runtime, both ends spin for {SPIN_US} us", spinning),
    "edge_shared": Peer("Edge Runtime, `client.tensor` (no copy)", shared),
    "edge_copy": Peer("Edge Runtime, ordinary array (one copy)", ordinary),
    "edge_inline": Peer("Edge Runtime, inside the frame", inline),
}


def _image(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def _session(order: Order) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as the backend's default
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        order.artifact, sess_options=options, providers=["CPUExecutionProvider"]
    )


def _client(order: Order, **options: Any) -> Any:
    from edge_runtime.client import Client

    return Client(order.socket, **options)
