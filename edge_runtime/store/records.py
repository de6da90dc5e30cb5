"""Small records that know whether they are whole.

Law of this file: bytes in, values out; no I/O, no meaning. A record is one line of JSON and one
line with the SHA-256 of the first, so that a torn, empty or rotten file is told from a good one. A
record that is whole but not understood is never mistaken for a torn one: it belongs to another
version of this program and must be left alone.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge_runtime import digests
from edge_runtime.errors import StorageError

# Holds a generation with some 5,000 blobs; a larger record is a mistake.
RECORD_SIZE_MAX = 1024 * 1024


class DamagedError(StorageError):
    """What is on disk is not what was put there; other StorageErrors say that a step failed."""


_Record = TypeVar("_Record", bound=msgspec.Struct)


def encode(record: msgspec.Struct) -> bytes:
    """The record's bytes."""
    body = msgspec.json.encode(record)
    return body + b"\n" + _digest(body) + b"\n"


def decode(data: bytes, kind: type[_Record]) -> _Record | None:
    """The record, or None when the bytes are torn, empty or altered.

    Raises:
        StorageError: the bytes are whole but not a `kind` that this version knows.
    """
    body, _, check = data.removesuffix(b"\n").rpartition(b"\n")
    if not data.endswith(b"\n") or check != _digest(body):
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as e:
        raise StorageError(
            f"record is whole but not understood: {e}",
            expected=f"a {kind.__name__} record of this version",
            remedy="it was written by another version of edge-runtime: run that one",
        ) from e


def _digest(body: bytes) -> bytes:
    return digests.sha256_hex(body).encode()
