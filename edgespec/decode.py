"""The decoding loop. One round: guess, check the guess in one batch, keep what the target agrees with.

`speculate` is the algorithm, without a model: a generator that asks for one forward pass and returns a Round,
so that one conversation or many in a batch can drive it. `generate` drives it for one conversation.
"""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter

from edgespec.core import (
    Controller,
    Done,
    Draft,
    Drafter,
    Forward,
    LanguageModel,
    Logits,
    Round,
    common_prefix,
)
from edgespec.sampling import Sampler
from edgespec.verify import verify


def speculate(
    context: list[int], drafter: Drafter, limit: int, sampler: Sampler, done: Done
) -> Generator[Forward, Logits, Round]:
    """One round of at most limit + 1 tokens after `context`, which it does not change."""
    start = perf_counter()
    draft = drafter.propose(context, limit) if limit > 0 else Draft()
    asked = perf_counter()
    logits = yield Forward(draft.tokens, draft.padding)
    answered = perf_counter()
    verdict = verify(draft, logits, sampler, done)
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
    has ended, a prefix of it. The first round drafts nothing: no drafter reads a prompt before the target
    has answered it.
    """
    target.rollback(common_prefix(target.tokens, context[:-1]))
    end = len(context) + max_tokens
    first = len(context)
    while len(context) < end:
        limit = end - len(context) - 1 if len(context) > first else 0
        step = speculate(context, controller, limit, sampler, done)
        try:
            ask = next(step)
            new = [*context[len(target.tokens) :], *ask.draft, *[context[-1]] * ask.padding]
            logits = target.forward(new, 1 + len(ask.draft) + ask.padding)
            round_ = _answer(step, logits[: len(ask.draft) + 1])
        except BaseException:
            target.rollback(min(len(target.tokens), len(context) - 1))
            raise
        context.extend(round_.tokens)
        target.rollback(len(context) - 1)
        controller.observe(round_)
        yield round_
        if round_.done:
            return


def _answer(step: Generator[Forward, Logits, Round], logits: Logits) -> Round:
    try:
        step.send(logits)
    except StopIteration as finished:
        round_: Round = finished.value
        return round_
    raise AssertionError("a round asks for one forward pass")
