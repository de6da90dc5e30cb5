"""The serving worker's side of shadowing: a sample of inputs and answers goes into the ring.

Law of this file: it copies and counts. It never waits, and whatever becomes of the candidate is no
business of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from edge_runtime.errors import RequestError
from edge_runtime.serving import ring, routing, trial
from edge_runtime.serving.plan import Output, Plan, Slot
from edge_runtime.wire import messages
from edge_runtime.wire.frames import PREFIX, PREFIX_SIZE

# Distinct headers, of requests and of answers, of which is remembered what they say.
HEADERS_MAX = 64
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_COUNTED = {
    ring.Offer.TAKEN: trial.SHOWN,
    ring.Offer.FULL: trial.DROPPED_FULL,
    ring.Offer.TOO_LARGE: trial.DROPPED_LARGE,
}


class Mirror:
    """Shows `share` of all answers to the candidate."""

    def __init__(self, writer: ring.Writer, words: memoryview, seed: int, share: float) -> None:
        self._writer = writer
        self._words = words
        self._seed = seed
        self._limit = routing.limit_of(share)
        self._seen = 0
        self._shapes: dict[int, _Shape] = {}
        self._responses: dict[bytes, messages.InferResponse] = {}

    def share(self, share: float) -> None:
        """Another share."""
        self._limit = routing.limit_of(share)

    def show(self, plan: Plan, slot: Slot, response: memoryview, run_ns: int) -> None:
        """Pass this request and its answer on, if it is of the sample.

        Args:
            response: the answer's frame; the slot still holds the inputs.
            run_ns: of its run; 0: it did not run alone.
        """
        words = self._words
        words[trial.SEEN] += 1
        self._seen += 1
        if self._limit < routing.EVERYBODY and (routing.mix(self._seen, self._seed) >= self._limit):
            return
        shape = self._shape(plan)
        header = shape.header
        if not header:
            words[trial.SKIPPED] += 1
            return
        body_at = PREFIX_SIZE + PREFIX.unpack_from(response)[5]
        if plan.cacheable:  # everything is in the two frames
            parts: tuple[ring.Buffer, ...] = (header, slot.body, response[PREFIX_SIZE:])
            sizes = (len(header), plan.body_size, body_at - PREFIX_SIZE, len(response) - body_at)
        elif not self._writer.has_room(shape.bytes_min):  # before the parts are looked for
            words[trial.DROPPED_FULL] += 1
            return
        else:
            inputs, outputs = input_bytes(plan, slot), self._outputs(shape, plan, response, body_at)
            parts = (header, *inputs, response[PREFIX_SIZE:body_at], *outputs)
            sizes = (len(header), _size(inputs), body_at - PREFIX_SIZE, _size(outputs))
        words[_COUNTED[self._writer.offer(run_ns, sizes, parts)]] += 1

    def _shape(self, plan: Plan) -> _Shape:
        shape = self._shapes.get(plan.serial)
        if shape is None:
            shape = _remembered(self._shapes, plan.serial, _shape_of(plan))
        return shape

    def _outputs(
        self, shape: _Shape, plan: Plan, response: memoryview, body_at: int
    ) -> list[memoryview]:
        """An answer's tensors in their order, wherever they are."""
        if not shape.outside:
            return [response[body_at:]]
        header = bytes(response[PREFIX_SIZE:body_at])
        described = self._responses.get(header)
        if described is None:
            read = messages.decode_infer_response(header)
            described = _remembered(self._responses, header, read)
        return _outputs(plan, response, body_at, described)


class _Shape(NamedTuple):
    """What is the same for every request of a plan.

    Attributes:
        header: the request as the candidate is to understand it; empty: it cannot be shown.
        bytes_min: of a record, at least.
        outside: an output is in the client's memory.
    """

    header: bytes
    bytes_min: int
    outside: bool


def _shape_of(plan: Plan) -> _Shape:
    header = _describe(plan)
    bytes_min = len(header) + sum(given.byte_size for given in plan.inputs)
    return _Shape(header, bytes_min, any(output.region is not None for output in plan.outputs))


def _remembered(known: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    if len(known) >= HEADERS_MAX:
        known.pop(next(iter(known)))
    known[key] = value
    return value


def _describe(plan: Plan) -> bytes:
    if any(_overwrites(output, plan) for output in plan.outputs):
        return b""
    try:
        return messages.encode_header(inline_request(plan, ""))
    except RequestError:  # too many tensors for a header of ours; the client's had fewer words
        return b""


def _overwrites(output: Output, plan: Plan) -> bool:
    return output.region is not None and any(
        given.region is output.region
        and given.offset < output.offset + output.byte_size
        and output.offset < given.offset + given.byte_size
        for given in plan.inputs
    )


def inline_request(plan: Plan, version: str) -> messages.InferRequest:
    """The plan's request with every tensor in the body."""
    inputs = tuple(
        messages.TensorHeader(
            given.spec.name,
            given.spec.datatype,
            given.shape,
            messages.TensorParameters(binary_data_size=given.byte_size),
        )
        for given in plan.inputs
    )
    wanted = tuple(messages.RequestedOutput(output.spec.name) for output in plan.outputs)
    return messages.InferRequest(plan.names[0], inputs, version, wanted)


def input_bytes(plan: Plan, slot: Slot) -> list[memoryview]:
    """The tensors of a request in their order, wherever they are."""
    if plan.cacheable:
        return [slot.body]
    parts = []
    for given in plan.inputs:
        place = slot.body if given.region is None else given.region.memory
        parts.append(place[given.offset : given.offset + given.byte_size])
    return parts


def _size(parts: Sequence[memoryview]) -> int:
    return sum(len(part) for part in parts)


def _outputs(
    plan: Plan, response: memoryview, body_at: int, described: messages.InferResponse
) -> list[memoryview]:
    parts = []
    for output, one in zip(plan.outputs, described.outputs, strict=True):
        if output.region is None:
            size = one.parameters.binary_data_size or 0
            parts.append(response[body_at : body_at + size])
            body_at += size
        else:
            size = one.parameters.shared_memory_byte_size
            parts.append(output.region.memory[output.offset : output.offset + size])
    return parts
