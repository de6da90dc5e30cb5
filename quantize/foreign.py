"""Code that is not ours: libraries that print and raise what they like, functions that users name.

Law of this file: it runs foreign code and turns what comes of it into our errors; it knows none of
the libraries. Each door says what it was doing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import EdgeError, ModelError, UsageError

MESSAGE_SIZE_MAX = 400  # characters: a library's message may quote whole graphs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is printed and logged meanwhile is dropped: stdout is for the outcome."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def ours(doing: str, source: Path) -> Iterator[None]:
    """What a library raises becomes a ModelError that says what it was doing; it is kept quiet."""
    try:
        with quiet():
            yield
    except EdgeError:
        raise
    except Exception as e:
        text = " ".join(str(e).split())[:MESSAGE_SIZE_MAX]
        raise ModelError(f"{doing}: {type(e).__name__}: {text}", where=str(source)) from e


def function(text: str, where: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        UsageError: it cannot be imported, or is none.
    """
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as e:  # the user's own code is run here
        raise UsageError(
            f"{text!r} cannot be imported: {type(e).__name__}: {e}",
            where=where,
            expected="module:function that Python finds (PYTHONPATH)",
        ) from e
    if not callable(found):
        raise UsageError(f"{text!r} is no function", where=where)
    return found  # type: ignore[no-any-return]


def code_sha256(text: str, where: str) -> str:
    """Of the file that holds `module:function`: results of other code are not taken again.

    What that file imports is not looked at. Empty for no function, or one without a file.

    Raises:
        UsageError: it cannot be imported.
    """
    code = getattr(function(text, where), "__code__", None) if text else None
    path = Path(code.co_filename) if code else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""
