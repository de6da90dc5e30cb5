"""Clients of the frames: `Client`, `AsyncClient` (numpy in, numpy out) and `control.ControlClient`.

Law of this package: it knows the protocol and nothing of the daemon. Importing the package, or
`client.control`, costs no numpy; the names below are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.client.aio import AsyncClient
    from edge_runtime.client.codec import InferResult
    from edge_runtime.client.retry import RetryPolicy
    from edge_runtime.client.sync import Client

__all__ = ["AsyncClient", "Client", "InferResult", "RetryPolicy"]

_HOMES = {
    "AsyncClient": "edge_runtime.client.aio",
    "Client": "edge_runtime.client.sync",
    "InferResult": "edge_runtime.client.codec",
    "RetryPolicy": "edge_runtime.client.retry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
