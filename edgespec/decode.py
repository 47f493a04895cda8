"""The decoding loop. One round: draft, verify the draft in one batch, keep what the target accepts.

`speculate` is the algorithm, without a model: a generator that requests one forward pass and returns a Round.
`advance` drives it for any number of generations in one pass, `generate` for one generation to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from time import perf_counter

from edgespec.batch_planner import BatchPlanner
from edgespec.core import (
    ALONE,
    Controller,
    Done,
    Draft,
    DraftCandidate,
    EdgespecError,
    Forward,
    LanguageModel,
    Logits,
    Round,
    SharedBatch,
    common_prefix,
)
from edgespec.sampling import Sampler
from edgespec.verify import verify

ForwardRequest = tuple[LanguageModel, Sequence[int], int]
ForwardAll = Callable[[Sequence[ForwardRequest]], Sequence[Logits]]
"""LanguageModel.forward for several sequences at once: (sequence, new tokens, rows wanted) of each."""


_REPLAYED = 2  # accepted tokens that are evaluated again together with a draft

Propose = Callable[[Sequence[int], int], Draft]
"""Returns the draft to verify after a context, of at most the given number of tokens."""


def speculate(
    context: list[int], propose: Propose, limit: int, sampler: Sampler, done: Done
) -> Generator[Forward, Logits, Round]:
    """Run one round of at most limit + 1 tokens after `context`, which it does not change."""
    start = perf_counter()
    draft = propose(context, limit) if limit > 0 else Draft()
    asked = perf_counter()
    logits = yield Forward(draft.tokens, draft.padding)
    answered = perf_counter()
    verdict = verify(draft, logits[: len(draft.tokens) + 1], sampler, done)
    logprobs, sampler.logprobs = tuple(sampler.logprobs), []
    return Round(
        tokens=(*draft.tokens[: verdict.accepted], verdict.next),
        draft=draft,
        accepted=verdict.accepted,
        seconds=perf_counter() - start,
        drafting=asked - start,
        waiting=answered - asked,
        done=verdict.done,
        logprobs=logprobs,
    )


class Generation:
    """A sequence in generation: `context` grows round by round until `done` or `max_tokens` end it.

    After every pass target.tokens is context[:-1] or, before the end of its first round, a prefix of it. The
    first round drafts nothing: no drafter evaluates a prompt before the target has.
    """

    def __init__(
        self,
        target: LanguageModel,
        context: list[int],
        controller: Controller,
        sampler: Sampler,
        done: Done,
        max_tokens: int,
    ) -> None:
        """`context` holds at least one token."""
        self.target, self.context, self.controller = target, context, controller
        self._sampler, self._done = sampler, done
        self._first, self._end = len(context), len(context) + max_tokens
        self.over = max_tokens < 1
        self.error: EdgespecError | None = None
        target.rollback(common_prefix(target.tokens, context[:-1]))

    @property
    def lacking(self) -> int:
        """Tokens of the context that the target has not evaluated, without the last one."""
        return len(self.context) - 1 - len(self.target.tokens)

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most tokens that it can have evaluated in the next round."""
        fewest = self.lacking + 1
        return fewest, fewest + self._end - len(self.context) - 1

    def offer(self, rows: int, shared: SharedBatch) -> DraftCandidate:
        """Return what it would draft in a round of at most `rows` rows."""
        limit = self.limit(rows)
        return self.controller.offer(self.context, limit, shared) if limit > 0 else DraftCandidate()

    def plan(
        self, rows: int, draft: Draft | None = None
    ) -> tuple[Generator[Forward, Logits, Round], ForwardRequest]:
        """Return a round of at most `rows` rows, or one that verifies `draft`, and its forward pass."""

        def propose(context: Sequence[int], limit: int) -> Draft:
            return self.controller.propose(context, limit, ALONE) if draft is None else draft

        limit = self.limit(rows) if draft is None else draft.rows - 1
        step = speculate(self.context, propose, limit, self._sampler, self._done)
        ask = next(step)
        padding = [self.context[-1]] * ask.padding
        new = [*self.context[len(self.target.tokens) :], *ask.draft, *padding]
        return step, (self.target, new, 1 + len(ask.draft) + ask.padding)

    def limit(self, rows: int) -> int:
        """Return how many tokens may be drafted in a round of `rows` rows.

        None while many accepted tokens are evaluated again: with a draft after them, a rejection would have
        to be followed by the same tokens once more.
        """
        if len(self.context) == self._first or self.lacking > _REPLAYED:
            return 0
        return min(self._end - len(self.context), rows) - 1

    def take(self, round_: Round) -> None:
        """Append the tokens of a finished round."""
        self.context.extend(round_.tokens)
        self.target.rollback(len(self.context) - 1)
        self.over = round_.done or len(self.context) >= self._end
        self.controller.observe(round_)

    def fail(self, error: EdgespecError) -> None:
        """End the generation with `error`."""
        self.error, self.over = error, True
        self.undo()

    def undo(self) -> None:
        """After a failed pass, keep in the cache only what belongs to the context."""
        self.target.rollback(min(len(self.target.tokens), len(self.context) - 1))


def advance(
    generations: Sequence[Generation],
    forward: ForwardAll,
    rows: int = 1 << 30,
    chunk: int = 1 << 30,
    sharing: BatchPlanner | None = None,
) -> list[Round | None]:
    """Run one forward pass for all `generations`, none of which is over; return the round of each, if any.

    The pass has at most `rows` rows of logits, which is no less than the number of generations. `sharing`
    plans how many each has; without it, several generations draft nothing. A generation that lacks more than
    `chunk` tokens evaluates only that many of its prompt, so that the others do not wait for all of it. An
    EdgespecError of one generation ends only that one, and is its `error`; errors of the pass are raised.
    """
    prefilling = [generation for generation in generations if generation.lacking > chunk]
    decoding = [generation for generation in generations if generation.lacking <= chunk]
    # Without a prefill in the pass, its cost is that of the rows.
    alone = not any(generation.lacking for generation in generations)
    rows -= len(prefilling)
    requested: list[tuple[Generation, Generator[Forward, Logits, Round] | None, ForwardRequest]] = []
    for generation in prefilling:
        held = len(generation.target.tokens)
        requested.append((generation, None, (generation.target, generation.context[held : held + chunk], 1)))
    rounds: dict[Generation, Round] = {}
    try:
        drafts = _drafts(decoding, rows, sharing, [chunk] * len(prefilling)) if len(decoding) > 1 else {}
        for generation in decoding:
            try:
                if generation.error is None:
                    requested.append((generation, *generation.plan(rows, drafts.get(generation))))
            except EdgespecError as error:
                generation.fail(error)
        start = perf_counter()
        results = forward([request for _, _, request in requested]) if requested else []
        seconds = perf_counter() - start
        for (generation, step, _), logits in zip(requested, results, strict=True):
            if step is not None:
                try:
                    rounds[generation] = _answer(step, logits)
                except EdgespecError as error:
                    generation.fail(error)
    except BaseException:
        for generation in generations:
            generation.undo()
        raise
    taken = sum(request[2] for _, _, request in requested)
    yielded = sum(len(round_.tokens) for round_ in rounds.values())
    even = len({len(new) for _, _, (_, new, _) in requested}) == 1  # else the engine ran more than one pass
    if sharing is not None and alone and len(rounds) > 1:
        sharing.observe(yielded, seconds)
    for i, (generation, round_) in enumerate(rounds.items()):
        rounds[generation] = replace(
            round_,
            shared=SharedBatch(len(rounds) - 1, taken - round_.draft.rows),
            shared_tokens=yielded - len(round_.tokens),
            timed=alone and even and i == 0,
        )
        generation.take(rounds[generation])
    return [rounds.get(generation) for generation in generations]


def _drafts(
    generations: Sequence[Generation], rows: int, sharing: BatchPlanner | None, prefills: Sequence[int]
) -> dict[Generation, Draft]:
    """Return what each generation verifies in a pass of at most `rows` rows.

    Generations that fail have none. `prefills`: the tokens that each of the others evaluates in the pass.
    """
    offers: dict[Generation, DraftCandidate] = {}
    most = rows // len(generations)
    for generation in generations:
        others = SharedBatch(len(generations) - 1, len(generations) - 1)
        try:
            offers[generation] = generation.offer(most, others) if sharing is not None else DraftCandidate()
        except EdgespecError as error:
            generation.fail(error)
    each = 1
    if sharing is not None and offers:
        bounds = [*(generation.bounds for generation in offers), *((n, n) for n in prefills)]
        each = sharing.rows(list(offers.values()), bounds, most, _mean_length(generations))
    drafts: dict[Generation, Draft] = {}
    for generation, offer in offers.items():
        fewest, largest = generation.bounds
        kept = min(len(offer.draft.tokens), each - 1)
        drafts[generation] = offer.draft.cut(kept, max(0, min(each, largest) - fewest - kept))
    return drafts


def _mean_length(generations: Sequence[Generation]) -> int:
    return sum(len(generation.context) for generation in generations) // len(generations)


def generate(
    target: LanguageModel,
    context: list[int],
    controller: Controller,
    sampler: Sampler,
    done: Done,
    max_tokens: int,
) -> Generator[Round, None, None]:
    """Append to `context` (at least one token) round by round until `done` or `max_tokens` end it.

    At every yield, and whenever the loop is left, target.tokens is context[:-1] or, before the end of the
    first round, a prefix of it.
    """
    generation = Generation(target, context, controller, sampler, done, max_tokens)

    def forward(requests: Sequence[ForwardRequest]) -> Sequence[Logits]:
        return [target.forward(new, last) for _, new, last in requests]

    while not generation.over:
        (round_,) = advance([generation], forward)
        if generation.error is not None:
            raise generation.error
        assert round_ is not None
        yield round_


def _answer(step: Generator[Forward, Logits, Round], logits: Logits) -> Round:
    try:
        step.send(logits)
    except StopIteration as finished:
        round_: Round = finished.value
        return round_
    raise AssertionError("a round requests one forward pass")
