"""Plans and slots: everything about a request that does not change from one request to the next.

Law of this file: memory and meaning of requests; no socket, no queue, no clock. A `Plan` is made
once per distinct request header: it validates it against the model and knows every size. A `Slot`
is the memory of one request under that plan, bound to the model once: inputs are received straight
into it, the model writes its outputs straight into the response frame, and the response is one
`send`. Slots are reused, so a worker in its stride allocates nothing and copies nothing that the
kernel has not.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_runtime import tensors
from edge_runtime.errors import BackendError, RequestError, TooLargeError
from edge_runtime.tensors import TensorSpec
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind

if TYPE_CHECKING:
    from edge_runtime.backends.protocol import Model

    Array = np.ndarray[Any, Any]

# What models use as indices, sizes and conditions. A library checks such a value and then uses it:
# in memory that a client can change in between, it would read and write beyond its tensors, where
# the bytes of other clients are. The model gets its own copy of these.
STEERING = frozenset({"BOOL", "INT16", "INT32", "INT64", "UINT16", "UINT32", "UINT64"})
ANSWER_BYTES_MAX = 2**32 - 1  # what the size of a frame's body can say
ALIGNMENT = 64  # a cache line, and what vector loads of every runtime like best
RESPONSE_KIND = Kind.INFER | frames.RESPONSE
_serials = itertools.count()


class Region(NamedTuple):
    """Shared memory that a client passed; `writable`: not sealed against writing."""

    number: int
    memory: memoryview
    fd: int
    writable: bool


class Output(NamedTuple):
    """A wanted output: its spec, its shape if known before the run, and where it goes."""

    spec: TensorSpec
    shape: tuple[int, ...] | None
    region: Region | None
    offset: int
    byte_size: int  # in the region: room there; inline: size, 0 if not known


class Input(NamedTuple):
    """A given input: its spec, concrete shape, and its place (in a region, or in the body)."""

    spec: TensorSpec
    shape: tuple[int, ...]
    region: Region | None
    offset: int
    byte_size: int


class Plan:
    """What one request header means.

    Attributes:
        answer_bytes_max: of the outputs in the response frame.
        cacheable: equal bodies have equal answers: no tensor is in shared memory.
        batch_key: requests with equal keys can run as one batch; None: this one runs alone.
        body_size: bytes of tensor data that must follow the header.
        free: slots at rest.
        named: the client wants this version and no other.
        routing_key: what the client wants a split to be decided by; empty: by the request's id.
        rows: size of the inputs along the batch axis.
        serial: tells plans apart for ever, as `id` does not.
        static: every size is known beforehand, so slots are bound once.
    """

    __slots__ = (
        "answer_bytes_max",
        "batch_key",
        "body_size",
        "cacheable",
        "free",
        "inputs",
        "model",
        "named",
        "names",
        "outputs",
        "routing_key",
        "rows",
        "serial",
        "slot_bytes",
        "static",
    )

    def __init__(
        self,
        model: Model,
        names: tuple[str, str],
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        body_size: int,
        answer_bytes_max: int,
    ) -> None:
        self.answer_bytes_max = answer_bytes_max
        self.model = model
        self.names = names
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.body_size = body_size
        self.static = _is_static(inputs, outputs)
        self.slot_bytes = body_size + sum(o.byte_size for o in outputs if o.region is None)
        self.slot_bytes += sum(_copy_size(one) for one in inputs)
        self.slot_bytes += sum(_copy_size(one) for one in outputs)
        self.free: list[Slot] | deque[Slot] = []
        self.rows = 1
        self.named = False
        self.routing_key = ""
        places = [one.region for one in self.inputs] + [one.region for one in self.outputs]
        self.cacheable = not any(places)
        self.batch_key: tuple[object, ...] | None = None
        self.serial = next(_serials)

    def retire(self) -> None:
        """No slot rests here any more, now or later.

        A plan and its resting slots refer to each other: without this, only the cycle collector
        would give back their memory, and the mapping of a region.
        """
        self.free = deque(maxlen=0)


class Slot:
    """The memory of one request.

    Attributes:
        body: where the request's tensor bytes are to be written (body_size bytes).
        frame: static plans: the answer; its outputs are written by `respond` or by a batch.
        inputs, outputs: static plans: the tensors, in the order of the plan.
        respond: runs the model; returns the frame to send, prefix not yet filled in.
    """

    __slots__ = ("body", "frame", "inputs", "outputs", "plan", "respond")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        memory = aligned(plan.body_size)
        self.body = memory.data
        self.frame = memoryview(b"")
        self.inputs: list[Array] = []
        self.outputs: list[Array] = []
        self.respond: Callable[[], memoryview] = (
            _bound(self, memory) if plan.static else _unbound(plan, memory)
        )


class Planner:
    """Makes plans for one loaded model."""

    def __init__(
        self,
        model: Model,
        name: str,
        version: int,
        batch_axis: int | None,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        free: frozenset[str] = frozenset(),
        batch_rows_max: int = 1,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> None:
        """See `Plan`.

        Args:
            free: outputs whose shape does not follow from the inputs' (see `free_outputs`).
            batch_rows_max: rows of a batch; 1: requests run alone.
            answer_bytes_max: of outputs whose size is known only after the run. (What is known
                before it is refused at admission.)
        """
        self._answer_bytes_max = answer_bytes_max
        self._batch_rows_max = batch_rows_max
        self._model = model
        self._free = free
        self._names = (name, str(version))
        self._batch_axis = batch_axis
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = {spec.name: spec for spec in outputs}

    def plan(self, request: messages.InferRequest, regions: Mapping[int, Region]) -> Plan:
        """The plan of a decoded header, `regions` being those of its connection.

        Raises:
            RequestError: unknown or missing tensors, wrong datatypes, shapes, sizes or regions.
        """
        offset = 0
        inputs: list[Input] = []
        for index, header in enumerate(request.inputs):
            given = self._input(header, f"inputs[{index}]", offset, regions)
            offset += given.byte_size if given.region is None else 0
            inputs.append(given)
        missing = self._inputs.keys() - {given.spec.name for given in inputs}
        if missing or len(inputs) != len(self._inputs):
            raise RequestError(
                f"inputs {sorted(given.spec.name for given in inputs)}",
                where=self._names[0],
                expected=f"each of {sorted(self._inputs)} once",
            )
        batch = self._batch(inputs)
        wanted = request.outputs or tuple(
            messages.RequestedOutput(name=name) for name in self._outputs
        )
        outputs = [
            self._output(one, f"outputs[{index}]", batch, regions)
            for index, one in enumerate(wanted)
        ]
        plan = Plan(self._model, self._names, inputs, outputs, offset, self._answer_bytes_max)
        plan.named = request.model_version != ""
        plan.routing_key = request.parameters.routing_key
        if self._batch_rows_max > 1 and self._batch_axis == 0:
            plan.batch_key = _batch_key(plan)
            plan.rows = inputs[0].shape[0] if plan.batch_key else 1
        return plan

    def _input(
        self,
        header: messages.TensorHeader,
        where: str,
        offset: int,
        regions: Mapping[int, Region],
    ) -> Input:
        spec = self._inputs.get(header.name)
        if spec is None:
            raise RequestError(
                f"unknown input {header.name!r}",
                where=f"{where}.name",
                expected=f"one of {sorted(self._inputs)}",
            )
        if header.datatype != spec.datatype:
            raise RequestError(
                f"datatype {header.datatype!r}",
                where=f"{where}.datatype",
                expected=spec.datatype,
            )
        if not tensors.shape_matches(header.shape, spec.shape):
            raise RequestError(
                f"shape {list(header.shape)}",
                where=f"{where}.shape",
                expected=f"{list(spec.shape)} (-1: any)",
            )
        shape = tuple(header.shape)
        parameters = header.parameters
        if parameters.shared_memory_region is not None:
            size = tensors.byte_size(spec.datatype, shape)
            region = _region(parameters, f"{where}.parameters", regions, size)
            return Input(spec, shape, region, parameters.shared_memory_offset, size)
        size = parameters.binary_data_size if parameters.binary_data_size is not None else -1
        if spec.datatype == "BYTES":
            tensors.elements(shape)
            if size < 0:
                raise RequestError("no binary_data_size", where=f"{where}.parameters")
            return Input(spec, shape, None, offset, size)
        want = tensors.byte_size(spec.datatype, shape)
        if size not in (-1, want):
            raise RequestError(
                f"binary_data_size {size}",
                where=f"{where}.parameters",
                expected=f"{want} for {spec.datatype} {list(shape)}",
            )
        return Input(spec, shape, None, offset, want)

    def _batch(self, inputs: Sequence[Input]) -> int | None:
        axis = self._batch_axis
        if axis is None:
            return None
        sizes = {given.shape[axis] for given in inputs if len(given.shape) > axis}
        if len(sizes) > 1:
            raise RequestError(
                f"inputs have batch sizes {sorted(sizes)}", expected=f"one size along axis {axis}"
            )
        return sizes.pop() if sizes else None

    def _output(
        self,
        wanted: messages.RequestedOutput,
        where: str,
        batch: int | None,
        regions: Mapping[int, Region],
    ) -> Output:
        spec = self._outputs.get(wanted.name)
        if spec is None:
            raise RequestError(
                f"unknown output {wanted.name!r}",
                where=f"{where}.name",
                expected=f"one of {sorted(self._outputs)}",
            )
        shape = self._output_shape(spec, batch)
        size = tensors.byte_size(spec.datatype, shape) if shape is not None else 0
        parameters = wanted.parameters
        if parameters.shared_memory_region is None:
            return Output(spec, shape, None, 0, size)
        region = _region(parameters, f"{where}.parameters", regions, size)
        if not region.writable:
            raise RequestError(
                f"region {region.number} is sealed against writing", where=f"{where}.parameters"
            )
        room = parameters.shared_memory_byte_size or size
        return Output(spec, shape, region, parameters.shared_memory_offset, room)

    def _output_shape(self, spec: TensorSpec, batch: int | None) -> tuple[int, ...] | None:
        if spec.name in self._free:
            return None
        return predicted_shape(spec, self._batch_axis, batch)


def predicted_shape(
    spec: TensorSpec, batch_axis: int | None, batch: int | None
) -> tuple[int, ...] | None:
    """The shape of an output before the run, if its spec and the batch size tell."""
    if spec.datatype == "BYTES":
        return None
    shape = list(spec.shape)
    if batch_axis is not None and batch is not None and len(shape) > batch_axis:
        shape[batch_axis] = batch if shape[batch_axis] == -1 else shape[batch_axis]
    return None if -1 in shape else tuple(shape)


def free_outputs(
    specs: Sequence[TensorSpec],
    batch_axis: int | None,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
) -> frozenset[str]:
    """The outputs of a real run whose shape was not the predicted one."""
    shapes = [array.shape for array in inputs.values()]
    batches = (s[batch_axis] for s in shapes if batch_axis is not None and len(s) > batch_axis)
    batch = next(batches, None)
    return frozenset(
        spec.name
        for spec in specs
        if predicted_shape(spec, batch_axis, batch) != tuple(outputs[spec.name].shape)
    )


def aligned_array(shape: tuple[int, ...], datatype: str) -> Array:
    """An array of that shape, aligned, not cleared."""
    memory = aligned(tensors.byte_size(datatype, shape))
    return memory.view(np.dtype(tensors.DATATYPES[datatype][0])).reshape(shape)


def _batch_key(plan: Plan) -> tuple[object, ...] | None:
    """What requests share that can run together; None: a tensor has no rows, or is not bound.

    Truth values have to be made 0 or 1 first (`_guarded`), which a batch does not do.
    """
    if not plan.static or not plan.inputs:
        return None
    if any(given.spec.datatype == "BOOL" for given in plan.inputs):
        return None
    tensors_rows = [given.shape[:1] for given in plan.inputs]
    tensors_rows += [(output.shape or ())[:1] for output in plan.outputs]
    if len(set(tensors_rows)) != 1 or not tensors_rows[0] or tensors_rows[0][0] < 1:
        return None
    return (
        *((given.spec.name, given.shape[1:]) for given in plan.inputs),
        *(output.spec.name for output in plan.outputs),
    )


def aligned(size: int) -> Array:
    """`size` bytes whose first is at a multiple of ALIGNMENT; not cleared."""
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _region(
    parameters: messages.TensorParameters, where: str, regions: Mapping[int, Region], size: int
) -> Region:
    number = parameters.shared_memory_region
    region = regions.get(number) if number is not None else None
    if region is None:
        raise RequestError(
            f"region {number} was not added on this connection",
            where=f"{where}.shared_memory_region",
            expected=f"one of {sorted(regions)}" if regions else "a REGION_ADD before it",
        )
    room, offset = parameters.shared_memory_byte_size, parameters.shared_memory_offset
    if room and room < size:
        raise TooLargeError(
            f"shared_memory_byte_size {room}", where=where, expected=f">= {size} bytes"
        )
    if offset < 0 or offset + max(room, size) > region.memory.nbytes:
        raise RequestError(
            f"bytes {offset}..{offset + max(room, size)} of region {number}",
            where=where,
            expected=f"within its {region.memory.nbytes} bytes",
        )
    return region


def _is_static(inputs: Sequence[Input], outputs: Sequence[Output]) -> bool:
    """Whether slots can be bound: fixed sizes, and every tensor at a multiple of its element."""
    if any(given.spec.datatype == "BYTES" for given in inputs):
        return False
    if any(output.shape is None for output in outputs):
        return False
    offset = 0
    for given in inputs:
        if given.offset % _item(given.spec):
            return False
    for output in outputs:
        if (offset if output.region is None else output.offset) % _item(output.spec):
            return False
        offset += output.byte_size if output.region is None else 0
    return True


def _item(spec: TensorSpec) -> int:
    return tensors.DATATYPES[spec.datatype][1] or 1


def _view(memory: memoryview, spec: TensorSpec, shape: tuple[int, ...], offset: int) -> Array:
    dtype = np.dtype(tensors.DATATYPES[spec.datatype][0])
    count = tensors.elements(shape)
    return np.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _input_arrays(plan: Plan, memory: memoryview) -> dict[str, Array]:
    return {
        given.spec.name: _view(
            memory if given.region is None else given.region.memory,
            given.spec,
            given.shape,
            given.offset,
        )
        for given in plan.inputs
    }


def _bound(slot: Slot, memory: Array) -> Callable[[], memoryview]:
    """Bind the model to the slot's memory; outputs land in the response frame."""
    plan = slot.plan
    shapes = {output.spec.name: output.shape or () for output in plan.outputs}
    sizes = {
        output.spec.name: tensors.byte_size(output.spec.datatype, output.shape or ())
        for output in plan.outputs
    }
    header = response_header(plan, shapes, sizes)
    head = frames.PREFIX_SIZE + len(header)
    total = head + sum(output.byte_size for output in plan.outputs if output.region is None)
    response = aligned(total)
    response[frames.PREFIX_SIZE : head] = np.frombuffer(header, dtype=np.uint8)
    view = response.data
    view[: frames.PREFIX_SIZE] = frames.encode_prefix(RESPONSE_KIND, len(header), total - head)
    offset = head
    outputs: dict[str, Array | None] = {}
    for output in plan.outputs:
        shape = output.shape or ()
        if output.region is None:
            outputs[output.spec.name] = _view(view, output.spec, shape, offset)
            offset += output.byte_size
        else:
            outputs[output.spec.name] = _view(
                output.region.memory, output.spec, shape, output.offset
            )
    inputs = _input_arrays(plan, memory.data)
    run = _guarded(plan, inputs, outputs)
    slot.frame = view
    slot.inputs = list(inputs.values())
    slot.outputs = [array for array in outputs.values() if array is not None]

    def respond() -> memoryview:
        run()
        return view

    return respond


def _guarded(
    plan: Plan, inputs: dict[str, Array], outputs: dict[str, Array | None]
) -> Callable[[], object]:
    """Bind the model to these tensors, or to copies where a client could mislead it.

    A truth value may only be 0 or 1: of others, libraries count more than there are, and answer
    with memory that they never wrote.
    """
    own_inputs = {one.spec.name: _copy(one) for one in plan.inputs if _copy_size(one)}
    own_outputs = {one.spec.name: _copy(one) for one in plan.outputs if _copy_size(one)}
    bound = inputs | own_inputs
    truths = [bound[one.spec.name] for one in plan.inputs if one.spec.datatype == "BOOL"]
    truths = [array.view(np.uint8) for array in truths]
    run = plan.model.bind(bound, outputs | own_outputs)
    if not own_inputs and not own_outputs and not truths:
        return run

    def run_guarded() -> None:
        for name, array in own_inputs.items():
            array[...] = inputs[name]
        for array in truths:
            np.minimum(array, 1, out=array)
        run()
        for name, array in own_outputs.items():
            target = outputs[name]
            assert target is not None
            target[...] = array

    return run_guarded


def _copy_size(one: Input | Output) -> int:
    """Bytes of the model's own copy of a tensor in shared memory; 0: it is used in place."""
    if one.region is None or one.shape is None or one.spec.datatype not in STEERING:
        return 0
    return tensors.byte_size(one.spec.datatype, one.shape)


def _copy(one: Input | Output) -> Array:
    assert one.shape is not None
    return aligned_array(one.shape, one.spec.datatype)


def _unbound(plan: Plan, memory: Array) -> Callable[[], memoryview]:
    """The slow and right way: for strings, free output shapes and unaligned tensors."""
    body = memory.data

    def respond() -> memoryview:
        arrays = {}
        for given in plan.inputs:
            source = body if given.region is None else given.region.memory
            data = source[given.offset : given.offset + given.byte_size]
            if given.spec.datatype != "BYTES":
                data = memoryview(bytes(data))  # moves it to an aligned place of our own
            if given.spec.datatype == "BOOL":
                data = np.minimum(np.frombuffer(data, np.uint8), 1).data
            arrays[given.spec.name] = tensors.from_bytes(data, given.spec.datatype, given.shape)
        if plan.model.keeps_state:  # which is the bindings'; `run` would start anew
            results = plan.model.bind(arrays, {each.spec.name: None for each in plan.outputs})()
        else:
            results = plan.model.run(arrays)
        return _assemble(plan, results)

    return respond


def _assemble(plan: Plan, results: Mapping[str, Array]) -> memoryview:
    parts: list[memoryview] = []
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    for output in plan.outputs:
        array = results[output.spec.name]
        data = tensors.to_bytes(array)
        shapes[output.spec.name] = tuple(array.shape)
        sizes[output.spec.name] = data.nbytes
        if output.region is None:
            parts.append(data)
            continue
        if data.nbytes > output.byte_size:
            raise TooLargeError(
                f"output {output.spec.name!r} has {data.nbytes} bytes",
                where="shared_memory_byte_size",
                expected=f"<= the {output.byte_size} bytes offered",
            )
        output.region.memory[output.offset : output.offset + data.nbytes] = data
    body_size = sum(part.nbytes for part in parts)
    if body_size > plan.answer_bytes_max:
        raise TooLargeError(
            f"outputs of {body_size} bytes",
            where=plan.names[0],
            expected=f"<= {plan.answer_bytes_max}",
            remedy="ask for less at once, or have them written to shared memory (REGION_ADD)",
        )
    header = response_header(plan, shapes, sizes)
    prefix = frames.encode_prefix(RESPONSE_KIND, len(header), body_size)
    return memoryview(bytearray(b"".join([prefix, header, *parts])))


def response_header(
    plan: Plan,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    names: tuple[str, str] | None = None,
) -> bytes:
    """The padded header of a response.

    Args:
        sizes: the bytes each output has (not the room it had).
        names: model and version that answered, if it was not the plan's.
    """
    model_name, model_version = names or plan.names
    entries = []
    for output in plan.outputs:
        name = output.spec.name
        size = sizes[name]
        if output.region is None:
            parameters = messages.TensorParameters(binary_data_size=size)
        else:
            parameters = messages.TensorParameters(
                shared_memory_region=output.region.number,
                shared_memory_offset=output.offset,
                shared_memory_byte_size=size,
            )
        entries.append(
            messages.TensorHeader(
                name=name,
                datatype=output.spec.datatype,
                shape=shapes[name],
                parameters=parameters,
            )
        )
    return messages.encode_header(
        messages.InferResponse(
            model_name=model_name, model_version=model_version, outputs=tuple(entries)
        )
    )


def check_signature(
    model: Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """The loaded artifact must have the inputs and outputs that the manifest promises.

    Raises:
        BackendError: a name, datatype or number of dimensions differs.
    """
    for kind, promised, real in (
        ("input", inputs, model.inputs),
        ("output", outputs, model.outputs),
    ):
        have = {spec.name: spec for spec in real}
        if kind == "input" and have.keys() != {spec.name for spec in promised}:
            raise BackendError(
                f"the artifact has inputs {sorted(have)}",
                where="model.yaml: inputs",
                expected=f"{sorted(spec.name for spec in promised)}",
            )
        for spec in promised:
            found = have.get(spec.name)
            if found is None or found.datatype != spec.datatype:
                raise BackendError(
                    f"the artifact has no {kind} {spec.name!r} of {spec.datatype}",
                    where=f"model.yaml: {kind}s",
                    expected=f"one of {[(one.name, one.datatype) for one in real]}",
                )
