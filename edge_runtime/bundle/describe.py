"""A bundle in a few plain values, for `edge-runtime bundle inspect`.

Law of this file: values in, values out; text is the command line's business.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge_runtime.bundle.archive import Bundle
from edge_runtime.bundle.manifest import Manifest, Variant


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle holds: JSON values only; sizes in bytes."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "label": manifest.label,
        "schema": manifest.schema,
        "size_bytes": bundle.size_bytes,
        "inputs": msgspec.to_builtins(manifest.inputs),
        "outputs": msgspec.to_builtins(manifest.outputs),
        "batch_axis": manifest.batch_axis,
        "variants": [_variant(variant) for variant in manifest.variants],
        "goldens": len(manifest.goldens),
        "blobs": sum(1 for _ in bundle.blobs()),
        "preprocess": msgspec.to_builtins(manifest.preprocess),
        "postprocess": _postprocess(manifest),
        "budgets": msgspec.to_builtins(manifest.budgets),
        "card": manifest.card,
        "calibration": manifest.calibration,
        "provenance": manifest.provenance,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "backend": variant.backend,
        "precision": variant.precision,
        "device_class": variant.device_class,
        "filename": variant.artifact.filename,
        "size_bytes": variant.artifact.size,
        "sha256": variant.artifact.sha256,
        "options": variant.options,
        "tolerance": msgspec.to_builtins(variant.tolerance),
    }


def _postprocess(manifest: Manifest) -> dict[str, Any] | None:
    """Labels are counted, not listed: there may be thousands."""
    step = manifest.postprocess
    if step is None:
        return None
    return {
        "output": step.output,
        "labels": len(step.labels),
        "top_k": step.top_k,
        "activation": step.activation,
    }
