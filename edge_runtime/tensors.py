"""Tensor names, datatypes and shapes: values only, numpy only when asked for.

Law of this file: importing it costs no numpy (the daemon imports it); the functions that need numpy
import it when called. Datatype names are the Open Inference Protocol's ("Tensor Data Types").
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# OIP datatype -> (numpy dtype, bytes per element). BYTES elements have a 4-byte little-endian
# length before them. BF16 has no numpy type and travels as its 16-bit pattern.
DATATYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "UINT8": ("uint8", 1),
    "UINT16": ("uint16", 2),
    "UINT32": ("uint32", 4),
    "UINT64": ("uint64", 8),
    "INT8": ("int8", 1),
    "INT16": ("int16", 2),
    "INT32": ("int32", 4),
    "INT64": ("int64", 8),
    "FP16": ("float16", 2),
    "FP32": ("float32", 4),
    "FP64": ("float64", 8),
    "BF16": ("uint16", 2),
    "BYTES": ("object", 0),
}

DIMENSIONS_MAX = 16  # no runtime we load takes more; bounds work on hostile headers
ELEMENTS_MAX = 1 << 40  # keeps products of hostile dimensions far from overflow


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One input or output of a model.

    `shape` has -1 where the dimension is free. `layout` is for people and pre-processing (`NCHW`).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    layout: str = ""


def elements(shape: tuple[int, ...] | list[int]) -> int:
    """How many elements a concrete shape has.

    Raises:
        RequestError: a dimension is negative, or there are absurdly many dimensions or elements.
    """
    if len(shape) > DIMENSIONS_MAX:
        raise RequestError(
            f"shape has {len(shape)} dimensions", expected=f"at most {DIMENSIONS_MAX}"
        )
    if any(dim < 0 for dim in shape):
        raise RequestError(f"shape {list(shape)} has a negative dimension", expected="sizes >= 0")
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise RequestError(f"shape {list(shape)} has {count} elements", expected="a smaller tensor")
    return count


def byte_size(datatype: str, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of a dense tensor; not for BYTES, whose size is in its data.

    Raises:
        RequestError: the datatype is unknown or has no fixed size, or the shape is not concrete.
    """
    if datatype not in DATATYPES or datatype == "BYTES":
        raise RequestError(
            f"datatype {datatype!r} has no fixed element size",
            expected="one of " + ", ".join(name for name in DATATYPES if name != "BYTES"),
        )
    return elements(shape) * DATATYPES[datatype][1]


def shape_matches(shape: tuple[int, ...] | list[int], pattern: tuple[int, ...]) -> bool:
    """Whether a concrete shape fits a pattern in which -1 is any size."""
    return len(shape) == len(pattern) and all(
        want in (-1, have) for have, want in zip(shape, pattern, strict=True)
    )


def datatype_of(dtype: Any) -> str:
    """The OIP datatype of a numpy dtype.

    Raises:
        RequestError: the dtype has no OIP name (complex, datetime, structured).
    """
    kind = getattr(dtype, "kind", "")
    if kind in "SUO":
        return "BYTES"
    name = str(getattr(dtype, "name", dtype))
    if name == "bfloat16":  # ml_dtypes
        return "BF16"
    for datatype, (numpy_name, _) in DATATYPES.items():
        if numpy_name == name:
            return datatype
    raise RequestError(
        f"numpy dtype {name!r} has no Open Inference Protocol datatype",
        expected="one of " + ", ".join(DATATYPES),
    )


def from_bytes(
    data: bytes | bytearray | memoryview, datatype: str, shape: tuple[int, ...]
) -> Array:
    """A numpy array over `data` (no copy, little-endian); BYTES become an object array (a copy).

    Raises:
        RequestError: unknown datatype, or `data` has another size than the shape needs.
    """
    import numpy as np

    if datatype == "BYTES":
        return _split_bytes(memoryview(data), shape)
    want = byte_size(datatype, shape)
    have = memoryview(data).nbytes
    if have != want:
        raise RequestError(
            f"{have} bytes of data for {datatype} {list(shape)}", expected=f"{want} bytes"
        )
    dtype = np.dtype(DATATYPES[datatype][0]).newbyteorder("<")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def to_bytes(array: Array) -> memoryview:
    """The raw little-endian bytes of an array; no copy when it is C-contiguous already."""
    import numpy as np

    if array.dtype.kind in "SUO":
        return memoryview(_join_bytes(array))
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    return contiguous.reshape(-1).view(np.uint8).data


def _join_bytes(array: Array) -> bytes:
    parts = []
    for item in array.reshape(-1).tolist():
        data = item.encode() if isinstance(item, str) else bytes(item)
        parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


def _split_bytes(data: memoryview, shape: tuple[int, ...]) -> Array:
    import numpy as np

    count = elements(shape)
    if count * 4 > data.nbytes:  # each element has a length: bounds the allocation below
        raise RequestError(f"{data.nbytes} bytes hold no BYTES tensor of shape {list(shape)}")
    out = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        if offset + 4 > data.nbytes:
            raise RequestError(f"BYTES tensor ends inside the length of element {index}")
        (size,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + size > data.nbytes:
            raise RequestError(f"BYTES tensor ends inside element {index} of {size} bytes")
        out[index] = bytes(data[offset : offset + size])
        offset += size
    if offset != data.nbytes:
        raise RequestError(f"BYTES tensor has {data.nbytes - offset} bytes after its last element")
    return out.reshape(shape)
