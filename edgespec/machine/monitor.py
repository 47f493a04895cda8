"""Reads the sensors once a second, and believes no sensor more than it deserves."""

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
_SLOW = f"it takes over {_PATIENCE:g} s"
_FRESH = 5.0  # seconds that a value stands, and that may lie between two samples
_GOOD = 3  # samples in a row that win trust back
_FROZEN, _MOVED = 60, 0.5  # samples of one temperature, while the load moved by this much
_SHARE = 0.004  # of a core that sampling may take
_LONGEST = 4.0


class _Record:
    """One source, what it said, and how far it is believed."""

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
        """What was seen before is not compared with what comes."""
        self._celsius.clear()
        self._joules = None
        self._same, self._same_celsius = 0, math.nan
        self._low, self._high = math.inf, -math.inf

    def distrust(self, why: str) -> bool:
        """Whether that is news."""
        news = self.trouble is None
        self.trouble, self._good, self.values = why, 0, {}
        self._celsius.clear()
        return news

    def take(self, values: dict[str, Any], now: float, load: float | None) -> bool:
        """Take plausible values of `now`. Whether they cost the source its trust."""
        why = self._compare(values, load)
        if why is not None:
            return self.distrust(why)
        if "celsius" in values:
            values["celsius"] = median_low(self._celsius)
        self._good += 1
        if self.trouble is None or self._good >= _GOOD:
            self.trouble, self.values, self.time = None, values, now
        return False

    def _compare(self, values: dict[str, Any], load: float | None) -> str | None:
        """What is wrong with `values` in the light of earlier ones, which they join."""
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
            return f"celsius stands still at {celsius:g} whatever the load"
        self._celsius.append(celsius)
        return None


def _flaw(name: str, value: Any) -> str | None:
    """Why `value` cannot be the field `name` of a Reading, None if it can. Raises on odder things."""
    if name not in _FIELDS:
        return "it tells what no reading has"
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
    return None if isinstance(value, str) and value in _PRESSURES else "pressure is no level known"


def _words(error: Exception) -> str:
    """One line on an error of unknown making."""
    try:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except Exception:  # noqa: BLE001 - as its text may be a program too
        return type(error).__name__


class SensorMonitor:
    """A sampler in a thread of its own. `latest` is for any thread, never waits and never raises.

    A source is distrusted when it raises, takes over 2 s, gives what cannot be, gives less joules than
    before, or repeats one temperature 60 times while the load moves by half; its fields are None until it was
    good three times in a row, and one warning says so. A temperature is the median of its last three samples.
    After a jump of the clock (a machine that slept) nothing is compared with what was before. A source that
    does not return is left to its thread, and another goes on with the others.

    Sampling is slowed down, to 4 s at most, where it would take more than 0.4% of a core.
    """

    def __init__(
        self,
        sources: Mapping[str, SensorSource] | None = None,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sources`: name → source, where the first to give a field counts; by default sensors.sources()."""
        self._records = None if sources is None else _records(sources)
        self._interval, self._clock = interval, clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._turn = 0  # of the thread that may go on: any other ends when it sees this
        self._asked: tuple[_Record, str, float] | None = None
        self._sampled: float | None = None
        self._news: list[str] = []

    def start(self) -> None:
        """Begin to sample, if not yet begun."""
        with self._lock:
            if self._thread is None:
                self._stop.clear()
                self._spawn()

    def close(self) -> None:
        """End sampling. A thread that a source holds is not waited for."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._turn += 1
            self._stop.set()
        if thread is not None:
            thread.join(0.5)
        with self._lock:
            if self._asked is not None:  # so that a thread started later leaves the source alone
                self._asked[0].stuck, self._asked = True, None

    @property
    def troubles(self) -> dict[str, str]:
        """Each source that is not believed now, and why."""
        with self._lock:
            self._notice(self._clock())
            records = self._records or {}
            return {name: record.trouble for name, record in records.items() if record.trouble is not None}

    def latest(self) -> Reading:
        """What is known and at most 5 s old. `time` is of the newest sample, now if there is none."""
        with self._lock:
            now = self._clock()
            self._notice(now)
            told: dict[str, Any] = {}
            newest = -math.inf
            for record in (self._records or {}).values():
                if 0.0 <= now - record.time <= _FRESH:
                    newest = max(newest, record.time)
                    for name, value in record.values.items():
                        if value is not None:
                            told.setdefault(name, value)
            return Reading(time=newest if newest > -math.inf else now, **told)

    def sample(self) -> Reading:
        """Ask every source now, in this thread, then `latest`. While the other thread samples, only that.

        A source that hangs, hangs this.
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
        except RuntimeError:  # no more threads: readings grow old, and nothing else
            self._thread = None

    def _run(self, turn: int) -> None:
        cost = 0.0
        while turn == self._turn:
            before = time.thread_time()
            self._sample(turn)
            cost += 0.2 * (time.thread_time() - before - cost)
            self._stop.wait(max(self._interval, min(cost / _SHARE, _LONGEST)))

    def _sample(self, turn: int) -> None:
        """One sample of every source, unless another thread takes over."""
        if self._records is None:
            self._records = _records(sensors.sources())
        with self._lock:
            now, before = self._clock(), self._sampled
            self._sampled = now
            if before is not None and not 0.0 <= now - before <= _FRESH:
                for record in self._records.values():
                    record.forget()
        self._tell()
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
                if record.distrust(why) if why else record.take(values, now, self._load()):
                    self._news.append(f"{name} is not believed: {record.trouble}")
        self._tell()

    def _load(self) -> float | None:
        for record in (self._records or {}).values():
            if "load" in record.values:
                load: float | None = record.values["load"]
                return load
        return None

    def _notice(self, now: float) -> None:
        """Leave a source that does not return to its thread. With the lock held."""
        if self._asked is None or now - self._asked[2] <= _PATIENCE:
            return
        record, name, _ = self._asked
        self._asked, record.stuck = None, True
        if record.distrust(_SLOW):
            self._news.append(f"{name} is not believed: {record.trouble}")
        if self._thread is not None:
            self._spawn()

    def _tell(self) -> None:
        """Log what is new: never in `latest`, as a log may wait for a disk."""
        with self._lock:
            news, self._news = self._news, []
        for line in news:
            log.warning("%s", line)


def _records(sources: Mapping[str, SensorSource]) -> dict[str, _Record]:
    return {name: _Record(source) for name, source in sources.items()}
