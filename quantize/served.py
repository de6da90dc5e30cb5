"""A daemon of our own, to ask variants through the code that will serve them.

Law of this file: it starts the real program on sockets in a private folder, installs one bundle per
variant, asks, and ends it; nothing outlives the `with`. What the daemon refuses is told as it said.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edge_runtime.bundle import archive, source
from edge_runtime.bundle import manifest as manifests
from edge_runtime.bundle.manifest import Blob, Manifest, Variant
from edge_runtime.cli import private
from edge_runtime.client import Client
from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError, ModelError
from edge_runtime.tensors import TensorSpec
from quantize import datasets
from quantize.rows import Samples

Array = np.ndarray[Any, Any]

CONFIG = {
    "log": {"level": "warning"},
    "limits": {"bundle_bytes_max": 1 << 34},
    "workers": {"keep_previous_warm": False, "own_socket": False},
    # The variant alone is measured: nothing of this machine's board, no choice, no brake.
    "profile": "none",
    "selection": {"policy": "off"},
}
ROWS = 32  # of a request, where the model has a batch axis
REQUEST_S_MAX = 60.0


class Candidate(NamedTuple):
    """A model file that is to be asked."""

    name: str
    path: Path
    backend: str
    options: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: int | None
    custom_domains: tuple[str, ...] = ()


class Served(NamedTuple):
    """What a variant answered, and what it took.

    `outputs` [samples, ...] by name; `memory_bytes` private bytes of its worker after the answers.
    """

    outputs: dict[str, Array]
    memory_bytes: int
    backend_version: str
    placement: tuple[dict[str, Any], ...]


class Daemon:
    """The daemon while it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run = folder / "run"

    def answers(self, candidate: Candidate, inputs: Mapping[str, Samples]) -> Served:
        """Serve the candidate, have it answer every sample, and unload it.

        Args:
            inputs: [samples, ...] per input.

        Raises:
            EdgeError: it does not load, or fails on a sample; as the daemon said.
        """
        with ControlClient(self._run / "control.sock") as control:
            self._install(control, candidate)
            try:
                with Client(str(self._run / "infer.sock"), timeout_s=REQUEST_S_MAX) as client:
                    outputs = _ask(client, candidate, inputs)
                facts = control.call("ps")["workers"]
                (worker,) = [one for one in facts if one["model"] == candidate.name]
                (model,) = [
                    one for one in control.call("models")["models"] if one["name"] == candidate.name
                ]
            finally:
                control.call("unload", {"name": candidate.name})
        active = model["active"]
        return Served(
            outputs,
            int(worker.get("private_bytes") or 0),
            str(active.get("backend_version", "")),
            tuple(active.get("placement", ())),
        )

    def prove(self, bundle: archive.Bundle) -> None:
        """Serve every variant of a bundle once: the daemon compares its goldens as it loads.

        Raises:
            EdgeError: a variant does not load or misses its goldens; names it.
        """
        for index, variant in enumerate(bundle.manifest.variants):
            try:
                self._prove(bundle, variant, f"proof-{index}")
            except EdgeError as error:
                error.where = f"variant {variant.name}" + (
                    f": {error.where}" if error.where else ""
                )
                raise

    def _prove(self, bundle: archive.Bundle, variant: Variant, name: str) -> None:
        path = self._folder / f"{name}.bundle"
        manifest = alone(bundle.manifest, variant, name)
        kept = {sha256: bundle.blob(sha256) for sha256 in manifests.blobs(manifest)}
        archive.pack(archive.compose(manifest, kept), path)
        with ControlClient(self._run / "control.sock") as control, path.open("rb") as file:
            control.call("install", {"activate": True, "filename": path.name}, fds=[file.fileno()])
            control.call("unload", {"name": name})
        path.unlink()

    def _install(self, control: ControlClient, candidate: Candidate) -> None:
        bundle = self._folder / f"{candidate.name}.bundle"
        pack_one(candidate, bundle)
        with bundle.open("rb") as file:
            control.call(
                "install",
                {"activate": True, "filename": bundle.name},
                fds=[file.fileno()],
            )
        bundle.unlink()


@contextlib.contextmanager
def daemon() -> Iterator[Daemon]:
    """A daemon on private sockets.

    Raises:
        UnavailableError: it does not start; says what it wrote.
    """
    # A short path: a unix socket's name has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="edge-q-") as name:
        with private.daemon(Path(name), CONFIG):
            yield Daemon(Path(name))


def alone(manifest: Manifest, variant: Variant, name: str) -> Manifest:
    """The manifest of one of its variants, with the goldens that are compared with its answers."""
    goldens = tuple(
        msgspec.structs.replace(one, outputs=one.expected(variant.name), variant_outputs={})
        for one in manifest.goldens
    )
    return msgspec.structs.replace(manifest, name=name, variants=(variant,), goldens=goldens)


def pack_one(candidate: Candidate, out: Path) -> None:
    """A bundle of one variant without goldens: it is here to be judged."""
    content = source.from_path(candidate.path.resolve())
    blob = Blob(content.sha256(), content.size, candidate.path.name)
    manifest = Manifest(
        schema=1,
        name=candidate.name,
        version=1,
        inputs=candidate.inputs,
        outputs=candidate.outputs,
        batch_axis=candidate.batch_axis,
        variants=(
            Variant(
                "candidate",
                candidate.backend,
                blob,
                options=candidate.options,
                custom_domains=candidate.custom_domains,
            ),
        ),
    )
    archive.pack(archive.compose(manifest, {blob.sha256: content}), out)


def _ask(client: Client, candidate: Candidate, inputs: Mapping[str, Samples]) -> dict[str, Array]:
    rows = ROWS if candidate.batch_axis == 0 else 1
    parts = list(
        client.infer_many(
            candidate.name,
            datasets.batches(inputs, rows, candidate.inputs),
            timeout_s=REQUEST_S_MAX,
        )
    )
    samples = len(next(iter(inputs.values())))
    counts = [min(rows, samples - first) for first in range(0, samples, rows)]
    return {name: _joined(name, [part[name] for part in parts], counts) for name in parts[0]}


def _joined(name: str, parts: list[Array], counts: list[int]) -> Array:
    """The answers to all samples, [samples, ...].

    An output without an axis for samples is one of a sample where one was asked at a time.

    Raises:
        ModelError: its size depends on what is in the samples.
    """
    if all(part.ndim and len(part) == count for part, count in zip(parts, counts, strict=True)):
        shapes = {part.shape[1:] for part in parts}
    elif max(counts) == 1:
        parts = [part[np.newaxis] for part in parts]
        shapes = {part.shape[1:] for part in parts}
    else:
        shapes = set()
    if len(shapes) != 1:
        raise ModelError(
            f"output {name!r} has another shape for other samples: {sorted(shapes)[:2]}"
            if shapes
            else f"output {name!r} has {len(parts[0])} rows for {counts[0]} samples: its first"
            " axis is no batch axis",
            expected="answers that can be compared sample by sample: one fixed shape",
            remedy="export the model with a batch axis of 1, and without the step that selects",
        )
    return np.concatenate(parts)
