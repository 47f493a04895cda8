"""The rule that decides how far to draft, and the prices it uses.

A batch that verifies k draft tokens takes t(k) seconds and yields E(k) = 1 + the sum over i of the
probability that the first i are accepted. The ratio of all tokens to all seconds is largest where each
round maximizes E(k) - rate * t(k), with `rate` the tokens per second reached so far (Dinkelbach 1967): a
second spent here is worth what it yields elsewhere. Not drafting, k = 0, is the plan to beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import mul

from edgespec.core import Budget, SharedBatch
from edgespec.costs import CostCurve

_PRIOR, _MEMORY = 32.0, 256.0  # tokens: at the plain rate to start from; over which the rate is taken


class RunningRate:
    """Tokens per second so far, with plain decoding's rate as prior and as lower bound."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds
        if self._tokens > _MEMORY:
            self._seconds *= _MEMORY / self._tokens
            self._tokens = _MEMORY

    def reset(self) -> None:
        """Start from the prior again."""
        self._tokens = self._seconds = 0.0

    def above(self, plain: float) -> float:
        """The rate, where plain decoding reaches `plain` tokens per second."""
        return max(plain, (_PRIOR + self._tokens) / (_PRIOR / plain + self._seconds))


def expected_tokens(probabilities: Iterable[float]) -> list[float]:
    """E(0), E(1), ... of a draft whose token i is accepted with `probabilities[i]` if all before it were."""
    return list(accumulate(accumulate(probabilities, mul), initial=1.0))


def accepted_variance(probabilities: Iterable[float]) -> float:
    """Return the variance of the number of accepted tokens; `probabilities` as in `expected_tokens`."""
    mean = square = 0.0
    for count, reached in enumerate(accumulate(probabilities, mul), start=1):
        mean += reached
        square += (2 * count - 1) * reached  # P(at least count), weighted by count^2 - (count - 1)^2
    return square - mean * mean


def best_length(
    expected: Sequence[float],
    seconds: Callable[[int], float],
    rate: float,
    *,
    least: int = 0,
    margin: float = 0.0,
    certain: int = 0,
) -> tuple[float, int]:
    """Return the value expected[k] - rate * seconds(k) and the length k >= `least` of the best draft.

    More than `certain` tokens must be worth `margin` more than at most `certain`; otherwise the value
    returned is that of the shorter draft plus `margin`, the bar for any other plan. `seconds` is infinite
    where no batch fits.
    """

    bar, shorter = -math.inf, least
    for k in range(least, min(certain + 1, len(expected))):
        value = expected[k] - rate * seconds(k)
        if value > bar:
            bar, shorter = value, k
    best, longer = bar + margin, shorter
    for k in range(max(least, certain + 1), len(expected)):
        value = expected[k] - rate * seconds(k)
        if value > best:
            best, longer = value, k
    return best, longer


class Prices:
    """Prices of the rounds of one generation.

    `length` tokens are in its cache, `rate` is the value of a second in tokens. Prices are in seconds, or
    in processor seconds where `budget` saves energy: compute threads wait busily, so that all of them use a
    second of a pass. Batches of uncertain cost are priced above their figure unless `bold`.
    """

    __slots__ = ("bold", "budget", "costs", "length", "rate", "shared")

    def __init__(self, costs: CostCurve, budget: Budget, shared: SharedBatch, length: int) -> None:
        self.costs, self.budget, self.shared, self.length = costs, budget, shared, length
        self.rate = 0.0
        self.bold = False

    @property
    def plain_rate(self) -> float:
        """Tokens per second of all generations in the batch if none of them drafts."""
        rows = 1 + self.shared.generations
        return rows / (self.weight(rows) * self.costs.seconds(rows, self.length))

    def weight(self, rows: int) -> float:
        """The price of a second in which a batch of `rows` is evaluated."""
        one_row, many_rows = self.budget.threads
        if self.budget.objective != "energy":
            return 1.0
        return float(max(1, one_row if rows == 1 else many_rows))

    def size(self, rows: int, most: int) -> int:
        """The cheapest batch of at least `rows` and at most `most` rows, 0 if there is none."""
        return self.costs.size(rows, most, self.shared.rows)

    def price(self, rows: int, drafting: float = 0.0) -> float:
        """The price of verifying in a batch with `rows` of this generation, after `drafting` seconds."""
        if not rows:
            return math.inf
        all_rows = rows + self.shared.rows
        seconds = self.costs.seconds(all_rows, self.length)
        if not self.bold:
            seconds *= self.costs.caution(all_rows)
        return self.weight(all_rows) * seconds + self.weight(1) * drafting

    def replay(self, expected: Sequence[float], k: int, rows: int) -> float:
        """The price of what is evaluated again after a draft of `k` tokens in a batch of `rows`.

        Where not all rows can be taken back at once, a rejection costs the accepted rows a second time.
        `expected`: see `expected_tokens`; E(i) - E(i - 1) is the probability that i tokens are accepted.
        """
        if rows - 1 <= self.costs.undo:
            return 0.0
        reached = [1.0, *(expected[i] - expected[i - 1] for i in range(1, k + 1)), 0.0]
        stop = k + 1 if rows > k + 1 else k  # with padding, also a draft that was accepted is taken back
        again = sum((reached[i] - reached[i + 1]) * (i + 1) for i in range(stop))
        return again * self.repeated(rows, 1)

    def repeated(self, rows: int, kept: int) -> float:
        """The price of evaluating again the rows that were `kept` of a batch, if that is necessary."""
        if rows - 1 <= self.costs.undo or kept == rows:
            return 0.0
        return self.weight(rows) * self.costs.again(kept, self.length)

    def value(self, expected: float, rows: int, drafting: float = 0.0) -> float:
        """Tokens `expected` of a round beyond what its time is worth elsewhere; 0 rows: no such batch."""
        return expected - self.rate * self.price(rows, drafting)
