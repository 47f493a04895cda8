"""Readings of the machine, for reports and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgespec.core import Reading


def told_fields(reading: Reading | None) -> dict[str, Any]:
    """What a reading says, without what it does not."""
    if reading is None:
        return {}
    return {name: value for name, value in asdict(reading).items() if value is not None and name != "time"}


def told(reading: Reading | None) -> list[str]:
    """The same in words."""
    words = {
        "celsius": "{:.0f} °C",
        "celsius_limit": "its limit {:.0f} °C",
        "charge": "battery at {:.0f}%",
        "plugged": "plugged in: {}",
        "seconds_left": "{:.0f} s of battery left",
        "frequency": "processor at {:.0%} of its frequency",
        "load": "load {:.0%}",
        "others": "other programs {:.0%}",
        "memory_free": "{:,.0f} MB of memory free",
        "watts": "{:.1f} W",
        "joules": "{:.0f} J used so far",
        "pressure": "thermal pressure {}",
        "slowdown": "a token takes {:.2f} times its best",
    }
    told = told_fields(reading)
    if "memory_free" in told:
        told["memory_free"] /= 1e6
    return [words[name].format(value) for name, value in told.items()]
