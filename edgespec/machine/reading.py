"""Readings of the machine as JSON values and as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgespec.core import Reading


def reported_fields(reading: Reading | None) -> dict[str, Any]:
    """Return the fields that have values, without `time`."""
    if reading is None:
        return {}
    return {name: value for name, value in asdict(reading).items() if value is not None and name != "time"}


def descriptions(reading: Reading | None) -> list[str]:
    """Return the same as text, one string per field."""
    words = {
        "celsius": "{:.0f} °C",
        "celsius_limit": "limit {:.0f} °C",
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
    fields = reported_fields(reading)
    if "memory_free" in fields:
        fields["memory_free"] /= 1e6
    return [words[name].format(value) for name, value in fields.items()]
