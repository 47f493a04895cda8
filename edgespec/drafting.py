"""Where guesses come from: repeated text, and a small model. None of them can change the output."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgespec.core import Distribution, Draft, Drafter, LanguageModel
from edgespec.sampling import Sampler, Sampling, token_logprob


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens `a` and `b` share."""
    n = min(len(a), len(b))
    step = 1024
    for start in range(0, n, step):
        stop = min(start + step, n)
        if list(a[start:stop]) != list(b[start:stop]):
            return next(i for i in range(start, stop) if a[i] != b[i])
    return n


class NoDrafter:
    """Plain decoding."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        return Draft()


class SuffixAutomaton:
    """All substrings of a growing token sequence, O(1) amortised a token (Blumer et al. 1985).

    After each `append` it knows the longest suffix of the sequence that occurred before, and where.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._end: list[int] = [0]  # an end position (exclusive) of the state's substrings, the latest noted
        self._last = 0
        self.match_length = 0
        self.match_end = 0

    def append(self, token: int) -> None:
        """Extend the sequence, and find the longest earlier occurrence of its end."""
        self.tokens.append(token)
        position = len(self.tokens)
        state = self._state(position, {}, 0, position)
        p = self._last
        while p >= 0 and token not in self._next[p]:
            self._next[p][token] = state
            p = self._link[p]
        if p >= 0:
            q = self._next[p][token]
            if self._length[q] != self._length[p] + 1:
                q = self._split(p, q, token)
            self._link[state] = q
        self._last = state
        self._note_match(position)

    def _state(self, length: int, edges: dict[int, int], link: int, end: int) -> int:
        self._next.append(edges)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1

    def _split(self, p: int, q: int, token: int) -> int:
        """The part of state q that is reached from p gets a state of its own."""
        clone = self._state(self._length[p] + 1, self._next[q].copy(), self._link[q], self._end[q])
        while p >= 0 and self._next[p].get(token) == q:
            self._next[p][token] = clone
            p = self._link[p]
        self._link[q] = clone
        return clone

    def _note_match(self, position: int) -> None:
        match = self._link[self._last]
        self.match_length, self.match_end = self._length[match], self._end[match]
        # The latest occurrence predicts best. Noting it along the whole chain of suffixes would not be O(1);
        # the few longest are the ones that are matched next.
        for _ in range(8):
            if match <= 0:
                break
            self._end[match] = position
            match = self._link[match]


class SuffixDrafter:
    """Drafts what followed the longest earlier occurrence of the context's end.

    Costs microseconds. `confidence` is a prior by match length; calibration is the controller's business.
    """

    def __init__(self, min_match: int = 6) -> None:
        self._min_match = min_match
        self._automaton = SuffixAutomaton()

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        known = self._automaton.tokens
        if len(known) > len(context) or common_prefix(known, context) < len(known):
            self._automaton = (
                SuffixAutomaton()
            )  # an edited context is rare, removing from an automaton costly
            known = self._automaton.tokens
        for token in context[len(known) :]:
            self._automaton.append(token)
        length, end = self._automaton.match_length, self._automaton.match_end
        if length < self._min_match:
            return Draft()
        # What a match of n tokens is worth grows with n; a longer guess than the match rarely holds.
        tokens = tuple(known[end : end + min(limit, max(2, length))]) if limit > 0 else ()
        return Draft(tokens, (length / (length + 2.0),) * len(tokens), source="suffix")


class ModelDrafter:
    """Drafts with a small model that has a cache of its own and catches up when it is asked.

    With `settings` of temperature 0 the draft is the model's greedy continuation, a point mass. Otherwise
    each token is sampled from q, the model's distribution under `settings`, and q comes with the draft.
    The draft ends before a token whose best guess is less likely than `min_confidence`: that decision sees q
    and never the token drawn from it, which would bias the ratio rule.
    """

    def __init__(
        self,
        model: LanguageModel,
        capacity: int,
        settings: Sampling | None = None,
        min_confidence: float = 0.4,
    ) -> None:
        self._model = model
        self._capacity = capacity
        self._settings = settings or Sampling()
        self._sampler = Sampler(self._settings)
        self._min_confidence = min_confidence

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        limit = min(limit, self._capacity - len(context))
        if limit <= 0:
            return Draft()
        model = self._model
        model.rollback(min(common_prefix(model.tokens, context), len(context) - 1))
        new: Sequence[int] = context[len(model.tokens) :]
        tokens: list[int] = []
        confidence: list[float] = []
        probs: list[Distribution] = []
        while len(tokens) < limit:
            row = model.forward(new)[0]
            best = int(row.argmax())
            sure = math.exp(token_logprob(row, best, 0).logprob)
            if sure < self._min_confidence:
                break
            q = self._sampler.distribution(row)
            token = q.sample(self._sampler.uniform())
            tokens.append(token)
            confidence.append(sure)
            probs.append(q)
            new = (token,)
        sampled = self._settings.temperature > 0
        return Draft(tuple(tokens), tuple(confidence), tuple(probs) if sampled else None, "model")


class FirstOf:
    """Asks each drafter in turn, the cheapest first, and takes the first guess."""

    def __init__(self, *drafters: Drafter) -> None:
        self._drafters = drafters

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        for drafter in self._drafters:
            draft = drafter.propose(context, limit)
            if draft.tokens:
                return draft
        return Draft()
