"""OpenVINO IR as one file, and what it holds: read before OpenVINO sees it.

Law of this file: bytes in, facts out; it runs nothing and looks at no weight. IR is two files, a
graph in XML and its weights; an artifact is one. So `bundle create` puts the two into one behind a
header, and nothing else makes such a file: magic, sizes of both, graph, weights (which begin at a
multiple of 64, as their offsets inside expect). `backends.openvino` knows the same header.

The XML is read by expat, piece by piece, with document types refused (entities that grow or reach
out of the file) and bounds on size, depth and what is kept: the daemon lints, and a hostile file
may cost it neither its memory nor more than seconds. Layers come before edges, as OpenVINO writes
them. Source: OpenVINO's documentation, "IR format" (versions 10 and 11).
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from xml.parsers import expat

from edge_runtime.bundle.onnx_graph import Value
from edge_runtime.bundle.source import Source
from edge_runtime.errors import BundleError

MAGIC = b"EDGE-IR1"
_HEADER = struct.Struct("<8sQQ")  # magic, bytes of the graph, bytes of the weights
_ALIGNMENT = 64
XML_BYTES_MAX = 64 * 1024 * 1024  # some 100,000 layers
DEPTH_MAX = 200  # of elements; a body inside a body inside a body takes ten each
PIECE_BYTES = 1 << 20  # read at a time, and the most that one element may take
KEPT_BYTES_MAX = 32 << 20  # for names, shapes and operators, as counted by `_keep`
KEPT_ITEM_BYTES = 256  # of Python's objects for a port or a layer
DIMENSIONS_MAX = 64  # no device takes more than 16
DIGITS_MAX = 32  # of a dimension, blanks included
_OPSET = re.compile(r"opset\d{1,3}")
_FLOATS = {"fp32": ("f32",), "fp16": ("f16",), "bf16": ("bf16",), "fp64": ("f64",)}
_INTEGERS = {"int8": ("i8", "u8"), "int4": ("i4", "u4")}
_STATE = frozenset({"ReadValue", "Assign"})

# Precision of a port -> OIP datatype.
_DATATYPES = {
    "BOOL": "BOOL",
    "BOOLEAN": "BOOL",
    "U8": "UINT8",
    "U16": "UINT16",
    "U32": "UINT32",
    "U64": "UINT64",
    "I8": "INT8",
    "I16": "INT16",
    "I32": "INT32",
    "I64": "INT64",
    "FP16": "FP16",
    "FP32": "FP32",
    "FP64": "FP64",
    "BF16": "BF16",
}


class IrGraph(NamedTuple):
    """What the graph says of itself.

    Attributes:
        operators: (opset, type) -> how many, bodies included.
        weights: element type ("f32") -> bytes.
        output_scales: none: IR does not say in which steps an output is.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: Mapping[tuple[str, str], int]
    weights: Mapping[str, int]
    output_scales: Mapping[str, float] = {}

    @property
    def is_stateful(self) -> bool:
        return any(name in _STATE for _, name in self.operators)


def precision(graph: IrGraph) -> str:
    """What it computes with: "int8" if it quantizes, else the type of most of its weights.

    Weights of 8 or 4 bits are an "int8" or "int4" model, though it computes in floats.
    """
    if any(name == "FakeQuantize" for _, name in graph.operators):
        return "int8"
    sizes = {
        name: sum(graph.weights.get(short, 0) for short in shorts)
        for name, shorts in (_FLOATS | _INTEGERS).items()
    }
    return max(sizes, key=lambda name: sizes[name])


def pack(graph: bytes, weights: bytes) -> bytes:
    """One file of the two."""
    head = _HEADER.pack(MAGIC, len(graph), len(weights)) + graph
    return head + bytes(-len(head) % _ALIGNMENT) + weights


def read(source: Source) -> IrGraph:
    """The graph of a packed file.

    Raises:
        BundleError: it is cut off, no IR, or refers to bytes that it does not have.
        StorageError: it cannot be read.
    """
    magic, xml_bytes, weights_bytes = _HEADER.unpack(source.read_at(0, _HEADER.size))
    start = _HEADER.size + xml_bytes
    start += -start % _ALIGNMENT
    if magic != MAGIC or xml_bytes > XML_BYTES_MAX or start + weights_bytes != source.size:
        raise BundleError(
            "is no packed OpenVINO IR, or cut off",
            where=source.where,
            expected=f"a graph of at most {XML_BYTES_MAX} bytes and its weights",
            remedy="create the bundle from the .xml file, with the .bin file beside it",
        )
    reader = _Reader(source.where, weights_bytes)
    end = _HEADER.size + xml_bytes
    starts = range(_HEADER.size, end, PIECE_BYTES)
    return reader.read(source.read_at(at, min(PIECE_BYTES, end - at)) for at in starts)


class _Port(NamedTuple):
    precision: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


class _Reader:
    """State of one pass over the XML. Only layers of the outermost graph have inputs' names.

    Of layers, those that are an end of the graph are kept; of edges, those to its results.
    """

    def __init__(self, where: str, weights_bytes: int) -> None:
        self._where = where
        self._weights_bytes = weights_bytes
        self._path: list[str] = []
        self._layer: dict[str, str] = {}  # attributes of the open outermost layer
        self._port: dict[str, str] = {}
        self._dims: list[int] = []
        self._text = ""
        self._has_moved = False  # something was understood since it was last asked
        self._kept_bytes = 0
        self._ranks_unknown: set[str] = set()
        self._ends: dict[str, list[dict[str, str]]] = {"Parameter": [], "Result": []}
        self._results: set[str] = set()
        self._outputs: dict[tuple[str, str], _Port] = {}  # (layer, port) -> what it gives
        self._edges: dict[str, tuple[str, str]] = {}  # result -> where its last input comes from
        self._operators: Counter[tuple[str, str]] = Counter()
        self._weights: Counter[str] = Counter()

    def read(self, pieces: Iterable[bytes]) -> IrGraph:
        parser = expat.ParserCreate()
        parser.buffer_text = True  # else a call for every line
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        try:
            for piece in pieces:
                self._has_moved = False
                parser.Parse(piece, False)
                if not self._has_moved and len(piece) == PIECE_BYTES:
                    raise self._error(f"has an element of more than {PIECE_BYTES} bytes")
            parser.Parse(b"", True)
            inputs, outputs = self._values("Parameter"), self._values("Result")
        except (expat.ExpatError, ValueError, KeyError) as e:
            raise self._error(f"is no OpenVINO IR: {type(e).__name__} {e}") from e
        if not self._operators:
            raise self._error("is no OpenVINO IR: it has no layers")
        return IrGraph(inputs, outputs, dict(self._operators), dict(self._weights))

    def _error(self, message: str) -> BundleError:
        return BundleError(message[:500], where=self._where)

    def _keep(self, *texts: str) -> None:
        """Count what is about to be kept. Raises: BundleError: it is too much."""
        self._kept_bytes += KEPT_ITEM_BYTES + sum(map(len, texts))
        if self._kept_bytes > KEPT_BYTES_MAX:
            raise self._error(f"has too many layers and names: over {KEPT_BYTES_MAX} bytes of them")

    def _refuse_doctype(self, *_: Any) -> None:
        raise self._error("declares a document type: refused")

    @property
    def _is_outermost(self) -> bool:
        return self._path[:3] == ["net", "layers", "layer"] and "body" not in self._path

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        self._has_moved = True
        self._path.append(name)
        if len(self._path) > DEPTH_MAX:
            raise self._error(f"is nested deeper than {DEPTH_MAX}")
        self._text = ""
        if name == "layer":
            self._begin_layer(attributes)
        elif name == "data":
            self._check_data(attributes)
        elif name == "port" and self._is_outermost:
            self._port, self._dims = attributes, []
        elif name == "edge" and self._path == ["net", "edges", "edge"]:
            self._note_edge(attributes)

    def _begin_layer(self, attributes: dict[str, str]) -> None:
        kind = attributes["type"]
        operator = attributes["version"], kind
        if operator not in self._operators:
            self._keep(*operator)
        self._operators[operator] += 1
        if not self._is_outermost:
            return
        self._layer = attributes
        if kind in self._ends:
            self._keep(*attributes.values())
            self._ends[kind].append(attributes)
            if kind == "Result":
                self._results.add(attributes["id"])

    def _note_edge(self, attributes: Mapping[str, str]) -> None:
        to = attributes["to-layer"]
        if to in self._results:
            edge = attributes["from-layer"], attributes["from-port"]
            self._keep(*edge)
            self._edges[to] = edge

    def _check_data(self, attributes: Mapping[str, str]) -> None:
        """Weights lie inside the weights."""
        if "offset" in attributes and "size" in attributes:
            offset, size = int(attributes["offset"]), int(attributes["size"])
            if offset < 0 or size < 0 or offset + size > self._weights_bytes:
                raise self._error(
                    f"refers to {size} bytes at {offset} of {self._weights_bytes} of weights"
                )
            kind = attributes.get("element_type", "")
            if kind not in self._weights:
                self._keep(kind)
            self._weights[kind] += size
        if self._is_outermost and attributes.get("shape") == "...":
            self._keep(self._layer["id"])
            self._ranks_unknown.add(self._layer["id"])

    def _characters(self, text: str) -> None:
        self._has_moved = True
        if self._path[-1] == "dim":
            self._text += text
            if len(self._text) > DIGITS_MAX:
                raise self._error("has a dimension that is no number")

    def _end(self, name: str) -> None:
        self._has_moved = True
        if self._is_outermost:
            if name == "dim":
                self._dims.append(int(self._text))
                if len(self._dims) > DIMENSIONS_MAX:
                    raise self._error(f"has a tensor of more than {DIMENSIONS_MAX} dimensions")
            elif name == "port" and self._path[-2] == "output":
                self._end_output()
        self._path.pop()

    def _end_output(self) -> None:
        key = self._layer["id"], self._port["id"]
        names, kind = self._port.get("names", ""), self._port.get("precision", "")
        self._keep(*key, names, kind)
        shape = tuple(max(dim, -1) for dim in self._dims)
        self._outputs[key] = _Port(kind, tuple(_split_names(names)), shape)

    def _values(self, kind: str) -> tuple[Value, ...]:
        found = []
        for layer in self._ends[kind]:
            own = layer["id"], "0"
            key = own if kind == "Parameter" else self._edges.get(layer["id"], own)
            found.append(self._value(layer, key))
        return tuple(found)

    def _value(self, layer: Mapping[str, str], key: tuple[str, str]) -> Value:
        if key not in self._outputs:
            raise self._error(f"layer {layer['name']!r} is connected to nothing")
        port = self._outputs[key]
        own = layer["name"].partition("/sink_port_")[0]
        name = own if own in port.names or not port.names else min(port.names)
        shape = None if key[0] in self._ranks_unknown else port.shape
        symbols = ("",) * len(shape or ())
        return Value(name, "tensor", _DATATYPES.get(port.precision, ""), shape, symbols)


def _split_names(text: str) -> list[str]:
    """Names are separated by commas; a comma in a name is escaped."""
    return [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", text) if name]


def unknown_opsets(graph: IrGraph) -> list[str]:
    """Operators that are not of OpenVINO's own sets, and so would need an extension."""
    return sorted(name for opset, name in graph.operators if not _OPSET.fullmatch(opset))
