"""What counts as falling back to the CPU, and what follows: no library is needed."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.backends import placement
from edge_runtime.backends.placement import Fallback, action, fallen_back
from edge_runtime.backends.protocol import Placement
from edge_runtime.backends.providers import provider_device

CPU = Placement("CPU", "CPU, f32", 10)
NPU = Placement("NPU", "NPU, f16", 30)
QNN = {"providers": ["QNNExecutionProvider"]}
NOTHING: dict[str, Any] = {}

FINE = {
    "a CPU variant on the CPU": ("cpu", NOTHING, [CPU]),
    "a variant for any device on the CPU": ("any", NOTHING, [CPU]),
    "an NPU variant on the NPU": ("npu", {"device": "NPU"}, [NPU]),
    "AUTO, which leaves it to the machine": ("cpu", {"device": "AUTO"}, [CPU]),
    "HETERO, which gives a part to the CPU": ("npu", {"device": "HETERO:NPU,CPU"}, [NPU, CPU]),
    "a provider of the CPU": ("cpu", {"providers": ["XnnpackExecutionProvider"]}, [CPU]),
    "providers of which the last is the CPU": (
        "npu",
        {"providers": ["QNNExecutionProvider", "CPUExecutionProvider"]},
        [NPU, CPU],
    ),
    "OpenVINO's provider told to use the CPU": (
        "cpu",
        {"providers": [{"name": "OpenVINOExecutionProvider", "options": {"device_type": "CPU"}}]},
        [CPU],
    ),
    "a delegate for the CPU": ("cpu", {"delegate": {"library": "x.so", "device": "CPU"}}, [CPU]),
    "no options that ask": ("cpu", {"threads": 4, "device": ""}, [CPU]),
}


@pytest.mark.parametrize("case", FINE)
def test_it_is_no_fallback(case: str):
    assert fallen_back(*FINE[case]) is None


WHOLE = {
    "a variant made for an NPU": ("npu", NOTHING, [CPU], "NPU was asked for"),
    "AUTO with a list": ("cpu", {"device": "AUTO:NPU,CPU"}, [CPU], "NPU"),
    "HETERO of which all is on the CPU": ("cpu", {"device": "HETERO:GPU.1,CPU"}, [CPU], "GPU.1"),
    "a provider": ("cpu", QNN, [CPU], "QNNExecutionProvider"),
    "a provider with options": (
        "cpu",
        {"providers": [{"name": "CUDAExecutionProvider"}]},
        [CPU],
        "",
    ),
    "a delegate": ("tpu", {"delegate": {"library": "libedgetpu.so.1"}}, [CPU, CPU], "libedgetpu"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_nothing_runs_where_it_was_asked_to(case: str):
    *given, text = WHOLE[case]
    found = fallen_back(*given)
    assert found is not None and found.whole
    assert text in found.reason and "all of it runs on the CPU" in found.reason


def test_a_part_on_the_cpu_is_counted():
    found = fallen_back("npu", QNN, [NPU, CPU])
    assert found == Fallback(
        "QNNExecutionProvider was asked for, 10 of 40 nodes run on the CPU", False
    )


def test_what_is_not_known_is_said_to_be_not_known():
    both = [Placement("QNN", "registered"), Placement("CPU", "registered")]
    found = fallen_back("npu", QNN, both)
    assert found is not None and not found.whole and "not known" in found.reason


def test_the_reason_of_the_backend_is_passed_on():
    place = Placement("CPU", "CPU, f32; refused by NPU: no driver", 3)
    found = fallen_back("cpu", {"device": "AUTO:NPU,CPU"}, [place])
    assert found is not None and "refused by NPU: no driver" in found.reason


PART, ALL = Fallback("part", False), Fallback("all", True)


@pytest.mark.parametrize(
    ("policy", "device_class", "fallback", "want"),
    [
        ("auto", "npu", ALL, "refuse"),
        ("auto", "npu", PART, "alarm"),
        ("auto", "cpu", ALL, "alarm"),
        ("refuse", "cpu", PART, "refuse"),
        ("alarm", "npu", ALL, "alarm"),
        ("allow", "npu", ALL, "allow"),
    ],
)
def test_the_policy_decides(policy: Any, device_class: str, fallback: Fallback, want: str):
    assert action(policy, device_class, fallback) == want


@pytest.mark.parametrize(
    ("provider", "options", "want"),
    [
        ("CPUExecutionProvider", {}, "CPU"),
        ("TensorrtExecutionProvider", {}, "GPU"),
        ("QNNExecutionProvider", {}, "QNN"),
        ("QNNExecutionProvider", {"backend_path": "libQnnHtp.so"}, "NPU"),
        ("QNNExecutionProvider", {"backend_path": "/opt/qnn/libQnnCpu.so"}, "CPU"),
        ("QNNExecutionProvider", {"backend_type": "gpu"}, "GPU"),
        ("OpenVINOExecutionProvider", {"device_type": "AUTO:NPU"}, "NPU"),
        ("OpenVINOExecutionProvider", {"device_type": "AUTO:NPU,CPU"}, "OpenVINO"),
        ("SomeExecutionProvider", {}, "Some"),
    ],
)
def test_a_provider_runs_on(provider: str, options: dict[str, str], want: str):
    assert provider_device(provider, options) == want


def test_all_devices_make_one_word():
    assert placement.device([NPU, CPU, CPU]) == "CPU+NPU" and placement.device([]) == ""
