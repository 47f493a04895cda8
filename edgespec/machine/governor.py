"""The resources that rounds may use, decided from readings of the machine.

Pure: it reads no sensor and no clock. It takes readings and returns decisions with their reasons. Three modes
are ordered from the fastest to the most economical:

- performance: the least time per token.
- balanced: the least time times processor time per token (the energy-delay product, Horowitz 1994).
- saver: the least processor time per token, in threads and in drafts; no draft model.

`auto` takes the mode of the power supply and steps down from it where the machine is hot, throttled, short of
memory, or used by other programs. Steps down are immediate, steps up come only after a calm period, and two
changes are at least ten seconds apart. Remaining heat is reduced by pauses between rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgespec.core import Budget, Reading
from edgespec.costs import CostCurve

Mode = Literal["auto", "performance", "balanced", "saver"]
LADDER: tuple[Mode, ...] = ("performance", "balanced", "saver")

LIMIT = 85.0  # °C, where the sensor has no lower limit of its own
_DWELL = 10.0  # seconds between two changes of mode
_LONGEST_CALM = 40.0  # seconds
_LOW, _LOW_OVER = 20.0, 23.0  # percent of charge
_SLOW, _SLOW_OVER = 1.25, 1.1  # times its best that a one-row pass takes
_SHORT, _SHORT_OVER = 512 << 20, 768 << 20  # bytes of free memory
_CROWDED, _CROWDED_OVER = (
    0.4,
    0.2,
)  # other programs' share of all cores; they get at most half of them while this process runs
_PRICES: dict[Mode, tuple[float, float]] = {  # exponents of threads and of seconds
    "performance": (0.0, 1.0),
    "balanced": (1.0, 2.0),
    "saver": (1.0, 1.0),
}
_PAUSE_SHARE, _PAUSE_GROWTH, _MOST_PAUSE = 0.1, 0.005, 0.9  # per °C; per °C and second; of the time


@dataclass(frozen=True, slots=True)
class Decision:
    """The resources that rounds may use now, the mode, and the reason in words.

    `crowded`: other programs want all cores, and thread counts that are best without them may be bad ones.
    """

    mode: Mode
    budget: Budget
    reason: str
    crowded: bool = False


@dataclass(slots=True)
class _Alarm:
    """A condition for a step down: on after `delay` seconds of it, off after `calm` seconds without.

    A reading that is neither `trouble` nor `fine` leaves it unchanged.
    """

    delay: float
    calm: float
    on: bool = False
    _since: float | None = None

    def update(self, time: float, trouble: bool, fine: bool) -> bool:
        if not (fine if self.on else trouble):
            self._since = None
        else:
            self._since = time if self._since is None else self._since
            if time - self._since >= (self.calm if self.on else self.delay):
                self.on, self._since = not self.on, None
        return self.on


class Governor:
    """Turns readings, about one per second, into decisions. A fixed `mode` does not change."""

    def __init__(
        self,
        mode: Mode = "auto",
        threads: Mapping[Mode, tuple[int, int]] | None = None,
        most: int = 31,
        limit: float = LIMIT,
    ) -> None:
        """`threads` of the modes for passes of one row and of several, as `best_threads` returns them."""
        self.mode = mode
        self.threads = dict(threads or {})
        self._most, self._limit = most, limit
        self._heat = 0  # steps down for heat
        self._heat_changed = -math.inf
        self._cool_since: float | None = None
        self._calm = _DWELL  # seconds below the limit that end a step: longer if it was soon needed again
        self._slow = _Alarm(5.0, 30.0)
        self._short = _Alarm(0.0, 10.0)
        self._crowded = _Alarm(0.0, 1.0)
        self._low, self._on_battery = False, _Alarm(0.0, 5.0)
        self._share, self._over = 0.0, 0.0  # of the time spent resting; °C over the set point
        self._last = -math.inf
        self._changed = -math.inf
        self._decision = Decision("performance", self._budget("performance"), "nothing measured yet")
        if mode != "auto":
            self._decision = self._chosen(mode)

    @property
    def decision(self) -> Decision:
        """The last decision."""
        return self._decision

    def choose(self, mode: Mode) -> Decision:
        """Change the mode, as the user asks, at once."""
        self.mode = mode
        if mode != "auto":
            self._decision = self._chosen(mode)
        self._changed = -math.inf
        return self._decision

    def decide(self, reading: Reading) -> Decision:
        """Return the decision from now on. Readings come in order; one as old as the last changes nothing."""
        elapsed = reading.time - self._last
        if elapsed <= 0.0:
            return self._decision
        self._last = reading.time
        others = reading.others
        self._crowded.update(
            reading.time,
            others is not None and others >= _CROWDED,
            others is None or others < _CROWDED_OVER,
        )
        if self.mode != "auto":
            self._decision = self._chosen(self.mode)
            return self._decision
        base, reasons = self._supply(reading)
        steps = self._alarms(reading, reasons)
        heat = self._heated(reading, reasons)
        mode = LADDER[min(len(LADDER) - 1, base + max(steps, heat))]
        if mode != self._decision.mode and reading.time - self._changed < _DWELL:
            mode = self._decision.mode
        elif mode != self._decision.mode:
            self._changed = reading.time
        self._control(reading, elapsed)
        if self._share >= 0.005:
            reasons.append(f"resting {self._share:.0%} of the time")
        rest = self._share / (1.0 - self._share)
        self._decision = Decision(mode, self._budget(mode, rest), "; ".join(reasons), self._crowded.on)
        return self._decision

    def _chosen(self, mode: Mode) -> Decision:
        return Decision(mode, self._budget(mode), "chosen by the user", self._crowded.on)

    def _budget(self, mode: Mode, rest: float = 0.0) -> Budget:
        saver = mode == "saver"
        return Budget(
            max_draft=self._most,
            model_draft=not saver,
            threads=self.threads.get(mode, (0, 0)),
            objective="energy" if saver else "speed",
            rest=rest,
        )

    def _supply(self, reading: Reading) -> tuple[int, list[str]]:
        """Return the mode for battery and plug, as an index of LADDER, and the reason."""
        self._on_battery.update(reading.time, reading.plugged is False, reading.plugged is True)
        if not self._on_battery.on:
            self._low = False
            return 0, ["plugged in" if reading.plugged else "no battery in use"]
        if reading.charge is not None:
            self._low = reading.charge < (_LOW_OVER if self._low else _LOW)
        charge = "" if reading.charge is None else f" at {reading.charge:.0f}%"
        return (2 if self._low else 1), [f"on battery{charge}"]

    def _alarms(self, reading: Reading, reasons: list[str]) -> int:
        """Return the steps down for reasons other than heat."""
        now, steps = reading.time, 0
        others, slowdown, free = reading.others, reading.slowdown, reading.memory_free
        if self._crowded.on:
            steps = 1
            if others is not None:
                reasons.append(f"other programs use {others:.0%} of the processor")
        # Crowded cores slow the passes down too, without heat.
        if self._slow.update(
            now,
            slowdown is not None and slowdown >= _SLOW and not self._crowded.on,
            slowdown is None or slowdown < _SLOW_OVER,
        ):
            steps = 1
            if slowdown is not None:
                reasons.append(f"throttled: a token takes {slowdown:.2f} times what it took at best")
        if self._short.update(now, free is not None and free < _SHORT, free is None or free > _SHORT_OVER):
            steps = 2
            if free is not None:
                reasons.append(f"{free >> 20} MB of memory are free")
        return steps

    def _limit_of(self, reading: Reading) -> float:
        mark = reading.celsius_limit
        return self._limit if mark is None else min(self._limit, mark)

    def _heated(self, reading: Reading, reasons: list[str]) -> int:
        """Return the steps down for heat: one more per 10 s at the limit, one fewer after 10 s below."""
        limit, celsius, now = self._limit_of(reading), reading.celsius, reading.time
        hot = (celsius is not None and celsius >= limit - 1.0) or reading.pressure in ("serious", "critical")
        cool = (celsius is None or celsius <= limit - 5.0) and reading.pressure in (None, "nominal", "fair")
        since = now - self._heat_changed
        if hot and self._heat < len(LADDER) - 1 and since >= _DWELL:
            self._calm = min(2.0 * self._calm, _LONGEST_CALM) if since < _LONGEST_CALM else _DWELL
            self._heat, self._heat_changed = self._heat + 1, now
        if not cool or not self._heat:
            self._cool_since = None
        else:
            self._cool_since = now if self._cool_since is None else self._cool_since
            if now - self._cool_since >= self._calm:
                self._heat, self._heat_changed, self._cool_since = self._heat - 1, now, now
        if celsius is not None and (self._heat or self._share):
            reasons.append(f"hot: {celsius:.0f} °C, limit {limit:.0f} °C")
        elif self._heat and reading.pressure is not None:
            reasons.append(f"hot: thermal pressure {reading.pressure}")
        return self._heat

    def _control(self, reading: Reading, elapsed: float) -> None:
        """Control the pauses (proportional and integral), with a set point one degree below the limit."""
        if reading.celsius is None:
            self._share = self._over = 0.0
            return
        over = reading.celsius - (self._limit_of(reading) - 1.0)
        growth = _PAUSE_SHARE * (over - self._over) + _PAUSE_GROWTH * over * min(elapsed, 2.0)
        self._share = min(_MOST_PAUSE, max(0.0, self._share + growth if over > -5.0 else 0.0))
        self._over = max(over, -5.0)


def best_threads(curves: Mapping[int, CostCurve], mode: Mode) -> tuple[int, int]:
    """Return the best thread counts in `mode` for passes of one row and of several (measured by 4).

    `curves` by threads. Compute threads wait for each other busily, so that processor time is threads times
    wall time. Of equally good counts the smaller one is taken. (0, 0) without curves.
    """
    by_threads, by_seconds = _PRICES[mode]

    def best(rows: int) -> int:
        return min(sorted(curves), key=lambda n: n**by_threads * curves[n].seconds(rows) ** by_seconds)

    return (best(1), best(4)) if curves else (0, 0)
