"""Recorded machines: what /proc, /sys and /dev of real boards say, as far as public texts tell.

Law of this file: data and the one function that lays it out as files. Each tree cites the text that
it was made from; what no text tells is left out, as the probe must bear that.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Board(NamedTuple):
    """Files by path below the root, and the machine name that uname would give."""

    arch: str
    files: dict[str, str]
    cite: str


def lay_out(board: Board, root: Path) -> Path:
    """Write a board's files below `root`."""
    for name, text in board.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _arm_cpus(*parts: tuple[str, int]) -> str:
    lines = []
    number = 0
    for part, count in parts:
        for _ in range(count):
            lines.append(
                f"processor\t: {number}\nBogoMIPS\t: 108.00\n"
                "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"
                f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
                f"CPU part\t: {part}\nCPU revision\t: 3\n"
            )
            number += 1
    return "\n".join(lines)


def _x86_cpus(model: str, count: int, flags: str) -> str:
    return "\n".join(
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\n"
        f"model name\t: {model}\nflags\t\t: {flags}\n"
        for number in range(count)
    )


def _tree(*compatible: str) -> str:
    return "".join(f"{one}\0" for one in compatible)


def _zones(*types: str) -> dict[str, str]:
    files = {}
    for number, one in enumerate(types):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = f"{one}\n"
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = "45000\n"
    return files


PI_5 = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("raspberrypi,5-model-b", "brcm,bcm2712"),
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": _arm_cpus(("0xd0b", 4))
        + "\nRevision\t: c04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
        "proc/meminfo": "MemTotal:        4137104 kB\nMemFree:          100 kB\n",
        **_zones("cpu-thermal"),
    },
    "linux-raspberrypi bcm2712-rpi-5-b.dts; Raspberry Pi's list of revision codes",
)
PI_4 = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("raspberrypi,4-model-b", "brcm,bcm2711"),
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cpuinfo": _arm_cpus(("0xd08", 4)),
        "proc/meminfo": "MemTotal:        3884360 kB\n",
        **_zones("cpu-thermal"),
    },
    "linux bcm2711-rpi-4-b.dts",
)
PI_ZERO_2 = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("raspberrypi,model-zero-2-w", "brcm,bcm2837"),
        "proc/device-tree/model": "Raspberry Pi Zero 2 W Rev 1.0\0",
        "proc/cpuinfo": _arm_cpus(("0xd03", 4)),
        "proc/meminfo": "MemTotal:         436616 kB\n",
        **_zones("cpu-thermal"),
    },
    "linux bcm2837-rpi-zero-2-w.dts",
)
ROCK_5B = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("radxa,rock-5b", "rockchip,rk3588"),
        "proc/device-tree/model": "Radxa ROCK 5B\0",
        "proc/cpuinfo": _arm_cpus(("0xd05", 4), ("0xd0b", 4)),
        "proc/meminfo": "MemTotal:        8108240 kB\n",
        "sys/bus/platform/drivers/rocket/fdab0000.npu/uevent": "DRIVER=rocket\n",
        "sys/module/rocket/initstate": "live\n",
        "dev/accel/accel0": "",
        **_zones(
            "package-thermal",
            "bigcore0-thermal",
            "bigcore2-thermal",
            "littlecore-thermal",
            "center-thermal",
            "gpu-thermal",
            "npu-thermal",
        ),
    },
    "linux rk3588-rock-5b.dts, rk3588-base.dtsi, drivers/accel/rocket",
)
IMX8MP_EVK = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("fsl,imx8mp-evk", "fsl,imx8mp"),
        "proc/device-tree/model": "NXP i.MX8MPlus EVK board\0",
        "proc/cpuinfo": _arm_cpus(("0xd03", 4)),
        "proc/meminfo": "MemTotal:        5894328 kB\n",
        "sys/module/galcore/initstate": "live\n",
        "dev/galcore": "",
        **_zones("cpu-thermal", "soc-thermal"),
    },
    "linux imx8mp-evk.dts, imx8mp.dtsi",
)
ORIN_NANO = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree(
            "nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"
        ),
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "dev/nvmap": "",
        **_zones("cpu-thermal", "gpu-thermal", "tj-thermal"),
    },
    "linux tegra234-p3768-0000+p3767-0005.dts",
)
RB3_GEN2 = Board(
    "aarch64",
    {
        "proc/device-tree/compatible": _tree("qcom,qcs6490-rb3gen2", "qcom,qcm6490"),
        "proc/device-tree/model": "Qualcomm Technologies, Inc. Robotics RB3gen2\0",
        "proc/cpuinfo": _arm_cpus(("0xd05", 4), ("0xd4b", 4)),
        "dev/fastrpc-cdsp": "",
        "sys/module/fastrpc/initstate": "live\n",
        **_zones("cpu0-thermal", "cpu1-thermal"),
    },
    "linux qcs6490-rb3gen2.dts",
)
N100 = Board(
    "x86_64",
    {
        "proc/cpuinfo": _x86_cpus("Intel(R) N100", 4, "fpu sse2 avx avx2 fma avx_vnni"),
        "proc/meminfo": "MemTotal:       16130064 kB\n",
        "sys/class/dmi/id/sys_vendor": "Default string\n",
        "sys/class/dmi/id/product_name": "Default string\n",
        "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n",
        "sys/bus/pci/devices/0000:00:02.0/device": "0x46d1\n",
        "sys/bus/pci/drivers/i915/0000:00:02.0/class": "0x030000\n",
        "sys/module/i915/initstate": "live\n",
        "dev/dri/renderD128": "",
        **_zones("acpitz", "x86_pkg_temp"),
    },
    "public dumps of N100 machines (model name, four threads); 46d1: Alder Lake-N graphics",
)
CORE_ULTRA = Board(
    "x86_64",
    {
        "proc/cpuinfo": _x86_cpus("Intel(R) Core(TM) Ultra 7 155H", 22, "fpu avx avx2 avx_vnni"),
        "proc/meminfo": "MemTotal:       32560128 kB\n",
        "sys/bus/pci/devices/0000:00:0b.0/vendor": "0x8086\n",
        "sys/bus/pci/devices/0000:00:0b.0/device": "0x7d1d\n",
        "sys/bus/pci/drivers/intel_vpu/0000:00:0b.0/class": "0x120000\n",
        "sys/module/intel_vpu/initstate": "live\n",
        "dev/accel/accel0": "",
        **_zones("acpitz", "x86_pkg_temp"),
    },
    "linux drivers/accel/ivpu/ivpu_drv.h; lore.kernel.org (model name of a 155H)",
)

BOARDS: dict[str, Board] = {
    "raspberry-pi-5": PI_5,
    "raspberry-pi-4": PI_4,
    "raspberry-pi-zero-2-w": PI_ZERO_2,
    "rk3588": ROCK_5B,
    "imx8mp": IMX8MP_EVK,
    "jetson-orin-nano": ORIN_NANO,
    "qcs6490": RB3_GEN2,
    "intel-n100": N100,
    "intel-core-ultra": CORE_ULTRA,
}

CORAL_USB = {
    "sys/bus/usb/devices/2-1/idVendor": "18d1\n",
    "sys/bus/usb/devices/2-1/idProduct": "9302\n",
    "sys/bus/usb/devices/2-1/busnum": "2\n",
    "sys/bus/usb/devices/2-1/devnum": "4\n",
    "dev/bus/usb/002/004": "",
}
CORAL_M2 = {
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x1ac1\n",
    "sys/bus/pci/devices/0000:01:00.0/device": "0x089a\n",
    "sys/module/apex/initstate": "live\n",
    "sys/module/gasket/version": "1.1.4\n",
    "dev/apex_0": "",
}


def with_files(board: Board, files: dict[str, str]) -> Board:
    """The same board with something plugged in."""
    return board._replace(files={**board.files, **files})
