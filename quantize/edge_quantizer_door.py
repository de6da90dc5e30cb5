"""The door to ai-edge-quantizer: .tflite in, .tflite out.

Law of this file: the only one that imports ai_edge_quantizer. Inputs and outputs stay floats, so
that variants of a model can stand for each other. Ranges of activations are our own: found once
with LiteRT, in batches where the model has a batch axis, for every tensor and by any method; the
library takes them as if it had calibrated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_runtime.bundle import tflite_graph
from edge_runtime.bundle.source import from_path
from edge_runtime.errors import ModelError, UsageError
from quantize import foreign, litert_door, ranges, tflite_ops
from quantize.passes import Bench, Feeds
from quantize.tflite_ops import Graph

if TYPE_CHECKING:
    from quantize.passes.tflite import TfliteFloat16, TfliteInt8, TfliteWeights

Array = np.ndarray[Any, Any]
Ranges = dict[str, tuple[float, float]]

HISTOGRAM_ROWS = 8  # of a run all of whose tensors are held at once
_EVERYTHING = ".*"
# Another expression for everything: a rule for one that is there already would replace it.
_EDGES = "^"


def version() -> str:
    _library()
    from importlib import metadata

    return metadata.version("ai-edge-quantizer")


def quantize_static(
    source: Path,
    out: Path,
    how: TfliteInt8,
    bench: Bench,
    only: Sequence[str] = (),
    ranges_file: Path | None = None,
) -> None:
    """Weights and activations are integers, ranges from calibration.

    Args:
        only: operators by name, the others stay float; empty: all. ranges_file: where the ranges of
            activations are kept for the next call; written if it is not there.

    Raises:
        UsageError: the library is not installed; a name that no operator has; several subgraphs.
        ModelError: the library refuses the model, or nothing was quantized.
    """
    library = _library()
    _refuse_subgraphs(source)
    graph = litert_door.graph(source)
    floats = [one.name for one in tflite_ops.named(graph, how.exclude, "exclude")]
    floats += tflite_ops.of_kinds(graph, tflite_ops.FLOAT_ONLY)
    floats += [one.name for one in tflite_ops.between_floats(graph, floats)]
    small = tflite_ops.four_bits(graph, how.four_bits, "four_bits")
    wide = tflite_ops.named(graph, how.sixteen_bits, "sixteen_bits")
    kept = _ranges(source, how, bench, ranges_file)
    with foreign.ours("ai-edge-quantizer failed", source):
        made, every = _quantizer(library, source), _every(library)
        if only:
            for one in tflite_ops.named(graph, only, "only"):
                made.add_static_config(one.scope, every, how.activations, 8)
        else:
            made.add_static_config(_EVERYTHING, every, how.activations, 8)
        for one in small:
            made.add_static_config(one.scope, every, how.activations, 4)
        for one in wide:
            made.add_static_config(one.scope, every, 16, 8)
        _leave(library, made, graph, floats)
        _write(made, _as_statistics(kept, graph), out)
    if not tflite_ops.quantized(litert_door.graph(out)):
        raise _nothing(out, how.exclude)


def quantize_weights(source: Path, out: Path, how: TfliteWeights) -> None:
    """Weights in 8 or 4 bits; activations float, or quantized at each run.

    Raises:
        UsageError: the library is not installed, or a name that no operator has.
        ModelError: it refuses the model, or nothing was quantized.
    """
    library = _library()
    graph = litert_door.graph(source)
    floats = [one.name for one in tflite_ops.named(graph, how.exclude, "exclude")]
    small = tflite_ops.four_bits(graph, how.four_bits, "four_bits")
    with foreign.ours("ai-edge-quantizer failed", source):
        made, every = _quantizer(library, source), _every(library)
        add = made.add_dynamic_config if how.compute == "dynamic" else made.add_weight_only_config
        add(_EVERYTHING, every, how.bits)
        for one in small:
            add(one.scope, every, 4)
        _leave(library, made, graph, floats)
        _write(made, None, out)
    if out.stat().st_size >= source.stat().st_size:
        raise _nothing(out, floats)


def to_float16(source: Path, out: Path, how: TfliteFloat16) -> None:
    """Weights in 16-bit floats, made 32-bit when they are used.

    Raises:
        UsageError: the library is not installed, or a name that no operator has.
        ModelError: it refuses the model, or nothing was changed.
    """
    library = _library()
    graph = litert_door.graph(source)
    floats = [one.name for one in tflite_ops.named(graph, how.exclude, "exclude")]
    with foreign.ours("ai-edge-quantizer failed", source):
        made = _quantizer(library, source)
        algorithm = library.algorithm_manager.AlgorithmName.FLOAT_CASTING
        made.add_weight_only_config(_EVERYTHING, _every(library), 16, algorithm_key=algorithm)
        _leave(library, made, graph, floats)
        _write(made, None, out)
    if out.stat().st_size >= source.stat().st_size:
        raise _nothing(out, floats)


def _leave(library: Any, made: Any, graph: Graph, floats: Sequence[str]) -> None:
    """Rules for what stays float; the last rule that fits an operator is the one that counts."""
    skip = library.algorithm_manager.AlgorithmName.NO_QUANTIZE
    kinds = library.qtyping.TFLOperationName
    out: set[str] = set(floats)
    for one in graph.operators:
        if one.name in out:
            made.update_quantization_recipe(one.scope, _every(library), algorithm_key=skip)
    for edge in (kinds.INPUT, kinds.OUTPUT):
        made.update_quantization_recipe(_EDGES, edge, algorithm_key=skip)


def _quantizer(library: Any, source: Path) -> Any:
    """Without rules. A file without signatures gets one, of its ends' own names: else the library
    fails, and what it makes would be served under other names.
    """
    made = library.quantizer.Quantizer(str(source))
    model = made._float_model
    if not model.signatureDefs:
        schema = importlib.import_module(type(model).__module__)
        main = model.subgraphs[0]
        one = schema.SignatureDefT()
        one.signatureKey, one.subgraphIndex = b"serving_default", 0
        one.inputs, one.outputs = (
            [_entry(schema, main.tensors[number].name, number) for number in numbers]
            for numbers in (main.inputs, main.outputs)
        )
        model.signatureDefs = [one]
    return made


def _entry(schema: Any, name: bytes, number: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, number
    return entry


def _every(library: Any) -> Any:
    return library.qtyping.TFLOperationName.ALL_SUPPORTED


def _write(made: Any, statistics: Any, out: Path) -> None:
    out.unlink(missing_ok=True)
    made.quantize(statistics, enable_progress_report=False).export_model(str(out))


def _nothing(out: Path, floats: Sequence[str]) -> ModelError:
    return ModelError(
        "nothing was quantized: no operator of the model can be"
        + (", or all of them are excluded" if floats else ""),
        where=str(out),
    )


def _refuse_subgraphs(source: Path) -> None:
    """Ranges are found for the main graph: the others would be quantized with none."""
    count = tflite_graph.read(from_path(source)).subgraphs
    if count > 1:
        raise UsageError(
            f"has {count} subgraphs (branches, loops, or several signatures): what lies inside"
            " them cannot be calibrated",
            where=str(source),
            expected="one graph",
            remedy="use tflite_weights or tflite_float16, which need no calibration",
        )


# --- ranges of activations ------------------------------------------------------------------------


def _ranges(source: Path, how: TfliteInt8, bench: Bench, kept: Path | None) -> Ranges:
    """By tensor, as the method finds them, or as another call found them."""
    if kept is not None and kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Ranges)
    count = how.samples or None
    feeds = {name: array[:count] for name, array in bench.calibration.items()}
    found = _METHODS[how.method](_runs(source, feeds, bench), how)
    if kept is not None:
        kept.write_bytes(msgspec.json.encode(found))
    return found


Runs = Callable[[int], Iterable[Feeds]]


def _runs(source: Path, feeds: Feeds, bench: Bench) -> Runs:
    def runs(rows: int) -> Iterator[Feeds]:
        for values in litert_door.activations(source, feeds, bench, rows=rows):
            yield {name: value for name, value in values.items() if value.dtype.kind == "f"}

    return runs


def _averaged(runs: Runs, how: TfliteInt8) -> Ranges:
    return ranges.averaged(runs(1))  # of samples, as the library itself does it


def _extremes(runs: Runs, how: TfliteInt8) -> Ranges:
    return ranges.extremes(runs(litert_door.BATCH_ROWS))


def _percentile(runs: Runs, how: TfliteInt8) -> Ranges:
    return ranges.percentile(ranges.histograms(lambda: runs(HISTOGRAM_ROWS)), how.percentile)


def _least_error(runs: Runs, how: TfliteInt8) -> Ranges:
    return ranges.mse(ranges.histograms(lambda: runs(HISTOGRAM_ROWS)), how.activations)


_METHODS: dict[str, Callable[[Runs, TfliteInt8], Ranges]] = {
    "average": _averaged,
    "minmax": _extremes,
    "percentile": _percentile,
    "mse": _least_error,
}


def _as_statistics(found: Ranges, graph: Graph) -> dict[str, dict[str, Array]]:
    """As the library's own calibration gives them: arrays of the tensor's rank."""
    live = [*graph.inputs, *(tensor for one in graph.operators for tensor in one.outputs)]
    ranks = {one.name: (1,) * len(one.shape) for one in live}
    return {
        name: {
            "min": np.full(ranks[name], low, np.float32),
            "max": np.full(ranks[name], high, np.float32),
        }
        for name, (low, high) in found.items()
    }


# --- the library ----------------------------------------------------------------------------------


def _library() -> Any:
    try:
        with foreign.quiet():
            import ai_edge_quantizer
            from ai_edge_quantizer import (  # noqa: F401 - loads what the package itself does not
                algorithm_manager,
                qtyping,
                quantizer,
            )
    except (ImportError, OSError) as e:
        raise UsageError(
            f"ai-edge-quantizer does not import: {e}",
            remedy="pip install 'edge-runtime[quantize-litert]'",
        ) from e
    return ai_edge_quantizer
