"""Shared memory on the live socket: what is refused, what is reused, what stays."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import OverloadedError, RequestError, TooLargeError
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind
from edge_runtime.wire.regions import create_region
from tests.daemon.world import Daemon, RawConnection, infer_frame, running, until

MIB = 1 << 20
SIZE = 64  # one row of sixteen FP32
ENOUGH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    limits = {"region_bytes_max": MIB, "regions_per_connection_max": 4}
    with running({"limits": limits}) as started:
        started.add("one", scale=1.0)
        started.add("two", scale=2.0)
        yield started


def memfd(size: int = 4096, seals: int = ENOUGH, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("test", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def add_frame(number: int, size: int, model: str = "one", request_id: int = 1) -> bytes:
    header = messages.encode_header({"model_name": model, "region": number, "byte_size": size})
    return messages.encode_frame(Kind.REGION_ADD, header, request_id=request_id)


def drop_frame(number: int, model: str = "one") -> bytes:
    header = messages.encode_header({"model_name": model, "region": number})
    return messages.encode_frame(Kind.REGION_DROP, header, request_id=1)


def infer_region(
    model: str = "one",
    *,
    input_at: tuple[int, int] = (0, 0),
    output_at: tuple[int, int] | None = None,
    room: int = SIZE,
) -> bytes:
    """A request whose tensors are at (region, offset)."""
    region, offset = input_at
    place = messages.TensorParameters(
        shared_memory_region=region, shared_memory_offset=offset, shared_memory_byte_size=SIZE
    )
    outputs = ()
    if output_at is not None:
        region, offset = output_at
        there = messages.TensorParameters(
            shared_memory_region=region, shared_memory_offset=offset, shared_memory_byte_size=room
        )
        outputs = (messages.RequestedOutput("y", there),)
    tensor = messages.TensorHeader("x", "FP32", (1, 16), place)
    header = messages.encode_header(messages.InferRequest(model, (tensor,), outputs=outputs))
    return messages.encode_frame(Kind.INFER, header, request_id=1)


@contextlib.contextmanager
def added(raw: RawConnection, fd: int, size: int = 4096, number: int = 0) -> Iterator[mmap.mmap]:
    """A region that the server took, mapped here."""
    frame = raw.ask(add_frame(number, size), [fd])
    assert frame.prefix.kind == Kind.REGION_ADD | frames.RESPONSE, frame.header
    memory = mmap.mmap(fd, size)
    yield memory
    with contextlib.suppress(BufferError):  # an array of the test still looks at it
        memory.close()
    os.close(fd)


def put(memory: mmap.mmap, value: float, offset: int = 0) -> None:
    memory[offset : offset + SIZE] = np.full(16, value, np.float32).tobytes()


def got(memory: mmap.mmap, offset: int) -> float:
    row = np.frombuffer(memory[offset : offset + SIZE], np.float32)
    assert (row == row[0]).all()
    return float(row[0])


def _file_descriptor(tmp_path: Path) -> int:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    return os.open(path, os.O_RDWR)


BAD_REGIONS = {
    "unsealed": (lambda _: memfd(seals=0), 4096),
    "not sealed against shrinking": (lambda _: memfd(seals=fcntl.F_SEAL_SEAL), 4096),
    "seals that may change": (lambda _: memfd(seals=fcntl.F_SEAL_SHRINK), 4096),
    "a memfd that allows no seals": (lambda _: memfd(seals=0, flags=0), 4096),
    "smaller than announced": (lambda _: memfd(size=4095), 4096),
    "empty": (lambda _: memfd(size=0), 1),
    "a file": (_file_descriptor, 4096),
    "a pipe": (lambda _: os.pipe()[0], 4096),
    "a directory": (lambda path: os.open(path, os.O_RDONLY), 4096),
    "a path only": (lambda path: os.open(path, os.O_PATH), 4096),
    "over the limit": (lambda _: memfd(size=2 * MIB), 2 * MIB),
    "a size beyond all limits": (lambda _: memfd(), 1 << 60),
    "no size": (lambda _: memfd(), 0),
}


@pytest.mark.parametrize("what", BAD_REGIONS)
@pytest.mark.parametrize("first", [True, False], ids=["first frame", "later frame"])
def test_a_descriptor_that_is_no_sealed_memfd_is_refused(daemon, tmp_path, what, first):
    make, size = BAD_REGIONS[what]
    pid = daemon.worker("one")["pid"]
    with daemon.raw() as raw:
        if not first:
            raw.send(infer_frame("one"))
            raw.value()
        fd = make(tmp_path)
        raw.send(add_frame(0, size), [fd])
        error = raw.error()
        assert isinstance(error, RequestError)
        assert isinstance(error, TooLargeError) == (what == "over the limit")
        os.close(fd)
        raw.send(infer_frame("one"))  # the connection stays usable
        assert raw.value()[1] == 4.0
    assert daemon.worker("one")["pid"] == pid


def test_a_region_is_used_again_and_again_without_new_descriptors(daemon):
    with daemon.raw() as raw, added(raw, create_region(4096)) as memory:
        fds = None
        for turn in range(100):
            put(memory, turn)
            raw.ask(infer_region(output_at=(0, 1024)))
            assert got(memory, 1024) == turn + 1
            fds = fds or daemon.fds(daemon.worker("one")["pid"])
        assert daemon.fds(daemon.worker("one")["pid"]) == fds


def test_a_region_survives_a_change_of_model_on_its_connection(daemon):
    with daemon.raw() as raw, added(raw, create_region(4096)) as memory:
        put(memory, 3)
        for model, want in (("one", 4.0), ("two", 7.0), ("one", 4.0), ("two", 7.0)):
            frame = raw.ask(infer_region(model, output_at=(0, 512)))
            assert frame.prefix.kind == Kind.INFER | frames.RESPONSE, frame.header
            assert got(memory, 512) == want


def test_input_and_output_may_be_the_same_place(daemon):
    with daemon.raw() as raw, added(raw, create_region(4096)) as memory:
        put(memory, 1)
        for want in (2.0, 3.0, 4.0):
            raw.ask(infer_region(output_at=(0, 0)))
            assert got(memory, 0) == want


def test_an_offset_that_is_not_aligned_gives_the_right_answer_too(daemon):
    with daemon.raw() as raw, added(raw, create_region(4096)) as memory:
        put(memory, 5, 3)
        frame = raw.ask(infer_region(input_at=(0, 3), output_at=(0, 1001)))
        assert frame.prefix.kind == Kind.INFER | frames.RESPONSE, frame.header
        assert got(memory, 1001) == 6.0


@pytest.mark.parametrize(
    "request_frame",
    [
        infer_region(input_at=(7, 0)),
        infer_region(input_at=(0, 4096)),
        infer_region(input_at=(0, 4096 - SIZE + 4)),
        infer_region(input_at=(0, 1 << 40)),
        infer_region(output_at=(7, 0)),
        infer_region(output_at=(0, 4080)),
        infer_region(output_at=(0, 0), room=SIZE - 4),
        infer_region(output_at=(0, 0), room=1 << 30),
    ],
)
def test_a_place_outside_of_the_region_is_refused(daemon, request_frame):
    with daemon.raw() as raw, added(raw, create_region(4096)) as memory:
        raw.send(request_frame)
        assert isinstance(raw.error(), RequestError)
        put(memory, 3)
        raw.send(infer_region())
        assert raw.value()[1] == 4.0


def test_a_region_sealed_against_writing_is_an_input_and_no_output(daemon):
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, np.full(1024, 3, np.float32).tobytes())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ENOUGH | fcntl.F_SEAL_WRITE)
    with daemon.raw() as raw:
        raw.ask(add_frame(0, 4096), [fd])
        raw.send(infer_region())
        assert raw.value()[1] == 4.0
        raw.send(infer_region(output_at=(0, 1024)))
        assert "sealed against writing" in raw.error().message
    os.close(fd)


def test_regions_are_limited_replaced_and_dropped(daemon):
    with daemon.raw() as raw:
        fds = [create_region(4096) for _ in range(6)]
        for number in range(4):
            frame = raw.ask(add_frame(number, 4096), [fds[number]])
            assert frame.prefix.kind == Kind.REGION_ADD | frames.RESPONSE
        raw.send(add_frame(4, 4096), [fds[4]])
        assert "4 regions on this connection" in raw.error().message
        assert raw.ask(add_frame(3, 4096), [fds[5]]).prefix.kind != Kind.ERROR  # in its place
        assert raw.ask(drop_frame(0)).prefix.kind == Kind.REGION_DROP | frames.RESPONSE
        raw.send(drop_frame(0))
        assert isinstance(raw.error(), RequestError)
        raw.send(infer_region(input_at=(0, 0)))
        assert isinstance(raw.error(), RequestError)
        assert raw.ask(add_frame(0, 4096), [fds[4]]).prefix.kind != Kind.ERROR
        for number in (16, 255, -1, 1 << 40):
            raw.send(add_frame(number, 4096), [fds[4]])
            assert isinstance(raw.error(), RequestError)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("first", [True, False], ids=["first frame", "later frame"])
def test_a_region_without_its_descriptor_or_with_two_is_refused(daemon, first):
    with daemon.raw() as raw:
        if not first:
            raw.send(infer_frame("one"))
            raw.value()
        raw.send(add_frame(0, 4096))
        assert "0 descriptors" in raw.error().message
        fds = [create_region(4096), create_region(4096)]
        raw.send(add_frame(0, 4096), fds)
        assert "2 descriptors" in raw.error().message
        raw.send(infer_frame("one"))
        assert raw.value()[1] == 4.0
    for fd in fds:
        os.close(fd)


def test_descriptors_that_nobody_wants_end_the_connection_and_are_closed(daemon):
    pid = daemon.worker("one")["pid"]
    until(lambda: daemon.worker("one")["connections"] == 0)
    before = daemon.fds(pid), daemon.fds()
    for first in (True, False):
        with daemon.raw() as raw, contextlib.suppress(ConnectionError):
            fd = create_region(4096)
            if not first:
                raw.send(infer_frame("one"))
                raw.value()
            for number in range(40):
                raw.send(infer_frame("one", request_id=number), [fd])
                raw.value()
            pytest.fail("forty stray descriptors were kept")
        os.close(fd)
    until(
        lambda: daemon.fds(pid) <= before[0] and daemon.fds() <= before[1],
        "the descriptors' end",
    )


def test_connections_with_regions_leave_no_descriptor_and_no_mapping(daemon):
    pid = daemon.worker("one")["pid"]

    def visit(ask: bool) -> None:
        with daemon.raw() as raw, added(raw, create_region(MIB), MIB) as memory:
            put(memory, 3)
            if ask:
                raw.ask(infer_region(output_at=(0, 1024)))

    def maps() -> int:
        return sum("memfd:" in line for line in Path(f"/proc/{pid}/maps").open())

    def state() -> tuple[int, int, int]:
        return daemon.fds(pid), daemon.fds(), maps()

    visit(True)
    until(lambda: daemon.worker("one")["connections"] == 0)
    before = state()
    for turn in range(60):
        visit(turn % 2 == 0)
    until(lambda: daemon.worker("one")["connections"] == 0)
    until(
        lambda: all(now <= old for now, old in zip(state(), before, strict=True)),
        "an end of every region",
    )


def test_a_user_cannot_take_all_of_a_workers_descriptors_with_regions(make_daemon):
    daemon = make_daemon({"workers": {"open_files_max": 128}}).start()  # 96 for one user
    daemon.add("one")
    fd = create_region(4096)
    held = [daemon.raw() for _ in range(8)]
    refused = 0
    for raw in held:  # a connection is one, a region two
        for number in range(6):
            frame = raw.ask(add_frame(number, 4096), [fd])
            if frame.prefix.kind == Kind.ERROR:
                error = messages.decode_error(frame.header)
                assert isinstance(error, OverloadedError) and error.retry_after_s
                assert "open_files_max" in error.expected
                refused += 1
    assert refused == 8 * 6 - (96 - 8) // 2
    with daemon.raw() as raw:  # whoever comes now finds a descriptor, and whoever waited too
        assert raw.ask(infer_frame("one")).prefix.kind == Kind.INFER | frames.RESPONSE
    held[0].sock.close()
    until(lambda: daemon.worker("one")["connections"] == 7)
    assert held[1].ask(add_frame(12, 4096), [fd]).prefix.kind == Kind.REGION_ADD | frames.RESPONSE
    os.close(fd)
