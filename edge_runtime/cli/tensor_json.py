"""Tensors as JSON: the Open Inference Protocol's REST form ("Inference Request JSON Object").

Law of this file: bytes and arrays in, arrays and documents out; no file, no socket. Values are
checked here by their JSON type: numpy would turn "1", true and null into numbers without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime import tensors
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

    Array = np.ndarray[Any, Any]

# Datatype by its first letters -> the JSON types of its elements. To Python bool is an int.
_ELEMENTS: dict[str, tuple[type, ...]] = {
    "BO": (bool,),
    "UI": (int,),
    "IN": (int,),
    "FP": (int, float),
    "BY": (str,),
}


class Tensor(msgspec.Struct, frozen=True):
    """One input; `data` is flat, or nested as `shape` says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


class Wanted(msgspec.Struct, frozen=True):
    """An output that is asked for."""

    name: str


class Request(msgspec.Struct, frozen=True):
    """The request; `id` comes back in the answer."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Wanted, ...] = ()
    id: str = ""


def parse(data: bytes, where: str) -> Request:
    """The request in a JSON document.

    Raises:
        RequestError: not JSON, or a field is missing or of the wrong type (its path is named).
    """
    try:
        return msgspec.json.decode(data, type=Request)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `")
        raise RequestError(text, where=f"{where}: {path.rstrip('`') or '$'}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            f"is not JSON: {error}", where=where, expected='{"inputs": [{"name": ..., ...}]}'
        ) from error


def arrays(request: Request) -> dict[str, Array]:
    """The inputs as arrays, by name.

    Raises:
        RequestError: a datatype that JSON cannot carry, an element of another type or out of range,
            or another number of elements than the shape has.
    """
    return {tensor.name: _array(tensor) for tensor in request.inputs}


def output_names(request: Request) -> list[str] | None:
    """The outputs that are asked for; None: all."""
    return [output.name for output in request.outputs] or None


def document(
    name: str, version: str, outputs: Mapping[str, Array], request_id: str = ""
) -> dict[str, Any]:
    """The answer's JSON object; not-a-number and infinity, which JSON has not, become null."""
    return {
        "model_name": name,
        "model_version": version,
        **({"id": request_id} if request_id else {}),
        "outputs": [
            {
                "name": output,
                "datatype": tensors.datatype_of(array.dtype),
                "shape": list(array.shape),
                "data": [_plain(value) for value in array.reshape(-1).tolist()],
            }
            for output, array in outputs.items()
        ],
    }


def _array(tensor: Tensor) -> Array:
    import numpy as np

    allowed = _ELEMENTS.get(tensor.datatype[:2])
    if tensor.datatype not in tensors.DATATYPES or allowed is None:
        raise RequestError(
            f"datatype {tensor.datatype!r} cannot be given as JSON",
            where=tensor.name,
            expected="one of " + ", ".join(n for n in tensors.DATATYPES if n[:2] in _ELEMENTS),
        )
    values = list(_flat(tensor, allowed))
    count = tensors.elements(tensor.shape)
    if len(values) != count:
        raise RequestError(
            f"{len(values)} elements for shape {list(tensor.shape)}",
            where=tensor.name,
            expected=f"{count} elements",
        )
    try:
        array = np.array(values, dtype=tensors.DATATYPES[tensor.datatype][0])
    except OverflowError as error:
        raise RequestError(
            f"an element does not fit {tensor.datatype}: {error}", where=tensor.name
        ) from error
    return array.reshape(tensor.shape)


def _flat(tensor: Tensor, allowed: tuple[type, ...]) -> Iterator[Any]:
    """The elements in order, each checked; no recursion, so nesting costs no stack."""
    waiting = [iter(tensor.data)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list):
                waiting.append(iter(value))
                break
            if type(value) not in allowed:
                raise RequestError(
                    f"an element is {str(value)[:40]!r}",
                    where=tensor.name,
                    expected=f"{tensor.datatype} elements",
                )
            yield value.encode() if isinstance(value, str) else value
        else:
            waiting.pop()


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
