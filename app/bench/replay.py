"""The governor without a machine: recorded readings, and half an hour of simulated heat.

`edgespec bench replay TRACE` shows its decisions; `bench replay heat` feeds them back into a thermal model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgespec.core import EdgespecError, Reading
from edgespec.machine.governor import LADDER, LIMIT, Governor, Mode

_MOST = 10_000_000  # bytes of a trace
_STEP = 0.1  # seconds of the simulation
_RESTS = [share / 100 for share in range(0, 91)]


def read_trace(path: Path) -> list[Reading]:
    """Read sensor readings from JSON lines in order of time. Raises EdgespecError for anything else."""
    known = {field.name for field in fields(Reading)}
    readings: list[Reading] = []
    try:
        with path.open("rb") as file:
            lines = file.read(_MOST).decode().splitlines()
    except OSError as error:
        raise EdgespecError(f"cannot read the trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EdgespecError(f"the trace {path} is not text in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not set(row) <= known or not _is_sound(row):
                raise ValueError(line)
        except (ValueError, RecursionError):
            raise EdgespecError(
                f"{path}, line {number} is no reading: write JSON with time and any of {', '.join(known)}"
            ) from None
        if readings and row["time"] <= readings[-1].time:
            raise EdgespecError(f"{path}, line {number}: time must increase from line to line")
        readings.append(Reading(**row))
    if not readings:
        raise EdgespecError(f"the trace {path} is empty")
    return readings


def _is_sound(row: Mapping[str, Any]) -> bool:
    def good(name: str, value: object) -> bool:
        if value is None:
            return name != "time"
        if name == "plugged":
            return isinstance(value, bool)
        if name == "pressure":
            return isinstance(value, str)
        if name == "memory_free":
            return type(value) is int
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]

    return "time" in row and all(good(name, value) for name, value in row.items())


def replay(readings: Sequence[Reading], mode: Mode = "auto") -> list[dict[str, Any]]:
    """The decisions, one for each change of mode: time, mode, reason and share of rest."""
    governor = Governor(mode)
    rows: list[dict[str, Any]] = []
    for reading in readings:
        decision = governor.decide(reading)
        row = {
            "time": reading.time,
            "mode": decision.mode,
            "reason": decision.reason,
            "rest": round(decision.budget.rest, 3),
        }
        if not rows or rows[-1]["mode"] != row["mode"]:
            rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine with first-order cooling.

    `speeds` are tokens per second and `cores` CPU seconds per second, by mode. Heat is `idle` plus `watts`
    per busy core; the temperature approaches `ambient` + `resistance` (°C per watt) times heat with the time
    constant `tau` in seconds, and the sensor follows with the time constant `lag`, in half degrees.
    """

    speeds: Mapping[Mode, float]
    cores: Mapping[Mode, float]
    watts: float = 9.0
    idle: float = 2.0
    ambient: float = 25.0
    resistance: float = 3.5
    tau: float = 60.0
    lag: float = 2.0

    def settles(self, mode: Mode, rest: float) -> float:
        """The temperature that a mode with a share of rest settles at, in °C."""
        return self.ambient + self.resistance * (self.idle + self.watts * self.cores[mode] * (1.0 - rest))


LAPTOP = Machine(
    speeds={"performance": 37.0, "balanced": 37.0, "saver": 25.0},
    cores={"performance": 2.0, "balanced": 2.0, "saver": 1.0},
)
"""Speeds of a 1.5B model on two threads and on one; two busy cores settle 10 °C above the limit."""


@dataclass(frozen=True, slots=True)
class ReplayCourse:
    """A simulated half hour: seconds, °C and modes at each second, and tokens per second overall."""

    times: tuple[float, ...]
    celsius: tuple[float, ...]
    modes: tuple[Mode, ...]
    speed: float

    @property
    def peak(self) -> float:
        return max(self.celsius)


def simulate(machine: Machine, governor: Governor, minutes: float = 30.0) -> ReplayCourse:
    """Simulate continuous generation under `governor`, starting from an idle machine."""
    celsius = sensed = machine.settles("performance", 1.0)
    tokens = 0.0
    seconds: list[tuple[float, float, Mode]] = []
    for tick in range(round(minutes * 60 / _STEP)):
        now = tick * _STEP
        if tick % round(1 / _STEP) == 0:
            decision = governor.decide(Reading(now, celsius=round(2 * sensed) / 2, plugged=True))
            seconds.append((now, celsius, decision.mode))
        rest = decision.budget.rest / (1.0 + decision.budget.rest)
        tokens += machine.speeds[decision.mode] * (1.0 - rest) * _STEP
        celsius += (machine.settles(decision.mode, rest) - celsius) * _STEP / machine.tau
        sensed += (celsius - sensed) * _STEP / machine.lag
    times, temperatures, modes = zip(*seconds, strict=True)
    return ReplayCourse(times, temperatures, modes, tokens / (minutes * 60))


def best_fixed(machine: Machine, limit: float = LIMIT) -> tuple[Mode, float, float]:
    """The fastest mode with a fixed share of rest that settles within `limit`: mode, share, tokens/s.

    Raises ValueError if there is none.
    """
    choices = [
        (machine.speeds[mode] * (1.0 - rest), mode, rest)
        for mode in LADDER
        for rest in _RESTS
        if machine.settles(mode, rest) <= limit
    ]
    if not choices:
        raise ValueError("no setting holds the limit")
    speed, mode, rest = max(choices, key=lambda choice: choice[0])
    return mode, rest, speed


def heat(machine: Machine = LAPTOP) -> dict[str, Any]:
    """Simulate half an hour of `auto`, of `performance`, and the best fixed setting on the same machine."""
    auto, fixed = simulate(machine, Governor("auto")), simulate(machine, Governor("performance"))
    mode, rest, speed = best_fixed(machine)
    return {
        "limit": LIMIT,
        "auto": _course_json(auto),
        "performance": _course_json(fixed),
        "best_fixed": {"mode": mode, "rest": rest, "tokens_per_second": speed},
        "share_of_best_fixed": auto.speed / speed,
    }


def _course_json(course: ReplayCourse) -> dict[str, Any]:
    changes = sum(a != b for a, b in zip(course.modes, course.modes[1:], strict=False))
    return {
        "tokens_per_second": course.speed,
        "peak": course.peak,
        "changes": changes,
        "celsius": [round(celsius, 2) for celsius in course.celsius],
    }


def lines(report: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Format a replay for people."""
    for row in report:
        rest = f", rest {row['rest']:.0%}" if row["rest"] else ""
        yield f"{row['time']:8.0f} s  {row['mode']:<11} {row['reason']}{rest}"


def heat_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Format a simulation for people."""
    best = report["best_fixed"]
    for name in ("auto", "performance"):
        row = report[name]
        yield f"{name:<12} {row['tokens_per_second']:5.1f} tokens/s, peak {row['peak']:.1f} °C"
    yield (
        f"best fixed   {best['tokens_per_second']:5.1f} tokens/s: {best['mode']}, "
        f"resting {best['rest']:.0%}; auto reaches {report['share_of_best_fixed']:.0%} of it"
    )
