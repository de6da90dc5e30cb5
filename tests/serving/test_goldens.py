"""Goldens: when is an answer the recorded one?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime import tensors
from edge_runtime.errors import GoldenError, RequestError
from edge_runtime.serving import goldens
from edge_runtime.serving.spec import GoldenFile, GoldenPair

INF, NAN = math.inf, math.nan


def f4(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("got", "want", "rtol", "atol", "deviation"),
    [
        (f4(1, 2), f4(1, 2), 0, 0, 0.0),
        (f4(1.5), f4(1), 0, 0.5, 1.0),
        (f4(1.5), f4(1), 0.5, 0, 1.0),
        (f4(3), f4(2), 0.25, 0.5, 1.0),  # 1 of 0.5 + 0.25 * 2
        (f4(2), f4(4), 0, 0.5, 4.0),
        (f4(-2), f4(2), 1, 0, 2.0),
        (f4(1, 5), f4(1, 1), 0, 1, 4.0),  # the largest counts
        (f4(1), f4(2), 0, 0, INF),
        (f4(NAN), f4(NAN), 0, 0, 0.0),
        (f4(NAN), f4(1), 1, 1e9, INF),
        (f4(1), f4(NAN), 1, 1e9, INF),
        (f4(INF, -INF), f4(INF, -INF), 0, 0, 0.0),
        (f4(INF), f4(-INF), 1, 1e9, INF),
        (f4(INF), f4(1e38), 1, 1e9, INF),
        (f4(1e38), f4(INF), 1, 1e9, INF),
        (np.array([1e308]), np.array([-1e308]), 0, 1.0, INF),  # the distance overflows
        (f4(), f4(), 0, 0, 0.0),
        (f4(1), f4(1, 1), 1, 1, INF),
        (f4(1).reshape(1, 1), f4(1), 1, 1, INF),
        (f4(1), np.array([1.0]), 1, 1, INF),  # FP64 is not FP32
        (np.float32(2), np.float32(2), 0, 0, 0.0),
        (np.array([5]), np.array([7]), 0, 2, 1.0),
        (np.array([200], np.uint8), np.array([100], np.uint8), 0, 100, 1.0),
        (np.array([100], np.uint8), np.array([200], np.uint8), 0, 100, 1.0),  # no wrap-around
        (np.array([1 << 60]), np.array([(1 << 60) + 1]), 0, 0, INF),
        (np.array([1 << 60]), np.array([(1 << 60) + 1]), 0, 0.5, 2.0),
        (np.array([True, False]), np.array([True, False]), 0, 0, 0.0),
        (np.array([True]), np.array([False]), 0.1, 0.1, 10.0),
        (np.array([b"a", b""], object), np.array([b"a", b""], object), 0, 0, 0.0),
        (np.array([b"a"], object), np.array([b"b"], object), 9, 9, INF),
        (np.array([], object), np.array([], object), 0, 0, 0.0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_deviation_is_the_distance_in_units_of_the_tolerance(
    got: Any, want: Any, rtol: float, atol: float, deviation: float
) -> None:
    assert goldens.deviation(np.asarray(got), np.asarray(want), rtol, atol) == deviation


floats = hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32))


@given(want=floats, rtol=st.floats(0, 10), atol=st.floats(0, 10))
def test_an_array_is_never_away_from_itself(want: Any, rtol: float, atol: float) -> None:
    assert goldens.deviation(want.copy(), want, rtol, atol) == 0.0


@given(data=st.data(), rtol=st.floats(0.0009765625, 1), atol=st.floats(0.0009765625, 1))
def test_the_verdict_is_that_of_numpys_isclose(data: Any, rtol: float, atol: float) -> None:
    shape = data.draw(st.integers(1, 10))
    finite = st.floats(-1000, 1000, width=32)
    got, want = (data.draw(hnp.arrays(np.float32, shape, elements=finite)) for _ in range(2))
    off = goldens.deviation(got, want, rtol, atol)
    if abs(off - 1) > 1e-9:  # not on the very edge, where rounding decides
        wide = np.isclose(got.astype("f8"), want.astype("f8"), rtol, atol)
        assert (off <= 1) == bool(wide.all())


def recorded(path: Path, name: str, array: Any) -> GoldenFile:
    file = path / f"{name}.{len(list(path.iterdir()))}.bin"
    file.write_bytes(tensors.to_bytes(array))
    return GoldenFile(name, tensors.datatype_of(array.dtype), array.shape, str(file))


def test_check_returns_the_worst_and_names_the_one_that_fails(tmp_path: Path) -> None:
    pairs = [
        GoldenPair((recorded(tmp_path, "x", f4(n)),), (recorded(tmp_path, "y", f4(2 * n + off)),))
        for n, off in ((1, 0.0), (2, 0.5), (3, 0.25))
    ]

    def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * np.float32(2)}

    assert goldens.check(double, pairs, 0, 1.0) == 0.5
    with pytest.raises(GoldenError, match="output 'y' is 5 x its tolerance away from golden 1"):
        goldens.check(double, pairs, 0, 0.1)
    with pytest.raises(GoldenError, match="inf"):
        goldens.check(lambda inputs: {}, pairs, 1, 1)
    assert goldens.check(double, [], 0, 0) == 0.0


def test_strings_survive_a_golden(tmp_path: Path) -> None:
    words = np.array([[b"cat", b""], [b"d\x00g", b"\xff"]], dtype=object)
    golden = recorded(tmp_path, "t", words)
    np.testing.assert_array_equal(goldens.read(golden), words)
    assert goldens.check(lambda inputs: {"t": words}, [GoldenPair((), (golden,))], 0, 0) == 0.0


def test_a_golden_file_of_another_size_is_refused(tmp_path: Path) -> None:
    golden = recorded(tmp_path, "x", f4(1, 2, 3))
    Path(golden.path).write_bytes(bytes(11))
    with pytest.raises(RequestError, match="11 bytes"):
        goldens.read(golden)
