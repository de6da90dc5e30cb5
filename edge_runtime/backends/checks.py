"""Whether arrays fit a model's tensors: asked before any native code sees them.

Law of this file: specs and arrays in, RequestError or nothing out. It needs no numpy of its own
(it looks at `dtype`, `shape` and `flags`), allocates nothing and never converts: a wrong datatype
is the caller's mistake, and a silent conversion would hide it and cost time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edge_runtime import tensors
from edge_runtime.errors import RequestError, did_you_mean
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


_ORDER = "<" if sys.byteorder == "little" else ">"
_KINDS = {"bool": "b", "uint": "u", "int": "i", "float": "f"}
# OIP datatype -> numpy's `dtype.str` ("<f4"): one comparison for kind, size and byte order, and
# several times faster than `dtype.name`.
_CODES = {
    datatype: ("|" if size == 1 else _ORDER) + _KINDS[name.rstrip("0123456789")] + str(size)
    for datatype, (name, size) in tensors.DATATYPES.items()
    if datatype != "BYTES"
}


def check_inputs(specs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> None:
    """Every input is there, no other is, and each has the datatype and shape of its spec.

    Raises:
        RequestError: says which input, what it has and what was expected.
    """
    _check_names("input", specs, arrays)
    for spec in specs:
        if spec.name not in arrays:
            raise RequestError(
                f"input {spec.name!r} is missing", expected=f"{spec.datatype} {list(spec.shape)}"
            )
        check_array("input", spec, arrays[spec.name])


def check_binding(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    given: Mapping[str, Array],
    wanted: Mapping[str, Array | None],
) -> None:
    """As `check_inputs`, and for memory that is bound: contiguous, outputs known and writeable.

    Raises:
        RequestError: also when no output is wanted at all.
    """
    check_inputs(inputs, given)
    _check_names("output", outputs, wanted)
    if not wanted:
        raise RequestError("no output is wanted", expected="at least one output")
    for spec in inputs:
        _check_contiguous("input", spec.name, given[spec.name])
    for spec in outputs:
        array = wanted.get(spec.name)
        if array is not None:
            check_array("output", spec, array)
            _check_contiguous("output", spec.name, array)
            if not array.flags.writeable:
                raise RequestError(f"the array bound to output {spec.name!r} is read-only")


def check_array(role: str, spec: TensorSpec, array: Array) -> None:
    """The array has the datatype and shape of the spec. Raises: RequestError."""
    if not _has_datatype(array, spec.datatype):
        raise RequestError(f"{role} {spec.name!r} has dtype {array.dtype}", expected=spec.datatype)
    if not tensors.shape_matches(array.shape, spec.shape):
        raise RequestError(
            f"{role} {spec.name!r} has shape {list(array.shape)}",
            expected=f"{list(spec.shape)} (-1: any size)",
        )


def check_given(name: str, result: Array, out: Array) -> None:
    """The array bound to an output has the shape that the model gave. Raises: RequestError."""
    if out.shape != result.shape:
        raise RequestError(
            f"the array bound to output {name!r} has shape {list(out.shape)}",
            expected=f"{list(result.shape)}, which the model gave",
        )


def _check_names(role: str, specs: tuple[TensorSpec, ...], names: Iterable[str]) -> None:
    known = [spec.name for spec in specs]
    for name in names:
        if name not in known:
            raise RequestError(
                f"the model has no {role} {name!r}",
                expected="one of " + ", ".join(map(repr, known)),
                remedy=did_you_mean(name, known),
            )


def _has_datatype(array: Array, datatype: str) -> bool:
    if datatype == "BYTES":
        return array.dtype.kind in "SUO"
    if datatype == "BF16" and array.dtype.name == "bfloat16":  # ml_dtypes
        return True
    return bool(array.dtype.str == _CODES[datatype])


def _check_contiguous(role: str, name: str, array: Array) -> None:
    if not array.flags.c_contiguous:
        raise RequestError(f"the array bound to {role} {name!r} is not C-contiguous")
