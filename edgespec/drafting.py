"""Drafting with a draft model. Nothing here can change the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from threading import Event, Thread

from edgespec.core import (
    Cancelled,
    Distribution,
    Draft,
    EdgespecError,
    LanguageModel,
    Logits,
    common_prefix,
)
from edgespec.costs import CostCurve
from edgespec.sampling import Sampler, Sampling, token_logprob

MODEL = "model"
WINDOW = 64  # with 256, an eighth more was accepted on long prompts, and the prefill costs four times as much
_COMPARED = 32  # rows at most


class ModelDrafter:
    """Drafts with a small model that has a cache of its own and evaluates the new context when it is called.

    With `settings` of temperature 0 the draft is the model's greedy continuation, a point mass. Otherwise
    each token is sampled from q, the model's distribution under `settings`, and q comes with the draft.

    It need not evaluate everything: when more than `window` tokens are new to it, it starts from scratch with
    the last `window`. Its tokens are verified anyway, and a prefill costs as much as drafting. `capacity` is
    the number of tokens that its cache holds. `agreed` compares its own choice with the target's tokens in
    its last prefill of several, at no cost: (equal, compared).

    `begin_ahead` lets it continue while the target verifies, where both have a processor of their own.
    """

    source = MODEL
    block_size = 1

    def __init__(
        self,
        model: LanguageModel,
        capacity: int,
        settings: Sampling | None = None,
        window: int = WINDOW,
        is_end: Callable[[int], bool] | None = None,
        costs: CostCurve | None = None,
    ) -> None:
        """`costs`: seconds of its forward passes, by default one second each."""
        self.costs = costs or CostCurve({1: 1.0})
        self._model = model
        self._capacity = capacity
        self._settings = settings or Sampling()
        self._sampler = Sampler(self._settings)
        self._window = max(1, min(window, capacity // 2))
        self._is_end = is_end or (lambda _token: False)
        self._start = 0  # index in the context where the model's cache begins
        self._ahead: Thread | None = None
        self._stop = Event()
        self.agreed = 0, 0
        self._rows: dict[int, Logits] = {}  # known logits, by the number of tokens before them

    def lag(self, context: Sequence[int]) -> int:
        """Return how many tokens it would have to evaluate before its first draft token, at least one."""
        self.stop_ahead()
        start, held = self._view(context)
        return len(context) - start - held

    def reads_whole(self, context: Sequence[int]) -> bool:
        """Whether its cache begins, or would begin, where `context` does."""
        return self._view(context)[0] == 0

    def draft(
        self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool], own: int = 0
    ) -> Draft:
        """Return at most `limit` tokens after `context`, while `more(confidence of those so far)` is true.

        The last `own` tokens of `context` are the target's.

        `more` gets the model's confidence, never the token: a decision that saw the token and dropped it
        would bias the ratio rule.
        """
        self.stop_ahead()
        self._start, same = self._view(context)
        text = list(context[self._start :])
        if self._rows:
            same = common_prefix(self._model.tokens, text)
        limit = min(limit, self._capacity - len(text))
        tokens: list[int] = []
        confidence: list[float] = []
        probs: list[Distribution] = []
        while len(tokens) < limit and more(confidence):
            row = self._rows.get(len(text)) if same == len(text) else None
            if row is None:
                row = self._read(text, same, own)
            best = int(row.argmax())
            q = self._sampler.distribution(row)
            token = q.sample(self._sampler.uniform())
            tokens.append(token)
            confidence.append(math.exp(token_logprob(row, best, 0).logprob))
            probs.append(q)
            if self._is_end(token):
                break
            held = self._model.tokens
            same = len(text) + (len(held) > len(text) and held[len(text)] == token)
            text.append(token)
        if not self._rows:
            self._model.rollback(same)
        sampled = self._settings.temperature > 0
        return Draft(
            tuple(tokens), tuple(confidence), (self.source,) * len(tokens), tuple(probs) if sampled else None
        )

    def begin_ahead(self, text: Sequence[int], most: int) -> None:
        """Continue after `text` in a thread, by at most `most` tokens, as if the target accepted them all.

        Until `stop_ahead` no other caller may use the model.
        """
        self.stop_ahead()
        self._start, _ = self._view(text)
        view = list(text[self._start :])
        most = min(most, self._capacity - len(view))
        if most < 1:
            return
        self._stop.clear()
        self._ahead = Thread(target=self._go_ahead, args=(view, most), name="edgespec-ahead", daemon=True)
        self._ahead.start()

    def stop_ahead(self) -> None:
        """Stop the thread, which takes at most one pass of the model. Its logits are kept."""
        if self._ahead is not None:
            self._stop.set()
            self._ahead.join()
            self._ahead = None

    def _go_ahead(self, text: list[int], most: int) -> None:
        same = common_prefix(self._model.tokens, text)
        rows: dict[int, Logits] = {}
        try:
            while len(rows) < most and not self._stop.is_set():
                rows[len(text)] = row = self._read(text, same).copy()
                same = len(text)
                text.append(int(row.argmax()))
        except (Cancelled, EdgespecError):  # the generation was canceled; or the next draft raises it again
            pass
        self._rows = rows

    def _read(self, text: list[int], same: int, own: int = 0) -> Logits:
        """Return the logits [vocab] after `text`, of which the model holds the first `same` tokens."""
        self._rows = {}
        self._model.rollback(min(same, len(text) - 1))
        new = text[len(self._model.tokens) :]
        last = max(1, min(own + 1, len(new), _COMPARED))
        rows = self._model.forward(new, last)
        if last > 1:
            self.agreed = int((rows[:-1].argmax(axis=1) == new[1 - last :]).sum()), last - 1
        row: Logits = rows[-1]
        return row

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        """Return where in `context` its cache is to begin, and how many tokens from there it holds."""
        view = context[self._start :]
        held = min(common_prefix(self._model.tokens, view), len(view) - 1)
        if held < 0 or len(view) - held > self._window or len(view) >= self._capacity:
            return max(0, len(context) - self._window), 0
        return self._start, held
