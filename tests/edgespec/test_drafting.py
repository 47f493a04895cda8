"""A draft model drafts what it says it drafts, reads nothing twice, and decides before it draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from drafters import drafted
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import Draft, common_prefix
from edgespec.drafting import MODEL, ModelDrafter
from edgespec.fakes import ScriptedModel, noise_script
from edgespec.sampling import Sampler, Sampling

VOCAB = 7
SCRIPT = noise_script(VOCAB, seed=1)
relaxed = settings(max_examples=200, deadline=None, derandomize=True)
texts = st.integers(1, 4).flatmap(lambda letters: st.lists(st.integers(0, letters), max_size=60))


def greedy(context: Sequence[int], count: int) -> tuple[int, ...]:
    text = list(context)
    for _ in range(count):
        text.append(int(np.argmax(SCRIPT(text))))
    return tuple(text[len(context) :])


def surest(context: Sequence[int]) -> float:
    """The probability of the likeliest token."""
    row = SCRIPT(context)
    return 1.0 / sum(math.exp(score - max(row)) for score in row)


def test_a_model_draft_is_its_greedy_text() -> None:
    draft = drafted(ModelDrafter(ScriptedModel(SCRIPT), 100), [1, 2, 3], 6)
    assert draft.tokens == greedy([1, 2, 3], 6)
    assert draft.sources == (MODEL,) * 6
    assert draft.probs is None
    assert draft.padding == 0
    assert draft.confidence == pytest.approx(
        [surest([1, 2, 3, *draft.tokens[:i]]) for i in range(6)], rel=1e-5
    )


@relaxed
@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 6), max_size=5), st.integers(0, 6))),
    st.sampled_from([0.0, 1.0]),
)
def test_a_model_draft_evaluates_nothing_twice(
    edits: list[tuple[int, list[int], int]], temperature: float
) -> None:
    model = ScriptedModel(SCRIPT)
    drafter = ModelDrafter(model, 1000, Sampling(temperature, seed=1))
    context = [1]
    for keep, more, limit in edits:
        context = [*(context[:keep] or [1]), *more]
        before, held = list(context), list(model.tokens)
        # The row after the context is needed, so its last token is evaluated even if it was seen.
        new = len(context) - min(common_prefix(held, context), len(context) - 1)
        assert drafter.lag(context) == new
        assert model.tokens == held
        model.evaluated.clear()
        draft = drafted(drafter, context, limit)
        assert context == before
        assert len(draft.tokens) == limit
        if limit == 0:
            assert model.evaluated == []
            continue
        assert model.evaluated == [(new, 1)] + [(1, 1)] * (limit - 1)
        assert list(model.tokens) == [*context, *draft.tokens[:-1]]


def test_accepted_tokens_are_not_evaluated_again() -> None:
    model, context = ScriptedModel(SCRIPT), [1, 2, 3]
    drafter = ModelDrafter(model, 1000)
    for accepted in (4, 0, 2, 4, 3, 4):
        draft = drafted(drafter, context, 4)
        wrong = (greedy([*context, *draft.tokens[:accepted]], 1)[0] + 1) % VOCAB
        context += [*draft.tokens[:accepted], wrong]
        model.evaluated.clear()
        drafted(drafter, context, 1)
        # All accepted: the last drafted token was never evaluated, and the target's own token follows it.
        assert model.evaluated == [(2 if accepted == 4 else 1, 1)]


def test_a_parked_model_catches_up_in_one_batch() -> None:
    model, context = ScriptedModel(SCRIPT), [1, 2, 3]
    drafter = ModelDrafter(model, 1000, window=400)
    drafted(drafter, context, 2)
    context += [t % VOCAB for t in range(200)]
    model.evaluated.clear()
    for _ in range(2):
        assert drafted(drafter, context, 0) == drafter.draft(context, 5, lambda _: False) == Draft()
    assert model.evaluated == []
    lag = drafter.lag(context)
    assert drafted(drafter, context, 3).tokens == greedy(context, 3)
    shared = common_prefix([1, 2, 3, *greedy([1, 2, 3], 1)], context)
    assert model.evaluated == [(203 - shared, 1), (1, 1), (1, 1)]
    assert lag == 203 - shared
    assert drafter.lag(context) == 1


# The window.


@pytest.mark.parametrize("window", [1, 4, 20])
def test_what_is_far_behind_starts_afresh_at_the_window(window: int) -> None:
    model = ScriptedModel(SCRIPT)
    drafter = ModelDrafter(model, 1000, window=window)
    context = [t % VOCAB for t in range(300)]
    assert drafter.lag(context) == window
    drafted(drafter, context, 2)
    assert model.evaluated == [(window, 1), (1, 1)]
    assert list(model.tokens)[:window] == context[-window:]
    # It goes on from there as long as it keeps up ...
    context = [*context, *model.tokens[window:], 6]
    model.evaluated.clear()
    drafted(drafter, context, 1)
    assert model.evaluated == [(1, 1)]
    # ... and starts afresh when it does not.
    context += [5] * (window + 1)
    drafted(drafter, context, 1)
    assert list(model.tokens) == context[-window:]


def test_a_window_of_the_text_gives_the_draft_of_that_window() -> None:
    script = noise_script(VOCAB, seed=3, memory=50)  # what was not read changes what is drafted
    context = [t % 5 for t in range(300)]
    draft = drafted(ModelDrafter(ScriptedModel(script), 1000, window=10), context, 4)
    assert draft.tokens == drafted(ModelDrafter(ScriptedModel(script), 1000), context[-10:], 4).tokens


def test_an_edit_before_the_window_begins_is_read_afresh() -> None:
    model = ScriptedModel(SCRIPT)
    drafter = ModelDrafter(model, 1000, window=8)
    drafted(drafter, [1] * 100, 2)
    assert drafter.lag([1] * 50) == 8  # shorter than where its cache begins
    short = [2, 3, 4]
    assert drafter.lag(short) == 3
    assert drafted(drafter, short, 4).tokens == greedy(short, 4)
    assert list(model.tokens)[:3] == short


@relaxed
@given(
    st.lists(
        st.tuples(st.integers(0, 80), st.lists(st.integers(0, 6), max_size=30), st.integers(0, 8)), max_size=8
    ),
    st.integers(2, 40),
    st.integers(1, 50),
)
def test_lag_is_what_is_read_and_capacity_is_kept(
    edits: list[tuple[int, list[int], int]], capacity: int, window: int
) -> None:
    """Whatever is edited: the model reads `lag` tokens, all but the last ones it drafted follow the text."""
    model = ScriptedModel(SCRIPT, capacity=capacity)  # raises when it is exceeded
    drafter = ModelDrafter(model, capacity, window=window)
    context = [1]
    for keep, more, limit in edits:
        context = [*(context[:keep] or [1]), *more]
        lag = drafter.lag(context)
        assert 1 <= lag <= max(1, min(window, capacity // 2))
        model.evaluated.clear()
        draft = drafted(drafter, context, limit)
        assert len(draft.tokens) <= limit
        assert (len(draft.tokens) > 0) == (limit > 0)
        if limit:
            assert model.evaluated == [(lag, 1)] + [(1, 1)] * (len(draft.tokens) - 1)
            held = len(model.tokens) - (len(draft.tokens) - 1)
            assert list(model.tokens) == [*context[-held:], *draft.tokens[:-1]]


@pytest.mark.parametrize("size", range(1, 14))
def test_capacity_is_respected(size: int) -> None:
    model = ScriptedModel(SCRIPT, capacity=10)
    draft = drafted(ModelDrafter(model, 10), [1] * size, 8)
    read = size if size <= 5 else 5
    assert len(draft.tokens) == min(8, 10 - read)
    assert len(model.tokens) <= 10


# How far.


def test_more_is_asked_before_every_token_with_the_confidence_so_far() -> None:
    model, asked = ScriptedModel(SCRIPT), list[list[float]]()

    def more(confidence: list[float]) -> bool:
        assert len(model.evaluated) == len(confidence)
        asked.append(list(confidence))
        return len(confidence) < 3

    draft = ModelDrafter(model, 100).draft([1, 2, 3], 10, more)
    assert draft.tokens == greedy([1, 2, 3], 3)
    assert asked == [list(draft.confidence[:i]) for i in range(4)]
    asked.clear()
    model.rollback(0)
    model.evaluated.clear()
    assert len(ModelDrafter(model, 100).draft([1, 2, 3], 2, more).tokens) == 2  # the limit holds besides
    assert len(asked) == 2


def test_nothing_is_evaluated_for_a_draft_that_is_not_wanted() -> None:
    model = ScriptedModel(SCRIPT)
    assert ModelDrafter(model, 100).draft([1, 2, 3], 10, lambda _: False) == Draft()
    assert model.evaluated == []


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_more_depends_on_q_alone(temperature: float, threshold: float) -> None:
    """In every position the token drawn may be any, but never after an unsure q."""
    lengths = set()
    for seed in range(150):
        context = [seed % 7, seed // 7 % 7, seed % 5]
        drafter = ModelDrafter(ScriptedModel(SCRIPT), 100, Sampling(temperature, seed=seed))
        tokens = drafter.draft(context, 5, lambda c: not c or c[-1] >= threshold).tokens
        sure = [surest([*context, *tokens[:i]]) >= threshold for i in range(len(tokens))]
        assert all(sure[:-1])
        assert len(tokens) == 5 or not sure[-1]
        lengths.add(len(tokens))
    assert len(lengths) > 2


def test_confidence_does_not_depend_on_the_token_drawn() -> None:
    confidences, firsts = set(), set()
    for seed in range(100):
        drafter = ModelDrafter(
            ScriptedModel(lambda tokens: [1.0, 0.5, 0.0, -1.0]), 100, Sampling(1.0, seed=seed)
        )
        draft = drafted(drafter, [1], 3)
        confidences.update(draft.confidence)
        firsts.add(draft.tokens[0])
    assert len(confidences) == 1
    assert firsts == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_ends_with_the_token_that_ends_the_text(temperature: float) -> None:
    ended = 0
    for seed in range(60):
        end = seed % VOCAB
        drafter = ModelDrafter(
            ScriptedModel(SCRIPT), 100, Sampling(temperature, seed=seed), is_end=lambda t, end=end: t == end
        )
        tokens = drafted(drafter, [seed % 5, 2, 3], 6).tokens
        assert end not in tokens[:-1]
        assert len(tokens) == 6 or tokens[-1] == end  # and it is drafted, not dropped
        ended += len(tokens) < 6
    assert 0 < ended < 60


# q.


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(0.7, top_k=3), Sampling(1.5, seed=3)])
def test_q_comes_with_sampled_drafts_alone(sampling: Sampling | None) -> None:
    draft = drafted(ModelDrafter(ScriptedModel(SCRIPT), 100, sampling), [1, 2, 3], 5)
    assert len(draft.tokens) == len(draft.confidence) == len(draft.sources) == 5
    if sampling is None or sampling.temperature == 0.0:
        assert draft.probs is None
        return
    assert draft.probs is not None
    for i, q in enumerate(draft.probs):
        row = np.array(SCRIPT([1, 2, 3, *draft.tokens[:i]]), np.float32)
        expected = Sampler(sampling).distribution(row)
        assert q.ids.tolist() == expected.ids.tolist()
        assert q.probs.tolist() == expected.probs.tolist()
        assert q.prob(draft.tokens[i]) > 0.0


def test_sampled_drafts_follow_q() -> None:
    drafter = ModelDrafter(ScriptedModel(SCRIPT), 100, Sampling(1.0, seed=1))
    count = 4000
    found = [0] * VOCAB
    for _ in range(count):
        found[drafted(drafter, [1, 2, 3], 1).tokens[0]] += 1
    q = Sampler(Sampling(1.0)).distribution(np.array(SCRIPT([1, 2, 3]), np.float32))
    for token, n in enumerate(found):
        p = q.prob(token)
        assert abs(n - count * p) < 5 * math.sqrt(count * p * (1 - p)) + 1


@relaxed
@given(texts, texts, st.sampled_from([0, 1020, 1024, 2048, 5000]))
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    a, b = [9] * shared + a, [9] * shared + b
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
    assert common_prefix(tuple(a), b) == common_prefix(b, a) == n
