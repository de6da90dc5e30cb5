"""What the clients do when the server, the network of processes or time is not kind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.client import AsyncClient, Client, RetryPolicy
from edge_runtime.client.retry import RETRYABLE
from edge_runtime.errors import (
    ConnectionClosedError,
    DeadlineError,
    MalformedError,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnavailableError,
)
from tests.client.server import Server

X = np.arange(16, dtype=np.float32).reshape(1, 16)
LARGE = np.random.default_rng(1).random((5000, 16), dtype=np.float32)
NO_RETRY = RetryPolicy(enabled=False)


def check(client: Client, x: np.ndarray = X) -> None:
    np.testing.assert_array_equal(client.infer("affine", {"x": x})["y"], x * 2 + 1)


# What must be true of shared memory, seen from the server's side


def test_large_tensors_travel_by_region_in_both_directions_from_the_second_call_on(server):
    with Client(server.path) as client:
        for _ in range(3):
            check(client, LARGE)
    first, second, third = [seen["request"] for seen in server.faults.seen]
    assert [seen["body_size"] for seen in server.faults.seen] == [0, 0, 0]
    assert first.outputs == ()
    assert second.outputs[0].parameters.shared_memory_byte_size == LARGE.nbytes
    assert second == third, "a stable header is what a worker can recognise"


def test_an_own_tensor_is_sent_where_it_lies(server):
    with Client(server.path) as client:
        x = client.tensor(LARGE.shape, np.float32)
        x[...] = LARGE
        check(client, x)
        check(client, x[10:])
    first, second = [seen["request"].inputs[0].parameters for seen in server.faults.seen]
    assert first.shared_memory_region == second.shared_memory_region
    assert second.shared_memory_offset - first.shared_memory_offset == 10 * 16 * 4


def test_small_tensors_travel_in_the_frame_with_their_priority(server):
    with Client(server.path) as client:
        client.infer("affine", {"x": X}, priority=9)
    assert server.faults.seen[0]["body_size"] == 64
    assert server.faults.seen[0]["priority"] == 9


@pytest.mark.parametrize("x", [X, LARGE], ids=["small", "large"])
def test_a_routing_key_travels_with_its_own_requests_only(server, x):
    order = ["", "a", "b", "a", "", "b"]
    with Client(server.path) as client:
        for key in order:
            outputs = client.infer("affine", {"x": x}, routing_key=key)
            np.testing.assert_array_equal(outputs["y"], x * 2 + 1)
        list(client.infer_many("affine", [{"x": x}] * 3, routing_key="many"))
    assert keys_seen(server) == [*order, *["many"] * 3]


def test_the_async_client_sends_routing_keys_too(server):
    async def work() -> None:
        async with AsyncClient(server.path) as client:
            for key in ("a", "", "b"):
                await client.infer("affine", {"x": LARGE}, routing_key=key)
            async for _ in client.infer_many("affine", [{"x": X}] * 2, routing_key="many"):
                pass

    asyncio.run(work())
    assert keys_seen(server) == ["a", "", "b", "many", "many"]


def keys_seen(server: Server) -> list[str]:
    return [seen["request"].parameters.routing_key for seen in server.faults.seen]


def test_many_routing_keys_share_what_was_learnt_of_the_outputs(server):
    with Client(server.path) as client:
        for number in range(100):
            client.infer("affine", {"x": LARGE}, routing_key=f"camera-{number}")
        assert len(client._channels["affine"].connection._rooms) == 1
    # From the second request on, whoever it is for, the answer comes by shared memory.
    assert all(seen["request"].outputs for seen in server.faults.seen[1:])


def test_a_routing_key_that_is_too_long_is_refused(server):
    with Client(server.path) as client:
        with pytest.raises(RequestError, match="256"):
            client.infer("affine", {"x": X}, routing_key="k" * 257)
        check(client)


def test_a_server_that_refuses_regions_gets_everything_in_frames(tmp_path):
    server = Server(tmp_path / "s", body_size_max=1 << 22)
    server.faults.refuse_regions = True
    try:
        with Client(server.path) as client:
            for _ in range(2):
                check(client, LARGE)
        asyncio.run(async_check(server.path, LARGE))
        assert {seen["body_size"] for seen in server.faults.seen} == {LARGE.nbytes}
    finally:
        server.close()


async def async_check(path: str, x: np.ndarray) -> None:
    async with AsyncClient(path) as client:
        outputs = await client.infer("affine", {"x": x})
        np.testing.assert_array_equal(outputs["y"], x * 2 + 1)


def test_an_output_that_outgrows_its_place_travels_in_the_frame(server):
    with Client(server.path) as client:
        check(client, LARGE)
        connection = client._channels["affine"].connection
        ((key, rooms),) = connection._rooms.items()
        connection._rooms[key] = {name: size // 2 for name, size in rooms.items()}
        check(client, LARGE)
        check(client, LARGE)


def test_bytes_bools_and_empty_tensors_come_back_as_they_were(server):
    inputs = {
        "text": np.array([b"", b"\x00\xff", "żółw".encode()] * 9000, object),
        "flags": np.array([[True, False]]),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.array(3.5),
        "half": np.ones((2, 2), np.float16),
    }
    with Client(server.path) as client:
        for _ in range(2):
            outputs = client.infer("identity", inputs)
            for name, array in inputs.items():
                np.testing.assert_array_equal(outputs[name], array)
                assert outputs[name].dtype == array.dtype


def test_text_lists_and_numbers_become_arrays(server):
    with Client(server.path) as client:
        outputs = client.infer("identity", {"a": ["x", "yz"], "b": [[1, 2]], "c": 1.5})
    assert outputs["a"].tolist() == [b"x", b"yz"]
    assert outputs["b"].tolist() == [[1, 2]] and outputs["c"] == 1.5


def test_shared_memory_is_used_again_and_no_descriptor_is_left(server):
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    client = Client(server.path)
    for _ in range(200):
        check(client, LARGE)
    connection = client._channels["affine"].connection
    assert len(connection._numbers) == 1 and connection._scratch is not None
    client.close()
    del client, connection
    gc.collect()
    deadline = time.monotonic() + 5
    while sum(1 for _ in Path("/proc/self/fd").iterdir()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_room_for_shared_memory_everything_travels_in_frames(tmp_path):
    server = Server(tmp_path / "s", body_size_max=1 << 22)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with Client(server.path) as client:
            x = client.tensor(LARGE.shape, np.float32)
            x[...] = LARGE
            check(client, x)
        asyncio.run(async_check(server.path, LARGE))
        assert {seen["body_size"] for seen in server.faults.seen} == {LARGE.nbytes}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        server.close()


# Retries


@pytest.mark.parametrize(
    "fault", ["overloaded", "unavailable", "close_before_answer", "close_inside_answer"]
)
@pytest.mark.parametrize("x", [X, LARGE], ids=["small", "large"])
def test_a_passing_fault_is_retried_within_the_deadline(server, fault, x):
    for times in (1, 3):
        with Client(server.path) as client:
            check(client, x)
            setattr(server.faults, fault, times)
            check(client, x)
        setattr(server.faults, fault, times)
        asyncio.run(async_check(server.path, x))


@pytest.mark.parametrize(
    "fault", ["overloaded", "unavailable", "close_before_answer", "close_inside_answer"]
)
def test_infer_many_loses_nothing_to_a_passing_fault(server, fault):
    batches = [np.full((1, 16), n, np.float32) for n in range(40)]
    with Client(server.path) as client:
        for n, outputs in enumerate(client.infer_many("affine", ({"x": b} for b in batches))):
            assert outputs["y"][0, 0] == 2 * n + 1
            if n % 10 == 3:
                setattr(server.faults, fault, 2)
    assert n == 39


def test_without_retries_the_failure_comes_as_it_is(server):
    with Client(server.path, retry=NO_RETRY) as client:
        server.faults.overloaded = 1
        with pytest.raises(OverloadedError):
            client.infer("affine", {"x": X})
        server.faults.close_before_answer = 1
        with pytest.raises(ConnectionClosedError):
            client.infer("affine", {"x": X})
        check(client)


def test_after_the_deadline_the_error_names_the_last_cause(server):
    server.faults.overloaded = 10**6
    with Client(server.path) as client:
        with pytest.raises(DeadlineError, match="queue full") as caught:
            client.infer("affine", {"x": X}, timeout_s=0.1)
    assert isinstance(caught.value.__cause__, OverloadedError)


def test_nobody_listening_is_a_deadline_that_says_so(tmp_path):
    with Client(tmp_path / "none.sock", timeout_s=0.05) as client:
        with pytest.raises(DeadlineError, match="nobody listens"):
            client.infer("affine", {"x": X})
        assert client.live() is False


def test_a_daemon_that_starts_late_is_found(tmp_path):
    servers = []
    timer = threading.Timer(0.05, lambda: servers.append(Server(tmp_path / "late.sock")))
    timer.start()
    with Client(tmp_path / "late.sock") as client:
        check(client)
    timer.join()
    servers[0].close()


def test_a_restarted_daemon_is_found_again(tmp_path):
    with Client(tmp_path / "s") as client:
        x = client.tensor(LARGE.shape, np.float32)
        x[...] = LARGE
        for _ in range(3):
            server = Server(tmp_path / "s")
            check(client)
            check(client, x)
            server.close()


def test_retry_after_is_honoured_and_pauses_grow_within_their_bounds():
    policy = RetryPolicy(delay_s_first=0.01, delay_s_max=0.5, jitter=0.5)
    rng = random.Random(7)
    for failures in range(100):
        delay_s = policy.delay_s(UnavailableError("x"), failures, 100, rng)
        full = min(0.5, 0.01 * 2**failures)
        assert full / 2 <= delay_s <= full
    assert policy.delay_s(OverloadedError("x", retry_after_s=3.0), 0, 100, rng) == 3.0
    assert policy.delay_s(ConnectionClosedError("x"), 0, 100, rng) == 0
    assert policy.delay_s(ConnectionClosedError("x"), 1, 100, rng) > 0
    with pytest.raises(DeadlineError):
        policy.delay_s(OverloadedError("x", retry_after_s=3.0), 0, 2.9, rng)


def test_the_client_sleeps_as_long_as_the_server_asks(server):
    slept = []
    server.faults.overloaded, server.faults.retry_after_s = 2, 0.75
    with Client(server.path, sleep=slept.append) as client:
        check(client)
    assert slept == [0.75, 0.75]


def test_an_invalid_request_is_not_retried(server):
    assert not issubclass(RequestError, RETRYABLE)
    with Client(server.path, sleep=lambda s: pytest.fail("slept")) as client:
        with pytest.raises(RequestError):
            client.infer("affine", {"x": np.zeros((1, 3), np.float32)})


# Time


def test_a_timeout_closes_the_connection_and_the_next_call_gets_its_own_answer(server):
    with Client(server.path) as client:
        check(client)
        server.faults.delays, server.faults.delay_s = 1, 0.3
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="no answer in time"):
            client.infer("affine", {"x": X * 5}, timeout_s=0.05)
        assert time.monotonic() - started < 0.25
        check(client)
        assert server.connections_accepted == 2


def test_in_asyncio_a_timeout_costs_only_its_own_request(server):
    async def main() -> None:
        async with AsyncClient(server.path) as client:
            np.testing.assert_array_equal((await client.infer("affine", {"x": X}))["y"], X * 2 + 1)
            server.faults.delays, server.faults.delay_s = 1, 0.15
            late, ok = await asyncio.gather(
                client.infer("affine", {"x": LARGE}, timeout_s=0.05),
                client.infer("affine", {"x": LARGE + 1}, timeout_s=5),
                return_exceptions=True,
            )
            assert isinstance(late, DeadlineError)
            np.testing.assert_array_equal(ok["y"], (LARGE + 1) * 2 + 1)

    asyncio.run(main())
    assert server.connections_accepted == 1


def test_a_cancelled_call_leaves_the_connection_to_the_others(server):
    async def main() -> None:
        async with AsyncClient(server.path) as client:
            server.faults.delays, server.faults.delay_s = 1, 0.1
            first = asyncio.create_task(client.infer("affine", {"x": X * 9}))
            second = asyncio.create_task(client.infer("affine", {"x": X}))
            await asyncio.sleep(0)  # both are sent
            first.cancel()
            np.testing.assert_array_equal((await second)["y"], X * 2 + 1)
            assert first.cancelled()

    asyncio.run(main())
    assert server.connections_accepted == 1


def test_answers_in_another_order_find_their_requests(server):
    server.faults.shuffle = 8
    batches = [np.full((1, 16), n, np.float32) for n in range(32)]
    with Client(server.path) as client:
        answers = client.infer_many("affine", ({"x": b} for b in batches), window=8)
        # The iterator tops its window up one by one, so the server's last group of 8 comes whole.
        for n in range(8):
            assert next(answers)["y"][0, 0] == 2 * n + 1
        answers.close()

    async def main() -> None:
        async with AsyncClient(server.path) as client:
            outputs = await asyncio.gather(*[client.infer("affine", {"x": b}) for b in batches])
            assert [y["y"][0, 0] for y in outputs] == [2 * n + 1 for n in range(32)]

    asyncio.run(main())


def test_a_pipeline_larger_than_all_buffers_does_not_lock_up(tmp_path):
    server = Server(tmp_path / "s", body_size_max=1 << 22)
    try:
        with Client(server.path, shared_memory_min_bytes=1 << 30, timeout_s=20) as client:
            big = np.zeros((20_000, 16), np.float32)  # 1.28 MB each way, in frames
            answers = client.infer_many("affine", ({"x": big + n} for n in range(24)), window=12)
            for n, outputs in enumerate(answers):
                assert outputs["y"][-1, -1] == 2 * n + 1
            assert n == 23
    finally:
        server.close()


# Strange servers


def test_answers_to_requests_nobody_sent_are_dropped(server):
    with Client(server.path) as client:
        for _ in range(3):
            server.faults.stray_frames = 1
            check(client)
            check(client, LARGE)
    assert server.connections_accepted == 1
    server.faults.stray_frames = 2
    asyncio.run(async_check(server.path, X))


def test_answers_in_pieces_are_put_together(server):
    server.faults.trickle = True
    with Client(server.path) as client:
        check(client)
        check(client)
    asyncio.run(async_check(server.path, X))


@pytest.mark.parametrize("fault", ["nonsense_header", "nonsense_bytes"])
def test_a_server_that_talks_nonsense_is_malformed_and_the_connection_is_given_up(server, fault):
    with Client(server.path) as client:
        setattr(server.faults, fault, 1)
        with pytest.raises(MalformedError):
            client.infer("affine", {"x": X})
        check(client)
    setattr(server.faults, fault, 1)
    with pytest.raises(MalformedError):
        asyncio.run(async_check(server.path, X))


def test_a_body_over_the_servers_cap_is_too_large_and_the_connection_stays(server):
    with Client(server.path, shared_memory_min_bytes=1 << 30) as client:
        for _ in range(2):
            with pytest.raises(TooLargeError):
                client.infer("affine", {"x": np.zeros((50_000, 16), np.float32)})
            check(client)
    assert server.connections_accepted == 1


def test_metadata_larger_than_a_header_arrives(server):
    with Client(server.path) as client:
        assert len(client.metadata("affine")["parameters"]["labels"]) == 5000


# Processes and threads


def test_after_a_fork_both_processes_get_their_own_answers(server):
    with Client(server.path) as client:
        x = client.tensor(LARGE.shape, np.float32)
        x[...] = LARGE
        check(client, x)
        pid = os.fork()
        if pid == 0:
            try:
                for n in range(50):
                    check(client, X + n)
                    check(client, x)
                os._exit(0)
            finally:
                os._exit(1)
        for n in range(50):
            check(client, X * n)
            check(client, x)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_an_interrupted_call_does_not_poison_the_next(server):
    class Interrupt(Exception):
        pass

    with Client(server.path) as client:
        check(client)
        connection = client._channels["affine"].connection
        real = connection._socket

        class Interrupted:
            def send(self, data):
                real.send(data)
                raise Interrupt

            def close(self):
                real.close()

        connection._socket = Interrupted()
        with pytest.raises(Interrupt):
            client.infer("affine", {"x": X * 7})
        check(client)


def test_a_connection_broken_while_idle_costs_nothing(server):
    with Client(server.path, sleep=lambda s: pytest.fail("slept")) as client:
        for _ in range(3):
            check(client)
            server.drop_connections()


def test_importing_the_control_client_costs_no_numpy():
    import subprocess
    import sys

    code = (
        "import sys; import edge_runtime.client; "
        "from edge_runtime.client.control import ControlClient; "
        "sys.exit('numpy' in sys.modules or 'asyncio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
