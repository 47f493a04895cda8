"""Scripted models and drafters for tests without weights, shipped with the contracts that they implement."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from edgespec.core import Draft, Logits

Script = Callable[[Sequence[int]], Sequence[float]]
"""The logits that follow a sequence of tokens."""


class ScriptedModel:
    """A LanguageModel whose logits are a function of all previous tokens; records every call."""

    def __init__(self, script: Script, capacity: int = 1 << 20) -> None:
        self._script = script
        self._tokens: list[int] = []
        self._capacity = capacity
        self.vocab_size = len(script(()))
        self.evaluated: list[tuple[int, int]] = []  # (new tokens, rows of logits) of every forward

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        if not 1 <= last <= len(new) or len(self._tokens) + len(new) > self._capacity:
            raise ValueError("new tokens must fit the cache, and rows must be at most as many")
        self.evaluated.append((len(new), last))
        self._tokens.extend(new)
        n = len(self._tokens)
        rows = [self._script(self._tokens[:i]) for i in range(n - last + 1, n + 1)]
        return np.array(rows, np.float32)

    def rollback(self, length: int) -> None:
        del self._tokens[length:]


def noise_script(vocab_size: int, seed: int = 0, memory: int = 3, scale: float = 3.0) -> Script:
    """Return a script of random logits that are always the same for the same last `memory` tokens."""

    def script(context: Sequence[int]) -> Sequence[float]:
        state = random.Random(hash((seed, *context[-memory:])))
        return [state.gauss(0.0, scale) for _ in range(vocab_size)]

    return script


class ScriptedDrafter:
    """A Drafter that proposes what a function returns, cut to the limit."""

    def __init__(self, draft: Callable[[Sequence[int], int], Sequence[int]]) -> None:
        self._draft = draft

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        tokens = tuple(self._draft(context, limit))[:limit]
        return Draft(tokens, (1.0,) * len(tokens), ("scripted",) * len(tokens))
