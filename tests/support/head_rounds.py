"""Rounds of a target and of a drafter that evaluates its rows, as an engine drives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.app.bench.fixed_length import FixedLength
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.models.gguf.hidden import HeadModel
from edgespec.models.gguf.model import LlamaModel, LlamaOptions

# Without flash attention, whose rounding decides between two tokens of so small a model.
OPTIONS = LlamaOptions(
    context=1024, threads=1, type_k="f32", type_v="f32", sequences=2, flash_attention=False
)


def random_text(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


class Rounds:
    """A sequence of a target and one of its drafter, whose logits are kept."""

    def __init__(self, target: LlamaModel, head: HeadModel) -> None:
        self.target = target.sequence()
        self.head = head.sequence_for(self.target)
        self.drafter = head.drafter(self.head, 1024)
        self.logits: list[np.ndarray] = []
        read = self.head.forward

        def forward(new, last=1):
            rows = read(new, last)
            self.logits.append(rows[-1].copy())
            return rows

        self.head.forward = forward

    def draft(self, text: list[int], k: int) -> list[int]:
        self.logits.clear()
        return list(self.drafter.draft(text, k, lambda so_far: len(so_far) < k).tokens)

    def verify(self, text: list[int], draft: list[int]) -> None:
        self.target.forward([*text[len(self.target.tokens) :], *draft], 1 + len(draft))

    def close(self) -> None:
        self.head.close()
        self.target.close()


def check_rounds(
    target: LlamaModel,
    head: HeadModel,
    k: int,
    reference: Callable[[list[int]], list[np.ndarray]],
    *,
    lag: int | None = 1,
) -> None:
    """Compare k draft tokens with `reference` after rounds in which any number of them was accepted.

    `lag`: how many tokens the drafter then evaluates in addition to those accepted; None: only one at all.
    """
    rounds, text, random = Rounds(target, head), random_text(45), np.random.default_rng(k)
    rounds.target.forward(text[:-1])
    for i in range(20):
        draft = rounds.draft(text, k)
        expected = reference(text)
        for ours, theirs in zip(rounds.logits, expected, strict=False):
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
        assert draft == [int(row.argmax()) for row in expected]
        accepted = i % (k + 1)
        rounds.verify(text, draft)
        text = [*text, *draft[:accepted], int(random.integers(0, 256))]
        rounds.target.rollback(len(text) - 1)
        assert rounds.drafter.lag(text) == (1 if lag is None else accepted + lag)
    rounds.close()


def greedy(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, length: int
) -> tuple[GenerationStats, GenerationStats]:
    """Answers of an engine without drafts, and with drafts of `length` in every round.

    What the planner decides must give the same text, too.
    """
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    monkeypatch.setattr("edgespec.app.engine.calibration.save", lambda *_: None)

    def answered(**options: Any) -> GenerationStats:
        engine.forget()
        answer = engine.generate(Request(list(b"some text to begin with"), max_tokens=80, **options))
        assert list(answer)
        return answer.stats

    with open_engine(*paths, suffix=False, mode="performance", options=OPTIONS) as engine:
        plain = answered(speculate=False)
        assert answered().tokens == plain.tokens
        return plain, answered(controller=lambda chain: FixedLength(length, chain))


def check_restored(target: LlamaModel, head: HeadModel) -> None:
    """A text that was restored is read from its first known row, not with rows of the text before."""
    rounds, text = Rounds(target, head), random_text(45)
    rounds.target.forward(text[:-1])
    rounds.draft(text, 2)
    state, other = rounds.target.state(), random_text(40, seed=3)
    rounds.target.rollback(0)
    rounds.target.forward(other[:-1])
    rounds.draft(other, 2)
    rounds.target.rollback(0)
    assert rounds.target.restore(text[:-1], state)
    assert rounds.drafter.lag(text) == 1
    rounds.verify(text, [1, 2, 3])
    text = [*text, 1, 2, 3, 4]
    assert rounds.drafter.lag(text) == 4
    assert len(rounds.draft(text, 2)) == 2
    assert rounds.head.start == 45
    rounds.close()
