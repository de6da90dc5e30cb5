"""Plans and slots: what a header means, where its bytes lie, and what goes back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import tensors
from edge_runtime.errors import BackendError, RequestError, TooLargeError
from edge_runtime.serving import plan
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire import frames, messages
from edge_runtime.wire.messages import InferRequest, RequestedOutput, TensorHeader, TensorParameters
from edge_runtime.wire.reader import Frame, FrameReader

from .rig import NumpyModel, tensor

A = TensorSpec("a", "FP32", (-1, 3))
B = TensorSpec("b", "INT64", (-1,))
SUM = TensorSpec("sum", "FP32", (-1, 3))
COUNT = TensorSpec("count", "INT64", (1,))
INPUTS, OUTPUTS = (A, B), (SUM, COUNT)
REGION_SIZE = 4096


def add(inputs: Mapping[str, Any]) -> dict[str, Any]:
    total = inputs["a"] + inputs["b"][:, None].astype(np.float32)
    return {"sum": total, "count": np.array([inputs["b"].size], np.int64)}


def planner(
    model: NumpyModel | None = None, batch_axis: int | None = 0, free: frozenset[str] = frozenset()
) -> plan.Planner:
    model = model or NumpyModel(add, INPUTS, OUTPUTS)
    return plan.Planner(model, "m", 3, batch_axis, model.inputs, model.outputs, free)


def region(number: int = 0, size: int = REGION_SIZE, writable: bool = True) -> plan.Region:
    memory = plan.aligned(size)
    memory[:] = 0
    return plan.Region(number, memory.data, -1, writable)


def request(
    *inputs: TensorHeader, outputs: tuple[RequestedOutput, ...] = (), version: str = ""
) -> InferRequest:
    return InferRequest("m", inputs, version, outputs)


def header(name: str, datatype: str, shape: tuple[int, ...], **parameters: int) -> TensorHeader:
    return TensorHeader(name, datatype, shape, TensorParameters(**parameters))


def good(rows: int = 2) -> tuple[TensorHeader, TensorHeader]:
    return (
        header("a", "FP32", (rows, 3), binary_data_size=12 * rows),
        header("b", "INT64", (rows,), binary_data_size=8 * rows),
    )


def respond(slot: plan.Slot) -> tuple[messages.InferResponse, bytes]:
    """Run a slot, and read its frame as a client does."""
    data = bytes(slot.respond())
    reader = FrameReader(data=data)
    frame = reader.next_frame()
    assert isinstance(frame, Frame) and reader.eof()
    assert frame.prefix.kind == plan.RESPONSE_KIND
    return messages.decode_infer_response(frame.header), bytes(frame.body)


# --- what is refused ------------------------------------------------------------------------------

TWO = good()
WRONG: dict[str, tuple[InferRequest, str, str]] = {
    "no input": (request(), "each of", "m"),
    "an input missing": (request(TWO[0]), "each of", "m"),
    "an input twice": (request(TWO[0], TWO[0]), "each of", "m"),
    "an input too many": (request(*TWO, TWO[0]), "each of", "m"),
    "unknown input": (
        request(TWO[0], header("z", "FP32", (1,), binary_data_size=4)),
        "one of ['a', 'b']",
        "inputs[1].name",
    ),
    "datatype": (
        request(header("a", "INT32", (2, 3), binary_data_size=24), TWO[1]),
        "FP32",
        "inputs[0].datatype",
    ),
    "rank": (
        request(header("a", "FP32", (6,), binary_data_size=24), TWO[1]),
        "[-1, 3]",
        "inputs[0].shape",
    ),
    "fixed dimension": (
        request(header("a", "FP32", (2, 4), binary_data_size=32), TWO[1]),
        "[-1, 3]",
        "inputs[0].shape",
    ),
    "size": (
        request(header("a", "FP32", (2, 3), binary_data_size=23), TWO[1]),
        "24 for FP32 [2, 3]",
        "inputs[0].parameters",
    ),
    "batch sizes": (
        request(TWO[0], header("b", "INT64", (3,), binary_data_size=24)),
        "one size along axis 0",
        "",
    ),
    "unknown output": (
        request(*TWO, outputs=(RequestedOutput("zero"),)),
        "one of ['count', 'sum']",
        "outputs[0].name",
    ),
    "unknown region": (
        request(
            header("a", "FP32", (2, 3), shared_memory_region=5, shared_memory_byte_size=24), TWO[1]
        ),
        "one of [0, 1]",
        "inputs[0].parameters.shared_memory_region",
    ),
    "unknown region of an output": (
        request(*TWO, outputs=(RequestedOutput("sum", TensorParameters(shared_memory_region=5)),)),
        "one of [0, 1]",
        "outputs[0].parameters.shared_memory_region",
    ),
    "sealed region of an output": (
        request(*TWO, outputs=(RequestedOutput("sum", TensorParameters(shared_memory_region=1)),)),
        "",
        "outputs[0].parameters",
    ),
    "absurd shape": (
        request(header("a", "FP32", (1 << 40, 3)), header("b", "INT64", (1 << 40,))),
        "a smaller tensor",
        "",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_by_name_and_place(case: str) -> None:
    wrong, expected, where = WRONG[case]
    regions = {0: region(0), 1: region(1, writable=False)}
    with pytest.raises(RequestError) as caught:
        planner().plan(wrong, regions)
    assert expected in caught.value.expected and caught.value.where.startswith(where)
    assert planner().plan(request(*good()), regions).body_size == 40, "the right one passes"


@settings(max_examples=300)
@given(
    offset=st.one_of(st.integers(-100, REGION_SIZE + 100), st.integers(-(1 << 63), 1 << 63)),
    room=st.one_of(st.just(0), st.integers(0, REGION_SIZE + 100), st.integers(0, 1 << 63)),
    size=st.integers(0, REGION_SIZE + 100),
)
def test_a_place_outside_its_region_is_refused_whatever_the_numbers(
    offset: int, room: int, size: int
) -> None:
    place = TensorParameters(
        shared_memory_region=0, shared_memory_offset=offset, shared_memory_byte_size=room
    )
    end = offset + max(room, size)
    inside = offset >= 0 and end <= REGION_SIZE and (room == 0 or room >= size)
    if inside:
        assert plan._region(place, "w", {0: region()}, size).number == 0
    else:
        with pytest.raises(RequestError):
            plan._region(place, "w", {0: region()}, size)


def test_an_output_that_needs_more_than_its_room_is_too_large() -> None:
    place = TensorParameters(shared_memory_region=0, shared_memory_byte_size=23)
    wanted = (RequestedOutput("sum", place),)
    with pytest.raises(TooLargeError):
        planner().plan(request(*good(), outputs=wanted), {0: region()})
    unknown = planner(free=frozenset({"sum"})).plan(request(*good(), outputs=wanted), {0: region()})
    slot = plan.Slot(unknown)
    slot.body[:] = bytes(40)
    with pytest.raises(TooLargeError, match="24 bytes"):
        slot.respond()


def test_outputs_of_a_free_shape_have_a_limit_too() -> None:
    model = NumpyModel(add, INPUTS, OUTPUTS)
    free = frozenset({"sum"})
    made = plan.Planner(model, "m", 3, 0, INPUTS, OUTPUTS, free, answer_bytes_max=24 + 8)
    for rows, fits in ((2, True), (3, False)):
        slot = plan.Slot(made.plan(request(*good(rows)), {}))
        slot.body[:] = bytes(slot.body.nbytes)
        if fits:
            assert len(respond(slot)[1]) == 32
        else:
            with pytest.raises(TooLargeError, match="outputs of 44 bytes"):
                slot.respond()


def test_strings_in_a_region_or_without_a_size_are_refused() -> None:
    words = planner(NumpyModel(lambda i: i, (TensorSpec("t", "BYTES", (-1,)),), ()))
    place = header("t", "BYTES", (1,), shared_memory_region=0, shared_memory_byte_size=8)
    with pytest.raises(RequestError, match="no fixed element size"):
        words.plan(request(place), {0: region()})
    with pytest.raises(RequestError, match="no binary_data_size"):
        words.plan(request(header("t", "BYTES", (1,))), {})


# --- what is answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("free", [frozenset[str](), frozenset({"sum"}), frozenset({"count"})])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_bound_and_unbound_slots_give_the_same_frames(free: frozenset[str], rows: int) -> None:
    a = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    b = np.arange(rows, dtype=np.int64)
    given = request(tensor("a", a), tensor("b", b))
    made = planner(free=free).plan(given, {})
    assert made.static == (not free and rows % 2 == 0), "INT64 behind 12 bytes is not aligned"
    slot = plan.Slot(made)
    for _ in range(2):  # a slot is used again and again
        slot.body[:] = a.tobytes() + b.tobytes()
        response, body = respond(slot)
        assert (response.model_name, response.model_version) == ("m", "3")
        want = add({"a": a, "b": b})
        at = 0
        for output in response.outputs:
            size = output.parameters.binary_data_size
            assert size is not None
            got = tensors.from_bytes(body[at : at + size], output.datatype, output.shape)
            np.testing.assert_array_equal(got, want[output.name])
            at += size
        assert at == len(body)
        a, b = a + 1, b + 7
        given = request(tensor("a", a), tensor("b", b))


def test_a_response_is_byte_for_byte_what_the_codec_writes() -> None:
    slot = plan.Slot(planner().plan(request(*good(2)), {}))
    a, b = np.ones((2, 3), np.float32), np.array([1, 2])
    slot.body[:] = a.tobytes() + b.tobytes()
    sums = np.array([[2] * 3, [3] * 3], np.float32)
    expected = messages.encode_frame(
        plan.RESPONSE_KIND,
        messages.encode_header(
            messages.InferResponse("m", "3", (tensor("sum", sums), tensor("count", np.array([2]))))
        ),
        sums.tobytes() + np.array([2]).tobytes(),
    )
    assert bytes(slot.respond()) == expected
    body_at = len(expected) - 32
    assert body_at % frames.HEADER_ALIGNMENT == 0


def test_outputs_come_in_the_order_they_were_asked_for_and_others_not_at_all() -> None:
    for names in (("count", "sum"), ("sum",), ("count",)):
        wanted = tuple(RequestedOutput(name) for name in names)
        slot = plan.Slot(planner().plan(request(*good(), outputs=wanted), {}))
        slot.body[:] = bytes(40)
        response, _ = respond(slot)
        assert tuple(output.name for output in response.outputs) == names


def test_inputs_may_come_in_any_order() -> None:
    a, b = good(2)
    slot = plan.Slot(planner().plan(request(b, a), {}))
    slot.body[:] = np.array([10, 20]).tobytes() + np.ones((2, 3), np.float32).tobytes()
    _, body = respond(slot)
    np.testing.assert_array_equal(np.frombuffer(body[:24], np.float32), [11] * 3 + [21] * 3)


@pytest.mark.parametrize("offset", [0, 64, 4, 1, 30])
def test_tensors_in_regions_are_read_and_written_in_place_aligned_or_not(offset: int) -> None:
    shared = {0: region(0), 7: region(7)}
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    shared[0].memory[offset : offset + 24] = a.tobytes()
    place = {"shared_memory_region": 0, "shared_memory_offset": offset}
    given = header("a", "FP32", (2, 3), **place, shared_memory_byte_size=24)
    room = TensorParameters(
        shared_memory_region=7, shared_memory_offset=offset, shared_memory_byte_size=100
    )
    wanted = (RequestedOutput("count"), RequestedOutput("sum", room))
    made = planner().plan(request(given, good()[1], outputs=wanted), shared)
    assert made.body_size == 16 and made.static == (offset % 4 == 0)
    slot = plan.Slot(made)
    slot.body[:] = np.array([1, 2]).tobytes()
    response, body = respond(slot)
    assert body == np.array([2]).tobytes()
    got = response.outputs[1].parameters
    assert (got.shared_memory_region, got.shared_memory_offset) == (7, offset)
    assert got.shared_memory_byte_size == 24, "what is there, not the room that was offered"
    want = a + np.array([[1], [2]], np.float32)
    written = np.frombuffer(bytes(shared[7].memory[offset : offset + 24]), np.float32)
    np.testing.assert_array_equal(written.reshape(2, 3), want)
    assert not any(shared[7].memory[offset + 24 : offset + 100])


def test_an_index_that_a_client_changes_during_a_run_is_not_seen() -> None:
    ids = TensorSpec("ids", "INT64", (2,))
    last = TensorSpec("last", "INT64", (2,))
    shared = region()
    place = np.frombuffer(shared.memory, np.int64, 2, 64)
    seen: list[list[int]] = []

    def look_twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
        seen.append(inputs["ids"].tolist())
        shared.memory[64:80] = np.array([1 << 40, -1]).tobytes()  # the client, meanwhile
        seen.append(inputs["ids"].tolist())
        return {"last": inputs["ids"]}

    model = NumpyModel(look_twice, (ids,), (last,))
    where = {"shared_memory_region": 0, "shared_memory_offset": 64, "shared_memory_byte_size": 16}
    wanted = RequestedOutput("last", TensorParameters(**where | {"shared_memory_offset": 128}))
    given = request(header("ids", "INT64", (2,), **where), outputs=(wanted,))
    made = planner(model, None).plan(given, {0: shared})
    assert made.static and made.slot_bytes == 32, "both tensors have a copy"
    slot = plan.Slot(made)
    for values in ([1, 2], [3, 4]):
        shared.memory[64:80] = np.array(values).tobytes()
        seen.clear()
        respond(slot)
        assert seen == [values, values]
        assert np.frombuffer(shared.memory, np.int64, 2, 128).tolist() == values
    assert place.tolist() == [1 << 40, -1], "the client's bytes stay as they are"


@pytest.mark.parametrize("in_region", [False, True])
@pytest.mark.parametrize("free", [frozenset(), frozenset({"sum"})])
def test_truth_values_are_0_or_1_for_the_model_whatever_a_client_sends(
    free: frozenset[str], in_region: bool
) -> None:
    mask = TensorSpec("mask", "BOOL", (-1, 4))
    total = TensorSpec("sum", "INT64", (-1, 1))

    def count(inputs: Mapping[str, Any]) -> dict[str, Any]:  # as a library does that trusts them
        values = inputs["mask"].view(np.uint8).astype(np.int64)
        return {"sum": values.sum(axis=1, keepdims=True)}

    made = plan.Planner(
        NumpyModel(count, (mask,), (total,)), "m", 3, 0, (mask,), (total,), free, 64
    )
    sent, shared = bytes([0, 1, 2, 255]), region()
    place = {"shared_memory_region": 0, "shared_memory_byte_size": 4}
    given = header("mask", "BOOL", (1, 4), **place if in_region else {"binary_data_size": 4})
    one = made.plan(request(given), {0: shared})
    assert one.static is not bool(free) and one.batch_key is None
    slot = plan.Slot(one)
    for _ in range(2):
        (shared.memory[:4] if in_region else slot.body)[:] = sent
        assert respond(slot)[1] == np.array([3]).tobytes()
    assert not in_region or bytes(shared.memory[:4]) == sent


@pytest.mark.parametrize(
    ("rows", "names", "static"),
    [
        (1, ("sum",), False),  # the INT64 input lies behind 12 bytes
        (2, ("sum", "count"), True),
        (2, ("count", "sum"), True),
    ],
)
def test_slots_are_bound_where_every_tensor_is_aligned(
    rows: int, names: tuple[str, ...], static: bool
) -> None:
    wanted = tuple(RequestedOutput(name) for name in names)
    assert planner().plan(request(*good(rows), outputs=wanted), {}).static is static


def test_an_output_in_a_region_takes_no_room_between_those_in_the_frame() -> None:
    inputs = (header("a", "FP32", (1, 3), shared_memory_region=0), good(1)[1])
    for offset, static in ((0, True), (64, True), (2, False)):
        here = TensorParameters(shared_memory_region=0, shared_memory_offset=offset)
        wanted = (RequestedOutput("sum", here), RequestedOutput("count"))
        made = planner().plan(request(*inputs, outputs=wanted), {0: region()})
        assert made.static is static and made.slot_bytes == 8 + 8


def test_strings_and_outputs_of_a_free_shape_are_answered() -> None:
    spec = TensorSpec("t", "BYTES", (-1,))
    doubled = TensorSpec("tt", "BYTES", (-1,))
    lengths = TensorSpec("n", "INT64", (-1,))

    def model(inputs: Mapping[str, Any]) -> dict[str, Any]:
        words = [word * 2 for word in inputs["t"].tolist()]
        long = [len(word) for word in words if word]
        return {"tt": np.array(words, object), "n": np.array(long, np.int64)}

    made = planner(NumpyModel(model, (spec,), (doubled, lengths)), None)
    for words in ([b"ab", b"", b"\x00\xff"], []):
        body = bytes(tensors.to_bytes(np.array(words, object)))
        size = len(body)
        given = made.plan(request(header("t", "BYTES", (len(words),), binary_data_size=size)), {})
        assert not given.static
        slot = plan.Slot(given)
        slot.body[:] = body
        response, back = respond(slot)
        text, numbers = response.outputs
        split = text.parameters.binary_data_size
        assert split is not None
        got = tensors.from_bytes(back[:split], "BYTES", text.shape)
        assert got.tolist() == [word * 2 for word in words]
        assert np.frombuffer(back[split:], np.int64).tolist() == [2 * len(w) for w in words if w]
        assert numbers.shape == (len([w for w in words if w]),)


@settings(deadline=None)
@given(body=st.binary(max_size=40), count=st.integers(0, 6))
def test_string_bodies_are_right_or_a_request_error(body: bytes, count: int) -> None:
    model = NumpyModel(lambda i: {"t": i["t"]}, (TensorSpec("t", "BYTES", (-1,)),), ())
    made = planner(model).plan(
        request(header("t", "BYTES", (count,), binary_data_size=len(body))), {}
    )
    slot = plan.Slot(made)
    slot.body[:] = body
    try:
        slot.respond()
    except RequestError:
        return
    assert len(body) >= 4 * count


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000])
def test_memory_of_slots_is_aligned(size: int) -> None:
    memory = plan.aligned(size)
    assert memory.nbytes == size
    assert size == 0 or memory.ctypes.data % plan.ALIGNMENT == 0


def test_a_plan_knows_its_bytes() -> None:
    made = planner().plan(request(*good(2)), {})
    assert made.body_size == 24 + 16 and made.slot_bytes == 40 + 24 + 8


def test_a_retired_plan_lets_its_slots_go_at_once() -> None:
    class Memory(bytearray):
        """One that can be watched."""

    memory = Memory(REGION_SIZE)
    watched = weakref.ref(memory)
    shared = plan.Region(0, memoryview(memory), -1, True)
    del memory
    given = header("a", "FP32", (2, 3), shared_memory_region=0, shared_memory_byte_size=24)
    made = planner().plan(request(given, good()[1]), {0: shared})
    resting, used = plan.Slot(made), plan.Slot(made)
    made.free.append(resting)
    del shared, resting
    gc.disable()
    try:
        made.retire()
        made.free.append(used)  # what a release does
        assert not made.free
        del made, used
        assert watched() is None, "only the cycle collector would find it"
    finally:
        gc.enable()


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "batch", "predicted"),
    [
        ((-1, 3), 0, 5, (5, 3)),
        ((2, 3), 0, 5, (2, 3)),
        ((2, 3), None, None, (2, 3)),
        ((-1, 3), None, None, None),
        ((-1, -1), 0, 5, None),
        ((3, -1), 1, 5, (3, 5)),
        ((), 0, 5, ()),
        ((-1,), 1, 5, None),
    ],
)
def test_the_shape_of_an_output_follows_from_the_batch_or_is_not_known(
    shape: tuple[int, ...], axis: int | None, batch: int | None, predicted: tuple[int, ...] | None
) -> None:
    assert plan.predicted_shape(TensorSpec("y", "FP32", shape), axis, batch) == predicted
    assert plan.predicted_shape(TensorSpec("y", "BYTES", shape), axis, batch) is None


def test_outputs_that_did_not_have_the_predicted_shape_are_free() -> None:
    specs = (SUM, COUNT, TensorSpec("boxes", "FP32", (-1, 4)), TensorSpec("t", "BYTES", (1,)))
    inputs = {"a": np.zeros((2, 3)), "b": np.zeros(2)}
    outputs = {
        "sum": np.zeros((2, 3)),
        "count": np.zeros(1),
        "boxes": np.zeros((7, 4)),
        "t": np.array([b""], object),
    }
    assert plan.free_outputs(specs, 0, inputs, outputs) == {"boxes", "t"}
    assert plan.free_outputs(specs, None, inputs, outputs) == {"sum", "boxes", "t"}


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ((A,), OUTPUTS, "inputs"),
        ((A, B, SUM), OUTPUTS, "inputs"),
        ((A, TensorSpec("b", "INT32", (-1,))), OUTPUTS, "'b' of INT32"),
        (INPUTS, (*OUTPUTS, A), "output 'a'"),
        (INPUTS, (TensorSpec("sum", "FP64", (-1, 3)),), "'sum' of FP64"),
    ],
)
def test_an_artifact_without_the_promised_tensors_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], says: str
) -> None:
    model = NumpyModel(add, INPUTS, OUTPUTS)
    with pytest.raises(BackendError, match=says):
        plan.check_signature(model, inputs, outputs)
    plan.check_signature(model, INPUTS, OUTPUTS)
    plan.check_signature(model, INPUTS, (SUM,))  # outputs may be left out
