"""Devices that are not at hand: an NPU as its documentation describes it, played by a fake."""

from __future__ import annotations

import io
from typing import Any

import pytest

from edge_runtime.backends import openvino_devices as devices
from edge_runtime.errors import BackendError, UsageError

from . import contract

PROPERTIES = {
    "CPU": ["PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING"],
    "NPU": ["PERFORMANCE_HINT", "NPU_DRIVER_VERSION", "INFERENCE_PRECISION_HINT"],
}


@pytest.fixture(autouse=True)
def library() -> None:
    contract.openvino()  # its exceptions are what is caught


class Compiled:
    """A compiled model of a device that says little of itself."""

    def __init__(self, device: str, *, exports: bool = True) -> None:
        self._device = device
        self._exports = exports

    def get_property(self, name: str) -> Any:
        if name == "EXECUTION_DEVICES":
            return self._device  # text, where others give a list
        raise RuntimeError(f"unsupported property {name}")

    def get_runtime_model(self) -> Any:
        raise RuntimeError("not implemented")

    def export_model(self) -> io.BytesIO:
        if not self._exports:
            raise RuntimeError("not implemented")
        return io.BytesIO(b"blob")


class Core:
    """Attributes: told: what each compilation was told; driver: its version."""

    def __init__(self, *there: str, broken: str = "", exports: bool = True) -> None:
        self.available_devices = list(there)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.imported: list[bytes] = []
        self.driver = "1"
        self._broken = broken
        self._exports = exports

    def get_property(self, device: str, name: str) -> Any:
        values = {
            "SUPPORTED_PROPERTIES": dict.fromkeys(PROPERTIES[device], "RW"),
            "OPTIMIZATION_CAPABILITIES": ["FP16", "EXPORT_IMPORT"],
            "NPU_DRIVER_VERSION": self.driver,
        }
        return values[name]

    def compile_model(self, model: Any, device: str, told: dict[str, Any]) -> Compiled:
        if device == self._broken:
            raise RuntimeError("Exception from src/plugin.cpp:70: the driver does not answer")
        self.told.append((device, told))
        return Compiled(device, exports=self._exports)

    def import_model(self, blob: bytes, device: str, told: dict[str, Any]) -> Compiled:
        self.imported.append(blob)
        return Compiled(device)


class Model:
    inputs: tuple[Any, ...] = ()


class Kept(dict[str, bytes]):
    def put(self, key: str, blob: bytes) -> None:
        self[key] = blob


def compiled_for(core: Core, cache: Any = None, **options: Any) -> Any:
    chosen = devices.Options(**options)
    devices.check_given(core, chosen, options)
    return devices.compiled_for(core, Model(), chosen, cache)[1]


def test_an_npu_is_told_what_it_takes_and_reported_by_its_own_word():
    core = Core("CPU", "NPU")
    (place,) = compiled_for(core, device="AUTO:NPU,CPU")
    assert (place.device, place.detail, place.nodes) == ("NPU", "NPU", 0)
    told = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f16"}
    assert core.told == [("NPU", told)]


def test_auto_alone_prefers_what_is_not_the_cpu():
    assert compiled_for(Core("CPU", "NPU"), device="AUTO")[0].device == "NPU"


def test_a_driver_that_fails_gives_the_next_device_its_turn_with_the_reason():
    (place,) = compiled_for(Core("CPU", "NPU", broken="NPU"), device="AUTO:NPU,CPU")
    assert place.device == "CPU"
    assert place.detail == "CPU; refused by NPU: the driver does not answer"
    with pytest.raises(BackendError, match="the driver does not answer"):
        compiled_for(Core("CPU", "NPU", broken="NPU"), device="NPU")


@pytest.mark.parametrize(("device", "option"), [("NPU", "threads"), ("NPU", "streams")])
def test_an_option_that_no_device_has_is_an_error(device: str, option: str):
    with pytest.raises(UsageError) as caught:
        compiled_for(Core("CPU", "NPU"), **{"device": device, option: 2})
    assert caught.value.where == f"options.{option}"
    compiled_for(Core("CPU", "NPU"), **{"device": f"AUTO:{device},CPU", option: 2})


def test_of_a_device_that_is_missing_that_is_told_and_not_its_options():
    with pytest.raises(BackendError, match="does not answer"):
        compiled_for(Core("CPU", broken="NPU"), device="NPU", threads=2)


def test_what_was_compiled_is_kept_for_this_driver_only():
    core, cache = Core("CPU", "NPU"), Kept()
    for driver, compilations in (("1", 1), ("1", 1), ("2", 2)):
        core.driver = driver
        compiled_for(core, cache, device="NPU")
        assert len(core.told) == compilations
    assert core.imported == [b"blob"] and len(cache) == 2


def test_a_device_that_cannot_export_runs_all_the_same():
    cache = Kept()
    assert compiled_for(Core("CPU", "NPU", exports=False), cache, device="NPU")[0].device == "NPU"
    assert not cache


@pytest.mark.parametrize("choice", ["discard", "auto"])
def test_nothing_is_kept_where_that_is_not_wanted(choice: str):
    cache = Kept()
    compiled_for(Core("CPU"), cache, device="CPU", compiled=choice)
    assert not cache
