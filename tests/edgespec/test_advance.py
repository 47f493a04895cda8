"""Several texts in one pass: each becomes what it becomes alone, whatever the company."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_planner

from edgespec.acceptance import Acceptance
from edgespec.batch_planner import BatchPlanner
from edgespec.core import (
    ALONE,
    Cancelled,
    Draft,
    DraftCandidate,
    EdgespecError,
    LanguageModel,
    Logits,
    Round,
    SharedBatch,
)
from edgespec.costs import CostCurve
from edgespec.decode import ForwardRequest, Generation, advance, generate
from edgespec.fakes import ScriptedModel, noise_script
from edgespec.planner import Chain, Planner
from edgespec.retrieval import SuffixDrafter
from edgespec.sampling import Sampler, Sampling

VOCAB, GREEDY = 8, Sampling()
SCRIPT = noise_script(VOCAB, seed=5, memory=2)
SHAPE = (1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5, 1.6)


def curve() -> CostCurve:
    return CostCurve({n: cost / 100 for n, cost in enumerate(SHAPE, 1)})


def sharing() -> BatchPlanner:
    costs = curve()
    return BatchPlanner(lambda: costs)


def planner() -> Planner:
    return make_planner(curve(), Acceptance(), SuffixDrafter())


def together(requests: Sequence[ForwardRequest]) -> list[Logits]:
    return [model.forward(new, last) for model, new, last in requests]


def alone(prompt: list[int], count: int, sampling: Sampling) -> list[int]:
    context = list(prompt)
    for _ in generate(
        ScriptedModel(SCRIPT), context, planner(), Sampler(sampling, prompt), lambda _: False, count
    ):
        pass
    return context


def text_of(
    prompt: list[int], count: int, sampling: Sampling = GREEDY, model: LanguageModel | None = None
) -> Generation:
    return Generation(
        model or ScriptedModel(SCRIPT),
        list(prompt),
        planner(),
        Sampler(sampling, prompt),
        lambda _: False,
        count,
    )


ways = st.sampled_from([Sampling(), Sampling(0.9, seed=3), Sampling(0.7, top_k=3, seed=4)])
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 40), ways), min_size=1, max_size=5),
    st.integers(5, 12),
    st.integers(1, 9),
)
def test_each_text_becomes_what_it_is_alone(asked, rows, chunk):
    texts = [text_of(*one) for one in asked]
    running, shared = list(texts), sharing()
    passes = 0
    while running:

        def forward(requests: Sequence[ForwardRequest]) -> list[Logits]:
            assert sum(last for _, _, last in requests) <= rows
            if len(requests) > 1:
                assert all(len(new) <= chunk + rows for _, new, _ in requests)
            return together(requests)

        for text, round_ in zip(running, advance(running, forward, rows, chunk, shared), strict=True):
            assert list(text.target.tokens) == text.context[: len(text.target.tokens)]
            if round_ is not None:
                assert list(text.target.tokens) == text.context[:-1]
        running = [text for text in running if not text.over]
        passes += 1
        assert passes < 1000
    for text, one in zip(texts, asked, strict=True):
        assert text.context == alone(*one)
        assert text.error is None


def test_planners_and_rounds_know_what_others_have_in_the_batch():
    known: list[SharedBatch] = []

    class Recorder(Planner):
        def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
            known.append(shared)
            return DraftCandidate(Draft((0, 1), (0.5, 0.5), ("x", "x")), (0.9, 0.1))

    texts = [
        Generation(
            ScriptedModel(SCRIPT),
            [1, 2, n],
            Recorder(curve(), Acceptance(), Chain()),
            Sampler(Sampling()),
            lambda _: False,
            30,
        )
        for n in range(3)
    ]
    first = advance(texts, together, sharing=sharing())
    assert [round_ and round_.timed for round_ in first] == [False] * 3  # prompts were evaluated in it
    rounds = advance(texts, together, sharing=sharing())
    assert known == [SharedBatch(2, 2)] * 3
    assert [round_ and round_.draft.tokens for round_ in rounds] == [(0,)] * 3
    assert [round_ and round_.shared for round_ in rounds] == [SharedBatch(2, 4)] * 3
    assert [round_ and round_.timed for round_ in rounds] == [True, False, False]  # one has the cost
    written = sum(len(round_.tokens) for round_ in rounds if round_)
    assert [round_ and round_.shared_tokens for round_ in rounds] == [
        round_ and written - len(round_.tokens) for round_ in rounds
    ]


def test_without_sharing_nothing_is_drafted():
    texts = [text_of([1, 2] * 8, 9), text_of([3, 4] * 8, 9)]
    rounds = [advance(texts, together) for _ in range(3)]
    assert not any(round_.draft.tokens for turn in rounds for round_ in turn if round_)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(prompts, st.integers(1, 40), ways), min_size=2, max_size=5), st.integers(5, 12))
def test_all_texts_with_room_have_as_many_tokens_in_a_pass(asked, rows):
    texts = [text_of(*one) for one in asked]
    shared = sharing()
    while len(running := [text for text in texts if not text.over]) > 1:
        bounds = {text.target: text.bounds for text in running}

        def forward(requests: Sequence[ForwardRequest], bounds: dict = bounds) -> list[Logits]:
            drafted = (len(new) for model, new, _ in requests if len(new) > bounds[model][0])
            most = max(drafted, default=1)
            for model, new, _ in requests:
                low, high = bounds[model]
                assert len(new) == max(low, min(high, most))
            return together(requests)

        advance(running, forward, rows, sharing=shared)


def test_rows_without_drafts_are_padded_at_a_first_round_too():
    """Four rows cost less than two, and a text whose prompt was read before drafts nothing yet."""
    costs = CostCurve({1: 1.0, 2: 2.0, 4: 1.0})
    read, other = text_of([1, 2], 40), text_of([3, 4], 40)
    for text in (read, other):
        text.target.forward(text.context[:-1])
    rounds = advance([read, other], together, sharing=BatchPlanner(lambda: costs))
    assert [round_ and round_.draft.rows for round_ in rounds] == [2, 2]
    assert [list(text.target.tokens) for text in (read, other)] == [
        text.context[:-1] for text in (read, other)
    ]


def test_a_prompt_that_is_read_next_to_them_counts():
    """Four rows cost less than two, but with those of the prompt it would be six."""
    costs = CostCurve({1: 1.0, 2: 2.0, 3: 3.0, 4: 0.5, 6: 50.0})
    texts, shared = [text_of([1, 2], 40), text_of([3, 4], 40)], BatchPlanner(lambda: costs)
    advance(texts, together, sharing=shared)
    for reading, rows in ([text_of([5] * 50, 9)], 1), ([], 2):
        rounds = advance([*texts, *reading], together, 99, 20, shared)
        assert [round_ and round_.draft.rows for round_ in rounds[:2]] == [rows] * 2


def offering(last: int, chance: float, least: int, count: int = 30) -> Generation:
    """A text that offers five tokens of such a chance, of which `least` must not be dropped."""

    class Offering(Planner):
        def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
            n = min(5, limit)
            return DraftCandidate(Draft((0,) * n, (chance,) * n, ("x",) * n), (chance,) * n, min(n, least))

    planner = Offering(curve(), Acceptance(), Chain())
    return Generation(ScriptedModel(SCRIPT), [1, 2, last], planner, Sampler(GREEDY), lambda _: False, count)


def test_nothing_is_evaluated_that_does_not_fit_behind_a_text():
    """One that is about to end has fewer rows than the others, and such a pass teaches no cost."""
    ends, goes_on, shared = offering(3, 0.95, 0, count=3), offering(4, 0.95, 0), sharing()
    rounds = [advance([ends, goes_on], together, sharing=shared) for _ in range(2)][-1]
    assert [round_ and round_.draft.rows for round_ in rounds] == [2, 6]
    assert [round_ and round_.timed for round_ in rounds] == [False, False]


def test_what_must_not_be_dropped_raises_the_rows_of_all():
    texts, shared = [offering(3, 0.01, 3), text_of([3, 4], 30), offering(4, 0.01, 3)], sharing()
    advance(texts, together, 12, sharing=shared)
    rounds = advance(texts, together, 12, sharing=shared)
    assert [round_ and round_.draft.rows for round_ in rounds] == [4] * 3
    assert [round_ and len(round_.draft.tokens) for round_ in rounds][::2] == [3, 3]
    rounds = advance(texts, together, 8, sharing=shared)  # asked for no more than there are rows for
    assert [round_ and round_.draft.rows for round_ in rounds] == [2] * 3


def test_a_long_prompt_is_read_piece_by_piece_next_to_others():
    long, short = text_of([1] * 50, 5), text_of([1, 2], 20)
    rounds: list[Sequence[Round | None]] = [advance([long, short], together, 12, 16) for _ in range(4)]
    assert [len(r[0].tokens) if r[0] else 0 for r in rounds] == [0, 0, 0, 1]
    assert all(r[1] for r in rounds)


class Broken(ScriptedModel):
    """Its logits are no numbers from the second pass on."""

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        logits = super().forward(new, last)
        return logits if len(self.evaluated) == 1 else logits * float("nan")


def test_an_error_of_one_text_ends_that_one_alone():
    good, bad = text_of([1, 2], 20), text_of([3], 20, model=Broken(SCRIPT))
    while not good.over:
        advance([text for text in (good, bad) if not text.over], together)
    assert isinstance(bad.error, EdgespecError)
    assert len(bad.context) == 2
    assert list(bad.target.tokens) == [3]
    assert good.context == alone([1, 2], 20, GREEDY)


def test_what_the_pass_raises_leaves_every_text_as_it_was():
    texts = [text_of([1, 2], 20), text_of([3, 4, 5], 20)]
    advance(texts, together)
    before = [list(text.context) for text in texts]

    def cut_short(requests: Sequence[ForwardRequest]) -> list[Logits]:
        together(requests)
        raise Cancelled

    with pytest.raises(Cancelled):
        advance(texts, cut_short)
    assert [text.context for text in texts] == before
    assert [list(text.target.tokens) for text in texts] == [context[:-1] for context in before]
    while any(not text.over for text in texts):
        advance([text for text in texts if not text.over], together)
    assert texts[1].context == alone([3, 4, 5], 20, GREEDY)


def test_the_planner_drafts_less_where_others_fill_the_batch():
    """Rows are free up to eight: alone a text drafts them all, with six others it leaves them theirs."""
    costs = CostCurve({n: 0.010 if n <= 8 else 0.010 * n / 4 for n in range(1, 17)})
    acceptance = Acceptance()
    drafted = {}
    for others in (0, 6):
        one = make_planner(costs, acceptance, SuffixDrafter())
        shared = SharedBatch(others, others)
        drafted[others] = len(one.propose([1, 2, 3, 4, 5, 6, 7] * 6, 12, shared).tokens)
    assert drafted[0] == 7
    assert drafted[6] == 1
