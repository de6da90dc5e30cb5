"""Whether a model runs where it was asked to, and what follows when it does not.

Law of this file: pure; a variant's device class and options, the placement that its backend
reported, and a policy in, a verdict out. It knows how each backend's options ask for a device, and
no library. What is not in its tables asks for nothing.

Libraries fall back to the CPU with a line in a log at most: onnxruntime gives unsupported nodes to
the CPU and goes on listing the accelerator; OpenVINO's AUTO goes to the next device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from edge_runtime.backends.protocol import Placement
from edge_runtime.backends.providers import CPU, provider_device

Policy = Literal["auto", "refuse", "alarm", "allow"]
Action = Literal["refuse", "alarm", "allow"]

# Device classes of a variant that ask for no accelerator.
_PLAIN_CLASSES = frozenset({"", "any", "cpu"})


class Fallback(msgspec.Struct, frozen=True):
    """An accelerator was asked for, and (part of) the model runs on the CPU."""

    reason: str
    whole: bool  # none of it runs where it was asked to


def device(placement: Sequence[Placement]) -> str:
    """All devices of a model in one word: "NPU", "CPU+NPU"; "" when there is none."""
    return "+".join(sorted({place.device for place in placement}))


def fallen_back(
    device_class: str, options: Mapping[str, Any], placement: Sequence[Placement]
) -> Fallback | None:
    """What runs on the CPU although an accelerator was asked for; None: nothing.

    Args:
        device_class: of the variant: "cpu", "npu", "gpu", "tpu", ...
        options: of the variant, as its backend has accepted them.
        placement: as the loaded model has it.
    """
    wanted, may_split = _wanted(options)
    if not wanted and device_class.lower() not in _PLAIN_CLASSES:
        wanted = device_class.upper()
    if not wanted:
        return None
    on_cpu = [place for place in placement if place.device == CPU]
    elsewhere = [place for place in placement if place.device != CPU]
    if on_cpu and not elsewhere:
        return Fallback(f"{wanted} was asked for, all of it runs on the CPU{_why(on_cpu)}", True)
    if not on_cpu:
        return None
    if not any(place.nodes for place in placement):
        return Fallback(f"{wanted} was asked for, what it took is not known", False)
    if may_split:
        return None
    left, nodes = (sum(place.nodes for place in part) for part in (on_cpu, placement))
    return Fallback(f"{wanted} was asked for, {left} of {nodes} nodes run on the CPU", False)


def action(policy: Policy, device_class: str, fallback: Fallback) -> Action:
    """What is done about a fallback.

    `auto`: a variant that was made for an accelerator, and of which nothing runs there, is refused;
    any other fallback is an alarm.
    """
    if policy != "auto":
        return policy
    made_for_one = device_class.lower() not in _PLAIN_CLASSES
    return "refuse" if made_for_one and fallback.whole else "alarm"


def _why(places: Sequence[Placement]) -> str:
    """What the backend says of it, where it says more than a name."""
    details = [place.detail.partition("; ")[2] for place in places]
    said = "; ".join(detail for detail in details if detail)
    return f": {said}" if said else ""


def _wanted(options: Mapping[str, Any]) -> tuple[str, bool]:
    """The accelerator that options ask for ("": none), and whether they give a part to the CPU."""
    for key, read in _ASKING.items():
        if options.get(key):
            wanted, may_split = read(options[key])
            if wanted:
                return wanted, may_split
    return "", False


def _of_device(value: str) -> tuple[str, bool]:
    """OpenVINO. AUTO alone leaves it to the machine and so asks for nothing."""
    kind, _, names = value.rpartition(":")
    devices = [name for name in names.split(",") if name not in (CPU, "AUTO")]
    return ",".join(devices), kind == "HETERO" and CPU in names.split(",")


def _of_providers(value: Sequence[str | Mapping[str, Any]]) -> tuple[str, bool]:
    """onnxruntime. What no provider takes runs on the CPU; who lists the CPU has said so."""
    devices: dict[str, str] = {}
    for one in value:
        each: Mapping[str, Any] = {"name": one} if isinstance(one, str) else one
        devices[each["name"]] = provider_device(each["name"], each.get("options", {}))
    wanted = [name for name, where in devices.items() if where != CPU]
    return ",".join(wanted), len(wanted) < len(devices)


def _of_delegate(value: Mapping[str, Any]) -> tuple[str, bool]:
    """LiteRT. A delegate may be for the CPU, if it says so."""
    if value.get("device") == CPU:
        return "", False
    return str(value.get("device") or value.get("library") or "a delegate"), False


# option -> how it asks for a device. No two backends mean different things by one of these.
_ASKING: dict[str, Callable[[Any], tuple[str, bool]]] = {
    "device": _of_device,
    "providers": _of_providers,
    "delegate": _of_delegate,
}
