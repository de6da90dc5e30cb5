"""Two answers compared: same classes, distances, and all that is not a number."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_runtime.serving import comparison
from edge_runtime.serving.comparison import Comparison, class_outputs
from edge_runtime.serving.shadowing import disagree
from edge_runtime.tensors import TensorSpec

NAN, INF = float("nan"), float("inf")


def compare(got, want, classes=False, dtype=np.float32) -> Comparison:
    return comparison.compare(
        np.array(got, dtype), np.array(want, dtype), classes, rtol=1e-3, atol=1e-4
    )


any_floats = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=3, max_side=5),
    elements=st.floats(width=32),
)


@given(any_floats)
def test_an_answer_agrees_with_itself_whatever_is_in_it(array):
    one = comparison.compare(array, array.copy(), True, 1e-3, 1e-4)
    assert one.alike and one.within and one.max_abs == 0 and one.agreed == one.rows > 0
    assert one.cosine is None or one.cosine == pytest.approx(1)
    assert not disagree({"y": one})


@given(any_floats, st.data())
def test_any_two_answers_of_a_shape_can_be_compared_both_ways(array, data):
    other = data.draw(
        arrays.arrays(np.float32, array.shape, elements=st.floats(width=32)), label="other"
    )
    one = comparison.compare(array, other, True, 1e-3, 1e-4)
    back = comparison.compare(other, array, True, 1e-3, 1e-4)
    assert (one.alike, one.rows, one.agreed, one.max_abs) == (
        back.alike,
        back.rows,
        back.agreed,
        back.max_abs,
    )
    assert not np.isnan(one.max_abs)
    assert one.cosine is None or -1 <= one.cosine <= 1
    assert one.alike or (not one.within and one.cosine is None)


def test_top_1_counts_rows_with_the_same_best_class():
    one = compare([[1, 2], [5, 4], [0, 1]], [[1, 9], [1, 2], [0, 3]], classes=True)
    assert (one.rows, one.agreed) == (3, 2)


def test_the_best_of_equal_scores_is_any_of_them():
    one = compare([[7, 7, 1]], [[1, 7, 2]], classes=True)
    assert (one.rows, one.agreed) == (1, 1)
    assert compare([[7, 7, 1]], [[1, 2, 7]], classes=True).agreed == 0


def test_integers_have_a_best_class_too():
    assert compare([[3, 200]], [[1, 255]], classes=True, dtype=np.uint8).agreed == 1


def test_nan_is_like_nan_in_the_same_place_only():
    assert compare([NAN, 1], [NAN, 1]) == Comparison(True, 0, 0, True, 0.0, 1.0)
    assert compare([1, NAN], [NAN, 1]) == Comparison(False, 0, 0, False, INF, None)
    assert not compare([NAN, 1], [0, 1]).alike


def test_an_infinity_is_like_itself_only():
    assert compare([INF, 1], [INF, 1]).alike
    assert not compare([INF, 1], [-INF, 1]).alike
    assert not compare([3e38, 1], [INF, 1]).alike


def test_a_row_of_nan_has_no_better_class_than_another():
    assert compare([[NAN, NAN]], [[NAN, NAN]], classes=True).agreed == 1


def test_zeros_are_like_zeros_and_like_nothing_else():
    assert compare([0, 0], [0, 0]).cosine == 1.0
    assert compare([0, 0], [0, 1]).cosine == 0.0


def test_large_numbers_have_a_direction():
    assert compare([3e38, 3e38], [3e38, 3e38]).cosine == pytest.approx(1)
    assert compare([1e300, 0], [0, 1e300], dtype=np.float64).cosine == 0
    assert compare([3e38], [-3e38]).cosine == -1


def test_the_distance_of_unsigned_numbers_does_not_wrap():
    assert compare([0], [255], dtype=np.uint8).max_abs == 255


def test_an_empty_output_agrees():
    one = compare(np.zeros((0, 4)), np.zeros((0, 4)), classes=True)
    assert one == Comparison(True, 0, 0, True, 0.0, None)


def test_other_shapes_and_datatypes_are_unlike():
    assert compare([1, 2], [[1, 2]]) == comparison.UNLIKE
    assert comparison.compare(np.zeros(2), np.zeros(2, np.float32), True, 0, 0) == comparison.UNLIKE


def test_strings_are_equal_or_not():
    same = np.array([b"a", b"b"], object)
    assert comparison.compare(same, same.copy(), False, 0, 0).within
    assert not comparison.compare(same, np.array([b"a", b"c"], object), False, 0, 0).alike


def found(alike=True, rows=0, agreed=0, within=True) -> Comparison:
    return Comparison(alike, rows, agreed, within, 0.0, None)


def test_where_classes_are_named_only_another_class_is_disagreement():
    assert not disagree({"y": found(rows=2, agreed=2, within=False)})
    assert disagree({"y": found(rows=2, agreed=1), "z": found()})
    assert not disagree({"y": found(rows=2, agreed=2), "features": found(within=False)})


def test_where_none_are_named_numbers_outside_the_tolerance_are():
    assert disagree({"y": found(within=False)})
    assert not disagree({"y": found()})


def test_what_cannot_be_compared_disagrees():
    assert disagree({"y": found(alike=False), "z": found(rows=1, agreed=1)})


def metadata(**post) -> bytes:
    return msgspec.json.encode({"parameters": {"postprocess": post}})


def test_class_scores_are_those_with_labels_or_those_that_look_like_it():
    scores, boxes = TensorSpec("s", "FP32", (-1, 10)), TensorSpec("b", "FP32", (-1, 4))
    image = TensorSpec("i", "FP32", (1, 3, 8, 8))
    chosen = TensorSpec("c", "INT64", (-1, 2))
    every = (scores, boxes, image, chosen)
    assert class_outputs(every, metadata(labels=["a"], output="s")) == {"s"}
    assert class_outputs(every, metadata(labels=["a"])) == {"s"}
    assert class_outputs(every, metadata(labels=[])) == {"s", "b"}
    assert class_outputs((TensorSpec("p", "FP32", (-1, 1)),), b"{}") == set()
