"""What is read, and that nothing that a sysfs does is an error."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.daemon.sensors import SEARCH_S, Reading, Sensors
from edge_runtime.serving import governing

from .machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read(machine: Machine, *patterns: str, now_s: float = 0.0) -> Reading:
    return Sensors(str(machine.root), patterns or ("*",)).read(now_s)


def test_zones_are_known_by_their_type_and_told_apart_by_a_number(machine: Machine) -> None:
    machine.zone(0, "cpu-thermal", 51.5)
    machine.zone(1, "gpu-thermal", 47.0)
    machine.zone(2, "cpu-thermal", 52.0)
    assert read(machine).zones == {
        "cpu-thermal": 51500,
        "gpu-thermal": 47000,
        "cpu-thermal#2": 52000,
    }
    assert list(read(machine, "gpu*").zones) == ["gpu-thermal"]


@pytest.mark.parametrize("text", ["", "hot", "4 5", "\xff\xfe", "45.5", "0x20"])
def test_what_is_no_number_is_no_reading(machine: Machine, text: str) -> None:
    machine.zone(0, "cpu-thermal", text)
    assert read(machine).zones == {"cpu-thermal": None}


def test_a_zone_that_vanishes_is_silent_and_one_that_comes_is_found(machine: Machine) -> None:
    file = machine.zone(0, "cpu-thermal", 50)
    sensors = Sensors(str(machine.root), ("*",))
    assert sensors.read(0).zones == {"cpu-thermal": 50000}
    file.unlink()
    (file.parent / "type").unlink()
    file.parent.rmdir()
    assert sensors.read(1).zones == {"cpu-thermal": None}
    machine.zone(3, "soc-thermal", 40)
    assert "soc-thermal" not in sensors.read(2).zones
    assert sensors.read(SEARCH_S).zones == {"cpu-thermal": None, "soc-thermal": 40000}


def test_a_machine_without_anything_is_an_empty_reading(tmp_path: Path) -> None:
    assert Sensors(str(tmp_path), ("*",)).read(0) == Reading({}, (), (), {}, False, None, None)


def test_files_that_cannot_be_read_are_absent(machine: Machine) -> None:
    directory = machine.root / "sys/class/thermal/thermal_zone0"
    (directory / "temp").mkdir(parents=True)  # reading it fails: EISDIR
    (directory / "type").write_text("cpu-thermal")
    assert read(machine).zones == {"cpu-thermal": None}


@pytest.mark.parametrize(
    ("bits", "throttled", "notes"),
    [
        (0x0, 0, 0),
        (0x50000, 0, 0),  # it happened since boot, and is over
        (0x50005, 1, 1),  # under-voltage and throttled now
        (0x8, 1, 0),
        (0x2, 0, 1),
    ],
)
def test_of_the_firmware_bits_those_of_now_count(
    machine: Machine, bits: int, throttled: int, notes: int
) -> None:
    machine.firmware(bits)
    reading = read(machine)
    assert (len(reading.throttled), len(reading.notes)) == (throttled, notes)


def test_a_slowed_processor_throttles_and_a_fan_does_not(machine: Machine) -> None:
    machine.cooler(0, "pwm-fan", 4)
    machine.cooler(1, "cpufreq-cpu0", 0)
    assert read(machine).throttled == ()
    machine.cooler(1, "cpufreq-cpu0", 2)
    assert read(machine).throttled == ("cooling device cpufreq-cpu0",)


def test_counters_tell_of_now_only_when_they_grow(machine: Machine) -> None:
    machine.counter(17)
    sensors = Sensors(str(machine.root), ("*",))
    assert sensors.read(0).throttled == ()
    machine.counter(18)
    assert len(sensors.read(2).throttled) == 1
    assert sensors.read(4).throttled == ()


def test_a_limited_clock_is_said_and_is_no_throttling(machine: Machine) -> None:
    machine.clock(1_000_000, 2_000_000)
    reading = read(machine)
    assert reading.clock_share == 0.5
    assert reading.throttled == ()


def test_the_worse_pressure_of_machine_and_cgroup_counts(machine: Machine) -> None:
    machine.pressure(memory=2.5, cpu=50.0)
    machine.cgroup(memory=12.25, high=0)
    assert read(machine).pressure == {"memory": 12.25, "cpu": 50.0}


@pytest.mark.parametrize("text", ["", "some avg10=nan", "full avg10=3.00", "some avg10=300.0"])
def test_pressure_that_makes_no_sense_is_none(machine: Machine, text: str) -> None:
    machine.write("proc/pressure/memory", text)
    assert read(machine).pressure == {}


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 250 kB\n", 0.25),
        ("MemTotal: 0 kB\nMemAvailable: 0 kB\n", None),
        ("MemTotal: 1000 kB\n", None),
        ("MemTotal: 10 kB\nMemAvailable: 20 kB", None),
    ],
)
def test_where_the_kernel_tells_no_pressure_the_available_memory_is_read(
    machine: Machine, text: str, ratio: float | None
) -> None:
    machine.write("proc/meminfo", text)
    assert read(machine).available_ratio is None
    (machine.root / "proc/pressure/memory").unlink()
    assert read(machine).available_ratio == ratio


def test_a_cgroup_at_its_limit_is_seen_when_it_happens(machine: Machine) -> None:
    machine.cgroup(memory=0, high=3, max=9, oom_kill=0)
    sensors = Sensors(str(machine.root), ("*",))
    assert not sensors.read(0).struck
    machine.cgroup(memory=0, high=3, max=90, oom_kill=0)  # the page cache is trimmed: everyday life
    assert not sensors.read(2).struck
    machine.cgroup(memory=0, high=4, max=90, oom_kill=0)
    assert sensors.read(4).struck
    assert not sensors.read(6).struck


def test_it_reads_this_machine_without_leaving_a_descriptor(tmp_path: Path) -> None:
    before = open_descriptors()
    reading = Sensors("/", ("*",)).read(0)
    assert open_descriptors() == before
    if Path("/proc/pressure/memory").exists():
        assert 0 <= reading.pressure["memory"] <= 100


FILES = (
    "sys/class/thermal/thermal_zone0/temp",
    "sys/class/thermal/cooling_device0/cur_state",
    "sys/devices/platform/soc/soc:firmware/get_throttled",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq",
    "proc/pressure/memory",
    "sys/fs/cgroup/system.slice/edge-runtime.service/memory.events",
    "proc/self/cgroup",
)
contents = st.one_of(
    st.binary(max_size=60),
    st.integers().map(lambda number: str(number).encode()),
    st.text("someavg10=.0123456789- \nhighoom_kill:/", max_size=60).map(str.encode),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(FILES), contents), max_size=6))
def test_whatever_files_say_a_reading_is_sensible(changes: list[tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        machine = Machine(Path(root))
        machine.zone(0, "cpu-thermal", 50)
        machine.cooler(0, "cpufreq-cpu0", 0)
        machine.firmware(0)
        machine.counter(0)
        machine.clock(1, 2)
        machine.cgroup(memory=0, high=0)
        sensors = Sensors(root, ("*",))
        sensors.read(0)
        for path, content in changes:
            (machine.root / path).write_bytes(content)
        reading = sensors.read(SEARCH_S)
        celsius = [governing.celsius(raw) for raw in reading.zones.values()]
        assert all(one is None or -40 <= one <= 125 for one in celsius)
        assert all(0 <= percent <= 100 for percent in reading.pressure.values())
        assert reading.clock_share is None or 0 < reading.clock_share <= 1
