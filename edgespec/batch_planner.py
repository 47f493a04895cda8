"""How many rows each of several generations has in one batch.

An engine evaluates generations side by side with equally many tokens each; what some have more, it
evaluates after that and reads all weights again. So all get equally many rows, and what a generation does
not draft is padding.

Nor could each decide for itself: it would price its draft at what the next larger batch costs more, and
none would pay for the step, though sixteen rows may cost hardly more than nine. So all offer what they
would draft, and the batch is planned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgespec.core import DraftCandidate
from edgespec.costs import CostCurve
from edgespec.pricing import RunningRate, best_length, expected_tokens


class BatchPlanner:
    """Plans batches of generations whose targets share one model. Learns what drafting yielded so far."""

    def __init__(self, costs: Callable[[], CostCurve]) -> None:
        """`costs` returns the curve of the target's passes now."""
        self._costs = costs
        self._running = RunningRate()

    def rows(
        self, offers: Sequence[DraftCandidate], bounds: Sequence[tuple[int, int]], most: int, length: int
    ) -> int:
        """How many rows to give each generation: one, and one for each token of its offer to be verified.

        At most `most`, which is more than any offer's `least`, and enough for that. `bounds`: the fewest and
        the most tokens that each generation of the batch can have in it, those that only evaluate their
        prompts and offer nothing among them. `length`: tokens in a generation's cache.
        """
        costs = self._costs()
        generations = len(offers)
        rate = self._running.above(generations / costs.seconds(generations, length))
        least = max(offer.least for offer in offers)
        largest = max(least, min(most, costs.largest // len(bounds)) - 1)
        each = [expected_tokens(offer.accept_probs) for offer in offers]
        expected = [sum(one[min(k, len(one) - 1)] for one in each) for k in range(largest + 1)]

        def seconds(k: int) -> float:
            return _seconds(costs, [max(low, min(k + 1, high)) for low, high in bounds], length)

        return 1 + best_length(expected, seconds, rate, least=least)[1]

    def observe(self, written: int, seconds: float) -> None:
        """A batch in which no prompt was evaluated yielded `written` tokens in `seconds`."""
        self._running.observe(written, seconds)


def _seconds(costs: CostCurve, sizes: Sequence[int], length: int) -> float:
    """The cost of a batch of so many tokens for each: what all have side by side, then what is left."""
    seconds, done = 0.0, 0
    for size in sorted(set(sizes)):
        seconds += costs.seconds((size - done) * sum(one >= size for one in sizes), length)
        done = size
    return seconds
