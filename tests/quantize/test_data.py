"""Samples of every kind that users have: read as meant, or refused with what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import UsageError
from edge_runtime.tensors import TensorSpec
from quantize import datasets
from quantize.recipe import Data

X = np.random.Generator(np.random.PCG64(0)).random((8, 4), dtype=np.float32)
INPUT = (TensorSpec("in/put 1", "FP32", (-1, 4)),)


def saved(folder: Path, **arrays: np.ndarray) -> Data:
    np.savez(folder / "data.npz", **arrays)
    return Data(str(folder / "data.npz"))


def test_float64_and_any_memory_order_are_read_as_the_model_wants_them(tmp_path: Path) -> None:
    given = saved(tmp_path, x=np.asfortranarray(X.astype(np.float64)))
    found = datasets.load(given, INPUT)
    assert found.inputs["in/put 1"].dtype == np.float32
    assert np.array_equal(found.inputs["in/put 1"], X) and found.notes == ()


def test_pixels_given_to_a_model_of_floats_are_not_scaled_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    found = datasets.load(saved(tmp_path, x=(X * 255).astype(np.uint8)), INPUT)
    assert found.inputs["in/put 1"].max() > 100
    assert "nothing was scaled" in found.notes[0] and "uint8" in found.notes[0]
    assert found.take(np.array([0, 1])).notes == found.notes


def test_an_input_without_any_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no first axis for samples") as caught:
        datasets.load(saved(tmp_path, x=X), (TensorSpec("x", "FP32", ()),))
    assert "-1" in str(caught.value.expected) and caught.value.remedy


@pytest.mark.parametrize("shape", [(4, 4), (2, -1, 4)])
def test_a_sample_of_an_input_whose_first_axis_is_no_batch_is_all_of_it(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    specs = (TensorSpec("x", "FP32", shape),)
    whole = np.zeros((8, *(max(size, 1) for size in shape)), np.float32)
    found = datasets.load(saved(tmp_path, x=whole), specs)
    (part, *_) = datasets.batches(found.inputs, 1, specs)
    assert len(found) == 8 and part["x"].shape == whole.shape[1:]
    with pytest.raises(UsageError, match="has shape"):
        datasets.load(saved(tmp_path, x=X), specs)


def test_samples_that_are_no_numbers_are_counted_and_refused(tmp_path: Path) -> None:
    spoilt = X.copy()
    spoilt[3, 1], spoilt[5, 0] = np.nan, np.inf
    with pytest.raises(UsageError, match="2 of 8 samples"):
        datasets.load(saved(tmp_path, x=spoilt), INPUT)


def test_an_npy_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(UsageError, match="one array without a name"):
        datasets.load(Data(str(tmp_path / "x.npy")), INPUT)


CALLABLES = """
import sys
X = [[0.5] * 4] * 6
def prints():
    print("reading"); return X, [0] * 6
def raises(): raise KeyError("boom")
def leaves(): sys.exit(3)
def three(): return X, None, 3
def nothing(): return None
def ragged(): return [[1.0], [1.0, 2.0]], None
def other(): return {"a": X}, None
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "given_functions.py").write_text(CALLABLES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "given_functions", raising=False)
    return "given_functions"


def test_a_callable_may_return_lists_and_what_it_prints_stays_out_of_the_outcome(
    functions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = datasets.load(Data(f"{functions}:prints"), INPUT)
    assert found.inputs["in/put 1"].shape == (6, 4) and found.labels is not None
    said = capsys.readouterr()
    assert said.out == "" and "reading" in said.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "KeyError: 'boom'"),
        ("leaves", "SystemExit: 3"),
        ("three", "too many values"),
        ("nothing", "cannot unpack"),
        ("ragged", "inhomogeneous"),
        ("other", "no array for input 'in/put 1', only a"),
    ],
)
def test_a_callable_that_fails_is_a_usage_error_that_names_it(
    functions: str, name: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        datasets.load(Data(f"{functions}:{name}"), INPUT)
    assert caught.value.where == f"{functions}:{name}"


def pictures(folder: Path) -> None:
    for number, size in enumerate([(20, 30), (33, 17), (16, 16)]):
        Image.new("RGB", size, (200, 100, 0)).save(folder / f"{number}.png")


def test_images_of_any_size_become_the_models_and_the_note_says_how_they_were_scaled(
    tmp_path: Path,
) -> None:
    pictures(tmp_path)
    found = datasets.load(Data(str(tmp_path)), (TensorSpec("x", "FP32", (-1, 3, 16, 16)),))
    assert found.inputs["x"].shape == (3, 3, 16, 16) and found.labels is None
    assert found.inputs["x"][1, 0, 5, 5] == pytest.approx(200 / 255)
    assert "RGB 16x16" in found.notes[0]


def test_whole_pixels_reach_a_model_that_takes_them(tmp_path: Path) -> None:
    pictures(tmp_path)
    data = Data(str(tmp_path), layout="NHWC", pixel_scale=1.0)
    found = datasets.load(data, (TensorSpec("x", "UINT8", (1, 16, 16, 3)),))
    assert found.inputs["x"].dtype == np.uint8 and found.inputs["x"][0, 3, 3].tolist() == [
        200,
        100,
        0,
    ]


def test_labels_lie_beside_flat_images_by_file_name(tmp_path: Path) -> None:
    pictures(tmp_path)
    specs = (TensorSpec("x", "FP32", (-1, 3, 16, 16)),)
    (tmp_path / "labels.csv").write_text("file,class\n2.png,7\n0.png, 1\n1.png,4\n")
    found = datasets.load(Data(str(tmp_path)), specs)
    assert found.labels is not None and found.labels.tolist() == [1, 4, 7]
    (tmp_path / "labels.csv").write_text("2.png,7\n")
    with pytest.raises(UsageError, match=r"no class .* for 0.png and 1 more"):
        datasets.load(Data(str(tmp_path)), specs)
