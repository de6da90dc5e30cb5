"""What a worker is told when it is forked.

Law of this file: values, and the memfd in which they travel; the daemon writes them, the worker
obeys them. Paths are absolute and point into the store; everything in the spec was linted before.
"""

from __future__ import annotations

import os
from typing import Any, Literal, TypeVar

import msgspec

from edge_runtime.tensors import TensorSpec

Spec = TypeVar("Spec", bound=msgspec.Struct)


class GoldenFile(msgspec.Struct, frozen=True):
    """A recorded tensor and the file of raw little-endian bytes that holds it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    path: str
    sha256: str = ""  # of its bytes, to tell a rotten recording from a wrong model


class GoldenPair(msgspec.Struct, frozen=True):
    """One recorded run: inputs and the outputs it must give."""

    inputs: tuple[GoldenFile, ...]
    outputs: tuple[GoldenFile, ...]


class Limits(msgspec.Struct, frozen=True):
    """The bounds of one worker; units in the names, reasons in `config`."""

    queue_requests_max: int = 256
    queue_ms_max: float = 0.0  # 0: not limited
    queue_bytes_max: int = 64 * 1024 * 1024
    frame_body_bytes_max: int = 64 * 1024 * 1024
    regions_per_connection_max: int = 16
    region_bytes_max: int = 256 * 1024 * 1024
    priority_max: int = 255
    memory_bytes_max: int = 0  # 0: not limited
    open_files_max: int = 1024


class WorkerSpec(msgspec.Struct, frozen=True):
    """One worker: one variant of one version of one model."""

    model: str
    version: int
    generation: int
    variant: str
    backend: str
    artifact: str
    artifact_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_axis: int | None = None
    label: str = ""
    device_class: str = "cpu"
    cpu_fallback: Literal["auto", "refuse", "alarm", "allow"] = "auto"  # backends.placement
    options: dict[str, Any] = {}
    goldens: tuple[GoldenPair, ...] = ()
    rtol: float = 1e-3
    atol: float = 1e-4
    metadata: bytes = b"{}"  # the answer to MODEL_METADATA, JSON
    runners: int = -1  # -1: decided by a measurement at warm-up; 0: inline
    runner_threshold_ms: float = 2.0
    warmup_runs: int = 3
    batch_rows_max: int = -1  # -1: decided by a measurement at warm-up; 1: no batches
    batch_window_ms: float = 0.0
    spin_us: float = 0.0
    cache_bytes_max: int = 0
    compiled_dir: str = ""  # of blobs compiled from this artifact; "": none are kept
    cpus: tuple[int, ...] = ()
    nice: int = 0
    sandbox: bool = True
    heartbeat_idle_s: float = 60.0  # between goldens while it serves; 0: only after an event
    devices: tuple[str, ...] = ()  # nodes that the sandbox leaves open: the accelerator's
    host: str = ""  # it shares a process with all models of this device class; "": it has its own
    supervisor_pid: int = 0
    limits: Limits = Limits()


class HostSpec(msgspec.Struct, frozen=True):
    """One host: the process of all workers on a device that only one process may open."""

    name: str  # the device class
    backend: str
    supervisor_pid: int
    readable: tuple[str, ...] = ()  # directories; each worker confines itself to its files in them
    devices: tuple[str, ...] = ()
    sandbox: bool = True


def pass_on(spec: msgspec.Struct) -> int:
    """A memfd with a spec, for the process that is to read it; the caller closes it."""
    fd = os.memfd_create("spec", os.MFD_CLOEXEC)
    os.write(fd, msgspec.msgpack.encode(spec))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_spec(fd: int, kind: type[Spec]) -> Spec:
    """The reverse; takes over `fd`."""
    with os.fdopen(fd, "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=kind)
