"""Power and energy in files of Linux. Source: Documentation/ABI/testing/sysfs-class-power and -powercap.

Every function takes the folder that it reads, so that tests can use a recorded tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWER_SUPPLY = Path("/sys/class/power_supply")
POWERCAP = Path("/sys/class/powercap")

_MOST_WATTS = 1000.0
_BREAK = 1e9


def _text(path: Path) -> str:
    """Return the content of a file of one line, "" if there is no such file."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""


def batteries(root: Path = POWER_SUPPLY) -> list[Path]:
    """Return the folders of the machine's own batteries, not of its mouse's."""
    return [
        folder
        for folder in sorted(root.glob("*"))
        if _text(folder / "type") == "Battery" and _text(folder / "scope") != "Device"
    ]


def mains(root: Path = POWER_SUPPLY) -> bool | None:
    """Whether an adapter or a USB port feeds the machine, None where no file reports it."""
    supplies = [folder for folder in sorted(root.glob("*")) if _text(folder / "type") in {"Mains", "USB"}]
    online = [value for value in (_text(folder / "online") for folder in supplies) if value]
    return any(value != "0" for value in online) if online else None


def battery_watts(root: Path = POWER_SUPPLY) -> dict[str, float]:
    """Return `watts` that the batteries deliver in total, nothing while none of them discharges.

    Drivers differ in the sign of a current out of the battery, so its status decides and the sign is dropped.
    A value of zero is from a gauge that has not measured yet. Raises OSError and ValueError as the files do.
    """
    watts = 0.0
    for battery in batteries(root):
        if _text(battery / "status") != "Discharging":
            continue
        power, current, voltage = (_text(battery / f"{name}_now") for name in ("power", "current", "voltage"))
        if power:
            watts += abs(int(power)) * 1e-6
        elif current and voltage:
            watts += abs(int(current) * int(voltage)) * 1e-12
    return {"watts": watts} if watts > 0 else {}


class EnergyCounter:
    """Measures `joules` that the processor's packages used since the first call, from /sys/class/powercap.

    The counters run to max_energy_range_uj and start again at 0, which is corrected as long as calls are
    frequent enough to distinguish one overflow from two. Where they are not, or a counter was reset (as a
    suspended machine does), the sum decreases by far more than it ever reaches: no difference over such a
    break looks like energy.
    """

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises LookupError without counters, and PermissionError where only root may read them."""
        # The second address of the same packages, intel-rapl-mmio:N, and their parts, intel-rapl:N:M, would
        # count twice what the package has counted; "psys" is the whole machine.
        self._zones = [
            zone for zone in sorted(root.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")
        ]
        if not self._zones:
            raise LookupError("the system has no energy counters")
        self._ranges = [int(_text(zone / "max_energy_range_uj")) for zone in self._zones]
        self._clock = clock
        self._time, self._last = clock(), self._counters()
        self._joules = 0.0

    def __call__(self) -> dict[str, float]:
        now, counters = self._clock(), self._counters()
        elapsed = now - self._time
        used = [(new - old) % size for new, old, size in zip(counters, self._last, self._ranges, strict=True)]
        most = _MOST_WATTS * (elapsed + 1.0) * 1e6
        if elapsed >= 0 and most < min(self._ranges) and max(used) < most:
            self._joules += sum(used) * 1e-6
        else:
            self._joules -= _BREAK
        self._time, self._last = now, counters
        return {"joules": self._joules}

    def _counters(self) -> list[int]:
        try:
            return [int((zone / "energy_uj").read_text("ascii")) for zone in self._zones]
        except PermissionError as error:
            raise PermissionError("the energy counters are readable by root only") from error
