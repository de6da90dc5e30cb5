"""What is known of onnxruntime's execution providers: who brings them, and where their nodes run.

Law of this file: tables and what is read off them; no library. A provider that is in no table works
all the same, if the library has it.

Sources: onnxruntime's documentation, "Execution Providers" and "Build with different EPs"; the
packages' own pages on PyPI (the plug-ins of QNN and OpenVINO were tried, 2.7.0 and 1.8.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CPU = "CPU"

# Packages that bring a provider as a plug-in beside the plain onnxruntime: provider -> module with
# get_library_path(). They are looked for when the library itself has not the provider.
PLUGINS = {
    "QNNExecutionProvider": "onnxruntime_qnn",
    "OpenVINOExecutionProvider": "onnxruntime_ep_openvino",
}

# What to install for a provider that is missing.
_REPLACES = "in place of onnxruntime, which it replaces"
_OWN_BUILD = "there is no such wheel: build onnxruntime with"
_REMEDIES = {
    "QNNExecutionProvider": "pip install onnxruntime-qnn (beside onnxruntime 1.24 or newer)",
    "OpenVINOExecutionProvider": "pip install onnxruntime-ep-openvino (beside onnxruntime), or use "
    "the backend openvino",
    "CUDAExecutionProvider": f"pip install onnxruntime-gpu {_REPLACES}; on a Jetson NVIDIA's wheel",
    "TensorrtExecutionProvider": f"pip install onnxruntime-gpu {_REPLACES}, and TensorRT",
    "NvTensorRTRTXExecutionProvider": "pip install onnxruntime-ep-nv-tensorrt-rtx, and name its "
    "library in the provider's `library`",
    "MIGraphXExecutionProvider": f"pip install onnxruntime-migraphx {_REPLACES}",
    "XnnpackExecutionProvider": f"{_OWN_BUILD} --use_xnnpack",
    "ACLExecutionProvider": f"{_OWN_BUILD} --use_acl",
    "ArmNNExecutionProvider": f"{_OWN_BUILD} --use_armnn",
    "DnnlExecutionProvider": f"{_OWN_BUILD} --use_dnnl",
    "RknpuExecutionProvider": f"{_OWN_BUILD} --use_rknpu",
    "VSINPUExecutionProvider": f"{_OWN_BUILD} --use_vsinpu",
    "VitisAIExecutionProvider": f"{_OWN_BUILD} --use_vitisai",
}

# Where the nodes of an onnxruntime execution provider run.
_PROVIDER_DEVICES = {
    "CPUExecutionProvider": CPU,
    "XnnpackExecutionProvider": CPU,
    "ACLExecutionProvider": CPU,
    "ArmNNExecutionProvider": CPU,
    "DnnlExecutionProvider": CPU,
    "CUDAExecutionProvider": "GPU",
    "TensorrtExecutionProvider": "GPU",
    "NvTensorRTRTXExecutionProvider": "GPU",
    "MIGraphXExecutionProvider": "GPU",
    "RknpuExecutionProvider": "NPU",
    "VitisAIExecutionProvider": "NPU",
    "VSINPUExecutionProvider": "NPU",
}
# Providers that drive several kinds of device: the options that name it, and what they may say.
_BY_OPTION = {
    "OpenVINOExecutionProvider": (("device_type",), re.compile(r"(?:.*:)?(CPU|GPU|NPU)", re.I)),
    "QNNExecutionProvider": (
        ("backend_type", "backend_path"),
        re.compile(r"(?:.*Qnn)?(CPU|GPU|HTP|DSP)(?:\.so|\.dll)?", re.I),
    ),
}
_NPU_NAMES = frozenset({"HTP", "DSP"})


def remedy(provider: str) -> str:
    """How to get a provider that this installation has not; "" for one that nobody knows."""
    return _REMEDIES.get(provider, "")


def known() -> list[str]:
    """All names in the tables."""
    return sorted({*_REMEDIES, *_PROVIDER_DEVICES})


def provider_device(provider: str, options: Mapping[str, Any]) -> str:
    """Where the nodes of an onnxruntime execution provider with these options run.

    A provider that is in no table is called by its own name ("QNN").
    """
    keys, pattern = _BY_OPTION.get(provider, ((), None))
    for key in keys:
        said = pattern.fullmatch(str(options.get(key, ""))) if pattern else None
        if said:
            name = said[1].upper()
            return "NPU" if name in _NPU_NAMES else name
    return _PROVIDER_DEVICES.get(provider, provider.removesuffix("ExecutionProvider"))
