"""One blocking connection to one model: send a request, wait for its answer.

Law of this file: the only place of the blocking client that touches a socket. It never retries and
never reconnects; one thread uses it at a time (the `Client`'s lock sees to it). `busy` after an
exception means that an answer may still be on its way: the connection must then be closed.

The hot path is `infer` with a prepared message. The frame of each kind of request (names, types,
shapes, places in shared memory) is built once, with a numpy view of each tensor's place: in the
frame, or, for a large one, in shared memory. A call then writes the tensors and sixteen bytes of
prefix, sends once and receives once; an array of `Client.tensor` lies in its place already.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.client import codec
from edge_runtime.client.codec import InferResult
from edge_runtime.client.memory import Arena, Pool
from edge_runtime.errors import (
    ConnectionClosedError,
    DeadlineError,
    MalformedError,
    OverloadedError,
    RequestError,
    TooLargeError,
)
from edge_runtime.wire import frames, messages, sockets
from edge_runtime.wire.frames import PREFIX, PREFIX_SIZE, RESPONSE, Kind
from edge_runtime.wire.reader import Frame, FrameReader, TooLarge
from edge_runtime.wire.regions import REGION_SIZE_MAX

if TYPE_CHECKING:
    from edge_runtime.tensors import Array

# Kinds of request (names, datatypes, shapes, places) remembered per connection; who varies
# more than that pays some 10 us a call for a new header.
PLANS_MAX = 64
# Bytes of tensors that their messages have room for, together. Sixteen of 2 MB; where copying takes
# milliseconds, a header that is there already gains nothing. Hit: all are forgotten, and a request
# that is larger by itself is never prepared.
PREPARED_BYTES_MAX = 32 * 1024 * 1024
INBOX_SIZE = 64 * 1024  # answers up to this size arrive in one receive

_ID_AND_TIME = struct.Struct("<QQ")  # at 16 in the prefix
_INFERRED = Kind.INFER | RESPONSE

# Version, names of the outputs wanted, routing key; then name, shape, dtype (and place) of inputs.
Key = tuple[Any, ...]


class _Message(NamedTuple):
    """A whole INFER frame, and a view of the place of each input that must be written into it (or
    beside it, into shared memory) before it is sent."""

    data: bytearray
    views: tuple[tuple[str, Array], ...]


class _Answer(NamedTuple):
    """A response header, and numpy views over the inbox where its tensors arrive."""

    model_version: str
    body_size: int
    views: tuple[tuple[str, Array], ...]


class Flight(NamedTuple):
    """A request that was sent and not yet answered."""

    request_id: int
    key: Key
    draft: codec.Draft


class Connection:
    """See the module. `own` holds the client's `tensor()` arrays."""

    def __init__(
        self,
        path: str,
        model: str,
        *,
        timeout_s: float,
        now_ns: Callable[[], int],
        own: Pool,
        shared_min_bytes: int,
        spin_us: float = 0.0,
    ) -> None:
        self._where = path
        self._model = model
        self._now_ns = now_ns
        self._own = own
        self._scratch: Pool | None = Pool()
        self._shared_min_bytes = shared_min_bytes
        self._numbers: dict[Arena, int] = {}
        self._next_id = 0
        self._messages: dict[Key, _Message] = {}
        self._prepared_bytes = 0
        self._answers: dict[bytes, _Answer] = {}
        self._rooms: dict[Key, dict[str, int]] = {}
        self._understood: dict[bytes, codec.ResponsePlan] = {}
        self._inbox = bytearray(INBOX_SIZE)
        self._inbox_view = memoryview(self._inbox)
        self._reader = FrameReader(body_size_max=REGION_SIZE_MAX)
        self._open: set[int] = set()  # submitted, answer not yet taken
        self._arrived: dict[int, Frame | TooLarge] = {}  # answers that came before their turn
        self._timeout_s = timeout_s
        self.busy = False
        self._socket = sockets.connect_unix(path, timeout_s)
        self._spin_ns = round(spin_us * 1e3)
        self._looks = select.poll()
        self._looks.register(self._socket, select.POLLIN)

    def close(self) -> None:
        """Close; requests in flight are abandoned and the server may drop them."""
        self._socket.close()

    # The hot path

    def infer(
        self,
        deadline_ns: int,
        timeout_s: float,
        inputs: Mapping[str, Array],
        outputs: tuple[str, ...],
        version: str,
        routing_key: str,
        priority: int,
        copy: bool,
    ) -> InferResult:
        """One request, one answer.

        Raises:
            EdgeError: what the server answered.
            ConnectionClosedError, DeadlineError, MalformedError: and `busy` stays true.
        """
        key: Key = (version, outputs, routing_key)
        for name, array in inputs.items():  # quicker than a comprehension for a few inputs
            key += (name, array.shape, array.dtype)
        message = self._messages.get(key)
        if message is None:
            places = self._places(key, inputs)
            message = self._messages.get(places) or self._prepare(key, places, inputs)
            if message is None:
                return self._infer_large(deadline_ns, key, inputs, priority, copy)
        data, views = message
        self._next_id = request_id = self._next_id + 1
        data[6] = priority
        _ID_AND_TIME.pack_into(data, 16, request_id, deadline_ns)
        for name, view in views:
            view[...] = inputs[name]
        if timeout_s != self._timeout_s:
            self._set_timeout(timeout_s)
        self.busy = True
        try:
            sent = self._socket.send(data)
            if sent != len(data):  # a signal came
                self._open.add(request_id)  # a refusal may come before all is sent
                self._send([memoryview(data)[sent:]], deadline_ns)
                return self.finish(Flight(request_id, key, _NOTHING), deadline_ns, copy)
            if self._spin_ns:
                self._spin(deadline_ns)
            size = self._socket.recv_into(self._inbox)
        except OSError as e:
            raise self._lost(e) from e
        if size >= PREFIX_SIZE:
            magic, _, kind, _, _, header_size, body_size, answered_id, time_ns = PREFIX.unpack_from(
                self._inbox
            )
            header_end = PREFIX_SIZE + header_size
            if (
                answered_id == request_id
                and kind == _INFERRED
                and size == header_end + body_size
                and magic == frames.MAGIC
            ):
                answer = self._answers.get(self._inbox_view[PREFIX_SIZE:header_end].tobytes())
                if answer is not None and answer.body_size == body_size:
                    self.busy = False
                    arrays = {}
                    for name, view in answer.views:
                        arrays[name] = view.copy()
                    return InferResult(arrays, answer.model_version, time_ns)
        self._reader.feed(self._inbox_view[: self._alive(size)])
        return self.finish(Flight(request_id, key, _NOTHING), deadline_ns, copy)

    def _spin(self, deadline_ns: int) -> None:
        """Look for the answer for a while without sleeping."""
        now_ns, look = self._now_ns, self._looks.poll
        until_ns = min(now_ns() + self._spin_ns, deadline_ns)
        while not look(0) and now_ns() < until_ns:
            pass

    def _places(self, key: Key, inputs: Mapping[str, Array]) -> Key:
        """The key, and where each large input lies already: None, if nowhere in shared memory."""
        for array in inputs.values():
            if array.nbytes >= self._shared_min_bytes:
                key += (self._own.locate(array),)
        return key

    def _prepare(self, key: Key, places: Key, inputs: Mapping[str, Array]) -> _Message | None:
        """A message with the tensors written; it is remembered with the views to write others.

        None: a request that goes the long way, because it has text, outputs that want room in
        shared memory, or too many bytes to copy, or because a region must be made first.
        """
        size = self._copied_bytes(inputs)
        if (
            _unrouted(key) in self._rooms
            or (self._scratch is None and places != key)
            or size > PREPARED_BYTES_MAX
            or any(array.dtype.kind in "SUO" for array in inputs.values())
        ):
            return None
        if len(self._messages) >= PLANS_MAX or self._prepared_bytes + size > PREPARED_BYTES_MAX:
            self._forget_messages()
        draft = self._draft(key, inputs)
        if len(draft.keep) != len(places) - len(key):  # shared memory is used up
            return None
        if any(arena not in self._numbers for arena in draft.arenas()):
            return None
        header = draft.encode(self._model, key[0], self._numbers, key[2])
        body = b"".join(draft.body())
        prefix = frames.encode_prefix(Kind.INFER, len(header), len(body))
        data = bytearray(prefix + header + body)
        self._messages[places] = _Message(data, _views(draft, inputs, data, len(body)))
        self._prepared_bytes += size
        return _Message(data, ())

    def _copied_bytes(self, inputs: Mapping[str, Array]) -> int:
        """Bytes of those inputs that must be copied for being sent."""
        return sum(
            array.nbytes
            for array in inputs.values()
            if array.nbytes < self._shared_min_bytes or self._own.locate(array) is None
        )

    def _forget_messages(self) -> None:
        self._messages.clear()
        self._prepared_bytes = 0

    # Everything else

    def request(self, deadline_ns: int, timeout_s: float, kind: Kind, header: bytes) -> Frame:
        """Any request that is a header only, and the frame that answers it. Raises as infer."""
        self._set_timeout(timeout_s)
        request_id = self._start(kind, header, [], deadline_ns, 0)
        return self._wait(request_id, deadline_ns)

    def _infer_large(
        self, deadline_ns: int, key: Key, inputs: Mapping[str, Array], priority: int, copy: bool
    ) -> InferResult:
        flight = self.submit(deadline_ns, key, inputs, priority)
        try:
            return self.finish(flight, deadline_ns, copy)
        except TooLargeError:
            if not flight.draft.rooms:
                raise
            # An output outgrew the place that the last answer suggested: let it travel.
            self._rooms[_unrouted(key)] = {}
            flight = self.submit(deadline_ns, key, inputs, priority)
            return self.finish(flight, deadline_ns, copy)

    def submit(
        self, deadline_ns: int, key: Key, inputs: Mapping[str, Array], priority: int
    ) -> Flight:
        """Send a request and do not wait for its answer. Raises as infer."""
        self._set_timeout((deadline_ns - self._now_ns()) / 1e9)
        draft = self._draft(key, inputs)
        if not all(self._announce(arena, deadline_ns) for arena in draft.arenas()):
            self._scratch = None  # the server takes no regions: everything travels in frames
            draft = self._draft(key, inputs)
        header = draft.encode(self._model, key[0], self._numbers, key[2])
        request_id = self._start(Kind.INFER, header, draft.body(), deadline_ns, priority)
        return Flight(request_id, key, draft)

    def _draft(self, key: Key, inputs: Mapping[str, Array]) -> codec.Draft:
        return codec.draft(
            inputs,
            key[1],
            own=self._own,
            scratch=self._scratch,
            room_sizes=self._rooms.get(_unrouted(key), {}),
            shared_min_bytes=self._shared_min_bytes,
        )

    def _announce(self, arena: Arena, deadline_ns: int) -> bool:
        """Make a region of an arena, once; False when the server refuses it."""
        if arena in self._numbers:
            return True
        number = len(self._numbers)
        header = messages.encode_header(messages.RegionAdd(self._model, number, arena.size_bytes))
        self._next_id += 1
        frame = messages.encode_frame(Kind.REGION_ADD, header, request_id=self._next_id)
        self.busy = True
        try:
            sockets.send_all_with_fds(self._socket, frame, [arena.fd])
        except OSError as e:
            raise self._lost(e) from e
        try:
            self._wait(self._next_id, deadline_ns)
        except MalformedError:
            raise
        except (RequestError, OverloadedError):  # not allowed, or this user has too many
            return False
        self._numbers[arena] = number
        return True

    def finish(self, flight: Flight, deadline_ns: int, copy: bool) -> InferResult:
        """Wait for the answer to one flight, in whatever order answers come. Raises as infer."""
        frame = self._wait(flight.request_id, deadline_ns)
        self.busy = True  # until the answer makes sense
        plan = self._understand(frame)
        outputs = codec.unpack(plan, frame.body, flight.draft.rooms, copy=copy)
        self.busy = False
        self._learn_rooms(flight.key, plan)
        return InferResult(outputs, plan.model_version, frame.prefix.time_ns)

    def _understand(self, frame: Frame) -> codec.ResponsePlan:
        plan = self._understood.get(frame.header)
        if plan is None:
            plan = codec.understand(frame.header)
            if len(self._understood) >= PLANS_MAX:
                self._understood.clear()
                self._answers.clear()
            self._understood[frame.header] = plan
            self._prepare_answer(frame.header, plan)
        return plan

    def _prepare_answer(self, header: bytes, plan: codec.ResponsePlan) -> None:
        """Views over the inbox for answers like this one, if the fast path can take them."""
        begin = PREFIX_SIZE + len(header)
        if begin + plan.body_size > INBOX_SIZE:
            return
        if any(view.in_region or view.datatype == "BYTES" for view in plan.outputs):
            return
        views = []
        for view in plan.outputs:
            source = self._inbox_view[begin + view.offset : begin + view.offset + view.size]
            views.append((view.name, tensors.from_bytes(source, view.datatype, view.shape)))
        self._answers[header] = _Answer(plan.model_version, plan.body_size, tuple(views))

    def _learn_rooms(self, key: Key, plan: codec.ResponsePlan) -> None:
        """Offer the next request like this one a place for each large output."""
        key = _unrouted(key)
        if self._scratch is None or key in self._rooms:
            return
        large = codec.large_outputs(plan, self._shared_min_bytes)
        if large:
            if len(self._rooms) >= PLANS_MAX:
                self._rooms.clear()
            self._rooms[key] = large
            self._forget_messages()

    def _start(
        self, kind: Kind, header: bytes, body: list[memoryview], deadline_ns: int, priority: int
    ) -> int:
        self._next_id += 1
        body_size = sum(part.nbytes for part in body)
        prefix = frames.encode_prefix(
            kind, len(header), body_size, self._next_id, deadline_ns, priority
        )
        parts = [memoryview(prefix + header), *body]
        self.busy = True
        self._open.add(self._next_id)  # a refusal may come before all is sent
        try:
            self._send([part for part in parts if part.nbytes], deadline_ns)
        except OSError as e:
            raise self._lost(e) from e
        return self._next_id

    def _send(self, parts: list[memoryview], deadline_ns: int) -> None:
        """Send everything, reading answers meanwhile: a server that waits for us to read before it
        reads on must not stop us for ever."""
        while parts:
            try:
                sent = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._read_while_waiting_to_send(deadline_ns)
                continue
            while parts and sent >= parts[0].nbytes:
                sent -= parts.pop(0).nbytes
            if sent:
                parts[0] = parts[0][sent:]

    def _read_while_waiting_to_send(self, deadline_ns: int) -> None:
        remaining_s = (deadline_ns - self._now_ns()) / 1e9
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        ready = poll.poll(max(0.0, remaining_s) * 1e3)
        if not ready:
            raise BlockingIOError
        if ready[0][1] & ~select.POLLOUT:
            size = self._socket.recv_into(self._reader.get_buffer())
            self._reader.advance(self._alive(size))
            self._sort_frames()

    def _wait(self, request_id: int, deadline_ns: int) -> Frame:
        """The answer to a request; answers to abandoned ones are dropped. ERROR is raised."""
        self._open.add(request_id)
        while not self._arrived.keys() & {request_id, 0}:
            if not self._sort_frames():
                self._read(deadline_ns)
        frame = self._arrived.pop(request_id, None) or self._arrived.pop(0)
        self._open.discard(request_id)
        self.busy = frame.prefix.request_id == 0  # then the server closes
        if isinstance(frame, TooLarge):
            raise frame.error
        if frame.prefix.kind == Kind.ERROR:
            raise messages.decode_error(frame.header)
        return frame

    def _sort_frames(self) -> bool:
        """Keep what was asked for, drop what was not; False: no whole frame was there."""
        found = False
        while (frame := self._reader.next_frame()) is not None:
            found = True
            answered_id = frame.prefix.request_id
            # id 0: the server could not tell which request it refuses
            if answered_id in self._open or (not answered_id and frame.prefix.kind == Kind.ERROR):
                self._arrived[answered_id] = frame
        return found

    def _read(self, deadline_ns: int) -> None:
        self._set_timeout((deadline_ns - self._now_ns()) / 1e9)
        try:
            size = self._socket.recv_into(self._reader.get_buffer())
        except OSError as e:
            raise self._lost(e) from e
        self._reader.advance(self._alive(size))

    def _alive(self, size: int) -> int:
        if not size:
            inside = "" if self._reader.eof() else " inside a frame"
            raise ConnectionClosedError(
                f"the server closed the connection{inside}", where=self._where
            )
        return size

    def _set_timeout(self, timeout_s: float) -> None:
        # A timeout may last 1 % longer than asked: that saves two system calls per receive.
        if not 0.99 * self._timeout_s <= timeout_s <= self._timeout_s:
            sockets.set_timeout(self._socket, timeout_s)
            self._timeout_s = timeout_s

    def _lost(self, error: OSError) -> ConnectionClosedError | DeadlineError:
        if isinstance(error, BlockingIOError):
            return DeadlineError("no answer in time", where=f"{self._where} {self._model}".strip())
        return ConnectionClosedError(
            f"the connection broke: {error.strerror or error}", where=self._where
        )


def _unrouted(key: Key) -> Key:
    """The kind of request, for whomever it is: outputs are as large for all of them."""
    return (*key[:2], *key[3:])


def _views(
    draft: codec.Draft, inputs: Mapping[str, Array], data: bytearray, body_size: int
) -> tuple[tuple[str, Array], ...]:
    """A view of each input's place, without those that lie in theirs."""
    views: list[tuple[str, Array]] = []
    offset = len(data) - body_size
    for name, _, shape, part, place in draft.inputs:
        if place is None:
            dtype = inputs[name].dtype.newbyteorder("<")
            views.append((name, np.ndarray(shape, dtype, data, offset)))
            offset += part.nbytes
        elif draft.keep[name] is not inputs[name]:
            views.append((name, draft.keep[name]))
    return tuple(views)


_NOTHING = codec.Draft((), (), {}, {})
