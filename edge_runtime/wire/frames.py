"""The frame: 32 bytes of prefix, a JSON header, raw tensor bytes.

Law of this file: bytes in, values out; no socket, no clock, no numpy. It decides what is a frame,
what is malformed and what is too large; who reads, waits or answers is elsewhere. The layout is the
public contract of docs/protocol.md: fields are added at the end of headers, never moved.

What changes from request to request (id, deadline, sizes) is in the prefix; what stays the same
from one request of a client to the next is in the header, so that a worker can recognise a header
by its bytes and skip parsing it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from edge_runtime.errors import MalformedError, TooLargeError

MAGIC = b"EDGE"
VERSION = 1
PREFIX = struct.Struct("<4sBBBBIIQQ")
PREFIX_SIZE = PREFIX.size  # 32
# The two words that differ between responses of one kind: written into a prepared frame.
PREFIX_TAIL = struct.Struct("<QQ")  # request_id, time_ns
PREFIX_TAIL_AT = PREFIX_SIZE - PREFIX_TAIL.size
HEADER_ALIGNMENT = 32  # pad headers with spaces to this, and the body is aligned: no copy

# 64 KiB holds some 400 tensors' descriptions: larger headers are mistakes or attacks. Not
# configurable, because both ends must know it before they can exchange anything.
HEADER_SIZE_MAX = 64 * 1024
# Default of the configurable cap on tensor bytes inside one frame; larger ones go by shared memory.
BODY_SIZE_MAX = 64 * 1024 * 1024


class Kind(IntEnum):
    """What a frame is. A response has the request's kind with the top bit set."""

    INFER = 0x01
    MODEL_METADATA = 0x02
    MODEL_READY = 0x03
    REGION_ADD = 0x04
    REGION_DROP = 0x05
    SERVER_METADATA = 0x08
    SERVER_LIVE = 0x09
    SERVER_READY = 0x0A
    CONTROL = 0x10
    EVENT = 0x7E
    ERROR = 0xFF


RESPONSE = 0x80  # kind | RESPONSE
_KINDS = frozenset(int(kind) for kind in Kind) | {
    int(kind) | RESPONSE for kind in Kind if kind < Kind.EVENT
}
# Kinds that name a model in their header and are answered by its worker.
MODEL_KINDS = frozenset(
    {Kind.INFER, Kind.MODEL_METADATA, Kind.MODEL_READY, Kind.REGION_ADD, Kind.REGION_DROP}
)


class Prefix(NamedTuple):
    """The fixed part of a frame, decoded.

    `time_ns`: in a request the deadline on CLOCK_MONOTONIC in nanoseconds (0: none); in a response
    the nanoseconds from "request read" to "response written" inside the server.
    `priority`: 0 is normal, larger is served earlier.
    """

    kind: int
    priority: int
    header_size: int
    body_size: int
    request_id: int
    time_ns: int


def decode_prefix(data: bytes | bytearray | memoryview, offset: int = 0) -> Prefix:
    """Decode 32 bytes at `offset`.

    Raises:
        MalformedError: not our magic, version, kind or flags: the stream cannot be trusted.
        TooLargeError: the header is over HEADER_SIZE_MAX (the body's cap is the reader's policy).
    """
    magic, version, kind, priority, flags, header_size, body_size, request_id, time_ns = (
        PREFIX.unpack_from(data, offset)
    )
    if magic != MAGIC or version != VERSION:
        raise MalformedError(
            f"frame begins with {bytes(magic)!r} version {version}",
            expected=f"{MAGIC!r} version {VERSION}",
        )
    if kind not in _KINDS or flags:
        raise MalformedError(f"frame of unknown kind {kind:#04x} or flags {flags:#04x}")
    if header_size > HEADER_SIZE_MAX:
        raise TooLargeError(f"header of {header_size} bytes", expected=f"<= {HEADER_SIZE_MAX}")
    return Prefix(kind, priority, header_size, body_size, request_id, time_ns)


def encode_prefix(
    kind: int,
    header_size: int,
    body_size: int,
    request_id: int = 0,
    time_ns: int = 0,
    priority: int = 0,
) -> bytes:
    """The 32 bytes before a header of `header_size` and a body of `body_size` bytes."""
    return PREFIX.pack(
        MAGIC, VERSION, kind, priority, 0, header_size, body_size, request_id, time_ns
    )


def pad_header(header: bytes) -> bytes:
    """Spaces (JSON white space) after the header up to HEADER_ALIGNMENT."""
    return header + b" " * (-len(header) % HEADER_ALIGNMENT)
