"""A writer of small .tflite files: what the tests feed to LiteRT, to tflite-runtime and to lint.

Law of this file: it stands on nothing but the standard library, so that it also runs where neither
flatbuffers nor the libraries' schema modules are installed (tflite-runtime brings neither). It
writes right files; tests damage them themselves.

Source: the FlatBuffers internals page (tables, vtables, vectors) and LiteRT's schema.fbs, version
3, for the numbers of fields, types and operators.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FLOAT32, INT32, UINT8, INT64, STRING, BOOL = 0, 2, 3, 4, 5, 6
INT8, RESOURCE = 9, 13
TYPE_SIZES = {FLOAT32: 4, INT32: 4, UINT8: 1, INT64: 8, BOOL: 1, INT8: 1}

ADD, DEQUANTIZE, FULLY_CONNECTED, MUL, CUSTOM, QUANTIZE = 0, 6, 9, 18, 32, 114
RESHAPE, UNIDIRECTIONAL_SEQUENCE_RNN = 22, 35
CALL_ONCE, VAR_HANDLE, READ_VARIABLE, ASSIGN_VARIABLE = 129, 142, 143, 144
ADD_OPTIONS, MUL_OPTIONS, FULLY_CONNECTED_OPTIONS = 11, 21, 8  # BuiltinOptions
CALL_ONCE_OPTIONS, VAR_HANDLE_OPTIONS = 103, 111
SEQUENCE_RNN_OPTIONS = 31


# --- flatbuffers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """A number in a table; `code` is struct's."""

    code: str
    value: float


@dataclass(frozen=True)
class Vector:
    """Numbers one behind another."""

    code: str
    values: Sequence[float]


Table = Mapping[int, Any]  # field number -> Scalar, Vector, str, bytes, Table, list of Tables


def u8(value: int) -> Scalar:
    return Scalar("B", value)


def u32(value: int) -> Scalar:
    return Scalar("I", value)


def i32(value: int) -> Scalar:
    return Scalar("i", value)


def ints(values: Sequence[int]) -> Vector:
    return Vector("i", list(values))


class _Writer:
    """Front to back: a table refers to what comes behind it; its vtable lies before it."""

    def __init__(self) -> None:
        self.out = bytearray()

    def align(self, size: int, ahead: int = 0) -> None:
        self.out += bytes(-(len(self.out) + ahead) % size)

    def place(self, value: Any) -> int:
        """Write a value that is referred to; its offset."""
        if isinstance(value, str):
            return self.vector("B", value.encode(), b"\0")
        if isinstance(value, bytes):
            return self.vector("B", value, alignment=16)
        if isinstance(value, Vector):
            return self.vector(value.code, value.values)
        if isinstance(value, Mapping):
            return self.table(value)
        self.align(4)
        at = len(self.out)
        self.out += struct.pack("<I", len(value)) + bytes(4 * len(value))
        for index, item in enumerate(value):
            self.refer(at + 4 + 4 * index, item)
        return at

    def vector(
        self, code: str, values: Sequence[float] | bytes, tail: bytes = b"", alignment: int = 4
    ) -> int:
        self.align(max(alignment, struct.calcsize(code)), ahead=4)
        at = len(self.out)
        self.out += struct.pack(f"<I{len(values)}{code}", len(values), *values) + tail
        return at

    def refer(self, at: int, value: Any) -> None:
        target = self.place(value)
        struct.pack_into("<I", self.out, at, target - at)

    def table(self, table: Table) -> int:
        sizes = {
            number: struct.calcsize(value.code) if isinstance(value, Scalar) else 4
            for number, value in table.items()
        }
        offsets, end = {}, 4
        for number in sorted(table, key=lambda number: -sizes[number]):
            end += -end % sizes[number]
            offsets[number] = end
            end += sizes[number]
        count = max(table, default=-1) + 1
        slots = [offsets.get(number, 0) for number in range(count)]
        vtable = struct.pack(f"<HH{count}H", 4 + 2 * count, end, *slots)
        self.align(8, ahead=len(vtable))
        self.out += vtable
        at = len(self.out)
        self.out += struct.pack("<i", len(vtable)) + bytes(end - 4)
        for number, value in table.items():
            if isinstance(value, Scalar):
                struct.pack_into(f"<{value.code}", self.out, at + offsets[number], value.value)
        for number, value in table.items():
            if not isinstance(value, Scalar):
                self.refer(at + offsets[number], value)
        return at


def flatbuffer(root: Table, identifier: bytes = b"TFL3") -> bytes:
    """A finished file."""
    writer = _Writer()
    writer.out += bytes(4) + identifier
    writer.refer(0, root)
    return bytes(writer.out) + bytes(-len(writer.out) % 16)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """`shape` has -1 for a free dimension; `data`: a constant.

    `scales`: a quantized tensor; one for all of it, or one for each index of axis 0.
    """

    name: str
    shape: Sequence[int]
    type: int = FLOAT32
    data: bytes = b""
    scales: Sequence[float] = ()
    zero_point: int = 0
    is_variable: bool = False


@dataclass(frozen=True)
class Operator:
    """`code` is a builtin operator's number, or a custom operator's name."""

    code: int | str
    inputs: Sequence[int]
    outputs: Sequence[int]
    options_type: int = 0
    options: Table | None = None
    custom_options: bytes = b""


@dataclass(frozen=True)
class Graph:
    """A subgraph; inputs and outputs are indices into `tensors`."""

    tensors: Sequence[Tensor]
    operators: Sequence[Operator]
    inputs: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True)
class Signature:
    """name -> tensor index."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    key: str = "serving_default"
    graph: int = 0


@dataclass
class _Parts:
    buffers: list[Table] = field(default_factory=lambda: [{}])
    codes: list[int | str] = field(default_factory=list)

    def buffer(self, data: bytes) -> int:
        if not data:
            return 0
        self.buffers.append({0: data})
        return len(self.buffers) - 1

    def code(self, code: int | str) -> int:
        if code not in self.codes:
            self.codes.append(code)
        return self.codes.index(code)


def model(*graphs: Graph, signatures: Sequence[Signature] = (), **changes: Any) -> bytes:
    """A .tflite file; `changes` set fields of the root table ("field_7": …)."""
    parts = _Parts()
    subgraphs = [_graph(graph, parts) for graph in graphs]
    root = {
        0: u32(3),
        1: [_code(code) for code in parts.codes],
        2: subgraphs,
        3: "tests",
        4: parts.buffers,
        **({7: [_signature(one) for one in signatures]} if signatures else {}),
        **{int(name.removeprefix("field_")): value for name, value in changes.items()},
    }
    return flatbuffer({number: value for number, value in root.items() if value is not None})


def _code(code: int | str) -> Table:
    if isinstance(code, str):
        return {0: Scalar("b", CUSTOM), 1: code, 2: i32(1), 3: i32(CUSTOM)}
    return {0: Scalar("b", min(code, 127)), 2: i32(1), 3: i32(code)}


def _graph(graph: Graph, parts: _Parts) -> Table:
    return {
        0: [_tensor(tensor, parts) for tensor in graph.tensors],
        1: ints(graph.inputs),
        2: ints(graph.outputs),
        3: [_operator(operator, parts) for operator in graph.operators],
        4: "main",
    }


def _tensor(tensor: Tensor, parts: _Parts) -> Table:
    table: dict[int, Any] = {
        0: ints([max(size, 1) if size == -1 else size for size in tensor.shape]),
        1: u8(tensor.type),
        2: u32(parts.buffer(tensor.data)),
        3: tensor.name,
        5: u8(tensor.is_variable),
        8: u8(1),
    }
    if tensor.scales:
        zeros = [tensor.zero_point] * len(tensor.scales)
        table[4] = {2: Vector("f", tensor.scales), 3: Vector("q", zeros)}
    if -1 in tensor.shape:
        table[7] = ints(tensor.shape)
    return table


def _operator(operator: Operator, parts: _Parts) -> Table:
    table: dict[int, Any] = {
        0: u32(parts.code(operator.code)),
        1: ints(operator.inputs),
        2: ints(operator.outputs),
    }
    if operator.options_type:
        table[3] = u8(operator.options_type)
        table[4] = operator.options or {}
    if operator.custom_options:
        table[5] = operator.custom_options
    return table


def _signature(signature: Signature) -> Table:
    def entries(names: Mapping[str, int]) -> list[Table]:
        return [{0: name, 1: u32(index)} for name, index in names.items()]

    return {
        0: entries(signature.inputs),
        1: entries(signature.outputs),
        2: signature.key,
        4: u32(signature.graph),
    }


# --- the models that tests share -----------------------------------------------------------------


def linear(weights: Any, batch: int = -1, **changes: Any) -> bytes:
    """ "input" FP32 [batch, in] -> "output" FP32 [batch, out] = input @ weights.

    Args:
        weights: a float32 array [in, out].
        batch: -1: free.
    """
    width, classes = weights.shape
    graph = Graph(
        [
            Tensor("serving_default_input:0", [batch, width]),
            Tensor("weights", [classes, width], data=weights.T.astype("<f4").tobytes()),
            Tensor("StatefulPartitionedCall:0", [batch, classes]),
        ],
        [Operator(FULLY_CONNECTED, [0, 1, -1], [2], FULLY_CONNECTED_OPTIONS)],
        [0],
        [2],
    )
    signature = Signature({"input": 0}, {"output": 2})
    return model(graph, **{"signatures": [signature], **changes})


def linear_int8(weights: Any) -> bytes:
    """As `linear` with INT8 activations and weights: QUANTIZE, FULLY_CONNECTED, DEQUANTIZE.

    Inputs are taken to lie in -1..1; a step of the output is 0.1.
    """
    width, classes = weights.shape
    step = float(abs(weights).max()) / 127
    stored = (weights.T / step).round().astype("int8").tobytes()
    graph = Graph(
        [
            Tensor("input", [-1, width]),
            Tensor("stored_input", [-1, width], INT8, scales=[1 / 127]),
            Tensor("weights", [classes, width], INT8, stored, scales=[step]),
            Tensor("stored_output", [-1, classes], INT8, scales=[0.1]),
            Tensor("output", [-1, classes]),
        ],
        [
            Operator(QUANTIZE, [0], [1]),
            Operator(FULLY_CONNECTED, [1, 2, -1], [3], FULLY_CONNECTED_OPTIONS),
            Operator(DEQUANTIZE, [3], [4]),
        ],
        [0],
        [4],
    )
    return model(graph)


def linear_dynamic_int8(weights: Any) -> bytes:
    """As `linear`, its weights stored as INT8 with a scale for each output: "dynamic range"."""
    width, classes = weights.shape
    steps = abs(weights).max(axis=0) / 127
    stored = (weights / steps).round().astype("int8").T.tobytes()
    graph = Graph(
        [
            Tensor("input", [-1, width]),
            Tensor("weights", [classes, width], INT8, stored, scales=[float(s) for s in steps]),
            Tensor("output", [-1, classes]),
        ],
        [Operator(FULLY_CONNECTED, [0, 1, -1], [2], FULLY_CONNECTED_OPTIONS)],
        [0],
        [2],
    )
    return model(graph)


def pair() -> bytes:
    """ "a", "b" FP32 [N, 3] -> "sum" = a + b, "double" = 2 a; no signature."""
    graph = Graph(
        [Tensor(name, [-1, 3]) for name in ("a", "b", "sum", "double")],
        [Operator(ADD, [0, 1], [2], ADD_OPTIONS), Operator(ADD, [0, 0], [3], ADD_OPTIONS)],
        [0, 1],
        [2, 3],
    )
    return model(graph)


def counter() -> bytes:
    """ "x" FP32 [1] -> "total" FP32 [1]: the sum of all inputs so far (a resource variable)."""
    shape = [1]
    handle = Operator(VAR_HANDLE, [], [0], VAR_HANDLE_OPTIONS, {0: "c", 1: "total"})
    main = Graph(
        [
            Tensor("handle", [], RESOURCE),
            Tensor("x", shape),
            Tensor("before", shape),
            Tensor("total", shape),
        ],
        [
            Operator(CALL_ONCE, [], [], CALL_ONCE_OPTIONS, {0: i32(1)}),
            handle,
            Operator(READ_VARIABLE, [0], [2]),
            Operator(ADD, [1, 2], [3], ADD_OPTIONS),
            Operator(ASSIGN_VARIABLE, [0, 3], []),
        ],
        [1],
        [3],
    )
    start = Graph(
        [Tensor("handle", [], RESOURCE), Tensor("zero", shape, data=bytes(4))],
        [handle, Operator(ASSIGN_VARIABLE, [0, 1], [])],
        [],
        [],
    )
    return model(main, start, signatures=[Signature({"x": 1}, {"total": 3})])


def recurrent() -> bytes:
    """ "x" FP32 [1, 1, 1] -> "y": as `counter`, with a variable tensor inside one operator."""
    shape, one = [1, 1], struct.pack("<f", 1)
    graph = Graph(
        [
            Tensor("x", [1, 1, 1]),
            Tensor("weights", shape, data=one),
            Tensor("recurrent", shape, data=one),
            Tensor("bias", [1], data=bytes(4)),
            Tensor("state", shape, is_variable=True),
            Tensor("y", [1, 1, 1]),
        ],
        [Operator(UNIDIRECTIONAL_SEQUENCE_RNN, [0, 1, 2, 3, 4], [5], SEQUENCE_RNN_OPTIONS)],
        [0],
        [5],
    )
    return model(graph)


def text() -> bytes:
    """ "x" BYTES [N] -> "y" BYTES [1, N]: a reshape."""
    graph = Graph(
        [
            Tensor("x", [-1], STRING),
            Tensor("shape", [2], INT32, struct.pack("<ii", 1, -1)),
            Tensor("y", [1, -1], STRING),
        ],
        [Operator(RESHAPE, [0, 1], [2])],
        [0],
        [2],
    )
    return model(graph)


def mixed() -> bytes:
    """ "x" FP32 [N, 3] -> "y" FP32 [N, 3] = (x + x) * (x + x) + x: ADD, MUL, ADD."""
    graph = Graph(
        [Tensor(name, [-1, 3]) for name in ("x", "sum", "square", "y")],
        [
            Operator(ADD, [0, 0], [1], ADD_OPTIONS),
            Operator(MUL, [1, 1], [2], MUL_OPTIONS),
            Operator(ADD, [2, 0], [3], ADD_OPTIONS),
        ],
        [0],
        [3],
    )
    return model(graph)


def compiled(operator: str = "ethos-u") -> bytes:
    """What an accelerator's compiler leaves: one operator that only its delegate has."""
    graph = Graph(
        [
            Tensor("input", [1, 4], INT8, scales=[0.1], zero_point=-1),
            Tensor("command_stream", [16], UINT8, data=bytes(range(16))),
            Tensor("output", [1, 4], INT8, scales=[0.2], zero_point=3),
        ],
        [Operator(operator, [0, 1], [2], custom_options=b"\x01\x04\x01")],
        [0],
        [2],
    )
    return model(graph)
