"""The engine and the scheduler with fakes alone: no model file, no sensors."""

from __future__ import annotations

import threading

import pytest
from fake_engine import FakeModel, fake_engine

from edgespec.app.engine import drafters as chain
from edgespec.app.engine.drafters import Drafters
from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import BusyError, Scheduler, StoppingError
from edgespec.core import EdgespecError
from edgespec.fakes import ScriptedDrafter

PROMPT = list(b"What is this? What is this? What")


class Listening:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.over = threading.Event()
        self.stats, self.error = GenerationStats(), None

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        self.stats, self.error = stats, error
        self.over.set()

    def wait(self) -> GenerationStats:
        assert self.over.wait(30)
        return self.stats


def plain(prompt: list[int], tokens: int) -> list[int]:
    answering = fake_engine().generate(Request(prompt, max_tokens=tokens))
    return [token for step in answering for token in step.tokens]


def test_steps_add_up_to_the_stats() -> None:
    engine = fake_engine()
    answering = engine.generate(Request(PROMPT, max_tokens=20))
    steps = list(answering)
    folded = GenerationStats(prompt_tokens=len(PROMPT))
    for step in steps:
        folded.add(step)
    assert folded.as_json() == answering.stats.as_json()
    assert folded.text == "".join(step.text for step in steps)
    assert [step.finished is not None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert [step.round is None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert answering.stats.stop_reason == "length"
    assert len(answering.stats.tokens) == 20


def test_what_drafters_draft_changes_no_token_and_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(PROMPT, 30)
    known = ScriptedDrafter(lambda context, limit: expected[len(context) - len(PROMPT) :][:limit])
    monkeypatch.setattr(chain, "FREE", [lambda *_: known])
    engine = fake_engine(drafters=Drafters(most=7))
    answering = engine.generate(Request(PROMPT, max_tokens=30))
    assert [token for step in answering for token in step.tokens] == expected
    assert answering.stats.drafters == {"scripted": (answering.stats.accepted,) * 2}
    assert engine.model.passes < 10


def test_a_prompt_must_be_there_and_fit() -> None:
    engine = fake_engine(model=FakeModel(context=40))
    with pytest.raises(EdgespecError, match="empty"):
        list(engine.generate(Request([])))
    with pytest.raises(ContextFullError, match="40"):
        list(engine.generate(Request([1] * 40)))
    answering = engine.generate(Request(PROMPT))
    assert len([token for step in answering for token in step.tokens]) == 40 - len(PROMPT)
    assert answering.stats.stop_reason == "context"


def test_a_cancelled_answer_keeps_its_text_and_frees_its_slot() -> None:
    engine, request = fake_engine(), Request(PROMPT, max_tokens=200)
    answering = engine.generate(request)
    for i, _ in enumerate(answering):
        if i == 3:
            request.cancel()
    assert answering.stats.stop_reason == "cancelled"
    assert 0 < len(answering.stats.tokens) < 200
    assert plain(PROMPT, 10) == [
        token for step in engine.generate(Request(PROMPT, max_tokens=10)) for token in step.tokens
    ]


def test_a_second_turn_evaluates_only_what_is_new() -> None:
    engine = fake_engine()
    first = engine.generate(Request(PROMPT, max_tokens=5))
    tokens = [token for step in first for token in step.tokens]
    second = engine.generate(Request([*PROMPT, *tokens, 7], max_tokens=5))
    list(second)
    assert second.stats.cached_tokens == len(PROMPT) + 4
    engine.forget()
    third = engine.generate(Request(PROMPT, max_tokens=1))
    list(third)
    assert third.stats.cached_tokens == 0


def test_the_scheduler_answers_many_in_shared_passes() -> None:
    engine = fake_engine(parallel=3)
    scheduler = Scheduler(engine)
    prompts = [[*PROMPT, n] for n in range(5)]
    listening = [Listening() for _ in prompts]
    for prompt, one in zip(prompts, listening, strict=True):
        scheduler.submit(Request(prompt, max_tokens=12), one)
    tokens = [one.wait().tokens for one in listening]
    scheduler.close()
    assert tokens == [plain(prompt, 12) for prompt in prompts]
    assert [[t for step in one.steps for t in step.tokens] for one in listening] == tokens
    assert engine.model.passes < 5 * 12
    assert engine.model.closed


def test_the_scheduler_refuses_more_than_its_queue_and_after_its_end() -> None:
    engine, started, go = fake_engine(), threading.Event(), threading.Event()
    forward = engine.model.forward

    def waiting(requests: object) -> object:
        started.set()
        assert go.wait(30)
        return forward(requests)

    engine.model.forward = waiting
    scheduler = Scheduler(engine, queue=1)
    listening = [Listening() for _ in range(2)]
    scheduler.submit(Request(PROMPT, max_tokens=2), listening[0])
    assert started.wait(30)
    scheduler.submit(Request(PROMPT, max_tokens=2), listening[1])
    with pytest.raises(BusyError):
        scheduler.submit(Request(PROMPT, max_tokens=2), Listening())
    go.set()
    assert [one.wait().stop_reason for one in listening] == ["length"] * 2
    scheduler.close()
    with pytest.raises(StoppingError):
        scheduler.submit(Request(PROMPT), Listening())


def test_an_error_reaches_every_client_and_the_next_is_served() -> None:
    engine = fake_engine(parallel=2)
    forward, calls = engine.model.forward, []

    def failing(requests: object) -> object:
        calls.append(requests)
        if len(calls) == 3:
            raise RuntimeError("lost")
        return forward(requests)

    engine.model.forward = failing
    scheduler = Scheduler(engine)
    listening = [Listening() for _ in range(2)]
    for n, one in enumerate(listening):
        scheduler.submit(Request([*PROMPT, n], max_tokens=50), one)
    for one in listening:
        one.wait()
    assert {type(one.error) for one in listening} <= {RuntimeError, type(None)}
    assert any(one.error for one in listening)
    again = Listening()
    scheduler.submit(Request(PROMPT, max_tokens=5), again)
    assert again.wait().tokens == plain(PROMPT, 5)
    scheduler.close()
