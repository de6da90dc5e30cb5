"""The door to litert-torch: a torch module as a .tflite for one sample at a time.

Law of this file: the only one that imports litert_torch. Names and layout of inputs and outputs are
those of the ONNX file of the same module, so that both are variants of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import UsageError
from quantize import foreign, torch_door

if TYPE_CHECKING:
    from quantize.torch_modules import Module, Names

Array = np.ndarray[Any, Any]


def version() -> str:
    try:
        return metadata.version("litert-torch")
    except metadata.PackageNotFoundError as e:
        raise missing(str(e)) from e


def convert(made: Module, given: Sequence[Array], called: Names, out: Path) -> None:
    """Write the module as .tflite.

    Args:
        given: one sample per input, [1, ...].

    Raises:
        UsageError: the library is not installed. ModelError: it refuses the module.
    """
    library, torch = _library(), torch_door.library()
    samples = {
        name: torch.from_numpy(np.ascontiguousarray(one))
        for name, one in zip(called.inputs, given, strict=True)
    }
    wide = any(one.dtype.itemsize == 8 for one in given)  # else integers would become int32
    with foreign.ours("litert-torch cannot convert it", Path(made.source)):
        named = _named(torch, made.module, called)
        named.training = False  # itself alone: an exported program refuses eval()
        model = library.convert(named, sample_kwargs=samples, enable_x64=wide)
        model.export(str(out))


def _named(torch: Any, module: Any, called: Names) -> Any:
    """The module behind a forward whose arguments and answers have names."""
    from quantize import torch_modules

    class Named(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, **given: Any) -> dict[str, Any]:
            answer = self.inner(*(given[name] for name in called.inputs))
            found = [one for _, one in torch_modules.flat(answer) if one is not None]
            return dict(zip(called.outputs, found, strict=True))

    return Named()


def missing(why: str) -> UsageError:
    """The error where the library is not installed."""
    return UsageError(
        f"litert-torch does not import: {why}",
        remedy="pip install 'edge-runtime[quantize-torch-litert]'; it makes the .tflite that the"
        " backend litert needs",
    )


def _library() -> Any:
    try:
        with foreign.quiet():
            import litert_torch
    except (ImportError, OSError) as e:
        raise missing(str(e)) from e
    return litert_torch
