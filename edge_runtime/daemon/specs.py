"""From manifest and configuration to what a worker is told.

Law of this file: pure; paths come from a function that is passed in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.bundle.manifest import GoldenTensor, Manifest, Variant
from edge_runtime.config import LimitsConfig, WorkerConfig
from edge_runtime.daemon.board import Board
from edge_runtime.errors import NotFoundError
from edge_runtime.serving import spec
from edge_runtime.serving.health import RestartPolicy
from edge_runtime.wire.messages import ModelMetadata, TensorMetadata

BlobPath = Callable[[str], Path]


def candidates(manifest: Manifest, config: WorkerConfig) -> tuple[Variant, ...]:
    """The variants to try, in order.

    Raises:
        NotFoundError: the configuration names a variant that the bundle does not have.
    """
    if not config.variant:
        return manifest.variants
    chosen = tuple(one for one in manifest.variants if one.name == config.variant)
    if not chosen:
        raise NotFoundError(
            f"{manifest.name}@{manifest.version} has no variant {config.variant!r}",
            where=f"config: models.{manifest.name}.variant",
            expected="one of " + ", ".join(one.name for one in manifest.variants),
        )
    return chosen


def worker_spec(
    manifest: Manifest,
    variant: Variant,
    generation: int,
    config: WorkerConfig,
    limits: LimitsConfig,
    blob_path: BlobPath,
    board: Board,
) -> spec.WorkerSpec:
    """Everything that one worker needs to know."""
    return spec.WorkerSpec(
        model=manifest.name,
        version=manifest.version,
        generation=generation,
        variant=variant.name,
        backend=variant.backend,
        artifact=str(blob_path(variant.artifact.sha256)),
        artifact_sha256=variant.artifact.sha256,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        batch_axis=manifest.batch_axis,
        label=manifest.label,
        device_class=variant.device_class,
        cpu_fallback=config.cpu_fallback,
        options=board.options(variant.backend, variant.device_class, variant.options),
        goldens=tuple(
            spec.GoldenPair(
                tuple(_golden(one, blob_path) for one in golden.inputs),
                tuple(_golden(one, blob_path) for one in golden.expected(variant.name)),
            )
            for golden in manifest.goldens
        ),
        rtol=variant.tolerance.rtol,
        atol=variant.tolerance.atol,
        metadata=metadata(manifest, variant, generation),
        runners=-1 if config.runners == "auto" else config.runners,
        runner_threshold_ms=config.runner_threshold_ms,
        warmup_runs=config.warmup_runs,
        batch_rows_max=-1 if config.batch_rows_max == "auto" else config.batch_rows_max,
        batch_window_ms=config.batch_window_ms,
        spin_us=config.spin_us,
        cache_bytes_max=config.cache_bytes_max,
        cpus=cpus(config.cpuset),
        nice=config.nice,
        sandbox=config.sandbox,
        heartbeat_idle_s=config.heartbeat_idle_s,
        devices=board.devices.get(variant.device_class, ()),
        host=variant.device_class if variant.device_class in board.exclusive else "",
        supervisor_pid=os.getpid(),
        limits=spec.Limits(
            queue_requests_max=config.queue_requests_max,
            queue_ms_max=config.queue_ms_max,
            queue_bytes_max=config.queue_bytes_max,
            priority_max=config.priority_max,
            frame_body_bytes_max=limits.frame_body_bytes_max,
            regions_per_connection_max=limits.regions_per_connection_max,
            region_bytes_max=limits.region_bytes_max,
            memory_bytes_max=config.memory_bytes_max,
            open_files_max=config.open_files_max,
        ),
    )


def _golden(tensor: GoldenTensor, blob_path: BlobPath) -> spec.GoldenFile:
    path = str(blob_path(tensor.blob.sha256))
    return spec.GoldenFile(tensor.name, tensor.datatype, tensor.shape, path, tensor.blob.sha256)


def metadata(manifest: Manifest, variant: Variant, generation: int) -> bytes:
    """The answer to MODEL_METADATA (OIP ModelMetadataResponse), JSON."""
    parameters: dict[str, Any] = {
        "label": manifest.label,
        "variant": variant.name,
        "backend": variant.backend,
        "precision": variant.precision,
        "generation": generation,
        "batch_axis": manifest.batch_axis,
        "preprocess": msgspec.to_builtins(manifest.preprocess),
        "postprocess": msgspec.to_builtins(manifest.postprocess),
    }
    return msgspec.json.encode(
        ModelMetadata(
            name=manifest.name,
            versions=(str(manifest.version),),
            platform=f"{variant.backend}_{variant.precision}"
            if variant.precision
            else variant.backend,
            inputs=tuple(TensorMetadata(s.name, s.datatype, s.shape) for s in manifest.inputs),
            outputs=tuple(TensorMetadata(s.name, s.datatype, s.shape) for s in manifest.outputs),
            parameters={key: value for key, value in parameters.items() if value not in (None, "")},
        )
    )


def cpus(cpuset: str) -> tuple[int, ...]:
    """ "0-1,3" as (0, 1, 3)."""
    cores: set[int] = set()
    for part in cpuset.split(",") if cpuset else ():
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def restart_policy(config: WorkerConfig) -> RestartPolicy:
    """The restart rules of a model."""
    rules = config.restart
    return RestartPolicy(
        rules.backoff_initial_s, rules.backoff_max_s, rules.deaths_max, rules.window_s
    )
