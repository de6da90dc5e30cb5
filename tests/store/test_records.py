"""Records tell whole from torn."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import StorageError
from edge_runtime.store import BlobRef, Generation, Switch, records

switches = st.builds(
    Switch,
    name=st.text(),
    active=st.none() | st.integers(1, 2**50),
    previous=st.none() | st.integers(1, 2**50),
    since_wall_s=st.floats(allow_nan=False, allow_infinity=False),
    reason=st.text(),
    sequence=st.integers(0, 2**50),
)


@given(switches)
def test_a_record_comes_back_as_it_was(switch: Switch) -> None:
    assert records.decode(records.encode(switch), Switch) == switch


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_record(data: bytes) -> None:
    assert records.decode(data, Switch) is None


@given(switches, st.data())
def test_no_single_change_goes_unnoticed(switch: Switch, data: st.DataObject) -> None:
    good = records.encode(switch)
    index = data.draw(st.integers(0, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = good[:index] + bytes([good[index] ^ (1 << bit)]) + good[index + 1 :]
    assert records.decode(flipped, Switch) is None
    assert records.decode(good[:index], Switch) is None
    assert records.decode(good + good[: index + 1], Switch) is None


@given(st.binary(max_size=300))
def test_whole_bytes_that_are_not_understood_are_never_called_torn(body: bytes) -> None:
    data = body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"
    with pytest.raises(StorageError, match="not understood"):
        records.decode(data, Switch)


def test_a_record_of_one_kind_is_not_one_of_another() -> None:
    generation = Generation("m", 1, 1, "ab" * 32, 3, (BlobRef("cd" * 32, 4),), 0.0, 1)
    data = records.encode(generation)
    assert records.decode(data, Generation) == generation
    with pytest.raises(StorageError):
        records.decode(data, Switch)


def test_fields_added_by_a_later_version_do_not_hurt() -> None:
    body = b'{"record":"switch-1","name":"m","active":3,"colour":"blue"}'
    data = body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"
    switch = records.decode(data, Switch)
    assert switch is not None
    assert switch.active == 3
