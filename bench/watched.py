"""Clients that notice everything: `python -m bench.watched ORDER`, told over its standard streams.

Law of this file: every request carries numbers of its own and must be answered exactly once, by one
of the versions that exist, with what that version computes from these numbers. Nothing is retried.
It speaks frames itself (docs/protocol.md), because a client library hides what is counted here. One
thread, all connections at once.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from bench import models
from bench.models import FACTORS, Array
from edge_runtime.errors import EdgeError
from edge_runtime.wire import frames, messages, regions, sockets
from edge_runtime.wire.frames import RESPONSE, Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge

INPUTS = 16  # numbers of a request that its answer is made of; the others of a large one are 0
CONNECT_TIMEOUT_S = 10.0
DRAIN_S = 5.0  # after the end, for the answers that are on their way
DEADLINE_S = 60.0  # of each request: a stall is seen as time and not as a refusal
TURN_S = 0.2
TOLERANCE = 1e-4


class Watch(msgspec.Struct, frozen=True):
    """What to do: `depths` has the requests in flight of each connection.

    Attributes:
        large: the tensor lies in shared memory and is written anew for each request; depth 1.
    """

    peer: str
    socket: str
    model: str
    depths: tuple[int, ...]
    large: bool


class Counts(msgspec.Struct):
    """What came of all requests since the last report; `answered` ones are right."""

    sent: int = 0
    answered: int = 0
    lost: int = 0  # no answer, or the connection ended
    refused: dict[str, int] = {}  # by error code
    doubled: int = 0  # an answer that nobody waits for
    wrong: int = 0  # by neither version, or not what the named version computes
    by_version: dict[str, int] = {}
    p50_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0


def answers(model: str) -> Mapping[str, Any]:
    """Version as text -> what it computes from the first numbers of a request."""
    if model.startswith("large"):
        return {str(version): lambda x, f=factor: x * f for version, factor in FACTORS.items()}
    weights = {version: models.tiny_weights(version) for version in FACTORS}
    return {str(version): lambda x, w=weight: x @ w for version, weight in weights.items()}


class _Connection:
    """One connection with its requests in flight: id -> (numbers, when sent)."""

    def __init__(self, watch: Watch, depth: int, serial: int) -> None:
        self._rng = np.random.default_rng(serial)
        self.depth = depth
        self.reader = FrameReader()
        self.flights: dict[int, tuple[Array, int]] = {}
        self.socket: socket.socket = sockets.connect_unix(watch.socket, CONNECT_TIMEOUT_S)
        self._next_id = 1
        self._memory = self._region(watch.model) if watch.large else None
        elements = models.LARGE_ELEMENTS if watch.large else INPUTS
        place = (
            messages.TensorParameters(None, 0, 0, elements * 4)
            if watch.large
            else messages.TensorParameters(binary_data_size=elements * 4)
        )
        tensor = messages.TensorHeader("x", "FP32", (1, elements), place)
        self._header = messages.encode_header(messages.InferRequest(watch.model, (tensor,)))

    def _region(self, model: str) -> Array:
        size_bytes = models.LARGE_ELEMENTS * 4
        fd = regions.create_region(size_bytes, "bench")
        memory = regions.map_region(fd, size_bytes)
        header = messages.encode_header(messages.RegionAdd(model, 0, size_bytes))
        frame = messages.encode_frame(Kind.REGION_ADD, header, request_id=self._next_id)
        sockets.send_all_with_fds(self.socket, frame, [fd])
        os.close(fd)
        self._next_id += 1
        while (answer := self.reader.next_frame()) is None:
            self.receive()
        if isinstance(answer, TooLarge) or answer.prefix.kind != Kind.REGION_ADD | RESPONSE:
            raise RuntimeError(f"the region is refused: {answer}")
        return np.frombuffer(memory, np.float32)

    def receive(self) -> bool:
        """Take what is there; False: the connection has ended."""
        size = self.socket.recv_into(self.reader.get_buffer())
        self.reader.advance(size)
        return size > 0

    def send(self) -> None:
        """One request more."""
        numbers = self._rng.random(INPUTS, np.float32)
        body = b""
        if self._memory is None:
            body = numbers.tobytes()
        else:
            self._memory[:INPUTS] = numbers
        now_ns = time.monotonic_ns()
        prefix = frames.encode_prefix(
            Kind.INFER,
            len(self._header),
            len(body),
            self._next_id,
            now_ns + round(DEADLINE_S * 1e9),
        )
        self.flights[self._next_id] = (numbers, now_ns)
        self._next_id += 1
        self.socket.sendall(prefix + self._header + body)


class _Crowd:
    def __init__(self, watch: Watch) -> None:
        self._answers = answers(watch.model)
        self._versions: dict[bytes, str] = {}
        self._poll = select.poll()
        self._connections: dict[int, _Connection] = {}
        self.begin_counting()
        for serial, depth in enumerate(watch.depths):
            one = _Connection(watch, depth, serial)
            self._connections[one.socket.fileno()] = one
            self._poll.register(one.socket, select.POLLIN)

    def begin_counting(self) -> None:
        self.counts = Counts()
        self._times_ns = array("q")

    def report(self) -> Counts:
        """The counts, with how long answers took."""
        if self._times_ns:
            times_us = np.frombuffer(self._times_ns, np.int64) / 1e3
            quantiles = np.quantile(times_us, (0.5, 0.99, 1.0)).tolist()
            self.counts.p50_us, self.counts.p99_us, self.counts.max_us = quantiles
        return self.counts

    def begin(self) -> None:
        """The first requests of all connections."""
        self.begin_counting()
        for one in self._connections.values():
            for _ in range(one.depth):
                self._send(one)

    def turn(self, going: bool) -> None:
        """Take the answers that are there; while `going`, each makes room for a request."""
        for fd, _ in self._poll.poll(TURN_S * 1e3):
            one = self._connections.get(fd)
            if one is None:
                continue
            try:
                alive = one.receive()
                for frame in _frames(one.reader):
                    self._take(one, frame)
                    if going:
                        self._send(one)
            except OSError:
                alive = False
            if not alive:
                self._ended(one)

    @property
    def in_flight(self) -> int:
        return sum(len(one.flights) for one in self._connections.values())

    def give_up(self) -> None:
        """What is still in flight is lost."""
        for one in self._connections.values():
            self.counts.lost += len(one.flights)
            one.flights.clear()

    def _send(self, one: _Connection) -> None:
        self.counts.sent += 1
        one.send()

    def _ended(self, one: _Connection) -> None:
        self.counts.lost += len(one.flights)
        self._poll.unregister(one.socket)
        del self._connections[one.socket.fileno()]
        one.socket.close()

    def _take(self, one: _Connection, frame: Frame | TooLarge) -> None:
        flight = one.flights.pop(frame.prefix.request_id, None)
        if flight is None:
            self.counts.doubled += 1
        elif isinstance(frame, TooLarge):
            self.counts.wrong += 1
        elif frame.prefix.kind == Kind.ERROR:
            code = _code(frame)
            self.counts.refused[code] = self.counts.refused.get(code, 0) + 1
        else:
            numbers, sent_ns = flight
            self._times_ns.append(time.monotonic_ns() - sent_ns)
            self._judge(numbers, frame)

    def _judge(self, numbers: Array, frame: Frame) -> None:
        version = self._versions.get(frame.header)
        if version is None:
            version = messages.decode_infer_response(frame.header).model_version
            self._versions[frame.header] = version
        compute = self._answers.get(version)
        given = np.frombuffer(frame.body, np.float32)
        if compute is None or not _equal(given, compute(numbers)):
            self.counts.wrong += 1
            return
        self.counts.answered += 1
        self.counts.by_version[version] = self.counts.by_version.get(version, 0) + 1


def _equal(given: Array, wanted: Array) -> bool:
    return len(given) == len(wanted) and bool(np.abs(given - wanted).max() < TOLERANCE)


def _frames(reader: FrameReader) -> Iterator[Frame | TooLarge]:
    while (frame := reader.next_frame()) is not None:
        yield frame


def _code(frame: Frame) -> str:
    error: EdgeError = messages.decode_error(frame.header)
    return error.code


def main(order_json: str) -> None:
    """For each line on stdin: call until the next line, then report."""
    watch = msgspec.json.decode(order_json, type=Watch)
    crowd = _Crowd(watch)
    stop = select.poll()
    stop.register(sys.stdin, select.POLLIN)
    print("ready", flush=True)
    while sys.stdin.readline():
        crowd.begin()
        while not stop.poll(0):
            crowd.turn(going=True)
        sys.stdin.readline()
        deadline_s = time.monotonic() + DRAIN_S
        while crowd.in_flight and time.monotonic() < deadline_s:
            crowd.turn(going=False)
        crowd.give_up()
        print(msgspec.json.encode(crowd.report()).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
