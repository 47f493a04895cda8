"""What a forward pass of n rows costs on this machine, measured and then refined by every pass seen.

A batch of four rows may be dearer than one of eight, and sixteen cost what twelve do: kernels work in blocks.
Such cliffs are what decides how far to guess, so every size has a figure of its own and none is smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any, Self

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
"""Rows that are measured. A batch of another size is padded to the next, until it was seen itself."""

_PACE_RATE, _SHAPE_RATE = 0.05, 0.1
_LARGEST_SURPRISE, _LARGEST_ERROR = 0.25, math.log(2.0)
_HELD = 64  # passes after which the pace is that of use, and not of a measurement


class CostCurve:
    """Seconds of a forward pass: seconds(n, c) = pace * shape[n] * (1 + slope * c), c tokens in the cache.

    `pace` is what one row costs now and follows the machine's drift; `shape`, with shape[1] = 1, belongs to
    model and kernels and moves slowly. One surprising pass (another program's moment) moves each by a bounded
    step. `slope` stays as given: contexts grow so slowly that pace takes up what it lacks.

    `best` is the lowest pace ever held for a while, infinite before: `slowdown` against it is a thermometer
    for machines without one.
    """

    def __init__(self, seconds: Mapping[int, float], slope: float = 0.0, most: int = 0) -> None:
        """`seconds` of one row and any other sizes, measured with an almost empty cache.

        Sizes beyond the largest measured, up to `most`, are taken to cost in proportion until they are seen.
        Raises ValueError without a positive figure for one row.
        """
        if not seconds.get(1, 0.0) > 0.0 or not all(0.0 < s < math.inf for s in seconds.values()):
            raise ValueError("a cost curve needs positive seconds, those of one row among them")
        self.largest = max(*seconds, most)
        self.pace = seconds[1]
        self.best = math.inf
        self._seen = 0
        self.slope = slope
        self._shape = {n: s / self.pace for n, s in seconds.items() if n >= 1}
        measured = max(self._shape)
        self._assumed = {n for n in (*SIZES, most) if measured < n <= most}
        self._shape |= {n: self._shape[measured] * n / measured for n in self._assumed}
        self._allowed = set(self._shape)
        self._plan: list[int] = []

    @property
    def slowdown(self) -> float:
        """How many times as long as at best a pass takes now; 1 before that is known."""
        return max(1.0, self.pace / self.best)

    def seconds(self, rows: int, context: int = 0) -> float:
        """The cost of exactly `rows`, or of the next size known; beyond the largest in proportion."""
        return self.pace * self._relative(rows) * (1.0 + self.slope * context)

    def size(self, rows: int, most: int, beside: int = 0) -> int:
        """The cheapest batch of at least `rows` and at most `most` rows, 0 if there is none.

        Padding may be cheaper than not: of sizes that were never seen none is taken. With `beside` rows of
        other texts in the batch, those of this one.
        """
        if beside:
            return max(0, self.size(rows + beside, most + beside) - beside)
        if not self._plan:
            self._plan = [0] * (self.largest + 1)
            best = 0
            for n in range(self.largest, 0, -1):
                if n in self._allowed and (not best or self._shape[n] <= self._shape[best]):
                    best = n
                self._plan[n] = best
        if rows > self.largest:
            return 0
        planned = self._plan[rows]
        if planned <= most:
            return planned
        return min((n for n in self._allowed if rows <= n <= most), key=self._shape.__getitem__, default=0)

    def with_one_row_of(self, other: CostCurve) -> CostCurve:
        """A curve whose passes of one row cost what they do in `other`: for another number of threads."""
        seconds = {n: self.seconds(n) for n in self._shape if n > 1 and n not in self._assumed}
        return CostCurve({1: other.seconds(1), **seconds}, self.slope, self.largest)

    def copy(self) -> CostCurve:
        """A curve that learns on its own from here."""
        curve = CostCurve({1: self.pace}, self.slope, self.largest)
        curve._shape, curve._assumed = dict(self._shape), set(self._assumed)
        curve._allowed, curve.best = set(self._allowed), self.best
        return curve

    def only(self, sizes: Iterable[int]) -> None:
        """Plan batches of no other sizes from now on."""
        self._allowed &= set(sizes)
        self._plan = []

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """Learn from one pass."""
        if not 1 <= rows <= self.largest or not 0.0 < seconds < math.inf:
            return
        surprise = math.log(seconds / self.seconds(rows, context))
        if rows in self._assumed or rows not in self._shape:  # its first figure
            self._assumed.discard(rows)
            self._shape[rows] = self._relative(rows) * math.exp(_bounded(surprise, _LARGEST_ERROR))
            self._plan = []
            return
        surprise = _bounded(surprise, _LARGEST_SURPRISE)
        if rows == 1:
            self.pace *= math.exp(_PACE_RATE * surprise)
        else:
            self.pace *= math.exp(_PACE_RATE / 2 * surprise)
            self._shape[rows] *= math.exp(_SHAPE_RATE * surprise)
            self._plan = []
        self._seen += 1
        if self._seen >= _HELD:
            self.best = min(self.best, self.pace)

    def _relative(self, rows: int) -> float:
        shape = self._shape
        if rows in shape:
            return shape[rows]
        if rows > self.largest:
            return shape[self.largest] * rows / self.largest
        return shape[min(n for n in shape if n > rows)]

    def as_json(self) -> dict[str, Any]:
        shape = {str(n): round(s, 4) for n, s in sorted(self._shape.items()) if n not in self._assumed}
        best = {} if math.isinf(self.best) else {"best": self.best}
        return {"pace": self.pace, "slope": self.slope, "shape": shape, "most": self.largest, **best}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else."""
        pace, slope, most = float(data["pace"]), float(data["slope"]), int(data["most"])
        if not 0.0 <= slope <= 1e-3 or not 1 <= most <= 1024:
            raise ValueError("slope or size out of bounds")
        seconds = {int(n): float(s) * pace for n, s in data["shape"].items()}
        if max(seconds) > most:
            raise ValueError("size out of bounds")
        curve = cls(seconds, slope, most)
        curve.best = float(data.get("best", math.inf))
        if not curve.best > 0.0:
            raise ValueError("best out of bounds")
        return curve


def _bounded(value: float, most: float) -> float:
    return min(most, max(-most, value))


def measure(
    run: Callable[[int], None],
    most: int = SIZES[-1],
    seconds: float = 4.0,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, float]:
    """Seconds of `run(n)` for the SIZES up to `most`, spending about `seconds`.

    Passes over all sizes alternate in direction, so that a machine speeding up or slowing down does not bend
    the curve. Of several the quickest counts: other programs only ever add to a time. What would not fit in
    the time is left out, the large sizes first: on a machine that slow they hardly pay either.
    """
    run(1)  # what a first pass pays for: pages, caches, clock
    samples: dict[int, list[float]] = {}
    end = clock() + seconds
    sizes = [n for n in SIZES if n <= most]
    for turn in range(5):
        for n in sizes if turn % 2 == 0 else sizes[::-1]:
            expected = min(samples[n]) if n in samples else _guess(samples, n)
            if n > 1 and clock() + expected > end:
                continue
            start = clock()
            run(n)
            samples.setdefault(n, []).append(clock() - start)
        if clock() > end:
            break
    return {n: min(times) for n, times in samples.items()}


def _guess(samples: Mapping[int, list[float]], rows: int) -> float:
    if not samples:
        return 0.0
    largest = max(samples)
    return min(samples[largest]) * rows / largest
