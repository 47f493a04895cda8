"""Planted acceptance rates: the drafts of a real prediction layer, accepted as often as asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_heads import write_assistant, write_dense, write_dspark, write_eagle3, write_gemma4
from tiny_hybrids import write_qwen35

from edgespec.app.bench.fixed_length import FixedLength
from edgespec.app.bench.measure import Prompt
from edgespec.app.bench.synthetic import PlantedAnswers, PlantedDrafts, measure_synthetic, read_rates
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.models.gguf.hidden import HeadSequence
from edgespec.models.gguf.native import LlamaOptions

OPTIONS = LlamaOptions(context=1024, threads=1, type_k="f32", type_v="f32", flash_attention=False)


def test_rates_fall_and_are_shares():
    assert read_rates("0.7, 0.5,0.35") == (0.7, 0.5, 0.35)
    for wrong in ("", "x", "0.5,0.7", "1.5", "0.5,0", "-1"):
        with pytest.raises(EdgespecError, match="--synthetic"):
            read_rates(wrong)


def write_mtp(folder: Path) -> tuple[Path, Path]:
    path = write_qwen35(folder / "model.gguf", heads=1)
    return path, path


def write_with_eagle3(folder: Path) -> tuple[Path, Path]:
    return write_dense(folder / "model.gguf"), write_eagle3(folder / "head.gguf")


def write_with_assistant(folder: Path) -> tuple[Path, Path]:
    return write_gemma4(folder / "model.gguf"), write_assistant(folder / "head.gguf")


@pytest.mark.parametrize("write", [write_mtp, write_with_eagle3, write_with_assistant])
@pytest.mark.parametrize(("rates", "least", "most"), [((1.0, 1.0), 1.0, 1.0), ((0.5,), 0.3, 0.7)])
def test_drafts_are_accepted_at_the_rates(tmp_path: Path, monkeypatch, write, rates, least, most):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    monkeypatch.setattr("edgespec.app.engine.calibration.save", lambda *_: None)
    with open_engine(*write(tmp_path), suffix=False, mode="performance", options=OPTIONS) as engine:
        slot = engine.pool.slots[0]
        assert isinstance(slot.drafting, HeadSequence)
        answer = measured_answer(engine, rates)
        assert least <= answer.acceptance <= most
        assert answer.drafted > 50


def measured_answer(engine, rates):
    """An answer with drafts of every round as long as the rates."""

    def answered(**options):
        engine.forget()
        answer = engine.generate(Request(list(b"some text to begin with"), max_tokens=200, **options))
        assert list(answer)
        return answer.stats

    plain = answered(speculate=False)
    planted = engine.pool.slots[0].drafting = PlantedDrafts(engine.pool.slots[0].drafting, rates)
    planted.plant([*b"some text to begin with", *plain.tokens])
    fast = answered(controller=lambda chain: FixedLength(len(rates), chain))
    assert fast.tokens == plain.tokens
    return fast


def test_the_target_keeps_to_the_planted_text(tmp_path: Path):
    """Also where its own choice is another token."""
    path = write_qwen35(tmp_path / "model.gguf")
    with open_engine(path, suffix=False, options=OPTIONS) as engine:
        answers = PlantedAnswers(engine.model)
        engine.model.forward = answers.forward
        prompt, wanted = list(b"some text"), list(b"what it would never write")
        answers.text = [*prompt, *wanted]
        answer = engine.generate(Request(prompt, max_tokens=len(wanted)))
        assert list(answer)
        assert list(answer.stats.tokens) == wanted


def test_a_report(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    path = write_qwen35(tmp_path / "model.gguf", heads=1)
    prompts = [Prompt("a", "1", "one two"), Prompt("a", "2", "three")]
    with open_engine(path, path, mode="performance", options=OPTIONS) as engine:
        report = measure_synthetic(engine, prompts, 30, (0.9, 0.8))
    assert report["prompts"] == 2
    assert report["differences"] == []
    refused = pytest.raises(EdgespecError, match="prediction layer")
    dense = write_dense(tmp_path / "dense.gguf")
    for target, head in ((path, None), (dense, write_dspark(tmp_path / "block.gguf"))):
        with open_engine(target, head, mode="performance", options=OPTIONS) as engine, refused:
            measure_synthetic(engine, prompts, 30, (0.9,))
