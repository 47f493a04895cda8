"""Drafters guess what they say they guess, and do no work twice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import Draft, Drafter
from edgespec.drafting import FirstOf, ModelDrafter, NoDrafter, SuffixAutomaton, SuffixDrafter, common_prefix
from edgespec.fakes import ScriptedDrafter, ScriptedModel, noise_script
from edgespec.sampling import Sampler, Sampling

VOCAB = 7
SCRIPT = noise_script(VOCAB, seed=1)
relaxed = settings(max_examples=200, deadline=None, derandomize=True)
texts = st.integers(1, 4).flatmap(lambda letters: st.lists(st.integers(0, letters), max_size=60))


def ends(text: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where `part` ends in `text`, the end of `text` itself left out."""
    return [e for e in range(len(part), len(text)) if text[e - len(part) : e] == part]


def longest_match(text: Sequence[int]) -> int:
    return max((n for n in range(1, len(text)) if ends(text, text[len(text) - n :])), default=0)


@relaxed
@given(texts)
def test_the_automaton_finds_the_longest_earlier_match(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for n, token in enumerate(text, 1):
        automaton.append(token)
        assert automaton.tokens == text[:n]
        length = automaton.match_length
        assert length == longest_match(text[:n])
        if length:
            assert automaton.match_end in ends(text[:n], text[n - length : n])


@pytest.mark.parametrize("letters", [1, 2, 4, 50])
def test_the_automaton_stays_small(letters: int) -> None:
    automaton = SuffixAutomaton()
    for n in range(1, 3000):
        automaton.append(hash((n * n, letters)) % letters)
        assert len(automaton._link) <= 2 * n
        assert len(automaton._link) == len(automaton._next) == len(automaton._length) == len(automaton._end)


def test_the_latest_of_two_matches_is_followed() -> None:
    drafter = SuffixDrafter(min_match=2)
    text = [1, 2, 7, 5, 1, 2, 8, 6, 1, 2]
    for n in range(len(text)):
        drafter.propose(text[:n], 1)
    draft = drafter.propose(text, 2)
    assert (draft.tokens, draft.confidence, draft.source) == ((8, 6), (0.5, 0.5), "suffix")


@relaxed
@given(st.lists(st.tuples(st.integers(0, 60), texts, st.integers(0, 9)), max_size=6), st.integers(1, 4))
def test_suffix_drafts_follow_an_earlier_match(edits: list[tuple[int, list[int], int]], least: int) -> None:
    """However the context was cut, edited or extended since the last call."""
    drafter, context = SuffixDrafter(least), []
    for keep, more, limit in edits:
        context = context[:keep] + more
        before = list(context)
        draft = drafter.propose(context, limit)
        assert context == before
        length = longest_match(context)
        assert len(draft.tokens) == len(draft.confidence) <= limit
        assert draft.probs is None
        if length < least or limit == 0:
            assert draft.tokens == ()
            continue
        follows = [context[end : end + len(draft.tokens)] for end in ends(context, context[-length:])]
        assert list(draft.tokens) in follows
        assert 1 <= len(draft.tokens) <= max(2, length)
        assert set(draft.confidence) == {length / (length + 2)}


def test_longer_matches_are_trusted_more() -> None:
    confidence = [SuffixDrafter().propose([*range(n), 99, *range(n)], 1).confidence[0] for n in (6, 9, 12)]
    assert confidence == sorted(set(confidence))
    assert 0.5 <= confidence[0] < confidence[-1] < 1.0


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
    draft = ModelDrafter(ScriptedModel(SCRIPT), 100, min_confidence=0.0).propose([1, 2, 3], 6)
    assert draft.tokens == greedy([1, 2, 3], 6)
    assert draft.probs is None
    assert draft.source == "model"
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
    drafter = ModelDrafter(model, 1000, Sampling(temperature, seed=1), min_confidence=0.0)
    context = [1]
    for keep, more, limit in edits:
        context = [*(context[:keep] or [1]), *more]
        held = list(model.tokens)
        model.evaluated.clear()
        draft = drafter.propose(context, limit)
        assert len(draft.tokens) == limit
        if limit == 0:
            assert (model.evaluated, model.tokens) == ([], held)
            continue
        # The row after the context is needed, so its last token is evaluated even if it was seen.
        new = len(context) - min(common_prefix(held, context), len(context) - 1)
        assert model.evaluated == [(new, 1)] + [(1, 1)] * (limit - 1)
        assert list(model.tokens) == [*context, *draft.tokens[:-1]]


def test_accepted_tokens_are_not_evaluated_again() -> None:
    model, context = ScriptedModel(SCRIPT), [1, 2, 3]
    drafter = ModelDrafter(model, 1000, min_confidence=0.0)
    for accepted in (4, 0, 2, 4, 3, 4):
        draft = drafter.propose(context, 4)
        wrong = (greedy([*context, *draft.tokens[:accepted]], 1)[0] + 1) % VOCAB
        context += [*draft.tokens[:accepted], wrong]
        model.evaluated.clear()
        drafter.propose(context, 1)
        # All accepted: the last drafted token was never evaluated, and the target's own token follows it.
        assert model.evaluated == [(2 if accepted == 4 else 1, 1)]


def test_a_parked_model_catches_up_in_one_batch() -> None:
    model, context = ScriptedModel(SCRIPT), [1, 2, 3]
    drafter = ModelDrafter(model, 1000, min_confidence=0.0)
    drafter.propose(context, 2)
    context += [t % VOCAB for t in range(200)]
    for limit in (0, 0):
        assert drafter.propose(context, limit) == Draft()
    model.evaluated.clear()
    assert drafter.propose(context, 3).tokens == greedy(context, 3)
    shared = common_prefix([1, 2, 3, *greedy([1, 2, 3], 1)], context)
    assert model.evaluated == [(203 - shared, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_drafts_end_where_q_is_unsure(temperature: float, threshold: float) -> None:
    """A function of q alone: in every position the token drawn may be any, but never after an unsure q."""
    lengths = set()
    for seed in range(150):
        context = [seed % 7, seed // 7 % 7, seed % 5]
        drafter = ModelDrafter(ScriptedModel(SCRIPT), 100, Sampling(temperature, seed=seed), threshold)
        tokens = drafter.propose(context, 5).tokens
        sure = [surest([*context, *tokens[:i]]) >= threshold for i in range(len(tokens) + 1)]
        assert all(sure[:-1])
        assert len(tokens) == 5 or not sure[-1]
        lengths.add(len(tokens))
    assert len(lengths) > 2


def test_the_end_of_a_draft_does_not_depend_on_the_token_drawn() -> None:
    lengths, firsts = set(), set()
    for seed in range(100):  # one token is drafted whatever it is: the threshold was passed before it
        drafter = ModelDrafter(
            ScriptedModel(lambda tokens: [1.0, 0.5, 0.0, -1.0]), 100, Sampling(1.0, seed=seed)
        )
        draft = drafter.propose([1], 3)
        lengths.add(len(draft.tokens))
        firsts.add(draft.tokens[0])
    assert lengths == {3}
    assert firsts == {0, 1, 2, 3}


@pytest.mark.parametrize("size", range(1, 14))
def test_capacity_is_respected(size: int) -> None:
    model = ScriptedModel(SCRIPT, capacity=10)  # raises when it is exceeded
    draft = ModelDrafter(model, 10, min_confidence=0.0).propose([1] * size, 5)
    assert len(draft.tokens) == max(0, min(5, 10 - size))
    assert len(model.tokens) <= 10


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(0.7, top_k=3), Sampling(1.5, seed=3)])
def test_q_comes_with_sampled_drafts_alone(sampling: Sampling | None) -> None:
    draft = ModelDrafter(ScriptedModel(SCRIPT), 100, sampling, min_confidence=0.0).propose([1, 2, 3], 5)
    assert len(draft.tokens) == len(draft.confidence) == 5
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
    drafter = ModelDrafter(ScriptedModel(SCRIPT), 100, Sampling(1.0, seed=1), min_confidence=0.0)
    count = 4000
    found = [0] * VOCAB
    for _ in range(count):
        found[drafter.propose([1, 2, 3], 1).tokens[0]] += 1
    q = Sampler(Sampling(1.0)).distribution(np.array(SCRIPT([1, 2, 3]), np.float32))
    for token, n in enumerate(found):
        p = q.prob(token)
        assert abs(n - count * p) < 5 * math.sqrt(count * p * (1 - p)) + 1


def test_the_first_that_guesses_is_taken() -> None:
    asked: list[str] = []

    def drafter(name: str, *tokens: int) -> Drafter:
        return ScriptedDrafter(lambda context, limit: (asked.append(name), tokens)[1])

    drafters = FirstOf(drafter("a"), drafter("b", 1, 2), drafter("c", 3))
    assert drafters.propose([5], 8).tokens == (1, 2)
    assert asked == ["a", "b"]
    assert FirstOf(drafter("a"), NoDrafter()).propose([5], 8) == Draft()
    assert FirstOf().propose([5], 8) == Draft()


@relaxed
@given(texts, texts, st.sampled_from([0, 1020, 1024, 2048, 5000]))
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    a, b = [9] * shared + a, [9] * shared + b
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
    assert common_prefix(tuple(a), b) == common_prefix(b, a) == n
