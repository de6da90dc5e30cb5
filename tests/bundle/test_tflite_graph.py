"""The reader of TFLite files: what it finds, and that it follows no offset out of the file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import source, tflite_graph
from edge_runtime.bundle.source import Source
from edge_runtime.bundle.tflite_graph import Quantization, TfliteGraph, values
from edge_runtime.errors import BundleError
from tests import tflite_writer as writer
from tests.bundle.conftest import weights
from tests.tflite_writer import Graph, Operator, Signature, Tensor, ints, u32

DATA = Path(__file__).parent / "data"


def read(data: bytes) -> TfliteGraph:
    return tflite_graph.read(source.from_bytes(data, "model.tflite"))


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        read(data)
    assert "model.tflite" in str(caught.value.where)
    return f"{caught.value} {caught.value.where}"


class TestWhatItFinds:
    def test_inputs_and_outputs_have_two_names(self):
        graph = read(writer.linear(weights()))
        (by_signature,), (by_tensor,) = (
            values(graph.inputs, names) for names in ("signature", "tensor")
        )
        assert by_signature.name == "input"
        assert by_tensor.name == "serving_default_input:0"
        assert (by_tensor.datatype, by_tensor.shape) == ("FP32", (-1, 16))
        assert [io.signature_name for io in graph.outputs] == ["output"]

    def test_without_a_signature_both_are_the_tensors(self):
        graph = read(writer.pair())
        assert [io.signature_name for io in graph.inputs] == ["a", "b"]
        assert values(graph.outputs, "signature") == values(graph.outputs, "tensor")

    @pytest.mark.parametrize(
        "signature",
        [
            Signature({"input": 0}, {}),
            Signature({"input": 1}, {"output": 2}),
            Signature({"input": 0}, {"output": 2}, graph=1),
            Signature({"input": 0, "again": 0}, {"output": 2}),
        ],
    )
    def test_a_signature_that_does_not_cover_the_main_graph_names_nothing(self, signature):
        graph = read(writer.linear(weights(), signatures=[signature]))
        assert graph.inputs[0].signature_name == "serving_default_input:0"

    def test_of_several_signatures_the_first_key_counts(self):
        both = [
            Signature({"late": 0}, {"out": 2}, key="z"),
            Signature({"early": 0}, {"out": 2}, key="a"),
        ]
        graph = read(writer.linear(weights(), signatures=both))
        assert graph.inputs[0].signature_name == "early"

    def test_operators_constants_and_state_are_counted_in_all_subgraphs(self):
        graph = read(writer.counter())
        assert graph.subgraphs == 2
        assert graph.is_stateful
        assert graph.operators[writer.VAR_HANDLE] == 2
        assert graph.constants == {"FP32": 1}
        assert not read(writer.pair()).is_stateful

    def test_custom_operators_come_by_name(self):
        assert read(writer.compiled("ethos-u")).custom_operators == {"ethos-u": 1}

    def test_a_file_that_arms_compiler_wrote(self):
        """ethos-u-vela 5.2.0 on `linear_int8`: what it took is one operator, the rest is left."""
        graph = tflite_graph.read(source.from_path(DATA / "ethos_u_vela.tflite"))
        assert graph.custom_operators == {"ethos-u": 1}
        assert graph.operators == {writer.QUANTIZE: 1, writer.DEQUANTIZE: 1}
        assert graph.description == "Vela Optimised"

    def test_quantization_of_inputs_and_outputs(self):
        graph = read(writer.compiled())
        found = graph.inputs[0].quantization
        assert found is not None
        assert found == Quantization(pytest.approx(0.1), -1)
        assert graph.output_scales == {"output": 1.0}  # steps of the numbers that are served

    def test_the_scale_of_a_float_output_is_that_of_what_was_dequantized(self):
        graph = read(writer.linear_int8(weights()))
        assert graph.output_scales == {"output": pytest.approx(0.1)}
        assert graph.has_quantized_activations
        assert not read(writer.linear_dynamic_int8(weights())).has_quantized_activations

    def test_the_library_gives_the_same_names_and_shapes(self, tmp_path: Path):
        from edge_runtime.backends import backend

        litert = backend("litert")
        try:
            litert.version()
        except Exception as e:  # noqa: BLE001
            pytest.skip(f"no LiteRT: {e}")
        for data in (writer.linear(weights()), writer.pair(), writer.counter()):
            (tmp_path / "m.tflite").write_bytes(data)
            for names in ("signature", "tensor"):
                model = litert.load(tmp_path / "m.tflite", {"names": names})
                graph = read(data)
                for specs, ios in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
                    assert [(s.name, s.datatype, s.shape) for s in specs] == [
                        (v.name, v.datatype, v.shape) for v in values(ios, names)
                    ]


def of(tensors: list[Tensor], operators: list[Operator], inputs: list[int], outputs: list[int]):
    return writer.model(Graph(tensors, operators, inputs, outputs))


T = Tensor("t", [1])
DAMAGED = {
    "an operator's tensor that is not there": (
        of([T], [Operator(writer.ADD, [0, 7], [0])], [0], [0]),
        "tensor 7",
    ),
    "a negative tensor": (of([T], [Operator(writer.ADD, [0, -2], [0])], [0], [0]), "tensor -2"),
    "an output left out": (of([T], [Operator(writer.ADD, [0], [-1])], [0], [0]), "tensor -1"),
    "an input that is not there": (of([T], [], [1], [0]), "tensor 1"),
    "an input twice": (of([T], [], [0, 0], [0]), "twice"),
    "a buffer that is not there": (
        writer.model(Graph([Tensor("c", [1], data=bytes(4))], [], [0], [0]), field_4=[{}]),
        "buffer 1",
    ),
    "a constant shorter than its shape": (
        of([Tensor("c", [100], data=bytes(8))], [], [0], [0]),
        "too small",
    ),
    "seventeen dimensions": (of([Tensor("c", [1] * 17)], [], [0], [0]), "17 dimensions"),
    "no subgraph": (writer.flatbuffer({0: u32(3), 2: []}), "no subgraph"),
    "another identifier": (writer.flatbuffer({0: u32(3)}, b"TFL2"), "not marked"),
    "an unknown operator code": (
        writer.flatbuffer({2: [{0: [], 1: ints([]), 2: ints([]), 3: [{0: u32(4)}]}]}),
        "code 4",
    ),
    "data beyond the end": (
        writer.model(
            Graph([T], [], [0], [0]),
            field_4=[{1: writer.Scalar("Q", 1 << 40), 2: writer.Scalar("Q", 4)}],
        ),
        "outside the file",
    ),
    "a size that overflows": (
        writer.model(
            Graph([T], [], [0], [0]),
            field_4=[{1: writer.Scalar("Q", 16), 2: writer.Scalar("Q", (1 << 64) - 8)}],
        ),
        "outside the file",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_reference_to_what_is_not_there_is_refused(case: str):
    data, text = DAMAGED[case]
    assert text in refusal(data)


def test_weights_in_other_files_are_told():
    assert "other files" in read(writer.linear(weights(), field_8=[{0: "group"}])).external
    assert read(writer.linear(weights())).external == ""


def test_the_same_thing_many_times_is_many_times_the_work_and_bounded(monkeypatch):
    """Offsets may point at one table from everywhere: a small file would be read for ever."""
    monkeypatch.setattr(tflite_graph, "TABLES_MAX", 1000)
    data = bytearray(writer.model(*[Graph([T] * 60, [], [0], [0])] * 60))
    assert "too many tables" in refusal(bytes(data))


def test_one_long_vector_for_all_operators_is_bounded_too(monkeypatch):
    monkeypatch.setattr(tflite_graph, "NUMBERS_SUM_MAX", 100_000)
    operators = [Operator(writer.ADD, [0] * 60_000, [0])] * 2
    assert "too many numbers" in refusal(of([T], operators, [0], [0]))
    assert "at most 65536" in refusal(of([T], [Operator(writer.ADD, [0] * 70_000, [0])], [0], [0]))


def test_every_cut_is_refused():
    data = writer.linear(weights())
    for size in range(0, len(data) - 64, 7):
        with pytest.raises(BundleError):
            read(data[:size])


class _Watched:
    """A file that notes the furthest read."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def source(self) -> Source:
        def at(offset: int, size: int) -> bytes:
            assert offset >= 0 and offset + size <= len(self.data)
            return self.data[offset : offset + size]

        return Source(len(self.data), at, "watched")


SEEDS = [
    writer.linear(weights()),
    writer.pair(),
    writer.counter(),
    writer.compiled(),
    writer.linear_int8(weights()),
]
WORDS = [0, 1, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, 0x10000]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(
        st.tuples(
            st.integers(0, 4000), st.one_of(st.sampled_from(WORDS), st.integers(0, 2**32 - 1))
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_any_words_anywhere_give_a_graph_or_an_error_of_ours(seed, edits):
    data = bytearray(seed)
    for place, word in edits:
        struct.pack_into("<I", data, 4 * (place % (len(data) // 4)), word)
    try:
        found = tflite_graph.read(_Watched(bytes(data)).source())
    except BundleError as error:
        assert str(error)
    else:
        assert all(np.isfinite(scale) for scale in found.output_scales.values())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_behind_the_mark_give_an_error_of_ours(tail):
    try:
        read(b"\x08\0\0\0TFL3" + tail)
    except BundleError as error:
        assert str(error)
