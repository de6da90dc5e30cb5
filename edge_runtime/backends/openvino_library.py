"""The door to OpenVINO: the library, its exceptions, its words.

Law of this file: the only one that imports openvino, and it imports it when it is asked to, not
before. Every exception of the library is caught by `foreign()` and becomes ours where it is met. It
makes no `Core` and compiles nothing.

The package reports its import and its use to its maker, by default and from a thread: it is kept
from importing the part that does.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

from edge_runtime.errors import BackendError

_ERROR_SIZE_MAX = 600  # characters of a library's message: it may quote whole graphs
_NOISE = re.compile(
    r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \w+:"
)


@functools.cache
def library() -> Any:
    # The package sends an event to its maker when it is imported, from a thread, and leaves a file
    # with an id in the home directory. An appliance sends nothing that its owner did not ask for;
    # and what is forked must not have threads. `tools.ovc` is the model converter, the part that
    # sends; without it openvino is whole, and smaller.
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None
    converter = modules.setdefault("openvino.tools.ovc", None)
    try:
        import openvino
        import openvino.frontend
    except (ImportError, OSError) as e:  # OSError: a shared object that does not load
        raise BackendError(
            f"openvino does not import: {e}",
            expected=f"a wheel for {platform.machine()} and Python {platform.python_version()}",
            remedy="pip install 'edge-runtime[openvino]'",
        ) from e
    finally:
        if converter is None:  # a builder's tools may want it later
            del modules["openvino.tools.ovc"]
    return openvino


Run = Callable[[Any], None]  # one run of an InferRequest whose tensors are set
_NOTHING: dict[Any, Any] = {}  # no input beside those that are set


def run_directly() -> Run:
    """`InferRequest.infer` without its wrapper in Python: a third of a small model's run."""
    infer = _request_class().infer

    def run(request: Any) -> None:
        infer(request, _NOTHING, True, False)

    return run


def run_by_queue() -> Run:
    """As `run_directly`, in a thread of the library: some 10 us more, and no error is lost."""
    start, wait = _request_class().start_async, _request_class().wait

    def run(request: Any) -> None:
        start(request, _NOTHING, None)
        wait(request)

    return run


@functools.cache
def _request_class() -> Any:
    library()
    from openvino import _pyopenvino

    return getattr(_pyopenvino, "InferRequest")  # noqa: B009 - for mypy: it has no stubs here


@functools.cache
def foreign() -> tuple[type[Exception], ...]:
    """What the library raises: its front ends have classes of their own."""
    own = [kind for kind in vars(library().frontend).values() if isinstance(kind, type)]
    return (
        *(kind for kind in own if issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        TypeError,
        MemoryError,  # std::bad_alloc
    )


def brief(error: Exception) -> str:
    """The message without the places in the library's source that it passed."""
    return " ".join(_NOISE.sub(" ", str(error)).split())[:_ERROR_SIZE_MAX]


def failure(doing: str, error: Exception) -> BackendError:
    """Ours, for what the library raised while `doing` something."""
    return BackendError(f"openvino failed to {doing}: {brief(error)}")
