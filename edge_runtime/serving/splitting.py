"""The serving worker's side of a split: some requests are the candidate's to answer.

Law of this file: a small client of the candidate, on a connection that the supervisor made. It
passes requests on and says what came back; a request stays the serving worker's until an answer is
here, so whatever the candidate does, nothing is lost. It never waits: a candidate that is behind
gets no more requests until it has caught up.
"""

from __future__ import annotations

import itertools
import mmap
import os
import select
import socket
from collections.abc import Callable
from typing import NamedTuple

from edge_runtime.clock import monotonic_ns
from edge_runtime.errors import EdgeError
from edge_runtime.serving import page, routing, trial
from edge_runtime.serving import plan as plans
from edge_runtime.serving.mirror import inline_request, input_bytes
from edge_runtime.serving.plan import Plan, Slot
from edge_runtime.serving.running import Request
from edge_runtime.wire import frames, messages, regions, sockets
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge

# Requests under way at the candidate: half of what its own queue takes by default.
IN_FLIGHT_MAX = 32
# Tensors up to this travel in the frame; a socket buffer of 208 KiB takes some of them at once.
INLINE_BYTES_MAX = 32 * 1024
# Shared memory for larger ones: so many requests at a time, so much memory in all.
REGIONS_MAX = 8
REGION_BYTES_MAX = 64 * 1024 * 1024
HEADERS_MAX = 64
# A request with its answer's frame, the tail of the prefix not filled in; None: it is still to run.
Outcome = tuple[Request, memoryview | None]
_ANSWER = int(Kind.INFER) | frames.RESPONSE


class Shared(NamedTuple):
    """Memory for the inputs of one request, known to the candidate by its number."""

    number: int
    memory: mmap.mmap


class Forwarded(NamedTuple):
    """A request at the candidate."""

    request: Request
    sent_ns: int
    until_ns: int
    shared: Shared | None


class Splitter:
    """Passes `share` of the requests to the candidate.

    Attributes:
        closed: the candidate is gone.
        retiring: nothing more is passed on; it is closed when nothing waits.
        waiting: requests at the candidate, by our number for them.
    """

    def __init__(
        self,
        sock: socket.socket,
        names: tuple[str, str],
        words: memoryview,
        seed: int,
        share: float,
        body_bytes_max: int,
        watch: Callable[[int], None],
    ) -> None:
        """See above.

        Args:
            names: the model and the candidate's version.
            watch: told which epoll events of the socket are of interest.
        """
        sock.setblocking(False)
        self._sock = sock
        self._names = names
        self._words = words
        self._seed = seed
        self._limit = routing.limit_of(share)
        self._watch = watch
        self._reader = FrameReader(body_size_max=body_bytes_max)
        self._numbers = itertools.count(1)
        self.waiting: dict[int, Forwarded] = {}
        self._late: dict[int, Shared | None] = {}  # given up, and not answered yet
        self._headers: dict[tuple[int, int], bytes] = {}
        self._resting: list[Shared] = []
        self._free_numbers = list(range(REGIONS_MAX))
        self._shared_bytes = 0
        self._rest = b""  # of a frame that the socket did not take whole
        self.closed = False
        self.retiring = False

    @property
    def fd(self) -> int:
        """The socket's number."""
        return self._sock.fileno()

    def share(self, share: float) -> None:
        """Another share."""
        self._limit = routing.limit_of(share)

    # -- there -------------------------------------------------------------------------------------

    def takes(self, request: Request, run_ns: float) -> bool:
        """Pass the request on, if it is the candidate's and the candidate can take it now.

        Args:
            run_ns: a usual run of the serving version.
        """
        if request.plan.named or self._mixed(request) >= self._limit:
            return False
        self._words[trial.CHOSEN] += 1
        now_ns = monotonic_ns()
        until_ns = routing.patience_until_ns(now_ns, request.deadline_ns, run_ns)
        if now_ns < until_ns and self._ready():
            number = next(self._numbers)
            sent, shared = self._pass_on(request, number)
            if sent:
                self.waiting[number] = Forwarded(request, now_ns, until_ns, shared)
                return True
        self._words[trial.HELD] += 1
        return False

    def _mixed(self, request: Request) -> int:
        key = request.plan.routing_key
        if key:
            return routing.mix_key(key, self._seed)
        return routing.mix(request.request_id, self._seed)

    def _ready(self) -> bool:
        """Whether the candidate keeps up."""
        return not (self._late or self._rest or self.closed) and len(self.waiting) < IN_FLIGHT_MAX

    def retire(self) -> None:
        """Pass nothing more on; what is at the candidate is waited for."""
        self.retiring = True
        self._limit = 0

    def _pass_on(self, request: Request, number: int) -> tuple[bool, Shared | None]:
        """Send a request, large tensors by shared memory; whether it is on its way, and that."""
        plan, slot = request.plan, request.slot
        assert slot is not None
        size = sum(given.byte_size for given in plan.inputs)
        shared = None
        try:
            if size > INLINE_BYTES_MAX:
                shared = self._memory(size + plans.ALIGNMENT * len(plan.inputs))
                if shared is None:
                    return False, None
                _fill(shared, plan, slot)
            header = self._header(plan, shared)
        except EdgeError:  # no memory for it now, or too many tensors for a header
            self._give_back(shared)
            return False, None
        body = [] if shared else input_bytes(plan, slot)
        size = sum(len(part) for part in body)
        times = request.deadline_ns, request.priority
        prefix = frames.encode_prefix(Kind.INFER, len(header), size, number, *times)
        if self._send([prefix, header, *body]):
            return True, shared
        self._give_back(shared)
        return False, None

    def _send(self, parts: list[bytes | memoryview], fd: int | None = None) -> bool:
        """Send now or not at all; of a frame once begun, the rest follows."""
        data = b"".join(parts)
        try:
            if fd is None:
                sent = self._sock.send(data)
            else:
                sent = sockets.send_with_fds(self._sock, data, [fd])
        except OSError:  # full; or gone, which the loop will hear
            return False
        if sent < len(data):
            self._rest = data[sent:]
            self._watch(select.EPOLLIN | select.EPOLLOUT)
        return True

    def flush(self) -> None:
        """The socket takes more."""
        try:
            self._rest = self._rest[self._sock.send(self._rest) :]
        except BlockingIOError:
            return
        except OSError:
            self._rest = b""
        if not self._rest:
            self._watch(select.EPOLLIN)

    def _header(self, plan: Plan, shared: Shared | None) -> bytes:
        key = (plan.serial, shared.number if shared else -1)
        header = self._headers.get(key)
        if header is None:
            if len(self._headers) >= HEADERS_MAX:
                self._headers.pop(next(iter(self._headers)))
            header = messages.encode_header(_describe(plan, self._names[1], shared))
            self._headers[key] = header
        return header

    def _memory(self, size: int) -> Shared | None:
        """Shared memory of at least `size` bytes that the candidate knows; None: none is free."""
        fitting = [one for one in self._resting if len(one.memory) >= size]
        if fitting:
            shared = min(fitting, key=lambda one: len(one.memory))
            self._resting.remove(shared)
            return shared
        if not self._free_numbers and self._resting:  # too small: a larger one in its place
            small = self._resting.pop()
            self._shared_bytes -= len(small.memory)
            self._free_numbers.append(small.number)
        return self._new_memory(1 << (size - 1).bit_length()) if self._free_numbers else None

    def _new_memory(self, size: int) -> Shared | None:
        if self._shared_bytes + size > REGION_BYTES_MAX:
            return None
        fd = regions.create_region(size, "edge-split")
        try:
            number = self._free_numbers[-1]
            add = messages.RegionAdd(self._names[0], number, size, self._names[1])
            header = messages.encode_header(add)
            frame = messages.encode_frame(Kind.REGION_ADD, header)
            if not self._send([frame], fd) or self._rest:
                return None
            memory = regions.map_region(fd, size)
        finally:
            os.close(fd)
        self._free_numbers.pop()
        self._shared_bytes += size
        return Shared(number, memory)

    def _give_back(self, shared: Shared | None) -> None:
        if shared is not None:
            self._resting.append(shared)

    # -- and back ----------------------------------------------------------------------------------

    def readable(self) -> list[Outcome]:
        """What the candidate has answered, or could not."""
        found: list[Outcome] = []
        try:
            while True:
                size = self._sock.recv_into(self._reader.get_buffer())
                if not size:
                    return found + self.give_up()
                self._reader.advance(size)
                while (frame := self._reader.next_frame()) is not None:
                    found += self._answered(frame)
        except BlockingIOError:
            return found
        except (OSError, EdgeError):  # gone, or not of its senses
            return found + self.give_up()

    def _answered(self, frame: Frame | TooLarge) -> list[Outcome]:
        number = frame.prefix.request_id
        if number in self._late:
            self._give_back(self._late.pop(number))
            return []
        forwarded = self.waiting.pop(number, None)
        if forwarded is None:
            return []
        self._give_back(forwarded.shared)
        answer = None
        if isinstance(frame, Frame) and frame.prefix.kind == _ANSWER:
            answer = _answer(forwarded.request.plan, self._names, frame)
        if answer is None:
            self._words[trial.REFUSED] += 1
        else:
            self._words[trial.ANSWERED] += 1
            page.observe(self._words, trial.ROUND_TRIP, monotonic_ns() - forwarded.sent_ns)
        return [(forwarded.request, answer)]

    def late(self, now_ns: int) -> list[Request]:
        """The requests that the candidate had long enough."""
        numbers = [number for number, one in self.waiting.items() if one.until_ns <= now_ns]
        found = []
        for number in numbers:
            forwarded = self.waiting.pop(number)
            self._late[number] = forwarded.shared
            self._words[trial.TOO_SLOW] += 1
            found.append(forwarded.request)
        return found

    def wait_s(self, now_ns: int) -> float:
        """How long until one of them is late."""
        first_ns = min(one.until_ns for one in self.waiting.values())
        return max(first_ns - now_ns, 0) / 1e9

    def give_up(self) -> list[Outcome]:
        """What the candidate has not answered is to be run here; it gets no more."""
        self.closed = True
        lost: list[Outcome] = [(one.request, None) for one in self.waiting.values()]
        self._words[trial.LOST] += len(lost)
        self.waiting.clear()
        return lost

    def close(self) -> None:
        """Give everything back; nothing is waiting any more."""
        assert not self.waiting
        self.closed = True
        self._sock.close()


def _describe(plan: Plan, version: str, shared: Shared | None) -> messages.InferRequest:
    request = inline_request(plan, version)
    if shared is None:
        return request
    inputs = tuple(
        messages.TensorHeader(
            given.spec.name,
            given.spec.datatype,
            given.shape,
            messages.TensorParameters(
                shared_memory_region=shared.number,
                shared_memory_offset=offset,
                shared_memory_byte_size=given.byte_size,
            ),
        )
        for given, offset in zip(plan.inputs, _offsets(plan), strict=True)
    )
    return messages.InferRequest(plan.names[0], inputs, version, request.outputs)


def _offsets(plan: Plan) -> list[int]:
    """Where the inputs lie in shared memory: one after the other, aligned."""
    sizes = [-(-given.byte_size // plans.ALIGNMENT) * plans.ALIGNMENT for given in plan.inputs]
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


def _fill(shared: Shared, plan: Plan, slot: Slot) -> None:
    for part, offset in zip(input_bytes(plan, slot), _offsets(plan), strict=True):
        shared.memory[offset : offset + len(part)] = part


def _answer(plan: Plan, names: tuple[str, str], frame: Frame) -> memoryview | None:
    """The answer as this plan's client wants it; None: it is not one to this request."""
    try:
        outputs = messages.decode_infer_response(frame.header).outputs
        if [one.name for one in outputs] != [output.spec.name for output in plan.outputs]:
            return None
        if any(one.parameters.shared_memory_region is not None for one in outputs):
            return None
        if messages.body_size_of(outputs) != len(frame.body):
            return None
        if all(output.region is None for output in plan.outputs):
            return _frame(frame.header, [frame.body])
        return _placed(plan, names, outputs, frame.body)
    except EdgeError:
        return None


def _placed(
    plan: Plan,
    names: tuple[str, str],
    outputs: tuple[messages.TensorHeader, ...],
    body: memoryview,
) -> memoryview | None:
    """The answer with outputs in the client's regions."""
    sizes = [one.parameters.binary_data_size or 0 for one in outputs]
    if any(
        output.region is not None and size > output.byte_size
        for output, size in zip(plan.outputs, sizes, strict=True)
    ):
        return None
    offset, inline = 0, []
    for output, size in zip(plan.outputs, sizes, strict=True):
        data = body[offset : offset + size]
        offset += size
        if output.region is None:
            inline.append(data)
        else:
            output.region.memory[output.offset : output.offset + size] = data
    header = plans.response_header(
        plan,
        {one.name: one.shape for one in outputs},
        {one.name: size for one, size in zip(outputs, sizes, strict=True)},
        names,
    )
    return _frame(header, inline)


def _frame(header: bytes, body: list[memoryview]) -> memoryview:
    size = sum(len(part) for part in body)
    prefix = frames.encode_prefix(_ANSWER, len(header), size)
    return memoryview(bytearray(b"".join([prefix, header, *body])))
