"""Prepared frames: whatever happens between two calls, the server sees what the caller sees.

`digest` answers with a checksum of each input, so that large inputs have small outputs: the only
requests with tensors in shared memory whose frames are prepared.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import select
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import tensors
from edge_runtime.backends import reference
from edge_runtime.bundle import archive
from edge_runtime.bundle.manifest import Blob, Manifest, Variant
from edge_runtime.bundle.source import from_bytes
from edge_runtime.client import Client, RetryPolicy, connection
from edge_runtime.client.connection import Connection
from edge_runtime.errors import (
    DeadlineError,
    EdgeError,
    MalformedError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TooLargeError,
)
from edge_runtime.tensors import TensorSpec
from tests.client.server import Server
from tests.daemon import world

SHAPE = (300, 64)  # FP32: 76,800 bytes, over the limit of shared memory
RNG = np.random.default_rng(3)
NO_RETRY = RetryPolicy(enabled=False)


def ordinary(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return RNG.random(shape, dtype=np.float32)


def own(client: Client, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> np.ndarray:
    x = client.tensor(shape, dtype)
    x[...] = RNG.random(shape)
    return x


def digest_of(x: np.ndarray) -> list[int]:
    return [zlib.crc32(tensors.to_bytes(x)), *x.shape]


def ask(client: Client, *arrays: np.ndarray, **options: Any) -> None:
    """The server has seen exactly these arrays."""
    inputs = {f"input {n}": array for n, array in enumerate(arrays)}
    outputs = client.infer("digest", inputs, **options)
    assert {name: y.tolist() for name, y in outputs.items()} == {
        name: digest_of(array) for name, array in inputs.items()
    }


def of(client: Client) -> Connection:
    found = client._channels["digest"].connection
    assert found is not None
    return found


@pytest.fixture
def long_way(monkeypatch):
    """How many requests were not prepared."""
    calls: list[Any] = []
    real = Connection._infer_large

    def counted(self: Connection, *args: Any) -> Any:
        calls.append(None)  # not the arrays, which must be free to die
        return real(self, *args)

    monkeypatch.setattr(Connection, "_infer_large", counted)
    return calls


# What the caller does with arrays


def test_a_change_in_place_is_seen(server, long_way):
    with Client(server.path) as client:
        x = own(client)
        for n in range(10):
            x[n, n] += 1
            ask(client, x)
    assert len(long_way) == 1, "the first makes the region, the others are prepared"


def test_an_ordinary_array_is_sent_as_it_is_now_wherever_it_lies(server, long_way):
    with Client(server.path) as client:
        kept = [ordinary() for _ in range(5)]
        for _ in range(3):
            for x in kept:
                x += 1
                ask(client, x)
    assert len(long_way) == 1


def test_views_of_one_tensor_are_told_apart(server, long_way):
    with Client(server.path) as client:
        whole = own(client, (900, 64))
        views = [whole[:300], whole[1:301], whole[600:], whole.reshape(450, 128)[150:300]]
        for _ in range(4):
            for view in views:
                whole += 1
                ask(client, view)
            ask(client, views[0], views[1])  # and together, though they overlap
            ask(client, views[1], views[0])
    assert len(long_way) == 1


def test_an_array_that_took_over_the_id_of_a_tensor_is_not_taken_for_it(server):
    other = ordinary()
    with Client(server.path) as client:
        for _ in range(5):
            x = own(client)
            ask(client, x)
            ask(client, x)
            freed = id(x)
            del x
            views = [other[:] for _ in range(100)]
            twin = next(view for view in views if id(view) == freed)
            ask(client, twin)


def test_a_tensor_at_the_place_of_a_freed_one_is_sent_as_it_is(server, long_way):
    with Client(server.path) as client:
        for _ in range(10):
            ask(client, own(client))
        ask(client, own(client, (64, 300)))  # the same place in another shape
        (arena,) = client._own._arenas
        assert not arena.offsets, "the ids of freed tensors are forgotten"
    assert len(long_way) == 1


def test_a_prepared_frame_keeps_no_tensor_alive(server):
    with Client(server.path) as client:
        x = own(client)
        (arena,) = client._own._arenas
        for _ in range(3):
            ask(client, x)
        del x
        assert not arena.offsets


LAYOUTS: dict[str, Callable[[Client], np.ndarray]] = {
    "fortran": lambda client: np.asfortranarray(ordinary()),
    "big endian": lambda client: ordinary().astype(">f4"),
    "reversed": lambda client: ordinary()[::-1, ::-1],
    "strided": lambda client: ordinary((600, 64))[::2],
    "repeated": lambda client: np.broadcast_to(ordinary((1, 64)), SHAPE),
    "read-only": lambda client: np.frombuffer(RNG.bytes(76_800), np.float32).reshape(SHAPE),
    "unaligned": lambda client: np.frombuffer(RNG.bytes(76_801), "<f4", 19_200, 1).reshape(SHAPE),
    "other datatype": lambda client: ordinary().view(np.int32),
    "tensor, big endian": lambda client: own(client, dtype=">f4"),
    "tensor, transposed": lambda client: own(client, (64, 300)).T,
    "tensor, strided": lambda client: own(client, (600, 64))[::2],
    "tensor, unaligned": lambda client: (
        own(client, (76_801,), np.uint8)[1:].view("<u4").reshape(SHAPE)
    ),
    "tensor, other datatype": lambda client: own(client).view(np.uint8),
    "tensor, another client's": lambda client: own(Client(client.path)),
    "small": lambda client: ordinary((3, 4)),
    "small tensor": lambda client: own(client, (3, 4)),
    "empty": lambda client: ordinary((0, 4)),
    "scalar": lambda client: np.array(RNG.random()),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("shared_min_bytes", [65536, 0])
def test_any_layout_is_sent_right_after_any_other(server, make, shared_min_bytes):
    with Client(server.path, shared_memory_min_bytes=shared_min_bytes) as client:
        same = own(client)
        for _ in range(3):
            ask(client, make(client))
            ask(client, same)
            ask(client, ordinary())
            ask(client, make(client), same, make(client))


def test_more_shapes_and_places_than_are_remembered_are_all_right(server):
    with Client(server.path) as client:
        whole = own(client, (600, 64))
        for _ in range(2):
            for n in range(connection.PLANS_MAX + 6):
                whole += 1
                ask(client, whole[n : n + 300])
                ask(client, ordinary((300 + n, 64)), whole[n:])
                assert len(of(client)._messages) <= connection.PLANS_MAX


def test_bytes_held_by_prepared_frames_are_bounded(server):
    with Client(server.path) as client:
        biggest = 0
        for n in range(40):
            ask(client, ordinary((4000 + n, 64)), ordinary((2, n)))
            messages = of(client)._messages.values()
            held = sum(view.nbytes for message in messages for _, view in message.views)
            assert held == of(client)._prepared_bytes <= connection.PREPARED_BYTES_MAX
            biggest = max(biggest, held)
        assert biggest > connection.PREPARED_BYTES_MAX - 2 * 4040 * 256
        messages_before = len(of(client)._messages)
        huge = np.zeros((connection.PREPARED_BYTES_MAX // 4 + 1,), np.float32)
        ask(client, huge)
        ask(client, huge)
        assert len(of(client)._messages) == messages_before


def test_tensors_count_for_nothing_in_that_bound(server, long_way):
    with Client(server.path) as client:
        ring = [own(client, (5_000_000,), np.uint8) for _ in range(8)]
        for _ in range(2):
            for x in ring:
                ask(client, x)
        made = len(of(client)._numbers)
        assert of(client)._prepared_bytes == 0 and len(long_way) == made


def test_a_request_that_found_no_room_in_shared_memory_uses_it_again_when_there_is(
    server, monkeypatch
):
    with Client(server.path) as client:
        ask(client, ordinary())
        with monkeypatch.context() as patched:
            patched.setattr(of(client)._scratch, "array", lambda shape, dtype: None)
            for _ in range(3):
                ask(client, ordinary())
        for _ in range(2):
            ask(client, ordinary())
    sizes = [seen["body_size"] for seen in server.faults.seen]
    assert sizes == [0, 76_800, 76_800, 76_800, 0, 0]


# What the server does


def test_an_error_between_calls_changes_nothing(server, long_way):
    with Client(server.path, retry=NO_RETRY) as client:
        x, y = own(client), ordinary()
        for _ in range(4):
            ask(client, x, y)
            x += 1
            server.faults.overloaded = 1
            with pytest.raises(OverloadedError):
                ask(client, x, y)
            with pytest.raises(RequestError, match="nothing"):
                client.infer("digest", {"input 0": x}, outputs=["nothing"])
            y += 1
    assert server.connections_accepted == 1


def test_an_unknown_model_does_not_cost_the_connection_its_shared_memory(server):
    with Client(server.path) as client:
        for _ in range(2):
            with pytest.raises(NotFoundError):
                client.infer("nobody", {"x": ordinary()})


@pytest.mark.parametrize("fault", ["close_before_answer", "close_inside_answer"])
def test_a_lost_connection_is_replaced_and_its_regions_are_added_again(server, fault):
    with Client(server.path) as client:
        x, y = own(client), ordinary()
        for lost in range(1, 4):
            for _ in range(3):
                x += 1
                y += 1
                ask(client, x, y)
            setattr(server.faults, fault, 1)
            ask(client, x, y)
            server.drop_connections()
            ask(client, y)
            assert server.connections_accepted == 2 * lost + 1


def test_a_server_that_takes_no_regions_after_a_restart_still_sees_the_tensors(tmp_path):
    with Client(tmp_path / "s") as client:
        x, y = own(client), ordinary()
        for refuse in (False, True, False):
            server = Server(tmp_path / "s")
            server.faults.refuse_regions = refuse
            for _ in range(3):
                x += 1
                ask(client, x, y)
            seen = {one["body_size"] for one in server.faults.seen}
            assert seen == {x.nbytes + y.nbytes if refuse else 0}
            server.close()


def test_a_refusal_that_comes_while_an_interrupted_send_goes_on_is_heard(server):
    class Interrupted:
        """The first send is cut short, and goes on when the server has answered already."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def send(self, data: bytearray) -> int:
            sent = self.real.send(memoryview(data)[: len(data) // 2])
            assert select.select([self.real], [], [], 5)[0]
            return sent

    with Client(server.path, shared_memory_min_bytes=1 << 30, timeout_s=3) as client:
        ask(client, ordinary())
        of(client)._socket = Interrupted(of(client)._socket)
        with pytest.raises(TooLargeError):
            ask(client, np.zeros((3_000_000,), np.float32))
        of(client)._socket = of(client)._socket.real
        ask(client, ordinary())
    assert server.connections_accepted == 1


@pytest.mark.parametrize(
    "answer",
    [
        b'{"model_name": "digest", "outputs": [{}]}',
        b'{"model_name":"digest","outputs":[{"name":"input 0","datatype":"FP32","shape":[5],'
        b'"parameters":{"binary_data_size":24}}]}',
        b'{"model_name":"digest","outputs":[{"name":"input 0","datatype":"FP33","shape":[6],'
        b'"parameters":{"binary_data_size":24}}]}',
    ],
    ids=["no name", "sizes differ", "no such datatype"],
)
def test_after_an_answer_that_makes_no_sense_the_connection_is_given_up(server, answer):
    with Client(server.path) as client:
        x = own(client)
        server.faults.answer_header = answer
        with pytest.raises(MalformedError):
            ask(client, x)
        server.faults.answer_header = None
        ask(client, x)
    assert server.connections_accepted == 2


# Who owns the outputs


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("rows", [1, 1000, 5000])  # inline, over the inbox, in shared memory
def test_outputs_share_no_memory_with_anything_and_stay_as_they_were(server, copy, rows):
    with Client(server.path) as client:
        x = own(client, (rows, 16))
        kept, wanted = [], []
        for n in range(12):
            x[...] = n
            kept.append(client.infer("affine", {"x": x}, copy=copy)["y"])
            wanted.append(x * 2 + 1)
        for index, y in enumerate(kept):
            np.testing.assert_array_equal(y, wanted[index])
            assert not np.shares_memory(y, x)
            assert not any(np.shares_memory(y, other) for other in kept[:index])


def test_memory_of_uncopied_outputs_is_used_again_when_the_last_view_is_gone(server):
    with Client(server.path) as client:
        x = ordinary((40_000, 16))  # 2.5 MB: an arena has room for one
        first = client.infer("affine", {"x": x}, copy=False)["y"]
        first = client.infer("affine", {"x": x}, copy=False)["y"]
        part, wanted = first[5, 3:4], first[5, 3:4].copy()
        del first
        for n in range(30):
            client.infer("affine", {"x": x + n}, copy=False)
        assert part == wanted
        scratch = client._channels["affine"].connection._scratch
        assert scratch is not None and len(scratch._arenas) <= 3


def test_copied_outputs_take_up_no_shared_memory(server):
    with Client(server.path) as client:
        kept = [client.infer("affine", {"x": ordinary((5000, 16))})["y"] for _ in range(40)]
        scratch = client._channels["affine"].connection._scratch
        assert scratch is not None and len(scratch._arenas) == 1  # of 4 MiB
    assert sum(y.nbytes for y in kept) > 12_000_000


# Threads and processes


def test_threads_that_share_a_client_get_their_own_answers(server):
    failures: list[BaseException] = []

    def work(client: Client) -> None:
        try:
            x, y = own(client), ordinary()
            for n in range(60):
                x += 1
                y += 1
                ask(client, x)
                ask(client, y, x[n:])
                if n % 3 == 0:
                    del x
                    x = own(client)
        except (AssertionError, EdgeError) as e:
            failures.append(e)

    with Client(server.path, timeout_s=30) as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert server.connections_accepted == 1


def test_waiting_for_another_thread_counts_towards_the_deadline(server):
    server.faults.delays, server.faults.delay_s = 1, 0.4
    with Client(server.path) as client:
        ask_slowly = threading.Thread(target=ask, args=(client, ordinary()))
        ask_slowly.start()
        deadline = time.monotonic() + 5
        while server.faults.delays:  # the first is at the server, and has the connection
            assert time.monotonic() < deadline
            time.sleep(0.001)
        server.faults.delays = 1
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            client.infer("digest", {"x": ordinary()}, timeout_s=0.6)
        assert time.monotonic() - started < 0.75
        ask_slowly.join()


def test_after_a_fork_the_child_sends_what_it_sees(server):
    with Client(server.path) as client:
        x, y = own(client), ordinary()
        for _ in range(3):
            ask(client, x, y)
        pid = os.fork()
        if pid == 0:
            try:
                mine = own(client)
                for _ in range(30):
                    mine += 1
                    y += 1
                    ask(client, mine, y)
                    ask(client, x, mine[:])
                os._exit(0)
            finally:
                os._exit(1)
        for _ in range(30):
            y += 2
            ask(client, y, x)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        ask(client, x, y)


# What a client may cost


def fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def until_fds(count: int) -> None:
    """Threads of the test server close their ends a little later."""
    deadline = time.monotonic() + 5
    while fds() > count:
        assert time.monotonic() < deadline, f"{fds()} descriptors, {count} before"
        time.sleep(0.005)


def mixed(server: Server, client: Client, calls: int) -> None:
    """All kinds of calls, with errors and lost connections in between."""
    x = own(client)
    y = ordinary((400, 64))
    for n in range(calls // 5):
        ask(client, y[n % 7 : n % 7 + 300])
        ask(client, x)
        ask(client, y[:3], x[n % 20 :])
        client.infer("affine", {"x": y[: n % 5 + 1, :16].copy()})
        ask(client, own(client, (300, 64 + n % 90)))
        if n % 50 == 0:
            client.infer("affine", {"x": np.ones((2000, 16), "f4")}, copy=n % 100 == 0)
            with pytest.raises(RequestError):
                ask(client, x, outputs=["nothing"])
        if n % 500 == 499:
            server.drop_connections()


def test_twenty_thousand_mixed_calls_need_no_more_memory_and_descriptors_than_the_first(server):
    server.faults.seen = deque(maxlen=1)
    with Client(server.path) as client:
        mixed(server, client, 5000)
        gc.collect()
        rss_before, fds_before = rss_bytes(), fds()
        mixed(server, client, 20_000)
        gc.collect()
        assert rss_bytes() - rss_before < 8 << 20  # a leak of 500 bytes a call is found
        until_fds(fds_before)


def test_a_replaced_connection_leaves_no_descriptor_and_no_memory_behind(server):
    gc.disable()  # nothing may wait for the collector: it may not come for a long time
    try:
        with Client(server.path) as client:
            x = own(client)
            for n in range(40):
                for _ in range(3):
                    ask(client, x, ordinary())
                if n == 2:
                    before = fds()
                server.drop_connections()
            ask(client, x)
            until_fds(before)
    finally:
        gc.enable()


# The real daemon


def test_a_worker_and_the_daemon_may_die_between_calls(make_classifier):
    with world.running({"workers": {"restart": world.QUICK_RESTART}}) as daemon:
        daemon.install(make_classifier(daemon.bundles))
        with daemon.client() as client:
            weights = client.infer("sums", {"input": np.eye(64, dtype=np.float32)})["output"]
            x, y = own(client), ordinary()

            def check() -> None:
                for array in (x, y, x[10:], x):
                    array += 1
                    outputs = client.infer("sums", {"input": array})
                    np.testing.assert_allclose(outputs["output"], array @ weights, rtol=1e-4)

            check()
            check()
            os.kill(daemon.worker("sums")["pid"], signal.SIGKILL)
            check()
            daemon.kill()
            daemon.start()
            check()
            check()


@pytest.fixture
def make_classifier() -> Callable[[Path], Path]:
    """Packs `sums`: input FP32 [-1,64], output FP32 [-1,1]: small where the input is large."""

    def make(directory: Path) -> Path:
        document = reference.tiny(64, 1)
        data = json.dumps(document).encode()
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data), "sums.reference.json")
        manifest = Manifest(
            schema=1,
            name="sums",
            version=1,
            inputs=(TensorSpec("input", "FP32", (-1, 64)),),
            outputs=(TensorSpec("output", "FP32", (-1, 1)),),
            variants=(Variant("fp32", "reference", blob, "fp32"),),
        )
        path = directory / "sums.bundle"
        archive.pack(archive.compose(manifest, {blob.sha256: from_bytes(data)}), path)
        return path

    return make
