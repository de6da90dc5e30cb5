"""Digests without libcrypto are the same digests."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import digests


@given(st.binary(max_size=300))
def test_sha256_is_hashlibs(data: bytes) -> None:
    assert digests.sha256_hex(data) == hashlib.sha256(data).hexdigest()


@given(st.binary(max_size=300), st.integers(1, 64), st.binary(max_size=64))
def test_blake2b_is_hashlibs_keyed_or_not(data: bytes, size: int, key: bytes) -> None:
    wanted = hashlib.blake2b(data, digest_size=size, key=key).digest()
    assert digests.blake2b(data, size, key) == wanted
