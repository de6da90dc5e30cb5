"""A machine to be played: the files of /sys and /proc that the governor reads, in a directory."""

from __future__ import annotations

from pathlib import Path


class Machine:
    """Begins without anything but memory pressure of 0."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pressure(memory=0.0)

    def write(self, path: str, text: str) -> Path:
        """A file at once as a whole, as the kernel's are."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(file.name + ".new")
        beside.write_text(text)
        beside.replace(file)
        return file

    def zone(self, number: int, kind: str, celsius: float | str) -> Path:
        directory = f"sys/class/thermal/thermal_zone{number}"
        if not (self.root / directory / "type").exists():
            self.write(f"{directory}/type", kind + "\n")
        text = celsius if isinstance(celsius, str) else str(round(celsius * 1000))
        return self.write(f"{directory}/temp", text + "\n")

    def cooler(self, number: int, kind: str, state: int) -> None:
        directory = f"sys/class/thermal/cooling_device{number}"
        self.write(f"{directory}/type", kind + "\n")
        self.write(f"{directory}/cur_state", f"{state}\n")

    def firmware(self, bits: int) -> None:
        self.write("sys/devices/platform/soc/soc:firmware/get_throttled", f"{bits:x}\n")

    def counter(self, count: int) -> None:
        path = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
        self.write(path, f"{count}\n")

    def clock(self, limit_khz: int, most_khz: int) -> None:
        policy = "sys/devices/system/cpu/cpufreq/policy0"
        self.write(f"{policy}/scaling_max_freq", f"{limit_khz}\n")
        self.write(f"{policy}/cpuinfo_max_freq", f"{most_khz}\n")

    def pressure(self, **percent: float) -> None:
        for resource, value in percent.items():
            self.write(f"proc/pressure/{resource}", psi(value))

    def cgroup(self, *, memory: float, **events: int) -> None:
        self.write("proc/self/cgroup", "0::/system.slice/edge-runtime.service\n")
        group = "sys/fs/cgroup/system.slice/edge-runtime.service"
        self.write(f"{group}/memory.pressure", psi(memory))
        lines = [f"{name} {count}" for name, count in events.items()]
        self.write(f"{group}/memory.events", "\n".join(["low 0", *lines, ""]))


def psi(percent: float) -> str:
    """The format of the kernel's accounting/psi."""
    rest = "avg60=0.00 avg300=0.00 total=330368"
    return f"some avg10={percent:.2f} {rest}\nfull avg10=0.00 {rest}\n"
