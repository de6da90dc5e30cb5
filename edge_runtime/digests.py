"""Digests of small things, without libcrypto.

Law of this file: hash functions and nothing else. Importing `hashlib` maps libcrypto, 3.4 MiB of an
idle daemon's 29, for records of 300 bytes. Python carries the same functions itself; `hashlib` uses
them where OpenSSL is missing. Whoever hashes megabytes imports `hashlib` when it comes to that:
OpenSSL is several times as quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

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


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    digest: str = _sha256(data).hexdigest()
    return digest


def blake2b(data: bytes, digest_size: int, key: bytes = b"") -> bytes:
    """BLAKE2b of `digest_size` bytes, keyed where a key is given."""
    digest: bytes = _blake2b(data, digest_size=digest_size, key=key).digest()
    return digest
