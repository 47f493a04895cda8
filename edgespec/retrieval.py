"""Drafting by repetition: tokens that followed earlier occurrences of the context's end, in microseconds."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from edgespec.core import Draft, Drafter, common_prefix
from edgespec.corpus import Corpus

SUFFIX, CORPUS = "suffix", "corpus"
_CHAIN = 6


class MatchStep(NamedTuple):
    """A draft token: after a match of `match` tokens it followed in this `share` of the occurrences."""

    token: int
    match: int
    share: float


class SuffixAutomaton:
    """All substrings of a growing token sequence, O(1) amortized per token (Blumer et al. 1985).

    A state whose substrings occur again counts the tokens that followed, so that the most frequent
    continuation is known with its share. Only the longest few suffixes of each position count: the whole
    chain would not be O(1), and drafts come from the longest.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._end: list[int] = [0]  # where the first occurrence of the state's substrings ends (exclusive)
        # Counts of the tokens that followed, the latest last; None before a second occurrence.
        self._follow: list[dict[int, int] | None] = [None]
        self._last = 0

    def append(self, token: int) -> None:
        """Append `token` to the sequence."""
        for state in self.matches():
            follow = self._follow[state]
            if follow is None:
                follow = self._follow[state] = {self.tokens[self._end[state]]: 1}
            follow[token] = follow.pop(token, 0) + 1
        self.tokens.append(token)
        position = len(self.tokens)
        state = self._state(position, {}, 0, position, None)
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

    def matches(self) -> Iterator[int]:
        """Yield the states of the longest suffixes that occurred before, longest first."""
        state = self._link[self._last]
        for _ in range(_CHAIN):
            if state <= 0:
                return
            yield state
            state = self._link[state]

    def walk(self, drafted: Sequence[int] = ()) -> Iterator[MatchStep]:
        """Yield the most likely tokens after the text and `drafted`, as long as there is a match."""
        state = self._link[self._last]
        match = self._length[state] if state > 0 else 0
        for token in drafted:
            state, match = self._step(state, match, token)
        while True:
            while state > 0 and self._end[state] == len(self.tokens):
                # Its only occurrence is the end of the text: the continuation of a shorter one repeats the
                # pattern.
                state = self._link[state]
                match = self._length[state]
            if state <= 0:
                return
            follow = self._follow[state]
            if follow is None:
                token, share = self.tokens[self._end[state]], 1.0
            else:
                token = max(reversed(follow), key=follow.__getitem__)  # of equals, the latest
                share = follow[token] / sum(follow.values())
            yield MatchStep(token, match, share)
            state, match = self._next[state][token], match + 1

    def _step(self, state: int, match: int, token: int) -> tuple[int, int]:
        """Return the state of the longest known suffix of the `match` tokens at `state` and `token`."""
        while state > 0 and token not in self._next[state]:
            state = self._link[state]
            match = self._length[state]
        if state < 0 or token not in self._next[state]:
            return 0, 0
        return self._next[state][token], match + 1

    def _state(
        self, length: int, edges: dict[int, int], link: int, end: int, follow: dict[int, int] | None
    ) -> int:
        self._next.append(edges)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        self._follow.append(follow)
        return len(self._link) - 1

    def _split(self, p: int, q: int, token: int) -> int:
        """Give the part of state q that is reached from p a state of its own."""
        follow = self._follow[q]
        clone = self._state(
            self._length[p] + 1, self._next[q].copy(), self._link[q], self._end[q], follow and follow.copy()
        )
        while p >= 0 and self._next[p].get(token) == q:
            self._next[p][token] = clone
            p = self._link[p]
        self._link[q] = clone
        return clone


class SuffixDrafter(Drafter):
    """Drafts the most frequent continuation of the longest earlier occurrence of the context's end.

    `confidence` is how often such tokens are accepted in general: by the length of the match, and by how
    often and how uniformly it was continued before.
    """

    def __init__(self) -> None:
        self._automaton = SuffixAutomaton()

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        self.read(context)
        return self.extend((), limit)

    def read(self, context: Sequence[int]) -> None:
        """Append the new tokens of `context`. Edits are rare: after one, all is added from scratch."""
        known = self._automaton.tokens
        if len(known) > len(context) or common_prefix(known, context) < len(known):
            self._automaton = SuffixAutomaton()
            known = self._automaton.tokens
        for token in context[len(known) :]:
            self._automaton.append(token)

    def extend(self, drafted: Sequence[int], limit: int) -> Draft:
        return _draft(itertools.islice(self._automaton.walk(drafted), max(limit, 0)), SUFFIX)


class CorpusDrafter(Drafter):
    """Drafts the most frequent continuation of the context's end in a corpus of the user's texts."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        found = self._corpus.continuation(context, limit)
        shares = zip(found.tokens, found.probabilities, strict=True)
        return _draft(
            (MatchStep(token, found.match_length + i, share) for i, (token, share) in enumerate(shares)),
            CORPUS,
        )


def _draft(steps: Iterable[MatchStep], source: str) -> Draft:
    steps = list(steps)
    tokens = tuple(step.token for step in steps)
    return Draft(tokens, tuple(map(_confidence, steps)), (source,) * len(tokens))


# How often the token after a match of n tokens was accepted in the answers of a 1.5B model to 100 prompts of
# eight kinds (docs/experiments.md). A prior: each machine counts for itself.
_ACCEPTED = (
    (1, 0.28), (2, 0.53), (3, 0.64), (4, 0.74), (6, 0.79), (8, 0.88), (12, 0.92), (16, 0.97), (24, 0.985),
)  # fmt: skip


def _confidence(step: MatchStep) -> float:
    at = bisect_right(_ACCEPTED, (step.match, 1.0)) - 1
    return _ACCEPTED[at][1] * float(step.share**1.5)
