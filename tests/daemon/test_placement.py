"""A model that does not run where it was asked to, in a real daemon: refused, or told."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.bundle.manifest import Variant
from edge_runtime.cli.status import models_text, why_text
from edge_runtime.errors import PlacementError
from tests.backends.contract import openvino
from tests.daemon.world import NO_BLOB, onnx_bundle, running

pytest.importorskip("onnx", reason="onnx is not installed")

if "NPU" in openvino().Core().available_devices:
    pytest.skip("this machine has an NPU", allow_module_level=True)


def variant(backend: str = "openvino", device_class: str = "npu", **options: Any) -> Variant:
    return Variant("first", backend, NO_BLOB, "fp32", device_class, options)


ON_NPU_OR_CPU = {"device": "AUTO:NPU,CPU"}


def test_a_variant_made_for_an_accelerator_is_refused_and_the_next_one_serves(daemon):
    second = Variant("second", "onnxruntime", NO_BLOB, "fp32")
    path = onnx_bundle(daemon.bundles, "refused", variants=[variant(**ON_NPU_OR_CPU), second])
    daemon.install(path)
    assert daemon.worker("refused")["variant"] == "second"
    (refused,) = daemon.events("variant_refused", model="refused")
    assert refused["fields"]["code"] == "wrong_device"
    assert "refused by NPU" in refused["message"]
    assert daemon.control("status")["models"] and daemon.infer("refused") == 6.0


def test_a_bundle_with_nothing_else_does_not_activate_and_says_what_to_do(daemon):
    with pytest.raises(PlacementError) as caught:
        daemon.install(onnx_bundle(daemon.bundles, "only", variants=[variant(**ON_NPU_OR_CPU)]))
    assert "all of it runs on the CPU" in str(caught.value) and "doctor" in caught.value.remedy


def test_an_alarm_is_an_event_a_metric_and_in_models_metadata_and_why(daemon):
    asks = variant(device_class="cpu", **ON_NPU_OR_CPU)
    daemon.install(onnx_bundle(daemon.bundles, "alarm", variants=[asks]))
    (event,) = daemon.events("cpu_fallback", model="alarm")
    assert event["level"] == "warning" and event["fields"]["device"] == "CPU"
    model = daemon.model("alarm")
    assert model["device"] == "CPU"
    assert "NPU was asked for" in model["active"]["cpu_fallback"]
    assert "NPU was asked for" in models_text(daemon.control("models"), None)
    why = why_text(daemon.control("why", name="alarm"), 0.0)
    assert "runs on CPU (CPU, f32" in why and "NPU was asked for" in why
    assert 'edge_worker_cpu_fallback{model="alarm"' in daemon.control("metrics")["text"]
    with daemon.client() as client:
        parameters = client.metadata("alarm")["parameters"]
    assert parameters["device"] == "CPU" and "NPU was asked for" in parameters["cpu_fallback"]


def test_a_model_that_asks_for_nothing_is_no_alarm(daemon):
    daemon.install(onnx_bundle(daemon.bundles, "plain", variants=[variant(device_class="cpu")]))
    assert not daemon.events("cpu_fallback", model="plain")
    assert daemon.model("plain")["active"]["cpu_fallback"] == ""


def test_the_policy_is_the_owners():
    models = {"strict": {"cpu_fallback": "refuse"}, "easy": {"cpu_fallback": "allow"}}
    with running({"models": models}) as daemon:
        asks = variant(device_class="cpu", **ON_NPU_OR_CPU)
        with pytest.raises(PlacementError):
            daemon.install(onnx_bundle(daemon.bundles, "strict", variants=[asks]))
        path = onnx_bundle(daemon.bundles, "easy", variants=[variant(**ON_NPU_OR_CPU)])
        daemon.install(path)
        assert daemon.infer("easy") == 6.0
        assert not daemon.events("cpu_fallback", model="easy")
