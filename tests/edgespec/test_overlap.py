"""Drafting while the target checks: when it pays, and that it changes no text."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from drafters import drafted
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import make_planner

from edgespec.acceptance import Acceptance
from edgespec.core import Cancelled, EdgespecError, Logits
from edgespec.costs import CostCurve
from edgespec.decode import generate
from edgespec.drafting import ModelDrafter
from edgespec.fakes import ScriptedModel, noise_script
from edgespec.overlap import Together, gain, measure_together, pays
from edgespec.planner import Planner
from edgespec.sampling import Sampler, Sampling

VOCAB = 7
SCRIPT = noise_script(VOCAB, seed=1)
OTHER = noise_script(VOCAB, seed=2)
FREE = CostCurve({1: 0.03, 2: 0.0301, 4: 0.0302, 8: 0.0303})
CHEAP = CostCurve({1: 1e-6, 8: 1e-5})
TARGET, NPU = CostCurve({1: 0.04, 4: 0.06, 8: 0.08}), CostCurve({1: 0.012})


def test_it_pays_on_processors_of_their_own_and_not_on_one():
    assert pays(TARGET, NPU, Together(1.0, 1.0))
    assert pays(TARGET, NPU, Together(1.02, 1.05))
    assert not pays(TARGET, NPU, Together(2.0, 2.0))
    assert not pays(TARGET, NPU, Together(1.4, 1.4))
    assert not pays(TARGET, CostCurve({1: 0.0005}), Together(1.0, 1.0))  # nothing to be won
    assert not pays(TARGET, CostCurve({1: 0.4}), Together(1.0, 1.0))  # never ready in time


def test_what_is_won_is_what_the_arithmetic_says():
    # Alone 60 + 4 * 12 = 108 ms; a check of 80 ms (five rows count as eight) holds more than four steps.
    alone = 0.08 + 4 * 0.012
    together = 0.08 + 0.006 + 4 * 0.012 - 0.8**5 * 4 * 0.012
    assert gain(TARGET, NPU, Together(1.0, 1.0)) == pytest.approx(alone / together)


class Machine:
    """A target and a draft model on real threads and a clock of its own."""

    def __init__(self, shared: bool) -> None:
        self._shared, self._now = shared, 0.0
        self._drafting = self._checking = False
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self._now

    def target(self) -> None:
        with self._lock:
            self._checking = True
            if threading.current_thread() is threading.main_thread():
                self._now += 10.0 * (2 if self._shared and self._drafting else 1)

    def draft(self) -> None:
        with self._lock:
            self._drafting = True
            if threading.current_thread() is threading.main_thread():
                self._now += 3.0 * (2 if self._shared and self._checking else 1)


@pytest.mark.parametrize("shared", [True, False])
def test_what_models_do_to_each_other_is_measured(shared):
    machine = Machine(shared)

    def draft() -> None:
        machine._checking = machine._checking and threading.active_count() > 1
        machine.draft()

    before = threading.active_count()
    found = measure_together(machine.target, machine.draft, machine.clock)
    assert found.target == pytest.approx(2.0 if shared else 1.0)
    assert pays(TARGET, NPU, found) is not shared
    assert threading.active_count() == before


def test_a_model_that_fails_next_to_another_is_an_error():
    def fails() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise EdgespecError("no room")

    with pytest.raises(EdgespecError, match="no room"):
        measure_together(lambda: None, fails)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30), st.lists(st.integers(0, 6), max_size=5), st.integers(0, 6), st.integers(0, 4)
        ),
        max_size=8,
    ),
    st.sampled_from([Sampling(), Sampling(1.0, seed=1)]),
)
def test_drafts_are_those_of_a_drafter_that_never_ran_ahead(
    edits: list[tuple[int, list[int], int, int]], sampling: Sampling
) -> None:
    """Whatever was begun, and whatever became of the text meanwhile."""
    before = threading.active_count()
    ahead = ModelDrafter(ScriptedModel(SCRIPT, 200), 200, sampling)
    plain = ModelDrafter(ScriptedModel(SCRIPT, 200), 200, sampling)
    context = [1]
    for keep, more, limit, steps in edits:
        context = [*(context[:keep] or [1]), *more]
        mine, other = drafted(ahead, context, limit), drafted(plain, context, limit)
        assert mine.tokens == other.tokens
        assert mine.confidence == pytest.approx(other.confidence)
        if mine.probs is not None:
            for p, q in zip(mine.probs, other.probs, strict=True):
                np.testing.assert_array_equal(p.probs, q.probs)
        ahead.begin_ahead([*context, *mine.tokens], steps)
        context += mine.tokens
    ahead.stop_ahead()
    assert threading.active_count() == before


def test_what_was_drafted_ahead_is_not_read_again() -> None:
    model = ScriptedModel(SCRIPT)
    drafter = ModelDrafter(model, 1000)
    draft = drafted(drafter, [1, 2, 3], 4)
    drafter.begin_ahead([1, 2, 3, *draft.tokens], 6)
    drafter._ahead.join()  # the target takes its time
    evaluated = len(model.evaluated)
    following = int(np.argmax(SCRIPT([1, 2, 3, *draft.tokens])))
    again = drafted(drafter, [1, 2, 3, *draft.tokens, following], 5)
    assert len(again.tokens) == 5
    assert len(model.evaluated) == evaluated  # all five were there
    assert (
        again.tokens
        == drafted(ModelDrafter(ScriptedModel(SCRIPT), 1000), [1, 2, 3, *draft.tokens, following], 5).tokens
    )


def test_a_wrong_draft_is_thrown_away() -> None:
    drafter = ModelDrafter(ScriptedModel(SCRIPT), 1000)
    drafter.begin_ahead([1, 2, 3], 6)
    drafter._ahead.join()
    wrong = (int(np.argmax(SCRIPT([1, 2, 3]))) + 1) % VOCAB
    assert (
        drafted(drafter, [1, 2, 3, wrong], 4).tokens
        == drafted(ModelDrafter(ScriptedModel(SCRIPT), 1000), [1, 2, 3, wrong], 4).tokens
    )


class Failing(ScriptedModel):
    """Fails in every thread but the main one."""

    error: Exception = Cancelled()

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        if threading.current_thread() is not threading.main_thread():
            raise self.error
        return super().forward(new, last)


@pytest.mark.parametrize("error", [Cancelled(), EdgespecError("lost")])
def test_a_pass_that_fails_ahead_fails_nothing_else(error: Exception) -> None:
    model = Failing(SCRIPT)
    model.error = error
    drafter = ModelDrafter(model, 1000)
    drafter.begin_ahead([1, 2, 3], 6)
    assert (
        drafted(drafter, [1, 2, 3], 4).tokens
        == drafted(ModelDrafter(ScriptedModel(SCRIPT), 1000), [1, 2, 3], 4).tokens
    )


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
@pytest.mark.parametrize("drafts", [SCRIPT, OTHER])
def test_texts_are_those_of_plain_decoding(sampling: Sampling, drafts, monkeypatch) -> None:
    """A draft model that agrees, and one that never does."""
    before = threading.active_count()
    begun: list[int] = []
    begin = ModelDrafter.begin_ahead

    def spy(self: ModelDrafter, text: Sequence[int], most: int) -> None:
        begun.append(most)
        begin(self, text, most)

    monkeypatch.setattr(ModelDrafter, "begin_ahead", spy)

    def text(planner: Planner) -> list[int]:
        context = [1, 2, 3]
        for _ in generate(
            ScriptedModel(SCRIPT), context, planner, Sampler(sampling, context), lambda _: False, 80
        ):
            pass
        planner.stop_ahead()
        return context

    drafting = ScriptedModel(drafts)
    drafter = ModelDrafter(drafting, 1000)
    ahead = make_planner(FREE.copy(), Acceptance(), None, drafter, CHEAP.copy(), 7, ahead=4)
    assert text(ahead) == text(make_planner(FREE.copy(), Acceptance()))
    assert begun
    assert threading.active_count() == before
