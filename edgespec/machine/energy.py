"""Energy of a generation: joules where the machine measures them, processor time everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgespec.core import Reading

_SHORTEST = 3.0
_GAP = 5.0


@dataclass(frozen=True, slots=True)
class Energy:
    """`cpu_seconds` of this process, the sum of all its threads, and `joules` where they were measured.

    Joules from "powercap" are those of the processor packages, for all programs; those from "battery" are of
    the whole machine, including its screen.
    """

    cpu_seconds: float
    joules: float | None = None
    source: Literal["powercap", "battery"] | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """The start of a measurement. Only the Meter that created it can use it."""

    cpu: float
    reading: Reading
    drawn: float
    counter_breaks: int
    battery_breaks: int


class Meter:
    """Measures between two moments. For one thread.

    Joules come from readings taken about once per second, so that either end is off by up to one such step:
    where the readings are less than 3 s apart no value is reported. Nor is one where a counter decreased or
    was missing, or where the machine was not on battery, with watts to read, all the time. The battery
    reports only its current power, so `tick` needs a reading at least every 5 s.
    """

    def __init__(
        self, watch_latest: Callable[[], Reading], cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        """`watch_latest`: SensorMonitor.latest. `cpu_clock`: seconds of processor time of all threads."""
        self._latest, self._cpu_clock = watch_latest, cpu_clock
        self._last: Reading | None = None
        self._drawn = 0.0
        self._counter_breaks = self._battery_breaks = 0

    def tick(self, reading: Reading) -> None:
        """Integrate a reading; the same one may come again. Cheap enough for every round."""
        last, self._last = self._last, reading
        if last is None:
            return
        step = reading.time - last.time
        if last.joules is None or reading.joules is None or reading.joules < last.joules:
            self._counter_breaks += 1
        before, now = _drain(last), _drain(reading)
        if before is None or now is None or not 0.0 <= step <= _GAP:
            self._battery_breaks += 1
        else:
            self._drawn += step * (before + now) / 2

    def mark(self) -> Mark:
        """Return the current moment, for `since`."""
        reading = self._latest()
        self.tick(reading)
        return Mark(self._cpu_clock(), reading, self._drawn, self._counter_breaks, self._battery_breaks)

    def since(self, mark: Mark) -> Energy:
        """Return the energy used since `mark`, which stays valid; joules of the counter or the battery."""
        cpu, reading = self._cpu_clock() - mark.cpu, self._latest()
        self.tick(reading)
        if reading.time - mark.reading.time < _SHORTEST:
            return Energy(cpu)
        before, now = mark.reading.joules, reading.joules
        whole = self._counter_breaks == mark.counter_breaks
        if whole and before is not None and now is not None and now > before:  # else the counter is broken
            return Energy(cpu, now - before, "powercap")
        if _drain(reading) is not None and self._battery_breaks == mark.battery_breaks:
            return Energy(cpu, self._drawn - mark.drawn, "battery")
        return Energy(cpu)


def _drain(reading: Reading) -> float | None:
    """Return the battery's power in watts, None unless it is known to feed the machine alone."""
    return reading.watts if reading.plugged is False else None
