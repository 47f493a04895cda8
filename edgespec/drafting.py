"""Guessing with a small model. Nothing here can change the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgespec.core import Distribution, Draft, LanguageModel, common_prefix
from edgespec.sampling import Sampler, Sampling, token_logprob

MODEL = "model"


class ModelDrafter:
    """Drafts with a small model that has a cache of its own and catches up when it is asked.

    With `settings` of temperature 0 the draft is the model's greedy continuation, a point mass. Otherwise
    each token is sampled from q, the model's distribution under `settings`, and q comes with the draft.

    It need not have read everything: when more than `window` tokens are new to it, it starts afresh with the
    last `window`. What it guesses is checked anyway, and reading costs as much as guessing. `capacity` is how
    many tokens its cache holds.
    """

    def __init__(
        self,
        model: LanguageModel,
        capacity: int,
        settings: Sampling | None = None,
        window: int = 256,
        is_end: Callable[[int], bool] | None = None,
    ) -> None:
        self._model = model
        self._capacity = capacity
        self._settings = settings or Sampling()
        self._sampler = Sampler(self._settings)
        self._window = max(1, min(window, capacity // 2))
        self._is_end = is_end or (lambda _token: False)
        self._start = 0  # where in the text the model's cache begins

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        return self.draft(context, limit, lambda _confidence: True)

    def lag(self, context: Sequence[int]) -> int:
        """How many tokens it would have to read before its first guess after `context`, at least one."""
        start, held = self._view(context)
        return len(context) - start - held

    def draft(self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool]) -> Draft:
        """At most `limit` tokens after `context`, as long as `more(confidence of those so far)` says so.

        `more` sees how sure the model was, never what was drawn: a decision that saw the token and dropped
        it would bias the ratio rule.
        """
        self._start, held = self._view(context)
        self._model.rollback(held)
        new = context[self._start + len(self._model.tokens) :]
        limit = min(limit, self._capacity - (len(context) - self._start))
        tokens: list[int] = []
        confidence: list[float] = []
        probs: list[Distribution] = []
        while len(tokens) < limit and more(confidence):
            row = self._model.forward(new)[0]
            best = int(row.argmax())
            q = self._sampler.distribution(row)
            token = q.sample(self._sampler.uniform())
            tokens.append(token)
            confidence.append(math.exp(token_logprob(row, best, 0).logprob))
            probs.append(q)
            if self._is_end(token):
                break
            new = (token,)
        sampled = self._settings.temperature > 0
        return Draft(
            tuple(tokens), tuple(confidence), (MODEL,) * len(tokens), tuple(probs) if sampled else None
        )

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        """Where in `context` its cache is to begin, and how many tokens from there it holds already."""
        view = context[self._start :]
        held = min(common_prefix(self._model.tokens, view), len(view) - 1)
        if held < 0 or len(view) - held > self._window or len(view) >= self._capacity:
            return max(0, len(context) - self._window), 0
        return self._start, held
