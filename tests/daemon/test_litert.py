"""LiteRT in sandboxed workers of a real daemon."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from edge_runtime import backends
from edge_runtime.bundle import archive, create
from edge_runtime.bundle.manifest import Variant
from edge_runtime.errors import BackendError, EdgeError, GoldenError
from tests import tflite_writer as writer
from tests.backends.contract import compiled_delegate, installed_tflite, require
from tests.daemon.world import Daemon, running, until

require(installed_tflite())

# What would be wrong for a model that keeps a state.
EAGER = {"cache_bytes_max": 1 << 20, "batch_window_ms": 1.0}


def load(variant: Variant, path: Path) -> create.Run:
    return backends.backend(variant.backend).load(path, variant.options).run


def packed(folder: Path, name: str, data: bytes, load: create.Load = load, **options: Any) -> Path:
    """A bundle; `load` records its goldens."""
    model = folder / f"{name}.tflite"
    model.write_bytes(data)
    chosen = create.Options(name=name, backend_options={"litert": options})
    create.create([model], chosen, folder / f"{name}.bundle", load)
    return folder / f"{name}.bundle"


def total(daemon: Daemon, name: str, value: float) -> float:
    with daemon.client() as client:
        return float(client.infer(name, {"x": np.full(1, value, np.float32)})["total"][0])


def restart(daemon: Daemon, name: str) -> None:
    """Kill the worker and wait for the next."""
    old = daemon.worker(name)["pid"]
    os.kill(old, signal.SIGKILL)
    until(lambda: daemon.worker(name).get("pid", old) != old and daemon.ready(name))


def test_batches_of_any_size_are_answered_from_the_sandbox(daemon: Daemon):
    weights = np.random.RandomState(3).standard_normal((16, 4)).astype(np.float32)
    daemon.install(packed(daemon.bundles, "lin", writer.linear(weights)))
    with daemon.client() as client:
        for rows in (1, 7, 2, 64):
            given = np.random.RandomState(rows).standard_normal((rows, 16)).astype(np.float32)
            got = client.infer("lin", {"input": given})["output"]
            np.testing.assert_allclose(got, given @ weights, rtol=1e-4, atol=1e-5)
    worker = daemon.worker("lin")
    assert (worker["backend"], daemon.model("lin")["device"]) == ("litert", "CPU")
    restart(daemon, "lin")
    assert "XNNPACK" not in "".join(
        line for line in daemon.log().splitlines() if "INFO:" in line
    ), "the library's chatter is in the journal"


def test_a_kept_state_is_one_for_all_clients_and_ends_with_its_worker(daemon: Daemon):
    daemon.install(packed(daemon.bundles, "sum", writer.counter(), stateful="keep"))
    assert [total(daemon, "sum", 5.0) for _ in range(3)] == [5, 10, 15]
    restart(daemon, "sum")
    assert total(daemon, "sum", 1.0) == 1


def test_a_kept_state_has_no_cached_answers_whatever_is_configured():
    with running({"models": {"sum": EAGER, "plain": EAGER}}) as daemon:
        daemon.install(packed(daemon.bundles, "sum", writer.counter(), stateful="keep"))
        daemon.install(packed(daemon.bundles, "plain", writer.counter()))
        assert [total(daemon, "sum", 5.0) for _ in range(3)] == [5, 10, 15]
        assert [total(daemon, "plain", 5.0) for _ in range(3)] == [5, 5, 5]


def test_a_library_that_computes_something_else_without_an_error_is_not_served(daemon: Daemon):
    """tflite-runtime 2.14 answers 0 to dynamic-range int8 with a scale for each channel."""
    weights = np.random.RandomState(3).standard_normal((16, 4)).astype(np.float32)
    data = writer.linear_dynamic_int8(weights)

    def truth(variant: Variant, path: Path) -> create.Run:
        return lambda feed: {"output": feed["input"] @ weights}

    bundle = packed(daemon.bundles, "dynamic", data, truth)
    if installed_tflite() == "tflite_runtime":
        with pytest.raises(GoldenError, match="x its tolerance away from golden 0"):
            daemon.install(bundle)
        assert "golden" in str(daemon.control("why", name="dynamic"))
        return
    daemon.install(bundle)
    given = np.random.RandomState(1).random_sample((2, 16)).astype(np.float32)
    with daemon.client() as client:
        got = client.infer("dynamic", {"input": given})["output"]
    np.testing.assert_allclose(got, given @ weights, atol=0.1)


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    """A daemon on a board with an "NPU" whose node is /dev/full, and the delegate for it."""
    folder = tmp_path_factory.mktemp("board")
    library = str(compiled_delegate(folder))
    profile = {
        "name": "test-board",
        "title": "A board with an NPU",
        "backends": [{"backend": "litert", "device_class": "npu", "accelerator": "npu"}],
        "accelerators": {"npu": {"title": "NPU", "device_class": "npu", "nodes": ["/dev/full"]}},
    }
    (folder / "test-board.yaml").write_text(json.dumps(profile))
    # What is on Python's path is readable in the sandbox; a real delegate is in /usr/lib.
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    config = {"profile": str(folder / "test-board.yaml")}
    with running(config, environment={"PYTHONPATH": path}) as daemon:
        yield daemon, library


def on_npu(daemon: Daemon, name: str, data: bytes, library: str, **changes: Any) -> Path:
    """A bundle whose variant is made for the NPU; goldens as recorded without the delegate."""
    delegate = {"library": library, "device": "NPU", "options": {"device": "/dev/full"}}
    plain = packed(daemon.bundles, name, data)
    archive.extract(archive.open_bundle(plain), daemon.bundles / f"{name}-on-npu")
    path = daemon.bundles / f"{name}-on-npu" / "model.yaml"
    document = yaml.safe_load(path.read_text())
    document["variants"][0] |= {"device_class": "npu", "options": {"delegate": delegate}} | changes
    path.write_text(json.dumps(document))
    out = daemon.bundles / f"{name}-on-npu.bundle"
    archive.pack(archive.open_bundle(path.parent), out)
    return out


class TestAccelerator:
    def test_its_model_may_open_its_node_and_says_where_it_runs(
        self, accelerated: tuple[Daemon, str]
    ):
        daemon, library = accelerated
        daemon.install(on_npu(daemon, "pair", writer.pair(), library))
        x = np.arange(3, dtype=np.float32).reshape(1, 3)
        with daemon.client() as client:
            assert (client.infer("pair", {"a": x, "b": x})["sum"] == 2 * x).all()
        assert daemon.model("pair")["device"] == "NPU"
        assert "may use /dev/full" in str(daemon.control("ps"))

    def test_a_model_for_the_cpu_may_not(self, accelerated: tuple[Daemon, str]):
        daemon, library = accelerated
        with pytest.raises(BackendError, match="the device cannot be opened"):
            daemon.install(on_npu(daemon, "c", writer.pair(), library, device_class="cpu"))

    def test_a_delegate_that_takes_nothing_is_refused(self, accelerated: tuple[Daemon, str]):
        daemon, library = accelerated
        weights = np.ones((16, 4), np.float32)
        with pytest.raises(EdgeError, match="all of it runs on the CPU"):
            daemon.install(on_npu(daemon, "lin", writer.linear(weights), library))


def test_metadata_says_what_quantized_numbers_mean(daemon: Daemon):
    graph = writer.Graph(
        [
            writer.Tensor("a", [1, 4], writer.INT8, scales=[0.5], zero_point=-3),
            writer.Tensor("b", [1, 4], writer.INT8, scales=[0.25], zero_point=7),
        ],
        [writer.Operator(writer.QUANTIZE, [0], [1])],
        [0],
        [1],
    )
    daemon.install(packed(daemon.bundles, "q", writer.model(graph)))
    with daemon.client() as client:
        parameters = client.metadata("q")["parameters"]
        assert parameters["quantization"] == {
            "a": {"scale": 0.5, "zero_point": -3},
            "b": {"scale": 0.25, "zero_point": 7},
        }
        got = client.infer("q", {"a": np.array([[-3, -1, 1, 3]], np.int8)})["b"]
        assert got.tolist() == [[7, 11, 15, 19]]  # 0, 1, 2, 3
