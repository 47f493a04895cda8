"""Several requests on one real model: each is answered as it would be alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from edgespec.app.bench.measure import answered
from edgespec.app.chat.chat_model import LocalModel, TokenTrace
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import ContextFullError, Engine
from edgespec.app.engine.prompt_cache import PromptCache
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import BusyError, Scheduler
from edgespec.core import EdgespecError, common_prefix
from edgespec.models.gguf.model import LlamaOptions

QUESTIONS = [
    "Count from one to thirty in words.",
    "Repeat this line five times: the rain in Spain stays mainly in the plain.",
    "Write a Python function that adds two numbers, then one that subtracts them.",
    "Name ten colours, one a line.",
    "What is the capital of France?",
]


class Asker:
    """A listener that waits for its answer."""

    def __init__(self) -> None:
        self.text, self.tokens, self.pieces = "", list[int](), 0
        self.result: GenerationStats | None = None
        self.error: Exception | None = None
        self.begun, self._over = threading.Event(), threading.Event()

    def stepped(self, step: Step) -> None:
        self.text += step.text
        self.tokens += step.tokens
        self.pieces += 1
        self.begun.set()

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        assert self.result is None
        self.result, self.error = stats, error
        self._over.set()

    def wait(self) -> GenerationStats:
        assert self._over.wait(120)
        assert self.result is not None
        return self.result


@pytest.fixture(scope="module")
def engine(starter_path) -> Iterator[Engine]:
    with open_engine(starter_path, parallel=4, options=LlamaOptions(context=512)) as loaded:
        yield loaded


class Borrowed(Scheduler):
    """Leaves the engine to the next test."""

    def close(self, timeout: float = 30.0) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine, "close", lambda: None)
            super().close(timeout)
        self.engine.forget()


@pytest.fixture
def scheduler(engine) -> Iterator[Scheduler]:
    one = Borrowed(engine)
    yield one
    one.close()


def prompt_of(engine: Engine, question: str) -> list[int]:
    return engine.chat_prompt([{"role": "user", "content": question}])


def alone(engine: Engine, question: str, tokens: int = 60) -> list[int]:
    engine.forget()
    return answered(engine, Request(prompt_of(engine, question), max_tokens=tokens)).tokens


def test_each_answer_is_what_it_is_alone(engine, scheduler):
    expected = [alone(engine, question) for question in QUESTIONS]
    engine.forget()
    askers = [Asker() for _ in QUESTIONS]
    for asker, question in zip(askers, QUESTIONS, strict=True):
        scheduler.submit(Request(prompt_of(engine, question), max_tokens=60), asker)
    results = [asker.wait() for asker in askers]
    scheduler.close()
    for asker, result, tokens, question in zip(askers, results, expected, QUESTIONS, strict=True):
        assert asker.error is None
        assert asker.tokens == result.tokens
        assert asker.text == result.text
        assert_same_but_for_near_ties(engine, prompt_of(engine, question), result.tokens, tokens)


def assert_same_but_for_near_ties(
    engine: Engine, prompt: list[int], written: list[int], expected: list[int]
) -> None:
    """Kernels round differently for more rows: where the texts part, the model must hardly prefer one."""
    at = common_prefix(written, expected)
    if at == min(len(written), len(expected)):
        return
    engine.forget()
    row = engine.pool.slots[0].sequence.forward([*prompt, *expected[:at]])[0]
    # This model's logits differ by up to 0.5 between batches of different sizes.
    assert abs(float(row[written[at]] - row[expected[at]])) < 1.0
    assert row.max() - row[expected[at]] < 1.0


def test_an_engine_without_shared_passes_answers_several_too(ik, starter_path):
    options = LlamaOptions(context=512, engine=ik)
    with open_engine(starter_path, parallel=2, options=options) as engine:
        expected = [alone(engine, question, 30) for question in QUESTIONS[:2]]
        engine.forget()
        scheduler, askers = Borrowed(engine), [Asker(), Asker()]
        for asker, question in zip(askers, QUESTIONS, strict=False):
            scheduler.submit(Request(prompt_of(engine, question), max_tokens=30), asker)
        assert [asker.wait().tokens[:8] for asker in askers] == [tokens[:8] for tokens in expected]
        scheduler.close()


def test_texts_in_one_batch_really_share_passes(engine, scheduler):
    askers = [Asker() for _ in range(4)]
    passes: list[list[int]] = []
    forward = engine.model.forward

    def counted(requests):
        passes.append(sorted(sequence.id for sequence, _, _ in requests))
        return forward(requests)

    prompts = [prompt_of(engine, question) for question in QUESTIONS[: len(askers)]]  # or the first is alone
    engine.model.forward = counted
    try:
        for asker, prompt in zip(askers, prompts, strict=True):
            scheduler.submit(Request(prompt, max_tokens=40), asker)
        rounds = sum(asker.wait().rounds for asker in askers)
    finally:
        del engine.model.forward
    assert max(map(len, passes)) == 4
    assert sum(len(ids) for ids in passes if len(ids) > 1) > 0.5 * rounds
    # With one between them that rests, the engine could not evaluate two side by side.
    assert all(ids == list(range(ids[0], ids[-1] + 1)) for ids in passes)


def test_a_conversation_that_goes_on_reads_only_what_is_new(engine, scheduler):
    first = Asker()
    prompt = prompt_of(engine, QUESTIONS[1])
    scheduler.submit(Request(prompt, max_tokens=20), first)
    answer = first.wait()
    assert answer.cached_tokens == 0
    others = [Asker() for _ in range(3)]
    for asker, question in zip(others, QUESTIONS[2:], strict=True):
        scheduler.submit(Request(prompt_of(engine, question), max_tokens=5), asker)
    for asker in others:
        asker.wait()
    more = Asker()
    longer = [*prompt, *answer.tokens, *engine.model.vocab.tokenize(" And then?")]
    scheduler.submit(Request(longer, max_tokens=5), more)
    assert more.wait().cached_tokens >= len(prompt) + len(answer.tokens) - 1


def test_a_system_prompt_is_read_once_for_all(engine, scheduler):
    """While one is written, another shares the cells of what both begin with, and neither text is changed."""
    system = "You are kind and brief. " * 12
    expected, prompts = [], []
    for question in QUESTIONS[:2]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        prompts.append(engine.chat_prompt(messages))
        engine.forget()
        expected.append(answered(engine, Request(prompts[-1], max_tokens=30)).tokens)
    engine.forget()
    first, second = Asker(), Asker()
    scheduler.submit(Request(prompts[0], max_tokens=30), first)
    assert first.begun.wait(60)
    scheduler.submit(Request(prompts[1], max_tokens=30), second)
    shared = common_prefix(*prompts)
    assert shared > 60
    assert second.wait().cached_tokens == shared
    first.wait()
    scheduler.close()
    for asker, prompt, tokens in zip((first, second), prompts, expected, strict=True):
        assert_same_but_for_near_ties(engine, prompt, asker.tokens, tokens)


def test_those_that_begin_alike_and_at_once_read_the_beginning_once(engine, scheduler):
    system = "You are kind and brief. " * 30
    prompts = [
        engine.chat_prompt([{"role": "system", "content": system}, {"role": "user", "content": question}])
        for question in QUESTIONS[:4]
    ]
    read = 0
    decode = engine.model._decode

    def counted(parts):
        nonlocal read
        read += sum(len(new) for _, new, _ in parts)
        decode(parts)

    engine.model._decode = counted
    askers = [Asker() for _ in prompts]
    try:
        for asker, prompt in zip(askers, prompts, strict=True):
            scheduler.submit(Request(prompt, max_tokens=1), asker)
        results = [asker.wait() for asker in askers]
    finally:
        del engine.model._decode
    shared = common_prefix(prompts[1], prompts[2])
    assert shared > 150
    assert read < sum(map(len, prompts)) - (len(prompts) - 1) * shared + 64
    assert sorted(result.cached_tokens >= shared - 1 for result in results) == [False, True, True, True]


def test_one_whose_leader_goes_away_reads_for_itself(engine, scheduler):
    prompt = prompt_of(engine, "Rain is wet. " * 100)
    first, second = Asker(), Asker()
    leader = scheduler.submit(Request(prompt, max_tokens=5), first)
    scheduler.submit(Request(prompt, max_tokens=5), second)
    leader.cancel()
    first.wait()
    assert len(second.wait().tokens) == 5


def test_a_conversation_that_left_its_slot_comes_back_from_disk(starter_path, tmp_path):
    """One slot, two long conversations in turn: the second turn of each reads only what is new."""
    with open_engine(starter_path, options=LlamaOptions(context=1024)) as engine:
        engine.pool.snapshots = PromptCache(folder=tmp_path)
        prompts = [prompt_of(engine, f"{topic}. " * 120) for topic in ("Apples fall", "Rain is wet")]
        answers = [answered(engine, Request(prompt, max_tokens=4)).tokens for prompt in prompts]
        assert len(list(tmp_path.rglob("*.state"))) == 1
        for prompt, tokens in zip(prompts, answers, strict=True):
            longer = [*prompt, *tokens, 5]
            again = answered(engine, Request(longer, max_tokens=8))
            assert again.cached_tokens >= len(prompt)
            engine.pool.snapshots, prompt_cache = None, engine.pool.snapshots
            engine.forget()
            cold = answered(engine, Request(longer, max_tokens=8))
            engine.pool.snapshots = prompt_cache
            assert cold.cached_tokens == 0
            assert again.tokens == cold.tokens
    assert list(tmp_path.rglob("*.state")) == []


def test_a_lasting_shelf_is_found_again_and_forgets_when_reported(starter_path, tmp_path):
    with open_engine(starter_path, options=LlamaOptions(context=1024)) as engine:
        engine.pool.snapshots = PromptCache(folder=tmp_path, lasting=True)
        prompt = prompt_of(engine, "Apples fall. " * 120)
        answered(engine, Request(prompt, max_tokens=4))
        engine.pool.snapshots.keep(engine.pool.slots[0])
        engine.pool.snapshots.keep(engine.pool.slots[0])
    assert len(list(tmp_path.glob("*.state"))) == 1
    with open_engine(starter_path, options=LlamaOptions(context=1024)) as engine:
        engine.pool.snapshots = PromptCache(folder=tmp_path, lasting=True)
        again = answered(engine, Request([*prompt, 5], max_tokens=4))
        assert again.cached_tokens >= len(prompt) - 1
        engine.pool.snapshots.forget(
            engine.model.vocab.tokenize("Something else. " * 100), engine.pool.slots[0]
        )
        assert engine.pool.slots[0].sequence.tokens
        assert len(list(tmp_path.glob("*.state"))) == 1
        engine.pool.snapshots.forget(prompt, engine.pool.slots[0])
        assert not engine.pool.slots[0].sequence.tokens
        assert list(tmp_path.glob("*.state")) == []


def test_a_chat_opened_again_has_its_conversation_read(starter_path, tmp_path):
    messages = [{"role": "user", "content": "Apples fall. " * 120}]
    cached = []
    for _ in range(2):
        engine = LocalModel(open_engine(starter_path, options=LlamaOptions(context=1024)), tmp_path)
        result = TokenTrace()
        request = Request(engine.prompt(messages), max_tokens=6)
        messages_after = "".join(engine.answer(messages, request, result))
        cached.append(result.cached_tokens)
        assert messages_after == result.text
        if cached[1:]:
            engine.forget(messages)
        engine.close()
    assert cached[0] == 0
    assert cached[1] >= len(request.prompt) - 1
    assert list(tmp_path.iterdir()) == []  # of a conversation that was deleted nothing stays


def test_what_a_killed_program_left_is_swept(starter_path, tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    left, ours = tmp_path / f"{done.pid}-abc", tmp_path / f"{os.getpid()}-abc"
    for folder in (left, ours):
        folder.mkdir()
        (folder / "1.state").write_text("x")
    prompt_cache = PromptCache(folder=tmp_path)
    assert prompt_cache._place() is not None
    assert not left.exists()
    assert ours.exists()
    prompt_cache.close()


def test_the_disk_keeps_what_was_used_last(starter_path, tmp_path):
    with open_engine(starter_path, options=LlamaOptions(context=1024)) as engine:
        engine.pool.snapshots = PromptCache(most=1, folder=tmp_path)
        for topic in ("Apples fall", "Rain is wet", "Snow melts"):
            answered(engine, Request(prompt_of(engine, f"{topic}. " * 120), max_tokens=2))
            assert list(tmp_path.rglob("*.state")) == []


def test_cancelled_ones_end_and_the_others_go_on(engine, scheduler):
    gone, stays = Asker(), Asker()
    ticket = scheduler.submit(Request(prompt_of(engine, QUESTIONS[0]), max_tokens=400), gone)
    scheduler.submit(Request(prompt_of(engine, QUESTIONS[3]), max_tokens=60), stays)
    assert gone.begun.wait(60)
    assert stays.begun.wait(60)
    ticket.cancel()
    assert gone.wait().stop_reason == "cancelled"
    assert len(gone.tokens) < 400
    assert stays.wait().stop_reason in ("length", "end")
    assert stays.error is None


def test_one_that_waits_can_be_cancelled(engine, scheduler):
    running = [Asker() for _ in range(4)]
    tickets = [
        scheduler.submit(Request(prompt_of(engine, q), max_tokens=300), a)
        for a, q in zip(running, QUESTIONS, strict=False)
    ]
    waiting = Asker()
    late = scheduler.submit(Request(prompt_of(engine, QUESTIONS[4]), max_tokens=50), waiting)
    late.cancel()
    for ticket in tickets:
        ticket.cancel()
    assert waiting.wait().stop_reason == "cancelled"
    assert waiting.tokens == []
    for asker in running:
        asker.wait()


def test_an_error_is_its_askers_alone(engine, scheduler):
    bad, good = Asker(), Asker()
    scheduler.submit(Request([1] * 600, max_tokens=5), bad)
    scheduler.submit(Request(prompt_of(engine, QUESTIONS[4]), max_tokens=5), good)
    bad.wait()
    good.wait()
    assert isinstance(bad.error, ContextFullError)
    assert good.error is None
    assert good.tokens


def test_a_full_queue_is_busy(engine):
    scheduler = Borrowed(engine, parallel=1, queue=2)
    try:
        first = Asker()
        ticket = scheduler.submit(Request(prompt_of(engine, QUESTIONS[0]), max_tokens=300), first)
        assert first.begun.wait(60)
        others = [Asker(), Asker()]
        tickets = [scheduler.submit(Request([1, 2], max_tokens=1), one) for one in others]
        with pytest.raises(BusyError, match="2 requests are waiting") as error:
            scheduler.submit(Request([1, 2]), Asker())
        assert error.value.retry_after >= 1
        assert scheduler.load.running == 1
        assert scheduler.load.waiting == 2
        ticket.cancel()
        for one in others:
            one.wait()
        assert tickets[0].asked <= tickets[1].asked
    finally:
        scheduler.close()


def test_what_can_begin_at_once_is_never_too_much(engine):
    """However fast they come: the thread that begins them may be in the middle of something."""
    scheduler = Borrowed(engine, parallel=2, queue=2)
    try:
        held = threading.Event()
        scheduler._thread.submit(held.wait)
        others = [Asker() for _ in range(4)]
        for one in others:
            scheduler.submit(Request([1, 2], max_tokens=1), one)
        with pytest.raises(BusyError):
            scheduler.submit(Request([1, 2]), Asker())
        held.set()
        for one in others:
            one.wait()
    finally:
        held.set()
        scheduler.close()


def test_clients_take_turns(engine):
    scheduler = Borrowed(engine, parallel=1)
    order: list[str] = []

    class Named(Asker):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def ended(self, stats: GenerationStats, error: Exception | None) -> None:
            order.append(self.name)
            super().ended(stats, error)

    try:
        first = Named("first")
        ticket = scheduler.submit(Request(prompt_of(engine, QUESTIONS[0]), max_tokens=300), first, "x")
        assert first.begun.wait(60)
        askers = [Named("greedy 1"), Named("greedy 2"), Named("greedy 3"), Named("modest")]
        for asker in askers:
            scheduler.submit(Request([1, 2, 3], max_tokens=1), asker, asker.name.split()[0])
        ticket.cancel()
        for asker in askers:
            asker.wait()
    finally:
        scheduler.close()
    assert order == ["first", "greedy 1", "modest", "greedy 2", "greedy 3"]


def test_closing_ends_everything(engine):
    scheduler = Borrowed(engine, parallel=2)
    askers = [Asker() for _ in range(5)]
    for asker, question in zip(askers, QUESTIONS, strict=True):
        scheduler.submit(Request(prompt_of(engine, question), max_tokens=400), asker)
    assert askers[0].begun.wait(60)
    start = time.monotonic()
    scheduler.close()
    assert time.monotonic() - start < 10
    reasons = [asker.wait().stop_reason for asker in askers]
    assert set(reasons) <= {"cancelled", "end"}  # a short answer may have been complete
    assert reasons.count("cancelled") >= 3
    with pytest.raises(EdgespecError, match="stopping"):
        scheduler.submit(Request([1]), Asker())
