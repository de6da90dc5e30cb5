"""What an ONNX file says of itself, read without the onnx or protobuf packages.

Law of this file: it reads, it does not judge (`lint.py` does) and never runs anything. The file is
walked once from begin to end with a stack of open messages; tensors' data are skipped, not read.
Work and memory are bounded by the limits below, whatever the file holds, and every fault is a
BundleError that names the offset and the field.

It is stricter than protobuf on purpose: where a hostile file could mean one thing here and another
to the native loader (a singular field given twice, a field with a foreign wire type, groups,
overlong tags), it is refused. Field numbers are those of onnx.proto, IR version 13.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any, NamedTuple

from edge_runtime.bundle.source import Source
from edge_runtime.errors import BundleError

FIELDS_MAX = 2_000_000  # read or skipped; about four seconds of work at worst
DEPTH_MAX = 100  # nested messages; protobuf's own limit, so deeper files do not load anyway
LIVE_BYTES_MAX = 64 * 1024 * 1024  # estimate of what is held while walking; 100,000 initializers
TEXT_BYTES_MAX = 64 * 1024  # names are short; metadata values may be a list of labels

_WINDOW_BYTES = 64 * 1024
_TEXT_COST = 64  # bytes of a Python string or integer beside its content
_MESSAGE_COST = 256
_SCALAR_BYTES_MAX = 16  # raw data of one element; larger raw data is skipped

# TensorProto.DataType -> Open Inference Protocol datatype; the others have none.
DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}


class Value(NamedTuple):
    """An input or output of the graph.

    `datatype` is "" if the protocol has no name for it, or `kind` is not "tensor". `shape` has -1
    for a free dimension and is None if the rank is unknown; `symbols` names the free dimensions
    ("": no name).
    """

    name: str
    kind: str
    datatype: str
    shape: tuple[int, ...] | None
    symbols: tuple[str, ...]


class Initializer(NamedTuple):
    """A constant of the main graph; `datatype` is "" if the protocol has no name for it."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class OnnxGraph(NamedTuple):
    """What `read` found.

    `operators` counts (domain, type) of every node, also in subgraphs and local functions; the
    domain "ai.onnx" is written "". `local_functions` are operators that the file itself defines.
    `external_data` names tensors whose data lie in another file, wherever in the model they are.
    `output_scales` has the quantization scale of outputs that a DequantizeLinear makes.
    """

    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    initializers: tuple[Initializer, ...]
    operators: dict[tuple[str, str], int]
    local_functions: frozenset[tuple[str, str]]
    external_data: tuple[str, ...]
    metadata: dict[str, str]
    output_scales: dict[str, float]


class _Field(NamedTuple):
    """A field that we read. `kind` is "integer", "float", "text", "scalar" or a message's name."""

    name: str
    kind: str
    repeated: bool = False
    kept: bool = True  # messages: whether the parent holds on to it when it is closed


_MESSAGES: dict[str, dict[int, _Field]] = {
    "Model": {
        1: _Field("ir_version", "integer"),
        2: _Field("producer_name", "text"),
        3: _Field("producer_version", "text"),
        7: _Field("graph", "Graph"),
        8: _Field("opset_import", "Opset", repeated=True),
        14: _Field("metadata_props", "Entry", repeated=True),
        20: _Field("training_info", "Training", repeated=True),
        25: _Field("functions", "Function", repeated=True),
    },
    "Opset": {1: _Field("domain", "text"), 2: _Field("version", "integer")},
    "Entry": {1: _Field("key", "text"), 2: _Field("value", "text")},
    "Training": {
        1: _Field("initialization", "Graph", kept=False),
        2: _Field("algorithm", "Graph", kept=False),
    },
    "Function": {
        1: _Field("name", "text"),
        7: _Field("node", "Node", repeated=True, kept=False),
        9: _Field("opset_import", "Opset", repeated=True),
        10: _Field("domain", "text"),
        11: _Field("attribute_proto", "Attribute", repeated=True, kept=False),
    },
    "Graph": {
        1: _Field("node", "Node", repeated=True, kept=False),
        5: _Field("initializer", "Tensor", repeated=True, kept=False),
        11: _Field("input", "ValueInfo", repeated=True),
        12: _Field("output", "ValueInfo", repeated=True),
        15: _Field("sparse_initializer", "SparseTensor", repeated=True, kept=False),
    },
    "Node": {
        1: _Field("input", "text", repeated=True),
        2: _Field("output", "text", repeated=True),
        4: _Field("op_type", "text"),
        5: _Field("attribute", "Attribute", repeated=True, kept=False),
        7: _Field("domain", "text"),
    },
    "Attribute": {
        5: _Field("t", "Tensor", kept=False),
        6: _Field("g", "Graph", kept=False),
        10: _Field("tensors", "Tensor", repeated=True, kept=False),
        11: _Field("graphs", "Graph", repeated=True, kept=False),
        22: _Field("sparse_tensor", "SparseTensor", kept=False),
        23: _Field("sparse_tensors", "SparseTensor", repeated=True, kept=False),
    },
    "SparseTensor": {
        1: _Field("values", "Tensor", kept=False),
        2: _Field("indices", "Tensor", kept=False),
    },
    "Tensor": {
        1: _Field("dims", "integer", repeated=True),
        2: _Field("data_type", "integer"),
        4: _Field("float_data", "scalar", repeated=True),
        8: _Field("name", "text"),
        9: _Field("raw_data", "scalar"),
        13: _Field("external_data", "Entry", repeated=True, kept=False),
        14: _Field("data_location", "integer"),
    },
    "ValueInfo": {1: _Field("name", "text"), 2: _Field("type", "Type")},
    "Type": {
        1: _Field("tensor", "TensorType"),
        4: _Field("sequence", "Other", kept=False),
        5: _Field("map", "Other", kept=False),
        7: _Field("opaque", "Other", kept=False),
        8: _Field("sparse_tensor", "Other", kept=False),
        9: _Field("optional", "Other", kept=False),
    },
    "Other": {},
    "TensorType": {1: _Field("elem_type", "integer"), 2: _Field("shape", "Shape")},
    "Shape": {1: _Field("dim", "Dimension", repeated=True)},
    "Dimension": {1: _Field("dim_value", "integer"), 2: _Field("dim_param", "text")},
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {"integer": (_VARINT, _BYTES), "text": (_BYTES,), "scalar": (_BYTES, _FIXED32)}


def read(source: Source) -> OnnxGraph:
    """What the model in `source` says of itself.

    Raises:
        BundleError: it is no ONNX model, damaged, or over a limit; names offset and field.
    """
    return _Reader(source).read()


class _Open:
    """A message whose end is not reached yet."""

    __slots__ = ("begin", "cost", "end", "field", "kind", "seen", "values")

    def __init__(self, kind: str, field: _Field | None, begin: int, end: int) -> None:
        self.kind = kind
        self.field = field
        self.begin = begin
        self.end = end
        self.values: dict[str, Any] = {}
        self.seen: set[int] = set()  # numbers of the singular fields met
        self.cost = 0


class _Reader:
    """One walk over one file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._offset = 0
        self._window = b""
        self._window_begin = 0
        self._stack = [_Open("Model", None, 0, source.size)]
        self._fields = 0
        self._live_bytes = 0
        self._operators: Counter[tuple[str, str]] = Counter()
        self._initializers: list[Initializer] = []
        self._external: list[str] = []
        self._scalars: dict[str, float] = {}  # initializers of one FP32 element
        self._scales: dict[str, str] = {}  # output of a DequantizeLinear -> name of its scale

    def read(self) -> OnnxGraph:
        model = self._walk()
        if not isinstance(model.get("ir_version"), int) or "graph" not in model:
            raise BundleError(
                "holds no ir_version or no graph", where=self._source.where, expected="ONNX"
            )
        return self._result(model)

    # The walk

    def _walk(self) -> dict[str, Any]:
        """All fields of the outermost message that are kept."""
        while True:
            message = self._stack[-1]
            if self._offset < message.end:
                self._read_field(message)
                continue
            self._stack.pop()
            self._close(message)
            if not self._stack:
                return message.values

    def _read_field(self, message: _Open) -> None:
        self._fields += 1
        if self._fields > FIELDS_MAX:
            raise self._error("the model has too many fields", f"at most {FIELDS_MAX}")
        tag = self._varint(message.end, bytes_max=5)
        number, wire = tag >> 3, tag & 7
        field = _MESSAGES[message.kind].get(number)
        if field is None:
            self._skip(message.end, number, wire)
            return
        if wire not in _WIRE_TYPES.get(field.kind, (_BYTES,)):
            raise self._error(f"{field.name} has wire type {wire}", "an ONNX model")
        if not field.repeated:
            if number in message.seen:
                raise self._error(f"{field.name} is there twice", "once")
            message.seen.add(number)
        if field.kind == "integer" and wire == _VARINT:
            self._add(message, field, _signed(self._varint(message.end)), _TEXT_COST)
            return
        self._read_bytes(message, field, wire)

    def _read_bytes(self, message: _Open, field: _Field, wire: int) -> None:
        size = 4 if wire == _FIXED32 else self._varint(message.end)
        end = self._offset + size
        if end > message.end:
            raise self._error(
                f"{field.name} of {size} bytes runs past the end of {message.kind}",
                f"at most {message.end - self._offset} bytes",
            )
        if field.kind == "integer":
            self._read_packed(message, field, end)
        elif field.kind == "text":
            self._add(message, field, self._text(field, size), _TEXT_COST + size)
        elif field.kind == "scalar":
            self._read_scalar(message, field, size)
        else:
            self._open(field, end)

    def _read_packed(self, message: _Open, field: _Field, end: int) -> None:
        if not field.repeated:
            raise self._error(f"{field.name} is packed", "one integer")
        while self._offset < end:
            self._fields += 1
            self._add(message, field, _signed(self._varint(end)), _TEXT_COST)

    def _read_scalar(self, message: _Open, field: _Field, size: int) -> None:
        """Data of a tensor: kept if small enough to be one number, and only the first piece."""
        if size <= _SCALAR_BYTES_MAX and field.name not in message.values:
            message.values[field.name] = self._bytes(size)
        else:
            message.values[field.name] = b""  # more than one element
            self._offset += size

    def _open(self, field: _Field, end: int) -> None:
        if len(self._stack) >= DEPTH_MAX:
            raise self._error("messages are nested too deeply", f"at most {DEPTH_MAX} levels")
        self._stack.append(_Open(field.kind, field, self._offset, end))
        self._hold(self._stack[-1], _MESSAGE_COST)

    def _close(self, message: _Open) -> None:
        if message.kind == "Node":
            self._close_node(message.values)
        elif message.kind == "Tensor":
            self._close_tensor(message)
        if message.field is None:
            return
        parent = self._stack[-1]
        if message.field.kept:
            self._put(parent, message.field, message.values)
            parent.cost += message.cost
        else:
            # Only that it was there: for the kind of a type, and for external data.
            parent.values[message.field.name] = True
            self._live_bytes -= message.cost

    def _close_node(self, node: dict[str, Any]) -> None:
        key = (_domain(node), node.get("op_type", ""))
        if key not in self._operators:
            self._live_bytes += _MESSAGE_COST + len(key[0]) + len(key[1])
        self._operators[key] += 1
        inputs, outputs = node.get("input", []), node.get("output", [])
        if key[1] == "DequantizeLinear" and len(inputs) > 1 and outputs and self._in_main_graph():
            self._live_bytes += 2 * _MESSAGE_COST + len(inputs[1]) + len(outputs[0])
            self._scales[outputs[0]] = inputs[1]

    def _close_tensor(self, message: _Open) -> None:
        tensor = message.values
        name = tensor.get("name", "")
        if tensor.get("data_location", 0) != 0 or "external_data" in tensor:
            self._live_bytes += _TEXT_COST + len(name)
            self._external.append(name)
        if not (self._in_main_graph() and message.field and message.field.name == "initializer"):
            return
        shape = tuple(tensor.get("dims", ()))
        self._live_bytes += 2 * _TEXT_COST + len(name) + 40 * len(shape)
        datatype = DATATYPES.get(tensor.get("data_type", 0), "")
        self._initializers.append(Initializer(name, datatype, shape))
        data = tensor.get("raw_data") or tensor.get("float_data") or b""
        if datatype == "FP32" and len(data) == 4:
            (self._scalars[name],) = struct.unpack("<f", data)

    def _in_main_graph(self) -> bool:
        return len(self._stack) == 2 and self._stack[1].kind == "Graph"

    # Values

    def _add(self, message: _Open, field: _Field, value: Any, cost: int) -> None:
        self._hold(message, cost)
        self._put(message, field, value)

    def _hold(self, message: _Open, cost: int) -> None:
        message.cost += cost
        self._live_bytes += cost
        if self._live_bytes > LIVE_BYTES_MAX:
            raise self._error(
                "names and shapes take too much memory", f"at most {LIVE_BYTES_MAX} bytes"
            )

    @staticmethod
    def _put(message: _Open, field: _Field, value: Any) -> None:
        if field.repeated:
            message.values.setdefault(field.name, []).append(value)
        else:
            message.values[field.name] = value

    # Bytes

    def _varint(self, end: int, bytes_max: int = 10) -> int:
        """An unsigned number of 7 bits a byte, least significant first; moves on."""
        result = shift = 0
        for _ in range(bytes_max):
            index = self._offset - self._window_begin
            if not 0 <= index < len(self._window):
                self._refill(end)
                index = 0
            if self._offset >= end:
                raise self._error("a number runs past the end of its message")
            byte = self._window[index]
            self._offset += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result & 0xFFFF_FFFF_FFFF_FFFF
            shift += 7
        raise self._error(f"a number of more than {bytes_max} bytes")

    def _refill(self, end: int) -> None:
        if self._offset >= end:
            raise self._error("a number runs past the end of its message")
        size = min(_WINDOW_BYTES, self._source.size - self._offset)
        self._window = self._source.read_at(self._offset, size)
        self._window_begin = self._offset

    def _bytes(self, size: int) -> bytes:
        begin = self._offset - self._window_begin
        self._offset += size
        if begin >= 0 and begin + size <= len(self._window):
            return self._window[begin : begin + size]
        return self._source.read_at(self._offset - size, size)

    def _text(self, field: _Field, size: int) -> str:
        if size > TEXT_BYTES_MAX:
            raise self._error(f"{field.name} has {size} bytes", f"at most {TEXT_BYTES_MAX} bytes")
        try:
            return self._bytes(size).decode()
        except UnicodeDecodeError as e:
            raise self._error(f"{field.name} is not UTF-8", "text") from e

    def _skip(self, end: int, number: int, wire: int) -> None:
        """Pass over a field that we do not know."""
        if number == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise self._error(f"field {number} has wire type {wire}", "an ONNX model")
        if wire == _VARINT:
            self._varint(end)
            return
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if size is None:
            size = self._varint(end)
        if self._offset + size > end:
            raise self._error(f"field {number} of {size} bytes runs past the end of its message")
        self._offset += size

    def _error(self, message: str, expected: str = "") -> BundleError:
        path = ".".join(part.field.name if part.field else "model" for part in self._stack[:8])
        return BundleError(
            message,
            where=f"{self._source.where}: offset {self._offset} ({path})",
            expected=expected,
            remedy="the file is damaged or not an ONNX model",
        )

    # The result

    def _result(self, model: dict[str, Any]) -> OnnxGraph:
        graph = model["graph"]
        constants = {initializer.name for initializer in self._initializers}
        inputs = tuple(
            _value(info) for info in graph.get("input", []) if info.get("name") not in constants
        )
        outputs = tuple(_value(info) for info in graph.get("output", []))
        functions = model.get("functions", [])
        producer = f"{model.get('producer_name', '')} {model.get('producer_version', '')}"
        return OnnxGraph(
            ir_version=model["ir_version"],
            producer=producer.strip(),
            opsets={_domain(opset): opset.get("version", 0) for opset in _opsets(model, functions)},
            inputs=inputs,
            outputs=outputs,
            initializers=tuple(self._initializers),
            operators=dict(self._operators),
            local_functions=frozenset((_domain(f), f.get("name", "")) for f in functions),
            external_data=tuple(self._external),
            metadata={
                e.get("key", ""): e.get("value", "") for e in model.get("metadata_props", [])
            },
            output_scales={
                output.name: abs(self._scalars[self._scales[output.name]])
                for output in outputs
                if self._scales.get(output.name) in self._scalars
            },
        )


def _opsets(model: dict[str, Any], functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions' first, so that the model's own win."""
    inner = [opset for function in functions for opset in function.get("opset_import", [])]
    return [*inner, *model.get("opset_import", [])]


def _domain(values: dict[str, Any]) -> str:
    domain: str = values.get("domain", "")
    return "" if domain == "ai.onnx" else domain


def _value(info: dict[str, Any]) -> Value:
    kind = info.get("type", {})
    tensor = kind.get("tensor")
    if tensor is None or len(kind) != 1:
        return Value(info.get("name", ""), next(iter(kind), "untyped"), "", None, ())
    datatype = DATATYPES.get(tensor.get("elem_type", 0), "")
    if "shape" not in tensor:
        return Value(info.get("name", ""), "tensor", datatype, None, ())
    dims = tensor["shape"].get("dim", [])
    shape = tuple(_free_or_fixed(dim) for dim in dims)
    symbols = tuple(dim.get("dim_param", "") for dim in dims)
    return Value(info.get("name", ""), "tensor", datatype, shape, symbols)


def _free_or_fixed(dim: dict[str, Any]) -> int:
    """Some exporters write -1 for a free dimension; a symbol beside a size is the size's name."""
    value: int = dim.get("dim_value", -1)
    return max(value, -1)


def _signed(value: int) -> int:
    """The int64 that a varint means."""
    return value - (1 << 64) if value >> 63 else value
