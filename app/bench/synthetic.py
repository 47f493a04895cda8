"""Drafts that agree with the target at planted rates: what a draft model would gain, without its weights.

The draft model's passes are evaluated, and cost what they cost; only their logits are replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgespec.app.bench.measure import Pair, Prompt, answer_tokens, report
from edgespec.app.engine.engine import Engine
from edgespec.core import EdgespecError, Logits
from edgespec.models.runtime import Model
from edgespec.sampling import Sampling

_LEAST = 0.01  # confidence in a token beyond the rates: it is not drafted


def read_rates(text: str) -> tuple[float, ...]:
    """Parse rates by position, "0.7,0.5,0.35": the share of drafts whose first 1, 2, 3 tokens are accepted.

    They mean what llama.cpp's synthetic acceptance rates mean. Raises EdgespecError.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(1.0 >= a >= b > 0.0 for a, b in zip((1.0, *rates), rates, strict=False)):
        raise EdgespecError(f"--synthetic {text!r} is not a list of falling rates: write 0.7,0.5,0.35")
    return rates


class PlantedDrafts:
    """A draft model's sequence whose logits name the tokens of a known text, as often as `rates` say.

    Everything else is the sequence's own.
    """

    def __init__(self, sequence: Any, rates: Sequence[float], seed: int = 0) -> None:
        self._sequence = sequence
        # Of each token, if all before it are accepted.
        self._rates = [b / a for a, b in zip((1.0, *rates), rates, strict=False)]
        self._random = np.random.default_rng(seed)
        self._text: Sequence[int] = ()
        self._row: Logits = np.zeros((1, sequence.vocab_size), np.float32)
        self._drafted = 0

    def plant(self, text: Sequence[int]) -> None:
        """Draft for a prompt and its answer, which together are `text`."""
        self._text = text

    @property
    def start(self) -> int:
        """See HeadSequence."""
        start: int = self._sequence.start
        return start

    @start.setter
    def start(self, value: int) -> None:
        self._sequence.start = value

    def forget_guesses(self) -> None:
        self._drafted = 0
        self._sequence.forget_guesses()

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        self._sequence.forward(new, last)
        position = self.start + len(self._sequence.tokens)
        rate = self._rates[self._drafted] if self._drafted < len(self._rates) else _LEAST
        self._drafted += 1
        token = self._text[position] if position < len(self._text) else 0
        if self._random.random() >= rate:
            token = (token + 1) % self._row.shape[1]
        rate = min(rate, 1.0 - 1e-6)
        self._row[:] = 0.0
        self._row[0, token] = math.log(rate * (self._row.shape[1] - 1) / (1.0 - rate))
        return np.broadcast_to(self._row, (last, self._row.shape[1]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sequence, name)


class PlantedAnswers:
    """Lets a model answer with a known text, at the cost of its own passes.

    Several rows are rounded differently from one. Models of random weights have many tokens that are nearly
    as likely as the best, so that their own text would soon be another than the one that is drafted.
    """

    def __init__(self, model: Model) -> None:
        self._forward = model.forward
        self.text: Sequence[int] = ()

    def forward(self, requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Logits]:
        answers = self._forward(requests)
        for (sequence, _, last), rows in zip(requests, answers, strict=True):
            first = len(sequence.tokens) - last + 1
            for row, token in zip(rows, self.text[first : first + last], strict=False):
                row[token] = row.max() + 1.0
        return answers


def measure_synthetic(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_tokens: int,
    rates: Sequence[float],
    progress: Callable[[str], None] | None = None,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Answer every prompt plainly and with planted drafts, `repetitions` times, and return the report.

    Raises EdgespecError if the engine has no layer for multi-token prediction.
    """
    slot = engine.pool.slots[0]
    if getattr(slot.drafting, "block_size", 0) != 1:
        raise EdgespecError(
            "--synthetic replaces the drafts of a prediction layer: choose a model that has one"
        )
    planted, answers = PlantedDrafts(slot.drafting, rates), PlantedAnswers(engine.model)
    slot.drafting = planted
    engine.model.forward = answers.forward  # type: ignore[method-assign]
    pairs = []
    for turn in range(repetitions):
        for i, prompt in enumerate(prompts):
            if progress:
                progress(f"{turn * len(prompts) + i + 1} of {repetitions * len(prompts)}: {prompt.task}")
            tokens = engine.chat_prompt([{"role": "user", "content": prompt.text}])
            answers.text = ()
            plain = answer_tokens(engine, tokens, max_tokens, Sampling(), speculate=False)
            answers.text = [*tokens, *plain.tokens]
            planted.plant(answers.text)
            fast = answer_tokens(engine, tokens, max_tokens, Sampling(), speculate=True)
            if i % 2:  # the machine may become slower in the meantime
                plain = answer_tokens(engine, tokens, max_tokens, Sampling(), speculate=False)
            pairs.append(Pair(prompt, plain, fast))
    return report(engine, pairs, greedy=True)
