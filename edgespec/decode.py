"""The decoding loop. One round: guess, check the guess in one batch, keep what the target agrees with.

`speculate` is the algorithm, without a model: a generator that asks for one forward pass and returns a Round.
`advance` drives it for any number of texts in one pass, `generate` for one text to its end.
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
"""LanguageModel.forward of several sequences at once: (sequence, new tokens, rows wanted) of each."""


Propose = Callable[[Sequence[int], int], Draft]
"""The draft to verify after a context, of at most so many tokens."""


def speculate(
    context: list[int], propose: Propose, limit: int, sampler: Sampler, done: Done
) -> Generator[Forward, Logits, Round]:
    """One round of at most limit + 1 tokens after `context`, which it does not change."""
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
    """A text being written: `context` grows round by round until `done` or `max_tokens` say so.

    After every pass target.tokens is context[:-1] or, before its first round has ended, a prefix of it. The
    first round drafts nothing: no drafter reads a prompt before the target has answered it.
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
        """Tokens of the context that the target has not read, the last one aside."""
        return len(self.context) - 1 - len(self.target.tokens)

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most tokens that it can have evaluated in the next round."""
        fewest = self.lacking + 1
        return fewest, fewest + self._end - len(self.context) - 1

    def offer(self, rows: int, shared: SharedBatch) -> DraftCandidate:
        """What it would draft in a round of at most `rows` rows."""
        limit = self.limit(rows)
        return self.controller.offer(self.context, limit, shared) if limit > 0 else DraftCandidate()

    def plan(
        self, rows: int, draft: Draft | None = None
    ) -> tuple[Generator[Forward, Logits, Round], ForwardRequest]:
        """A round of at most `rows` rows, or one that verifies `draft`, and what it asks of the target."""

        def propose(context: Sequence[int], limit: int) -> Draft:
            return self.controller.propose(context, limit, ALONE) if draft is None else draft

        limit = self.limit(rows) if draft is None else draft.rows - 1
        step = speculate(self.context, propose, limit, self._sampler, self._done)
        ask = next(step)
        padding = [self.context[-1]] * ask.padding
        new = [*self.context[len(self.target.tokens) :], *ask.draft, *padding]
        return step, (self.target, new, 1 + len(ask.draft) + ask.padding)

    def limit(self, rows: int) -> int:
        """How many tokens may be guessed in a round of `rows` rows."""
        return min(self._end - len(self.context), rows) - 1 if len(self.context) > self._first else 0

    def take(self, round_: Round) -> None:
        """A round is over."""
        self.context.extend(round_.tokens)
        self.target.rollback(len(self.context) - 1)
        self.over = round_.done or len(self.context) >= self._end
        self.controller.observe(round_)

    def fail(self, error: EdgespecError) -> None:
        """It cannot go on."""
        self.error, self.over = error, True
        self.undo()

    def undo(self) -> None:
        """A pass failed: keep of what it evaluated only what belongs to the context."""
        self.target.rollback(min(len(self.target.tokens), len(self.context) - 1))


def advance(
    texts: Sequence[Generation],
    forward: ForwardAll,
    rows: int = 1 << 30,
    chunk: int = 1 << 30,
    sharing: BatchPlanner | None = None,
) -> list[Round | None]:
    """One forward pass for all `texts`, none of which is over: a round of each, None where none came about.

    At most `rows` rows of logits, which is no less than the number of texts; `sharing` says how many each
    has, without it several texts guess nothing. A text that lacks more than `chunk` tokens only reads so
    many, so that the others need not wait for all of it. An EdgespecError of one text ends that text alone,
    and is its `error`; what the pass itself raises is raised.
    """
    reading = [text for text in texts if text.lacking > chunk]
    writing = [text for text in texts if text.lacking <= chunk]
    alone = not any(text.lacking for text in texts)  # with their rows: no prompts are read beside them
    rows -= len(reading)
    asking: list[tuple[Generation, Generator[Forward, Logits, Round] | None, ForwardRequest]] = []
    for text in reading:
        held = len(text.target.tokens)
        asking.append((text, None, (text.target, text.context[held : held + chunk], 1)))
    rounds: dict[Generation, Round] = {}
    try:
        drafts = _drafts(writing, rows, sharing, [chunk] * len(reading)) if len(writing) > 1 else {}
        for text in writing:
            try:
                if text.error is None:
                    asking.append((text, *text.plan(rows, drafts.get(text))))
            except EdgespecError as error:
                text.fail(error)
        start = perf_counter()
        answers = forward([request for _, _, request in asking]) if asking else []
        seconds = perf_counter() - start
        for (text, step, _), logits in zip(asking, answers, strict=True):
            if step is not None:
                try:
                    rounds[text] = _answer(step, logits)
                except EdgespecError as error:
                    text.fail(error)
    except BaseException:
        for text in texts:
            text.undo()
        raise
    taken = sum(request[2] for _, _, request in asking)
    written = sum(len(round_.tokens) for round_ in rounds.values())
    even = len({len(new) for _, _, (_, new, _) in asking}) == 1  # or it was more than one pass of the engine
    if sharing is not None and alone and len(rounds) > 1:
        sharing.observe(written, seconds)
    for i, (text, round_) in enumerate(rounds.items()):
        rounds[text] = replace(
            round_,
            shared=SharedBatch(len(rounds) - 1, taken - round_.draft.rows),
            shared_tokens=written - len(round_.tokens),
            timed=alone and even and i == 0,
        )
        text.take(rounds[text])
    return [rounds.get(text) for text in texts]


def _drafts(
    texts: Sequence[Generation], rows: int, sharing: BatchPlanner | None, reading: Sequence[int]
) -> dict[Generation, Draft]:
    """What each of several texts has checked in a pass of at most `rows` rows; those that fail have none.

    `reading`: how many tokens others only read in it.
    """
    offers: dict[Generation, DraftCandidate] = {}
    most = rows // len(texts)
    for text in texts:
        others = SharedBatch(len(texts) - 1, len(texts) - 1)
        try:
            offers[text] = text.offer(most, others) if sharing is not None else DraftCandidate()
        except EdgespecError as error:
            text.fail(error)
    each = 1
    if sharing is not None and offers:
        bounds = [*(text.bounds for text in offers), *((n, n) for n in reading)]
        each = sharing.rows(list(offers.values()), bounds, most, _mean_length(texts))
    drafts: dict[Generation, Draft] = {}
    for text, offer in offers.items():
        fewest, largest = text.bounds
        kept = min(len(offer.draft.tokens), each - 1)
        drafts[text] = offer.draft.cut(kept, max(0, min(each, largest) - fewest - kept))
    return drafts


def _mean_length(texts: Sequence[Generation]) -> int:
    return sum(len(text.context) for text in texts) // len(texts)


def generate(
    target: LanguageModel,
    context: list[int],
    controller: Controller,
    sampler: Sampler,
    done: Done,
    max_tokens: int,
) -> Generator[Round, None, None]:
    """Append to `context` (at least one token) round by round until `done` or `max_tokens` say so.

    At every yield, and whenever the loop is left, target.tokens is context[:-1] or, before the first round
    has ended, a prefix of it.
    """
    text = Generation(target, context, controller, sampler, done, max_tokens)

    def forward(requests: Sequence[ForwardRequest]) -> Sequence[Logits]:
        return [target.forward(new, last) for _, new, last in requests]

    while not text.over:
        (round_,) = advance([text], forward)
        if text.error is not None:
            raise text.error
        assert round_ is not None
        yield round_


def _answer(step: Generator[Forward, Logits, Round], logits: Logits) -> Round:
    try:
        step.send(logits)
    except StopIteration as finished:
        round_: Round = finished.value
        return round_
    raise AssertionError("a round asks for one forward pass")
