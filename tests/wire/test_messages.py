"""Headers: what is accepted, and that every refusal names the key path."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BY_CODE, OverloadedError, RequestError, StorageError
from edge_runtime.wire import messages as m
from edge_runtime.wire.frames import HEADER_SIZE_MAX, PREFIX_SIZE, Kind
from edge_runtime.wire.reader import Frame, FrameReader


def tensor(**changes: object) -> dict[str, object]:
    return {
        "name": "x",
        "datatype": "FP32",
        "shape": [2, 3],
        "parameters": {"binary_data_size": 24},
    } | changes


def request(**changes: object) -> bytes:
    return json.dumps({"model_name": "m", "inputs": [tensor()]} | changes).encode()


def test_a_request_with_unknown_fields_and_padding_is_read():
    got = m.decode_infer_request(
        request(id="42", parameters={"a": 1}, inputs=[tensor(extra=[1])]) + b"   "
    )
    assert got.model_name == "m" and got.model_version == "" and got.outputs == ()
    assert got.inputs[0].shape == (2, 3) and m.body_size_of(got.inputs) == 24


SHM = {"shared_memory_region": 3, "shared_memory_offset": 64, "shared_memory_byte_size": 24}


def test_a_tensor_in_a_region_takes_nothing_of_the_body():
    got = m.decode_infer_request(request(inputs=[tensor(parameters=SHM)]))
    assert m.body_size_of(got.inputs) == 0
    assert got.inputs[0].parameters.shared_memory_region == 3


@pytest.mark.parametrize(
    ("header", "where", "says"),
    [
        (b"", "$", "not JSON"),
        (b"{", "$", "not JSON"),
        (b"\xff\xfe", "$", "not JSON"),
        (b"[" * 60000, "$", ""),
        (b"[]", "$", "object"),
        (b"{}", "$", "model_name"),
        (request(model_name=""), "$.model_name", "length"),
        (request(model_name=7), "$.model_name", "str"),
        (request(model_version=7), "$.model_version", "str"),
        (request(inputs=None), "$.inputs", "array"),
        (request(inputs=[tensor(shape=[2, "3"])]), "$.inputs[0].shape[1]", "int"),
        (request(inputs=[tensor(shape=[-2, -3])]), "$.inputs[0].shape[0]", ">= 0"),
        (request(inputs=[tensor(shape=[1 << 70])]), "$.inputs[0].shape[0]", ""),
        (request(inputs=[tensor(shape=[1] * 17)]), "$.inputs[0].shape", "length"),
        (request(inputs=[tensor(shape=[1 << 39, 1 << 39])]), "$.inputs[0]", "elements"),
        (request(inputs=[tensor(datatype="FP33")]), "$.inputs[0]", "FP33"),
        (request(inputs=[tensor(), tensor()]), "$.inputs", "twice"),
        (request(inputs=[tensor(parameters={})]), "$.inputs[0].parameters", "no data"),
        (request(inputs=[tensor(parameters={"binary_data_size": 23})]), "$.inputs[0]", "23 bytes"),
        (
            request(inputs=[tensor(parameters={"binary_data_size": -1})]),
            "$.inputs[0].parameters.binary_data_size",
            ">= 0",
        ),
        (
            request(inputs=[tensor(parameters=SHM | {"binary_data_size": 24})]),
            "$.inputs[0].parameters",
            "both",
        ),
        (
            request(inputs=[tensor(parameters=SHM | {"shared_memory_region": 16})]),
            "$.inputs[0].parameters.shared_memory_region",
            "15",
        ),
        (
            request(inputs=[tensor(datatype="BYTES", parameters={"binary_data_size": 23})]),
            "$.inputs[0]",
            "BYTES",
        ),
        (request(outputs=[{"name": "y"}, {"name": "y"}]), "$.outputs", "twice"),
        (request(outputs=[{}]), "$.outputs[0]", "name"),
    ],
)
def test_a_wrong_request_is_refused_with_its_key_path(header, where, says):
    with pytest.raises(RequestError) as caught:
        m.decode_infer_request(header)
    assert caught.value.code == "invalid_request"
    assert caught.value.where == f"header {where}"
    assert says in f"{caught.value}"


@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
def test_no_bytes_make_a_decoder_raise_anything_else(header):
    for decode in (
        m.decode_infer_request,
        m.decode_infer_response,
        m.decode_region_add,
        m.decode_region_drop,
        m.decode_model_ref,
        m.decode_control,
        m.decode_error,
        m.decode_document,
        m.model_name_of,
    ):
        try:
            decode(header)
        except RequestError:
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"model_name": st.just("m") | JSON},
        optional={
            "inputs": st.lists(
                st.fixed_dictionaries(
                    {"name": st.text(max_size=3)},
                    optional={
                        "datatype": st.sampled_from(["FP32", "BYTES", "X"]) | JSON,
                        "shape": st.lists(st.integers(-1, 2**63), max_size=20) | JSON,
                        "parameters": st.dictionaries(
                            st.sampled_from([*sorted(SHM), "binary_data_size"]),
                            st.integers(-1, 2**63) | JSON,
                        ),
                    },
                ),
                max_size=3,
            )
            | JSON,
            "outputs": JSON,
        },
    )
)
def test_what_the_decoder_accepts_is_consistent(document):
    try:
        got = m.decode_infer_request(json.dumps(document).encode())
    except RequestError:
        return
    assert m.body_size_of(got.inputs) >= 0
    for header in got.inputs:
        given_twice = header.parameters.binary_data_size is not None
        assert given_twice != (header.parameters.shared_memory_region is not None)


def test_headers_are_padded_and_read_back():
    request = m.InferRequest(
        "m",
        (m.TensorHeader("x", "FP32", (2, 3), m.TensorParameters(binary_data_size=24)),),
        outputs=(m.RequestedOutput("y"),),
    )
    header = m.encode_header(request)
    assert len(header) % 32 == 0
    assert m.decode_infer_request(header) == request
    assert m.model_name_of(header) == "m"


def test_a_header_over_the_limit_is_refused_before_it_is_sent():
    with pytest.raises(RequestError, match="header of"):
        m.encode_header({"text": "x" * HEADER_SIZE_MAX})


def only_frame(data: bytes) -> Frame:
    reader = FrameReader()
    reader.feed(data)
    frame = reader.next_frame()
    assert isinstance(frame, Frame) and reader.eof()
    return frame


@pytest.mark.parametrize("labels", [0, 20_000])
def test_a_document_travels_whatever_its_size(labels):
    document = {"name": "m", "labels": [f"label {n}" for n in range(labels)]}
    frame = only_frame(m.encode_document(0x90, document, request_id=5))
    assert frame.prefix.request_id == 5
    assert m.decode_document(frame.header, frame.body) == document


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_survives_the_wire(code):
    error = BY_CODE[code]("it broke", where="here", expected="x", remedy="y", retry_after_s=0.25)
    frame = only_frame(m.encode_error(error, request_id=3))
    assert frame.prefix.kind == Kind.ERROR and frame.prefix.request_id == 3
    back = m.decode_error(frame.header)
    assert type(back) is type(error) and back.document() == error.document()


def test_an_error_that_quotes_a_hostile_value_still_fits_its_frame():
    frame = only_frame(m.encode_error(StorageError("\x01" * 200_000, where="\\" * 200_000)))
    assert m.decode_error(frame.header).code == "storage"


def test_retry_after_is_a_number_of_seconds():
    back = m.decode_error(m.encode_error(OverloadedError("full", retry_after_s=2))[PREFIX_SIZE:])
    assert back.retry_after_s == 2.0


def test_control_arguments_stand_beside_the_command():
    assert m.decode_control(b'{"command":"install","activate":true}') == (
        "install",
        {"activate": True},
    )
