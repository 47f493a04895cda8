"""The cores of this processor, by kind."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TypedDict

_CPUS = Path("/sys/devices/system/cpu")
_MEASURES = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")


class CoreKind(TypedDict):
    """Cores alike: "fast", "slow" and so on where there are several kinds, else "equal"."""

    name: str
    cores: int


def core_kinds(root: Path = _CPUS) -> list[CoreKind]:
    """Return the logical processors by kind, the fastest first, as the Linux kernel distinguishes them.

    By `cpu_capacity` (Arm) or the highest frequency; frequencies within a tenth are one kind, since favored
    cores of one design differ by that. An empty list elsewhere, and where the kernel does not report it.
    """
    if sys.platform != "linux" and root is _CPUS:
        return []
    speeds: Counter[int] = Counter()
    for core in root.glob("cpu[0-9]*"):
        for measure in _MEASURES:
            try:
                speeds[int((core / measure).read_text())] += 1
                break
            except (OSError, ValueError):
                continue
    groups: list[tuple[int, int]] = []
    for speed, cores in sorted(speeds.items(), reverse=True):
        if groups and speed >= 0.9 * groups[-1][0]:
            groups[-1] = (groups[-1][0], groups[-1][1] + cores)
        else:
            groups.append((speed, cores))
    names = ["equal"] if len(groups) == 1 else ["fast", *["middle"] * (len(groups) - 2), "slow"]
    return [{"name": name, "cores": cores} for name, (_, cores) in zip(names, groups, strict=False)]
