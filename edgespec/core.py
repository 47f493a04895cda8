"""The types that everything else uses. Read this file first.

Values are frozen, contracts are Protocols. Nothing here computes: decoding is in `decode`, the acceptance
rule in `verify`, probabilities in `sampling`, draft models in `drafting`.
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
"""Logits, float32 [rows, vocab]; often a view that the next forward pass overwrites."""

Ids = npt.NDArray[np.int64]

Mask = npt.NDArray[np.uint32]
"""The allowed tokens, one bit each: token t is bit t % 32 (0 is the lowest) of word t // 32."""

Probs = npt.NDArray[np.floating]

Progress = Callable[[float], bool]
"""Called with the fraction done, 0 to 1; returns False to stop the work."""
NamedProgress = Callable[[str, float], bool]
"""The same, with the name of the current step as the first argument."""

_BLOCK = 256


class EdgespecError(Exception):
    """An error that the user can fix: one line, `what is wrong: what to do`."""


class Cancelled(Exception):  # noqa: N818 - a control signal like KeyboardInterrupt, not an error
    """A forward pass was stopped on request. The model's `tokens` are still exactly what its cache holds."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The tokens with a probability above zero, and their probabilities.

    `ids` ascend, `probs` are not negative and sum to one; both have shape [n]. A point mass (greedy decoding,
    a token that the grammar forces) has n = 1, so one acceptance rule covers every case. `probs` may be
    float32: sums over it are taken in float64.
    """

    ids: Ids
    probs: Probs

    def prob(self, token: int) -> float:
        """Return the probability of `token`, 0.0 if it is not in `ids`."""
        i = int(self.ids.searchsorted(token))
        return float(self.probs[i]) if i < len(self.ids) and self.ids[i] == token else 0.0

    def sample(self, uniform: float) -> int:
        """Return the token at `uniform` in [0, 1) of the cumulative distribution, in order of token id."""
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
        if i >= len(cumulative):  # rounding at the end: take the last token with a probability above zero
            i = int(np.flatnonzero(self.probs[start:stop])[-1])
        return int(self.ids[start + i])


def point_mass(token: int) -> Distribution:
    """Return the distribution that has only `token`."""
    return Distribution(np.array([token]), np.ones(1))


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens, at most as many as were requested, none if the drafter has no good ones.

    `confidence[i]` is the drafter's estimate that token i is accepted if all before it are, `sources[i]`
    names its drafter. With `probs`, token i was *sampled from* probs[i] and the ratio rule applies; without,
    it is a point mass. `padding` rows after the draft give the batch a cheaper size.
    """

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    sources: tuple[str, ...] = ()
    probs: tuple[Distribution, ...] | None = None
    padding: int = 0

    @property
    def rows(self) -> int:
        """Rows of the batch that verifies it: the context's last token, the draft, the padding."""
        return 1 + len(self.tokens) + self.padding

    def cut(self, kept: int, padding: int = 0) -> Draft:
        """Return the first `kept` tokens."""
        return Draft(
            self.tokens[:kept],
            self.confidence[:kept],
            self.sources[:kept],
            self.probs and self.probs[:kept],
            padding,
        )

    def after(self, start: int) -> Draft:
        """Return the tokens from index `start` on, without padding."""
        return Draft(
            self.tokens[start:],
            self.confidence[start:],
            self.sources[start:],
            self.probs and self.probs[start:],
        )

    def followed_by(self, other: Draft) -> Draft:
        """Return both, without padding. If one has `probs`, the other's tokens are point masses."""
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
    """What a generation would draft if rows were cheap, and the probability of each token; no padding.

    `accept_probs[i]` is the probability that token i is accepted if all before it are. The first `least`
    tokens must not be dropped.
    """

    draft: Draft = Draft()
    accept_probs: tuple[float, ...] = ()
    least: int = 0


@dataclass(frozen=True, slots=True)
class Forward:
    """What a round requests of the target: evaluate the part of the context it lacks, then `draft`.

    The result is the logits of `len(draft) + 1` rows: one after the context, one after each token. `padding`
    more rows may be evaluated with any tokens; their logits are ignored.
    """

    draft: tuple[int, ...]
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a verification: `accepted` draft tokens, then `next` from the target's distribution.

    When an accepted token ends the generation, it is `next` and not counted in `accepted`, so that in every
    case the round's tokens are draft[:accepted] + (next,) and the target's cache lacks exactly `next`.
    """

    accepted: int
    next: int
    done: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability under the target before any sampling setting, and the most likely tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """Sensor values of the machine at `time`, in seconds of a monotonic clock.

    None: the machine does not report the value, or the value reported is not plausible.
    """

    time: float
    celsius: float | None = None  # of the hottest sensor of the processor
    celsius_limit: float | None = None  # that sensor's own limit
    charge: float | None = None  # of the battery, in percent
    plugged: bool | None = None
    seconds_left: float | None = None  # until the battery is empty
    frequency: float | None = None  # of the processor, as a share of its maximum
    load: float | None = None  # share of the cores this process may use that are busy, 0 to 1
    others: float | None = None  # the part of `load` that other programs cause
    memory_free: int | None = None  # bytes that can be taken without swapping
    watts: float | None = None  # that the battery delivers now
    joules: float | None = None  # used by the processor so far: only differences are meaningful
    pressure: str | None = None  # macOS: "nominal", "fair", "serious" or "critical"
    slowdown: float | None = None  # seconds of a one-row pass now, over the fewest seen with as many threads


Objective = Literal["speed", "energy"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The resources that rounds may use.

    `threads` are for passes of one row and of several rows; (0, 0) leaves them unchanged. With `objective`
    "energy" drafts must pay in processor time, not in wall time. `rest` is the pause after each round as a
    share of the round's own time.
    """

    max_draft: int = 31
    model_draft: bool = True
    threads: tuple[int, int] = (0, 0)
    objective: Objective = "speed"
    rest: float = 0.0


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """The other generations in the same batch: their number, and their rows."""

    generations: int = 0
    rows: int = 0


ALONE = SharedBatch()


@dataclass(frozen=True, slots=True)
class Round:
    """The outcome of one round: 1 to drafted + 1 tokens, and their cost in seconds of wall time.

    `seconds` runs from the call of the drafter to the verdict. `drafting` and `waiting` (for the target's
    logits) are parts of it; the rest is Edgespec's own overhead. `done`: the last token ends the generation.
    `tokens` are the accepted ones of `draft`, then the target's own. `shared` is the part of other
    generations in the same batch, and `shared_tokens` the tokens that it yielded them. `timed`: `waiting` is
    the cost of the whole batch; false if the batch contained a prefill, or if another of its rounds has the
    cost.
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
    """A causal language model with a KV cache that can be truncated."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens in the cache. Only `forward` and `rollback` change it."""

    @property
    def vocab_size(self) -> int: ...

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        """Append `new` (at least one token) to the cache and return the logits of its last `last` tokens.

        Shape [last, vocab_size], 1 <= last <= len(new); a view, valid until the next call. Logits of other
        rows are not computed. Raises Cancelled when stopped from outside, after which `tokens` holds any
        prefix of what it would have held, and ValueError if `new` does not fit.
        """

    def rollback(self, length: int) -> None:
        """Remove all but the first `length` tokens from the cache.

        A model whose state cannot be truncated (recurrent layers) removes everything instead: read `tokens`.
        """


class Constraint(Protocol):
    """The tokens that may follow in a generation: a grammar, followed token by token. Only `accept` moves it.

    All methods raise EdgespecError if the grammar is too complex to follow.
    """

    @property
    def finished(self) -> bool:
        """Whether the text is complete: only an end token may follow."""

    def mask(self) -> Mask | None:
        """Return the tokens allowed next, including end tokens where the text may end; None if all are.

        It covers at least the vocabulary, and is valid until the next call of any method.
        """

    def accept(self, token: int) -> None:
        """Append `token`, which the mask must allow."""

    def forced(self, limit: int, after: Sequence[int] = ()) -> tuple[int, ...]:
        """Return at most `limit` tokens, each the only one allowed after `after` and those before it."""

    def spelled(self, after: Sequence[int] = ()) -> tuple[int, ...]:
        """Return tokens that spell what must follow `after`; not certain, as others may spell more."""

    def admits(self, tokens: Sequence[int]) -> int:
        """Return how many of the first of `tokens` the masks would allow, one after the other."""


class Drafter(Protocol):
    """Drafts tokens in negligible time. Whatever it proposes, the output stays the target's."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """Return at most `limit` (one or more) tokens after `context`, in whatever way that changed."""

    def extend(self, drafted: Sequence[int], limit: int) -> Draft:
        """Return at most `limit` tokens after the last `context` and another's `drafted` tokens."""
        return Draft()


class CostlyDrafter(Protocol):
    """A drafter that takes time: a planner asks it only where that is expected to pay.

    `costs` has the seconds of its forward passes, `source` names it in drafts. `agreed` compares its own
    choice with the target's tokens that it evaluated in its last prefill: (equal, compared). One pass drafts
    `block_size` tokens.
    """

    source: str
    costs: CostCurve
    agreed: tuple[int, int]
    block_size: int

    def lag(self, context: Sequence[int]) -> int:
        """Return how many tokens it would have to evaluate before its first draft token, at least one."""

    def reads_whole(self, context: Sequence[int]) -> bool:
        """Whether it evaluates all of `context`, and not only its end."""

    def draft(
        self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool], own: int = 0
    ) -> Draft:
        """Return at most `limit` tokens after `context`, while `more(confidence of those so far)` is true.

        The last `own` tokens of `context` are the target's. `more` gets the drafter's confidence, never the
        token: a decision that saw the token and dropped it would bias the ratio rule.
        """

    def begin_ahead(self, text: Sequence[int], most: int) -> None:
        """Continue after `text` by at most `most` tokens while the target verifies."""

    def stop_ahead(self) -> None:
        """Stop that: the model is free afterwards."""


class Controller(Protocol):
    """Decides how far to draft in each round of one generation, and learns from the outcome.

    The rows of its drafts, padding included, are at most limit + 1. `shared` is the part of other generations
    in the same batch.
    """

    def propose(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> Draft:
        """Return the draft of the next round."""

    def offer(self, context: Sequence[int], limit: int, shared: SharedBatch = ALONE) -> DraftCandidate:
        """Return a candidate, where several generations share a batch; the round has what is kept of it."""

    def observe(self, round_: Round) -> None:
        """Learn from a round. Called once after each."""

    def apply_budget(self, budget: Budget, costs: CostCurve) -> None:
        """Use the resources of `budget` from the next round on; `costs` are the target's from then on."""

    def stop_ahead(self) -> None:
        """Release the drafters' models: the generation is over."""


Done = Callable[[int], bool]
"""Called once for every token in order as it becomes final: whether it is the last one."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first tokens `a` and `b` share."""
    n = min(len(a), len(b))
    step = 1024
    for start in range(0, n, step):
        stop = min(start + step, n)
        if list(a[start:stop]) != list(b[start:stop]):
            return next(i for i in range(start, stop) if a[i] != b[i])
    return n
