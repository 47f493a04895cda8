"""Guessing under a grammar: what it forces is certain, and what it refuses is not worth a row.

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

from edgespec.core import Constraint, Controller, Done, Draft, Offer, Round
from edgespec.costs import CostCurve

GRAMMAR = "grammar"
_PRIOR = 16.0  # tokens at the plain rate that the text's own rate starts from


def until_finished(constraint: Constraint, done: Done) -> Done:
    """`done`, and the end of a text that `constraint` calls finished: no pass is spent on its end token.

    `constraint` has accepted each token before `done` hears of it, as a Sampler's has.
    """

    def ended(token: int) -> bool:
        return done(token) or constraint.finished

    return ended


class Constrained:
    """A Controller around another: what is forced, the other's guess, what is forced after that.

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
        self._forced = 0  # tokens that the draft begins with and the other controller took for context
        self._guess = Draft()  # its part of the draft

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        costs = self._costs()
        limit = self._begin(context, min(limit, costs.largest - self._beside - 1))
        if limit < 1:
            return Draft()
        forced = self._constraint.forced(limit)
        guess = Draft()
        if len(forced) < limit:
            guess = self._controller.propose(_after(context, forced), limit - len(forced))
        if not costs.size(len(forced) + guess.rows - guess.padding, limit + 1, self._beside):
            guess = Draft()
        guess, more, whole = self._checked(forced, guess, limit)
        if whole and not forced and not more:
            return guess
        draft = _certain(forced).followed_by(guess).followed_by(_certain(more))
        least = len(forced + guess.tokens) if guess.tokens else 0
        kept, rows = self._best(draft, least, limit + 1, costs)
        return draft.cut(kept, max(0, rows - kept - 1))

    def offer(self, context: Sequence[int], limit: int) -> Offer:
        limit = self._begin(context, limit)
        if limit < 1:
            return Offer()
        forced = self._constraint.forced(limit)
        found = Offer()
        if len(forced) < limit:
            found = self._controller.offer(_after(context, forced), limit - len(forced))
        guess, more, _ = self._checked(forced, found.draft, limit)
        return Offer(
            _certain(forced).followed_by(guess).followed_by(_certain(more)),
            (1.0,) * len(forced) + found.chances[: len(guess.tokens)] + (1.0,) * len(more),
            len(forced) + min(found.least, len(guess.tokens)) if found.least else 0,
        )

    def beside(self, texts: int, rows: int) -> None:
        self._texts, self._beside = texts, rows
        self._controller.beside(texts, rows)

    def observe(self, round_: Round) -> None:
        self._written += len(round_.tokens) + round_.beside_tokens
        self._spent += round_.seconds
        drafted = len(round_.draft.tokens)
        forced = min(self._forced, drafted)
        if not forced:
            self._controller.observe(round_)
            return
        costs = self._costs()
        if round_.beside_rows is not None:
            costs.observe(round_.draft.rows + round_.beside_rows, self._length, round_.waiting)
        if round_.accepted < self._forced:
            return
        # As if what was forced had been part of the context, and the pass as long as one without it.
        guess = self._guess.cut(min(len(self._guess.tokens), drafted - forced))
        accepted = min(round_.accepted - forced, len(guess.tokens))
        rows = costs.size(len(guess.tokens) + 1, costs.largest - self._beside, self._beside)
        guess = guess.cut(len(guess.tokens), max(0, rows - len(guess.tokens) - 1))
        waiting = costs.seconds(guess.rows + (round_.beside_rows or 0), self._length + forced)
        self._controller.observe(
            replace(
                round_,
                tokens=round_.tokens[forced : forced + accepted + 1],
                draft=guess,
                accepted=accepted,
                seconds=round_.seconds - round_.waiting + waiting,
                waiting=waiting,
            )
        )

    def _begin(self, context: Sequence[int], limit: int) -> int:
        self._length, self._forced, self._guess = len(context), 0, Draft()
        return limit

    def _checked(
        self, forced: tuple[int, ...], guess: Draft, limit: int
    ) -> tuple[Draft, tuple[int, ...], bool]:
        """`guess` as far as it may follow `forced`, what the grammar forces after it, and if it is whole."""
        guess, whole = self._admitted(forced, guess)
        self._forced, self._guess = len(forced), guess
        tokens = forced + guess.tokens
        more = self._constraint.forced(limit - len(tokens), tokens) if whole and guess.tokens else ()
        return guess, more, whole

    def _admitted(self, forced: tuple[int, ...], guess: Draft) -> tuple[Draft, bool]:
        """`guess` as far as it may be drafted after `forced`, and whether the grammar admits all of it."""
        n = self._constraint.admits(forced + guess.tokens) - len(forced)
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


def _after(context: Sequence[int], forced: tuple[int, ...]) -> Sequence[int]:
    return [*context, *forced] if forced else context


def _certain(tokens: tuple[int, ...]) -> Draft:
    """What the grammar forces: certain, as far as what precedes it stands."""
    return Draft(tokens, (1.0,) * len(tokens), (GRAMMAR,) * len(tokens))
