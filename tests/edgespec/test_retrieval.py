"""The suffix automaton against plain search and counting, and drafts that depend on the context alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec import retrieval
from edgespec.core import Draft
from edgespec.corpus import Continuation, Corpus, build
from edgespec.planner import Chain
from edgespec.retrieval import CORPUS, SUFFIX, CorpusDrafter, MatchStep, SuffixAutomaton, SuffixDrafter

relaxed = settings(max_examples=250, deadline=None, derandomize=True)
texts = st.integers(0, 4).flatmap(lambda letters: st.lists(st.integers(0, letters), max_size=60))
drafts = st.lists(st.integers(0, 5), max_size=6)
ALL = 1 << 20


def automaton_of(text: Sequence[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    return automaton


def followers(text: Sequence[int], end: Sequence[int]) -> tuple[int, list[int]]:
    """The longest suffix of `end` that `text` continues, and every token it is continued with, in order."""
    for match in range(min(len(end), len(text)), 0, -1):
        part = list(end[-match:])
        found = [text[e] for e in range(match, len(text)) if list(text[e - match : e]) == part]
        if found:
            return match, found
    return 0, []


@relaxed
@given(texts, drafts)
def test_the_walk_follows_the_longest_match(text: list[int], drafted: list[int]) -> None:
    """At every step the longest end of (text, drafted, walked) that was continued, and one continuation."""
    end = [*text, *drafted]
    steps = itertools.islice(automaton_of(text).walk(drafted), 12)
    for step in itertools.chain(steps, [None]):
        match, found = followers(text, end)
        if step is None:
            assert not found or len(end) == len(text) + len(drafted) + 12
            return
        assert step.match == match
        assert step.token in found
        assert 0.0 < step.share <= 1.0
        end.append(step.token)


@relaxed
@given(texts, drafts)
def test_shares_are_plain_counts(text: list[int], drafted: list[int]) -> None:
    """Where every suffix counts: the most frequent continuation, of equals the latest, and its share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CHAIN", ALL)
        automaton = automaton_of(text)
    end = [*text, *drafted]
    for step in itertools.islice(automaton.walk(drafted), 8):
        match, found = followers(text, end)
        best = max(reversed(found), key=found.count)
        assert step == MatchStep(best, match, found.count(best) / len(found))
        end.append(step.token)


@pytest.mark.parametrize("letters", [2, 3, 5])
def test_shares_are_plain_counts_in_long_texts(letters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that were counted are split and counted on."""
    monkeypatch.setattr(retrieval, "_CHAIN", ALL)
    for seed in range(4):
        rng, automaton = random.Random(seed), SuffixAutomaton()
        for _ in range(150):
            automaton.append(rng.randrange(letters))
            drafted = [rng.randrange(letters) for _ in range(rng.randrange(5))]
            step = next(automaton.walk(drafted), None)
            match, found = followers(automaton.tokens, [*automaton.tokens, *drafted])
            if step is None:
                assert not found
                continue
            best = max(reversed(found), key=found.count)
            assert step == MatchStep(best, match, found.count(best) / len(found))


@relaxed
@given(texts)
def test_the_suffixes_that_count_are_exact_without_a_patch(text: list[int]) -> None:
    """While no position ever had more earlier matches than count, nothing is lost."""
    automaton, deepest = SuffixAutomaton(), 0
    for token in text:
        automaton.append(token)
        state, depth = automaton._link[automaton._last], 0
        while state > 0:
            state, depth = automaton._link[state], depth + 1
        deepest = max(deepest, depth)
    step = next(automaton.walk(), None)
    if step is not None and deepest <= retrieval._CHAIN:
        _, found = followers(text, text)
        assert step.share == found.count(step.token) / len(found) == max(map(found.count, found)) / len(found)


def test_the_most_frequent_continuation_wins_and_of_equals_the_latest() -> None:
    text = [9, 1, 8, 9, 2, 7, 9, 1, 6, 9, 2, 5, 9]
    assert next(automaton_of(text).walk()) == MatchStep(2, 1, 0.5)
    assert next(automaton_of([9, 1, 4, *text]).walk()) == MatchStep(1, 1, 0.6)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 20])
def test_a_repeating_text_is_continued_for_ever(period: int) -> None:
    pattern = random.Random(period).sample(range(100), period)
    for length in range(2 * period, 5 * period + 3):
        text = list(itertools.islice(itertools.cycle(pattern), length))
        ahead = list(itertools.islice(itertools.cycle(pattern), length, length + 5 * period + 20))
        walked = list(itertools.islice(automaton_of(text).walk(), len(ahead)))
        assert [step.token for step in walked] == ahead
        assert {step.share for step in walked} == {1.0}


def test_nothing_is_known_of_a_text_without_repetition() -> None:
    assert list(automaton_of([]).walk()) == list(automaton_of([]).walk([1, 2])) == []
    assert list(automaton_of(range(50)).walk()) == list(automaton_of(range(50)).walk([99])) == []
    # What was drafted need not have occurred: its end counts.
    assert [s.token for s in automaton_of(range(5)).walk([99, 2])] == [3, 4]


@pytest.mark.parametrize("kind", ["one letter", "two letters", "words", "distinct", "doubling"])
def test_the_automaton_stays_linear(kind: str) -> None:
    rng, n = random.Random(1), 3000
    words = [[rng.randrange(500) for _ in range(rng.randint(1, 9))] for _ in range(40)]
    text = {
        "one letter": [0] * n,
        "two letters": [rng.randrange(2) for _ in range(n)],
        "words": [token for _ in range(n) for token in rng.choice(words)][:n],
        "distinct": list(range(n)),
        "doubling": [(i & -i).bit_length() for i in range(1, n + 1)],
    }[kind]
    automaton = SuffixAutomaton()
    for length, token in enumerate(text, 1):
        automaton.append(token)
        assert len(automaton._link) <= 2 * length
    assert automaton.tokens == text
    assert sum(map(len, automaton._next)) <= 3 * n
    counted = sum(sum(follow.values()) for follow in automaton._follow if follow)
    assert counted <= 3 * retrieval._CHAIN * n


def test_a_token_counts_for_a_few_suffixes_however_often_it_came() -> None:
    automaton = automaton_of([0] * 500)
    assert len(list(automaton.matches())) == retrieval._CHAIN
    lengths = [automaton._length[state] for state in automaton.matches()]
    assert lengths == sorted(lengths, reverse=True)


@relaxed
@given(st.lists(st.tuples(st.integers(0, 60), texts, st.integers(0, 9)), max_size=6))
def test_drafts_depend_on_the_context_alone(edits: list[tuple[int, list[int], int]]) -> None:
    """However it was cut, edited or extended since the last call."""
    drafter, context = SuffixDrafter(), []
    for keep, more, limit in edits:
        context = context[:keep] + more
        before = list(context)
        draft = drafter.propose(context, limit)
        assert context == before
        assert draft == SuffixDrafter().propose(context, limit)
        assert len(draft.tokens) == len(draft.confidence) == len(draft.sources) <= limit
        assert draft.probs is None
        assert draft.padding == 0
        assert set(draft.sources) <= {SUFFIX}
        assert all(0.0 < confidence < 1.0 for confidence in draft.confidence)
        walked = automaton_of(context).walk()
        assert draft.tokens == tuple(step.token for step in itertools.islice(walked, limit))


def test_a_context_that_grows_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    append = SuffixAutomaton.append
    monkeypatch.setattr(
        SuffixAutomaton, "append", lambda self, token: (read.append(token), append(self, token))
    )
    drafter, context = SuffixDrafter(), [1, 2, 3] * 100
    drafter.propose(context, 5)
    for token in (4, 5, 6):
        context.append(token)
        drafter.propose(context, 5)
        drafter.extend((1, 2), 5)
    assert read == context


@relaxed
@given(texts, drafts, st.integers(-2, 6))
def test_extending_goes_on_after_what_was_drafted(text: list[int], drafted: list[int], limit: int) -> None:
    drafter = SuffixDrafter()
    drafter.read(text)
    first = drafter.extend((), limit)
    assert first == SuffixDrafter().propose(text, max(limit, 0))
    more = drafter.extend(drafted, limit)
    assert len(more.tokens) <= max(limit, 0)
    assert more.tokens == tuple(
        step.token for step in itertools.islice(automaton_of(text).walk(drafted), max(limit, 0))
    )
    # Going on after its own draft is drafting further.
    assert (
        drafter.extend((), 9).tokens
        == first.tokens + drafter.extend(first.tokens, 9 - len(first.tokens)).tokens
    )


def confidence(context: Sequence[int]) -> float:
    return SuffixDrafter().propose(context, 1).confidence[0]


def test_longer_matches_are_trusted_more() -> None:
    trust = [confidence([*range(n), 99, *range(100, 200), *range(n)]) for n in range(1, 40)]
    assert trust == sorted(trust)
    assert trust[0] < 0.5 < 0.9 < trust[-1] < 1.0


def test_uniform_continuations_are_trusted_more() -> None:
    def text(others: int) -> list[int]:
        return [t for i in range(10) for t in (1, 2, 3, 50 + i if i < others else 4, 100 + i)] + [1, 2, 3]

    trust = [confidence(text(others)) for others in range(6)]
    assert trust == sorted(set(trust), reverse=True)
    assert trust[0] > 1.5 * trust[5]


class Asked(Corpus):
    """A corpus that counts what it is asked."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        super().__init__(*build(documents))
        self.limits: list[int] = []

    def continuation(self, context: Sequence[int], limit: int) -> Continuation:
        self.limits.append(limit)
        return super().continuation(context, limit)


DOCUMENT = list(range(200, 260))


def chain(corpus: Corpus) -> Chain:
    return Chain(free=(SuffixDrafter(), CorpusDrafter(corpus)))


def test_the_corpus_goes_on_where_the_text_knows_nothing() -> None:
    corpus = Asked([DOCUMENT])
    draft = chain(corpus).best_free([1, 2, 3, *DOCUMENT[:8]], 5)
    assert draft.tokens == tuple(DOCUMENT[8:13])
    assert draft.sources == (CORPUS,) * 5
    assert draft.probs is None
    assert all(0.0 < c < 1.0 for c in draft.confidence)
    assert list(draft.confidence) == sorted(draft.confidence)  # the match grows with every draft
    assert corpus.limits == [5]


def test_a_good_match_in_the_text_does_not_ask_the_corpus() -> None:
    corpus = Asked([DOCUMENT])
    text = [*DOCUMENT[:20], 7, *DOCUMENT[:19]]
    assert chain(corpus).best_free(text, 3).tokens == (DOCUMENT[19], 7, DOCUMENT[0])
    assert corpus.limits == []


def test_the_surer_of_text_and_corpus_is_taken() -> None:
    corpus = Asked([DOCUMENT])
    weak = [DOCUMENT[7], 7, 1, 2, *DOCUMENT[:8]]  # one token matches in the text, eight in the corpus
    assert chain(corpus).best_free(weak, 2).sources == (CORPUS, CORPUS)
    torn = Asked([[1, 2, 3, 4, i] for i in range(30, 38)])
    text = [9, 3, 4, 5, 8, 1, 2, 3, 4]  # two tokens match in the text; the corpus knows eight continuations
    assert chain(torn).best_free(text, 2).sources == (SUFFIX, SUFFIX)
    assert torn.limits == [2]


def test_neither_text_nor_corpus_knows() -> None:
    assert chain(Asked([DOCUMENT])).best_free([1, 2, 3], 4) == Draft()
    assert chain(Asked([])).best_free([1, 2, 3, 1], 2).tokens == (2, 3)


def test_extending_asks_the_text_alone() -> None:
    corpus = Asked([DOCUMENT])
    for drafter in chain(corpus).free:
        drafter.propose([1, 2, 3], 1)
        assert drafter.extend(DOCUMENT[:8], 4) == Draft()
    assert corpus.limits == [1]
