"""The chain of drafters and their models in an engine: each drafter is one line of FREE or COSTLY."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from edgespec.acceptance import Acceptance
from edgespec.app.engine.request import Request
from edgespec.app.engine.slots import Slot
from edgespec.core import Constraint, Controller, CostlyDrafter, Drafter
from edgespec.corpus import Corpus
from edgespec.costs import CostCurve
from edgespec.drafting import ModelDrafter
from edgespec.grammar_drafting import GrammarDrafter
from edgespec.models.runtime import Model
from edgespec.planner import Chain, Planner
from edgespec.retrieval import CorpusDrafter, SuffixDrafter
from edgespec.sampling import Sampling

T = TypeVar("T")


@dataclass(slots=True)
class DraftModel:
    """A loaded draft model, the cost curve of its forward passes, and the threads that it applies to.

    While the target verifies, it may draft ahead by `ahead` tokens. `make` is the class of its drafters.
    """

    model: Model
    costs: CostCurve
    threads: tuple[int, int]
    ahead: int = 0
    make: type[ModelDrafter] = ModelDrafter


@dataclass(slots=True)
class Drafters:
    """What an engine drafts with: at most `most` tokens per round, by repetition unless not `suffix`.

    `asked_for`: the file of the draft model that the user requested, loaded or not. `more` make drafters that
    are asked after FREE.
    """

    most: int = 31
    suffix: bool = True
    corpus: Corpus | None = None
    draft: DraftModel | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    asked_for: Path | None = None
    more: list[Callable[[], Drafter]] = field(default_factory=list)

    def controller(
        self, request: Request, slot: Slot, constraint: Constraint | None, costs: CostCurve
    ) -> Controller:
        """Return the controller of one generation: it decides how far to draft."""
        chain = self.chain(request, slot, constraint)
        if request.controller is not None:
            return request.controller(chain)
        most = self.most if request.max_draft is None else min(request.max_draft, self.most)
        ahead = self.draft.ahead if self.draft is not None else 0
        return Planner(costs, self.acceptance, chain, most, ahead)

    def chain(self, request: Request, slot: Slot, constraint: Constraint | None) -> Chain:
        """Return the drafters of one generation; none if it must not speculate."""
        if not request.speculate:
            return Chain()
        return Chain(
            GrammarDrafter(constraint) if constraint is not None else None,
            [*_made(FREE, self, request, slot), *(make() for make in self.more)],
            _made(COSTLY, self, request, slot),
        )


def _made(
    makers: Sequence[Callable[[Drafters, Request, Slot], T | None]],
    drafters: Drafters,
    request: Request,
    slot: Slot,
) -> list[T]:
    made = (make(drafters, request, slot) for make in makers)
    return [one for one in made if one is not None]


def _suffix(drafters: Drafters, _request: Request, _slot: Slot) -> Drafter | None:
    return SuffixDrafter() if drafters.suffix else None


def _corpus(drafters: Drafters, _request: Request, _slot: Slot) -> Drafter | None:
    return CorpusDrafter(drafters.corpus) if drafters.corpus is not None else None


def _draft_model(drafters: Drafters, request: Request, slot: Slot) -> CostlyDrafter | None:
    if drafters.draft is None or slot.drafting is None:
        return None
    settings, model = request.sampling, drafters.draft.model
    # With a seed the text must not depend on how many tokens were drafted; the ratio rule would make it
    # depend on that.
    q = Sampling()
    if settings.seed is None and settings.temperature > 0:
        q = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    return drafters.draft.make(
        slot.drafting, model.context_length, q, is_end=model.vocab.is_end, costs=drafters.draft.costs
    )


FREE: list[Callable[[Drafters, Request, Slot], Drafter | None]] = [_suffix, _corpus]
"""Drafters that cost almost nothing, in the order in which they are asked."""

COSTLY: list[Callable[[Drafters, Request, Slot], CostlyDrafter | None]] = [_draft_model]
"""Drafters that take time, asked if nothing else is worth verifying."""
