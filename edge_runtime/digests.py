"""Digests, without libcrypto where that costs little time.

Law of this file: hash functions and nothing else. Importing `hashlib` maps libcrypto, 3.4 MiB of an
idle daemon's 29, for records of 300 bytes. Python carries the same functions itself; `hashlib` uses
them where OpenSSL is missing. OpenSSL is several times as quick: it is taken from LARGE_BYTES on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast

# A tenth of a second by Python's own functions; models of microcontrollers and small boards, whose
# memory is short, are smaller.
LARGE_BYTES = 16 * 1024 * 1024
# Python 3.11's own hold the interpreter's lock for one update: 0.3 to 0.6 ms for so much.
PIECE_BYTES = 64 * 1024

# Where CPython keeps them: _sha2 since 3.12, _sha256 before.
_HOMES = {"sha256": ("_sha2", "_sha256", "hashlib"), "blake2b": ("_blake2", "hashlib")}


def _find(name: str) -> Callable[..., Any]:
    for home in _HOMES[name]:
        try:
            return cast("Callable[..., Any]", getattr(importlib.import_module(home), name))
        except (ImportError, AttributeError):
            continue  # another version of Python; the last one always has it
    raise AssertionError(f"hashlib has no {name}")


_sha256 = _find("sha256")
_blake2b = _find("blake2b")


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: bytes, /) -> None:
        """Take in more."""

    def hexdigest(self) -> str:
        """The digest so far, as lower-case hexadecimal digits."""


class _Piecewise:
    """Python's own SHA-256, which lets other threads have their turns."""

    def __init__(self) -> None:
        self._inner = _sha256()

    def update(self, data: bytes, /) -> None:
        view = memoryview(data)
        for offset in range(0, len(view), PIECE_BYTES):
            self._inner.update(view[offset : offset + PIECE_BYTES])

    def hexdigest(self) -> str:
        digest: str = self._inner.hexdigest()
        return digest


def sha256(size_bytes: int) -> Hasher:
    """A SHA-256 to be made of about `size_bytes`."""
    if size_bytes < LARGE_BYTES and "hashlib" not in sys.modules:
        return _Piecewise()
    import hashlib

    return hashlib.sha256()


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    digest: str = _sha256(data).hexdigest()
    return digest


def blake2b(data: bytes, digest_size: int, key: bytes = b"") -> bytes:
    """BLAKE2b of `digest_size` bytes, keyed where a key is given."""
    digest: bytes = _blake2b(data, digest_size=digest_size, key=key).digest()
    return digest
