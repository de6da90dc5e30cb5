"""The inside of a .tflite model: its operators, and what its tensors hold in a run.

Law of this file: the only one of `quantize` that makes interpreters; the library itself comes from
the backend's door. All tensors are kept, so that each can be seen; time is never measured here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.backends import litert
from edge_runtime.errors import ModelError
from quantize import datasets, foreign
from quantize.passes import Bench, Feeds
from quantize.tflite_ops import Graph, Operator, Tensor

Array = np.ndarray[Any, Any]

BATCH_ROWS = 32  # of a run where the model has a batch axis: bounds the memory of all tensors


def graph(path: Path) -> Graph:
    """The main graph as the file has it.

    Raises:
        BackendError: no library is installed. ModelError: it refuses the model.
    """
    return _graph(_interpreter(path, "BUILTIN_WITHOUT_DEFAULT_DELEGATES"), path)


def activations(
    source: Path,
    feeds: Feeds,
    bench: Bench,
    wanted: set[str] | None = None,
    rows: int = BATCH_ROWS,
) -> Iterator[Feeds]:
    """Runs over the samples: {tensor: value}, integers as the real numbers they stand for.

    Args:
        wanted: tensors by their own names, outputs also by the names they are served under; None:
            every float or quantized tensor that is given or computed, by its own name.

    Raises:
        BackendError: no library is installed. ModelError: it refuses the model or a run.
    """
    whole = graph(source)
    # With XNNPACK: kernels that serve, and four times faster than those without it.
    interpreter = _interpreter(source, "BUILTIN")
    interpreter.allocate_tensors()
    seen = _seen(whole, bench, wanted)
    places = dict(zip((spec.name for spec in bench.inputs), whole.inputs, strict=True))
    for feed in datasets.batches(feeds, rows if bench.batch_axis == 0 else 1, bench.inputs):
        with foreign.ours("LiteRT failed to run", source):
            _run(interpreter, feed, places)
            values = {name: _real(interpreter.get_tensor(t.number), t) for name, t in seen.items()}
            interpreter.reset_all_variables()
        yield values


def _seen(whole: Graph, bench: Bench, wanted: set[str] | None) -> dict[str, Tensor]:
    live = [*whole.inputs, *(tensor for one in whole.operators for tensor in one.outputs)]
    real = {one.name: one for one in live if one.datatype.startswith("float") or one.scale}
    if wanted is None:
        return real
    served = dict(zip((spec.name for spec in bench.outputs), whole.outputs, strict=True))
    return {name: one for name, one in (served | real).items() if name in wanted}


def _run(interpreter: Any, feed: Feeds, places: Mapping[str, Tensor]) -> None:
    details = {detail["index"]: detail for detail in interpreter.get_input_details()}
    resized = False
    for name, array in feed.items():
        if tuple(details[places[name].number]["shape"]) != array.shape:
            interpreter.resize_tensor_input(places[name].number, array.shape)
            resized = True
    if resized:
        interpreter.allocate_tensors()
    for name, array in feed.items():
        interpreter.set_tensor(places[name].number, np.ascontiguousarray(array))
    interpreter.invoke()


def _real(stored: Array, tensor: Tensor) -> Array:
    if not tensor.scale:
        return stored
    return ((stored.astype(np.float32) - tensor.zero_point) * tensor.scale).astype(np.float32)


def _interpreter(path: Path, resolver: str) -> Any:
    module = litert.library().module
    with foreign.ours("LiteRT failed to load", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all tensors are kept is what we want
        return module.Interpreter(
            model_path=str(path),
            num_threads=1,
            experimental_op_resolver_type=getattr(module.OpResolverType, resolver),
            experimental_preserve_all_tensors=True,
        )


def _graph(interpreter: Any, path: Path) -> Graph:
    ask = getattr(interpreter, "_get_ops_details", None)
    if ask is None:
        raise ModelError(
            "this LiteRT does not tell a model's operators",
            where=str(path),
            expected="ai-edge-litert 2.0 or newer",
        )
    operators = ask()
    inputs = [int(one["index"]) for one in interpreter.get_input_details()]
    outputs = [int(one["index"]) for one in interpreter.get_output_details()]
    tensors = {int(detail["index"]): _tensor(detail) for detail in interpreter.get_tensor_details()}
    return Graph(
        tuple(
            Operator(one["op_name"], _some(tensors, one["inputs"]), _some(tensors, one["outputs"]))
            for one in operators
        ),
        _some(tensors, inputs),
        _some(tensors, outputs),
    )


def _some(tensors: Mapping[int, Tensor], numbers: Any) -> tuple[Tensor, ...]:
    """Those of the numbers; -1 stands for an input that is left out."""
    return tuple(tensors[int(number)] for number in numbers if int(number) in tensors)


def _tensor(detail: Mapping[str, Any]) -> Tensor:
    scale, zero_point = detail["quantization"]  # (0, 0): none, or one for each channel
    return Tensor(
        int(detail["index"]),
        str(detail["name"]),
        tuple(map(int, detail["shape"])),
        np.dtype(detail["dtype"]).name,
        float(scale),
        int(zero_point),
    )
