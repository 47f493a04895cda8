"""Lossless (a): whatever is drafted, the text is the one plain decoding gives, and the caches stay exact."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from drafters import Alone, Always
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import (
    ALONE,
    Cancelled,
    Draft,
    Drafter,
    EdgespecError,
    LanguageModel,
    Logits,
    Round,
    SharedBatch,
    common_prefix,
)
from edgespec.decode import generate
from edgespec.drafting import ModelDrafter
from edgespec.fakes import ScriptedDrafter, ScriptedModel, noise_script
from edgespec.retrieval import SuffixDrafter
from edgespec.sampling import Sampler, Sampling

VOCAB = 7
SCRIPT = noise_script(VOCAB, seed=1, memory=2)
OTHER = noise_script(VOCAB, seed=2, memory=2)
GREEDY = Sampling()

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
limits = st.lists(st.integers(0, 12), min_size=1, max_size=4)
max_tokens = st.integers(0, 24)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, VOCAB + 1),
    top_p=st.floats(0.1, 1.0),
    min_p=st.floats(0.0, 0.5),
    repetition_penalty=st.floats(0.5, 2.0),
    frequency_penalty=st.floats(-1.0, 1.0),
    presence_penalty=st.floats(-1.0, 1.0),
    seed=st.integers(0, 1000),
    logprobs=st.sampled_from([None, 0, 2]),
)


def plain(context: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """What the target says after `context`: one token at a time, no drafts, no cache, no loop of ours."""
    text, sampler = list(context), Sampler(sampling, context)
    for _ in range(count):
        row = np.array(SCRIPT(text), np.float32)
        text.append(sampler.distribution(row).sample(sampler.uniform()))
        sampler.accept(text[-1], row)
    return text[len(context) :]


def scripted(change: Callable[[list[int]], Sequence[int]]) -> Drafter:
    """A drafter that knows the greedy future and proposes what `change` makes of it."""
    return ScriptedDrafter(lambda context, limit: change(plain(context, limit)))


def wrong(tokens: Sequence[int]) -> list[int]:
    return [(token + 1) % VOCAB for token in tokens]


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "none": lambda: ScriptedDrafter(lambda context, limit: ()),
    "suffix": SuffixDrafter,
    "same model": lambda: Always(ModelDrafter(ScriptedModel(SCRIPT), 1000)),
    "other model": lambda: Always(ModelDrafter(ScriptedModel(OTHER), 1000)),
    "window": lambda: Always(ModelDrafter(ScriptedModel(OTHER), 20, window=4)),
    "oracle": lambda: scripted(list),
    "always wrong": lambda: scripted(wrong),
    "right, then wrong": lambda: scripted(lambda t: [*t[: len(t) // 2], *wrong(t[len(t) // 2 :])]),
    "out of order": lambda: scripted(lambda t: t[::-1]),
    "any length": lambda: scripted(lambda t: t[: sum(t) % (len(t) + 1)]),
}
SAMPLED_DRAFTS: dict[str, Callable[[], Drafter]] = {
    "sampled": lambda: Always(ModelDrafter(ScriptedModel(OTHER), 1000, Sampling(1.0, seed=3))),
    "sampled, sure": lambda: Always(ModelDrafter(ScriptedModel(SCRIPT), 1000, Sampling(0.5, seed=4))),
}


class Lengths(Alone):
    """A controller that asks its drafter for the given numbers of tokens in turn, and pads in turn."""

    def __init__(self, drafter: Drafter, values: Sequence[int], padding: Sequence[int] = (0,)) -> None:
        super().__init__(drafter)
        self._values, self._padding = itertools.cycle(values), itertools.cycle(padding)

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        tokens, padding = min(limit, next(self._values)), next(self._padding)
        draft = self._drafter.propose(context, tokens) if tokens else Draft()
        return dataclasses.replace(draft, padding=min(padding, limit - len(draft.tokens)))


class Stop:
    """Ends the text at a token or at a position, and remembers what it was asked."""

    def __init__(self, token: int | None = None, position: int | None = None) -> None:
        self._token, self._position = token, position
        self.asked: list[int] = []

    def __call__(self, token: int) -> bool:
        self.asked.append(token)
        return token == self._token or len(self.asked) == self._position

    def cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        """`tokens` up to the one that ends them, and whether one does."""
        fresh = Stop(self._token, self._position)
        end = next((i + 1 for i, token in enumerate(tokens) if fresh(token)), None)
        return tokens[:end], end is not None


class Watched:
    """Passes a drafter's drafts on, and checks what the loop asks of it."""

    def __init__(self, drafter: Drafter, target: LanguageModel, end: int) -> None:
        self._drafter, self._target, self._end = drafter, target, end

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        before = list(context)
        assert 0 < limit < self._end - len(context)
        assert list(self._target.tokens) == before[:-1]
        draft = self._drafter.propose(context, limit)
        assert list(context) == before
        assert len(draft.tokens) == len(draft.confidence) <= limit
        return draft


def run(
    context: list[int],
    drafter: Drafter,
    ks: Sequence[int],
    count: int,
    stop: Stop | None = None,
    sampling: Sampling = GREEDY,
    target: ScriptedModel | None = None,
    padding: Sequence[int] = (0,),
) -> list[Round]:
    """Generate into `context` with every promise of the loop checked at every yield."""
    target = target or ScriptedModel(SCRIPT)
    stop = stop or Stop()
    end = len(context) + count
    controller = Lengths(Watched(drafter, target, end), ks, padding)
    before, kept = list(context), common_prefix(target.tokens, context[:-1])
    start, rounds = len(context), []
    target.evaluated.clear()
    sampler = Sampler(sampling, context)
    for round_ in generate(target, context, controller, sampler, stop, count):
        rows = round_.draft.rows
        assert target.evaluated[-1] == (len(before) - kept + rows - 1, rows)
        assert rows == 1 or rounds  # the first round drafts nothing
        assert len(round_.tokens) == round_.accepted + 1 <= len(round_.draft.tokens) + 1 <= rows
        before += round_.tokens
        kept = len(before) - 1
        assert context == before
        assert list(target.tokens) == before[:-1]
        assert len(context) <= end
        assert stop.asked == context[start:]
        scored = [] if sampling.logprobs is None else list(round_.tokens)
        assert [scores.token for scores in round_.logprobs] == scored
        rounds.append(round_)
    assert list(target.tokens) == before[:-1] if rounds else common_prefix(target.tokens, before) == kept
    assert len(target.evaluated) == len(rounds)
    assert controller.observed == rounds
    assert [r.done for r in rounds[:-1]] == [False] * len(rounds[:-1])
    return rounds


@pytest.mark.parametrize("name", [*DRAFTERS, *SAMPLED_DRAFTS])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(prompts, limits, limits, max_tokens, st.sampled_from([None, *range(VOCAB)]), st.integers(1, 30))
def test_greedy_text_is_plain_decodings(
    name: str, prompt: list[int], ks: list[int], pads: list[int], count: int, token: int | None, position: int
) -> None:
    stop = Stop(token, position)
    context = list(prompt)
    rounds = run(context, (DRAFTERS | SAMPLED_DRAFTS)[name](), ks, count, stop, padding=pads)
    expected, ended = stop.cut(plain(prompt, count))
    assert context == prompt + expected
    assert any(r.done for r in rounds) == ended


@pytest.mark.parametrize("k", range(13))
@pytest.mark.parametrize("name", [*DRAFTERS, *SAMPLED_DRAFTS])
def test_every_draft_length(name: str, k: int) -> None:
    context = [1, 2]
    run(context, (DRAFTERS | SAMPLED_DRAFTS)[name](), [k], 30)
    assert context == [1, 2, *plain([1, 2], 30)]


@pytest.mark.parametrize("name", DRAFTERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(prompts, limits, max_tokens, samplings)
def test_sampled_text_is_plain_decodings(
    name: str, prompt: list[int], ks: list[int], count: int, sampling: Sampling
) -> None:
    context = list(prompt)
    run(context, DRAFTERS[name](), ks, count, sampling=sampling)
    assert context == prompt + plain(prompt, count, sampling)


def test_right_drafts_are_kept_and_wrong_ones_cost_no_token() -> None:
    rounds = run([1, 2, 3], DRAFTERS["oracle"](), [4], 20)
    assert [len(r.tokens) for r in rounds] == [1, 5, 5, 5, 4]
    assert {source for r in rounds for source in r.draft.sources} == {"scripted"}
    rounds = run([1, 2, 3], DRAFTERS["always wrong"](), [4], 20)
    assert [(len(r.tokens), r.accepted) for r in rounds] == [(1, 0)] * 20
    assert [len(r.draft.tokens) for r in rounds] == [0] + [4] * 15 + [3, 2, 1, 0]


def test_seconds_have_their_parts() -> None:
    for round_ in run([1, 2, 3], DRAFTERS["same model"](), [4], 20):
        assert round_.drafting >= 0.0
        assert round_.waiting > 0.0
        assert round_.drafting + round_.waiting <= round_.seconds


def test_a_long_prompt_materialises_one_row() -> None:
    target = ScriptedModel(SCRIPT)
    run([1, 2, 3] * 1000, DRAFTERS["suffix"](), [8], 10, target=target)
    assert target.evaluated[0] == (3000, 1)
    assert all(new == last <= 9 for new, last in target.evaluated[1:])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(prompts, limits, st.integers(1, 20), st.integers(0, 30), prompts)
def test_an_edited_context_costs_what_changed(
    prompt: list[int], ks: list[int], count: int, keep: int, edit: list[int]
) -> None:
    target, context = ScriptedModel(SCRIPT), list(prompt)
    run(context, DRAFTERS["oracle"](), ks, count, target=target)
    held = context[:-1]
    edited = context[:keep] + edit
    text = list(edited)
    run(text, DRAFTERS["oracle"](), ks, count, target=target)
    assert text == edited + plain(edited, count)
    shared = len(
        [1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(held, edited[:-1], strict=False))]
    )
    assert target.evaluated[0] == (len(edited) - shared, 1)


@pytest.mark.parametrize("name", [*DRAFTERS, *SAMPLED_DRAFTS])
def test_a_consumer_may_leave_at_any_round(name: str) -> None:
    for rounds in range(1, 12):
        target, context = ScriptedModel(SCRIPT), [1, 2, 3]
        drafter = (DRAFTERS | SAMPLED_DRAFTS)[name]()
        loop = generate(target, context, Lengths(drafter, [5]), Sampler(GREEDY), Stop(), 12)
        yielded = sum(len(r.tokens) for r in itertools.islice(loop, rounds))
        loop.close()
        assert context == [1, 2, 3, *plain([1, 2, 3], yielded)]
        assert list(target.tokens) == context[:-1]
        run(context, drafter, [5], 5, target=target)
        assert context == [1, 2, 3, *plain([1, 2, 3], yielded + 5)]


class Failing(ScriptedModel):
    """Raises at one call of forward, holding `share` of what it would have held."""

    def __init__(self, call: int, share: float, error: Exception) -> None:
        super().__init__(SCRIPT)
        self._call, self._share, self._error = call, share, error

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        held, failing = len(self.tokens), len(self.evaluated) == self._call
        logits = super().forward(new, last)
        if failing:
            self.rollback(held + round(self._share * len(new)))
            raise self._error
        return logits

    def stop_failing(self) -> None:
        self._call = -1


@pytest.mark.parametrize("error", [Cancelled(), RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["none", "suffix", "other model", "oracle", "always wrong"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(prompts, limits, st.integers(0, 12), st.sampled_from([0.0, 0.4, 1.0]))
def test_a_stopped_forward_leaves_the_cache_exact(
    name: str, error: Exception, prompt: list[int], ks: list[int], call: int, share: float
) -> None:
    target, context, rounds = Failing(call, share, error), list(prompt), 0
    drafter = DRAFTERS[name]()
    loop = generate(target, context, Lengths(drafter, ks), Sampler(GREEDY), Stop(), 15)
    try:
        for _ in loop:
            rounds += 1
    except type(error):
        assert rounds == call
    else:
        assert rounds <= call
    assert context == prompt + plain(prompt, len(context) - len(prompt))
    assert list(target.tokens) == context[: len(target.tokens)]
    assert len(target.tokens) <= len(context) - 1
    assert rounds == 0 or len(target.tokens) == len(context) - 1
    target.stop_failing()
    before = list(context)
    run(context, drafter, ks, 6, target=target)
    assert context == before + plain(before, 6)


@pytest.mark.parametrize("where", ["drafter", "done", "sampler", "draft model"])
def test_a_failure_next_to_the_target_leaves_its_cache_exact(where: str) -> None:
    target, context = ScriptedModel(SCRIPT), [1, 2, 3]
    drafter = DRAFTERS["oracle"]()
    done: Callable[[int], bool] = Stop()

    def fail(*_: object) -> int:
        if len(context) > 3:
            raise EdgespecError("no")
        return 0

    sampler = Sampler(GREEDY)
    if where == "drafter":
        drafter = ScriptedDrafter(fail)
    elif where == "draft model":
        drafter = Always(ModelDrafter(Failing(2, 0.5, EdgespecError("no")), 1000))
    elif where == "done":
        done = fail
    else:
        target = ScriptedModel(lambda tokens: [np.nan] * VOCAB if len(tokens) > 4 else SCRIPT(tokens))
    loop = generate(target, context, Lengths(drafter, [4]), sampler, done, 12)
    with pytest.raises(EdgespecError):
        list(loop)
    assert context == [1, 2, 3, *plain([1, 2, 3], len(context) - 3)]
    assert len(context) > 3
    assert list(target.tokens) == context[:-1]


class Forgetful(ScriptedModel):
    """A recurrent model: its memory cannot be cut."""

    def rollback(self, length: int) -> None:
        if length < len(self.tokens):
            super().rollback(0)


@pytest.mark.parametrize("name", [*DRAFTERS, *SAMPLED_DRAFTS])
def test_a_model_that_cannot_forget_its_end(name: str) -> None:
    target, context = Forgetful(SCRIPT), [1, 2, 3]
    drafter = (DRAFTERS | SAMPLED_DRAFTS)[name]()
    rounds = list(generate(target, context, Lengths(drafter, [3]), Sampler(GREEDY), Stop(), 20))
    assert context == [1, 2, 3, *plain([1, 2, 3], 20)]
    if name == "none":
        assert target.evaluated == [(3, 1)] + [(1, 1)] * 19
    assert sum(len(r.tokens) for r in rounds) == 20


def test_nothing_is_generated_when_nothing_may_be() -> None:
    context = [1, 2, 3]
    assert run(context, DRAFTERS["oracle"](), [4], 0) == []
    assert context == [1, 2, 3]
