"""The JSON headers of frames, typed: decode and check, encode and pad.

Law of this file: bytes in, values out; no socket, no numpy. A header is the Open Inference
Protocol's message ("ModelInferRequest", "ModelMetadataResponse", ... with the gRPC field names)
written as JSON. Unknown fields are ignored, so that a newer client may say more than we know; a
known field with a wrong value is a RequestError that names its key path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from edge_runtime import tensors
from edge_runtime.errors import EdgeError, RequestError, from_document
from edge_runtime.wire.frames import (
    HEADER_SIZE_MAX,
    Kind,
    encode_prefix,
    pad_header,
)

# Region numbers of one connection: 16 covers inputs, outputs and a few requests in flight; the
# table that a worker keeps per connection stays tiny. Part of the protocol, so not configurable.
REGIONS_MAX = 16
# Bounds arithmetic on hostile numbers; far above any size that a server's own limits let through.
SIZE_MAX = 1 << 40
TENSORS_MAX = 256  # inputs or outputs of one request; a header of 64 KiB holds no more useful ones

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Size = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX)]
RegionNumber = Annotated[int, msgspec.Meta(ge=0, lt=REGIONS_MAX)]
Dimension = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX)]


class TensorParameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a tensor's bytes are: `binary_data_size` bytes of the body, or a place in a region."""

    binary_data_size: Size | None = None
    shared_memory_region: RegionNumber | None = None
    shared_memory_offset: Size = 0
    shared_memory_byte_size: Size = 0


class TensorHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor of a request or response; `shape` is concrete."""

    name: Name
    datatype: str
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=tensors.DIMENSIONS_MAX)]
    parameters: TensorParameters = TensorParameters()


class RequestedOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """An output that the client wants; with a region, where it wants it.

    `shared_memory_byte_size` is the room there; an output that needs more is `too_large`.
    """

    name: Name
    parameters: TensorParameters = TensorParameters()


class RequestParameters(msgspec.Struct, frozen=True, omit_defaults=True):
    """`routing_key`: whom a split between two versions is to treat alike (a user, a camera)."""

    routing_key: Annotated[str, msgspec.Meta(max_length=256)] = ""


class InferRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """OIP ModelInferRequest. No `outputs` means all; `model_version` "" means the active one."""

    model_name: Name
    inputs: Annotated[tuple[TensorHeader, ...], msgspec.Meta(max_length=TENSORS_MAX)]
    model_version: str = ""
    outputs: Annotated[tuple[RequestedOutput, ...], msgspec.Meta(max_length=TENSORS_MAX)] = ()
    parameters: RequestParameters = RequestParameters()


class InferResponse(msgspec.Struct, frozen=True):
    """OIP ModelInferResponse. `model_version` is the one that answered."""

    model_name: str
    model_version: str
    outputs: tuple[TensorHeader, ...]


class RegionAdd(msgspec.Struct, frozen=True, omit_defaults=True):
    """Announces the memfd that came with this frame as region `region`.

    A version matters only while the connection is not at the worker that it is for.
    """

    model_name: Name
    region: RegionNumber
    byte_size: Annotated[int, msgspec.Meta(gt=0, le=SIZE_MAX)]
    model_version: str = ""


class RegionDrop(msgspec.Struct, frozen=True):
    """Ends region `region` of this connection."""

    model_name: Name
    region: RegionNumber


class ModelRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """Names a model: the request header of MODEL_METADATA and MODEL_READY."""

    model_name: Name
    model_version: str = ""


class ModelReady(msgspec.Struct, frozen=True):
    """OIP ModelReadyResponse."""

    name: str
    ready: bool


class TensorMetadata(msgspec.Struct, frozen=True):
    """OIP TensorMetadata; -1 in `shape` is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """OIP ModelMetadataResponse; `parameters` carries what OIP has no field for."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    parameters: dict[str, Any] = {}


class ServerMetadata(msgspec.Struct, frozen=True):
    """OIP ServerMetadataResponse; `models` only where the server tells."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


class Control(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fixed part of a control request; the command's arguments stand beside it."""

    command: Name


class _NamedModel(msgspec.Struct, frozen=True):
    model_name: Name


_ENCODER = msgspec.json.Encoder()
_NAMED_MODEL = msgspec.json.Decoder(_NamedModel)
_INFER_REQUEST = msgspec.json.Decoder(InferRequest)
_INFER_RESPONSE = msgspec.json.Decoder(InferResponse)
_REGION_ADD = msgspec.json.Decoder(RegionAdd)
_REGION_DROP = msgspec.json.Decoder(RegionDrop)
_MODEL_REF = msgspec.json.Decoder(ModelRef)
_CONTROL = msgspec.json.Decoder(Control)
_DOCUMENT = msgspec.json.Decoder(dict[str, Any])

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview


def decode_infer_request(header: Buffer) -> InferRequest:
    """Decode and check everything that can be checked without the model and the body.

    The caller still compares `body_size_of(request.inputs)` with the frame's body_size, and the
    regions named here with those of the connection.

    Raises:
        RequestError: not JSON, a field missing or wrong, a name twice, a datatype unknown, or a
            size that does not fit datatype and shape.
    """
    request = _decode(_INFER_REQUEST, header)
    _check_tensors(request.inputs, "$.inputs")
    _check_names([output.name for output in request.outputs], "$.outputs")
    for index, output in enumerate(request.outputs):
        _check_place(output.parameters, f"$.outputs[{index}]")
    return request


def decode_infer_response(header: Buffer) -> InferResponse:
    """Decode and check a response as strictly as a request.

    Raises:
        RequestError: as decode_infer_request.
    """
    response = _decode(_INFER_RESPONSE, header)
    _check_tensors(response.outputs, "$.outputs")
    return response


def decode_region_add(header: Buffer) -> RegionAdd:
    """Raises RequestError."""
    return _decode(_REGION_ADD, header)


def decode_region_drop(header: Buffer) -> RegionDrop:
    """Raises RequestError."""
    return _decode(_REGION_DROP, header)


def decode_model_ref(header: Buffer) -> ModelRef:
    """Raises RequestError."""
    return _decode(_MODEL_REF, header)


def decode_control(header: Buffer) -> tuple[str, dict[str, Any]]:
    """The command and its arguments. Raises RequestError."""
    command = _decode(_CONTROL, header).command
    arguments = _decode(_DOCUMENT, header)
    del arguments["command"]
    return command, arguments


def decode_document(header: Buffer, body: Buffer = b"") -> dict[str, Any]:
    """The JSON object of a frame, wherever `encode_document` put it. Raises RequestError."""
    document = _decode(_DOCUMENT, header)
    if document.get("in_body") is True:
        return _decode(_DOCUMENT, body)
    return document


def decode_error(header: Buffer) -> EdgeError:
    """The error that an ERROR frame carries (returned, not raised). Raises RequestError."""
    return from_document(_decode(_DOCUMENT, header))


def model_name_of(header: Buffer) -> str:
    """The model that a header names, without looking at the rest. Raises RequestError."""
    return _decode(_NAMED_MODEL, header).model_name


def body_size_of(headers: Iterable[TensorHeader]) -> int:
    """The bytes that these tensors take in the body."""
    return sum(header.parameters.binary_data_size or 0 for header in headers)


def encode_header(value: msgspec.Struct | Mapping[str, Any]) -> bytes:
    """JSON, padded with spaces so that the body after it is aligned.

    Raises:
        RequestError: over HEADER_SIZE_MAX.
    """
    header = pad_header(_ENCODER.encode(value))
    if len(header) > HEADER_SIZE_MAX:
        raise RequestError(f"header of {len(header)} bytes", expected=f"<= {HEADER_SIZE_MAX} bytes")
    return header


def encode_frame(
    kind: int,
    header: bytes,
    body: Buffer = b"",
    *,
    request_id: int = 0,
    time_ns: int = 0,
    priority: int = 0,
) -> bytes:
    """A whole frame in one piece; `body` is raw bytes (a memoryview must be of format "B")."""
    prefix = encode_prefix(kind, len(header), len(body), request_id, time_ns, priority)
    return b"".join((prefix, header, body))


def encode_document(
    kind: int,
    document: msgspec.Struct | Mapping[str, Any],
    *,
    request_id: int = 0,
    time_ns: int = 0,
) -> bytes:
    """A frame that is one JSON object.

    It is the header; when it is longer than a header may be (a thousand labels, a long history),
    the header is {"in_body":true} and the body is the object.
    """
    header = pad_header(_ENCODER.encode(document))
    body = b""
    if len(header) > HEADER_SIZE_MAX:
        header, body = pad_header(b'{"in_body":true}'), header
    return encode_frame(kind, header, body, request_id=request_id, time_ns=time_ns)


def encode_error(error: EdgeError, request_id: int = 0, time_ns: int = 0) -> bytes:
    """The ERROR frame for a request (0: the request's id is not known)."""
    document = error.document()
    for key in ("message", "where", "expected", "remedy"):
        # An error that quotes a hostile value must still fit its own header (JSON escapes: x 6).
        if len(document.get(key, "")) > 2000:
            document[key] = document[key][:2000] + "..."
    header = encode_header(document)
    return encode_frame(Kind.ERROR, header, request_id=request_id, time_ns=time_ns)


def _decode(decoder: msgspec.json.Decoder[T], data: Buffer) -> T:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as e:
        what, _, path = str(e).partition(" - at `")
        raise RequestError(what, where=f"header {path.rstrip('`') or '$'}") from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(
            f"the header is not JSON: {e}", where="header $", expected="one JSON object in UTF-8"
        ) from e


def _check_names(names: list[str], where: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tensor {twice!r} is named twice", where=f"header {where}")


def _check_tensors(headers: tuple[TensorHeader, ...], where: str) -> None:
    _check_names([header.name for header in headers], where)
    for index, header in enumerate(headers):
        try:
            _check_tensor(header, f"{where}[{index}]")
        except RequestError as e:
            if e.where:
                raise
            raise RequestError(
                e.message, where=f"header {where}[{index}]", expected=e.expected
            ) from e


def _check_tensor(header: TensorHeader, where: str) -> None:
    _check_place(header.parameters, where)
    given = header.parameters.binary_data_size
    if given is None and header.parameters.shared_memory_region is None:
        raise RequestError(
            "the tensor has no data",
            where=f"header {where}.parameters",
            expected="binary_data_size or shared_memory_region",
        )
    if given is None:
        given = header.parameters.shared_memory_byte_size
    if header.datatype == "BYTES":  # its size is in its data: every element has 4 bytes at least
        if given < 4 * tensors.elements(header.shape):
            raise RequestError(f"{given} bytes cannot hold BYTES {list(header.shape)}")
        return
    want = tensors.byte_size(header.datatype, header.shape)
    if given != want:
        raise RequestError(
            f"{given} bytes for {header.datatype} {list(header.shape)}", expected=f"{want} bytes"
        )


def _check_place(parameters: TensorParameters, where: str) -> None:
    both = parameters.binary_data_size is not None and parameters.shared_memory_region is not None
    if both:
        raise RequestError(
            "both binary_data_size and shared_memory_region are given",
            where=f"header {where}.parameters",
            expected="one of them",
        )
