"""Guessing under a grammar: the text is what plain decoding under it gives; what is forced is drafted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_planner
from toy import ToyVocab

from edgespec.acceptance import Acceptance
from edgespec.core import Draft, Drafter, Round, point_mass
from edgespec.costs import CostCurve
from edgespec.decode import generate
from edgespec.drafting import ModelDrafter
from edgespec.fakes import ScriptedDrafter, ScriptedModel
from edgespec.grammar_drafting import GRAMMAR, GrammarDrafter, until_finished
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.prompting.grammar import Grammar, GrammarCompiler, GrammarState
from edgespec.planner import Planner
from edgespec.retrieval import SuffixDrafter
from edgespec.sampling import Sampler, Sampling

VOCAB = ToyVocab()
COMPILER = GrammarCompiler(VOCAB)
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ab c": {"enum": [10, 20]}},
    "required": ["name", "ab c"],
}
GRAMMARS = {
    "object": COMPILER.compile("json_schema", ITEM),
    "list": COMPILER.compile("json_schema", {"type": "array", "items": ITEM, "minItems": 2, "maxItems": 4}),
    "choice": COMPILER.compile("choice", ["hello world", "hello", "null"]),
    "text": COMPILER.compile("lark", "start: /(.|\\n)*/"),
}
PROMPT = VOCAB.tokenize('{"name": "abc", "ab c": 10}, hello world: ')
FLAT = {1: 1.0, 2: 1.2, 4: 1.5, 8: 2.0, 16: 3.0, 32: 5.0}


@cache
def row(last: tuple[int, ...]) -> list[float]:
    noise: list[float] = np.random.default_rng(hash(last) % 2**32).normal(0.0, 3.0, VOCAB.size).tolist()
    return noise


def target(context: Sequence[int]) -> list[float]:
    return row(tuple(context[-2:]))


def draft_model(context: Sequence[int]) -> list[float]:
    """Mostly what the target says."""
    return target(context) if sum(context) % 4 else row(tuple(context[-1:]))


def wild(seed: int) -> ScriptedDrafter:
    choose = random.Random(seed)
    return ScriptedDrafter(lambda _context, limit: choose.choices(range(VOCAB.size), k=limit))


def known(text: Sequence[int], most: int) -> ScriptedDrafter:
    """Guesses what will be said, `most` tokens at a time."""
    return ScriptedDrafter(lambda context, _limit: text[len(context) - len(PROMPT) :][:most])


def of_model(script: Callable[[Sequence[int]], list[float]]) -> ModelDrafter:
    return ModelDrafter(ScriptedModel(script), 4096, Sampling(), is_end=VOCAB.is_end)


Making = Callable[[], tuple[Drafter | None, ModelDrafter | None]]
DRAFTERS: dict[str, Making] = {
    "nothing": lambda: (None, None),
    "wild": lambda: (wild(3), None),
    "model": lambda: (None, of_model(draft_model)),
    "target": lambda: (None, of_model(target)),
    "suffix": lambda: (SuffixDrafter(), None),
    "suffix and model": lambda: (SuffixDrafter(), of_model(draft_model)),
}


def planner(
    state: GrammarState | None, free: Drafter | None = None, model: ModelDrafter | None = None, **more: Any
) -> Planner:
    grammar = GrammarDrafter(state) if state is not None else None
    costs = more.pop("costs", None) or CostCurve(FLAT)
    return make_planner(costs, Acceptance(), free, model, CostCurve({1: 0.01}), grammar=grammar, **more)


def answer(
    grammar: Grammar,
    sampling: Sampling,
    making: Making | None,
    most: int = 80,
    costs: CostCurve | None = None,
) -> tuple[list[int], list[Round]]:
    """The text under the grammar, drafted by what `making` makes or not at all, and its rounds."""
    state = grammar.start()
    costs = costs or CostCurve(FLAT)
    controller = planner(None) if making is None else planner(state, *making(), costs=costs)
    context, model = list(PROMPT), ScriptedModel(target)
    sampler = Sampler(sampling, PROMPT, state)
    done = until_finished(state, VOCAB.is_end)
    timed = Timed(controller, costs)
    rounds = list(generate(model, context, timed, sampler, done, most))
    assert list(model.tokens) == context[:-1]
    for round_ in rounds:
        assert round_.draft.rows <= costs.largest
    return context[len(PROMPT) :], rounds


class Timed:
    """A planner whose rounds took what `costs` say: real ones of scripted models take next to nothing."""

    def __init__(self, one: Planner, costs: CostCurve) -> None:
        self._planner, self._seconds = one, {n: costs.seconds(n) for n in range(1, 33)}
        self.propose, self.offer, self.stop_ahead = one.propose, one.offer, one.stop_ahead
        self.apply_budget = one.apply_budget

    def observe(self, round_: Round) -> None:
        seconds = self._seconds[round_.draft.rows]
        self._planner.observe(replace(round_, seconds=seconds, drafting=0.0, waiting=seconds))


samplings = st.sampled_from(
    [Sampling(), Sampling(1.0, seed=5), Sampling(0.7, 20, 0.95, 0.02, 1.1, 0.2, 0.1, {65: 2.0}, seed=9)]
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(list(GRAMMARS)), st.sampled_from(list(DRAFTERS)), samplings, st.integers(1, 60))
def test_the_text_is_that_of_plain_decoding(name: str, how: str, sampling: Sampling, most: int) -> None:
    grammar = GRAMMARS[name]
    plain, _ = answer(grammar, sampling, None, most)
    text, rounds = answer(grammar, sampling, DRAFTERS[how], most)
    assert text == plain
    assert [token for round_ in rounds for token in round_.tokens] == text


def test_what_is_forced_takes_no_round_of_its_own() -> None:
    plain, slow = answer(GRAMMARS["list"], Sampling(), None)
    text, rounds = answer(GRAMMARS["list"], Sampling(), DRAFTERS["nothing"])
    assert text == plain
    assert len(rounds) < 0.7 * len(slow)
    for round_ in rounds:
        notes = round_.draft.sources.count(GRAMMAR)
        assert round_.draft.sources == (GRAMMAR,) * notes
        certain = [*(one == 1.0 for one in round_.draft.confidence), False].index(False)
        assert round_.accepted >= certain
    assert any(round_.accepted for round_ in rounds)


def test_what_is_forced_after_a_draft_is_drafted_with_it() -> None:
    plain, _ = answer(GRAMMARS["list"], Sampling(), None)
    text, rounds = answer(GRAMMARS["list"], Sampling(), lambda: (known(plain, 4), None))
    assert text == plain
    drafts = [round_.draft.sources for round_ in rounds]
    assert any("scripted" in s and GRAMMAR in s[s.index("scripted") :] for s in drafts)
    for round_ in rounds[:-1]:
        assert round_.draft.confidence[round_.accepted :][:1] in (
            (),
            (0.9,),
        )  # wrong about a spelling at most


def test_what_other_tokens_could_spell_more_of_is_drafted_and_not_certain() -> None:
    state = state_after("object")
    forced = state.forced(20)
    assert VOCAB.detokenize(forced) == '{"name": '
    (spelled,) = state.spelled(forced)  # `"`, and `"}` would be as good
    assert VOCAB.text(spelled) == '"'
    assert state.spelled(VOCAB.tokenize('{"name": "')) == ()  # anything may follow
    assert state.spelled(VOCAB.tokenize("x")) == ()  # what is refused has no continuation
    draft = GrammarDrafter(state).lead(20)
    assert draft.tokens == (*forced, spelled)
    assert draft.confidence[:-1] == (1.0,) * len(forced)
    assert 0.5 < draft.confidence[-1] < 1.0


def test_drafts_of_how_values_begin_must_have_been_accepted() -> None:
    """After a key comes another value than the last time: such drafts are given up, and tried again."""
    grammar = GrammarDrafter(state_after("object"))
    lead, drafts = grammar.lead(20), []
    for accepted in (0, 0, 1, 1, 1):
        grammar.lead(20)
        drafts.append(len(grammar.completed(lead, draft(A, A), 20).tokens) - len(lead.tokens))
        grammar.observe((A if accepted else B,))
    assert drafts == [2, 0, 0, 0, 2]
    for _ in range(5):
        grammar.lead(20)
        grammar.completed(lead, draft(A, A), 20)
        grammar.observe((B,))
    assert not grammar.trusts_values
    for _ in range(40):  # none was made, and what is known fades
        grammar.lead(20)
        grammar.observe((B,))
    assert grammar.trusts_values


def test_the_end_takes_no_pass() -> None:
    text, rounds = answer(GRAMMARS["object"], Sampling(), None)
    assert VOCAB.detokenize(text[-1:]).endswith("}")
    assert rounds[-1].done


def test_a_real_model_writes_what_the_schema_asks_for(starter: LlamaModel) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "country_name": {"enum": ["France", "Italy"]},
            "is_the_capital": {"type": "boolean"},
        },
        "required": ["city", "country_name", "is_the_capital"],
    }
    vocab = starter.vocab
    grammar = GrammarCompiler(vocab).compile("json_schema", schema)
    prompt = vocab.tokenize("Paris is the capital of France. As JSON: ")
    costs = CostCurve(FLAT)
    texts, rounds = [], []
    for making in (DRAFTERS["nothing"], DRAFTERS["suffix"]):
        sequence, state = starter.sequence(), grammar.start()
        controller = planner(state if making is DRAFTERS["suffix"] else None, *making(), costs=costs)
        context, sampler = list(prompt), Sampler(Sampling(), prompt, state)
        done, timed = until_finished(state, vocab.is_end), Timed(controller, costs)
        rounds.append(len(list(generate(sequence, context, timed, sampler, done, 60))))
        sequence.close()
        texts.append(vocab.detokenize(context[len(prompt) :]))
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert rounds[1] < 0.7 * rounds[0]


def state_after(grammar: str, text: str = "") -> GrammarState:
    state = GRAMMARS[grammar].start()
    for token in VOCAB.tokenize(text):
        state.accept(token)
    return state


def draft(*tokens: int, sampled: int = 0, padding: int = 0) -> Draft:
    """A draft; the first tokens are point masses, the last `sampled` ones of several."""
    probs = None
    if sampled:
        many = Sampler(Sampling(1.0)).distribution(np.zeros(VOCAB.size, np.float32))
        probs = (*map(point_mass, tokens[: len(tokens) - sampled]), *[many] * sampled)
    n = len(tokens)
    return Draft(tokens, (0.9,) * n, ("other",) * n, probs, padding)


A, B, X = VOCAB.tokenize("a")[0], VOCAB.tokenize("b")[0], VOCAB.tokenize("\n")[0]


@pytest.mark.parametrize(
    ("draft", "kept"),
    [
        (draft(A, B), (A, B)),
        (draft(A, X, B), (A,)),
        (draft(X, A), ()),
        (draft(A, X, B, sampled=2), (A, X)),  # dropped, it would be replaced from p and not from the residual
        (draft(A, X, B, sampled=1), (A,)),
        (draft(VOCAB.eos, A), ()),
        (draft(VOCAB.eos, A, sampled=2), (VOCAB.eos,)),
    ],
)
def test_a_draft_is_cut_where_the_grammar_refuses_it(draft: Draft, kept: tuple[int, ...]) -> None:
    grammar = GrammarDrafter(state_after("object", '{"name": "'))
    drafted = grammar.completed(grammar.lead(20), draft, 20)
    assert drafted.tokens == kept
    assert drafted.probs == (None if draft.probs is None or not kept else draft.probs[: len(kept)])


def test_what_others_draft_follows_what_is_forced() -> None:
    asked: list[tuple[list[int], int]] = []

    def propose(context: Sequence[int], limit: int) -> Sequence[int]:
        asked.append((list(context), limit))
        return [A, B]

    state = state_after("object")
    lead = (*state.forced(20), *state.spelled(state.forced(20)))
    assert len(lead) > 2
    one, costs = planner(state, ScriptedDrafter(propose)), CostCurve(FLAT)
    draft = one.propose(PROMPT, 20)
    assert draft.tokens == (*lead, A, B)
    assert asked == [([*PROMPT, *lead], 7)]  # as many as a text is trusted with at the start
    seconds = costs.seconds(draft.rows)
    one.observe(Round((*lead, A, A), draft, len(lead) + 1, seconds, 0.0, seconds))
    assert one._acceptance.probability("scripted", 1.0) < 1.0  # B was drafted


def test_a_text_that_ends_among_what_is_forced_teaches_nothing() -> None:
    one = planner(state_after("object"), ScriptedDrafter(lambda _context, _limit: [A]))
    draft = one.propose(PROMPT, 20)
    one.observe(Round(draft.tokens[:2], draft, 1, 1.0, 0.0, 1.0, True))
    assert one._acceptance.probability("scripted", 1.0) == 1.0


class Fixed(Drafter):
    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        return self._draft


def test_no_batch_is_larger_than_its_gain() -> None:
    """Where a row costs as much as a pass, and a draft is none too sure, what would follow it waits."""
    steep = CostCurve({n: float(n) for n in range(1, 33)})
    text = '{"name": "abc'
    for confidence, more in ((0.1, False), (1.0, True)):
        quote = VOCAB.tokenize('"')[0]
        draft = Draft((quote,), (confidence,), ("other",))
        curve = steep if not more else CostCurve(FLAT)
        state = state_after("object", text)
        drafted = planner(state, Fixed(draft), costs=curve).propose(PROMPT, 20)
        assert (len(drafted.tokens) > 1) is more
    tight = CostCurve({1: 1.0, 2: 1.5})
    forced = planner(state_after("object"), costs=tight).propose(PROMPT, 20)
    assert len(forced.tokens) == 1
    none = planner(state_after("object"), costs=CostCurve({1: 1.0})).propose(PROMPT, 20)
    assert none == Draft()


def test_only_allowed_batches_are_made() -> None:
    costs = CostCurve(FLAT)
    costs.only([1, 8])
    _, rounds = answer(GRAMMARS["list"], Sampling(), DRAFTERS["nothing"], costs=costs)
    assert {round_.draft.rows for round_ in rounds} == {1, 8}
