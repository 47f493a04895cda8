"""Sensors of this machine. The only file that imports psutil."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from edgespec.machine import cgroup, platforms, sysfs

SensorSource = Callable[[], Mapping[str, object]]
"""Returns fields of a Reading by name, those known at this moment. May raise any exception."""

# Matched with "driver/label", best first: drivers of processors, zones and labels named after them, the
# board's firmware, which on a machine without any of these often measures the processor.
_PROCESSOR = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(coretemp|k10temp|k8temp|zenpower|fam15h_power|via_cputemp)/",
        r"^(cpu|soc|x86_pkg)[^/]*/|^[^/]*[-_](cpu|soc)[^/]*/|/(CPU|Package|Tctl|Tdie|Core)\b",
        r"^acpitz/",
    )
)
_MARGIN = 5.0
_SHORTEST = 0.2


@cache
def limits() -> cgroup.Limits:
    """Return the limits of control groups on this process, as they are at the first call."""
    return cgroup.Limits()


def compute_cores() -> int:
    """Return the cores worth a compute thread: physical ones that this process may use."""
    allowed = logical_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def logical_cores() -> int:
    """Return how many threads run at once on cores that this process may use.

    Two per core with hyper-threading. Within a quota, as many as can always run: with one more, all of
    them wait once the quota is used up.
    """
    return max(1, int(cpu_quota() or _affinity()))


def cpu_quota() -> float | None:
    """Return how many processors this process may use on average, possibly fractional.

    None where no quota of its control groups keeps it from any that it may run on.
    """
    quota = limits().processors
    return quota if quota is not None and quota < _affinity() else None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, its number of cores, and how many of them this process may use.

    For keys, not for people: a measurement on fewer cores, or within a quota, is valid only there.
    """
    name = ""
    if sys.platform == "linux":  # where `platform` would start a process
        with contextlib.suppress(OSError):
            text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
            lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            fields = {key.strip(): value.strip() for key, value in lines.items()}
            name = " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    cores, allowed, quota = os.cpu_count(), _affinity(), cpu_quota()
    name = f"{name or platform.processor() or platform.machine()} x{cores}"
    name += f" cpuset {allowed}" if allowed != cores else ""
    return name + (f" quota {quota:g}" if quota is not None else "")


def load_average() -> float:
    """Return how many threads ran or waited for a processor over the last minute, 0.0 where unavailable.

    Less as many as can run on cores that this process may not use: those take nothing from it.
    """
    spare = (os.cpu_count() or 1) - logical_cores()
    return max(0.0, os.getloadavg()[0] - spare) if hasattr(os, "getloadavg") else 0.0


def memory_available() -> int:
    """Return the bytes a program can take without swapping, within the limits of control groups."""
    free, left = int(psutil.virtual_memory().available), limits().memory_available()
    return free if left is None else min(free, left)


def memory_limit() -> int | None:
    """Return the bytes that control groups allow this process, None where that is all the machine has."""
    limit = limits().memory_total()
    return limit if limit is not None and limit < psutil.virtual_memory().total else None


def memory_total() -> int:
    """Return the bytes of memory that this machine has, or that control groups allow of it."""
    return memory_limit() or int(psutil.virtual_memory().total)


def peak_memory() -> int | None:
    """Return the most memory this process ever held, in bytes, None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def process_runs(pid: int) -> bool:
    """Whether there is a process of that number."""
    return psutil.pid_exists(pid)


def process_memory(pid: int) -> int | None:
    """Return the resident memory of another process in bytes, None if it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def temperature() -> dict[str, float]:
    """Return `celsius` of the hottest processor sensor, and `celsius_limit` where that sensor has one.

    The first kind of `_PROCESSOR` that exists decides. Sensors of anything else (disks, radios, graphics,
    boards) are never used. The limit is the sensor's "high", else 5 degrees below its "critical"; one outside
    50 to 115 °C is a meaningless default. Raises LookupError without such a sensor.
    """
    read = getattr(psutil, "sensors_temperatures", None)
    if read is None:
        raise LookupError("the system reports no temperatures")
    groups = read()
    for kind in _PROCESSOR:
        found = [s for name, group in groups.items() for s in group if kind.search(f"{name}/{s.label}")]
        # On some AMD processors Tctl is Tdie plus a constant, for fan control.
        if any(s.label == "Tdie" for s in found):
            found = [s for s in found if s.label != "Tctl"]
        if found:
            hottest = max(found, key=lambda sensor: sensor.current)
            return {"celsius": hottest.current} | _limit(hottest.high, hottest.critical)
    raise LookupError("the system has no temperature sensor of the processor")


def _limit(high: float | None, critical: float | None) -> dict[str, float]:
    # psutil returns one for the other where one is missing.
    limit = critical - _MARGIN if critical is not None and (high is None or high >= critical) else high
    return {"celsius_limit": limit} if limit is not None and 50.0 <= limit <= 115.0 else {}


def battery(root: Path = sysfs.POWER_SUPPLY) -> dict[str, float | bool | None]:
    """Return `charge`, `plugged` and, on battery, `seconds_left`. Raises LookupError without a battery."""
    found: Any = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if found is None:
        raise LookupError("the system has no battery")
    # psutil divides the charge by the charge once full: a new battery has a little more.
    charge = 100.0 if 100.0 < found.percent < 110.0 else found.percent
    plugged = found.power_plugged
    if plugged is None:  # psutil knows two names of adapters, and no battery that stops charging below 100%
        plugged = sysfs.mains(root)
    left = found.secsleft if plugged is False and found.secsleft >= 0 else None  # the constants are negative
    return {"charge": charge, "plugged": plugged, "seconds_left": left}


def frequency() -> dict[str, float]:
    """Return `frequency` as a share of the maximum. Raises LookupError if only the nominal one is known."""
    found = psutil.cpu_freq() if sys.platform.startswith(("linux", "android")) else None
    if found is None or not found.max:
        raise LookupError("the system does not report the processor's frequency and its maximum")
    return {"frequency": found.current / found.max}


class ProcessorLoad:
    """Measures `load` and `others` between two calls, over the cores this process may use then.

    Returns nothing at the first call, and the last values within 0.2 s of them, as counters tick in
    hundredths. Time that the host takes from a virtual machine counts as other programs'. So does that of
    this process's children: it is known only when they end.

    Within a quota both are shares of it. Other programs' share is what they use in the same control group,
    or, whichever is more, what they use of the machine beyond the cores that the quota leaves to them.
    """

    def __init__(self) -> None:
        self._cores = _core_times()
        self._own, self._time = time.process_time(), time.monotonic()
        self._shared = limits().processor_seconds()
        self._last: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        now = time.monotonic()
        if now - self._time < _SHORTEST:
            return self._last
        before, own_before, shared_before = self._cores, self._own, self._shared
        self._cores, self._own, self._time = _core_times(), time.process_time(), now
        self._shared = limits().processor_seconds()
        pairs = list(zip(before, self._cores, strict=False))
        # The list skips cores that are offline: then core numbers are unknown, and all count.
        allowed = [core for core in _allowed_cores() if core < len(pairs)]
        if len(before) != len(self._cores) or not allowed:
            allowed = list(range(len(pairs)))
        total = sum(pairs[core][1][0] - pairs[core][0][0] for core in allowed)
        idle = sum(pairs[core][1][1] - pairs[core][0][1] for core in allowed)
        if total <= 0:
            return {}
        busy, own = total - idle, self._own - own_before
        if (quota := cpu_quota()) is not None:
            usable = total * min(1.0, quota / len(allowed))
            inside = 0.0 if self._shared is None or shared_before is None else self._shared - shared_before
            others = max(busy - own - (total - usable), inside - own, 0.0)
            total, busy = usable, own + others
        load = min(1.0, max(0.0, busy / total))
        self._last = {"load": load, "others": min(load, max(0.0, load - own / total))}
        return self._last


def _core_times() -> list[tuple[float, float]]:
    """Return the seconds that each core has run, and those of them it was idle."""
    times = []
    for core in psutil.cpu_times(percpu=True):
        found = core._asdict()
        # Guest time is already in "user".
        total = sum(found.values()) - found.get("guest", 0.0) - found.get("guest_nice", 0.0)
        times.append((total, found["idle"] + found.get("iowait", 0.0)))
    return times


def _allowed_cores() -> list[int]:
    # Of the process's first thread: the sampling thread keeps the cores that it was started with.
    known = hasattr(os, "sched_getaffinity")
    return sorted(os.sched_getaffinity(os.getpid())) if known else list(range(os.cpu_count() or 1))


def memory_free() -> dict[str, int]:
    """Return `memory_free` in bytes, at least 1: a full control group is no failing sensor."""
    return {"memory_free": max(1, memory_available())}


def sources() -> dict[str, SensorSource]:
    """Return the sources of this machine: name → a function that returns fields of a Reading, or raises.

    Each was called once, so this takes as long as the slowest.
    """
    return _survey()[0]


def missing() -> dict[str, str]:
    """Return the sources that this machine lacks, and why."""
    return _survey()[1]


def _survey() -> tuple[dict[str, SensorSource], dict[str, str]]:
    """Try all sources. Where two return the same field, the earlier one counts."""
    makers: dict[str, Callable[[], SensorSource]] = {
        "temperature": lambda: temperature,
        "battery": lambda: battery,
        "frequency": lambda: frequency,
        "load": ProcessorLoad,
        "memory": lambda: memory_free,
    }
    if sys.platform.startswith(("linux", "android")):
        makers |= {"watts": lambda: _battery_watts, "energy": sysfs.EnergyCounter}
    if sys.platform == "darwin":
        makers["pressure"] = lambda: platforms.Seldom(platforms.mac_pressure, 5.0)
    if platforms.TERMUX.is_dir():
        makers["termux"] = lambda: platforms.Seldom(platforms.termux_battery, 10.0)
    found: dict[str, SensorSource] = {}
    reasons = {}
    for name, make in makers.items():
        try:
            source = make()
            source()
        except Exception as error:  # noqa: BLE001 - a sensor's driver can fail in any way
            reasons[name] = str(error) or type(error).__name__
        else:
            found[name] = source
    return found, reasons


def _battery_watts() -> dict[str, float]:
    if not sysfs.batteries():
        raise LookupError("the system has no battery")
    return sysfs.battery_watts()
