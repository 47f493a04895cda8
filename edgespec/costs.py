"""Seconds of a forward pass of n rows on this machine: a prior, refined by measurements and by every pass.

A batch of four rows may cost more than one of eight, and sixteen cost what twelve do: kernels compute in
blocks. Such steps decide how far to draft, so every size has a figure of its own. Each figure is a normal
distribution over the logarithm of its seconds, and all of them together are one Gaussian (Rasmussen and
Williams 2006, chapter 2; Kalman 1960): a pass of eight rows also refines the figure of sixteen, and the
remaining uncertainty decides which sizes are worth another try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
"""Rows that have a prior. A batch of another size is padded to the next, until a pass of it was seen."""

TYPICAL: Mapping[int, float] = {
    1: 1.0, 2: 1.6, 3: 2.2, 4: 2.6, 5: 3.1, 6: 3.5, 8: 4.2, 12: 5.7, 16: 6.4, 24: 9.0, 32: 11.0,
}  # fmt: skip
"""Relative costs where engine and weights are unknown: the median of those that were measured."""

_Vector = npt.NDArray[np.float64]
_Matrix = npt.NDArray[np.float64]
_TREND, _OWN = 0.15, 0.12  # standard deviations of a prior: per doubling of the rows; of each size alone
_PACE = 1.5  # of the seconds of one row before any pass
_MEASURED, _MEASURED_PACE = 0.08, 0.1  # of figures from a measurement
_KEPT, _KEPT_TREND, _KEPT_PACE = 0.1, 0.1, 0.7  # of figures from a file: other programs may run now
_DRIFT, _OWN_DRIFT = 0.015, 0.003  # per pass: of all sizes together, of each alone
_NOISE, _LEAST_NOISE, _MOST_NOISE = 0.1, 0.03, 0.8  # of a single pass
_NOISE_RATE = 0.05
_SURPRISE = 3.0  # deviations: the most that a pass counts; a figure from a file beyond them is dropped
_UNSURE_PACE = 0.3  # deviation of the pace above which a great surprise changes the pace
_HOPE = 1.5  # deviations by which a batch may be cheaper than its figure: worth trying
_TRIED = 2  # passes after which a cheaper prior no longer counts
_TURNS = 5  # passes of each size in a measurement
_HELD = 64  # passes after which the pace is one of generations, not of a measurement
_LARGEST = 256  # rows
_EARNED, _ALLOWED, _MOST_ALLOWED = (
    0.01,
    1.0,
    4.0,
)  # tokens: per plain token; at the start; at most


class CostCurve:
    """Seconds of a forward pass: seconds(n, c) = figure(n) * (1 + slope * c), c tokens in the cache.

    `slope` is fixed: contexts grow so slowly that the pace, which is the figure of one row, absorbs its
    error. One surprising pass (another program ran) moves the figures by a bounded step.

    `best` is the lowest pace ever held for a while, infinite before: `slowdown` relative to it replaces a
    temperature on machines without a sensor. `allowance` is how many tokens' time may be lost on trying sizes
    of uncertain cost: 1% of the time that passed. `seen` counts the passes of each size. Of a pass, `undo`
    rows can be taken back at once; to take back more, the accepted ones are evaluated again.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        slope: float = 0.0,
        most: int = 0,
        *,
        prior: Mapping[int, float] = TYPICAL,
        measured: bool = True,
    ) -> None:
        """`seconds` of one row and any other sizes; not `measured`: that of one row is a first estimate.

        Larger sizes up to `most` have the relative costs of `prior`, corrected by the nearest given sizes.
        Raises ValueError without a positive figure for one row.
        """
        if not seconds.get(1, 0.0) > 0.0 or not all(0.0 < s < math.inf for s in seconds.values()):
            raise ValueError("seconds of a cost curve must be positive and include one row")
        self.largest = max(*seconds, most)
        self.slope = slope
        self.best = math.inf
        self.allowance = _ALLOWED
        self.undo = _LARGEST
        self.seen: dict[int, int] = {}
        self.noise = _NOISE
        self._held = 0
        least = max(seconds) if measured else 0  # smaller sizes were measured, or are no batches
        self._known = {*seconds, *(n for n in (*SIZES, most) if least < n <= most)}
        self._allowed = frozenset(self._known)  # sizes that may be planned
        rows = np.arange(1, self.largest + 1, dtype=np.float64)
        doublings = np.log2(rows)
        sizes = sorted(prior)
        shape = np.interp(doublings, np.log2(sizes), np.log([prior[n] for n in sizes]))
        if self.largest > sizes[-1]:
            shape = np.where(rows > sizes[-1], math.log(prior[sizes[-1]]) + np.log(rows / sizes[-1]), shape)
        self._logs: _Vector = math.log(seconds[1]) + shape
        self._prior = shape
        self._plan: list[int] = []  # the cheapest batch of at least as many rows as the index
        self._tried: dict[int, int] = {}  # passes of each size in this process
        self._covariance = _covariance(self.largest, _OWN, _TREND, _PACE)
        self._prior_variances = _covariance(self.largest, _OWN, _TREND, 0.0).diagonal()
        if measured:
            for n in sorted(seconds):
                self._learn(n, math.log(seconds[n]), 1e-8, math.inf)
            self.seen = dict.fromkeys(seconds, 1)
            self._tried = dict.fromkeys(seconds, _TRIED)
            self._blur(_MEASURED, 0.0, _MEASURED_PACE)
        self._refresh()

    @property
    def pace(self) -> float:
        """Seconds of one row with an empty cache."""
        return self._seconds[0]

    @pace.setter
    def pace(self, seconds: float) -> None:
        self._logs += math.log(seconds / self.pace)
        self._refresh()

    @property
    def slowdown(self) -> float:
        """How many times as long as at its best a pass takes now; 1 while that is unknown."""
        return max(1.0, self.pace / self.best)

    def seconds(self, rows: int, context: int = 0) -> float:
        """Return the cost of exactly `rows`, or of the next known size; beyond the largest in proportion."""
        if rows > self.largest:
            figure = self._seconds[-1] * rows / self.largest
        else:
            figure = self._seconds[self._next[rows] - 1]
        return figure * (1.0 + self.slope * context)

    def again(self, rows: int, context: int = 0) -> float:
        """Return the cost of `rows` evaluated again, as a part of a later batch."""
        many = min(8, self.largest)
        return rows * (self.seconds(many, context) - self.seconds(1, context)) / max(1, many - 1)

    def uncertainty(self, rows: int) -> float:
        """Return the standard deviation of the logarithm of the cost of `rows`, relative to one row."""
        return self._deviations[self._next[min(rows, self.largest)] - 1]

    def source(self, rows: int) -> str:
        """Return where the figure comes from: "prior", "measured" by one pass, or "refined" by several."""
        seen = self.seen.get(self._next[min(rows, self.largest)], 0)
        return "refined" if seen > 1 else "measured" if seen else "prior"

    def hope(self, rows: int) -> float:
        """Return up to how many times cheaper than its figure a pass of `rows` may be."""
        return max(math.exp(_HOPE * self.uncertainty(rows)), 1.0 / self._prior_share(rows))

    def caution(self, rows: int) -> float:
        """Return by how many times its figure a pass of `rows` should be priced."""
        return max(math.exp(self.uncertainty(rows)), self._prior_share(rows))

    def _prior_share(self, rows: int) -> float:
        """Return the prior's relative cost over the figure's; 1 once passes have decided between them."""
        n = self._next[min(rows, self.largest)]
        if self._tried.get(n, 0) >= _TRIED:
            return 1.0
        return math.exp(self._prior[n - 1]) * self.pace / self._seconds[n - 1]

    def size(self, rows: int, most: int, others: int = 0) -> int:
        """Return the cheapest batch of at least `rows` and at most `most` rows, 0 if there is none.

        Padding may make a batch cheaper; sizes that were never seen and have no prior are not used. With
        `others` rows of other generations in the batch, the result is the rows of this one.
        """
        if others:
            return max(0, self.size(rows + others, most + others) - others)
        if not self._plan:
            self._plan = [0] * (self.largest + 1)
            best = 0
            for n in range(self.largest, 0, -1):
                if n in self._allowed and (not best or self._seconds[n - 1] <= self._seconds[best - 1]):
                    best = n
                self._plan[n] = best
        if rows > self.largest:
            return 0
        planned = self._plan[rows]
        if planned <= most:
            return planned
        sizes = (n for n in self._allowed if rows <= n <= most)
        return min(sizes, key=lambda n: self._seconds[n - 1], default=0)

    def with_one_row_of(self, other: CostCurve) -> CostCurve:
        """Return a curve with the cost of one row of `other`: that of another number of threads."""
        curve = self.copy()
        curve._logs[0] = other._logs[0]
        curve._refresh()
        return curve

    def copy(self) -> CostCurve:
        """Return a curve that learns separately from now on."""
        curve = CostCurve({1: self.pace}, self.slope, self.largest, measured=False)
        curve._logs, curve._covariance = self._logs.copy(), self._covariance.copy()
        curve._known, curve._allowed, curve._tried = set(self._known), self._allowed, dict(self._tried)
        curve._prior, curve.best, curve.noise = self._prior, self.best, self.noise
        curve.undo = self.undo
        curve._refresh()
        return curve

    def only(self, sizes: Iterable[int]) -> None:
        """Plan only batches of these sizes from now on."""
        self._allowed &= set(sizes)
        self._plan = []

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """Learn from one pass."""
        if not 1 <= rows <= self.largest or not 0.0 < seconds < math.inf:
            return
        figure = math.log(seconds / (1.0 + self.slope * context))
        if self._covariance[0, 0] > _UNSURE_PACE**2:
            # No relative cost is that far off: the excess belongs to the pace.
            bound = _SURPRISE * math.hypot(self._deviations[rows - 1], self.noise)
            surprise = figure - float(self._logs[rows - 1])
            self._logs += surprise - min(bound, max(-bound, surprise))
        variance = float(self._covariance[rows - 1, rows - 1]) + self.noise**2
        surprise = self._learn(rows, figure, self.noise**2)
        if (excess := abs(surprise) - _SURPRISE * math.sqrt(variance)) > 0.0:
            # Another program ran, or the cost has changed: the next pass of this size decides.
            if rows == 1:
                self._covariance += min(excess, _UNSURE_PACE) ** 2
            else:
                self._covariance[rows - 1, rows - 1] += min(excess**2, self._prior_variances[rows - 1])
        squared = min(surprise**2, _SURPRISE**2 * variance)
        share = self.noise**2 / variance  # of the surprise that is noise, not an error of the figure
        noise = self.noise**2 + _NOISE_RATE * share * (squared - variance)
        self.noise = min(_MOST_NOISE, max(_LEAST_NOISE, math.sqrt(noise)))
        self._covariance += _DRIFT**2
        uncertain = self._covariance.diagonal() - self._covariance[0, 0] >= self._prior_variances
        self._covariance[np.diag_indices(self.largest)] += np.where(uncertain, 0.0, _OWN_DRIFT**2)
        self._known.add(rows)
        self.seen[rows] = self.seen.get(rows, 0) + 1
        self._tried[rows] = self._tried.get(rows, 0) + 1
        self._refresh()
        self._held += 1
        if self._held >= _HELD:
            self.best = min(self.best, self.pace)

    def spend(self, tokens: float, lost: float) -> None:
        """Record a round that took the time of `tokens` plain ones, `lost` of which trying a size cost."""
        self.allowance = min(_MOST_ALLOWED, self.allowance + _EARNED * tokens - lost)

    def measured(self, figures: Mapping[int, float], noise: float) -> None:
        """Learn from a measurement: seconds by rows, each with the relative standard deviation `noise`."""
        for n, seconds in sorted(figures.items()):
            if 1 <= n <= self.largest:
                self._learn(n, math.log(seconds), noise**2, math.inf)
                self.seen[n] = self.seen.get(n, 0) + 1
                self._tried[n] = _TRIED
        self._refresh()

    def _is_possible(self, rows: int, log_relative: float) -> bool:
        """Whether a relative cost is within what the prior allows."""
        surprise = log_relative - float(self._prior[rows - 1])
        return abs(surprise) <= _SURPRISE * math.sqrt(float(self._covariance[rows - 1, rows - 1]) + _KEPT**2)

    def _learn(self, rows: int, log_seconds: float, noise: float, most: float = _SURPRISE) -> float:
        """Condition on one figure with the variance `noise`, its surprise limited to `most` deviations."""
        column = self._covariance[:, rows - 1].copy()
        variance = float(column[rows - 1]) + noise
        surprise = log_seconds - float(self._logs[rows - 1])
        bound = most * math.sqrt(variance)
        gain = column / variance
        self._logs += gain * min(bound, max(-bound, surprise))
        self._covariance -= np.outer(gain, column)
        return surprise

    def _blur(self, own: float, trend: float, pace: float) -> None:
        """Increase the uncertainty of all that was learned, by deviations as those of a prior."""
        self._covariance += _covariance(self.largest, own, trend, pace)

    def _refresh(self) -> None:
        """Compute what every round needs as plain numbers."""
        self._seconds: list[float] = np.exp(np.clip(self._logs, -60.0, 60.0)).tolist()
        variances = self._covariance.diagonal() + self._covariance[0, 0] - 2.0 * self._covariance[0]
        self._deviations: list[float] = np.sqrt(np.maximum(variances, 0.0)).tolist()
        self._next = [0] * (self.largest + 1)
        known = self.largest
        for n in range(self.largest, 0, -1):
            known = n if n in self._known else known
            self._next[n] = known
        self._plan = []

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` loads: figures relative to one row, deviations, numbers of passes."""
        seen = sorted(self.seen)
        data = {
            "pace": self.pace,
            "slope": self.slope,
            "most": self.largest,
            "noise": round(self.noise, 4),
            "shape": {str(n): round(self._seconds[n - 1] / self.pace, 4) for n in sorted({1, *seen})},
            "deviation": {str(n): round(self._deviations[n - 1], 4) for n in seen},
            "seen": {str(n): self.seen[n] for n in seen},
        }
        return data if math.isinf(self.best) else {**data, "best": self.best}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prior: Mapping[int, float] = TYPICAL) -> Self:
        """Load the curve of `as_json`, without figures far from all that `prior` allows.

        Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else.
        """
        pace, slope, most = float(data["pace"]), float(data["slope"]), int(data["most"])
        if not 0.0 <= slope <= 1e-3 or not 1 <= most <= _LARGEST:
            raise ValueError("slope or size out of bounds")
        shape = {int(n): float(s) for n, s in data["shape"].items()}
        deviations = {int(n): float(s) for n, s in data.get("deviation", {}).items()}
        seen = {int(n): int(times) for n, times in data.get("seen", dict.fromkeys(shape, 1)).items()}
        noise = float(data.get("noise", _NOISE))
        figures = [pace, noise, *shape.values(), *(1.0 + one for one in deviations.values())]
        if 1 not in shape or not all(0.0 < one < 1e9 for one in figures):
            raise ValueError("figures out of bounds")
        if not all(1 <= n <= most for n in (*shape, *deviations, *seen)) or min(seen.values(), default=0) < 0:
            raise ValueError("size out of bounds")
        curve = cls({1: pace}, slope, most, prior=prior, measured=False)
        curve._learn(1, math.log(pace), 1e-8)
        if all(curve._is_possible(n, math.log(relative)) for n, relative in shape.items()):
            for n, relative in sorted(shape.items()):
                curve._learn(n, math.log(pace * relative), max(_MEASURED, deviations.get(n, 0.0)) ** 2)
            curve._known.update(shape)
            curve._allowed |= set(shape)
            curve.seen = {n: seen.get(n, 1) for n in shape}
        curve._blur(_KEPT, _KEPT_TREND, _KEPT_PACE)
        curve.noise = min(_MOST_NOISE, max(_LEAST_NOISE, noise))
        curve.best = float(data.get("best", math.inf))
        if not curve.best > 0.0:
            raise ValueError("best out of bounds")
        curve._refresh()
        return curve


def _covariance(largest: int, own: float, trend: float, pace: float) -> _Matrix:
    """Return the covariance of the log costs of 1 to `largest` rows, from deviations."""
    doublings = np.log2(np.arange(1, largest + 1))
    matrix: _Matrix = pace**2 + trend**2 * np.minimum.outer(doublings, doublings)
    matrix[np.diag_indices(largest)] += np.where(doublings > 0.0, own**2, 0.0)
    return matrix


def measure(
    run: Callable[[int], None],
    sizes: Sequence[int],
    seconds: float,
    expected: Callable[[int], float],
    clock: Callable[[], float] = perf_counter,
) -> tuple[dict[int, float], float]:
    """Measure `run(n)` for one row and, within `seconds`, for `sizes` in order; return seconds and noise.

    A size is `expected` to take so many times one row until it was seen. The fastest of several passes
    counts: other programs only add to a time. The noise is the relative standard deviation of a figure, from
    the spread of passes of the same size.
    """
    start = clock()
    samples: dict[int, list[float]] = {1: []}

    def left() -> float:
        return start + seconds - clock()

    def timed(n: int) -> None:
        before = clock()
        run(n)
        samples.setdefault(n, []).append(clock() - before)

    timed(1)  # not counted: it includes page faults, cold caches and a low clock
    for turn in range(_TURNS):
        if left() > samples[1][-1]:
            timed(1)
        one = min(samples[1])
        for n in sizes if turn % 2 == 0 else sizes[::-1]:
            estimate = min(samples[n]) if n in samples else one * expected(n) / expected(1)
            if left() > estimate:
                timed(n)
    if len(samples[1]) > 1:
        samples[1].pop(0)
    spread = [math.log(max(times) / min(times)) for times in samples.values() if len(times) > 1]
    return {n: min(times) for n, times in samples.items()}, max(_MEASURED, median(spread or [_MOST_NOISE]))
