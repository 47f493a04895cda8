"""The decoding loop. One round: guess, check the guess in one batch, keep what the target agrees with.

`speculate` is the algorithm, without a model: a generator that asks for one forward pass and returns a Round.
`advance` drives it for any number of texts in one pass, `generate` for one text to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from time import perf_counter

from edgespec.core import (
    Controller,
    Done,
    Draft,
    Drafter,
    EdgespecError,
    Forward,
    LanguageModel,
    Logits,
    Round,
    common_prefix,
)
from edgespec.sampling import Sampler
from edgespec.verify import verify

Request = tuple[LanguageModel, Sequence[int], int]
ForwardAll = Callable[[Sequence[Request]], Sequence[Logits]]
"""LanguageModel.forward of several sequences at once: (sequence, new tokens, rows wanted) of each."""


def speculate(
    context: list[int], drafter: Drafter, limit: int, sampler: Sampler, done: Done
) -> Generator[Forward, Logits, Round]:
    """One round of at most limit + 1 tokens after `context`, which it does not change."""
    start = perf_counter()
    draft = drafter.propose(context, limit) if limit > 0 else Draft()
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


class Text:
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

    def plan(self, rows: int) -> tuple[Generator[Forward, Logits, Round], Request]:
        """A round of at most `rows` rows, and what it asks of the target."""
        limit = min(self._end - len(self.context), rows) - 1 if len(self.context) > self._first else 0
        step = speculate(self.context, self.controller, limit, self._sampler, self._done)
        ask = next(step)
        padding = [self.context[-1]] * ask.padding
        new = [*self.context[len(self.target.tokens) :], *ask.draft, *padding]
        return step, (self.target, new, 1 + len(ask.draft) + ask.padding)

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
    texts: Sequence[Text], forward: ForwardAll, rows: int = 1 << 30, chunk: int = 1 << 30
) -> list[Round | None]:
    """One forward pass for all `texts`, none of which is over: a round of each, None where none came about.

    At most `rows` rows of logits, which is no less than the number of texts. A text that lacks more than
    `chunk` tokens only reads so many, so that the others need not wait for all of it. An EdgespecError of one
    text ends that text alone, and is its `error`; what the pass itself raises is raised.
    """
    reading = [text.lacking > chunk for text in texts]
    alone = not any(text.lacking for text in texts)  # with their rows: no prompts are read beside them
    steps: list[Generator[Forward, Logits, Round] | None] = [None] * len(texts)
    requests: list[Request] = []
    asking: list[int] = []
    taken = 0
    rounds: list[Round | None] = [None] * len(texts)
    try:
        for i, text in enumerate(texts):
            others = len(texts) - i - 1
            if reading[i]:
                held = len(text.target.tokens)
                request: Request = (text.target, text.context[held : held + chunk], 1)
            else:
                text.controller.beside(len(texts) - 1 - sum(reading), taken + others - sum(reading))
                try:
                    steps[i], request = text.plan(rows - taken - others)
                except EdgespecError as error:
                    text.fail(error)
                    continue
            requests.append(request)
            asking.append(i)
            taken += request[2]
        answers = forward(requests) if requests else []
        for i, logits in zip(asking, answers, strict=True):
            if (step := steps[i]) is not None:
                try:
                    rounds[i] = _answer(step, logits)
                except EdgespecError as error:
                    texts[i].fail(error)
    except BaseException:
        for text in texts:
            text.undo()
        raise
    written = sum(len(round_.tokens) for round_ in rounds if round_ is not None)
    for i, request in zip(asking, requests, strict=True):
        if (round_ := rounds[i]) is not None:
            beside = taken - request[2] if alone else None
            round_ = rounds[i] = replace(
                round_, beside_rows=beside, beside_tokens=written - len(round_.tokens)
            )
            texts[i].take(round_)
    return rounds


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
    text = Text(target, context, controller, sampler, done, max_tokens)

    def forward(requests: Sequence[Request]) -> Sequence[Logits]:
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
