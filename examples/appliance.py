"""A daemon of its own for one example: made, filled with bundles, stopped.

Law of this file: what the examples share, by the same command and client that anyone uses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.client import Client
from examples import demo

TIMEOUT_S = 30.0


def create(out: Path, *words: object) -> Path:
    """`edge-runtime bundle create WORDS -o out`."""
    demo.Edge(out.parent)("bundle", "create", *words, "-o", out)
    return out


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for the example; its path is short, for a socket's name has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="edge-example-") as name:
        yield Path(name)


@contextmanager
def serving(directory: Path, *bundles: Path) -> Iterator[Client]:
    """A client of a daemon in `directory` that serves these bundles."""
    run_dir = directory / "run"
    with demo.daemon(directory, run_dir):
        for bundle in bundles:
            demo.Edge(run_dir)("install", bundle, "--activate")
        with Client(str(run_dir / "infer.sock"), timeout_s=TIMEOUT_S) as client:
            yield client
