"""What every server owes every client: run against whatever `endpoint` is.

The server must have `affine` (input x FP32 [-1,16], output y = 2x + 1). The same tests run over the
blocking and the asyncio client.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime.client import AsyncClient, Client, InferResult
from edge_runtime.errors import DeadlineError, EdgeError, NotFoundError, RequestError


class Blocking:
    """AsyncClient with the surface of Client, for these tests."""

    def __init__(self, path: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._run(self._make(path, options))

    async def _make(self, path: str, options: dict[str, Any]) -> AsyncClient:
        return AsyncClient(path, **options)

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "tensor":
            return self._client.tensor
        return lambda *args, **kw: self._run(getattr(self._client, name)(*args, **kw))

    def infer_many(self, *args: Any, **kw: Any) -> Iterator[Any]:
        async def collect() -> list[Any]:
            return [each async for each in self._client.infer_many(*args, **kw)]

        return iter(self._run(collect()))

    def close(self) -> None:
        self._client.close()
        self._loop.close()


@pytest.fixture(params=["blocking", "spinning", "asyncio"])
def client(request, endpoint):
    spin_us = 200 if request.param == "spinning" else 0
    made = Blocking(endpoint) if request.param == "asyncio" else Client(endpoint, spin_us=spin_us)
    yield made
    made.close()


@pytest.mark.parametrize(
    "name",
    [name for name in vars(Client) if not name.startswith("_") and hasattr(AsyncClient, name)],
)
def test_both_clients_take_the_same_arguments(name):
    def arguments(kind: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(kind, name)).parameters.values()
        return [(one.name, one.kind, one.default) for one in found]

    assert arguments(Client) == arguments(AsyncClient)


def test_the_clients_differ_only_in_what_retries_need():
    surface = {name for name in vars(Client) if not name.startswith("_")}
    assert surface - set(vars(AsyncClient)) == {"connect", "pause", "deadline_ns"}


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 16), dtype=np.float32)


# 1 row travels in the frame, 5,000 by shared memory, in both directions.
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_infer_gives_the_models_outputs(client, count):
    for seed in range(3):
        x = rows(count, seed)
        outputs = client.infer("affine", {"x": x})
        assert list(outputs) == ["y"]
        np.testing.assert_array_equal(outputs["y"], x * 2 + 1)


@pytest.mark.parametrize("count", [1, 5000])
def test_outputs_are_the_callers_own_and_stay_what_they_were(client, count):
    kept = [client.infer("affine", {"x": rows(count, seed)})["y"] for seed in range(5)]
    for seed, y in enumerate(kept):
        np.testing.assert_array_equal(y, rows(count, seed) * 2 + 1)
        y += 1  # writable


def test_a_tensor_in_shared_memory_gives_the_same(client):
    x = client.tensor((5000, 16), np.float32)
    for seed in range(3):
        x[...] = rows(5000, seed)
        np.testing.assert_array_equal(client.infer("affine", {"x": x})["y"], x * 2 + 1)
    part = x[100:4900]
    np.testing.assert_array_equal(client.infer("affine", {"x": part})["y"], part * 2 + 1)


def test_uncopied_outputs_are_not_overwritten_while_they_are_held(client):
    kept = [client.infer("affine", {"x": rows(5000, n)}, copy=False)["y"] for n in range(6)]
    for seed, y in enumerate(kept):
        np.testing.assert_array_equal(y, rows(5000, seed) * 2 + 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: x.tolist() and x[::-1][::-1],
    ],
    ids=["big endian", "fortran", "strided", "reversed"],
)
@pytest.mark.parametrize("count", [3, 5000])
def test_any_layout_of_an_array_is_sent_right(client, make, count):
    x = rows(count)
    for _ in range(2):
        np.testing.assert_array_equal(client.infer("affine", {"x": make(x)})["y"], x * 2 + 1)


def test_the_result_tells_version_and_server_time(client):
    result = client.infer_result("affine", {"x": rows(1)}, outputs=["y"])
    assert isinstance(result, InferResult)
    assert result.model_version.isdecimal() and 0 < result.server_ns < 10**9


def test_infer_many_answers_in_order(client):
    batches = [rows(1 + n % 3, n) for n in range(100)]
    answers = client.infer_many("affine", ({"x": batch} for batch in batches), window=8)
    for batch, outputs in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(outputs["y"], batch * 2 + 1)


def test_infer_many_takes_large_tensors(client):
    answers = client.infer_many("affine", ({"x": rows(4000, n)} for n in range(12)), window=4)
    for seed, outputs in enumerate(answers):
        np.testing.assert_array_equal(outputs["y"], rows(4000, seed) * 2 + 1)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(NotFoundError):
        client.infer("no-such-model", {"x": rows(1)})


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((1, 15), np.float32)},
        {"x": np.zeros((1, 16), np.int32)},
        {"z": np.zeros((1, 16), np.float32)},
        {},
    ],
    ids=["shape", "datatype", "name", "none"],
)
def test_a_wrong_input_is_an_invalid_request_and_the_client_goes_on(client, inputs):
    with pytest.raises(RequestError) as caught:
        client.infer("affine", inputs)
    assert caught.value.code == "invalid_request"
    np.testing.assert_array_equal(client.infer("affine", {"x": np.ones((1, 16), "f4")})["y"], 3)


def test_an_unknown_output_is_an_invalid_request(client):
    with pytest.raises(RequestError):
        client.infer("affine", {"x": rows(1)}, outputs=["nothing"])


def test_a_dtype_without_a_name_is_refused_before_sending(client):
    with pytest.raises(RequestError, match="complex"):
        client.infer("affine", {"x": np.zeros((1, 16), complex)})


def test_a_deadline_in_the_past_is_a_deadline(client):
    with pytest.raises(DeadlineError):
        client.infer("affine", {"x": rows(1)}, timeout_s=0)
    assert client.infer("affine", {"x": rows(1)})["y"].shape == (1, 16)


def test_metadata_ready_live_and_server_metadata(client):
    metadata = client.metadata("affine")
    assert metadata["name"] == "affine"
    assert metadata["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 16]}
    assert client.ready("affine") is True
    assert client.live() is True
    assert client.server_metadata()["name"] == "edge-runtime"


def test_threads_may_share_a_client(endpoint):
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(30):
                x = rows(1 + (n % 2) * 5000, seed * 100 + n)
                np.testing.assert_array_equal(client.infer("affine", {"x": x})["y"], x * 2 + 1)
        except (AssertionError, EdgeError) as e:
            failures.append(e)

    with Client(endpoint, timeout_s=20) as client:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_concurrent_calls_of_the_async_client_share_a_connection(endpoint):
    async def main() -> None:
        async with AsyncClient(endpoint) as client:
            batches = [rows(1 + (n % 4 == 0) * 5000, n) for n in range(60)]
            answers = await asyncio.gather(*[client.infer("affine", {"x": b}) for b in batches])
            for batch, outputs in zip(batches, answers, strict=True):
                np.testing.assert_array_equal(outputs["y"], batch * 2 + 1)

    asyncio.run(main())
