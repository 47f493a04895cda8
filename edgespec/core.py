"""The types everything else is written in. Read this file first.

Values are frozen, contracts are Protocols. Nothing here computes: decoding is in `decode`, the acceptance
rule in `verify`, probabilities in `sampling`, guessing in `drafting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgespec.costs import CostCurve

Logits = npt.NDArray[np.float32]
"""Scores before the softmax, float32 [rows, vocab]; often a view that the next forward pass overwrites."""

Ids = npt.NDArray[np.int64]

Mask = npt.NDArray[np.uint32]
"""Which tokens are allowed, a bit each: token t is bit t % 32 (the lowest is 0) of word t // 32."""

Probs = npt.NDArray[np.floating]

Progress = Callable[[float], bool]
"""Called with the fraction done, 0 to 1; returns False to stop the work."""

NamedProgress = Callable[[str, float], bool]
"""The same with the name of the current step first."""

_BLOCK = 256


class EdgespecError(Exception):
    """Something the user can act on: one line that says what is wrong and what to do."""


class Cancelled(Exception):  # noqa: N818 - a control signal like KeyboardInterrupt, not an error
    """A forward pass was stopped on request. The model's `tokens` still say exactly what it holds."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A probability for each token that has one; all others have none.

    `ids` ascend, `probs` are positive or zero and sum to one, both have shape [n]. A point mass (greedy
    decoding, a token the grammar forces) is simply n = 1, so one acceptance rule serves every case.
    `probs` may be float32: sums over it are taken in float64.
    """

    ids: Ids
    probs: Probs

    def prob(self, token: int) -> float:
        """The probability of `token`, 0.0 where it has none."""
        i = int(self.ids.searchsorted(token))
        return float(self.probs[i]) if i < len(self.ids) and self.ids[i] == token else 0.0

    def sample(self, uniform: float) -> int:
        """The token at `uniform` in [0, 1) of the cumulative distribution, in order of token id."""
        start, stop = 0, len(self.ids)
        target = uniform
        if stop > 4 * _BLOCK:
            # Find the block first: a cumulative sum over 150,000 tokens would cost more than the softmax.
            sums = np.add.reduceat(self.probs, np.arange(0, stop, _BLOCK)).cumsum(dtype=np.float64)
            target *= sums[-1]
            block = min(int(sums.searchsorted(target, side="right")), len(sums) - 1)
            start, stop = block * _BLOCK, min((block + 1) * _BLOCK, stop)
            target -= sums[block - 1] if block else 0.0
            cumulative = self.probs[start:stop].cumsum(dtype=np.float64)
        else:
            cumulative = self.probs.cumsum(dtype=np.float64)
            target *= cumulative[-1]
        i = int(cumulative.searchsorted(target, side="right"))
        if i >= len(cumulative):  # rounding at the very end: the last token that has any probability
            i = int(np.flatnonzero(self.probs[start:stop])[-1])
        return int(self.ids[start + i])


def point_mass(token: int) -> Distribution:
    """The distribution that always gives `token`."""
    return Distribution(np.array([token]), np.ones(1))


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, at most as many as were asked for, none if there is no good guess.

    `confidence[i]` is the drafter's own estimate that token i is accepted if all before it were, `sources[i]`
    names the drafter it came from. With `probs`, token i was *sampled from* probs[i] and the ratio rule
    applies; without, it is a point mass. `padding` rows beyond the draft make the batch a cheaper size.
    """

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    probs: tuple[Distribution, ...] | None = None
    padding: int = 0

    @property
    def rows(self) -> int:
        """Rows of the batch that checks it: one for the context's last token, the draft, the padding."""
        return 1 + len(self.tokens) + self.padding

    def cut(self, kept: int, padding: int = 0) -> Draft:
        """The first `kept` tokens."""
        return Draft(
            self.tokens[:kept],
            self.confidence[:kept],
            self.sources[:kept],
            self.probs and self.probs[:kept],
            padding,
        )

    def after(self, start: int) -> Draft:
        """The tokens from number `start` on, without padding."""
        return Draft(
            self.tokens[start:],
            self.confidence[start:],
            self.sources[start:],
            self.probs and self.probs[start:],
        )

    def followed_by(self, other: Draft) -> Draft:
        """Both, without padding. Guesses that nothing was drawn for are point masses."""
        probs = None
        if self.probs is not None or other.probs is not None:
            probs = tuple(q for one in (self, other) for q in one.probs or map(point_mass, one.tokens))
        return Draft(
            self.tokens + other.tokens,
            self.confidence + other.confidence,
            self.sources + other.sources,
            probs,
        )


@dataclass(frozen=True, slots=True)
class DraftCandidate:
    """What a generation would draft if rows were cheap, without padding, and the probability of each token.

    `accept_probs[i]` is that of token i if all before it are accepted. The first `least` tokens must not be
    dropped.
    """

    draft: Draft = Draft()
    accept_probs: tuple[float, ...] = ()
    least: int = 0


@dataclass(frozen=True, slots=True)
class Forward:
    """What a round asks of the target: evaluate everything it lacks of the context, then `draft`.

    The answer is the logits of `len(draft) + 1` rows: one after the context, one after each token. `padding`
    more rows may be evaluated with any tokens, whose logits nobody reads.
    """

    draft: tuple[int, ...]
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`accepted` drafted tokens stand; `next` follows them and came from the target's own distribution.

    When an accepted token ends the generation, it is `next` and not counted in `accepted`, so that in every
    case the round's tokens are draft[:accepted] + (next,) and the target's cache lacks exactly `next`.
    """

    accepted: int
    next: int
    done: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the target's probability before any sampling setting, and the likeliest others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the machine said of itself at `time`, in seconds of a monotonic clock.

    None stands for what it does not tell, and for what it told and nobody can believe.
    """

    time: float
    celsius: float | None = None  # of the hottest sensor of the processor
    celsius_limit: float | None = None  # that sensor's own mark of "too hot"
    charge: float | None = None  # of the battery, in percent
    plugged: bool | None = None
    seconds_left: float | None = None  # until the battery is empty
    frequency: float | None = None  # of the processor, as a share of its maximum
    load: float | None = None  # share of the cores this process may use that are busy, 0 to 1
    others: float | None = None  # the part of `load` that is other programs'
    memory_free: int | None = None  # bytes that can be taken without swapping
    watts: float | None = None  # that the battery gives at this moment
    joules: float | None = None  # that the processor has used so far: only differences mean anything
    pressure: str | None = None  # macOS: "nominal", "fair", "serious" or "critical"
    slowdown: float | None = None  # a one-row pass now, over the quickest seen with as many threads


Objective = Literal["speed", "energy"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What rounds may spend.

    `threads` are for passes of one row and of several, (0, 0) leaves them alone. With `objective` "energy"
    guesses must pay in processor time, not in wall time. `rest` is the pause after each round as a share of
    the round's own time.
    """

    max_draft: int = 31
    model_draft: bool = True
    threads: tuple[int, int] = (0, 0)
    objective: Objective = "speed"
    rest: float = 0.0


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """What other generations have in the same batch: how many they are, and their rows."""

    generations: int = 0
    rows: int = 0


ALONE = SharedBatch()


@dataclass(frozen=True, slots=True)
class Round:
    """One round's outcome: 1 to drafted + 1 tokens, and what they cost in seconds of wall time.

    `seconds` runs from asking the drafter to the verdict. `drafting` and `waiting` (for the target's logits)
    are parts of it; what remains is Edgespec's own bookkeeping. `done`: the last token ends the generation.
    `tokens` are the accepted ones of `draft`, then the target's own. `shared` is what other generations had
    in the same batch, and `shared_tokens` what it yielded them. `timed`: `waiting` is the cost of the whole
    batch; false where prompts were evaluated in it, or where another of its rounds has the cost.
    """

    tokens: tuple[int, ...]
    draft: Draft
    accepted: int
    seconds: float
    drafting: float
    waiting: float
    done: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()
    shared: SharedBatch = ALONE
    shared_tokens: int = 0
    timed: bool = True


class LanguageModel(Protocol):
    """A causal language model with a cache that can forget its end."""

    @property
    def tokens(self) -> Sequence[int]:
        """Exactly what the cache holds. Only `forward` and `rollback` change it."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        """Append `new` (at least one token) to the cache and return the logits of its last `last` tokens.

        Shape [last, vocab_size], 1 <= last <= len(new); a view, valid until the next call. Logits of rows
        not asked for are never computed. Raises Cancelled when stopped from outside, after which `tokens`
        holds any prefix of what it would have held, and ValueError if `new` does not fit.
        """

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens of the cache.

        A model whose memory cannot be cut (recurrent layers) forgets everything instead: `tokens` tells.
        """


class Constraint(Protocol):
    """What a text may go on with: a grammar, followed token by token. Only `accept` moves it.

    All raise EdgespecError when the grammar turns out to be more than it can follow.
    """

    @property
    def finished(self) -> bool:
        """The text is complete: nothing but an end token may follow."""

    def mask(self) -> Mask | None:
        """The tokens allowed next, end tokens among them where the text may end. None: all are.

        It covers the vocabulary at least, and is valid until the next call of any method.
        """

    def accept(self, token: int) -> None:
        """`token`, which the mask allows, is the next one."""

    def forced(self, limit: int, after: Sequence[int] = ()) -> tuple[int, ...]:
        """At most `limit` tokens, each the only one allowed after `after` and those before it."""

    def spelled(self, after: Sequence[int] = ()) -> tuple[int, ...]:
        """Tokens that spell what must follow `after`; not certain, since others may spell more than it."""

    def admits(self, tokens: Sequence[int]) -> int:
        """How many leading ones of `tokens` the masks would allow, one after the other."""


class Drafter(Protocol):
    """Drafts what may come next, in next to no time. Whatever it proposes, the output stays the target's."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """At most `limit` (one or more) tokens that may follow `context`.

        `context` may have changed in any way since the last call; work already done for a common prefix is
        not done again.
        """

    def extend(self, drafted: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens after the last `context` and the `drafted` tokens of another."""
        return Draft()


class CostlyDrafter(Protocol):
    """A drafter that takes time: a planner asks it only where that is expected to pay.

    `costs` has the seconds of its forward passes, `source` names it in drafts. `agreed` compares its own
    choice with tokens that it evaluated and the target had chosen: those right and those compared, of the
    last prefill.
    """

    source: str
    costs: CostCurve
    agreed: tuple[int, int]

    def lag(self, context: Sequence[int]) -> int:
        """How many tokens it would have to evaluate before its first draft token, at least one."""

    def reads_whole(self, context: Sequence[int]) -> bool:
        """Whether it evaluates all of `context`, and not only its end."""

    def draft(
        self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool], own: int = 0
    ) -> Draft:
        """At most `limit` tokens after `context`, as long as `more(confidence of those so far)` is true.

        The last `own` tokens of `context` are the target's. `more` sees how sure the drafter was, never
        what it drew: a decision that saw the token and dropped it would bias the ratio rule.
        """

    def begin_ahead(self, text: Sequence[int], most: int) -> None:
        """Go on after `text` by at most `most` tokens while the target verifies."""

    def stop_ahead(self) -> None:
        """Stop that: its model is free afterwards."""


class Controller(Protocol):
    """Decides how far to draft in each round of one generation, and learns from the outcome.

    The rows of its drafts, padding included, are at most limit + 1. `shared` is what other generations have
    in the same batch.
    """

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        """The draft of the next round."""

    def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
        """Instead of `propose`, where several generations share a batch: the round has what is kept of it."""

    def observe(self, round_: Round) -> None:
        """Called once after each round."""

    def apply_budget(self, budget: Budget, costs: CostCurve) -> None:
        """From the next round on spend what `budget` allows; `costs` are the target's from now on."""

    def stop_ahead(self) -> None:
        """Called when the generation is over: nothing may use its models afterwards."""


Done = Callable[[int], bool]
"""Asked once for every token in order as it becomes final: is it the last one?"""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens `a` and `b` share."""
    n = min(len(a), len(b))
    step = 1024
    for start in range(0, n, step):
        stop = min(start + step, n)
        if list(a[start:stop]) != list(b[start:stop]):
            return next(i for i in range(start, stop) if a[i] != b[i])
    return n
