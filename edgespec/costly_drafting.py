"""When to ask a drafter that takes time, such as a draft model, and how many tokens to let it draft."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgespec.acceptance import LEVEL, Acceptance
from edgespec.core import CostlyDrafter, Draft, Round
from edgespec.draft_account import DraftTrial
from edgespec.pricing import Prices

_LEVEL_RATE = 0.05
_TYPICAL = 128  # tokens of an answer over which the prefill of its prompt is spread
_EVIDENCE = 8  # tokens of an answer that a draft model is compared with when it reads a text
_BELIEVED = 6.0  # tokens compared that its level so far is worth
_AHEAD = 8  # how many more tokens of a draft are considered at once; reading more than these is a prefill


@dataclass(frozen=True, slots=True)
class Base:
    """What a round yields before a costly drafter is asked: `expected` tokens in a batch of `rows`.

    `reached` is the probability that the draft tokens among them are all accepted.
    """

    expected: float = 1.0
    reached: float = 1.0
    rows: int = 1


class CostlyDrafting:
    """Asks one drafter in one generation. Learns what its next token is worth and whether it pays.

    Asked where its tokens are expected to yield more than they cost, token by token. What it cost is judged
    by rounds as they really ran.
    """

    def __init__(self, drafter: CostlyDrafter, acceptance: Acceptance) -> None:
        self.drafter = drafter
        self._acceptance = acceptance
        self._level = acceptance.level(
            drafter.source
        )  # what the next token is worth in this text, on average
        self._trial = DraftTrial(acceptance.account(drafter.source).patience)
        self._whole = True  # the drafter reads all of the text
        self.planned = 0.0  # seconds it was planned to take in this round; 0: it was not asked
        self._reading = 0.0  # those of them for tokens that are new to it, where these are many
        self._steps = 0  # forward passes it made after that
        self._is_warm = False  # its first draft of a text also waits for weights and buffers

    def propose(
        self, context: Sequence[int], own: int, limit: int, left: int, prices: Prices, base: Base, bar: float
    ) -> Draft | None:
        """At most `limit` tokens, None where asking is not expected to be worth more than `bar`.

        The last `own` tokens of `context` are the target's, and `left` more may follow.
        """
        step = self.drafter.costs.seconds(1) if self.drafter.block_size == 1 else 0.0
        outlook = _Outlook(prices, base.rows + limit, step, self._level)
        lag = self.drafter.lag(context)
        entry = self._entry(context, own, left, lag, prices)
        if entry is None or outlook.value(base.expected, base.reached, base.rows, entry) <= bar:
            self._level += _LEVEL_RATE / 10 * (LEVEL - self._level)  # or it would never be asked again
            return None
        drawn = self._draw(context, own, limit, lag, base, outlook)
        prefills = lag > _AHEAD
        self.planned = entry + outlook.step * (len(drawn.tokens) - 1)
        self._reading = self.drafter.costs.seconds(lag) if prefills else 0.0
        passes = -(-len(drawn.tokens) // self.drafter.block_size)
        self._steps = passes - prefills if lag <= 2 or prefills else 0
        return drawn

    def observe(self, round_: Round, gain: float, price: float) -> None:
        """A round yielded `gain` tokens more than without this drafter, at `price` tokens per second."""
        asked, reading, steps = self.planned > 0.0, self._reading, self._steps
        self.planned, self._reading, self._steps = 0.0, 0.0, 0
        if not asked:
            self._trial.observe(len(round_.tokens), None)
            return
        account, costs, spent = self._acceptance.account(self.drafter.source), self.drafter.costs, 0.0
        if reading:
            spent = max(0.0, round_.drafting - steps * costs.seconds(1))
            account.read(reading, spent)
        elif steps and self._is_warm:
            costs.observe(1, 0, round_.drafting / steps)
        self._is_warm = True
        account.record(self._whole, gain)
        self._trial.observe(len(round_.tokens), gain + price * spent)

    def _entry(self, context: Sequence[int], own: int, left: int, lag: int, prices: Prices) -> float | None:
        """Seconds until its first token, of which a prefill counts in part; None where it is not asked."""
        if self._trial.is_resting:
            return None
        known = self.drafter.costs.seconds(lag)
        if lag <= _AHEAD:
            return known
        account = self._acceptance.account(self.drafter.source)
        reading = known * account.reading
        self._whole = self.drafter.reads_whole(context)
        fee = prices.weight(1) * reading * prices.plain_rate
        if own < _EVIDENCE or not account.affords(self._whole, fee):
            return None
        # Read once, of use for the rest of the text.
        step = self.drafter.costs.seconds(1)
        return step + (reading - step) / max(1.0, min(left, _TYPICAL) / 4.0)

    def _draw(
        self, context: Sequence[int], own: int, limit: int, lag: int, base: Base, outlook: _Outlook
    ) -> Draft:
        """Tokens as long as the next is expected to pay."""
        source, prices = self.drafter.source, outlook.prices
        reached, expected = [base.reached], [base.expected]

        def more(confidence: list[float]) -> bool:
            nonlocal outlook
            if len(confidence) == 1 and lag > _AHEAD:
                right, compared = self.drafter.agreed
                self._level = (_BELIEVED * self._level + right) / (_BELIEVED + compared)
                outlook = replace(outlook, level=self._level)
            if len(confidence) == len(reached):
                p = self._acceptance.probability(source, confidence[-1])
                self._acceptance.note(source, p)
                self._level += _LEVEL_RATE * (p - self._level)
                reached.append(reached[-1] * p)
                expected.append(expected[-1] + reached[-1])
            if len(confidence) >= limit:
                return False
            if not confidence:
                return True
            sizes = (prices.size(base.rows + i, outlook.most) for i in range(len(expected)))
            now = max(map(prices.value, expected, sizes))
            rows = base.rows + len(expected) - 1
            return outlook.value(expected[-1], reached[-1], rows, outlook.step) > now

        return self.drafter.draft(context, limit, more, own if lag > _AHEAD else 0)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What asking once or a few times more is worth, each time at `step` seconds, for at most `most` rows."""

    prices: Prices
    most: int
    step: float
    level: float

    def value(self, expected: float, reached: float, rows: int, first: float) -> float:
        """The best of up to _AHEAD more tokens after `rows`, the first of which costs `first` seconds."""
        best, drafting = -math.inf, first
        for size in range(rows + 1, min(rows + _AHEAD, self.most) + 1):
            reached *= self.level
            expected += reached
            best = max(best, self.prices.value(expected, self.prices.size(size, self.most), drafting))
            drafting += self.step
        return best
