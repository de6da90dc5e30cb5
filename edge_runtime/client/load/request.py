"""The one request that a load repeats: its inputs, and its bytes made once.

Law of this file: arrays in, bytes (and at most one memfd) out; no connection. All requests have the
same header bytes, as those of a real client have, so that the worker recognises them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import RequestError
from edge_runtime.wire import frames, messages, regions
from edge_runtime.wire.frames import Kind

if TYPE_CHECKING:
    from edge_runtime.tensors import Array

REGION = 0  # the number of the only region
ALIGNMENT = 64  # of each tensor in it: a cache line, as docs/protocol.md advises


class Template(NamedTuple):
    """A request less its id and deadline.

    Attributes:
        head: the first 16 bytes of the prefix; id and deadline follow, then `rest`.
        announce: the REGION_ADD frame that must come first, with `region_fd`; empty: none.
        tensor_bytes: the inputs' size, wherever they are.
    """

    head: bytes
    rest: bytes
    announce: bytes
    region_fd: int
    tensor_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the frame."""
        return frames.PREFIX_SIZE + len(self.rest)

    def close(self) -> None:
        """Close the memfd."""
        if self.region_fd >= 0:
            os.close(self.region_fd)


def inputs_of(metadata: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    """Inputs that the model accepts: free dimensions are 1, numbers are in 0..1 (integers 0)."""
    return {
        item["name"]: _tensor(item["datatype"], item["shape"], rng) for item in _inputs(metadata)
    }


def _inputs(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = list(metadata.get("inputs") or ())
    if not found:
        raise RequestError("the model says nothing of its inputs", remedy="give them with --npy")
    return found


def _tensor(datatype: str, shape: list[int], rng: np.random.Generator) -> Array:
    concrete = tuple(1 if dim < 0 else dim for dim in shape)
    if datatype == "BYTES":
        return np.full(concrete, b"x", dtype=object)
    if datatype not in tensors.DATATYPES:
        raise RequestError(f"an input of datatype {datatype!r}", remedy="give it with --npy")
    tensors.elements(concrete)
    dtype = np.dtype(tensors.DATATYPES[datatype][0])
    # Whole numbers may be indices into something: 0 is the one that is always there.
    return rng.random(concrete).astype(dtype) if dtype.kind == "f" else np.zeros(concrete, dtype)


def template(
    model: str, version: str, inputs: Mapping[str, Array], *, shared_memory: bool
) -> Template:
    """The request for these inputs; with `shared_memory` they lie in one region.

    Raises:
        RequestError: a dtype that the protocol has no name for, or strings in shared memory.
        StorageError: no shared memory to be had.
    """
    data = {name: tensors.to_bytes(array) for name, array in inputs.items()}
    places = _places(data)
    headers = tuple(
        messages.TensorHeader(
            name,
            tensors.datatype_of(array.dtype),
            array.shape,
            messages.TensorParameters(None, REGION, places[name], data[name].nbytes)
            if shared_memory
            else messages.TensorParameters(binary_data_size=data[name].nbytes),
        )
        for name, array in inputs.items()
    )
    header = messages.encode_header(messages.InferRequest(model, headers, version))
    body = b"" if shared_memory else b"".join(data.values())
    region_fd, announce = _region(model, data, places) if shared_memory else (-1, b"")
    prefix = frames.encode_prefix(Kind.INFER, len(header), len(body))
    tensor_bytes = sum(one.nbytes for one in data.values())
    return Template(
        prefix[: frames.PREFIX_TAIL_AT], header + body, announce, region_fd, tensor_bytes
    )


def _places(data: Mapping[str, memoryview]) -> dict[str, int]:
    """An aligned offset for each tensor, and under "" (no tensor's name) the size of all."""
    places, end = {}, 0
    for name, one in data.items():
        places[name] = end
        end += -(-max(1, one.nbytes) // ALIGNMENT) * ALIGNMENT
    return {**places, "": end}


def _region(
    model: str, data: Mapping[str, memoryview], places: Mapping[str, int]
) -> tuple[int, bytes]:
    size_bytes = places[""]
    if size_bytes > regions.REGION_SIZE_MAX:
        raise RequestError(
            f"inputs of {size_bytes} bytes", expected=f"<= {regions.REGION_SIZE_MAX}"
        )
    fd = regions.create_region(size_bytes, "edge-load")
    try:
        memory = regions.map_region(fd, size_bytes)
        for name, one in data.items():
            memory[places[name] : places[name] + one.nbytes] = one
        memory.close()
    except BaseException:
        os.close(fd)
        raise
    header = messages.encode_header(messages.RegionAdd(model, REGION, size_bytes))
    return fd, messages.encode_frame(Kind.REGION_ADD, header)
