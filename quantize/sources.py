"""Where samples come from: an .npz, a folder of images, a function of the user's.

Law of this file: it finds and reads; whether samples fit a model is decided in `datasets`. What is
larger than `rows.HELD_BYTES_MAX` is read piece by piece when it is asked for: arrays as
numpy.savez stores them, and images, of which PIXELS_HELD_BYTES_MAX stay decoded.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.errors import EdgeError, NotFoundError, UsageError
from edge_runtime.tensors import TensorSpec
from quantize import foreign, rows
from quantize import recipe as recipes
from quantize.recipe import Data
from quantize.rows import Rows, Samples

Array = np.ndarray[Any, Any]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
INPUT, LABELS, GROUPS = "x", "y", "groups"
LABELS_FILE = "labels.csv"  # beside images that lie side by side
# Decoded images that stay in memory, as whole pixels: 3,500 of 224 x 224. Decoding takes 2 ms each,
# and every variant is asked about all of them.
PIXELS_HELD_BYTES_MAX = 512 << 20


class Found(NamedTuple):
    """Samples as they were given: nothing is known yet of whether they fit.

    Attributes:
        inputs: by input name [samples, ...]. labels, groups: [samples, ...], or None.
        notes: what a reader should know of how they were read.
    """

    inputs: dict[str, Samples]
    labels: Array | None = None
    groups: Array | None = None
    notes: tuple[str, ...] = ()


def read(where: str, data: Data, specs: tuple[TensorSpec, ...]) -> Found:
    """What lies there: a path, or `module:function`.

    Raises:
        NotFoundError, UsageError: nothing does, or it cannot be read.
    """
    if recipes.is_callable(where):
        return _from_callable(where, specs)
    if Path(where).is_dir():
        return _from_images(Path(where), data, specs)
    return _from_npz(Path(where), specs)


# --- .npz -----------------------------------------------------------------------------------------


# What numpy and zipfile raise for a file that is damaged, encrypted or none of theirs.
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    struct.error,
    AttributeError,
)


def _from_npz(path: Path, specs: tuple[TensorSpec, ...]) -> Found:
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds one array without a name")
        with opened as archive:
            return _of_archive(path, archive, specs)
    except FileNotFoundError as e:
        raise NotFoundError("there are no such data", where=str(path)) from e
    except _BROKEN as e:
        raise UsageError(
            f"is not an .npz of plain arrays: {e}",
            where=str(path),
            expected=f"numpy.savez({path.name!r}, {INPUT}=inputs, {LABELS}=labels)",
        ) from e


def _of_archive(path: Path, archive: Any, specs: tuple[TensorSpec, ...]) -> Found:
    names = [spec.name for spec in specs]
    members = {name: name for name in names if name in archive.files}
    if INPUT in archive.files and len(specs) == 1 and INPUT not in names:
        members[names[0]] = INPUT
    missing = [name for name in names if name not in members]
    if missing:
        others = sorted(set(archive.files) - {LABELS, GROUPS})
        raise UsageError(
            f"has no array for input {missing[0]!r}, only {', '.join(others) or 'none'}",
            where=str(path),
            expected=f"{INPUT!r}, or one array per input: {', '.join(names)}",
        )
    labels, groups = (
        archive[name] if name in archive.files and name not in names else None
        for name in (LABELS, GROUPS)
    )
    return Found(
        {name: _member(path, archive, member) for name, member in members.items()}, labels, groups
    )


def _member(path: Path, archive: Any, name: str) -> Samples:
    """The array, or if it is large and lies in the file as it is, its samples there."""
    files = {info.filename: info for info in archive.zip.infolist()}
    info = files.get(f"{name}.npy") or files[name]
    if info.compress_type == zipfile.ZIP_STORED and info.file_size > rows.HELD_BYTES_MAX:
        found = _on_disk(path, info)
        if found is not None:
            return found
    array: Array = archive[name]
    return array


def _on_disk(path: Path, info: zipfile.ZipInfo) -> Rows | None:
    """The member's samples where they lie; None for an order that has none side by side."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # ends in the sizes of name and extra field (zip, 4.3.7)
        file.seek(info.header_offset + 30 + sum(struct.unpack("<HH", header[26:])))
        headers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        reader = headers.get(np.lib.format.read_magic(file))
        if reader is None:
            return None
        shape, is_fortran, dtype = reader(file)
        start = file.tell()
    if is_fortran or dtype.hasobject or not shape:
        return None
    size = math.prod(shape[1:]) * dtype.itemsize
    known = _identity(path)

    def read(indices: Array) -> Array:
        found = np.empty((len(indices), *shape[1:]), dtype)
        if _identity(path) != known:
            raise UsageError("was changed while it was read", where=str(path))
        with path.open("rb") as opened:
            for first, last in _runs(indices):
                opened.seek(start + int(indices[first]) * size)
                part = found[first:last].reshape(-1).view(np.uint8)
                if opened.readinto(part.data) != len(part):
                    raise UsageError("became shorter while it was read", where=str(path))
        return found

    return Rows(read, shape, dtype)


def _identity(path: Path) -> tuple[int, ...]:
    """Other figures are another content. Raises: UsageError where the file is gone."""
    try:
        found = path.stat()
    except OSError as e:
        raise UsageError(f"cannot be read any more: {e.strerror}", where=str(path)) from e
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _runs(indices: Array) -> list[tuple[int, int]]:
    """Where indices follow one another: (first, last + 1) of each run."""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(indices)], strict=True))


# --- a function -----------------------------------------------------------------------------------


def _from_callable(text: str, specs: tuple[TensorSpec, ...]) -> Found:
    function = foreign.function(text, "data")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the outcome
            inputs, labels, *more = function()
        if len(more) > 1:
            raise ValueError(f"too many values: {2 + len(more)}")
        given = inputs if isinstance(inputs, dict) else {specs[0].name: inputs}
        arrays: dict[str, Samples] = {str(key): np.asarray(one) for key, one in given.items()}
        labels, groups = (
            None if one is None else np.asarray(one) for one in (labels, *(more or [None]))
        )
    except (KeyboardInterrupt, EdgeError):
        raise
    except BaseException as e:  # the user's own code, which may raise or exit as it likes
        raise UsageError(
            f"failed: {type(e).__name__}: {e}",
            where=text,
            expected="(inputs, labels or None) or (inputs, labels, groups); inputs an array, or one"
            " array per input by name",
        ) from e
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if missing:
        raise UsageError(
            f"returned no array for input {missing[0]!r}, only {', '.join(arrays) or 'none'}",
            where=text,
            expected=", ".join(spec.name for spec in specs),
        )
    return Found(arrays, labels, groups)


# --- images ---------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A file and what its place says of it; group: empty if it belongs to no other."""

    file: Path
    label: int
    group: str = ""


def _from_images(folder: Path, data: Data, specs: tuple[TensorSpec, ...]) -> Found:
    """One folder per class (labels by sorted name), or images side by side (labels.csv, if any)."""
    if len(specs) != 1:
        raise UsageError(
            f"the model has {len(specs)} inputs", where=str(folder), expected="one, for images"
        )
    classes, missed = _folders(folder), ""
    if classes:
        found = [one for number, entry in enumerate(classes) for one in _of_class(entry, number)]
    elif (folder / LABELS_FILE).exists():
        found, missed = _listed(_images(folder), folder / LABELS_FILE)
    else:
        found = [Picture(file, 0) for file in _images(folder)]
    if not found:
        raise UsageError(
            "holds no images",
            where=str(folder),
            expected="files ending in " + ", ".join(IMAGE_ENDINGS),
        )
    shape = _image_shape(specs[0], data, folder)
    pictures = _Pictures([one.file for one in found], data, shape, _pixel_type(specs[0], data))
    has_labels = bool(classes) or (folder / LABELS_FILE).exists()
    note = (
        f"images were given as {data.color} {shape[1]}x{shape[0]}, pixels * {data.pixel_scale:.4g}"
        f" - {list(data.mean)}, / {list(data.std)}; another scale goes into a recipe's data"
    )
    return Found(
        {specs[0].name: rows.held_if_small(pictures.rows())},
        np.array([one.label for one in found]) if has_labels else None,
        _groups_of(found),
        (note, missed) if missed else (note,),
    )


def _of_class(folder: Path, number: int) -> list[Picture]:
    """Images of a class; those in a folder of their own inside it are a group of its name."""
    found = [Picture(file, number) for file in _images(folder)]
    for inner in _folders(folder):
        found += [Picture(file, number, inner.name) for file in _images(inner)]
    return found


def _groups_of(found: Sequence[Picture]) -> Array | None:
    """A name for each image; one that says no group is alone in one. None where none says any."""
    if not any(one.group for one in found):
        return None
    # No file is called as a group is: a name has no slash.
    return np.array([one.group or f"/{place}" for place, one in enumerate(found)])


def _listed(files: Sequence[Path], path: Path) -> tuple[list[Picture], str]:
    """Images with class and group, from lines `file,class[,group]` (class: a number).

    And a note of lines without an image; empty if there are none.
    """
    try:
        lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        known = {
            line[0].strip(): (int(line[1]), line[2].strip() if len(line) > 2 else "")
            for line in lines
            if line[1].strip().isdigit()
        }
    except (OSError, UnicodeDecodeError, IndexError) as e:
        raise UsageError(
            f"cannot be read: {e}", where=str(path), expected="lines of file,class[,group]"
        ) from e
    missing = [file.name for file in files if file.name not in known]
    if missing:
        raise UsageError(
            f"names no class (a number) for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=str(path),
            expected="a line file,class for every image",
        )
    absent = sorted(known.keys() - {file.name for file in files})
    note = f"{path.name} names {len(absent)} images that are not there: {', '.join(absent[:3])}"
    return [Picture(file, *known[file.name]) for file in files], note if absent else ""


# Hidden entries are other programs' (.thumbnails, ._cat.jpg): as a class one would move all others.
def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in _shown(folder) if one.is_dir())


def _images(folder: Path) -> list[Path]:
    return sorted(one for one in _shown(folder) if one.suffix.lower() in IMAGE_ENDINGS)


def _shown(folder: Path) -> Iterator[Path]:
    return (one for one in folder.iterdir() if not one.name.startswith("."))


def _pixel_type(spec: TensorSpec, data: Data) -> Any:
    """Whole pixels for a model that takes whole pixels; else floats."""
    untouched = data.pixel_scale == 1 and not any(data.mean) and set(data.std) == {1.0}
    return np.uint8 if spec.datatype == "UINT8" and untouched else np.float32


def _image_shape(spec: TensorSpec, data: Data, folder: Path) -> tuple[int, int]:
    """Height and width."""
    sizes = spec.shape[2:4] if data.layout == "NCHW" else spec.shape[1:3]
    height, width = (
        data.height or (sizes[0] if len(sizes) == 2 else -1),
        data.width or (sizes[1] if len(sizes) == 2 else -1),
    )
    if height < 1 or width < 1:
        raise UsageError(
            f"the model's input {spec.name!r} {list(spec.shape)} does not say the size of an image",
            where=str(folder),
            remedy="give data.width and data.height",
        )
    return height, width


class _Pictures:
    """Images as a model takes them, decoded when they are asked for."""

    def __init__(
        self, files: Sequence[Path], data: Data, shape: tuple[int, int], dtype: Any
    ) -> None:
        self._files, self._data, self._shape, self._dtype = files, data, shape, dtype
        self._kept: dict[int, Array] = {}
        self._left_bytes = PIXELS_HELD_BYTES_MAX

    def rows(self) -> Rows:
        channels = 1 if self._data.color == "L" else 3
        for key, values in (("mean", self._data.mean), ("std", self._data.std)):
            if len(values) not in (1, channels):
                raise UsageError(
                    f"{len(values)} values", where=f"data.{key}", expected=f"1 or {channels}"
                )
        one = (channels, *self._shape) if self._data.layout == "NCHW" else (*self._shape, channels)
        return Rows(self._read, (len(self._files), *one), self._dtype)

    def _read(self, indices: Array) -> Array:
        return np.stack([self._scaled(self._pixels(int(index))) for index in indices])

    def _pixels(self, index: int) -> Array:
        """UINT8 [height, width, channels]."""
        kept = self._kept.get(index)
        if kept is None:
            kept = _decoded(self._files[index], self._data, self._shape)
            if kept.nbytes <= self._left_bytes:
                self._left_bytes -= kept.nbytes
                self._kept[index] = kept
        return kept

    def _scaled(self, pixels: Array) -> Array:
        if self._dtype != np.uint8:
            mean, std = (np.array(one, np.float32) for one in (self._data.mean, self._data.std))
            scale = np.float32(self._data.pixel_scale)
            pixels = np.asarray((pixels.astype(np.float32) * scale - mean) / std)
        return pixels.transpose(2, 0, 1) if self._data.layout == "NCHW" else pixels


def _decoded(file: Path, data: Data, shape: tuple[int, int]) -> Array:
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
            pixels = np.array(picture, dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as e:
        raise UsageError(f"is no image that can be read: {e}", where=str(file)) from e
    pixels = pixels.reshape(*shape, -1)
    return pixels[..., ::-1] if data.color == "BGR" else pixels
