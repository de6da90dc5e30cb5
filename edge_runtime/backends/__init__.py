"""Which backends exist.

Law of this file: the table, and the one function that reads it. Importing it imports no backend and
no library; a backend's file is imported when it is asked for by name, in the process that will run
it (a template, a worker, a builder), never in the daemon.
"""

from __future__ import annotations

import importlib
from typing import cast

from edge_runtime.backends.protocol import Backend
from edge_runtime.errors import BackendError, UsageError, did_you_mean

# name -> "module:class". A class is made without arguments and must satisfy protocol.Backend.
BACKENDS: dict[str, str] = {
    "litert": "edge_runtime.backends.litert:LiteRt",
    "onnxruntime": "edge_runtime.backends.onnxruntime:OnnxRuntime",
    "openvino": "edge_runtime.backends.openvino:OpenVino",
    "reference": "edge_runtime.backends.reference:Reference",
}

# name -> how the names of the packages begin that it loads, with "_" for "-": when one of another
# version is installed, what was measured has to be measured again.
PACKAGES: dict[str, tuple[str, ...]] = {
    "litert": ("ai_edge_litert", "tflite_runtime", "numpy"),
    "onnxruntime": ("onnxruntime", "numpy"),
    "openvino": ("openvino", "numpy"),
    "reference": ("numpy",),
}

__all__ = ["BACKENDS", "PACKAGES", "backend", "did_you_mean"]


def backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: no such backend.
        BackendError: its file needs something that is not installed (numpy, for all of them).
    """
    if name not in BACKENDS:
        raise UsageError(
            f"unknown backend {name!r}",
            expected="one of " + ", ".join(BACKENDS),
            remedy=did_you_mean(name, BACKENDS),
        )
    module_name, _, class_name = BACKENDS[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise BackendError(
            f"backend {name!r} cannot be imported: {e}",
            remedy="install edge-runtime with the extra of that backend, or numpy",
        ) from e
    return cast(Backend, getattr(module, class_name)())
