"""How the rows of one pass are divided among several texts.

Each by itself would price its guess at what the next larger batch costs more, and none would pay for the
step: sixteen rows may cost hardly more than nine. So all offer what they would guess, and the batch is
planned as a whole: the tokens that most likely stand, whosever they are, as many as pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul

from edgespec.core import Offer
from edgespec.costs import CostCurve

_PRIOR, _MEMORY = 64.0, 512.0  # tokens: at plain speed to start from; over which the speed is taken


class Sharing:
    """Divides passes of texts whose targets share one model. Learns what guessing brought so far."""

    def __init__(self, costs: Callable[[], CostCurve]) -> None:
        """`costs` gives the curve of the target's passes now."""
        self._costs = costs
        self._written = self._plain = 0.0  # tokens, and those that plain decoding writes in the same time

    def divide(
        self, offers: Sequence[Offer], rows: int, length: int, *, beside_prompts: bool = False
    ) -> tuple[list[int], int]:
        """How many tokens of each offer to check, and how many rows of padding to add.

        At most `rows` rows in all, which is no less than the offers' own. `length`: tokens in a text's cache.
        `beside_prompts`: prompts are read in the same pass, so that a row costs its share of a large one.
        """
        costs = self._costs()
        kept = [offer.least for offer in offers]
        # Within a text no token is likelier to stand than the one before it: sorted, each comes after that.
        chances = [
            (chance, text)
            for text, offer in enumerate(offers)
            for chance in list(accumulate(offer.chances, mul))[offer.least :]
        ]
        chances.sort(key=lambda one: -one[0])
        texts, taken = len(offers), len(offers) + sum(kept)
        most = rows if beside_prompts else min(rows, max(costs.largest, taken))
        rate = self._pace * texts / costs.seconds(texts, length)

        def price(size: int) -> float:
            if beside_prompts:
                return size * costs.seconds(costs.largest, length) / costs.largest
            return costs.seconds(size, length)

        best, gained = -rate * price(taken), 0.0
        count, padding = 0, 0
        for n in range(min(len(chances), most - taken) + 1):
            gained += chances[n - 1][0] if n else 0.0
            size = taken + n if beside_prompts else costs.size(taken + n, most)
            if size and gained - rate * price(size) > best:
                best = gained - rate * price(size)
                count, padding = n, size - taken - n
        for _, text in chances[:count]:
            kept[text] += 1
        return kept, padding

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
