"""A controller that drafts the same number of tokens in every round: what a planner is measured by."""

from __future__ import annotations

from collections.abc import Sequence

from edgespec.core import ALONE, Budget, Draft, DraftCandidate, Round, SharedBatch
from edgespec.costs import CostCurve
from edgespec.planner import Chain


class FixedLength:
    """Drafts `length` tokens from repetition or, where there is none, with the first costly drafter."""

    def __init__(self, length: int, chain: Chain) -> None:
        self._length, self._chain = length, chain

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        limit = min(limit, self._length)
        found = self._chain.best_free(context, limit)
        if limit < 1 or found.tokens or not self._chain.costly:
            return found
        return self._chain.costly[0].draft(context, limit, lambda confidence: len(confidence) < limit)

    def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
        draft = self.propose(context, limit)
        return DraftCandidate(draft, (1.0,) * len(draft.tokens), len(draft.tokens))

    def observe(self, round_: Round) -> None:
        """Learns nothing."""

    def apply_budget(self, budget: Budget, costs: CostCurve) -> None:
        """Ignores costs."""

    def stop_ahead(self) -> None:
        """Nothing runs ahead."""
