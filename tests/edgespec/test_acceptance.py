"""Calibration finds how often drafts stand, and reads back only what it wrote."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.acceptance import Acceptance

relaxed = settings(max_examples=200, deadline=None, derandomize=True)
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)  # what from_json documents
sources = st.sampled_from(["suffix", "model", "corpus"])
confidences = st.floats(0.0, 1.0)
seen = st.lists(st.tuples(sources, confidences, st.booleans()), max_size=60)


def taught(observations: list[tuple[str, float, bool]]) -> Acceptance:
    acceptance = Acceptance()
    for one in observations:
        acceptance.observe(*one)
    return acceptance


@pytest.mark.parametrize("confidence", [0.0, 0.05, 0.3, 0.77, 0.99, 1.0])
def test_a_drafter_never_seen_is_believed(confidence: float) -> None:
    assert Acceptance().probability("new", confidence) == confidence
    assert taught([("other", confidence, False)] * 100).probability("new", confidence) == confidence


@pytest.mark.parametrize("confidence", [0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_calibration_converges_to_the_true_rate(confidence: float, rate: float) -> None:
    rng, acceptance = random.Random(1), Acceptance()
    for _ in range(1500):
        acceptance.observe("a", confidence, rng.random() < rate)
    assert acceptance.probability("a", confidence) == pytest.approx(rate, abs=0.09)


def test_a_few_dozen_surprises_are_enough() -> None:
    assert taught([("a", 0.95, False)] * 40).probability("a", 0.95) < 0.4
    assert taught([("a", 0.2, True)] * 40).probability("a", 0.2) > 0.6
    assert taught([("a", 0.95, False)]).probability("a", 0.95) > 0.85  # and one is not


def test_a_change_is_followed_however_much_was_seen_before() -> None:
    rng, acceptance = random.Random(1), taught([("a", 0.9, True)] * 50_000)
    for _ in range(2000):
        acceptance.observe("a", 0.9, rng.random() < 0.1)
    assert acceptance.probability("a", 0.9) == pytest.approx(0.1, abs=0.09)


def test_confidences_are_reported_apart() -> None:
    rng, acceptance = random.Random(1), Acceptance()
    for _ in range(8000):
        confidence = rng.random()
        acceptance.observe("a", confidence, rng.random() < confidence**3)
    for confidence in (0.05, 0.35, 0.65, 0.85, 0.99):
        assert acceptance.probability("a", confidence) == pytest.approx(confidence**3, abs=0.13)


def test_drafters_are_reported_apart() -> None:
    acceptance = taught([("good", 0.5, True), ("bad", 0.5, False)] * 200)
    assert acceptance.probability("good", 0.5) > 0.9
    assert acceptance.probability("bad", 0.5) < 0.1


@relaxed
@given(seen, sources, confidences)
def test_a_probability_is_one_and_each_draft_moves_it_the_right_way(
    observations: list[tuple[str, float, bool]], source: str, confidence: float
) -> None:
    for accepted in (True, False):
        acceptance = taught(observations)
        before = acceptance.probability(source, confidence)
        others = [(s, acceptance.probability(s, confidence)) for s in ("suffix", "model", "x") if s != source]
        assert 0.0 <= before <= 1.0
        acceptance.observe(source, confidence, accepted)
        after = acceptance.probability(source, confidence)
        assert 0.0 <= after <= 1.0
        assert after >= before - 1e-12 if accepted else after <= before + 1e-12
        assert others == [(s, acceptance.probability(s, confidence)) for s, _ in others]


@relaxed
@given(st.lists(confidences, max_size=30))
def test_a_level_stays_a_probability(noted: list[float]) -> None:
    acceptance = Acceptance()
    for probability in noted:
        before = acceptance.level("a")
        acceptance.note("a", probability)
        assert min(before, probability) <= acceptance.level("a") <= max(before, probability)
    assert acceptance.level("b") == Acceptance().level("b")
    assert 0.0 < Acceptance().level("b") < 1.0


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_level_converges(value: float) -> None:
    acceptance = Acceptance()
    for _ in range(3000):
        acceptance.note("a", value)
    assert acceptance.level("a") == pytest.approx(value, abs=0.02)


def through_json(acceptance: Acceptance) -> Acceptance:
    return Acceptance.from_json(json.loads(json.dumps(acceptance.as_json())))


@relaxed
@given(seen, st.integers(1, 40), st.lists(confidences, max_size=4))
def test_what_was_learned_comes_back_from_json(
    observations: list[tuple[str, float, bool]], times: int, noted: list[float]
) -> None:
    acceptance = taught(observations * times)
    for probability in noted:
        acceptance.note("model", probability)
    back = through_json(acceptance)
    for source in ("suffix", "model", "corpus", "new"):
        assert back.level(source) == pytest.approx(acceptance.level(source), abs=0.01)
        for confidence in [c / 50 for c in range(51)]:
            expected = acceptance.probability(source, confidence)
            assert back.probability(source, confidence) == pytest.approx(expected, abs=0.01)
    assert through_json(back).as_json() == back.as_json()
    back.observe("suffix", 0.5, True)  # and learns on


def good() -> dict[str, Any]:
    acceptance = taught([("suffix", 0.5, True), ("suffix", 0.5, False), ("model", 0.9, True)])
    acceptance.note("model", 0.9)
    data: dict[str, Any] = json.loads(json.dumps(acceptance.as_json()))
    return data


def cell(value: object) -> dict[str, Any]:
    data = good()
    data["bins"]["suffix"][3] = value
    return data


def level(value: object) -> dict[str, Any]:
    return {**good(), "levels": {"model": value}}


@pytest.mark.parametrize(
    "data",
    [
        {},
        # Files of before have no account.
        *({k: v for k, v in good().items() if k != gone} for gone in ("bins", "levels")),
        *({**good(), k: bad} for k in good() for bad in (None, 1, "x", [1], {"suffix": None}, {"a": "x"})),
        *(map(cell, (None, 1, "xy", [], [1.0], [1.0, 2.0, 3.0], [2.0, 1.0], [-1.0, 1.0], [1.0, 1e6]))),
        *(map(cell, ([math.nan, 1.0], [1.0, math.nan], [1.0, math.inf], [None, 1.0], [10**400, 10**400]))),
        *(map(level, (None, "x", [], -0.1, 1.1, math.nan, math.inf, 10**400))),
        {**good(), "bins": {"suffix": good()["bins"]["suffix"][:-1]}},
        {**good(), "bins": {"suffix": [*good()["bins"]["suffix"], [0.0, 0.0]]}},
        {**good(), "bins": {"suffix": []}},
    ],
    ids=lambda data: json.dumps(data)[-60:],
)  # fmt: skip
def test_damaged_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(DAMAGE):
        Acceptance.from_json(json.loads(json.dumps(data)))


def test_what_is_refused_leaves_the_original_readable() -> None:
    assert Acceptance.from_json(good()).as_json() == good()
