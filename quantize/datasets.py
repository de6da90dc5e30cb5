"""Samples: arrays by input name, with labels or without, and which of them are for what.

Law of this file: it reads data and nothing else; what a pixel becomes is said by the recipe. Every
sample has the first axis to itself; a model's batch axis is not assumed. Selection is by seed, so
that the same recipe sees the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import EdgeError, NotFoundError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import foreign
from quantize import recipe as recipes
from quantize.recipe import Data

Array = np.ndarray[Any, Any]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
INPUT, LABELS = "x", "y"
LABELS_FILE = "labels.csv"  # beside images that lie side by side
# Keeps the hash of a large data set to seconds; the shapes and both ends are in it anyway.
FINGERPRINT_BYTES_MAX = 1 << 30


class Dataset(NamedTuple):
    """Samples with their labels.

    Attributes:
        inputs: per input name an array [samples, ...].
        labels: [samples] or [samples, ...]; None: there are none.
        where: what it was read from, for messages.
        notes: what a reader should know of how it was read.
    """

    inputs: dict[str, Array]
    labels: Array | None
    where: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, chosen: Array) -> Dataset:
        """The samples at these indices."""
        return Dataset(
            {name: array[chosen] for name, array in self.inputs.items()},
            None if self.labels is None else self.labels[chosen],
            self.where,
            self.notes,
        )

    def labelled(self, labels: Array | None) -> Dataset:
        """The same samples with other labels."""
        return Dataset(self.inputs, labels, self.where, self.notes)


class Split(NamedTuple):
    """What calibrates and what judges; no sample is in both."""

    calibration: Dataset
    evaluation: Dataset
    notes: tuple[str, ...] = ()


def load(data: Data, specs: tuple[TensorSpec, ...], path: str = "") -> Dataset:
    """The samples that a recipe names, fitted to the model's inputs.

    Args:
        specs: the model's inputs; a sample is what one of them is without its batch axis, or with
            it when that is 1. Where the first axis is fixed to more (a state), a sample is all.
        path: another place than `data.path` (the calibration set).

    Raises:
        NotFoundError, UsageError: there are none, or they do not fit.
    """
    where = path or data.path
    if recipes.is_callable(where):
        found = _from_callable(where, specs)
    elif Path(where).is_dir():
        found = _from_images(Path(where), data, specs)
    else:
        found = _from_npz(Path(where), specs)
    return _fitted(found, specs)


def split(
    whole: Dataset,
    calibration: Dataset | None,
    samples: int,
    seed: int,
    judged: int,
    judge_seed: int,
) -> Split:
    """Calibration samples and evaluation samples that have nothing in common.

    Args:
        calibration: its own set; None: `samples` of `whole`, which evaluation leaves out.
        judged: at most so many are evaluated; 0: all that are left.

    Raises:
        UsageError: too few samples.
    """
    notes: list[str] = []
    if calibration is None:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(whole))
        if len(whole) < 2:
            raise UsageError(
                f"{len(whole)} samples", where=whole.where, expected="two at the very least"
            )
        count = min(samples, max(len(whole) // 3, 1))  # most are for judging
        if count < samples:
            notes.append(f"calibrated with {count} samples: a third of the {len(whole)} there are")
        calibration, rest = whole.take(np.sort(order[:count])), whole.take(np.sort(order[count:]))
    else:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(calibration))
        if len(calibration) < samples:
            notes.append(f"calibrated with {len(calibration)} samples: all there are")
        calibration, rest = calibration.take(np.sort(order[:samples])), whole
    if judged and judged < len(rest):
        chosen = np.random.Generator(np.random.PCG64(judge_seed)).permutation(len(rest))[:judged]
        rest = rest.take(np.sort(chosen))
    return Split(calibration, rest, tuple(notes))


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What a manifest says of the calibration set: count, sha256, and range by input."""
    digest, budget = hashlib.sha256(), FINGERPRINT_BYTES_MAX
    for name, array in sorted(data.inputs.items()):
        raw = tensors.to_bytes(array)[:budget]
        budget -= len(raw)
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(raw)
    ranges = {
        name: [float(array.min()), float(array.max())]
        for name, array in data.inputs.items()
        if array.dtype.kind in "biuf" and array.size
    }
    return {"samples": len(data), "sha256": digest.hexdigest(), "range": ranges}


def batches(
    inputs: dict[str, Array], rows: int, specs: tuple[TensorSpec, ...]
) -> Iterator[dict[str, Array]]:
    """Consecutive samples, at most `rows` at a time, as a model with these inputs takes them."""
    count = len(next(iter(inputs.values())))
    for first in range(0, count, rows):
        part = {name: array[first : first + rows] for name, array in inputs.items()}
        yield fed(part, specs)


def fed(part: dict[str, Array], specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Samples as a run takes them: without the samples' axis where an input has none (a state)."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    return {
        name: array[0] if array.ndim == ranks.get(name, array.ndim) + 1 else array
        for name, array in part.items()
    }


# --- where they come from -------------------------------------------------------------------------


def _from_npz(path: Path, specs: tuple[TensorSpec, ...]) -> Dataset:
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds one array without a name")
        with opened as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as e:
        raise NotFoundError("there are no such data", where=str(path)) from e
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise UsageError(
            f"is not an .npz of plain arrays: {e}",
            where=str(path),
            expected=f"numpy.savez({path.name!r}, {INPUT}=inputs, {LABELS}=labels)",
        ) from e
    labels = arrays.pop(LABELS, None)
    names = [spec.name for spec in specs]
    if INPUT in arrays and len(specs) == 1 and INPUT not in names:
        arrays[names[0]] = arrays.pop(INPUT)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UsageError(
            f"has no array for input {missing[0]!r}, only {', '.join(sorted(arrays)) or 'none'}",
            where=str(path),
            expected=f"{INPUT!r}, or one array per input: {', '.join(names)}",
        )
    return Dataset({name: arrays[name] for name in names}, labels, str(path))


def _from_callable(text: str, specs: tuple[TensorSpec, ...]) -> Dataset:
    function = foreign.function(text, "data")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the outcome
            inputs, labels = function()
        given = inputs if isinstance(inputs, dict) else {specs[0].name: inputs}
        arrays = {str(key): np.asarray(value) for key, value in given.items()}
        labels = None if labels is None else np.asarray(labels)
    except (KeyboardInterrupt, EdgeError):
        raise
    except BaseException as e:  # the user's own code, which may raise or exit as it likes
        raise UsageError(
            f"failed: {type(e).__name__}: {e}",
            where=text,
            expected="(inputs, labels or None); inputs an array, or one array per input by name",
        ) from e
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"returned no array for input {missing[0]!r}, only {', '.join(arrays) or 'none'}",
            where=text,
            expected=", ".join(spec.name for spec in specs),
        )
    return Dataset(arrays, labels, text)


def _from_images(folder: Path, data: Data, specs: tuple[TensorSpec, ...]) -> Dataset:
    """One folder per class (labels by sorted name), or images side by side (labels.csv, if any)."""
    if len(specs) != 1:
        raise UsageError(
            f"the model has {len(specs)} inputs", where=str(folder), expected="one, for images"
        )
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    groups = [(number, _images(entry)) for number, entry in enumerate(classes)]
    if not classes:
        groups = [(0, _images(folder))]
    files = [(number, file) for number, some in groups for file in some]
    if not files:
        raise UsageError(
            "holds no images",
            where=str(folder),
            expected="files ending in " + ", ".join(IMAGE_ENDINGS),
        )
    shape = _image_shape(specs[0], data, folder)
    first = _read_image(files[0][1], data, shape)
    pixels = np.empty((len(files), *first.shape), _pixel_type(specs[0], data))
    for place, (_, file) in enumerate(files):
        pixels[place] = _read_image(file, data, shape)
    labels = np.array([number for number, _ in files]) if classes else None
    if not classes and (folder / LABELS_FILE).exists():
        labels = _labels_of([file.name for _, file in files], folder / LABELS_FILE)
    note = (
        f"images were given as {data.color} {shape[1]}x{shape[0]}, pixels * {data.pixel_scale:.4g}"
        f" - {list(data.mean)}, / {list(data.std)}; another scale goes into a recipe's data"
    )
    return Dataset({specs[0].name: pixels}, labels, str(folder), (note,))


def _pixel_type(spec: TensorSpec, data: Data) -> Any:
    """Whole pixels for a model that takes whole pixels; else floats, which `_fit` judges."""
    untouched = data.pixel_scale == 1 and not any(data.mean) and set(data.std) == {1.0}
    return np.uint8 if spec.datatype == "UINT8" and untouched else np.float32


def _labels_of(names: list[str], path: Path) -> Array:
    """Labels of images in the order of `names`, from lines `file,class` (a number)."""
    try:
        rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        known = {row[0].strip(): int(row[1]) for row in rows if row[1].strip().isdigit()}
    except (OSError, UnicodeDecodeError, IndexError) as e:
        raise UsageError(
            f"cannot be read: {e}", where=str(path), expected="lines of file,class"
        ) from e
    missing = [name for name in names if name not in known]
    if missing:
        raise UsageError(
            f"names no class (a number) for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=str(path),
            expected="a line file,class for every image",
        )
    return np.array([known[name] for name in names])


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)


def _image_shape(spec: TensorSpec, data: Data, folder: Path) -> tuple[int, int]:
    """Height and width."""
    rows = spec.shape[2:4] if data.layout == "NCHW" else spec.shape[1:3]
    height, width = (
        data.height or (rows[0] if len(rows) == 2 else -1),
        data.width or (rows[1] if len(rows) == 2 else -1),
    )
    if height < 1 or width < 1:
        raise UsageError(
            f"the model's input {spec.name!r} {list(spec.shape)} does not say the size of an image",
            where=str(folder),
            remedy="give data.width and data.height",
        )
    return height, width


def _read_image(file: Path, data: Data, shape: tuple[int, int]) -> Array:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as e:
        raise UsageError(
            "images need Pillow", where=str(file), remedy="pip install 'edge-runtime[image]'"
        ) from e
    try:
        with Image.open(file) as opened:
            mode = "L" if data.color == "L" else "RGB"
            picture = opened.convert(mode).resize(shape[::-1], Image.Resampling.BILINEAR)
            pixels = np.asarray(picture, dtype=np.float32)
    except (OSError, UnidentifiedImageError) as e:
        raise UsageError(f"is no image that can be read: {e}", where=str(file)) from e
    pixels = pixels.reshape(*shape, -1)
    if data.color == "BGR":
        pixels = pixels[..., ::-1]
    mean, std = (np.array(one, dtype=np.float32) for one in (data.mean, data.std))
    pixels = np.asarray((pixels * np.float32(data.pixel_scale) - mean) / std)
    return pixels.transpose(2, 0, 1) if data.layout == "NCHW" else pixels


def _fitted(data: Dataset, specs: tuple[TensorSpec, ...]) -> Dataset:
    """As the model wants them: [samples, *shape without the batch axis], right datatype.

    Integers become the model's float exactly where the model wants floats; no other conversion is
    made, and nothing is scaled: a scale that nobody stated is how answers become wrong.
    """
    count = {len(array) if array.ndim else 0 for array in data.inputs.values()}
    if data.labels is not None:
        count.add(len(data.labels) if data.labels.ndim else 0)
    if len(count) != 1 or 0 in count:
        raise UsageError(
            f"arrays hold {', '.join(map(str, sorted(count)))} samples",
            where=data.where,
            expected="the same number, at least one, in all",
        )
    inputs = {spec.name: _fit(data.inputs[spec.name], spec, data.where) for spec in specs}
    notes = tuple(
        f"{spec.name!r} is {data.inputs[spec.name].dtype} and was given to the model as {one.dtype}"
        f" of {one.min():g} to {one.max():g}; nothing was scaled"
        for spec, one in ((spec, inputs[spec.name]) for spec in specs)
        if data.inputs[spec.name].dtype.kind in "iu" and one.dtype.kind == "f"
    )
    return Dataset(inputs, data.labels, data.where, (*data.notes, *notes))


def _fit(array: Array, spec: TensorSpec, where: str) -> Array:
    if spec.datatype == "BF16" or spec.datatype == "BYTES":
        raise UsageError(f"input {spec.name!r} is {spec.datatype}", where=where, expected="numbers")
    wanted = np.dtype(tensors.DATATYPES[spec.datatype][0])
    if array.dtype != wanted:
        if not (wanted.kind == "f" and array.dtype.kind in "fiu") and not (
            wanted.kind in "iu" and array.dtype.kind in "iu"
        ):
            raise UsageError(
                f"{spec.name!r} has dtype {array.dtype}", where=where, expected=str(wanted)
            )
        converted = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(converted, array):
            raise UsageError(f"{spec.name!r} does not fit {wanted}", where=where)
        array = converted
    if wanted.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array).reshape(len(array), -1).all(axis=1)).sum())
        raise UsageError(
            f"{spec.name!r} holds NaN or infinity in {bad} of {len(array)} samples",
            where=where,
            expected="numbers: one of these would spoil every range that is calibrated",
        )
    if not spec.shape:
        raise UsageError(
            f"input {spec.name!r} {list(spec.shape)} has no first axis for samples",
            where=where,
            expected="a first axis that is free (-1) or 1, or a fixed shape (a state)",
            remedy="export the model with such an axis",
        )
    # Where the first axis is fixed to more than 1, as of a state, a sample is all of it.
    one = spec.shape[1:] if spec.shape[0] in (-1, 1) else spec.shape
    if not tensors.shape_matches(array.shape[1:], one):
        if tensors.shape_matches(array.shape[1:], spec.shape) and array.shape[1] == 1:
            return array[:, 0]  # each sample came with a batch axis of its own
        raise UsageError(
            f"{spec.name!r} has shape {list(array.shape)}",
            where=where,
            expected=f"[samples, {', '.join(map(str, one))}] (-1: any size)",
        )
    return array
