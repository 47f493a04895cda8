"""Guessing under a grammar: what it forces is certain, and what it refuses is not worth a row.

Where all texts go on alike for a few characters, but tokens may reach further, the tokens that spell just
these are a guess, and nearly always right: ` "` before a string, where the model could write ` "A`, too.

The sampler draws from the target's distribution under the mask, where a forced token is a point mass: it
stands whatever the logits are, and drafting it costs a row of a batch instead of a pass of its own.

The output is the target's under the mask, whatever is drafted. Cutting a draft where the grammar refuses it
changes nothing if the refused token was a point mass: p(token) is 0, so what would replace it is p itself. A
token *sampled* from q stays: dropped, it would be replaced from p, where the ratio rule replaces it from
max(0, p - q), and that only for the tokens that the grammar refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

from edgespec.core import Constraint, Controller, Done, Draft, DraftCandidate, Round
from edgespec.costs import CostCurve

GRAMMAR = "grammar"
_SPELLED = 0.9  # 194 of 223 stood (docs/experiments.md)
_KEPT = 0.9  # of what is known of guesses where a value begins, when another was made
_PRIOR = 16.0  # tokens at the plain rate that the text's own rate starts from


def until_finished(constraint: Constraint, done: Done) -> Done:
    """`done`, and the end of a text that `constraint` calls finished: no pass is spent on its end token.

    `constraint` has accepted each token before `done` hears of it, as a Sampler's has.
    """

    def ended(token: int) -> bool:
        return done(token) or constraint.finished

    return ended


class GrammarDrafter:
    """A Controller around another: what the grammar tells, the other's guess, what it tells after that.

    `constraint` is the sampler's own, so that before each round it stands where the context ends. `costs`
    gives the curve of the target's passes now; it is the one that `controller` plans and learns with.
    """

    def __init__(
        self, controller: Controller, constraint: Constraint, costs: Callable[[], CostCurve]
    ) -> None:
        self._controller = controller
        self._constraint = constraint
        self._costs = costs
        self._written = self._spent = 0.0
        self._length = self._texts = self._beside = 0
        self._first: tuple[int, ...] = ()  # guessed where a value begins
        self._hits, self._seen = 1.0, 2.0  # of such guesses
        self._lead = 0  # tokens that the draft begins with and the other controller took for context
        self._guess = Draft()  # its part of the draft

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        costs = self._costs()
        limit = min(limit, costs.largest - self._beside - 1)
        self._begin(context)
        if limit < 1:
            return Draft()
        lead, spelled = self._structure(limit)
        given, guess = len(lead.tokens), Draft()
        if given < limit:
            guess = self._controller.propose(_after(context, lead), limit - given)
        if not costs.size(given + guess.rows - guess.padding, limit + 1, self._beside):
            guess = Draft()
        guess, more, whole = self._checked(lead, guess, limit, of_value=spelled)
        if whole and not given and not more.tokens:
            return guess
        draft = lead.followed_by(guess).followed_by(more)
        least = given + len(guess.tokens) if guess.tokens else 0
        kept, rows = self._best(draft, least, limit + 1, costs)
        return draft.cut(kept, max(0, rows - kept - 1))

    def offer(self, context: Sequence[int], limit: int) -> DraftCandidate:
        self._begin(context)
        if limit < 1:
            return DraftCandidate()
        lead, spelled = self._structure(limit)
        given, found = len(lead.tokens), DraftCandidate()
        if given < limit:
            found = self._controller.offer(_after(context, lead), limit - given)
        guess, more, _ = self._checked(lead, found.draft, limit, of_value=spelled)
        return DraftCandidate(
            lead.followed_by(guess).followed_by(more),
            lead.confidence + found.chances[: len(guess.tokens)] + more.confidence,
            given + min(found.least, len(guess.tokens)) if found.least else 0,
        )

    def beside(self, texts: int, rows: int) -> None:
        self._texts, self._beside = texts, rows
        self._controller.beside(texts, rows)

    def observe(self, round_: Round) -> None:
        self._written += len(round_.tokens) + round_.beside_tokens
        self._spent += round_.seconds
        drafted = len(round_.draft.tokens)
        lead = min(self._lead, drafted)
        if not lead:
            self._controller.observe(round_)
            return
        costs = self._costs()
        if round_.beside_rows is not None:
            costs.observe(round_.draft.rows + round_.beside_rows, self._length, round_.waiting)
        if round_.accepted < self._lead:
            return
        if self._first:
            self._hits = _KEPT * self._hits + (self._first == round_.tokens[lead : lead + 1])
            self._seen = _KEPT * self._seen + 1.0
        # As if what the grammar told had been part of the context, and the pass as long as one without it.
        guess = self._guess.cut(min(len(self._guess.tokens), drafted - lead))
        accepted = min(round_.accepted - lead, len(guess.tokens))
        rows = costs.size(len(guess.tokens) + 1, costs.largest - self._beside, self._beside)
        guess = guess.cut(len(guess.tokens), max(0, rows - len(guess.tokens) - 1))
        waiting = costs.seconds(guess.rows + (round_.beside_rows or 0), self._length + lead)
        self._controller.observe(
            replace(
                round_,
                tokens=round_.tokens[lead : lead + accepted + 1],
                draft=guess,
                accepted=accepted,
                seconds=round_.seconds - round_.waiting + waiting,
                waiting=waiting,
            )
        )

    def _begin(self, context: Sequence[int]) -> None:
        self._length, self._lead, self._guess, self._first = len(context), 0, Draft(), ()

    def _structure(self, limit: int, after: tuple[int, ...] = ()) -> tuple[Draft, bool]:
        """At most `limit` tokens that the grammar alone tells after the context and `after`.

        And whether the last of them is spelled and not forced, so that a value begins behind it.
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

    def _checked(self, lead: Draft, guess: Draft, limit: int, *, of_value: bool) -> tuple[Draft, Draft, bool]:
        """`guess` as far as it may follow `lead`, what the grammar tells after it, and if it is whole."""
        guess, whole = self._admitted(lead.tokens, guess)
        self._first = guess.tokens[:1] if of_value else ()
        if self._first and 2.0 * self._hits < self._seen:
            guess = Draft()  # what came after this key before says little of what comes now
        self._lead, self._guess = len(lead.tokens), guess
        tokens = lead.tokens + guess.tokens
        more = self._structure(limit - len(tokens), tokens)[0] if whole and guess.tokens else Draft()
        return guess, more, whole

    def _admitted(self, lead: tuple[int, ...], guess: Draft) -> tuple[Draft, bool]:
        """`guess` as far as it may be drafted after `lead`, and whether the grammar admits all of it."""
        n = self._constraint.admits(lead + guess.tokens) - len(lead)
        if n == len(guess.tokens):
            return guess, True
        if guess.probs is not None and len(guess.probs[n].ids) > 1:
            n += 1
        return guess.cut(n), False

    def _best(self, draft: Draft, least: int, most: int, costs: CostCurve) -> tuple[int, int]:
        """How many tokens of `draft`, at least `least`, and rows, at most `most`, bring most."""
        plain = costs.seconds(1 + self._texts, self._length) / (1 + self._texts)
        rate = max(1.0 / plain, (_PRIOR + self._written) / (_PRIOR * plain + self._spent))
        expected = list(accumulate(accumulate(draft.confidence, mul), initial=1.0))
        plans = (
            (expected[k] - rate * costs.seconds(rows + self._beside, self._length), k, rows)
            for k in range(least, len(expected))
            if (rows := costs.size(k + 1, most, self._beside))
        )
        _, kept, rows = max(plans, default=(0.0, 0, 1))
        return kept, rows


def _after(context: Sequence[int], lead: Draft) -> Sequence[int]:
    return [*context, *lead.tokens] if lead.tokens else context
