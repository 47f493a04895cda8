"""Reads the sensors once per second, and ignores those that are implausible."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from statistics import median_low
from typing import Any

from edgespec.core import Reading
from edgespec.machine import sensors
from edgespec.machine.sensors import SensorSource

log = logging.getLogger("edgespec.machine.monitor")

_RANGES = {
    "celsius": (math.nextafter(-20.0, 0.0), math.nextafter(120.0, 0.0)),
    "celsius_limit": (30.0, 130.0),
    "charge": (0.0, 100.0),
    "seconds_left": (0.0, 1e7),
    "frequency": (0.0, 3.0),
    "load": (0.0, 1.0),
    "others": (0.0, 1.0),
    "memory_free": (1, 2**60),
    "watts": (0.0, 1000.0),
    "joules": (-math.inf, math.inf),
    "slowdown": (0.0, 1000.0),
}
_FIELDS = {field.name for field in fields(Reading)} - {"time"}
_PRESSURES = {"nominal", "fair", "serious", "critical"}

_PATIENCE = 2.0  # seconds that a source may take
_SLOW = f"takes over {_PATIENCE:g} s"
_FRESH = 5.0  # seconds that a value is valid, and that may lie between two samples
_GOOD = 3  # consecutive samples after which a source is used again
_FROZEN, _MOVED = 60, 0.5  # samples of an unchanged temperature, while the load moved by this much
_SHARE = 0.004  # of a core: the most that sampling may use
_LONGEST = 4.0


class _Record:
    """One source, its last values, and whether it is ignored."""

    def __init__(self, source: SensorSource) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.time = -math.inf
        self.trouble: str | None = None
        self.stuck = False
        self._good = 0
        self._celsius: deque[float] = deque(maxlen=3)
        self._joules: float | None = None
        self.forget()

    def forget(self) -> None:
        """Do not compare the next values with earlier ones."""
        self._celsius.clear()
        self._joules = None
        self._same, self._same_celsius = 0, math.nan
        self._low, self._high = math.inf, -math.inf

    def ignore(self, why: str) -> bool:
        """Ignore the source. Return whether it was not ignored before."""
        news = self.trouble is None
        self.trouble, self._good, self.values = why, 0, {}
        self._celsius.clear()
        return news

    def take(self, values: dict[str, Any], now: float, load: float | None) -> bool:
        """Take plausible values of `now`. Return whether the source is ignored from now on."""
        why = self._compare(values, load)
        if why is not None:
            return self.ignore(why)
        if "celsius" in values:
            values["celsius"] = median_low(self._celsius)
        self._good += 1
        if self.trouble is None or self._good >= _GOOD:
            self.trouble, self.values, self.time = None, values, now
        return False

    def _compare(self, values: dict[str, Any], load: float | None) -> str | None:
        """Return what is implausible in `values` after the earlier ones, to which they are added."""
        joules, before = values.get("joules"), self._joules
        if joules is not None:
            self._joules = joules
            if before is not None and joules < before:
                return f"joules went down by {before - joules:g}"
        celsius = values.get("celsius")
        if celsius is None:
            values.pop("celsius", None)
            return None
        if celsius != self._same_celsius:
            self._same, self._same_celsius = 0, celsius
            self._low, self._high = math.inf, -math.inf
        self._same += 1
        if load is not None:
            self._low, self._high = min(self._low, load), max(self._high, load)
        if self._same >= _FROZEN and self._high - self._low > _MOVED:
            return f"celsius is stuck at {celsius:g} whatever the load"
        self._celsius.append(celsius)
        return None


def _flaw(name: str, value: Any) -> str | None:
    """Return why `value` cannot be the field `name` of a Reading, None if it can. May raise."""
    if name not in _FIELDS:
        return f"{name!r} is not a field of a reading"
    if value is None:
        return None
    if name in _RANGES:
        low, high = _RANGES[name]
        number = isinstance(value, int) or (isinstance(value, float) and name != "memory_free")
        if isinstance(value, bool) or not number:
            return f"{name} is of type {type(value).__name__}"
        return None if low <= value <= high and math.isfinite(value) else f"{name} is {value:g}"
    if name == "plugged":
        return None if isinstance(value, bool) else f"plugged is of type {type(value).__name__}"
    return None if isinstance(value, str) and value in _PRESSURES else "pressure is not a known level"


def _words(error: Exception) -> str:
    """Return one line about any exception."""
    try:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except Exception:  # noqa: BLE001 - its __str__ may fail in any way
        return type(error).__name__


class SensorMonitor:
    """Samples sensors in a thread of its own. `latest` is for any thread, never blocks and never raises.

    A source is ignored when it raises, takes over 2 s, returns impossible values, returns fewer joules than
    before, or repeats one temperature 60 times while the load moves by half; its fields are None until three
    consecutive good samples, and one warning is logged. A temperature is the median of its last three
    samples. After a jump of the clock (the machine was suspended) nothing is compared with earlier values. A
    source that does not return keeps its thread, and another thread continues with the others.

    Sampling is slowed down, to 4 s at most, where it would take more than 0.4% of a core.
    """

    def __init__(
        self,
        sources: Mapping[str, SensorSource] | None = None,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sources`: name → source; the first to return a field counts. Default: sensors.sources()."""
        self._records = None if sources is None else _records(sources)
        self._interval, self._clock = interval, clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._turn = 0  # of the thread that may continue: any other ends when it reads this
        self._asked: tuple[_Record, str, float] | None = None
        self._sampled: float | None = None
        self._news: list[str] = []

    def start(self) -> None:
        """Start sampling, unless it has started."""
        with self._lock:
            if self._thread is None:
                self._stop.clear()
                self._spawn()

    def close(self) -> None:
        """Stop sampling. A thread that a source blocks is not waited for."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._turn += 1
            self._stop.set()
        if thread is not None:
            thread.join(0.5)
        with self._lock:
            if self._asked is not None:  # so that a thread started later skips the source
                self._asked[0].stuck, self._asked = True, None

    @property
    def troubles(self) -> dict[str, str]:
        """Each source that is ignored now, and why."""
        with self._lock:
            self._notice(self._clock())
            records = self._records or {}
            return {name: record.trouble for name, record in records.items() if record.trouble is not None}

    def latest(self) -> Reading:
        """Return the values of at most 5 s ago. `time` is that of the newest sample, now if there is none."""
        with self._lock:
            now = self._clock()
            self._notice(now)
            values: dict[str, Any] = {}
            newest = -math.inf
            for record in (self._records or {}).values():
                if 0.0 <= now - record.time <= _FRESH:
                    newest = max(newest, record.time)
                    for name, value in record.values.items():
                        if value is not None:
                            values.setdefault(name, value)
            return Reading(time=newest if newest > -math.inf else now, **values)

    def sample(self) -> Reading:
        """Sample every source in this thread, unless the other one runs, and return `latest`.

        A source that blocks also blocks this.
        """
        with self._lock:
            running, turn = self._thread is not None, self._turn
        if not running:
            self._sample(turn)
        return self.latest()

    def _spawn(self) -> None:
        self._turn += 1
        self._thread = threading.Thread(
            target=self._run, args=(self._turn,), name="edgespec-watch", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # no more threads: readings expire, without further consequences
            self._thread = None

    def _run(self, turn: int) -> None:
        cost = 0.0
        while turn == self._turn:
            before = time.thread_time()
            self._sample(turn)
            cost += 0.2 * (time.thread_time() - before - cost)
            self._stop.wait(max(self._interval, min(cost / _SHARE, _LONGEST)))

    def _sample(self, turn: int) -> None:
        """Sample every source once, unless another thread takes over."""
        if self._records is None:
            self._records = _records(sensors.sources())
        with self._lock:
            now, before = self._clock(), self._sampled
            self._sampled = now
            if before is not None and not 0.0 <= now - before <= _FRESH:
                for record in self._records.values():
                    record.forget()
        self._log_news()
        for name, record in self._records.items():
            with self._lock:
                if turn != self._turn:
                    return
                if record.stuck:
                    continue
                asked = self._asked = (record, name, self._clock())
            values: dict[str, Any] = {}
            try:
                values = dict(record.source())
                why = next((flaw for item in values.items() if (flaw := _flaw(*item))), None)
            except Exception as error:  # noqa: BLE001 - a sensor's driver can fail in any way
                why = _words(error)
            with self._lock:
                record.stuck = False
                if self._asked is asked:
                    self._asked = None
                if turn != self._turn:
                    return
                now = self._clock()
                if now - asked[2] > _PATIENCE:
                    why = _SLOW
                if record.ignore(why) if why else record.take(values, now, self._load()):
                    self._news.append(f"ignoring sensor {name}: {record.trouble}")
        self._log_news()

    def _load(self) -> float | None:
        for record in (self._records or {}).values():
            if "load" in record.values:
                load: float | None = record.values["load"]
                return load
        return None

    def _notice(self, now: float) -> None:
        """Leave a source that does not return to its thread. Called with the lock held."""
        if self._asked is None or now - self._asked[2] <= _PATIENCE:
            return
        record, name, _ = self._asked
        self._asked, record.stuck = None, True
        if record.ignore(_SLOW):
            self._news.append(f"ignoring sensor {name}: {record.trouble}")
        if self._thread is not None:
            self._spawn()

    def _log_news(self) -> None:
        """Log new warnings: never in `latest`, as logging may wait for a disk."""
        with self._lock:
            news, self._news = self._news, []
        for line in news:
            log.warning("%s", line)


def _records(sources: Mapping[str, SensorSource]) -> dict[str, _Record]:
    return {name: _Record(source) for name, source in sources.items()}
