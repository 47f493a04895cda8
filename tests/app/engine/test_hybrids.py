"""Engines on every kind of cache: the text is that of plain decoding, prefixes are reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny import write_tiny
from tiny_attention import FULL_CACHES
from tiny_hybrids import HYBRIDS, write_qwen35
from tiny_lora import write_lora

from edgespec.app.bench.fixed_length import FixedLength
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.marks import marks
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.models.gguf.lora import Adapter
from edgespec.models.gguf.native import LlamaOptions
from edgespec.sampling import Sampling

# All in float32, which flash attention is not, so that rounding decides neither tokens nor experts.
OPTIONS = LlamaOptions(context=2048, threads=1, type_k="f32", type_v="f32", flash_attention=False)
WRITERS = {**HYBRIDS, **FULL_CACHES}


@pytest.fixture(scope="module", params=[*WRITERS, "qwen35 with a head"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = tmp_path_factory.mktemp("hybrid") / "model.gguf"
    head = request.param.endswith("head")
    write_qwen35(path, heads=1) if head else WRITERS[request.param](path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
        patch.setattr("edgespec.app.engine.calibration.save", lambda *_: None)
        with open_engine(path, path if head else None, mode="performance", options=OPTIONS) as engine:
            yield engine


def answered(engine: Engine, prompt: list[int], count: int = 60, **options) -> GenerationStats:
    answer = engine.generate(Request(prompt, max_tokens=count, **options))
    for _ in answer:
        pass
    return answer.stats


def prompts(engine: Engine) -> list[list[int]]:
    repetitive = engine.model.vocab.tokenize("one two three one two three one two " * 4)
    return [repetitive, np.random.default_rng(3).integers(0, 256, 50).tolist()]


@pytest.mark.parametrize("length", [1, 2, 4, 7, 20])
def test_greedy_text_with_drafts_of_any_length(engine, length):
    drafted = 0
    for prompt in prompts(engine):
        engine.forget()
        plain = answered(engine, prompt, speculate=False)
        engine.forget()
        fast = answered(engine, prompt, controller=lambda chain: FixedLength(length, chain))
        assert fast.tokens == plain.tokens
        drafted += fast.drafted
    assert drafted > 0


def test_text_with_a_seed(engine):
    sampling = Sampling(temperature=0.7, seed=5)
    for prompt in prompts(engine):
        plain = answered(engine, prompt, sampling=sampling, speculate=False)
        fast = answered(engine, prompt, sampling=sampling, controller=lambda chain: FixedLength(6, chain))
        assert fast.tokens == plain.tokens


@pytest.mark.parametrize("name", FULL_CACHES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, seed=5)])
@pytest.mark.parametrize("adapted", [False, True])
def test_text_with_a_draft_model(name, sampling, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    monkeypatch.setattr("edgespec.app.engine.calibration.save", lambda *_: None)
    target = FULL_CACHES[name](tmp_path / "target.gguf")
    draft = write_tiny(tmp_path / "draft.gguf", "llama")
    adapters = (Adapter(write_lora(tmp_path / "lora.gguf", target)),) if adapted else ()
    options = replace(OPTIONS, adapters=adapters)
    with open_engine(target, draft, suffix=False, mode="performance", options=options) as engine:
        assert engine.model.options.adapters == adapters
        assert engine.drafters.draft.model.options.adapters == ()
        for prompt in prompts(engine):
            plain = answered(engine, prompt, sampling=sampling, speculate=False)
            fast = answered(engine, prompt, sampling=sampling, controller=lambda chain: FixedLength(5, chain))
            assert fast.tokens == plain.tokens
            assert fast.drafted > 0


def test_the_planner_drafts(engine):
    assert (
        answered(engine, prompts(engine)[0], 100).tokens == answered(engine, prompts(engine)[0], 100).tokens
    )


def test_ten_turns_are_read_once(engine):
    """Each prompt is the one before, an answer in which the client changed a little, and a new message."""
    random, read, text = np.random.default_rng(4), [], []
    control = 256
    for turn in range(10):
        text = [*text, control, *random.integers(0, 256, 600 if not turn else 60).tolist(), control]
        stats = answered(engine, text, 20)
        read.append(stats.prompt_tokens - stats.cached_tokens)
        text = [*text, *stats.tokens[:10], *random.integers(0, 256, 5).tolist()]
    assert read[0] == len(text[:602])
    # Each time the message, the changed answer, and what lies between the last mark and the answer.
    assert max(read[1:]) <= 60 + 2 + 15 + 40


def test_marks_of_a_prompt():
    chat = [9, *[1] * 100, 9, 2, 9, *[1] * 5000, 9, 2, 9, 3, 3]
    found = marks(chat, lambda token: token == 9)
    assert found[0] == 103  # the end of the first message, where the second begins
    assert found[-1] == len(chat) - 3  # the end of the last, before the answer
    distances = [len(chat) - one for one in found[1:-1]]
    assert distances == sorted(distances, reverse=True)
    assert len(found) <= 8
    assert marks([1] * 10, lambda token: token == 9) == []
    assert marks([1] * 2000, lambda token: token == 9) == [2000 - 1024, 2000 - 512, 1999]
