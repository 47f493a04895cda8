"""How far to guess, and with what: whatever gives the most tokens a second on this machine, now.

A round of n rows costs t(n), measured; it brings E(n) = 1 + the sum of the chances that the first i guesses
all stand, calibrated. What counts is E(n) - rate * T(n), where `rate` is what this text has run at so far
(Dinkelbach 1967): a second spent here is worth what it brings elsewhere. Guessing nothing is the plan to
beat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgespec.acceptance import LEVEL, Acceptance
from edgespec.core import Budget, Draft, DraftCandidate, Round
from edgespec.costs import CostCurve
from edgespec.draft_account import DraftTrial
from edgespec.drafting import MODEL, ModelDrafter
from edgespec.retrieval import SuffixDrafter

_LEVEL_RATE = 0.05
_TYPICAL = 128  # tokens of an answer over which the reading of its prompt is spread
_WORTH_TRYING = 0.25  # tokens that a batch of uncertain cost must promise beyond the plan
_LIKELY = 0.5  # probability that all of a draft is accepted whose batch is tried
_CERTAIN = 1.15  # a batch that may be so many times as cheap as its figure is known well enough
_EVIDENCE = 8  # tokens of an answer that a draft model is compared with when it reads a text
_BELIEVED = 6.0  # tokens compared that its level so far is worth
_AHEAD = 8  # how many more tokens of a model draft are considered at once
_RATE_MEMORY, _RATE_PRIOR = (
    256.0,
    32.0,
)  # tokens over which the rate is taken; at the plain rate to start from


def best_case(costs: CostCurve, draft: CostCurve, acceptance: float = 0.9, most: int = 15) -> float:
    """The speed in plain decoding speeds if each guess of a draft model stood with `acceptance`."""
    best = 0.0
    expected = chance = 1.0
    for k in range(1, min(most, costs.largest - 1) + 1):
        chance *= acceptance
        expected += chance
        seconds = costs.seconds(costs.size(k + 1, costs.largest)) + k * draft.seconds(1)
        best = max(best, expected * costs.seconds(1) / seconds)
    return best


class DraftBackoff:
    """Keeps one text from losing what the average text gains.

    Calibrated chances are right on average, and yet some texts lose: a sum in the middle of copied lines
    breaks every long guess. So long guesses are earned: `longest` starts at 7 tokens, doubles when a guess of
    that length held, halves when one broke early. And losses are kept small: what guessing cost this text,
    in tokens, raises the `margin` that a plan must promise until it is earned back or 50 rounds are past.
    """

    _MARGIN, _PRICE = 0.1, 0.3
    _LEAST, _START = 3, 7

    def __init__(self) -> None:
        self.longest = self._START
        self._balance = 0.0

    @property
    def margin(self) -> float:
        """Tokens a plan must promise beyond plain decoding."""
        return self._MARGIN + self._PRICE * max(0.0, -self._balance)

    def observe(self, drafted: int, accepted: int, gain: float) -> None:
        """A round of `drafted` tokens brought `gain` more than plain decoding does in that time, as planned.

        As planned, not as measured: what another program's moment cost is no reason to guess less.
        """
        self._balance = min(2.0, max(-8.0, self._balance + gain))
        if not drafted:
            self._balance += 0.02 if self._balance < 0.0 else 0.0
        elif accepted == drafted and 2 * drafted >= self.longest:
            self.longest *= 2
        elif 2 * accepted < drafted:
            self.longest = max(self._LEAST, self.longest // 2)


class Planner:
    """Chooses drafters, length and batch size for each round of one text.

    `costs` are the target's, `acceptance` what is known of the drafters; both learn from every round and may
    be shared. `suffix` costs nothing and is asked every round, so its acceptance is learned from every
    token, guessed or not. `model`, with its `model_costs`, is asked where that finds nothing worth checking
    and where its guesses are expected to bring more than they cost; repetition then adds to what it guessed.
    While the target checks what it guessed, it goes on by at most `ahead` tokens.
    """

    def __init__(
        self,
        costs: CostCurve,
        acceptance: Acceptance,
        suffix: SuffixDrafter | None = None,
        model: ModelDrafter | None = None,
        model_costs: CostCurve | None = None,
        most: int = 31,
        ahead: int = 0,
    ) -> None:
        self._costs = costs
        self._acceptance = acceptance
        self._suffix = suffix
        self._model = model
        self._model_costs = model_costs or costs
        self._budget = Budget(most)
        self._ahead = ahead
        self._caution = DraftBackoff()
        self._level = acceptance.level(MODEL)  # what the model's next guess is worth in this text, on average
        self._trial = DraftTrial()
        self._whole = True  # the model reads all of the text
        self._begin = 0  # tokens of the context at the first plan
        self._written, self._spent = 0.0, 0.0
        self._rate = 0.0
        self._length = 0  # of the context planned for; 0: the round was not planned
        self._texts = self._beside = 0  # others in the same pass, and their rows
        self._found = Draft()  # what the suffix drafter said
        self._trying = False  # the round checks a draft to learn what its size costs
        self._drafting = 0.0  # seconds the model was planned to take in this round
        self._reading = 0.0  # those of them for tokens that are new to it, where these are many
        self._steps = 0  # forward passes it made after that

    def spend(self, budget: Budget, costs: CostCurve) -> None:
        """From the next round on spend what `budget` says; `costs` are the target's with its threads.

        With the objective "energy" its threads are given: a pass then costs its seconds times its threads.
        """
        if budget.objective != self._budget.objective:
            self._written = self._spent = 0.0
        self._budget, self._costs = budget, costs

    def beside(self, texts: int, rows: int) -> None:
        self._texts, self._beside = texts, rows

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        return self._plan(context, limit).draft

    def offer(self, context: Sequence[int], limit: int) -> DraftCandidate:
        """What repetition found or, if none of it pays even here, what the model guesses."""
        draft = self._plan(context, limit).draft
        least = draft.sources.count(MODEL) if draft.probs else 0
        draft = draft.cut(len(draft.tokens)) if MODEL in draft.sources else self._found
        guesses = zip(draft.sources, draft.confidence, strict=True)
        return DraftCandidate(draft, tuple(self._acceptance.probability(*one) for one in guesses), least)

    def _plan(self, context: Sequence[int], limit: int) -> _Plan:
        self._length = len(context)
        self._rate = self._running_rate()
        self._trying = False
        self._begin = self._begin or self._length
        left, limit = limit, min(limit, self._budget.max_draft, self._costs.largest - self._beside - 1)
        if limit < 1:
            return _Plan(Draft(), 0.0)
        if self._suffix is not None:
            self._found = self._suffix.propose(context, min(limit, self._caution.longest))
        plan = self._try_size(self._found, limit, self._best(self._found, limit))
        if self._model is not None and self._budget.model_draft and not plan.draft.tokens:
            plan = self._with_model(self._model, context, plan, limit, left)
            if self._ahead and MODEL in plan.draft.sources:
                self._model.begin_ahead([*context, *plan.draft.tokens], self._ahead)
        return plan

    def settle(self) -> None:
        """Let nothing run ahead any more: an answer is over, and its drafter free for another."""
        if self._model is not None:
            self._model.settle()

    def observe(self, round_: Round) -> None:
        self.settle()
        if not self._length:
            return
        length, self._length = self._length, 0
        rows, drafted = round_.draft.rows, len(round_.draft.tokens)
        if round_.beside_rows is not None:
            self._costs.observe(rows + round_.beside_rows, length, round_.waiting)
        plain = self._plain_rate(length)
        more = self._price(rows, length, self._drafting) - self._price(1, length)
        self._caution.observe(drafted, round_.accepted, len(round_.tokens) - 1 - more * plain)
        time = round_.seconds * self._weight(rows) * plain
        self._costs.spend(time, max(0.0, time - len(round_.tokens)) if self._trying else 0.0)
        self._judge_model(round_, len(round_.tokens) + round_.beside_tokens - time, plain)
        self._acceptance.account.earn(time)
        self._written += len(round_.tokens) + round_.beside_tokens
        self._spent += round_.seconds * self._weight(rows)
        if self._written > _RATE_MEMORY:
            self._spent *= _RATE_MEMORY / self._written
            self._written = _RATE_MEMORY
        self._learn(self._found, round_.tokens)
        if MODEL in round_.draft.sources:
            self._learn(round_.draft, round_.tokens, only=MODEL)
        self._found = Draft()

    def _judge_model(self, round_: Round, gain: float, plain: float) -> None:
        """What a round that brought `gain` tokens more than the rate `plain` says of asking the model."""
        asked, reading, steps = self._drafting > 0.0, self._reading, self._steps
        self._drafting, self._reading, self._steps = 0.0, 0.0, 0
        if not asked:
            self._trial.observe(len(round_.tokens), None)
            return
        account, spent = self._acceptance.account, 0.0
        if reading:
            spent = max(0.0, round_.drafting - steps * self._model_costs.seconds(1))
            account.read(reading, spent)
        elif steps:
            self._model_costs.observe(1, 0, round_.drafting / steps)
        account.record(self._whole, gain)
        self._trial.observe(len(round_.tokens), gain + self._weight(1) * spent * plain)

    def _learn(self, draft: Draft, tokens: Sequence[int], only: str = "") -> None:
        """Each token guessed up to the first wrong one says something of its drafter's confidence."""
        guesses = zip(draft.tokens, draft.confidence, draft.sources, tokens, strict=False)
        for guess, confidence, source, token in guesses:
            if not only or source == only:
                self._acceptance.observe(source, confidence, guess == token)
            if guess != token:
                return

    def _running_rate(self) -> float:
        """Tokens a second of this text (of processor time, to save it), at least plain decoding's."""
        plain = self._plain_rate(self._length)
        return max(plain, (_RATE_PRIOR + self._written) / (_RATE_PRIOR / plain + self._spent))

    def _plain_rate(self, length: int) -> float:
        """The same of all texts in the pass, if none of them guessed."""
        rows = 1 + self._texts
        return rows / (self._weight(rows) * self._costs.seconds(rows, length))

    def _value(self, expected: float, rows: int, drafting: float = 0.0) -> float:
        """Tokens expected of a round beyond what its time is worth elsewhere; 0 rows: no such batch."""
        if not rows:
            return -math.inf
        return expected - self._rate * self._price(rows, self._length, drafting)

    def _price(self, rows: int, length: int, drafting: float = 0.0) -> float:
        """Seconds of a round that checks `rows` after `length` tokens; of processor time, to save it."""
        rows += self._beside
        seconds = self._costs.seconds(rows, length) * self._costs.caution(rows)
        return self._weight(rows) * seconds + self._weight(1) * drafting

    def _size(self, rows: int, most: int) -> int:
        return self._costs.size(rows, most, self._beside)

    def _weight(self, rows: int) -> float:
        """What a second is worth: compute threads wait busily, so that all of them use it."""
        one_row, many_rows = self._budget.threads
        energy = self._budget.objective == "energy"
        return float(max(1, one_row if rows == 1 else many_rows)) if energy else 1.0

    def _best(self, draft: Draft, limit: int, least: int = 0) -> _Plan:
        """The prefix of at least `least` tokens that brings most, padded to the cheapest batch."""
        expected = stands = 1.0
        kept, rows = 0, 1
        best = -math.inf if least else self._value(expected, 1) + self._caution.margin
        for k, (confidence, source) in enumerate(zip(draft.confidence, draft.sources, strict=True), start=1):
            stands *= self._acceptance.probability(source, confidence)
            expected += stands
            size = self._size(k + 1, limit + 1)
            value = self._value(expected, size)
            if value > best and k >= least:
                best, kept, rows = value, k, size
        return _Plan(draft.cut(kept, rows - kept - 1), best)

    def _try_size(self, draft: Draft, limit: int, plan: _Plan) -> _Plan:
        """A draft whose batch may cost much less than is known, where finding out is cheap, else `plan`."""
        expected = stands = 1.0
        best, kept, rows = plan.value + _WORTH_TRYING, 0, 0
        for k, (confidence, source) in enumerate(zip(draft.confidence, draft.sources, strict=True), start=1):
            stands *= self._acceptance.probability(source, confidence)
            if stands < _LIKELY:
                break
            expected += stands
            size = self._size(k + 1, limit + 1)
            price = self._rate * self._price(size, self._length) if size else math.inf
            hope = self._costs.hope(size + self._beside)
            value = expected - price / hope
            if hope > _CERTAIN and value > best and price - expected <= self._costs.allowance:
                best, kept, rows = value, k, size
        if not kept:
            return plan
        self._trying = True
        return _Plan(draft.cut(kept, rows - kept - 1), best)

    def _with_model(
        self, model: ModelDrafter, context: Sequence[int], plain: _Plan, limit: int, left: int
    ) -> _Plan:
        """The model's guesses, as far as each is expected to pay, with what repetition adds to them.

        `left` tokens of the text may be still to come.
        """
        outlook = _Outlook(self, limit + 1, self._model_costs.seconds(1), self._level)
        lag, account = model.lag(context), self._acceptance.account
        own = len(context) - self._begin + 1
        known = self._model_costs.seconds(lag)
        reading = entry = known
        asked = not self._trial.resting
        if lag > _AHEAD:
            reading = known * account.reading
            self._whole = model.reads_whole(context)
            fee = self._weight(1) * reading * self._plain_rate(self._length)
            asked = asked and own >= _EVIDENCE and account.affords(self._whole, fee)
            # Read once, of use for the rest of the text.
            entry = outlook.step + (reading - outlook.step) / max(1.0, min(left, _TYPICAL) / 4.0)
        if not asked or outlook.value(1.0, 1.0, 1, entry) <= plain.value:
            self._level += _LEVEL_RATE / 10 * (LEVEL - self._level)  # or it would never be asked again
            return plain
        chances, expected = [1.0], [1.0]

        def more(confidence: list[float]) -> bool:
            nonlocal outlook
            if len(confidence) == 1 and lag > _AHEAD:
                right, compared = model.agreed
                self._level = (_BELIEVED * self._level + right) / (_BELIEVED + compared)
                outlook = replace(outlook, level=self._level)
            if len(confidence) == len(chances):
                p = self._acceptance.probability(MODEL, confidence[-1])
                self._acceptance.note(MODEL, p)
                self._level += _LEVEL_RATE * (p - self._level)
                chances.append(chances[-1] * p)
                expected.append(expected[-1] + chances[-1])
            if len(confidence) >= limit:
                return False
            sizes = (self._size(i, limit + 1) for i in range(1, len(expected) + 1))
            now = max(map(self._value, expected, sizes))
            return (
                not confidence or outlook.value(expected[-1], chances[-1], len(expected), outlook.step) > now
            )

        drawn = model.draft(context, limit, more, own if lag > _AHEAD else 0)
        self._drafting = entry + outlook.step * (len(drawn.tokens) - 1)
        self._reading = known if lag > _AHEAD else 0.0
        self._steps = len(drawn.tokens) - (lag > _AHEAD) if lag <= 2 or lag > _AHEAD else 0
        # A token drawn from q is kept: whether it is dropped would depend on what followed it, and so on it.
        least = len(drawn.tokens) if drawn.probs else 0
        if self._suffix is not None:
            drawn = drawn.followed_by(self._suffix.extend(drawn.tokens, limit - len(drawn.tokens)))
        return self._best(drawn, limit, least)


class FixedLength:
    """Guesses the same number of tokens in every round: what a Planner is measured by."""

    def __init__(self, length: int, suffix: SuffixDrafter | None, model: ModelDrafter | None) -> None:
        self._length, self._suffix, self._model = length, suffix, model

    def spend(self, budget: Budget, costs: CostCurve) -> None:
        """Does nothing: a fixed length knows no costs."""

    def beside(self, texts: int, rows: int) -> None:
        """Does nothing either."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        limit = min(limit, self._length)
        if limit < 1:
            return Draft()
        found = self._suffix.propose(context, limit) if self._suffix is not None else Draft()
        if not found.tokens and self._model is not None:
            return self._model.draft(context, limit, lambda confidence: len(confidence) < limit)
        return found

    def offer(self, context: Sequence[int], limit: int) -> DraftCandidate:
        draft = self.propose(context, limit)
        return DraftCandidate(draft, (1.0,) * len(draft.tokens), len(draft.tokens))

    def observe(self, round_: Round) -> None:
        """Learns nothing."""

    def settle(self) -> None:
        """Nothing runs ahead."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A draft and its value: the tokens it is expected to bring beyond what its time is worth."""

    draft: Draft
    value: float


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What asking the model once or a few times more is worth, each time at `step` seconds."""

    planner: Planner
    most: int  # rows
    step: float
    level: float

    def value(self, expected: float, stands: float, rows: int, first: float) -> float:
        """The best of up to _AHEAD more tokens after `rows`, the first of which costs `first` seconds."""
        best, drafting = -math.inf, first
        for size in range(rows + 1, min(rows + _AHEAD, self.most) + 1):
            stands *= self.level
            expected += stands
            best = max(best, self.planner._value(expected, self.planner._size(size, self.most), drafting))
            drafting += self.step
        return best
