"""How far to draft, and with which drafters: the plan with the most tokens per second on this machine, now.

Drafters form a chain. Tokens that a grammar forces come first; then the best of the drafters that cost
nothing; if nothing of that is worth verifying, the drafters that take time are asked in their order.
`pricing` has the rule that compares the expected tokens of a draft with the measured cost of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgespec.acceptance import Acceptance
from edgespec.core import ALONE, Budget, CostlyDrafter, Draft, DraftCandidate, Drafter, Round, SharedBatch
from edgespec.costly_drafting import Base, CostlyDrafting
from edgespec.costs import CostCurve
from edgespec.grammar_drafting import GRAMMAR, GrammarDrafter
from edgespec.pricing import Prices, RunningRate, accepted_variance, best_length, expected_tokens

_WORTH_TRYING = 0.25  # tokens that a batch of uncertain cost must promise beyond the plan
_RISK = 1.0  # tokens that may be lost on a costly draft whose batch has an uncertain cost
_LIKELY = 0.5  # probability that all of a draft is accepted whose batch is tried
_CERTAIN = 1.15  # a batch that may be so many times as cheap as its figure is known well enough
_NOTHING = Draft()
_GOOD = 0.7  # confidence of a first token above which the next drafter is not asked


@dataclass(frozen=True, slots=True)
class Chain:
    """The drafters of one generation, in the order in which they are asked.

    Of the `free` ones the first is asked in every round, so that its acceptance is learned from every token.
    """

    grammar: GrammarDrafter | None = None
    free: Sequence[Drafter] = ()
    costly: Sequence[CostlyDrafter] = ()

    def best_free(self, context: Sequence[int], limit: int) -> Draft:
        """The draft of the first free drafter that is confident, else the most confident one."""
        best = Draft()
        if limit < 1:
            return best
        for drafter in self.free:
            best = max(best, drafter.propose(context, limit), key=lambda one: one.confidence[:1])
            if best.tokens and best.confidence[0] > _GOOD:
                break
        return best


def best_case(
    costs: CostCurve, draft: CostCurve, acceptance: float = 0.9, most: int = 15, block: int = 1
) -> float:
    """The speed relative to plain decoding if each token of a draft model were accepted with `acceptance`.

    `block`: tokens that one of its passes drafts.
    """
    sizes = range(1, min(most, costs.largest - 1) + 1)
    expected = expected_tokens([acceptance] * len(sizes))

    def seconds(k: int) -> float:
        return costs.seconds(costs.size(k + 1, costs.largest)) + -(-k // block) * draft.seconds(1)

    return max((expected[k] * costs.seconds(1) / seconds(k) for k in sizes), default=0.0)


class DraftBackoff:
    """Keeps one generation from losing what the average generation gains.

    Calibrated probabilities are right on average, and yet some generations lose: a sum in the middle of
    copied lines breaks every long draft. So the length is limited: `longest` starts at 7 tokens, doubles when
    a draft of that length was accepted, and halves when one was rejected early. And losses are limited: what
    drafting cost this generation, in tokens, raises the `margin` that a plan must promise until it is earned
    back or 50 rounds are past. A loss that chance explains, two standard deviations of what the last rounds
    could yield, does not count.
    """

    _MARGIN, _PRICE = 0.1, 0.3
    _DEVIATIONS, _MEMORY = 2.0, 0.9
    _LEAST, _START = 3, 7

    def __init__(self) -> None:
        self.longest = self._START
        self._balance = self._variance = 0.0

    @property
    def margin(self) -> float:
        """Tokens a plan must promise beyond plain decoding."""
        return self._MARGIN + self._PRICE * max(0.0, -self._balance - self._chance)

    @property
    def _chance(self) -> float:
        """Tokens that the last rounds may have lost by chance."""
        return self._DEVIATIONS * math.sqrt(self._variance)

    def observe(self, drafted: int, accepted: int, gain: float, variance: float) -> None:
        """Record a round of `drafted` tokens, whose planned gain over plain decoding was `gain`.

        `variance` is that of the number of accepted tokens by their probabilities, 0 for free drafters, whose
        probabilities are those of other texts. The gain is as planned, not as measured: a pass slowed down by
        another program is no reason to draft less.
        """
        self._balance = min(2.0, max(-8.0, self._balance + gain))
        if drafted:
            self._variance = self._MEMORY * self._variance + variance
        if not drafted:
            self._balance += 0.02 if self._balance < 0.0 else 0.0
        elif accepted == drafted and 2 * drafted >= self.longest:
            self.longest *= 2
        elif 2 * accepted < drafted:
            self.longest = max(self._LEAST, self.longest // 2)


class Planner:
    """Chooses drafters, length and batch size for each round of one generation: a Controller.

    `costs` are the target's, `acceptance` what is known of the drafters; both learn from every round and
    may be shared. While the target verifies what a costly drafter drafted, that drafter goes on by at most
    `ahead` tokens.
    """

    def __init__(
        self,
        costs: CostCurve,
        acceptance: Acceptance,
        chain: Chain,
        most: int = 31,
        ahead: int = 0,
    ) -> None:
        self._costs, self._acceptance, self._chain = costs, acceptance, chain
        self._costly = [CostlyDrafting(one, acceptance) for one in chain.costly]
        self._budget = Budget(most)
        self._ahead = ahead
        self._backoff = DraftBackoff()
        self._running = RunningRate()
        self._begin = 0  # tokens of the context at the first plan
        self._prices: Prices | None = None  # of this round; None: it was not planned
        self._lead = 0  # tokens that the grammar drafts before others
        self._found = Draft()  # the draft of a free drafter after those
        self._trying = False  # the round verifies a draft to learn what its size costs

    def apply_budget(self, budget: Budget, costs: CostCurve) -> None:
        """From the next round on spend what `budget` allows; `costs` are the target's with its threads.

        With the objective "energy" its threads are given: a pass then costs its seconds times its threads.
        """
        if budget.objective != self._budget.objective:
            self._running.reset()
        self._budget, self._costs = budget, costs

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        return self._plan(context, limit, shared).draft

    def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
        """Return the draft of the costly drafters or, if none was asked, all that the others drafted."""
        plan = self._plan(context, limit, shared)
        draft = plan.draft.cut(plan.kept) if self._asked is not None else plan.found
        return DraftCandidate(draft, tuple(self._probabilities(draft)), min(plan.least, plan.kept))

    def stop_ahead(self) -> None:
        """Stop drafting ahead: a generation is over, and its drafters are free for another."""
        for one in self._costly:
            one.drafter.stop_ahead()

    def observe(self, round_: Round) -> None:
        self.stop_ahead()
        if self._prices is None:
            return
        prices, self._prices = self._prices, None
        prices.costs, prices.shared, prices.bold = self._costs, round_.shared, False
        rows, drafted = round_.draft.rows, len(round_.draft.tokens)
        if round_.timed:
            self._costs.observe(rows + round_.shared.rows, prices.length, round_.waiting)
        lead = min(self._lead, drafted)
        led = min(round_.accepted, lead)
        asked = self._asked
        plain, base = prices.plain_rate, prices.price(1 + lead)
        more = prices.price(rows, asked.planned if asked is not None else 0.0) - base
        more += prices.repeated(rows, 1 + round_.accepted)
        gained = len(round_.tokens) - 1 - led
        drawn = round_.draft.after(lead) if asked is not None else _NOTHING
        variance = accepted_variance(self._probabilities(drawn))
        self._backoff.observe(drafted - lead, round_.accepted - led, gained - more * plain, variance)
        spent = round_.seconds * prices.weight(rows + round_.shared.rows)
        lost = spent * plain - len(round_.tokens)
        self._costs.spend(spent * plain, max(0.0, lost) if self._trying else 0.0)
        for one in self._costly:
            gain = gained + round_.shared_tokens - round_.shared.generations - (spent - base) * plain
            one.observe(round_, gain, prices.weight(1) * plain)
        self._acceptance.earn(spent * plain)
        self._running.observe(len(round_.tokens) + round_.shared_tokens, spent)
        if round_.accepted >= self._lead:
            self._learn(round_, asked)
        self._found = Draft()

    @property
    def _asked(self) -> CostlyDrafting | None:
        """The costly drafter that was asked in this round."""
        return next((one for one in self._costly if one.planned), None)

    def _learn(self, round_: Round, asked: CostlyDrafting | None) -> None:
        """Learn the acceptance of the tokens after those of the grammar."""
        tokens = round_.tokens[self._lead :]
        self._count(self._found, tokens)
        if asked is not None:
            rest = round_.draft.after(self._lead)
            self._count(rest, tokens, only=asked.drafter.source)
        if self._chain.grammar is not None:
            self._chain.grammar.observe(tokens)

    def _count(self, draft: Draft, tokens: Sequence[int], only: str = "") -> None:
        """Count each token drafted, up to the first wrong one, for its drafter and confidence."""
        for token, confidence, source, true in zip(
            draft.tokens, draft.confidence, draft.sources, tokens, strict=False
        ):
            if not only or source == only:
                self._acceptance.observe(source, confidence, token == true)
            if token != true:
                return

    def _plan(self, context: Sequence[int], limit: int, shared: SharedBatch) -> _Plan:
        self._trying = False
        self._begin = self._begin or len(context)
        self._lead, self._found = 0, Draft()
        prices = self._prices = Prices(self._costs, self._budget, shared, len(context))
        prices.rate = self._running.above(prices.plain_rate)
        left, limit = limit, min(limit, self._costs.largest - shared.rows - 1)
        if limit < 1:
            return _Plan()
        grammar = self._chain.grammar
        lead = grammar.lead(limit) if grammar is not None else Draft()
        self._lead = len(lead.tokens)
        limit = min(limit, self._lead + self._budget.max_draft)
        after = [*context, *lead.tokens] if lead.tokens else context
        self._found = self._chain.best_free(after, min(limit - self._lead, self._backoff.longest))
        plan = self._best(self._completed(lead, self._found, limit), limit, prices)
        plan = self._try_size(plan, prices)
        if plan.kept > self._lead or limit == self._lead or not self._budget.model_draft:
            return plan
        if grammar is not None and not grammar.trusts_values:
            return plan
        return self._with_costly(after, lead, plan, limit, left, prices)

    def _with_costly(
        self, context: Sequence[int], lead: Draft, plan: _Plan, limit: int, left: int, prices: Prices
    ) -> _Plan:
        """Return `plan`, or the draft of the first costly drafter that is expected to be worth more.

        At most `left` tokens may follow in the generation. Free drafters may continue the draft.
        """
        own, room = len(context) - self._begin + 1, limit - self._lead
        led = self._probabilities(lead)
        base = Base(expected_tokens(led)[-1], math.prod(led), 1 + self._lead)
        # Figures from a file are uncertain, and only passes make them certain: some time may be lost on that.
        prices.bold = self._costs.allowance >= _RISK
        for one in self._costly:
            drawn = one.propose(context, own, room, left, prices, base, plan.value)
            if drawn is None:
                continue
            # A token sampled from q is kept: whether it is dropped would depend on what followed it, and so
            # on the token.
            sampled = len(drawn.tokens) if drawn.probs else 0
            for drafter in self._chain.free:
                drawn = drawn.followed_by(drafter.extend(drawn.tokens, room - len(drawn.tokens)))
            found = self._completed(lead, drawn, limit)
            least = min(self._lead + sampled, len(found.tokens)) if sampled else 0
            plan = self._best(found, limit, prices, least)
            rows = plan.draft.rows + prices.shared.rows
            self._trying = prices.bold and self._costs.caution(rows) > _CERTAIN
            if self._ahead and one.drafter.source in plan.draft.sources:
                text = [*context[: len(context) - self._lead], *plan.draft.tokens]
                one.drafter.begin_ahead(text, self._ahead)
            return plan
        return plan

    def _completed(self, lead: Draft, draft: Draft, limit: int) -> Draft:
        """Return `lead`, the part of `draft` that the grammar allows, and what it forces after that."""
        grammar = self._chain.grammar
        return draft if grammar is None else grammar.completed(lead, draft, limit)

    def _probabilities(self, draft: Draft) -> list[float]:
        """Return the probability that each token is accepted if all before it are."""
        known = self._acceptance.probability
        return [
            confidence if source == GRAMMAR else known(source, confidence)
            for source, confidence in zip(draft.sources, draft.confidence, strict=True)
        ]

    def _best(self, draft: Draft, limit: int, prices: Prices, least: int = 0) -> _Plan:
        """The prefix of at least `least` tokens that is worth most, padded to the cheapest batch."""
        expected = expected_tokens(self._probabilities(draft))
        rows = [1] + [prices.size(k + 1, limit + 1) for k in range(1, len(expected))]
        price = {n: prices.price(n) for n in set(rows)}
        value, kept = best_length(
            expected,
            lambda k: price[rows[k]] + prices.replay(expected, k, rows[k]),
            prices.rate,
            least=least,
            margin=0.0 if least else self._backoff.margin,
            certain=self._lead,
        )
        chosen = draft.cut(kept, max(0, rows[kept] - kept - 1))
        return _Plan(chosen, value, kept, draft, least, expected, rows, price)

    def _try_size(self, plan: _Plan, prices: Prices) -> _Plan:
        """A draft whose batch may cost much less than is known, where finding out is cheap, else `plan`."""
        expected, best, chosen = plan.expected, plan.value + _WORTH_TRYING, 0
        for k in range(1, len(expected)):
            if expected[k] - expected[k - 1] < _LIKELY:  # the probability that all are accepted
                break
            price = prices.rate * plan.price[plan.rows[k]]
            hope = self._costs.hope(plan.rows[k] + prices.shared.rows)
            value = expected[k] - price / hope
            if hope > _CERTAIN and value > best and price - expected[k] <= self._costs.allowance:
                best, chosen = value, k
        if not chosen:
            return plan
        self._trying = True
        draft = plan.found.cut(chosen, max(0, plan.rows[chosen] - chosen - 1))
        return _Plan(draft, best, chosen, plan.found)


@dataclass(slots=True)
class _Plan:
    """A draft, the `kept` first tokens of what was `found`, of which `least` must not be dropped.

    `value`: the tokens it is expected to yield beyond what its time is worth; `expected` and `rows`: tokens
    and rows of each length of what was found.
    """

    draft: Draft = _NOTHING
    value: float = -math.inf
    kept: int = 0
    found: Draft = _NOTHING
    least: int = 0
    expected: Sequence[float] = ()
    rows: Sequence[int] = ()
    price: Mapping[int, float] = field(default_factory=dict)
