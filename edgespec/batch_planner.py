"""How many rows each of several generations has in one batch.

An engine evaluates generations in one pass as long as each has equally many tokens. It evaluates the rest
in a further pass, which loads all weights again. So all get equally many rows, and rows that a generation
does not draft for are padding.

Generations cannot decide alone: each would compare its draft with the cost of the next larger batch, and
none would pay for that, though sixteen rows may cost hardly more than nine. So all offer what they would
draft, and the batch is planned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgespec.core import DraftCandidate
from edgespec.costs import CostCurve
from edgespec.pricing import RunningRate, best_length, expected_tokens


class BatchPlanner:
    """Plans batches of generations that share a target. Learns what drafting yielded so far."""

    def __init__(self, costs: Callable[[], CostCurve]) -> None:
        """`costs` returns the current cost curve of the target."""
        self._costs = costs
        self._running = RunningRate()

    def rows(
        self, offers: Sequence[DraftCandidate], bounds: Sequence[tuple[int, int]], most: int, length: int
    ) -> int:
        """Return the rows of each generation: one, and one for each token of its offer to be verified.

        At most `most`, which is more than any offer's `least`, and enough for that. `bounds`: the fewest and
        the most tokens that each generation of the batch can have in it, including those that only evaluate
        their prompts and offer nothing. `length`: tokens in a generation's cache.
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
        """Learn from a batch without prefill that yielded `written` tokens in `seconds`."""
        self._running.observe(written, seconds)


def _seconds(costs: CostCurve, sizes: Sequence[int], length: int) -> float:
    """Return the cost of a batch with `sizes` tokens per generation: the common part first, then the rest."""
    seconds, done = 0.0, 0
    for size in sorted(set(sizes)):
        seconds += costs.seconds((size - done) * sum(one >= size for one in sizes), length)
        done = size
    return seconds
