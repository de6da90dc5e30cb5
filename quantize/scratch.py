"""Where intermediate models are kept: named by what made them, so that nothing is made twice.

Law of this file: keys and paths. A file is complete or absent: it is written under another name
first. What made a file is the source's hash, the passes with their options, the calibration set's
hash, the versions of the libraries that the passes use, and our own code: what an older version of
it made or measured is not taken for this one's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edge_runtime
from edge_runtime.errors import StorageError

# What decides results: this package without what only shows them, and what runs models.
CODE = (Path(__file__).parent, Path(edge_runtime.__file__).parent / "backends")
SHOWING = ("cli", "report")


class Scratch:
    """A folder of finished intermediate files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _stored(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def made(self, key: str, ending: str, make: Callable[[Path], None]) -> Path:
        """The file of that key; `make` writes it if it is not there yet.

        Raises:
            StorageError: it cannot be written. Whatever `make` raises.
        """
        path = self.folder / f"{key}{ending}"
        if path.exists():
            return path
        with _stored(self.folder), tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            draft = Path(temporary) / f"draft{ending}"
            make(draft)
            draft.replace(path)
        return path


@contextlib.contextmanager
def _stored(folder: Path) -> Iterator[None]:
    """What the system says of a folder that cannot be written becomes ours."""
    try:
        yield
    except OSError as e:
        if e.errno not in _OF_THE_DISK:
            raise
        raise StorageError(
            f"cannot be written: {e.strerror}",
            where=str(folder),
            remedy="the same command goes on from what is in --work",
        ) from e


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR)


def key(*parts: Any) -> str:
    """A short name for what `parts` say; the same parts and code give the same name."""
    text = json.dumps([_code(), parts], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def _code() -> str:
    """Of the code that runs."""
    return code_sha256(CODE)


def code_sha256(folders: Sequence[Path]) -> str:
    """Of our version and all Python files in the folders but those in a folder of SHOWING."""
    found = hashlib.sha256(edge_runtime.__version__.encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            if name.parts[0] not in SHOWING:
                found.update(f"\0{folder.name}/{name}\0".encode() + path.read_bytes())
    return found.hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
