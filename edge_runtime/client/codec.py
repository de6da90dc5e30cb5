"""Between numpy arrays and frames: what a request looks like, what a response means.

Law of this file: no socket and no clock. Shared by the blocking and the asyncio client.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.client.memory import Arena, Pool
from edge_runtime.errors import MalformedError, RequestError
from edge_runtime.wire import messages
from edge_runtime.wire.messages import (
    InferRequest,
    RequestedOutput,
    RequestParameters,
    TensorHeader,
    TensorParameters,
)

if TYPE_CHECKING:
    from edge_runtime.tensors import Array


_datatype_of = functools.lru_cache(maxsize=64)(tensors.datatype_of)  # 2 us each, few dtypes


class InferResult(NamedTuple):
    """An answer. `server_ns`: from request read to response written, inside the server."""

    outputs: dict[str, Array]
    model_version: str
    server_ns: int


class Draft(NamedTuple):
    """A request before its regions have numbers.

    `inputs`: (name, datatype, shape, bytes, place); where `place` is given, `bytes` is empty and
    the data lies there. `rooms`: outputs that the server may write into an array of ours.
    """

    inputs: tuple[tuple[str, str, tuple[int, ...], memoryview, tuple[Arena, int] | None], ...]
    outputs: tuple[str, ...]
    rooms: dict[str, tuple[Arena, int, Array]]
    keep: dict[str, Array]  # inputs in shared memory, which the server reads until it has answered

    def arenas(self) -> list[Arena]:
        """The arenas that the server must know before this request."""
        found = [place[0] for *_, place in self.inputs if place]
        return list(dict.fromkeys([*found, *(arena for arena, _, _ in self.rooms.values())]))

    def encode(
        self, model: str, version: str, numbers: Mapping[Arena, int], routing_key: str = ""
    ) -> bytes:
        """The header. Raises RequestError when it is too long."""
        headers = tuple(
            TensorHeader(name, datatype, shape, _parameters(data, place, shape, datatype, numbers))
            for name, datatype, shape, data, place in self.inputs
        )
        outputs = tuple(RequestedOutput(name, self._room(name, numbers)) for name in self.outputs)
        parameters = RequestParameters(routing_key)
        request = InferRequest(model, headers, version, outputs, parameters)
        return messages.encode_header(request)

    def body(self) -> list[memoryview]:
        """The raw tensors that travel in the frame, in header order."""
        return [data for *_, data, place in self.inputs if place is None]

    def _room(self, name: str, numbers: Mapping[Arena, int]) -> TensorParameters:
        if name not in self.rooms:
            return TensorParameters()
        arena, offset, array = self.rooms[name]
        return TensorParameters(None, numbers[arena], offset, array.nbytes)


def _parameters(
    data: memoryview,
    place: tuple[Arena, int] | None,
    shape: tuple[int, ...],
    datatype: str,
    numbers: Mapping[Arena, int],
) -> TensorParameters:
    if place is None:
        return TensorParameters(binary_data_size=data.nbytes)
    return TensorParameters(None, numbers[place[0]], place[1], tensors.byte_size(datatype, shape))


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, Array]:
    """Numpy arrays of whatever numpy can make an array of."""
    return {name: np.asarray(value) for name, value in inputs.items()}


def draft(
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    own: Pool,
    scratch: Pool | None,
    room_sizes: Mapping[str, int],
    shared_min_bytes: int,
) -> Draft:
    """Decide for each tensor whether it travels in the frame or in shared memory.

    Args:
        own: where arrays may already lie (`Client.tensor`): these are sent without a copy.
        scratch: where large arrays are copied to; None: no shared memory at all.
        room_sizes: as large_outputs gave it for the last request like this one.

    Raises:
        RequestError: a dtype that the protocol has no name for.
    """
    placed = []
    keep: dict[str, Array] = {}
    for name, array in inputs.items():
        datatype = _datatype_of(array.dtype)
        place = None
        if scratch is not None and array.nbytes >= shared_min_bytes and datatype != "BYTES":
            place, kept = _place(array, own, scratch)
            if place:
                keep[name] = kept
        data = memoryview(b"") if place else tensors.to_bytes(array)
        placed.append((name, datatype, array.shape, data, place))
    rooms = {} if scratch is None else _offer_rooms(room_sizes, scratch)
    return Draft(tuple(placed), tuple(outputs or room_sizes), rooms, keep)


def _offer_rooms(sizes: Mapping[str, int], scratch: Pool) -> dict[str, tuple[Arena, int, Array]]:
    rooms = {}
    for name, size in sizes.items():
        room = scratch.array((size,), np.dtype(np.uint8)) if size else None
        if room is not None and (place := scratch.locate(room)):
            rooms[name] = (*place, room)
    return rooms


def _place(array: Array, own: Pool, scratch: Pool) -> tuple[tuple[Arena, int] | None, Array]:
    if place := own.locate(array):
        return place, array
    copy = scratch.array(array.shape, array.dtype.newbyteorder("<"))
    if copy is None:
        return None, array
    copy[...] = array
    return scratch.locate(copy), copy


class OutputView(NamedTuple):
    """Where a response's output is: `offset` in the body, or in a region (`in_region`)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    in_region: bool


class ResponsePlan(NamedTuple):
    """A response header, understood; the same bytes always mean the same."""

    model_version: str
    outputs: tuple[OutputView, ...]
    body_size: int


def understand(header: bytes) -> ResponsePlan:
    """Decode a response header.

    Raises:
        MalformedError: the server answers nonsense; the connection is not worth keeping.
    """
    try:
        response = messages.decode_infer_response(header)
    except RequestError as e:
        raise MalformedError(f"the server's answer: {e}") from e
    offset = 0
    outputs = []
    for output in response.outputs:
        parameters = output.parameters
        in_region = parameters.shared_memory_region is not None
        size = parameters.binary_data_size or 0
        if in_region:
            size = parameters.shared_memory_byte_size
        outputs.append(
            OutputView(output.name, output.datatype, output.shape, offset, size, in_region)
        )
        offset += 0 if in_region else size
    return ResponsePlan(response.model_version, tuple(outputs), offset)


def large_outputs(plan: ResponsePlan, shared_min_bytes: int) -> dict[str, int]:
    """What the next request like this one should offer a place for: bytes by output name.

    0: this one travels in the frame. Empty: all do. (A request that names one output gets only
    those that it names, so all are in the answer.)
    """
    sizes = {
        view.name: view.size if view.size >= shared_min_bytes and view.datatype != "BYTES" else 0
        for view in plan.outputs
    }
    return sizes if any(sizes.values()) else {}


def unpack(
    plan: ResponsePlan,
    body: memoryview,
    rooms: Mapping[str, tuple[Arena, int, Array]],
    *,
    copy: bool,
) -> dict[str, Array]:
    """The outputs as arrays: views of the body; those of a region are copies unless
    `copy` is false.

    Raises:
        MalformedError: the header and the body, or the rooms that were offered, do not agree.
    """
    if body.nbytes != plan.body_size:
        raise MalformedError(
            f"the server's answer has {body.nbytes} bytes", expected=f"{plan.body_size} bytes"
        )
    outputs = {}
    for view in plan.outputs:
        source = body[view.offset : view.offset + view.size]
        if view.in_region:
            if view.name not in rooms or view.size > rooms[view.name][2].nbytes:
                raise MalformedError(f"output {view.name!r} lies in a region nobody offered")
            source = rooms[view.name][2].data[: view.size]
        array = tensors.from_bytes(source, view.datatype, view.shape)
        outputs[view.name] = array.copy() if view.in_region and copy else array
    return outputs
