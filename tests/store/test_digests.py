"""Digests without libcrypto are the same digests."""

from __future__ import annotations

import hashlib
import sys

import pytest
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


@pytest.mark.parametrize("size", [0, 1, digests.PIECE_BYTES, 3 * digests.PIECE_BYTES + 5])
def test_a_running_sha256_is_hashlibs_with_and_without_it(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data, wanted = data[:size], hashlib.sha256(data[:size]).hexdigest()
    kinds = []
    for absent in (False, True):
        if absent:
            monkeypatch.delitem(sys.modules, "hashlib")
        hasher = digests.sha256(size)
        hasher.update(data[: size // 2])
        hasher.update(data[size // 2 :])
        assert hasher.hexdigest() == wanted
        kinds.append(type(hasher))
    assert kinds[0] is not kinds[1]
    assert isinstance(digests.sha256(digests.LARGE_BYTES), kinds[0])
