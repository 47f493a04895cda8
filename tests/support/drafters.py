"""Drafters and controllers for tests of the loop, without a planner."""

from __future__ import annotations

from collections.abc import Sequence

from edgespec.core import ALONE, Budget, CostlyDrafter, Draft, DraftCandidate, Drafter, Round, SharedBatch
from edgespec.costs import CostCurve


class Always(Drafter):
    """A costly drafter that is always asked, for as many tokens as there is room for."""

    def __init__(self, drafter: CostlyDrafter) -> None:
        self._drafter = drafter

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        return self._drafter.draft(context, limit, lambda _confidence: True)


def drafted(drafter: CostlyDrafter, context: Sequence[int], limit: int) -> Draft:
    return Always(drafter).propose(context, limit)


class Alone:
    """A Controller that drafts all that its drafter proposes, and learns nothing."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.observed: list[Round] = []

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        return self._drafter.propose(context, limit)

    def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
        draft = self._drafter.propose(context, limit)
        return DraftCandidate(draft, draft.confidence)

    def observe(self, round_: Round) -> None:
        self.observed.append(round_)

    def apply_budget(self, budget: Budget, costs: CostCurve) -> None: ...

    def stop_ahead(self) -> None: ...
