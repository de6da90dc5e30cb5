"""Our ONNX reader against the onnx package, and against hostile bytes."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.bundle import onnx_graph, source
from edge_runtime.errors import BundleError
from tests.bundle.conftest import linear, linear_int8, model_of


def read(model: onnx.ModelProto | bytes) -> onnx_graph.OnnxGraph:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnx_graph.read(source.from_bytes(data, "model.onnx"))


# --- the onnx package agrees ---------------------------------------------------------------------


def count_operators(nodes, counts: Counter[tuple[str, str]]) -> None:
    for node in nodes:
        counts[("" if node.domain == "ai.onnx" else node.domain, node.op_type)] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                count_operators(attribute.g.node, counts)
            for graph in attribute.graphs:
                count_operators(graph.node, counts)


def shape_of(info: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)


def assert_agrees(model: onnx.ModelProto) -> None:
    ours = read(model)
    operators: Counter[tuple[str, str]] = Counter()
    count_operators(model.graph.node, operators)
    for function in model.functions:
        count_operators(function.node, operators)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in constants]
    assert ours.ir_version == model.ir_version
    assert ours.operators == dict(operators)
    assert ours.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert {(t.name, t.shape) for t in ours.initializers} == {
        (t.name, tuple(t.dims)) for t in model.graph.initializer
    }
    for values, infos in ((ours.inputs, inputs), (ours.outputs, model.graph.output)):
        assert [value.name for value in values] == [info.name for info in infos]
        for value, info in zip(values, infos, strict=True):
            kind = info.type.WhichOneof("value")
            assert value.kind == {"tensor_type": "tensor", "sequence_type": "sequence"}.get(
                kind, kind.removesuffix("_type")
            )
            if value.kind == "tensor":
                assert value.shape == shape_of(info)
                element = info.type.tensor_type.elem_type
                assert value.datatype == onnx_graph.DATATYPES.get(element, "")
    for opset in model.opset_import:
        assert ours.opsets["" if opset.domain == "ai.onnx" else opset.domain] == opset.version


def nested() -> onnx.ModelProto:
    """If inside If inside a local function; a metadata entry; an unnamed free dimension."""

    def branch(nodes, name):
        output = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    constant = numpy_helper.from_array(np.float32(1), "c")
    leaf = branch([helper.make_node("Constant", [], ["r"], value=constant)], "leaf")
    inner = helper.make_node("If", ["c"], ["r"], then_branch=leaf, else_branch=leaf)
    outer = helper.make_node("If", ["c"], ["r"], then_branch=branch([inner], "b"), else_branch=leaf)
    function = helper.make_function(
        "local", "Pick", ["c"], ["r"], [outer], [helper.make_opsetid("", 17)]
    )
    model = model_of(
        [helper.make_node("Pick", ["c"], ["output"], domain="local")],
        {},
        {"c": (TensorProto.BOOL, [])},
        {"output": (TensorProto.FLOAT, None)},
        functions=[function],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
    )
    helper.set_model_props(model, {"author": "é", "empty": ""})
    return model


def every_type() -> onnx.ModelProto:
    codes = [code for code in TensorProto.DataType.values() if code]
    inputs = {f"in{code}": (code, ["N", None, 3]) for code in codes}
    return model_of([], {}, inputs, {"output": (TensorProto.FLOAT, [])})


@pytest.mark.parametrize("make", [linear, linear_int8, nested, every_type])
def test_a_made_model_reads_as_the_onnx_package_reads_it(make):
    assert_agrees(make())


def test_every_model_file_that_comes_with_the_onnx_package_reads_the_same():
    directory = Path(onnx.__file__).parent / "backend" / "test" / "data"
    paths = sorted(directory.rglob("*.onnx"))
    if not paths:
        pytest.skip("this build of the onnx package brings no model files")
    for path in paths:
        assert_agrees(onnx.load_model_from_string(path.read_bytes()))


def test_symbols_scales_and_local_functions_are_told():
    graph = read(linear_int8(0.125))
    assert graph.inputs[0].symbols == ("N", "")
    assert graph.output_scales == {"output": 0.125}
    assert graph.producer == "tests"
    assert read(nested()).local_functions == {("local", "Pick")}
    assert read(nested()).outputs[0].shape is None


def test_external_data_is_found_wherever_a_tensor_may_be():
    def external(name: str) -> TensorProto:
        tensor = numpy_helper.from_array(np.zeros(3, np.float32), name)
        onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd")
        tensor.ClearField("raw_data")
        return tensor

    in_initializer = linear()
    in_initializer.graph.initializer.append(external("a"))
    in_attribute = linear()
    in_attribute.graph.node.append(helper.make_node("Constant", [], ["z"], value=external("b")))
    in_sparse = linear()
    sparse = in_sparse.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("c"))
    in_training = linear()
    in_training.training_info.add().algorithm.initializer.append(external("d"))
    only_flagged = linear()
    only_flagged.graph.initializer[0].data_location = TensorProto.EXTERNAL
    in_function = linear()
    function = helper.make_function("local", "F", [], [], [], [])
    function.attribute_proto.add(name="x", t=external("e"))
    in_function.functions.append(function)
    cases = [in_initializer, in_attribute, in_sparse, in_training, only_flagged, in_function]
    assert [read(model).external_data for model in cases] == [
        (name,) for name in ("a", "b", "c", "d", "w", "e")
    ]


@pytest.mark.parametrize(
    "place", ["t", "tensors", "g", "graphs", "sparse_tensor", "sparse_tensors"]
)
def test_external_data_is_found_in_every_kind_of_attribute(place):
    tensor = TensorProto(name="hidden", data_location=TensorProto.EXTERNAL)
    attribute = onnx.AttributeProto(name="x")
    if place in ("g", "graphs"):
        inside = onnx.GraphProto(initializer=[tensor])
    elif place.startswith("sparse"):
        inside = onnx.SparseTensorProto(indices=tensor)
    else:
        inside = tensor
    field = getattr(attribute, place)
    field.append(inside) if hasattr(field, "append") else field.CopyFrom(inside)
    model = linear()
    model.graph.node[0].attribute.append(attribute)
    assert read(model).external_data == ("hidden",)


def test_twenty_megabytes_of_weights_are_not_read(tmp_path):
    model = linear()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5_000_000, np.float32), "big"))
    path = tmp_path / "big.onnx"
    path.write_bytes(model.SerializeToString())
    opened = source.from_path(path)
    tracemalloc.start()
    graph = onnx_graph.read(opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert graph.initializers[-1].shape == (5_000_000,)
    assert peak < 1_000_000


# --- hostile bytes -------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


IR = b"\x08\x08"


def graph_of(data: bytes) -> bytes:
    return IR + field(7, data)


def deep(levels: int) -> bytes:
    data = b""
    for _ in range(levels):
        data = field(1, field(5, field(6, data)))
    return graph_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no ir_version"),
        (IR, "no ir_version or no graph"),
        (field(7, b""), "no ir_version or no graph"),
        (b"\x08", "runs past the end"),
        (IR + b"\x3a\x05\x00", "graph of 5 bytes runs past the end"),
        (IR + b"\x3a" + b"\xff" * 9 + b"\x01", "runs past the end"),
        (b"\x08" + b"\xff" * 11, "more than 10 bytes"),
        (b"\xff" * 6, "more than 5 bytes"),
        (b"\x00\x00", "field 0"),
        (b"\x7b\x7c", "wire type 3"),
        (b"\x7e", "wire type 6"),
        (b"\x0a\x01x", "ir_version"),
        (b"\x3d\0\0\0\0", "graph has wire type 5"),
        (IR + IR, "ir_version is there twice"),
        (graph_of(b"") + field(7, b""), "graph is there twice"),
        (graph_of(field(1, field(4, b"Add") + field(4, b"If"))), "op_type is there twice"),
        (graph_of(field(1, field(4, b"\xff"))), "op_type is not UTF-8"),
        (graph_of(field(1, field(4, b"x" * 70_000))), "op_type has 70000 bytes"),
        (graph_of(field(99, b"x")[:-1] + b""), "runs past the end"),
        (graph_of(b"\x99\x06\x00"), "runs past the end"),
        (deep(40), "nested too deeply"),
        (graph_of(field(5, b"\x08\x01" * 1_100_000)), "too much memory"),
        (graph_of(field(5, field(1, b"\x01" * 1_100_000))), "too much memory"),
        (graph_of(b"\x5a\x00" * 300_000), "too much memory"),
        (graph_of(b"\x2a\x00" * 1_000_000), "too much memory"),
        (graph_of(field(1, b"".join(field(1, b"x" * 60_000) for _ in range(1200)))), "memory"),
    ],
)
def test_hostile_bytes_are_refused_with_offset_and_field(data, message):
    with pytest.raises(BundleError) as caught:
        read(data)
    assert message in caught.value.message
    assert caught.value.where.startswith("model.onnx")
    if data and "no graph" not in message:
        assert "offset" in caught.value.where


def test_the_number_of_fields_is_bounded_and_with_it_the_time(monkeypatch):
    monkeypatch.setattr(onnx_graph, "FIELDS_MAX", 100_000)
    empty_nodes = b"\x0a\x00" * 100_001
    begin = time.monotonic()
    with pytest.raises(BundleError, match="too many fields"):
        read(graph_of(empty_nodes))
    assert time.monotonic() - begin < 5  # 0.2 s, and 20 times that at the real limit


def test_every_cut_of_a_model_is_refused_or_whole():
    data = linear_int8().SerializeToString()
    for length in range(len(data)):
        try:
            graph = read(data[:length])
        except BundleError:
            continue
        assert graph.outputs == read(data).outputs  # cut between two fields after the graph


def test_memory_is_counted_for_what_is_held_not_for_what_was_read(monkeypatch):
    monkeypatch.setattr(onnx_graph, "LIVE_BYTES_MAX", 20_000)
    nodes = [helper.make_node("Relu", ["input"], ["output"], name=str(i)) for i in range(2000)]
    assert read(model_of(nodes, {})).operators == {("", "Relu"): 2000}
