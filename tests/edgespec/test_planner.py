"""The planner against texts, machines and drafters that are made up, and its drafts through the real loop.

A closed loop needs no model: the text is known, a drafted token is accepted if it is the text's, and a
round takes what a made cost curve says. `figure` is how fast that was, in plain decoding speeds.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import (
    MACHINES,
    START,
    Seconds,
    Text,
    agreed,
    copied,
    decode,
    interrupted,
    make_planner,
    planner,
    random_text,
    took,
)

from edgespec.acceptance import Acceptance
from edgespec.core import Draft, Round
from edgespec.costs import CostCurve
from edgespec.decode import generate
from edgespec.drafting import MODEL, ModelDrafter
from edgespec.fakes import Script, ScriptedModel, noise_script
from edgespec.planner import DraftBackoff, Planner, best_case
from edgespec.pricing import accepted_variance
from edgespec.retrieval import SUFFIX, SuffixDrafter
from edgespec.sampling import Sampler, Sampling


class Guesser:
    """Stands for the suffix drafter: knows the text, and is right where `right` says so."""

    def __init__(self, text: Text, right: Callable[[int], bool], confidence: float = 0.9) -> None:
        self._text, self._right, self._confidence = text, right, confidence

    def propose(self, context: Text, limit: int) -> Draft:
        at = len(context)
        tokens = tuple(
            self._text[i] if self._right(i) else -1 for i in range(at, min(at + limit, len(self._text)))
        )
        return Draft(tokens, (self._confidence,) * len(tokens), (SUFFIX,) * len(tokens))

    def extend(self, before: Text, limit: int) -> Draft:
        return Draft()


def figure(rounds: Sequence[Round], seconds: Seconds) -> float:
    return took(seconds, 1) * sum(len(r.tokens) for r in rounds) / sum(r.seconds for r in rounds)


def clairvoyant(text: Text, seconds: Seconds) -> float:
    """The figure of whoever knows how much of each of the suffix drafter's drafts will stand."""
    drafter, size = SuffixDrafter(), len(text)
    right = [0] * size
    for at in range(START + 1, size - 1):
        draft = drafter.propose(text[:at], size - at - 1)
        right[at] = agreed(draft, text, at)
    one, most = took(seconds, 1), max(seconds)
    cheapest = {k: min(took(seconds, n) for n in range(k + 1, most + 1)) for k in range(1, most)}
    rest = [0.0] * (size + 1)
    for at in range(size - 1, START - 1, -1):
        drafts = range(1, min(right[at], most - 1) + 1)
        rest[at] = min([one + rest[at + 1], *(cheapest[k] + rest[at + k + 1] for k in drafts)])
    return one * (size - START) / rest[START]


# Never slower.


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("vocab", [2, 3, 8, 50, 1000])
def test_random_text_costs_next_to_nothing(machine: str, vocab: int) -> None:
    seconds = MACHINES[machine]
    for seed in range(2):
        text = random_text(vocab, seed)
        assert figure(decode(text, planner(seconds), seconds), seconds) >= 0.97


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("confidence", [0.3, 0.7, 0.9, 0.99])
def test_a_drafter_that_turns_wrong_once_it_is_trusted(machine: str, confidence: float) -> None:
    """Right for some time, then never again."""
    seconds, text = MACHINES[machine], random_text(1000, 1, 700)
    for trusted in (0, 20, 100):
        suffix = Guesser(text, lambda i, end=START + trusted: i < end, confidence)
        assert figure(decode(text, planner(seconds, suffix), seconds), seconds) >= 0.97


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("confidence", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("calm", [1, 3, 10])
def test_a_drafter_that_is_right_only_while_it_is_not_used(
    machine: str, confidence: float, calm: int
) -> None:
    """Wrong from the moment it is used until it has not been used for a while."""
    seconds, text, quiet = MACHINES[machine], random_text(1000, 1, 700), calm

    def watch(round_: Round) -> None:
        nonlocal quiet
        quiet = 0 if round_.draft.tokens else quiet + 1

    suffix = Guesser(text, lambda _: quiet >= calm, confidence)
    assert figure(decode(text, planner(seconds, suffix), seconds, after=watch), seconds) >= 0.97


def test_where_rows_cost_in_proportion_hardly_anything_is_drafted() -> None:
    """A size of uncertain cost is tried now and then: it could be cheaper than measured."""
    text = copied(1, 30, 0.0)
    rounds = decode(text, planner(MACHINES["steep"]), MACHINES["steep"])
    assert sum(1 for r in rounds if r.draft.tokens) <= 12
    assert figure(rounds, MACHINES["steep"]) >= 0.985


def test_what_no_drafter_drafts_is_decoded_plainly() -> None:
    nothing = make_planner(CostCurve(MACHINES["flat"]), Acceptance())
    assert nothing.propose([1, 2, 1, 2], 9) == Draft()
    assert planner(MACHINES["flat"]).propose([1, 2, 3, 4], 9) == Draft()
    assert planner(MACHINES["flat"]).propose([7] * 50, 0) == Draft()


# As fast as it can be.


@pytest.mark.parametrize("machine", ["cliffs", "blocks", "flat"])
@pytest.mark.parametrize("period", [1, 7, 40])
def test_repetition_is_nearly_as_fast_as_foresight(machine: str, period: int) -> None:
    seconds, text = MACHINES[machine], copied(1, period, 0.0)
    best = clairvoyant(text, seconds)
    assert best > 2.0
    assert figure(decode(text, planner(seconds), seconds), seconds) >= 0.85 * best


@pytest.mark.parametrize("machine", ["cliffs", "blocks", "flat"])
@pytest.mark.parametrize("text", [copied(1, 60, 0.02), interrupted(1, 6), interrupted(1, 4)], ids=str)
def test_broken_repetition_pays_too(machine: str, text: Text) -> None:
    """The foresight compared with knows where each draft will break; nobody can."""
    seconds = MACHINES[machine]
    reached = figure(decode(text, planner(seconds), seconds), seconds)
    assert reached > 1.1
    assert reached >= 0.65 * clairvoyant(text, seconds)


def test_noise_and_other_programs_change_little() -> None:
    seconds, text, rng = MACHINES["blocks"], copied(1, 40, 0.0, 1500), random.Random(1)

    def noise() -> float:
        return rng.lognormvariate(0.0, 0.15) * (5.0 if rng.random() < 0.02 else 1.0)

    found = decode(text, planner(seconds), seconds, noise=noise)
    quiet = decode(text, planner(seconds), seconds)
    assert sum(took(seconds, r.draft.rows) for r in found) < 1.15 * sum(r.seconds for r in quiet)


def test_a_machine_that_slows_down_is_followed() -> None:
    """All sizes alike: the same plans, at another pace."""
    seconds, text = MACHINES["blocks"], copied(1, 40, 0.0)
    slower = {n: 2.5 * s for n, s in seconds.items()}
    assert figure(decode(text, planner(seconds), slower), slower) > 0.9 * figure(
        decode(text, planner(slower), slower), slower
    )


# Batches.


def test_batches_are_padded_to_cheaper_sizes() -> None:
    seconds = {1: 1.0, 2: 1.6, 3: 1.9, 4: 1.2, 5: 2.5, 8: 1.4, 16: 9.0, 32: 20.0}
    text = [1, 2, 3, 4, 5] * 8
    for limit in range(1, 40):
        draft = planner(seconds).propose(text, limit)
        rows = draft.rows
        assert rows <= limit + 1
        assert len(draft.tokens) <= limit
        if limit >= 3:
            assert rows in (4, 8)
            assert rows == 8 or limit < 7
    unsure = Guesser([9] * 60, lambda _: True, 0.75)
    draft = planner({1: 1.0, 2: 1.5, 3: 3.0, 4: 1.1}, unsure).propose([9] * 3, 2)
    assert draft.rows <= 3


curves = st.builds(
    lambda one, others: {1: one, **others},
    st.floats(0.5, 2.0),
    st.dictionaries(st.integers(2, 40), st.floats(0.3, 40.0), max_size=8),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(curves, st.lists(st.integers(1, 3), min_size=1, max_size=60), st.integers(0, 45), st.integers(0, 40))
def test_limits_are_kept(seconds: Seconds, text: list[int], limit: int, most: int) -> None:
    model = ModelDrafter(ScriptedModel(noise_script(4)), 1000)
    cheap = CostCurve({1: 1e-3, 8: 2e-3})
    for one in (planner(seconds, most=most), planner(seconds, most=most, model=model, model_costs=cheap)):
        for _ in range(3):
            before = list(text)
            draft = one.propose(text, limit)
            assert text == before
            assert draft.rows <= limit + 1
            assert len(draft.tokens) <= most
            assert draft.tokens or draft.padding == 0 or draft.rows <= max(seconds)
            assert draft.rows <= max(max(seconds), 1)
            tokens = (*draft.tokens, 1)
            one.observe(Round(tokens, draft, len(draft.tokens), 1.1, 0.1, 1.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from([2, 3, 4, 5, 8, 16])), st.integers(1, 3), st.integers(0, 40), st.booleans())
def test_no_other_sizes_than_allowed_are_used(sizes: set[int], period: int, limit: int, draws: bool) -> None:
    """An exact answer depends on it."""
    costs = CostCurve({n: 1 + n / 100 for n in range(1, 33)})
    costs.only({1, *sizes})
    settings_ = Sampling(1.0, seed=1) if draws else None
    model = ModelDrafter(ScriptedModel(noise_script(4)), 1000, settings_)
    for suffix in (SuffixDrafter(), None):
        one = make_planner(costs, Acceptance(), suffix, model, CostCurve({1: 1e-3}))
        text = [*range(period)] * 9
        for _ in range(3):
            draft = one.propose(text, limit)
            assert draft.rows in {1, *sizes}
            assert draft.rows <= limit + 1
            one.observe(Round((*draft.tokens, 1), draft, len(draft.tokens), 1.0, 0.0, 1.0))
            text = [*text, *draft.tokens, 1]


def test_rounds_that_were_not_planned_teach_nothing() -> None:
    costs, acceptance = CostCurve(MACHINES["flat"]), Acceptance()
    one = make_planner(costs, acceptance, SuffixDrafter())
    one.observe(Round((1,), Draft(), 0, 90.0, 0.0, 90.0))  # it read the prompt
    assert costs.as_json() == CostCurve(MACHINES["flat"]).as_json()
    one.propose([1, 2, 1], 5)
    one.observe(Round((1,), Draft(), 0, 0.2, 0.0, 0.2))
    one.observe(Round((1,), Draft(), 0, 90.0, 0.0, 90.0))
    assert costs.pace < 0.2


def test_a_round_teaches_what_the_target_took() -> None:
    costs = CostCurve(MACHINES["flat"])
    one = make_planner(costs, Acceptance(), SuffixDrafter())
    for _ in range(50):
        one.propose([1, 2, 1, 3, 1], 5)
        one.observe(Round((1,), Draft(), 0, 9.0, 8.8, 1.1 * MACHINES["flat"][1]))
    assert costs.pace == pytest.approx(1.1 * MACHINES["flat"][1], rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "heard"), [([7], 1), ([2, 7], 2), ([7, 3, 1], 1), ([2, 7, 1, 2], 2), ([2, 3, 1, 2], 4)]
)
def test_drafts_are_heard_up_to_the_first_wrong_one(tokens: list[int], heard: int) -> None:
    """What comes after it was drafted for another text, even if the model's draft made the round longer."""
    notes: list[bool] = []

    class Told(Acceptance):
        def observe(self, source: str, confidence: float, accepted: bool) -> None:
            notes.append(accepted)

    one = make_planner(CostCurve(MACHINES["flat"]), Told(), SuffixDrafter())
    draft = one.propose([1, 2, 3] * 5 + [1], 9)
    one.observe(Round(tuple(tokens), draft, len(tokens) - 1, 0.3, 0.0, 0.3))
    assert len(notes) == heard
    assert all(notes[:-1])
    assert notes[-1] == (tokens == [2, 3, 1, 2])


# Wrong beliefs.


@pytest.mark.parametrize("wrong", ["half", "free eight", "slow", "fast"])
def test_a_wrong_curve_is_corrected(wrong: str) -> None:
    """After a text or two, which may be slower, it decodes as one that knew."""
    seconds = MACHINES["cliffs"]
    believed = {
        "half": {n: s / 2 if n > 1 else s for n, s in seconds.items()},
        "free eight": {**seconds, 8: seconds[1]},
        "slow": {n: 10 * s for n, s in seconds.items()},
        "fast": {n: s / 10 for n, s in seconds.items()},
    }[wrong]
    costs, acceptance = CostCurve(believed), Acceptance()
    texts = [random_text(2, 1), copied(2, 40, 0.02), random_text(3, 3), copied(4, 40, 0.02)]
    for text in texts * 8:
        assert figure(decode(text, make_planner(costs, acceptance, SuffixDrafter()), seconds), seconds) > 0.4
    for text in texts:
        found = figure(decode(text, make_planner(costs, acceptance, SuffixDrafter()), seconds), seconds)
        assert found > 0.85 * figure(decode(text, planner(seconds, acceptance=acceptance), seconds), seconds)
        assert found > 0.95


@pytest.mark.parametrize("believed", [True, False])
@pytest.mark.parametrize("machine", ["cliffs", "blocks", "flat"])
def test_wrong_acceptance_is_corrected(machine: str, believed: bool) -> None:
    """Guesses of the suffix drafter are compared with every token, so even one not trusted is heard."""
    seconds, acceptance = MACHINES[machine], Acceptance()
    for _ in range(2000):
        for i in range(100):
            acceptance.observe(SUFFIX, i / 100, believed)
    repetition, noise = copied(1, 40, 0.0, 1500), random_text(2, 1, 1500)
    for text in (repetition, noise) if not believed else (noise, repetition):
        assert figure(decode(text, planner(seconds, acceptance=acceptance), seconds), seconds) > 0.9
    assert figure(decode(repetition, planner(seconds, acceptance=acceptance), seconds), seconds) > 1.8
    assert figure(decode(noise, planner(seconds, acceptance=acceptance), seconds), seconds) >= 0.97


def test_drafts_not_made_are_learned_from() -> None:
    """Where drafting never pays the suffix drafter's chances are learned all the same."""
    acceptance, text = Acceptance(), random_text(1000, 1)
    for confidence, right in ((0.55, True), (0.85, False)):
        suffix = Guesser(text, lambda _, right=right: right, confidence)
        rounds = decode(text, planner(MACHINES["steep"], suffix, acceptance), MACHINES["steep"])
        assert not any(r.draft.tokens for r in rounds)
    assert acceptance.probability(SUFFIX, 0.55) > 0.9
    assert acceptance.probability(SUFFIX, 0.85) < 0.1


# The draft model.

LETTERS = 60


def oracle_script(text: Text, right: Callable[[int], bool], confidence: float) -> Script:
    """The logits of a model that gives the text's next token `confidence`, or another where it is wrong."""
    score = math.log(confidence * (LETTERS - 1) / (1 - confidence))

    def script(context: Sequence[int]) -> list[float]:
        at, row = len(context), [0.0] * LETTERS
        token = text[at] if at < len(text) else 0
        row[token if right(at) else (token + 1) % LETTERS] = score
        return row

    return script


def with_model(
    machine: str,
    share: float,
    right: Callable[[int], bool],
    confidence: float,
    acceptance: Acceptance | None = None,
    text: Text | None = None,
    suffix: bool = False,
) -> tuple[list[Round], ScriptedModel]:
    """Decode a text with a draft model whose passes cost `share` of the target's."""
    seconds, text = MACHINES[machine], random_text(LETTERS, 5) if text is None else text
    model = ScriptedModel(oracle_script(text, right, confidence))
    costs = CostCurve({n: share * s for n, s in seconds.items()})
    one = make_planner(
        CostCurve(seconds),
        acceptance or Acceptance(),
        SuffixDrafter() if suffix else None,
        ModelDrafter(model, 10_000, window=1000),
        costs,
    )
    truth = CostCurve({n: share * s for n, s in seconds.items()})
    return decode(text, one, seconds, model, truth), model


@pytest.mark.parametrize(("share", "least"), [(0.1, 3.0), (0.2, 2.0)])
def test_a_good_and_cheap_model_is_asked(share: float, least: float) -> None:
    rounds, _ = with_model("flat", share, lambda _: True, 0.95)
    assert figure(rounds, MACHINES["flat"]) > least
    assert {source for r in rounds for source in r.draft.sources} == {MODEL}


@pytest.mark.parametrize(
    ("machine", "share"), [("steep", 0.1), ("flat", 1.0), ("cliffs", 1.0), ("cliffs", 0.5)]
)
def test_a_model_that_cannot_pay_is_never_asked(machine: str, share: float) -> None:
    rounds, model = with_model(machine, share, lambda _: True, 0.95)
    assert model.evaluated == []
    assert figure(rounds, MACHINES[machine]) == pytest.approx(1.0)


@pytest.mark.parametrize("machine", ["blocks", "flat"])
@pytest.mark.parametrize("confidence", [0.4, 0.7, 0.95])
def test_a_model_that_is_wrong_is_soon_left_alone(machine: str, confidence: float) -> None:
    acceptance = Acceptance()
    first, _ = with_model(machine, 0.1, lambda _: False, confidence, acceptance)
    assert figure(first, MACHINES[machine]) > 0.93
    for _ in range(3):
        later, _ = with_model(machine, 0.1, lambda _: False, confidence, acceptance)
        assert figure(later, MACHINES[machine]) > 0.94
    assert sum(MODEL in r.draft.sources for r in later) < 0.1 * len(later)


def test_a_model_is_asked_as_far_as_it_is_sure() -> None:
    """Half of its drafts hold and it knows: far fewer are made at a time than of sure ones."""

    def drafted(confidence: float) -> float:
        rng = random.Random(1)
        right = [rng.random() < confidence for _ in range(2000)]
        rounds, _ = with_model("flat", 0.1, lambda i: right[i], confidence)
        made = [len(r.draft.tokens) for r in rounds if r.draft.tokens]
        assert figure(rounds, MACHINES["flat"]) > 1.0
        return sum(made) / len(made)

    assert drafted(0.6) < 0.7 * drafted(0.95)


def test_catching_up_is_counted() -> None:
    """The same question pays after one token to read, and does not after three hundred near the end."""
    text = random_text(LETTERS, 5)
    model = ScriptedModel(oracle_script(text, lambda _: True, 0.95))
    drafter = ModelDrafter(model, 10_000, window=1000)
    costs = CostCurve({n: 0.1 * s for n, s in MACHINES["flat"].items()})

    def asked(prompt: int, written: int, limit: int) -> Draft:
        """What a planner proposes after so many tokens, of which it saw the last ones written."""
        one = make_planner(CostCurve(MACHINES["flat"]), Acceptance(), None, drafter, costs)
        one.propose(text[: prompt + 1], 0)
        return one.propose(text[: prompt + written], limit)

    assert asked(380, 20, 6) == Draft()
    assert model.evaluated == []
    model.forward(text[:399])
    assert asked(380, 20, 6).tokens[:4] == tuple(text[400:404])
    model.rollback(0)
    # With all of a long answer to come, reading is worth it, once there is something to compare it with.
    assert asked(52, 2, 400) == Draft()
    assert asked(52, 8, 400).tokens[:3] == tuple(text[60:63])


def test_a_model_that_disagrees_with_what_it_reads_is_not_asked_further() -> None:
    """Its own choice is compared with the tokens that the target wrote."""
    text = random_text(LETTERS, 5)
    costs = CostCurve({n: 0.1 * s for n, s in MACHINES["flat"].items()})
    drafted = {}
    for agrees in (True, False):
        model = ScriptedModel(oracle_script(text, lambda i, yes=agrees: yes or i >= 90, 0.9))
        one = make_planner(
            CostCurve(MACHINES["flat"]), Acceptance(), None, ModelDrafter(model, 10_000, window=1000), costs
        )
        one.propose(text[:61], 0)
        one.propose(text[:90], 400)
        drafted[agrees] = len(model.evaluated)
    assert drafted[False] < drafted[True]


@pytest.mark.parametrize("wrong", [1 / 3, 3.0])
@pytest.mark.parametrize("machine", ["blocks", "flat"])
@pytest.mark.parametrize("confidence", [0.4, 0.6, 0.8])
def test_a_model_whose_cost_is_known_wrongly_makes_nothing_slower(
    machine: str, wrong: float, confidence: float
) -> None:
    """By a factor of 3 either way, over texts of 128 tokens; where it pays it is used all the same."""
    seconds, acceptance, rng = MACHINES[machine], Acceptance(), random.Random(1)
    share = 0.1
    believed = CostCurve({n: wrong * share * s for n, s in seconds.items()})
    truth = CostCurve({n: share * s for n, s in seconds.items()})
    figures = []
    for seed in range(12):
        text = random_text(LETTERS, seed, START + 128)
        right = [rng.random() < confidence - 0.1 for _ in text]
        model = ScriptedModel(oracle_script(text, right.__getitem__, confidence))
        one = make_planner(
            CostCurve(seconds), acceptance, None, ModelDrafter(model, 10_000, window=1000), believed
        )
        figures.append(figure(decode(text, one, seconds, model, truth), seconds))
    assert min(figures) >= 0.9
    assert sum(figures) / len(figures) >= 0.97


def test_further_tokens_of_a_block_are_free() -> None:
    """A drafter whose pass gives several tokens is priced by passes, one that gives one by tokens."""
    costs, lengths = CostCurve({n: 0.3 * s for n, s in MACHINES["flat"].items()}), {}
    for size in (1, 8):
        drafter = ModelDrafter(ScriptedModel(lambda _: [4.0] + [0.0] * 9), 10_000)
        drafter.block_size = size
        drafter.draft([0] * 30, 1, lambda _: True)
        one = make_planner(CostCurve(MACHINES["flat"]), Acceptance(), None, drafter, costs)
        lengths[size] = len(one.propose([0] * 31, 40).tokens)
    assert lengths[8] > lengths[1] > 0


def test_the_model_is_asked_where_the_text_does_not_repeat() -> None:
    """And repetition goes on after its drafts."""
    repeated = random_text(LETTERS, 9, 30)
    text = [t for i in range(40) for t in (*repeated, (7 * i) % LETTERS)]
    rounds, _ = with_model("flat", 0.05, lambda _: True, 0.8, text=text, suffix=True)
    orders = {tuple(source for source, _ in itertools.groupby(r.draft.sources)) for r in rounds}
    assert {(SUFFIX,), (MODEL, SUFFIX)} <= orders
    alone = decode(text, planner(MACHINES["flat"]), MACHINES["flat"])
    assert figure(rounds, MACHINES["flat"]) > figure(alone, MACHINES["flat"])


def test_the_model_rests_where_the_text_repeats() -> None:
    """Even if it would be surer."""
    model = ScriptedModel(lambda context: [9.0] + [0.0] * 9)
    cheap = CostCurve({n: 1e-4 * s for n, s in MACHINES["flat"].items()})
    suffix = Guesser([8] * 40, lambda _: True, 0.5)
    one = planner(MACHINES["flat"], suffix, model=ModelDrafter(model, 1000), model_costs=cheap)
    assert set(one.propose([8] * 30, 6).sources) == {SUFFIX}
    assert model.evaluated == []


def test_best_case() -> None:
    free, dear = CostCurve({1: 1e-9}), CostCurve({1: 1.0})
    flat = CostCurve({1: 1.0, 4: 1.0})
    assert best_case(flat, free, 1.0) == pytest.approx(4.0)
    assert best_case(flat, free, 0.5) == pytest.approx(1.875)
    assert best_case(flat, free, 1.0, most=2) == pytest.approx(3.0)
    assert best_case(flat, dear, 1.0) == pytest.approx(1.0)
    assert best_case(CostCurve({1: 1.0}), free) == 0.0  # nothing can be checked
    assert best_case(flat, dear, 1.0, block=3) == pytest.approx(2.0)
    padded = CostCurve({1: 1.0, 2: 2.0, 3: 2.0, 4: 1.25})
    assert best_case(padded, free, 1.0, most=1) == pytest.approx(1.6)
    half, tenth = (CostCurve({n: share * s for n, s in MACHINES["flat"].items()}) for share in (0.5, 0.1))
    assert best_case(CostCurve(MACHINES["flat"]), half) < best_case(CostCurve(MACHINES["flat"]), tenth)


# Caution.


def test_long_drafts_are_earned() -> None:
    caution = DraftBackoff()
    start = caution.longest
    caution.observe(start, start, 5.0, 0.0)
    assert caution.longest > start
    for _ in range(20):
        caution.observe(caution.longest, 0, -1.0, 0.0)
    assert 1 <= caution.longest < start
    low = caution.longest
    caution.observe(1, 1, 0.5, 0.0)  # a short draft that held says nothing of long ones
    assert caution.longest in (low, 2 * low)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31), st.floats(-20.0, 20.0)), max_size=80))
def test_losses_raise_what_a_plan_must_promise(rounds: list[tuple[int, int, float]]) -> None:
    caution = DraftBackoff()
    rest = caution.margin
    assert rest > 0.0
    for drafted, accepted, gain in rounds:
        before = caution.margin
        caution.observe(drafted, min(drafted, accepted), gain, 0.0)
        assert caution.longest >= 1
        assert caution.margin >= rest
        if gain < -0.1:
            assert caution.margin >= before - 0.01  # a little is forgiven in a round without a draft
        elif gain >= 0.0:
            assert caution.margin <= before
    for _ in range(2000):
        if caution.margin == rest:
            break
        caution.observe(0, 0, 0.0, 0.0)
    assert caution.margin == pytest.approx(rest)  # forgiven in time


def test_losses_by_chance_do_not_stop_drafting() -> None:
    """A token that is right in 7 of 10 rounds gains 0.65 tokens or loses 0.5: a gain on average."""
    variance = accepted_variance([0.7])
    assert variance == pytest.approx(0.21)
    chance, free = DraftBackoff(), DraftBackoff()
    rest = chance.margin
    for _ in range(3):
        chance.observe(1, 0, -0.5, variance)
        free.observe(1, 0, -0.5, 0.0)
    assert chance.margin < rest + 0.05 < free.margin
    for _ in range(4):
        chance.observe(1, 0, -0.5, variance)
    assert chance.margin > 2 * rest  # no longer by chance


def test_the_variance_of_accepted_tokens() -> None:
    probabilities = [0.9, 0.5, 0.8]
    share = [0.1, 0.9 * 0.5, 0.9 * 0.5 * 0.2, 0.9 * 0.5 * 0.8]
    mean = sum(n * p for n, p in enumerate(share))
    assert accepted_variance(probabilities) == pytest.approx(
        sum(p * (n - mean) ** 2 for n, p in enumerate(share))
    )
    assert accepted_variance([]) == 0.0


# Its own work.


def calls(work: Callable[[], object]) -> int:
    """How many functions Python enters."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_round_is_little_work_however_long_the_text() -> None:
    def work(size: int, text: list[int]) -> int:
        one = planner(MACHINES["flat"])
        one.propose(text[: size - 1], 31)
        one.observe(Round((text[size - 1],), Draft(), 0, 0.1, 0.0, 0.1))
        made: list[Draft] = []
        planned = calls(lambda: made.append(one.propose(text[:size], 31)))
        tokens = (*made[0].tokens, 1)
        learned = calls(lambda: one.observe(Round(tokens, made[0], len(tokens) - 1, 0.1, 0.0, 0.1)))
        return planned + learned

    for text in (copied(1, 40, 0.0, 8000), copied(1, 40, 0.05, 8000), random_text(2, 1, 8000)):
        short, long = work(500, text), work(8000, text)
        assert long < 2 * short + 100
        assert max(short, long) < 4000


def test_asking_the_model_is_little_work() -> None:
    text = [1] * 600
    model = ScriptedModel(lambda context: [0.0, 6.0, 0.0])
    cheap = CostCurve({n: 0.01 * s for n, s in MACHINES["flat"].items()})
    one = make_planner(CostCurve(MACHINES["flat"]), Acceptance(), None, ModelDrafter(model, 10_000), cheap)
    one.propose(text[:400], 0)
    made: list[Draft] = []
    count = calls(lambda: made.append(one.propose(text, 400)))
    assert len(made[0].tokens) >= 8
    assert count < 2000 * len(made[0].tokens)


# Through the real loop: lossless.

VOCAB = 5
SCRIPT = noise_script(VOCAB, seed=1, memory=2)
OTHER = noise_script(VOCAB, seed=2, memory=2)


def costs_of(shape: Sequence[float]) -> CostCurve:
    """The costs of 1, 2, ... rows; 0 where there is no such batch."""
    return CostCurve({n: cost for n, cost in enumerate(shape, 1) if cost})


class Timed:
    """A planner whose rounds took what `shape` says: real ones of scripted models take next to nothing."""

    def __init__(self, one: Planner, shape: Sequence[float]) -> None:
        self._planner, self._shape = one, shape
        self.propose, self.stop_ahead = one.propose, one.stop_ahead

    def observe(self, round_: Round) -> None:
        seconds = self._shape[round_.draft.rows - 1]
        assert seconds
        self._planner.observe(replace(round_, seconds=seconds, drafting=0.0, waiting=seconds))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.integers(0, 40),
    st.sampled_from(
        [(1, 1.01, 1.02, 1.03, 1.04, 1.05), (1, 1.6, 1.7, 1.2), (1, 0, 0, 1.1), (1, 2, 3, 4), (1,)]
    ),
    st.sampled_from([SCRIPT, OTHER, None]),
    st.booleans(),
    st.sampled_from([Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=3, seed=4)]),
)
def test_what_is_planned_never_changes_the_text(
    prompt: list[int],
    count: int,
    shape: tuple[float, ...],
    draft_script: Script | None,
    suffix: bool,
    sampling: Sampling,
) -> None:
    """Drafts are point masses: the greedy text, and with a seed the sampled one, is plain decoding's."""
    expected, sampler = list(prompt), Sampler(sampling, prompt)
    for _ in range(count):
        row = np.array(SCRIPT(expected), np.float32)
        expected.append(sampler.distribution(row).sample(sampler.uniform()))
    model = ModelDrafter(ScriptedModel(draft_script), 1000) if draft_script else None
    costs, acceptance = costs_of(shape), Acceptance()
    for _ in range(2):
        context, target = list(prompt), ScriptedModel(SCRIPT)
        one = make_planner(costs, acceptance, SuffixDrafter() if suffix else None, model, costs_of([1e-3]))
        for round_ in generate(
            target, context, Timed(one, shape), Sampler(sampling, prompt), lambda _: False, count
        ):
            assert list(target.tokens) == context[:-1]
            assert round_.draft.rows <= len(shape)
        assert context == expected


@pytest.mark.parametrize("ends", [False, True])
def test_drafts_reach_the_real_loop(ends: bool) -> None:
    """The test above would hold if nothing was ever drafted. Where every token may end the text, one is."""
    target, context, shape = ScriptedModel(SCRIPT), [1, 2, 3], (1, 1.05, 1.3, 1.04, 1.3, 1.2)
    model = ModelDrafter(ScriptedModel(SCRIPT), 1000, is_end=lambda _: ends)
    one = make_planner(
        costs_of(shape), Acceptance(), None if ends else SuffixDrafter(), model, costs_of([1e-3])
    )
    rounds = list(generate(target, context, Timed(one, shape), Sampler(Sampling()), lambda _: False, 60))
    assert {source for r in rounds for source in r.draft.sources} == ({MODEL} if ends else {MODEL, SUFFIX})
    assert len(rounds) < (40 if ends else 25)
    assert any(r.draft.padding for r in rounds) == ends


PROMPT, TEXTS = (0, 1, 2, 0, 1), 3000
P = cache(noise_script(3, seed=11, memory=2, scale=0.8))


def target_script(context: Sequence[int]) -> Sequence[float]:
    return P(tuple(context[-2:]))


def sure_after_0(context: Sequence[int]) -> Sequence[float]:
    """q is sure after token 0 and unsure after the others, so what is drawn decides what comes after."""
    return (0.0, 0.0, 4.0) if context and context[-1] == 0 else (1.0, 0.8, 0.0)


class Believing(Acceptance):
    """Takes the drafters at their word for ever."""

    def observe(self, source: str, confidence: float, accepted: bool) -> None:
        pass

    def note(self, source: str, probability: float) -> None:
        pass


def surprise(found: Counter[tuple[int, ...]], prompt: Sequence[int] = PROMPT) -> float:
    """Pearson's chi-squared of all texts, as a standard normal deviate (Wilson and Hilferty 1931)."""
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in next(iter(found)):
        nexts: dict[tuple[int, ...], float] = {}
        for path, before in probs.items():
            p = np.exp(np.array(target_script([*prompt, *path])))
            nexts |= {(*path, token): before * float(p[token] / p.sum()) for token in range(3)}
        probs = nexts
    count, df = found.total(), len(probs) - 1
    statistic = sum((found[path] - count * p) ** 2 / (count * p) for path, p in probs.items())
    return float(((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)))


def sampled(
    shape: Sequence[float],
    draft_script: Script,
    suffix: bool,
    end: int | None,
    kind: type[Planner] = Planner,
    prompt: Sequence[int] = PROMPT,
    written: int = 3,
) -> tuple[Counter[tuple[int, ...]], Counter[tuple[str, ...]]]:
    """TEXTS sampled texts, drafts drawn from q and the suffix drafter's drafts among them."""
    found, sources = Counter[tuple[int, ...]](), Counter[tuple[str, ...]]()
    q, sampler = Sampling(1.0, seed=2), Sampler(Sampling(1.0, seed=1))
    model = ModelDrafter(ScriptedModel(draft_script), 1000, q, is_end=lambda token: token == end)
    costs, cheap, acceptance = costs_of(shape), costs_of([1e-3]), Believing()
    for _ in range(TEXTS):
        one = make_planner(costs, acceptance, SuffixDrafter() if suffix else None, model, cheap, kind=kind)
        context = list(prompt)
        for round_ in generate(
            ScriptedModel(target_script), context, Timed(one, shape), sampler, lambda _: False, written + 1
        ):
            sources[round_.draft.sources] += 1
        found[tuple(context[len(prompt) : len(prompt) + written])] += 1
    return found, sources


SHAPES = {
    "flat": (1, 1.05, 1.1, 1.15),
    "no batch of two": (1, 0, 1.2, 1.4),
    "no batch of three": (1, 1.3, 0, 1.4),
    "only two pay": (1, 1.7, 1.7, 1.8),
    "only three pay": (1, 1.9, 1.95, 1.95),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("suffix", [False, True])
def test_sampled_texts_have_the_targets_distribution(shape: str, end: int | None, suffix: bool) -> None:
    found, sources = sampled(SHAPES[shape], sure_after_0, suffix, end)
    assert sum(n for order, n in sources.items() if MODEL in order) > 100
    assert abs(surprise(found)) < 4.5


def test_draws_and_point_masses_in_one_draft() -> None:
    """Repetition goes on after what was drawn."""
    found, sources = sampled(SHAPES["only three pay"], sure_after_0, True, None, written=4)
    mixed = sum(n for order, n in sources.items() if {MODEL, SUFFIX} <= set(order))
    assert mixed > 0.05 * TEXTS
    assert abs(surprise(found)) < 4.5


class Dropping(Planner):
    """Wrong: what was drawn is dropped where what came after it is not worth a batch."""

    def _best(self, draft: Draft, limit: int, prices: Any, least: int = 0) -> Any:
        return super()._best(draft, limit, prices)


def test_dropping_what_was_drawn_is_seen() -> None:
    found, _ = sampled(SHAPES["only two pay"], sure_after_0, False, None, Dropping)
    assert surprise(found) > 3.5


def test_joined_drafts_say_what_was_drawn() -> None:
    orders = set[tuple[str, ...]]()
    for seed in range(60):
        model = ModelDrafter(ScriptedModel(sure_after_0), 1000, Sampling(1.0, seed=seed))
        shape = (1, 1.9, 1.95, 1.95, 1.96, 1.97)
        one = make_planner(costs_of(shape), Acceptance(), SuffixDrafter(), model, costs_of([1e-3]))
        draft = one.propose((*PROMPT, 1), 4)
        orders.add(tuple(source for source, _ in itertools.groupby(draft.sources)))
        if MODEL not in draft.sources:
            continue
        assert draft.probs is not None
        assert len(draft.probs) == len(draft.tokens)
        for token, source, q in zip(draft.tokens, draft.sources, draft.probs, strict=True):
            assert q.prob(token) > 0.0
            if source == SUFFIX:
                assert (q.ids.tolist(), q.probs.tolist()) == ([token], [1.0])
            else:
                assert len(q.ids) == 3
    assert (MODEL, SUFFIX) in orders
