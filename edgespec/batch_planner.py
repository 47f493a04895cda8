"""How many rows each of several texts has in one pass.

An engine evaluates texts side by side with equally many tokens each; what some have more, it evaluates after
that and reads all weights again. So all get equally many rows, and what a text does not guess is padding.

Nor could each decide for itself: it would price its guess at what the next larger batch costs more, and none
would pay for the step, though sixteen rows may cost hardly more than nine. So all offer what they would
guess, and the pass is planned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

from edgespec.core import DraftCandidate
from edgespec.costs import CostCurve

_PRIOR, _MEMORY = 64.0, 512.0  # tokens: at plain speed to start from; over which the speed is taken


class BatchPlanner:
    """Plans passes of texts whose targets share one model. Learns what guessing brought so far."""

    def __init__(self, costs: Callable[[], CostCurve]) -> None:
        """`costs` gives the curve of the target's passes now."""
        self._costs = costs
        self._written = self._plain = 0.0  # tokens, and those that plain decoding writes in the same time

    def rows(
        self, offers: Sequence[DraftCandidate], bounds: Sequence[tuple[int, int]], most: int, length: int
    ) -> int:
        """How many rows to give each text: one, and one for each token of its offer to be checked.

        At most `most`, which is more than any offer's `least`, and enough for that. `bounds`: the fewest and
        the most tokens that each text of the pass can have in it, those that only read their prompts and
        offer nothing among them. `length`: tokens in a text's cache.
        """
        costs = self._costs()
        texts = len(offers)
        rate = self._pace * texts / costs.seconds(texts, length)
        stands = [list(accumulate(offer.chances, mul)) for offer in offers]

        def value(rows: int) -> float:
            expected = sum(sum(chances[: rows - 1]) for chances in stands)
            sizes = [max(low, min(rows, high)) for low, high in bounds]
            return expected - rate * _seconds(costs, sizes, length)

        least = 1 + max(offer.least for offer in offers)
        largest = min(most, costs.largest // len(bounds))
        return max(range(least, max(least, largest) + 1), key=value)

    def observe(self, texts: int, written: int, seconds: float, length: int) -> None:
        """A pass of `texts` texts, beside no prompt, brought `written` tokens in `seconds`."""
        self._written += written
        self._plain += seconds * texts / self._costs().seconds(texts, length)
        if self._written > _MEMORY:
            self._plain *= _MEMORY / self._written
            self._written = _MEMORY

    @property
    def _pace(self) -> float:
        """The speed so far in that of plain decoding, at least 1."""
        return max(1.0, (_PRIOR + self._written) / (_PRIOR + self._plain))


def _seconds(costs: CostCurve, sizes: Sequence[int], length: int) -> float:
    """The cost of a pass of texts with so many tokens each: what all have side by side, then what is left."""
    seconds, done = 0.0, 0
    for size in sorted(set(sizes)):
        seconds += costs.seconds((size - done) * sum(one >= size for one in sizes), length)
        done = size
    return seconds
