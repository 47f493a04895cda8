"""Drafting under a grammar: tokens that it forces are certain, and tokens that it refuses are not drafted.

Where all texts continue alike for a few characters, but tokens may reach further, the tokens that spell only
these are drafted, and nearly always accepted: ` "` before a string, where the model could also generate
` "A`.

The sampler samples from the target's distribution under the mask, where a forced token is a point mass: it is
accepted for any logits, and drafting it costs a row of a batch instead of a pass of its own.

The output is the target's under the mask, for any draft. Cutting a draft where the grammar refuses it changes
nothing if the refused token was a point mass: p(token) is 0, so its replacement comes from p itself. A token
*sampled* from q is kept: dropped, it would be replaced from p, where the ratio rule replaces it from
max(0, p - q), and that only for the tokens that the grammar refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgespec.core import Constraint, Done, Draft

GRAMMAR = "grammar"
_SPELLED = 0.9  # 194 of 223 were accepted (docs/experiments.md)
_KEPT = 0.9  # decay of those counts with each draft where a value begins
_HITS, _SEEN = 1.2, 2.0  # accepted and all drafts where a value begins: the prior, to which counts return


def until_finished(constraint: Constraint, done: Done) -> Done:
    """Return `done` that is also true once `constraint` is finished: no pass is spent on the end token.

    `constraint` has accepted each token before `done` gets it, as a Sampler's has.
    """

    def ended(token: int) -> bool:
        return done(token) or constraint.finished

    return ended


class GrammarDrafter:
    """The first of a chain: drafts what the grammar forces, and completes the drafts of the others.

    `constraint` is the sampler's own, so that before each round it has accepted the whole context.
    """

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._hits, self._seen = _HITS, _SEEN  # first tokens of values, drafted by others, that were accepted
        self._at_value = False  # after the lead a value begins
        self._first: tuple[int, ...] = ()  # drafted there

    @property
    def trusts_values(self) -> bool:
        """Whether others' drafts are worth verifying: not where a value begins and they were often wrong."""
        return not self._at_value or 2.0 * self._hits >= self._seen

    def lead(self, limit: int) -> Draft:
        """Return at most `limit` tokens that follow the context by the grammar alone."""
        found, self._at_value = self._forced(limit)
        self._first = ()
        return found

    def completed(self, lead: Draft, draft: Draft, limit: int) -> Draft:
        """Return `lead`, the allowed part of `draft`, and what the grammar forces after all of `draft`."""
        draft, whole = self._admitted(lead.tokens, draft)
        self._first = draft.tokens[:1] if self._at_value else ()
        if not draft.tokens or not self.trusts_values:
            return lead
        both = lead.followed_by(draft) if lead.tokens else draft
        return both.followed_by(self._forced(limit - len(both.tokens), both.tokens)[0]) if whole else both

    def observe(self, tokens: Sequence[int]) -> None:
        """Record that `tokens` followed the lead, all of which was accepted."""
        if self._first:
            self._hits = _KEPT * self._hits + (self._first == tuple(tokens[:1]))
            self._seen = _KEPT * self._seen + 1.0
        elif self._at_value:  # else the others would never be used here again
            self._hits += (1.0 - _KEPT) * (_HITS - self._hits)
            self._seen += (1.0 - _KEPT) * (_SEEN - self._seen)

    def _forced(self, limit: int, after: tuple[int, ...] = ()) -> tuple[Draft, bool]:
        """Return at most `limit` tokens that follow the context and `after` by the grammar alone.

        And whether the last of them is spelled and not forced, so that a value begins after it.
        """
        found, spelled = Draft(), False
        while (room := limit - len(found.tokens)) > 0:
            tokens, confidence = self._constraint.forced(room, after + found.tokens), 1.0
            if not tokens:
                tokens, confidence = self._constraint.spelled(after + found.tokens)[:room], _SPELLED
            if not tokens:
                break
            n, spelled = len(tokens), confidence < 1.0
            found = found.followed_by(Draft(tokens, (confidence,) * n, (GRAMMAR,) * n))
        return found, spelled

    def _admitted(self, lead: tuple[int, ...], draft: Draft) -> tuple[Draft, bool]:
        """Return the part of `draft` allowed after `lead`, and whether the grammar admits all of it."""
        n = self._constraint.admits(lead + draft.tokens) - len(lead)
        if n == len(draft.tokens):
            return draft, True
        if draft.probs is not None and len(draft.probs[n].ids) > 1:
            n += 1
        return draft.cut(n), False
