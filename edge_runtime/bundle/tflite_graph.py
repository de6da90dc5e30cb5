"""What a TFLite file says of itself, read without flatbuffers or TensorFlow packages.

Law of this file: it reads, it does not judge (`lint.py` does) and never runs anything. A FlatBuffer
is a graph of offsets, which a hostile file may point anywhere and at the same thing many times: so
every offset is checked against the file before it is followed, every table that is visited counts
towards a limit, and nothing is kept that the result does not need. Tensors' data are not read.
Every fault is a BundleError that names the table and its offset.

tflite-runtime follows offsets unchecked, so tables that we do not read (operators' options) are
at least checked to lie within the file with their table of fields.

Field numbers are those of LiteRT's schema.fbs, version 3.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from edge_runtime.bundle.onnx_graph import Value
from edge_runtime.bundle.source import Source
from edge_runtime.errors import BundleError

TABLES_MAX = 400_000  # visited, not distinct; about eight seconds of work at worst
NUMBERS_MAX = 65_536  # of one vector that is read: no operator has so many tensors
NUMBERS_SUM_MAX = 8_000_000  # of all vectors and tables of fields; twenty for each table
TEXT_BYTES_MAX = 64 * 1024  # names are short
LIVE_BYTES_MAX = 16 * 1024 * 1024  # of names that are kept
DIMENSIONS_MAX = 16

_BLOCK_BYTES = 64 * 1024
_BLOCKS_MAX = 16  # kept in memory: 1 MiB

# TensorType -> Open Inference Protocol datatype and bits of an element; the others have none.
_TYPES = {
    0: ("FP32", 32), 1: ("FP16", 16), 2: ("INT32", 32), 3: ("UINT8", 8), 4: ("INT64", 64),
    5: ("BYTES", 0), 6: ("BOOL", 8), 7: ("INT16", 16), 9: ("INT8", 8), 10: ("FP64", 64),
    12: ("UINT64", 64), 15: ("UINT32", 32), 16: ("UINT16", 16), 17: ("", 4), 18: ("BF16", 16),
    19: ("", 2), 20: ("", 4),
}  # fmt: skip
_INTEGERS = {"INT8", "UINT8", "INT16", "UINT16"}  # what quantized tensors are

_CUSTOM = 32
DEQUANTIZE, GATHER_ND, QUANTIZE = 6, 107, 114
# VAR_HANDLE, READ_VARIABLE, ASSIGN_VARIABLE
_STATE_OPERATORS = {142, 143, 144}


class Quantization(NamedTuple):
    """real = scale * (stored - zero_point), for a whole tensor."""

    scale: float
    zero_point: int


class Io(NamedTuple):
    """An input or output of the main graph. `value.name` is the tensor's own name."""

    value: Value
    signature_name: str  # its name in the signature; the tensor's own where there is none
    quantization: Quantization | None  # None: not quantized, or not as a whole


class TfliteGraph(NamedTuple):
    """What `read` found.

    `operators` counts the builtin operators of all subgraphs by their number, `custom_operators`
    the others by name. `constants` has the number of elements of constant tensors by datatype
    ("INT4": packed four-bit types). `is_stateful`: it has variables. `has_quantized_activations`:
    a tensor that is computed has a scale. `output_scales`: the scale of each float output that a
    DEQUANTIZE makes; where no output is float, 1 for each that is served quantized (a step of the
    numbers themselves). `external`: why data may lie in
    other files; "" if all are in this one.
    """

    version: int
    description: str
    subgraphs: int
    inputs: tuple[Io, ...]
    outputs: tuple[Io, ...]
    operators: dict[int, int]
    custom_operators: dict[str, int]
    constants: dict[str, int]
    is_stateful: bool
    has_quantized_activations: bool
    output_scales: dict[str, float]
    external: str


def read(source: Source) -> TfliteGraph:
    """What the model in `source` says of itself.

    Raises:
        BundleError: it is no TFLite model, damaged, or over a limit; names table and offset.
    """
    return _Reader(source).read()


def values(ios: tuple[Io, ...], names: str) -> tuple[Value, ...]:
    """Inputs or outputs under their names: "signature" or "tensor"."""
    if names == "tensor":
        return tuple(io.value for io in ios)
    return tuple(io.value._replace(name=io.signature_name) for io in ios)


# --- bytes ---------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """A table whose header lies within the file. `fields` has offsets from `at`; 0: default."""

    kind: str
    at: int
    size: int
    fields: tuple[int, ...]


class _File:
    """Checked reads at any offset."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.size = source.size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._tables = 0
        self._numbers = 0
        self._text_bytes = 0

    def error(self, kind: str, at: int, message: str, expected: str = "") -> BundleError:
        return BundleError(
            message,
            where=f"{self.source.where}: offset {at} ({kind})",
            expected=expected,
            remedy="the file is damaged or not a TFLite model",
        )

    def read(self, kind: str, at: int, size: int) -> bytes:
        if at < 0 or size < 0 or at + size > self.size:
            raise self.error(kind, at, f"{size} bytes lie outside the file of {self.size} bytes")
        number, begin = divmod(at, _BLOCK_BYTES)
        if begin + size > _BLOCK_BYTES:
            return self.source.read_at(at, size)
        block = self._blocks.get(number)
        if block is None:
            room = min(_BLOCK_BYTES, self.size - number * _BLOCK_BYTES)
            block = self.source.read_at(number * _BLOCK_BYTES, room)
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS_MAX:
                self._blocks.popitem(last=False)
        return block[begin : begin + size]

    def number(self, kind: str, at: int, code: str = "I") -> int:
        found: int
        (found,) = struct.unpack(f"<{code}", self.read(kind, at, struct.calcsize(code)))
        return found

    def table(self, kind: str, at: int) -> _Table:
        """The table at an offset, with its own table of fields."""
        self._tables += 1
        if self._tables > TABLES_MAX:
            raise self.error(kind, at, "the model has too many tables", f"at most {TABLES_MAX}")
        head = at - self.number(kind, at, "i")
        head_size, size = struct.unpack("<HH", self.read(kind, head, 4))
        if head_size < 4 or head_size % 2 or size < 4:
            raise self.error(kind, at, "it has no table of fields")
        self.read(kind, at, size)
        count = (head_size - 4) // 2
        self._count(kind, at, count)
        offsets = struct.unpack(f"<{count}H", self.read(kind, head + 4, 2 * count))
        return _Table(kind, at, size, offsets)

    def _count(self, kind: str, at: int, count: int) -> None:
        self._numbers += count
        if self._numbers > NUMBERS_SUM_MAX:
            raise self.error(kind, at, "too many numbers", f"at most {NUMBERS_SUM_MAX}")

    # Fields; `number` is the field's

    def place(self, table: _Table, number: int, size: int) -> int:
        """Where a field lies; 0: it is not there."""
        offset = table.fields[number] if number < len(table.fields) else 0
        if offset and offset + size > table.size:
            raise self.error(table.kind, table.at, f"field {number} lies outside its table")
        return table.at + offset if offset else 0

    def scalar(self, table: _Table, number: int, code: str, default: int = 0) -> int:
        at = self.place(table, number, struct.calcsize(code))
        return self.number(table.kind, at, code) if at else default

    def target(self, table: _Table, number: int) -> int:
        """Where a field points to; 0: it is not there."""
        at = self.place(table, number, 4)
        return at + self.number(table.kind, at) if at else 0

    def child(self, table: _Table, number: int, kind: str) -> _Table | None:
        at = self.target(table, number)
        return self.table(kind, at) if at else None

    def vector(self, table: _Table, number: int, item_size: int) -> tuple[int, int]:
        """Where a vector's items begin, and how many they are; all of them are in the file."""
        at = self.target(table, number)
        if not at:
            return 0, 0
        count = self.number(table.kind, at)
        if at + 4 + count * item_size > self.size:
            message = f"field {number} has {count} items, which run past the end of the file"
            raise self.error(table.kind, table.at, message)
        return at + 4, count

    def numbers(self, table: _Table, number: int, code: str = "i") -> tuple[int, ...]:
        size = struct.calcsize(code)
        at, count = self.vector(table, number, size)
        if count > NUMBERS_MAX:
            raise self.error(
                table.kind, table.at, f"field {number} has {count} items", f"at most {NUMBERS_MAX}"
            )
        self._count(table.kind, table.at, count)
        return struct.unpack(f"<{count}{code}", self.read(table.kind, at, count * size))

    def tables(self, table: _Table, number: int, kind: str) -> Iterator[_Table]:
        at, count = self.vector(table, number, 4)
        for place in range(at, at + 4 * count, 4):
            yield self.table(kind, place + self.number(kind, place))

    def text(self, table: _Table, number: int) -> str:
        at, count = self.vector(table, number, 1)
        self._text_bytes += count
        if count > TEXT_BYTES_MAX or self._text_bytes > LIVE_BYTES_MAX:
            raise self.error(
                table.kind,
                table.at,
                f"field {number} is a text of {count} bytes",
                f"at most {TEXT_BYTES_MAX} bytes, and {LIVE_BYTES_MAX} in all",
            )
        try:
            return self.read(table.kind, at, count).decode()
        except UnicodeDecodeError as e:
            raise self.error(table.kind, table.at, f"field {number} is not UTF-8", "text") from e


# --- the model -----------------------------------------------------------------------------------


class _Names(NamedTuple):
    """Tensor number -> name in the signature."""

    inputs: dict[int, str]
    outputs: dict[int, str]


class _Reader:
    """One walk over one file."""

    def __init__(self, source: Source) -> None:
        self._file = _File(source)
        self._codes: list[int | str] = []
        self._buffers = array("Q")  # bytes of each
        self._operators: Counter[int] = Counter()
        self._customs: Counter[str] = Counter()
        self._constants: Counter[str] = Counter()
        self._is_stateful = False
        self._has_quantized = False
        self._external = ""

    def read(self) -> TfliteGraph:
        file = self._file
        if file.read("file", 0, 8)[4:] != b"TFL3":
            raise file.error("file", 4, "it is not marked as a TFLite model", "TFL3")
        root = file.table("Model", file.number("file", 0))
        if file.vector(root, 8, 4)[1] or file.vector(root, 9, 4)[1]:
            self._external = "its weights lie in other files (external buffers)"
        self._codes = [self._code(code) for code in file.tables(root, 1, "OperatorCode")]
        for buffer in file.tables(root, 4, "Buffer"):
            self._buffers.append(self._buffer(buffer))
        graphs = [self._subgraph(graph) for graph in file.tables(root, 2, "SubGraph")]
        if not graphs:
            raise file.error("Model", root.at, "it has no subgraph", "a TFLite model")
        inputs, outputs, scales = graphs[0]
        names = self._signature_names(root, inputs, outputs)
        return TfliteGraph(
            version=file.scalar(root, 0, "I"),
            description=file.text(root, 3),
            subgraphs=len(graphs),
            inputs=tuple(self._io(tensor, names, "inputs") for tensor in inputs.items()),
            outputs=tuple(self._io(tensor, names, "outputs") for tensor in outputs.items()),
            operators=dict(self._operators),
            custom_operators=dict(self._customs),
            constants=dict(self._constants),
            is_stateful=self._is_stateful,
            has_quantized_activations=self._has_quantized,
            output_scales=self._output_scales(outputs, names, scales),
            external=self._external,
        )

    def _code(self, code: _Table) -> int | str:
        """The number of a builtin operator or the name of a custom one."""
        old, new = self._file.scalar(code, 0, "b"), self._file.scalar(code, 3, "i")
        builtin = max(old, new)  # as the library does: old files have the first only
        return self._file.text(code, 1) if builtin == _CUSTOM else builtin

    def _buffer(self, buffer: _Table) -> int:
        """Its size; the bytes are in the table, or anywhere in the file."""
        file = self._file
        _, size = file.vector(buffer, 0, 1)
        offset, length = file.scalar(buffer, 1, "Q"), file.scalar(buffer, 2, "Q")
        if offset > 1:  # 1: a mark of writers that fill it in later
            self._check_within(buffer, offset, length)
            return length
        return size

    def _check_within(self, table: _Table, offset: int, size: int) -> None:
        if offset + size > self._file.size:
            message = f"{size} bytes at offset {offset} lie outside the file"
            raise self._file.error(table.kind, table.at, message)

    # Subgraphs

    def _subgraph(
        self, graph: _Table
    ) -> tuple[dict[int, _Table], dict[int, _Table], dict[int, float]]:
        """Its inputs and outputs by tensor number; scales of tensors that are dequantized."""
        file = self._file
        _, count = file.vector(graph, 0, 4)
        if count > TABLES_MAX:
            raise file.error("SubGraph", graph.at, f"{count} tensors", f"at most {TABLES_MAX}")
        computed = bytearray(count)
        dequantized: dict[int, int] = {}
        for operator in file.tables(graph, 3, "Operator"):
            code, inputs, outputs = self._operator(operator, count)
            for number in outputs:
                computed[number] = 1
            if code == DEQUANTIZE and inputs and outputs:
                dequantized[outputs[0]] = inputs[0]
        for number in file.numbers(graph, 1):
            self._check_tensor(graph, number, count)
            computed[number] = 1
        for number, tensor in enumerate(file.tables(graph, 0, "Tensor")):
            self._count_tensor(tensor, is_computed=bool(computed[number]))
        ends = [self._ends(graph, field, count) for field in (1, 2)]
        scales = {
            number: found.scale
            for number in ends[1]
            if number in dequantized
            and dequantized[number] >= 0
            and (found := self._quantization(self._tensor(graph, dequantized[number])))
        }
        return ends[0], ends[1], scales

    def _operator(
        self, operator: _Table, count: int
    ) -> tuple[int | str, tuple[int, ...], tuple[int, ...]]:
        file = self._file
        index = file.scalar(operator, 0, "I")
        if index >= len(self._codes):
            raise file.error("Operator", operator.at, f"its code {index} is not there")
        code = self._codes[index]
        if isinstance(code, str):
            self._customs[code] += 1
        else:
            self._operators[code] += 1
            self._is_stateful |= code in _STATE_OPERATORS
        inputs, outputs = file.numbers(operator, 1), file.numbers(operator, 2)
        for number in inputs:
            self._check_tensor(operator, number, count, least=-1)  # -1: left out
        for number in (*outputs, *file.numbers(operator, 8)):
            self._check_tensor(operator, number, count)
        file.vector(operator, 5, 1)
        for field in (4, 12):  # options: a union's table
            file.child(operator, field, "options")
        offset, size = file.scalar(operator, 9, "Q"), file.scalar(operator, 10, "Q")
        if offset > 1:
            self._check_within(operator, offset, size)
        return code, inputs, outputs

    def _check_tensor(self, table: _Table, number: int, count: int, least: int = 0) -> None:
        if not least <= number < count:
            raise self._file.error(
                table.kind, table.at, f"tensor {number} is not there", f"0 to {count - 1}"
            )

    def _ends(self, graph: _Table, field: int, count: int) -> dict[int, _Table]:
        tensors: dict[int, _Table] = {}
        for number in self._file.numbers(graph, field):
            self._check_tensor(graph, number, count)
            if number in tensors:
                raise self._file.error("SubGraph", graph.at, f"tensor {number} is there twice")
            tensors[number] = self._tensor(graph, number)
        return tensors

    def _tensor(self, graph: _Table, number: int) -> _Table:
        at, _ = self._file.vector(graph, 0, 4)
        place = at + 4 * number
        return self._file.table("Tensor", place + self._file.number("Tensor", place))

    # Tensors

    def _count_tensor(self, tensor: _Table, *, is_computed: bool) -> None:
        file = self._file
        buffer = file.scalar(tensor, 2, "I")
        if buffer >= len(self._buffers):
            raise file.error("Tensor", tensor.at, f"its buffer {buffer} is not there")
        self._is_stateful |= bool(file.scalar(tensor, 5, "B"))
        if file.place(tensor, 10, 4) and file.scalar(tensor, 10, "I"):
            self._external = "its weights lie in other files (external buffers)"
        file.text(tensor, 3)
        shape = self._shape(tensor, 0)
        datatype, bits = _TYPES.get(file.scalar(tensor, 1, "b"), ("", 0))
        quantization = self._quantization(tensor)
        if is_computed:
            self._has_quantized |= quantization is not None and datatype in _INTEGERS
        size = self._buffers[buffer]
        if not size:
            return
        elements = math.prod(max(dim, 0) for dim in shape)
        is_sparse = file.target(tensor, 6) != 0
        if bits and not is_sparse and size * 8 < elements * bits:
            message = f"its buffer of {size} bytes is too small for its shape {list(shape)}"
            raise file.error("Tensor", tensor.at, message)
        self._constants[datatype or ("INT4" if bits == 4 else "other")] += elements

    def _shape(self, tensor: _Table, field: int) -> tuple[int, ...]:
        shape = self._file.numbers(tensor, field)
        if len(shape) > DIMENSIONS_MAX:
            message = f"it has {len(shape)} dimensions"
            raise self._file.error("Tensor", tensor.at, message, f"at most {DIMENSIONS_MAX}")
        return shape

    def _quantization(self, tensor: _Table) -> Quantization | None:
        file = self._file
        parameters = file.child(tensor, 4, "QuantizationParameters")
        if parameters is None:
            return None
        at, count = file.vector(parameters, 2, 4)
        zero_at, zeros = file.vector(parameters, 3, 8)
        if count != 1:
            return None
        (scale,) = struct.unpack("<f", file.read("QuantizationParameters", at, 4))
        zero_point = file.number("QuantizationParameters", zero_at, "q") if zeros else 0
        return Quantization(scale, zero_point) if math.isfinite(scale) and scale > 0 else None

    def _io(self, item: tuple[int, _Table], names: _Names, side: str) -> Io:
        number, tensor = item
        file = self._file
        datatype, _ = _TYPES.get(file.scalar(tensor, 1, "b"), ("", 0))
        shape, free = self._shape(tensor, 0), self._shape(tensor, 7)
        dims = free if len(free) == len(shape) else shape
        own = file.text(tensor, 3)
        value = Value(
            own,
            "tensor",
            datatype,
            tuple(max(dim, -1) for dim in dims),
            tuple("" for _ in dims),
        )
        quantization = self._quantization(tensor) if datatype in _INTEGERS else None
        return Io(value, getattr(names, side).get(number, own), quantization)

    # Names

    def _signature_names(
        self, root: _Table, inputs: dict[int, _Table], outputs: dict[int, _Table]
    ) -> _Names:
        """Of the signature that covers exactly the main graph; the first by key, if several."""
        file = self._file
        fitting: dict[str, _Names] = {}
        for signature in file.tables(root, 7, "SignatureDef"):
            names = _Names(self._map(signature, 0), self._map(signature, 1))
            key, graph = file.text(signature, 2), file.scalar(signature, 4, "I")
            is_whole = names.inputs.keys() == inputs.keys()
            if graph == 0 and is_whole and names.outputs.keys() == outputs.keys():
                fitting.setdefault(key, names)
        return fitting[min(fitting)] if fitting else _Names({}, {})

    def _map(self, signature: _Table, field: int) -> dict[int, str]:
        """Tensor number -> name; none if a tensor has two names or a name two tensors."""
        pairs = [
            (self._file.scalar(entry, 1, "I"), self._file.text(entry, 0))
            for entry in self._file.tables(signature, field, "TensorMap")
        ]
        names = dict(pairs)
        return names if len(names) == len(pairs) == len(set(names.values())) else {}

    def _output_scales(
        self, outputs: dict[int, _Table], names: _Names, scales: dict[int, float]
    ) -> dict[str, float]:
        ios = {item[0]: self._io(item, names, "outputs") for item in outputs.items()}
        if scales or any(io.value.datatype.startswith("FP") for io in ios.values()):
            return {ios[number].signature_name: scale for number, scale in scales.items()}
        return {io.signature_name: 1.0 for io in ios.values() if io.quantization is not None}
