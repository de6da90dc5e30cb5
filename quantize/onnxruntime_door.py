"""The door to onnxruntime's build-time tools: optimizing, calibrating, quantizing.

Law of this file: the only one of quantize/ that imports onnxruntime. Serving it is the business of
`edge_runtime.backends`; evaluation goes through there. Exceptions of the library become ours here,
and what it prints is kept from the user.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import ModelError, UsageError
from quantize import biases, datasets, foreign, onnx_door, ranges
from quantize.passes import Bench, Feeds

if TYPE_CHECKING:
    from quantize.passes.integer import DynamicInt8, StaticInt8
    from quantize.passes.weights import WeightOnly

Array = np.ndarray[Any, Any]

# Rows per calibration run where the model has a batch axis: bounds the memory of all activations.
BATCH_ROWS = 32
# All inner tensors of a run are held at once: 27 MB a sample of a usual image network.
WATCHED_BYTES_MAX = 256 << 20
_TYPES = {"u8": "QUInt8", "s8": "QInt8", "u16": "QUInt16", "s16": "QInt16"}
_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile", "mse": "MinMax"}


def versions() -> dict[str, str]:
    """Of the libraries that decide what a pass writes."""
    return {"onnxruntime": str(_library().__version__), "onnx": onnx_door.version()}


def optimize(source: Path, out: Path) -> None:
    """Write the graph with constants folded and normalizations merged; answers stay the same.

    Raises:
        ModelError: the library refuses the model.
    """
    library = _library()
    options = library.SessionOptions()
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    with foreign.ours("onnxruntime failed to optimize", source):
        library.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def quantize_static(
    source: Path,
    out: Path,
    how: StaticInt8,
    bench: Bench,
    only: tuple[str, ...] = (),
    ranges_file: Path | None = None,
) -> None:
    """Write the model with integer weights and activations.

    Args:
        only: nodes by name; empty: all. ranges_file: where the ranges of activations are kept for
            the next call with the same calibration; written if it is not there.

    Raises:
        UsageError: a name that no node has.
        ModelError: the library refuses the model, or nothing was quantized.
    """
    tools = _tools()
    onnx_door.refuse_unknown(how.exclude, onnx_door.load(source))
    feeds = _some(bench.calibration, how.samples)
    extra: dict[str, Any] = {
        "ActivationSymmetric": how.symmetric_activations,
        "WeightSymmetric": True,
        "CalibPercentile": how.percentile,
        # 16-bit QuantizeLinear is standard from opset 21 on, and onnxruntime's own before.
        "UseQDQContribOps": how.activations in ("u16", "s16"),
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        foreign.ours("onnxruntime failed to quantize", source),
    ):
        model = onnx_door.load(source)
        only = _with_limits(model, only)
        source = _own(source, Path(scratch))
        if biases.separated(model):
            source = source.with_name("separated.onnx")
            onnx_door.save(model, source)
        del model  # hundreds of megabytes, perhaps
        cache = ranges_file
        known = cache is not None and cache.exists()
        rows = 1 if known else _rows(*_watched(source), feeds, bench)
        if how.method != "minmax" and not known:
            cache = cache or Path(scratch) / "ranges.json"
            if how.method == "mse":
                bits = 16 if how.activations.endswith("16") else 8
                _save_ranges(ranges.mse(histograms(source, feeds, bench), bits), cache)
            else:
                _save_library_ranges(source, cache, how, _batches(feeds, bench, rows))
        tools.quantize_static(
            str(source),
            str(out),
            _reader(_batches(feeds, bench, rows)),
            quant_format=tools.QuantFormat.QDQ
            if how.format == "qdq"
            else tools.QuantFormat.QOperator,
            op_types_to_quantize=list(how.operators) or None,
            per_channel=how.per_channel,
            reduce_range=how.reduce_range,
            activation_type=getattr(tools.QuantType, _TYPES[how.activations]),
            weight_type=getattr(tools.QuantType, _TYPES[how.weights]),
            nodes_to_quantize=list(only) or None,
            nodes_to_exclude=list(how.exclude) or None,
            calibrate_method=getattr(tools.CalibrationMethod, _METHODS[how.method]),
            extra_options=extra,
            calibration_cache_path=cache,
        )
    _check_result(out, how.exclude)


def _with_limits(model: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The nodes, and the Relu or Clip that limits the output of each.

    Without its limit a node's output is rounded over the whole range that the limit is there to
    cut off: the first convolution of EfficientNet-Lite0 alone then had 6 dB at the answer for 26.
    """
    made = {out for node in model.graph.node if node.name in names for out in node.output}
    limits = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Relu", "Clip") and node.name and node.input[0] in made
    ]
    return tuple(dict.fromkeys((*names, *limits)))


def quantize_dynamic(source: Path, out: Path, how: DynamicInt8, bench: Bench) -> None:
    """Write the model with integer weights. Raises: UsageError, ModelError."""
    tools = _tools()
    onnx_door.refuse_unknown(how.exclude, onnx_door.load(source))
    with (
        tempfile.TemporaryDirectory() as scratch,
        foreign.ours("onnxruntime failed to quantize", source),
    ):
        tools.quantize_dynamic(
            str(_own(source, Path(scratch))),
            str(out),
            op_types_to_quantize=list(how.operators) or None,
            per_channel=how.per_channel,
            reduce_range=how.reduce_range,
            weight_type=getattr(tools.QuantType, _TYPES[how.weights]),
            nodes_to_exclude=list(how.exclude) or None,
        )
    _check_result(out, how.exclude)


def _own(source: Path, folder: Path) -> Path:
    """The same file under a name of this call's: the library writes a file beside its source, and
    two calls at once (jobs of a search) would take it from each other.
    """
    mine = folder / source.name
    mine.symlink_to(source.resolve())
    return mine


def pack_weights(source: Path, out: Path, how: WeightOnly) -> None:
    """Write the model with the weights of its MatMul nodes in 4 bits (MatMulNBits).

    Raises:
        UsageError: it has no such node. ModelError: the library refuses it.
    """
    _library()
    model = onnx_door.load(source)
    onnx_door.refuse_unknown(how.exclude, model)
    weights = onnx_door.arrays(model)
    fit = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    if not any(n.name not in how.exclude for n in fit):
        raise UsageError(
            "the model has no MatMul with constant weights"
            + (" that is not excluded" if fit else "")
            + ": nothing can be stored in 4 bits",
            remedy="use 8 bits, which any Conv, Gemm or MatMul takes",
        )
    with foreign.ours("onnxruntime failed to quantize", source):
        module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        packer = module.MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=how.block,
            is_symmetric=True,
            nodes_to_exclude=list(how.exclude),
        )
        packer.process()
        onnx_door.save(packer.model.model, out)


def to_float16(source: Path, out: Path, exclude: tuple[str, ...]) -> None:
    """Write the model computing in float16, its inputs and outputs as they were.

    Raises:
        UsageError: a name that no node has. ModelError: the library refuses the model.
    """
    _library()
    model = onnx_door.load(source)
    onnx_door.refuse_unknown(exclude, model)
    with foreign.ours("onnxruntime failed to convert", source):
        module = importlib.import_module("onnxruntime.transformers.float16")
        model = module.convert_float_to_float16(
            onnx_door.infer_shapes(model),
            keep_io_types=True,
            node_block_list=list(exclude) or None,
        )
        # The library puts its casts last, and checks no order.
        onnx_door.sort(model)
        onnx_door.save(model, out)


# --- activations ----------------------------------------------------------------------------------


def histograms(source: Path, feeds: Feeds, bench: Bench) -> dict[str, ranges.Histogram]:
    """Of every float tensor between two nodes, over the calibration samples.

    Two passes over the samples: ranges first, then counts, so that memory is that of one run.
    """
    names, session = _watched(source)
    names = [*names, *feeds]
    rows = _rows(names, session, feeds, bench)

    def runs() -> Iterator[Feeds]:
        for values in _runs(session, names, feeds, bench, rows):
            yield dict(zip(names, values, strict=True))

    return ranges.histograms(runs)


def _rows(names: list[str], session: Any, feeds: Feeds, bench: Bench) -> int:
    """How many samples a run may take, by what the tensors of one hold."""
    if bench.batch_axis is None:
        return 1
    one = {name: array[:1] for name, array in feeds.items()}
    held = sum(value.nbytes for values in _runs(session, names, one, bench) for value in values)
    return min(max(WATCHED_BYTES_MAX // max(held, 1), 1), BATCH_ROWS)


def activations(
    source: Path,
    feeds: Feeds,
    bench: Bench,
    wanted: set[str] | None = None,
    rows: int = 0,
) -> Any:
    """An iterator over calibration runs: {tensor name: value} of inner tensors (or of `wanted`).

    Args:
        rows: samples of a run; 0: as many as WATCHED_BYTES_MAX allows.
    """
    names, session = _watched(source, wanted)
    rows = rows or _rows(names, session, feeds, bench)
    for values in _runs(session, names, feeds, bench, rows):
        yield dict(zip(names, values, strict=True))


def _watched(source: Path, wanted: set[str] | None = None) -> tuple[list[str], Any]:
    """A session of the model in which inner float tensors are outputs too."""
    onnx, library = onnx_door.library(), _library()
    model = onnx_door.load(source)
    inner = {out for node in model.graph.node for out in node.output if out}
    floats = {
        info.name
        for info in onnx_door.infer_shapes(model).graph.value_info
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    given = {out.name for out in model.graph.output}
    names = sorted(((inner & floats) | given) if wanted is None else wanted & (inner | given))
    for name in names:
        if name not in given:
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads that wait busily take the processor from the thread that counts what was computed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with foreign.ours("onnxruntime failed to load", source):
        session = library.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    return names, session


def _runs(
    session: Any, names: list[str], feeds: Feeds, bench: Bench, rows: int = BATCH_ROWS
) -> Iterator[list[Array]]:
    asked = [name for name in names if name not in feeds]
    for feed in _batches(feeds, bench, rows):
        with foreign.ours("onnxruntime failed to run", Path("calibration")):
            # Asked for nothing, the library answers everything.
            got = session.run(asked, feed) if asked else []
            values = dict(zip(asked, got, strict=True)) | feed
        yield [values[name] for name in names]


def _batches(feeds: Feeds, bench: Bench, rows: int = BATCH_ROWS) -> Iterator[Feeds]:
    """Feeds of a run: batches where the model has a batch axis, else single samples."""
    rows = rows if bench.batch_axis == 0 else 1
    count = len(next(iter(feeds.values())))
    for first in range(0, count, rows):
        part = {name: array[first : first + rows] for name, array in feeds.items()}
        yield datasets.fed(part, bench.inputs)


def _reader(batches: Iterator[Feeds]) -> Any:
    class Reader(_tools().CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feeds | None:
            return next(batches, None)

    return Reader()


def _some(feeds: Feeds, samples: int) -> Feeds:
    return {name: array[:samples] for name, array in feeds.items()} if samples else feeds


def _save_ranges(found: dict[str, tuple[float, float]], path: Path) -> None:
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    data = calibrate.TensorsData(
        calibrate.CalibrationMethod.MinMax,
        {
            name: calibrate.TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in found.items()
        },
    )
    calibrate.save_tensors_data(data, path)


def _save_library_ranges(
    source: Path, out: Path, how: StaticInt8, batches: Iterator[Feeds]
) -> None:
    """Ranges by the library's own histograms, one batch at a time: it refuses batches that differ.

    Given all samples at once, the library holds every activation of every one of them: 20 MB a
    sample of a small image network, 10 GB of a usual calibration set.
    """
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    registry = importlib.import_module("onnxruntime.quantization.registry")
    kinds = how.operators or sorted({*registry.QLinearOpsRegistry, *registry.QDQRegistry})
    with tempfile.TemporaryDirectory() as folder:
        calibrator = calibrate.create_calibrator(
            source,
            list(kinds),
            augmented_model_path=str(Path(folder) / "watched.onnx"),
            calibrate_method=getattr(calibrate.CalibrationMethod, _METHODS[how.method]),
            extra_options={"percentile": how.percentile} if how.method == "percentile" else {},
        )
        for feed in batches:
            calibrator.collect_data(_reader(iter([feed])))
        calibrate.save_tensors_data(calibrator.compute_data(), out)


# --- the library ----------------------------------------------------------------------------------


def _library() -> Any:
    # As edge_runtime.backends.onnxruntime says: nothing is reported to the maker of a library.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except (ImportError, OSError) as e:
        raise UsageError(
            f"onnxruntime does not import: {e}", remedy="pip install 'edge-runtime[quantize]'"
        ) from e
    return onnxruntime


def _tools() -> Any:
    _library()
    with foreign.quiet():
        return importlib.import_module("onnxruntime.quantization")


def _check_result(out: Path, exclude: tuple[str, ...]) -> None:
    """Raises: ModelError if nothing was quantized: the library says so only in its log."""
    kinds = {node.op_type for node in onnx_door.load(out).graph.node}
    if not any(
        "Quantize" in kind or "Integer" in kind or kind.startswith("QLinear") for kind in kinds
    ):
        raise ModelError(
            "nothing was quantized: no operator of the model can be"
            + (", or all of them are excluded" if exclude else ""),
            where=str(out),
        )
