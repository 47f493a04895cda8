"""What each system says of itself, as recorded or as its documentation has it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from cgroups import tree

from edgespec.machine import cgroup, platforms, sensors, sysfs


class Temperature(NamedTuple):
    """As psutil has it: high and critical stand in for each other where one is missing."""

    label: str
    current: float
    high: float | None = None
    critical: float | None = None


class Battery(NamedTuple):
    percent: float
    secsleft: int
    power_plugged: bool | None


CORETEMP = [
    Temperature("Package id 0", 61.0, 100.0, 100.0),
    Temperature("Core 0", 58.0, 100.0, 100.0),
    Temperature("Core 1", 62.0, 84.0, 100.0),
]
OTHERS = {
    "nvme": [Temperature("Composite", 79.0, 83.8, 84.8), Temperature("Sensor 1", 90.0, 65261.8, 65261.8)],
    "iwlwifi_1": [Temperature("", 75.0)],
    "amdgpu": [Temperature("edge", 88.0)],
    "nct6775": [Temperature("CPUTIN", 110.0), Temperature("AUXTIN0", 127.0)],
    "pch_cannonlake": [Temperature("", 70.0)],
    "BAT0": [Temperature("", 66.0)],
}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"coretemp": CORETEMP}, {"celsius": 62.0, "celsius_limit": 84.0}),
        ({"coretemp": CORETEMP[:2]}, {"celsius": 61.0, "celsius_limit": 95.0}),
        (
            {"acpitz": [Temperature("", 99.0)], "coretemp": CORETEMP[1:2]},
            {"celsius": 58, "celsius_limit": 95},
        ),
        ({"k10temp": [Temperature("Tctl", 82.5)]}, {"celsius": 82.5}),
        ({"k10temp": [Temperature("Tctl", 82.5), Temperature("Tdie", 55.5)]}, {"celsius": 55.5}),
        ({"zenpower": [Temperature("Tdie", 50.0, 95.0, 95.0)]}, {"celsius": 50.0, "celsius_limit": 90.0}),
        ({"cpu_thermal": [Temperature("", 48.3, 110.0, 110.0)]}, {"celsius": 48.3, "celsius_limit": 105.0}),
        ({"soc_thermal": [Temperature("", 48.3, 200.0, 210.0)]}, {"celsius": 48.3}),
        (
            {"cpu0-thermal": [Temperature("", 40.0)], "gpu-thermal": [Temperature("", 90.0)]},
            {"celsius": 40.0},
        ),
        ({"x86_pkg_temp": [Temperature("", 44.0, 0.0, None)]}, {"celsius": 44.0}),
        ({"thinkpad": [Temperature("CPU", 61.0), Temperature("GPU", 80.0)]}, {"celsius": 61.0}),
        ({"acpitz": [Temperature("", 45.0, 119.0, 119.0)]}, {"celsius": 45.0, "celsius_limit": 114.0}),
    ],
)
def test_the_hottest_sensor_of_the_processor(
    groups: dict[str, list[Temperature]], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: OTHERS | groups, raising=False)
    assert sensors.temperature() == expected


@pytest.mark.parametrize("groups", [{}, OTHERS])
def test_other_things_temperatures_are_not_the_processors(
    groups: dict[str, list[Temperature]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: groups, raising=False)
    with pytest.raises(LookupError, match="no temperature sensor"):
        sensors.temperature()


def test_a_system_without_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert sensors.missing()["temperature"] == "the system reports no temperatures"


@pytest.mark.parametrize(
    ("notes", "charge", "plugged", "left"),
    [
        (Battery(93.4, 16628, False), 93.4, False, 16628),
        (Battery(93.4, psutil.POWER_TIME_UNLIMITED, True), 93.4, True, None),
        (Battery(50.0, psutil.POWER_TIME_UNKNOWN, False), 50.0, False, None),
        (Battery(50.0, 9999, True), 50.0, True, None),
        (Battery(100.4, 9999, False), 100.0, False, 9999),
        (Battery(655.0, 9999, False), 655.0, False, 9999),  # refused by the monitor, not corrected here
        (Battery(80.0, 9999, None), 80.0, None, None),
    ],
)
def test_battery(
    notes: Battery,
    charge: float,
    plugged: bool | None,
    left: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: notes)
    assert sensors.battery(tmp_path) == {"charge": charge, "plugged": plugged, "seconds_left": left}


def test_no_battery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    with pytest.raises(LookupError, match="no battery"):
        sensors.battery()


class Frequency(NamedTuple):
    current: float
    min: float
    max: float


def test_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(psutil, "cpu_freq", lambda: Frequency(1200.0, 400.0, 4800.0))
    assert sensors.frequency() == {"frequency": 0.25}
    for unknown in (None, Frequency(2596.0, 0.0, 0.0)):
        monkeypatch.setattr(psutil, "cpu_freq", lambda notes=unknown: notes)
        with pytest.raises(LookupError):
            sensors.frequency()
    monkeypatch.setattr(psutil, "cpu_freq", lambda: Frequency(2400.0, 2400.0, 2400.0))
    monkeypatch.setattr(sys, "platform", "darwin")  # the nominal frequency whatever happens
    with pytest.raises(LookupError):
        sensors.frequency()


class Core(NamedTuple):
    user: float
    system: float
    idle: float
    iowait: float
    steal: float
    guest: float


class Machine:
    """Cores, the process's own time, and a clock, moved by hand."""

    def __init__(self, patch: pytest.MonkeyPatch, cores: int, allowed: set[int]) -> None:
        self.cores = [Core(9.0, 9.0, 9.0, 9.0, 9.0, 9.0)] * cores
        self.own, self.now, self.allowed = 5.0, 100.0, allowed
        patch.setattr(sensors, "limits", lambda: cgroup.Limits(Path("/no folder")))
        patch.setattr(psutil, "cpu_times", lambda percpu: list(self.cores))
        patch.setattr(time, "process_time", lambda: self.own)
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr(os, "sched_getaffinity", lambda pid: self.allowed, raising=False)

    def run(self, own: float, **cores: Core) -> None:
        """A second in which this process takes `own` and core i the times of `ci`."""
        self.own, self.now = self.own + own, self.now + 1.0
        for name, spent in cores.items():
            i = int(name[1:])
            self.cores[i] = Core(*(a + b for a, b in zip(self.cores[i], spent, strict=True)))


def test_load_and_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 4, {0, 1})
    load = sensors.ProcessorLoad()
    machine.now += 1.0
    assert load() == {}  # not one tick of the counters
    machine.run(
        0.5, c0=Core(0.6, 0.1, 0.2, 0.0, 0.1, 0.5), c1=Core(0.0, 0.0, 0.5, 0.5, 0.0, 0.0), c2=Core(*[1.0] * 6)
    )
    assert load() == pytest.approx({"load": 0.4, "others": 0.15})
    machine.now += 0.1
    assert load() == pytest.approx({"load": 0.4, "others": 0.15})
    # Own time is counted finer than the cores': neither share leaves its range.
    machine.run(2.5, c0=Core(1.0, 0, 0, 0, 0, 0), c1=Core(1.0, 0, 0, 0, 0, 0))
    assert load() == {"load": 1.0, "others": 0.0}
    machine.run(0.0, c0=Core(0, 0, 1.1, -0.1, 0, 0), c1=Core(-0.1, 0, 1.0, 0, 0, 0))
    assert load() == {"load": 0.0, "others": 0.0}


def test_load_when_a_core_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3, {0, 2})
    load = sensors.ProcessorLoad()
    machine.cores.pop()
    busy, idle = Core(1.0, 0, 0, 0, 0, 0), Core(0, 0, 1.0, 0, 0, 0)
    machine.run(0.0, c0=busy, c1=idle)
    assert load() == pytest.approx({"load": 0.5, "others": 0.5})
    machine.allowed = {2}
    machine.run(0.0, c0=busy, c1=busy)
    assert load() == pytest.approx({"load": 1.0, "others": 1.0})


class Quota:
    """A control group with a quota, and the processor time that all in it have used, moved by hand."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, quota: str) -> None:
        self._root, self._used = root, 7.0
        mounted = {"self/cgroup": "0::/", "self/mountinfo": "9 1 0:9 / /cg rw - cgroup2 none rw"}
        tree(root / "proc", mounted)
        tree(root / "cg", {"cpu.max": quota})
        self.use(0.0)
        limits = cgroup.Limits(root)
        patch.setattr(sensors, "limits", lambda: limits)

    def use(self, seconds: float) -> None:
        self._used += seconds
        tree(self._root / "cg", {"cpu.stat": f"usage_usec {self._used * 1e6:.0f}"})


def test_load_within_a_quota_is_a_share_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 8, {0, 1, 2, 3})
    quota = Quota(tmp_path, monkeypatch, "200000 100000")
    load = sensors.ProcessorLoad()
    busy, idle = Core(1.0, 0, 0, 0, 0, 0), Core(0, 0, 1.0, 0, 0, 0)

    def second(own: float, group: float, *cores: Core) -> dict[str, float]:
        quota.use(group)
        machine.run(own, **{f"c{i}": core for i, core in enumerate(cores)})
        return load()

    # Two of four cores are left to others whatever this process does: they take nothing from it.
    assert second(0.0, 0.0, idle, idle, idle, idle) == {"load": 0.0, "others": 0.0}
    assert second(2.0, 2.0, busy, busy, busy, busy) == {"load": 1.0, "others": 0.0}
    assert second(1.0, 1.0, busy, busy, idle, idle) == {"load": 0.5, "others": 0.0}
    # A third core's worth of others is half of what the quota allows.
    assert second(1.0, 1.0, busy, busy, busy, busy) == {"load": 1.0, "others": 0.5}
    # A second program in the same group takes from the quota, whatever else is idle.
    assert second(0.5, 1.5, busy, Core(0.5, 0, 0.5, 0, 0, 0), idle, idle) == {"load": 0.75, "others": 0.5}
    # What counts the group's time may lag behind what counts this process's.
    assert second(2.5, 1.0, busy, busy, idle, idle) == {"load": 1.0, "others": 0.0}
    (tmp_path / "cg" / "cpu.stat").unlink()
    assert second(0.5, 0.0, busy, idle, idle, idle) == {"load": 0.25, "others": 0.0}


@pytest.mark.parametrize(
    ("quota", "compute", "bound"),
    [
        ("max 100000", 4, None),
        ("1000 100000", 1, 0.01),
        ("100000 100000", 1, 1.0),
        ("150000 100000", 1, 1.5),
        ("390000 100000", 3, 3.9),
        ("400000 100000", 4, None),
        ("999900000 100000", 4, None),
    ],
)
def test_cores_within_a_quota(
    quota: str, compute: int, bound: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, 8, {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    Quota(tmp_path, monkeypatch, quota)
    assert sensors.cpu_quota() == bound
    assert (sensors.compute_cores(), sensors.logical_cores()) == (compute, compute)
    # What runs on the other cores is no load of those that this process may use.
    assert sensors.load_average() == 9.0 - (8 - compute)
    suffix = " x8 cpuset 4" + (f" quota {bound:g}" if bound else "")
    assert sensors.cpu_name().endswith(suffix)


def test_a_limit_of_memory_counts_where_the_machine_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Quota(tmp_path, monkeypatch, "max 100000")
    total, limit = psutil.virtual_memory().total, 64 << 20
    assert (sensors.memory_total(), sensors.memory_limit()) == (total, None)
    tree(tmp_path / "cg", {"memory.max": str(limit), "memory.current": str(60 << 20)})
    assert (sensors.memory_total(), sensors.memory_limit()) == (limit, limit)
    assert sensors.memory_available() == sensors.memory_free()["memory_free"] == 4 << 20
    tree(tmp_path / "cg", {"memory.current": str(limit)})
    assert sensors.memory_available() == 0
    assert sensors.memory_free() == {"memory_free": 1}  # 0 would be taken for a failing sensor
    tree(tmp_path / "cg", {"memory.max": str(2 * total), "memory.current": "0"})
    assert (sensors.memory_total(), sensors.memory_limit()) == (total, None)
    assert sensors.memory_available() < total


def test_load_of_this_machine() -> None:
    load = sensors.ProcessorLoad()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    notes = load()
    assert 0.0 < notes["load"] <= 1.0
    assert 0.0 <= notes["others"] < notes["load"]


THINKPAD = {
    "AC/type": "Mains",
    "AC/online": "0",
    "BAT0/type": "Battery",
    "BAT0/status": "Discharging",
    "BAT0/power_now": "6527000",
    "BAT0/voltage_now": "11540000",
    "BAT1/type": "Battery",
    "BAT1/status": "Unknown",
    "BAT1/power_now": "4000000",
    "hidpp_battery_0/type": "Battery",
    "hidpp_battery_0/scope": "Device",
    "hidpp_battery_0/status": "Discharging",
    "hidpp_battery_0/power_now": "90000000",
}


@pytest.mark.parametrize(
    ("changes", "watts"),
    [
        ({}, 6.527),
        ({"BAT1/status": "Discharging"}, 10.527),
        ({"BAT0/power_now": "-6527000"}, 6.527),
        ({"BAT0/power_now": "", "BAT0/current_now": "1560000"}, 18.0024),
        ({"BAT0/power_now": "", "BAT0/current_now": "-1560000"}, 18.0024),
        ({"BAT0/power_now": "0"}, None),
        ({"BAT0/power_now": ""}, None),
        ({"BAT0/status": "Charging"}, None),
        ({"BAT0/status": "Full"}, None),
        ({"BAT0/status": "Not charging"}, None),
    ],
)
def test_watts_of_batteries_that_discharge(
    changes: dict[str, str], watts: float | None, tmp_path: Path
) -> None:
    notes = sysfs.battery_watts(tree(tmp_path, THINKPAD | changes))
    assert notes == ({} if watts is None else {"watts": pytest.approx(watts)})


def test_watts_raise_on_nonsense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        sysfs.battery_watts(tree(tmp_path, THINKPAD | {"BAT0/power_now": "nan"}))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"ADP1/type": "Mains", "ADP1/online": "1"}, True),
        ({"ADP1/type": "Mains", "ADP1/online": "0"}, False),
        ({"u:0/type": "USB", "u:0/online": "0", "u:1/type": "USB", "u:1/online": "1"}, True),
        ({"BAT0/type": "Battery", "BAT0/online": "1"}, None),
        ({}, None),
    ],
)
def test_mains_where_psutil_does_not_know(
    files: dict[str, str], expected: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(80.0, psutil.POWER_TIME_UNKNOWN, None))
    assert sensors.battery(tree(tmp_path, files))["plugged"] is expected


RANGE = 262_143_328_850
RAPL = {
    "intel-rapl/enabled": "1",
    "intel-rapl:0/name": "package-0",
    "intel-rapl:0/energy_uj": "1000000",
    "intel-rapl:0/max_energy_range_uj": str(RANGE),
    "intel-rapl:0:0/name": "core",
    "intel-rapl:0:0/energy_uj": "700000",
    "intel-rapl:0:0/max_energy_range_uj": str(RANGE),
    "intel-rapl:1/name": "package-1",
    "intel-rapl:1/energy_uj": "5000000",
    "intel-rapl:1/max_energy_range_uj": "65532610987",
    "intel-rapl:2/name": "psys",
    "intel-rapl:2/energy_uj": "9000000",
    "intel-rapl:2/max_energy_range_uj": str(RANGE),
    "intel-rapl-mmio:0/name": "package-0",
    "intel-rapl-mmio:0/energy_uj": "1000000",
    "intel-rapl-mmio:0/max_energy_range_uj": str(RANGE),
}


class Rapl:
    """Two packages, their parts and their second address, all counting."""

    def __init__(self, root: Path, first: int = 1_000_000) -> None:
        self.root, self.now = tree(root, RAPL | {"intel-rapl:0/energy_uj": str(first)}), 50.0
        self.read = sysfs.EnergyCounter(root, lambda: self.now)

    def use(self, seconds: float, first: int, second: int) -> float:
        """Joules notes after the packages' counters went to `first` and `second`."""
        self.now += seconds
        tree(self.root, {"intel-rapl:0/energy_uj": str(first), "intel-rapl:1/energy_uj": str(second)})
        others = ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0")
        tree(self.root, {f"{zone}/energy_uj": str(first + second) for zone in others})
        return self.read()["joules"]


def test_energy_of_packages_alone(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path)
    assert rapl.read() == {"joules": 0.0}
    assert rapl.use(1.0, 13_000_000, 6_500_000) == pytest.approx(13.5)
    assert rapl.use(1.0, 14_000_000, 6_500_000) == pytest.approx(14.5)


def test_energy_counters_wrap(tmp_path: Path) -> None:
    rapl = Rapl(tmp_path, first=RANGE - 3_000_000)
    assert rapl.use(1.0, 4_000_000, 5_000_000) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("seconds", "first", "second"),
    [
        (1.0, 0, 6_000_000),
        (300.0, 2_000_000, 6_000_000),
        (-5.0, 2_000_000, 6_000_000),
        (1.0, RANGE - 1, 6_000_000),
    ],
    ids=["set back", "too long to tell turns", "clock set back", "jump"],
)
def test_no_difference_over_a_break_is_energy(
    seconds: float, first: int, second: int, tmp_path: Path
) -> None:
    rapl = Rapl(tmp_path)
    before = rapl.read()["joules"]
    after = rapl.use(seconds, first, second)
    assert after < before
    assert rapl.use(1.0, first, second + 500_000_000) < before
    assert rapl.read()["joules"] - after == pytest.approx(500.0)


def test_no_energy_counters(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no energy counters"):
        sysfs.EnergyCounter(tmp_path)


def test_energy_counters_of_root_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def guarded(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    with pytest.raises(PermissionError, match="readable by root only"):
        sysfs.EnergyCounter(tree(tmp_path, RAPL))


TERMUX = {
    "present": True,
    "technology": "Li-ion",
    "health": "GOOD",
    "plugged": "UNPLUGGED",
    "status": "DISCHARGING",
    "temperature": "22.3",
    "voltage": 4000,
    "current": -820000,
    "percentage": 85,
    "energy": None,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"charge": 85.0, "plugged": False, "watts": 3.28}),
        ({"temperature": 31.5, "current": 820000}, {"charge": 85.0, "plugged": False, "watts": 3.28}),
        ({"current": -820}, {"charge": 85.0, "plugged": False, "watts": 3.28}),
        ({"plugged": "PLUGGED_AC"}, {"charge": 85.0, "plugged": True}),
        ({"plugged": "PLUGGED_USB", "current": 900000}, {"charge": 85.0, "plugged": True}),
        ({"voltage": None}, {"charge": 85.0, "plugged": False}),
        ({"current": None}, {"charge": 85.0, "plugged": False}),
        ({"current": 0}, {"charge": 85.0, "plugged": False}),
        ({"plugged": "<unknown>"}, {"charge": 85.0}),
    ],
)
def test_termux_battery(changes: dict[str, object], expected: dict[str, object]) -> None:
    assert platforms.parse_termux_battery(json.dumps(TERMUX | changes)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"error": "no permission"}', '{"percentage": "?"}'])
def test_termux_nonsense(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json has words of its own
        platforms.parse_termux_battery(text)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_termux_runs_its_own_program_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f".:{tmp_path}:{os.environ['PATH']}")
    program(tmp_path / "termux-battery-status", f"touch {tmp_path}/taken; echo '{json.dumps(TERMUX)}'")
    program(tmp_path / "bin" / "termux-battery-status", f"touch {tmp_path}/taken")
    with pytest.raises(LookupError, match="pkg install termux-api"):
        platforms.termux_battery(tmp_path / "usr")
    assert not (tmp_path / "taken").exists()
    program(tmp_path / "usr/bin/termux-battery-status", f"echo '{json.dumps(TERMUX)}'")
    assert platforms.termux_battery(tmp_path / "usr")["charge"] == 85.0


def test_termux_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """Without the Android app of that name, the program waits for ever, in a child of its own."""
    program(tmp_path / "bin/termux-battery-status", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took over 0\.5 s"):
        platforms.termux_battery(tmp_path, seconds=0.5)
    assert time.monotonic() - start < 1.5
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 1.0
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_program_that_fails_says_so(tmp_path: Path) -> None:
    failing = program(tmp_path / "notifyutil", "echo com.apple.system.thermalpressurelevel 0; exit 3")
    with pytest.raises(OSError, match="ended with status 3"):
        platforms.mac_pressure(failing)
    with pytest.raises(LookupError):
        platforms.mac_pressure(tmp_path / "nothing")


def test_mac_pressure(tmp_path: Path) -> None:
    tool = program(tmp_path / "notifyutil", 'test "$1" = -g && echo "$2 2"')
    assert platforms.mac_pressure(tool) == {"pressure": "serious"}


@pytest.mark.parametrize(
    ("level", "name"), [*enumerate(["nominal", "fair", "serious", "critical", "critical"])]
)
def test_mac_pressure_levels(level: int, name: str) -> None:
    text = f"com.apple.system.thermalpressurelevel {level}\n"
    assert platforms.parse_pressure(text) == {"pressure": name}


@pytest.mark.parametrize("text", ["", "com.apple.system.thermalpressurelevel 7", "Failed: 9", "2"])
def test_mac_pressure_nonsense(text: str) -> None:
    with pytest.raises(ValueError, match="notifyutil printed"):
        platforms.parse_pressure(text)


def test_what_is_dear_is_asked_seldom() -> None:
    now, asked = [0.0], []

    def source() -> dict[str, object]:
        asked.append(now[0])
        if 10 <= now[0] < 20:
            raise OSError("gone")
        return {"charge": float(len(asked))}

    seldom = platforms.Seldom(source, 10.0, lambda: now[0])
    notes: list[object] = []
    for now[0] in (0.0, 5.0, 9.9, 10.0, 15.0, 20.0, 3.0):
        try:
            notes.append(seldom()["charge"])
        except OSError as error:
            notes.append(str(error))
    assert notes == [1.0, 1.0, 1.0, "gone", "gone", 3.0, 4.0]
    assert asked == [0.0, 10.0, 20.0, 3.0]


def test_every_source_works_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found, reasons = sensors.sources(), sensors.missing()
    assert {"load", "memory"} <= set(found)
    assert not set(found) & set(reasons)
    assert all(reasons.values())
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: 1 / 0)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(50.0, -2, True))
    assert "load" not in sensors.sources()
    assert sensors.missing()["load"] == "division by zero"
    assert "battery" in sensors.sources()


def test_the_existing_figures_still_stand() -> None:
    assert 1 <= sensors.compute_cores() <= sensors.logical_cores()
    assert sensors.memory_free()["memory_free"] > 0
