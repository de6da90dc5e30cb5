"""The file of a compiled model: believed only when whole, of its key, and of this artifact."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.daemon import compiled as kept
from edge_runtime.errors import StorageError
from edge_runtime.serving import channel, compiled

KEY, BLOB = '{"library": "1"}', bytes(range(256))


@given(st.text(), st.binary(max_size=200))
def test_what_was_sealed_is_unsealed(key: str, blob: bytes):
    assert compiled.unseal(key, compiled.seal(key, blob) + blob) == blob


@given(st.integers(0, 311), st.integers(1, 255))
def test_a_changed_byte_anywhere_makes_it_none(at: int, change: int):
    data = bytearray(compiled.seal(KEY, BLOB) + BLOB)
    data[at] ^= change
    assert compiled.unseal(KEY, bytes(data)) is None


@given(st.integers(0, 311))
def test_a_file_that_was_cut_short_is_none(size: int):
    data = compiled.seal(KEY, BLOB) + BLOB
    assert len(data) == 312 and compiled.unseal(KEY, data[:size]) is None


def test_another_keys_file_under_this_name_is_none(tmp_path: Path):
    ours, theirs = channel.pair()
    cache = compiled.Cache(tmp_path, ours)
    (tmp_path / compiled.name_of(KEY)).write_bytes(compiled.seal("other", BLOB) + BLOB)
    assert cache.get(KEY) is None
    (tmp_path / compiled.name_of(KEY)).write_bytes(compiled.seal(KEY, BLOB) + BLOB)
    assert cache.get(KEY) == BLOB
    ours.close()
    theirs.close()


def test_what_is_put_goes_to_the_supervisor_as_a_memfd(tmp_path: Path):
    ours, theirs = channel.pair()
    compiled.Cache(tmp_path, ours).put(KEY, BLOB)
    message, (fd,) = channel.receive(theirs)
    assert isinstance(message, channel.Compiled) and compiled.is_name(message.name)
    data = os.pread(fd, message.size + 1, 0)
    assert len(data) == message.size and compiled.unseal(KEY, data) == BLOB
    os.close(fd)
    assert not list(tmp_path.iterdir())
    ours.close()
    theirs.close()
    compiled.Cache(tmp_path, ours).put(KEY, BLOB)  # nobody is there to keep it: no error


def test_a_descriptor_that_is_no_file_is_refused_like_one_that_is_too_short():
    ends = os.pipe()
    try:
        with pytest.raises(StorageError):
            list(kept._chunks(ends[0], 10))
    finally:
        for fd in ends:
            os.close(fd)


def test_a_name_is_a_name_and_no_path():
    assert compiled.is_name(compiled.name_of(KEY))
    for name in ("", "../../x.blob", "a" * 64, "A" * 64 + ".blob", "a" * 64 + ".blob\n"):
        assert not compiled.is_name(name)
