"""What the machine says of itself, from /proc, /sys and /dev.

Law of this file: reads only, below a root that is an argument (recorded machines are test data),
and never fails: what cannot be read, or is nonsense, is absent. It concludes nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from device_profiles.schema import Cluster, Machine

ROOT = Path("/")
# The files of /sys/class/dmi/id that say what a machine is; serial numbers are nobody's business.
DMI_FILES = (
    "sys_vendor",
    "product_name",
    "product_family",
    "product_version",
    "board_vendor",
    "board_name",
)
# Some of these files are endless on broken drivers.
_BYTES_MAX = 64 << 10


class Node(NamedTuple):
    """A device node, or what stands for one in a recorded tree."""

    path: str
    mode: int  # permission bits
    uid: int
    gid: int


def describe(root: Path = ROOT, arch: str = "") -> Machine:
    """The machine below `root`. `arch`: of a recorded one, which has no uname to ask."""
    cpuinfo = _cpuinfo(root)
    compatible = _texts(_bytes(root / "proc/device-tree/compatible"))
    dmi = {name: text for name in DMI_FILES if (text := _text(root / "sys/class/dmi/id" / name))}
    models = _texts(_bytes(root / "proc/device-tree/model"))
    maker = " ".join(part for part in (dmi.get("sys_vendor"), dmi.get("product_name")) if part)
    return Machine(
        arch=arch
        or _text(root / "proc/sys/kernel/arch")
        or (os.uname().machine if root == ROOT else ""),
        title=models[0] if models else maker,
        compatible=compatible,
        dmi=dmi,
        cpu_model=next((one["model name"] for one in cpuinfo if "model name" in one), ""),
        cpu_flags=tuple(_flags(cpuinfo)),
        clusters=_clusters(cpuinfo),
        cpu_count=sum("processor" in one for one in cpuinfo),
        pci=_pci(root),
        usb=_usb(root),
        memory_bytes=_meminfo(root, "MemTotal"),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        modules=tuple(sorted(path.name for path in _children(root / "sys/module"))),
        zones=tuple(
            sorted(
                text
                for path in _children(root / "sys/class/thermal")
                if path.name.startswith("thermal_zone") and (text := _text(path / "type"))
            )
        ),
    )


def found(pattern: str, root: Path = ROOT) -> list[str]:
    """The paths that match an absolute glob, as they would be without `root`, sorted."""
    try:
        matches = sorted(root.glob(pattern.lstrip("/")))
    except (OSError, ValueError):  # a directory that may not be read, a pattern that is none
        return []
    return ["/" + str(path.relative_to(root)) for path in matches]


def node(path: str, root: Path = ROOT) -> Node | None:
    """Who may open a device node; None: there is none."""
    try:
        status = (root / path.lstrip("/")).stat()
    except OSError:
        return None
    return Node(path, status.st_mode & 0o777, status.st_uid, status.st_gid)


def version_in(path: str, root: Path = ROOT) -> str:
    """The first thing like a version in a file; "" if there is none."""
    match = re.search(r"[0-9]+(?:\.[0-9]+)+|[0-9]+", _text(root / path.lstrip("/")))
    return match[0] if match else ""


def available_bytes(root: Path = ROOT) -> int:
    """The memory that may be used now without swapping, by the kernel's guess; 0: not known."""
    return _meminfo(root, "MemAvailable")


def hottest_c(root: Path = ROOT) -> float | None:
    """The hottest of the thermal zones in degrees Celsius; None: none tells anything sensible."""
    readings = [
        int(text) / 1000
        for path in _children(root / "sys/class/thermal")
        if path.name.startswith("thermal_zone")
        and re.fullmatch(r"-?[0-9]{1,6}", text := _text(path / "temp"))
    ]
    # 0 and below, or beyond what silicon survives, is what broken sensors say.
    return max((one for one in readings if 0 < one < 150), default=None)


# --- reading ------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX)
    except OSError:
        return b""


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace").strip("\0 \t\r\n")


def _texts(data: bytes) -> tuple[str, ...]:
    """The strings of a device tree property: each ends in a zero byte."""
    parts = data.decode("utf-8", "replace").split("\0")
    return tuple(text for part in parts if (text := part.strip()))


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """The paragraphs of /proc/cpuinfo; the machine's own (Raspberry Pi ends with one) too."""
    # Not cut at _BYTES_MAX: 64 cores have more.
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    paragraphs = []
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        fields = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if fields:
            paragraphs.append(fields)
    return paragraphs


def _flags(cpuinfo: list[dict[str, str]]) -> list[str]:
    """The flags that every core has: a program may run on any of them."""
    each = [
        set(text.split())
        for one in cpuinfo
        if (text := one.get("flags") or one.get("Features")) is not None
    ]
    return sorted(set.intersection(*each)) if each else []


def _clusters(cpuinfo: list[dict[str, str]]) -> tuple[Cluster, ...]:
    """Cores with the same part number, which only arm tells."""
    parts: dict[str, list[int]] = {}
    for one in cpuinfo:
        implementer, part = one.get("CPU implementer"), one.get("CPU part")
        number = one.get("processor", "")
        if implementer and part and number.isdigit():
            parts.setdefault(f"{implementer}:{part}".lower(), []).append(int(number))
    return tuple(Cluster(cpus=_ranges(cpus), part=part) for part, cpus in parts.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _pci(root: Path) -> tuple[str, ...]:
    found: set[str] = set()
    for path in _children(root / "sys/bus/pci/devices"):
        vendor, device = (_text(path / name).removeprefix("0x") for name in ("vendor", "device"))
        if vendor and device:
            found.add(f"{vendor}:{device}")
    return tuple(sorted(found))


def _usb(root: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for path in _children(root / "sys/bus/usb/devices"):
        vendor, product = _text(path / "idVendor"), _text(path / "idProduct")
        bus, device = _text(path / "busnum"), _text(path / "devnum")
        if vendor and product:
            known = bus.isdigit() and device.isdigit()
            nodes = [f"/dev/bus/usb/{int(bus):03d}/{int(device):03d}"] if known else []
            found.setdefault(f"{vendor}:{product}", []).extend(nodes)
    return {name: tuple(nodes) for name, nodes in found.items()}


def _meminfo(root: Path, name: str) -> int:
    match = re.search(rf"^{name}:\s*([0-9]+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
