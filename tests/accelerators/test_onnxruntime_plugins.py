"""Real accelerator code without the hardware: execution providers that come as plug-ins.

Their packages are big (400 MB): `make test-accelerators` installs them into an environment of its
own. The Qualcomm package emulates the Hexagon processor (HTP) on x86_64.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.backends import onnxruntime as door
from edge_runtime.backends import placement
from edge_runtime.bundle.manifest import Variant
from edge_runtime.errors import BackendError, PlacementError
from tests.backends import contract
from tests.daemon.world import NO_BLOB, onnx_bundle, running

HERE = Path(__file__).parent
INT8 = HERE.parents[1] / "examples/fashion_mnist/int8.onnx"
QNN = {"name": "QNNExecutionProvider", "options": {"backend_path": "libQnnHtp.so"}}
OPENVINO = "OpenVINOExecutionProvider"


@pytest.fixture(autouse=True)
def plain_onnxruntime() -> None:
    contract.require("onnxruntime")
    pytest.importorskip("onnx", reason="onnx is not installed")


def load(artifact: Path, **options: Any) -> door.OnnxModel:
    return door.OnnxRuntime().load(artifact, options)


@pytest.fixture
def qnn() -> None:
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        pytest.skip("onnxruntime-qnn is not installed: make test-accelerators")


@pytest.mark.usefixtures("qnn")
class TestHtpEmulator:
    def test_a_qdq_model_runs_on_it_with_the_cpu_forbidden(self):
        model = load(INT8, providers=[QNN], cpu_fallback=False, dimensions={"N": 1})
        (place,) = model.placement
        assert place.device == "NPU" and place.nodes > 10
        rng = np.random.RandomState(0)
        (spec,) = model.inputs
        on_cpu = load(INT8, dimensions={"N": 1})
        (output,) = (each.name for each in model.outputs)
        for _ in range(5):
            x = rng.random_sample(spec.shape).astype(np.float32)
            got, want = model.run({spec.name: x})[output], on_cpu.run({spec.name: x})[output]
            # The emulator rounds in places where the CPU does not: within a step of the output.
            np.testing.assert_allclose(got, want, atol=0.3)
            assert got.argmax() == want.argmax()

    def test_without_fixed_dimensions_nothing_runs_there_and_it_is_noticed(self):
        options = {"providers": [QNN]}
        fallback = placement.fallen_back("npu", options, load(INT8, **options).placement)
        assert fallback is not None and fallback.whole

    def test_with_the_cpu_forbidden_that_is_an_error_with_its_remedy(self):
        with pytest.raises(BackendError) as caught:
            load(INT8, providers=[QNN], cpu_fallback=False)
        assert "CPU" in caught.value.message and "dimensions" in caught.value.remedy

    def test_a_worker_in_its_sandbox_uses_it_and_says_so(self):
        variant = Variant("htp", "onnxruntime", NO_BLOB, "fp32", "npu", {"providers": [QNN]})
        with running() as daemon:
            daemon.install(onnx_bundle(daemon.bundles, "htp", variants=[variant]))
            assert daemon.model("htp")["device"] == "NPU"
            assert daemon.infer("htp") == pytest.approx(6.0, rel=1e-3)

    def test_a_variant_made_for_it_that_it_cannot_take_is_refused(self):
        variant = Variant("htp", "onnxruntime", NO_BLOB, "fp32", "npu", {"providers": [QNN]})
        with running() as daemon:
            path = onnx_bundle(daemon.bundles, "free", rows="N", variants=[variant])
            with pytest.raises(PlacementError):
                daemon.install(path)


def test_a_plugin_without_a_device_says_so(tmp_path: Path):
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        pytest.skip("onnxruntime-ep-openvino is not installed: make test-accelerators")
    artifact = contract.onnx_pair(tmp_path)
    try:
        model = load(artifact, providers=[OPENVINO], cpu_fallback=False)
    except BackendError as e:  # it drives Intel's devices only
        assert "finds no device" in str(e) and e.remedy
    else:
        assert [place.nodes for place in model.placement] == [2]
