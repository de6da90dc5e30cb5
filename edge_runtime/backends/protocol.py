"""What a backend must be: two small protocols, five verbs together with their attributes; and one
verb more that a backend may have.

Law of this file: no backend library is imported here, and nothing here knows which ones exist (the
table is in `backends/__init__.py`). A backend runs inside a worker process, or in a builder's; it
never runs in the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Placement(msgspec.Struct, frozen=True):
    """Where a loaded model really runs."""

    device: str  # "CPU", "NPU", ...
    detail: str = ""  # provider, device string or delegate
    nodes: int = 0  # graph nodes placed there; 0: not known


class Model(Protocol):
    """A loaded model. Calls may come from several threads at once unless `concurrent` is false.

    `keeps_state`: the answer of a binding depends on what was asked before; `run` stands alone all
    the same. `facts`: what clients may want to know beside the signature, JSON values only; they
    become parameters of the model's metadata.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    concurrent: bool
    keeps_state: bool
    facts: Mapping[str, Any]
    placement: tuple[Placement, ...]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the inputs; arrays are fresh and the caller's.

        Raises:
            RequestError: an input is missing, unknown, or of another datatype or shape.
            BackendError: the library failed.
        """

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]
    ) -> Callable[[], dict[str, Array]]:
        """Bind memory once, run many times.

        Args:
            inputs: C-contiguous arrays that are read anew at each run; the caller keeps them alive.
            outputs: the outputs wanted. An array is written in place at each run (its shape and
                datatype must be what the model gives); None: the backend allocates.

        Returns:
            A callable that runs the model and returns every wanted output. For bound outputs these
            are the caller's own arrays; the others are valid until the next call. One thread calls
            it at a time.

        Raises:
            RequestError, BackendError: as `run`, here or in the returned callable.
        """


class BlobCache(Protocol):
    """What was compiled from one artifact on this device, by earlier loads."""

    def get(self, key: str) -> bytes | None:
        """The blob that was put for this key, byte for byte; None: there is none."""

    def put(self, key: str, blob: bytes) -> None:
        """Offer a blob to be kept for later loads. Never raises; it may be forgotten."""


class Backend(Protocol):
    """A library that can load models."""

    name: str
    fork_safe: bool  # may be imported in a template and used after fork

    def version(self) -> str:
        """The library's version, importing it if need be.

        Raises:
            BackendError: the library is missing or fails at import.
        """

    def load(self, artifact: Path, options: Mapping[str, Any]) -> Model:
        """Load one artifact with the typed options of its variant.

        Raises:
            UsageError: an unknown option (nearest match named) or a wrong value.
            BackendError: the library refused the artifact.
        """


@runtime_checkable
class Preparing(Protocol):
    """What a fork-safe backend may have besides: work that every worker would do again."""

    def prepare(self) -> None:
        """Make what the library makes once per process, so that forks share it.

        Called in a template, after `version`, before the first fork of a worker. It must leave no
        thread behind (threads do not survive a fork) and hold nothing of a user's. The template
        tries it in a child first and leaves it out if it fails or threads remain.
        """


@runtime_checkable
class Caching(Protocol):
    """A backend whose library compiles for minutes, and can take what it compiled before.

    The key that it chooses must hold all that a blob depends on besides the artifact: versions of
    library and driver, device, shapes, options.
    """

    cache: BlobCache | None  # set before `load` by whoever has one
