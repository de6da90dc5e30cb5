"""Samples of every kind that users have: read as meant, or refused with what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from edge_runtime.errors import UsageError
from edge_runtime.tensors import TensorSpec
from quantize import datasets, rows, sources
from quantize.recipe import Data
from quantize.rows import Rows

X = np.random.Generator(np.random.PCG64(0)).random((8, 4), dtype=np.float32)
INPUT = (TensorSpec("in/put 1", "FP32", (-1, 4)),)


def saved(folder: Path, **arrays: np.ndarray) -> Data:
    np.savez(folder / "data.npz", **arrays)
    return Data(str(folder / "data.npz"))


def test_float64_and_any_memory_order_are_read_as_the_model_wants_them(tmp_path: Path) -> None:
    data = saved(tmp_path, x=np.asfortranarray(X.astype(np.float64)))
    found = datasets.load(data, INPUT)
    assert found.inputs["in/put 1"].dtype == np.float32
    assert np.array_equal(found.inputs["in/put 1"], X) and found.notes == ()


def test_pixels_given_to_a_model_of_floats_are_not_scaled_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    found = datasets.load(saved(tmp_path, x=(X * 255).astype(np.uint8)), INPUT)
    assert found.inputs["in/put 1"].max() > 100
    assert "nothing was scaled" in found.notes[0] and "uint8" in found.notes[0]
    assert found.take(np.array([0, 1])).notes == found.notes


def test_an_input_without_any_axis_has_one_value_a_sample_or_one_for_all(tmp_path: Path) -> None:
    specs = (TensorSpec("x", "FP32", (1, 4)), TensorSpec("rate", "INT64", ()))
    for rate in (np.full(8, 16_000), np.array(16_000)):
        found = datasets.load(saved(tmp_path, x=X, rate=rate), specs)
        (first, *_) = datasets.batches(found.inputs, 1, specs)
        assert first["rate"].shape == () and first["rate"] == 16_000 and len(found) == 8
        assert first["x"].shape == (1, 4)
    with pytest.raises(UsageError, match="has shape") as caught:
        datasets.load(saved(tmp_path, x=X, rate=np.zeros((8, 2), int)), specs)
    assert caught.value.expected == "[samples]"


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
def four(): return X, None, None, 4
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
        ("four", "too many values"),
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
    assert found.groups is None
    (tmp_path / "labels.csv").write_text("2.png,7\n0.png,1\n1.png,4\nlost.png,2\n")
    notes = datasets.load(Data(str(tmp_path)), specs).notes
    assert any("names 1 images that are not there: lost.png" in one for one in notes)
    (tmp_path / "labels.csv").write_text("file,class,group\n2.png,7,a\n0.png, 1,a\n1.png,4\n")
    grouped = datasets.load(Data(str(tmp_path)), specs).groups
    assert grouped is not None and grouped[0] == grouped[2] != grouped[1]
    (tmp_path / "labels.csv").write_text("2.png,7\n")
    with pytest.raises(UsageError, match=r"no class .* for 0.png and 1 more"):
        datasets.load(Data(str(tmp_path)), specs)


def test_hidden_folders_are_no_class_and_hidden_files_no_image(tmp_path: Path) -> None:
    for place in (".thumbnails", "a", "b", "b/.cache"):
        (tmp_path / place).mkdir(parents=True)
        pictures(tmp_path / place)
    (tmp_path / "a" / "._0.png").write_bytes(b"another program's")
    found = datasets.load(Data(str(tmp_path)), (TensorSpec("x", "FP32", (-1, 3, 16, 16)),))
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_folder_inside_a_class_is_a_group_and_other_images_are_alone(tmp_path: Path) -> None:
    for place in ("a", "a/tom", "b/tom", "b/ann"):
        (tmp_path / place).mkdir(parents=True)
        pictures(tmp_path / place)
    found = datasets.load(Data(str(tmp_path)), (TensorSpec("x", "FP32", (-1, 3, 16, 16)),))
    assert found.labels is not None and found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.groups is not None and found.units == 5
    tom = found.groups[3]
    assert np.flatnonzero(found.groups == tom).tolist() == [3, 4, 5, 9, 10, 11]


# --- more than fits into memory -------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "HELD_BYTES_MAX", 0)
    monkeypatch.setattr(rows, "PIECE_BYTES", 100)


def test_samples_of_a_large_file_are_read_where_they_lie(
    tmp_path: Path, little_memory: None
) -> None:
    data = saved(tmp_path, x=X.astype(np.float64), y=np.arange(8))
    found = datasets.load(data, INPUT)
    lazy = found.inputs["in/put 1"]
    assert isinstance(lazy, Rows) and lazy.shape == (8, 4) and lazy.dtype == np.float32
    for which in (slice(None), slice(2, 5), np.array([5, 1, 2, 2]), 3, -1, slice(0, 0)):
        assert np.array_equal(lazy[which], X[which])
    taken = found.take(np.array([6, 0, 3])).take(np.array([2, 0]))
    assert np.array_equal(taken.inputs["in/put 1"][:], X[[3, 6]])
    assert taken.labels is not None and taken.labels.tolist() == [3, 6]
    assert found.feeds["in/put 1"].flags.c_contiguous


def test_where_samples_lie_changes_nothing_that_is_said_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(tmp_path, x=X, y=np.arange(8) % 2)
    held = datasets.split(datasets.load(data, INPUT), None, 3, 1, 4, 2)
    monkeypatch.setattr(rows, "HELD_BYTES_MAX", 0)
    lazy = datasets.split(datasets.load(data, INPUT), None, 3, 1, 4, 2)
    for one, other in zip(held[:2], lazy[:2], strict=True):
        assert datasets.fingerprint(one) == datasets.fingerprint(other)
    assert isinstance(lazy.evaluation.inputs["in/put 1"], Rows)
    assert isinstance(lazy.calibration.inputs["in/put 1"], np.ndarray)


def test_what_is_compressed_or_in_another_order_is_held(
    tmp_path: Path, little_memory: None
) -> None:
    np.savez_compressed(tmp_path / "z.npz", x=X)
    assert np.array_equal(datasets.load(Data(str(tmp_path / "z.npz")), INPUT).inputs["in/put 1"], X)
    data = saved(tmp_path, x=np.asfortranarray(X))
    assert np.array_equal(datasets.load(data, INPUT).inputs["in/put 1"], X)


def test_faults_of_samples_that_are_read_later_are_found_before_any_work(
    tmp_path: Path, little_memory: None
) -> None:
    spoilt = X.copy()
    spoilt[5, 0] = np.inf
    lazy = datasets.load(saved(tmp_path, x=spoilt), INPUT)
    with pytest.raises(UsageError, match="NaN or infinity"):
        datasets.split(lazy, None, 3, 0, 0, 0)
    whole = datasets.load(saved(tmp_path, x=X), INPUT)
    path = tmp_path / "data.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match="was changed"):
        datasets.known(whole)


def test_images_are_decoded_when_they_are_asked_for_and_some_stay(
    tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path)
    monkeypatch.setattr(sources, "PIXELS_HELD_BYTES_MAX", 2 * 16 * 16 * 3)
    read: list[Path] = []
    real = sources._decoded

    def counted(file: Path, *more: Any) -> Any:
        read.append(file)
        return real(file, *more)

    monkeypatch.setattr(sources, "_decoded", counted)
    found = datasets.load(Data(str(tmp_path)), (TensorSpec("x", "FP32", (-1, 3, 16, 16)),))
    assert read == []
    assert found.inputs["x"][:].shape == (3, 3, 16, 16) and len(read) == 3
    assert found.inputs["x"][1][0, 5, 5] == pytest.approx(200 / 255) and len(read) == 3
    assert found.inputs["x"][2].shape == (3, 16, 16) and len(read) == 4  # the third did not stay


@given(
    st.lists(st.integers(-9, 8), max_size=12),
    st.slices(9),
    hnp.array_shapes(min_dims=0, max_dims=2, max_side=3),
)
def test_rows_are_indexed_as_arrays_are(
    chosen: list[int], part: slice, shape: tuple[int, ...]
) -> None:
    whole = np.arange(9 * max(int(np.prod(shape)), 1), dtype=np.float32).reshape(9, *shape)
    lazy = Rows(lambda i: whole[i], whole.shape, whole.dtype)
    indices = np.array(chosen, dtype=int)
    assert np.array_equal(lazy[indices], whole[indices])
    assert np.array_equal(lazy[part], whole[part])
    assert np.array_equal(lazy.taken(indices)[:], whole[indices])
    assert np.array_equal(np.concatenate(list(rows.pieces(lazy))), whole)


def test_samples_for_a_model_that_takes_several_at_a_time_are_refused_with_what_to_do(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="has shape") as caught:
        datasets.load(saved(tmp_path, x=X), (TensorSpec("x", "FP32", (4, 4)),))
    assert "4 samples at a time" in caught.value.remedy


@pytest.mark.parametrize("shape", [(50, 40, 40, 3), (7, 1000), (1000,), (64, 32, 32, 64)])
@pytest.mark.parametrize("most", [1000, 30_000, 1 << 20])
def test_a_part_of_the_values_shows_all_channels_alike(shape: tuple[int, ...], most: int) -> None:
    channels = np.broadcast_to(np.arange(shape[-1]), shape)
    few = rows.thinned(channels, most)
    assert len(few) <= most and len(few) >= min(channels.size, most) / 2
    if len(few) > 20 * shape[-1]:
        counts = np.bincount(few, minlength=shape[-1])
        assert counts.min() > 0.8 * counts.max()


def test_a_file_that_changes_during_the_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "HELD_BYTES_MAX", 1000)
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((100, 50), np.float32))
    found = datasets.load(Data(str(path)), (TensorSpec("x", "FP32", (-1, 50)),))
    assert found.inputs["x"][3].max() == 0
    np.savez(tmp_path / "new.npz", x=np.ones((100, 50), np.float32))
    (tmp_path / "new.npz").replace(path)
    with pytest.raises(UsageError, match="was changed"):
        found.inputs["x"][3]
    path.unlink()
    with pytest.raises(UsageError, match="any more"):
        found.inputs["x"][3]


@pytest.mark.parametrize("place", [60, 300, 2000])
def test_a_damaged_file_is_named(tmp_path: Path, place: int) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.Generator(np.random.PCG64(0)).random((100, 50)))
    damaged = bytearray(path.read_bytes())
    for index in range(place, place + 8):
        damaged[index] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match="plain arrays"):
        datasets.load(Data(str(path)), (TensorSpec("x", "FP32", (-1, 50)),))
