"""The target's final distribution from its logits, without sorting the vocabulary.

Order: logit bias, penalties, grammar mask, temperature, top-k, top-p, min-p (as in vLLM). A vocabulary has
150,000 entries and one row is processed per token, so every step is a pass or two over a float32 array; only
the few candidates above a threshold are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgespec.core import (
    Constraint,
    Distribution,
    EdgespecError,
    Ids,
    Mask,
    Probs,
    TokenLogprob,
    point_mass,
)

Row = npt.NDArray[np.float32]
"""The logits of one position, float32 [vocab]."""

_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is sampled. The default is greedy.

    temperature 0 takes the most likely token. top_k 0, top_p 1, min_p 0 and penalties of 1, 0 and 0 are off.
    The repetition penalty (Keskar et al. 2019) counts prompt and answer; frequency and presence penalties
    count the answer alone, as OpenAI defines them. `logprobs`: the number of alternatives to report (None:
    off).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN fails every comparison.
        checks = (
            ("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0.0 < self.repetition_penalty <= 100.0,
                "above 0",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                abs(self.frequency_penalty) <= 100.0,
                "-100 to 100",
            ),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100.0, "-100 to 100"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 100, "0 to 100"),
            (
                "logit_bias",
                dict(self.logit_bias),
                all(i >= 0 and (abs(b) <= 1000.0 or b == -math.inf) for i, b in self.logit_bias.items()),
                "a number from -1000 to 1000, or -infinity, for each token id",
            ),
        )
        for name, value, good, allowed in checks:
            if not good:
                raise EdgespecError(f"{name} is {value}: it must be {allowed}")

    @property
    def changes_logits(self) -> bool:
        """Whether a row depends on more than temperature and truncation."""
        return bool(self.logit_bias) or self.has_penalties

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Sampler:
    """The state of one generation: its random numbers, the tokens that penalties count, its grammar.

    Every final token takes its random numbers from one stream in order. Point-mass drafts use one per token
    for any draft, so with a seed the text is the same with and without speculation.
    """

    def __init__(
        self, settings: Sampling, prompt: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        """`constraint` restricts the answer; every accepted token advances it."""
        self.settings = settings
        self.constraint = constraint
        self.logprobs: list[TokenLogprob] = []
        self._uniform = np.random.default_rng(settings.seed).random
        self._every_id = np.empty(0, np.int64)
        self._seen = _Seen(prompt) if settings.has_penalties else None
        self._bias_ids = np.fromiter(settings.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(settings.logit_bias.values(), np.float32)

    def uniform(self) -> float:
        """Return the next random number in [0, 1)."""
        return self._uniform()

    def distribution(self, row: Row) -> Distribution:
        """Return the distribution that the token at this position is sampled from. `row` is not changed.

        Raises EdgespecError if the logits have NaN or only infinities, and if no token is allowed.
        """
        settings = self.settings
        mask = None if self.constraint is None else self.constraint.mask()
        if mask is not None and (only := _only(mask)) is not None:
            return point_mass(only)
        if settings.changes_logits:
            row = self._adjusted(row)
        best = int(row.argmax())
        peak = float(row[best])  # argmax returns a NaN if there is one
        if not math.isfinite(peak):
            raise EdgespecError(
                "the model's logits are not numbers: its file is damaged or its type unsupported"
            )
        greedy = settings.temperature == 0.0 or settings.top_k == 1
        if greedy and (mask is None or _allows(mask, best)):
            return point_mass(best)
        if mask is None:
            ids = self._all_ids(len(row))
        else:
            ids, row = self._masked(mask, row)
            best = int(row.argmax())
            peak = float(row[best])
            if peak == -math.inf:
                raise EdgespecError("logit_bias forbids every token that the grammar allows: relax it")
            if greedy:
                return point_mass(int(ids[best]))
        whole = len(ids)
        if settings.top_k and settings.top_k < whole:
            kept = largest(row, settings.top_k)
            ids, row = ids[kept], row[kept]
        probs = _softmax(row, peak, settings.temperature)
        if settings.top_p < 1.0:
            kept = _nucleus(probs, settings.top_p)
            ids, probs = ids[kept], probs[kept]
        if settings.min_p > 0.0:
            kept = np.flatnonzero(probs >= settings.min_p * probs.max())
            ids, probs = ids[kept], probs[kept]
        return Distribution(ids, probs / probs.sum(dtype=np.float64) if len(ids) < whole else probs)

    def accept(self, token: int, row: Row) -> None:
        """Count `token`, drawn from `row`, as part of the answer."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._seen is not None:
            self._seen.add(token)
        if self.settings.logprobs is not None:
            self.logprobs.append(token_logprob(row, token, self.settings.logprobs))

    def _masked(self, mask: Mask, row: Row) -> tuple[Ids, Row]:
        """Return the allowed ids and logits, or all with -infinity for the others: whichever is less work."""
        if 2 * np.count_nonzero(mask) < len(mask):
            ids = _set(mask, len(row))
            return ids, row[ids]
        row = row.copy()
        row[_set(~mask, len(row))] = -np.inf
        return self._all_ids(len(row)), row

    def _all_ids(self, size: int) -> Ids:
        if len(self._every_id) != size:
            self._every_id = np.arange(size)
        return self._every_id

    def _adjusted(self, row: Row) -> Row:
        row = row.copy()
        inside = self._bias_ids < len(row)
        row[self._bias_ids[inside]] += self._bias[inside]
        if self._seen is not None:
            ids, counts = self._seen.arrays()
            scores, penalty = row[ids], np.float32(self.settings.repetition_penalty)
            scores = np.where(scores > 0, scores / penalty, scores * penalty)
            scores -= np.float32(self.settings.frequency_penalty) * counts
            scores -= np.float32(self.settings.presence_penalty) * (counts > 0)
            row[ids] = scores
        return row


class _Seen:
    """Distinct tokens so far with their counts in the answer, as arrays that grow in place."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._at = {token: i for i, token in enumerate(distinct)}
        self._ids = np.fromiter(distinct, np.int64, len(distinct))
        self._counts = np.zeros(len(distinct), np.float32)

    def add(self, token: int) -> None:
        i = self._at.setdefault(token, len(self._at))
        if i == len(self._ids):
            spare = max(64, i)
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(spare, np.float32)])
        self._ids[i] = token
        self._counts[i] += 1

    def arrays(self) -> tuple[Ids, npt.NDArray[np.float32]]:
        n = len(self._at)
        return self._ids[:n], self._counts[:n]


def _only(mask: Mask) -> int | None:
    """Return the only token that `mask` allows, None if several. Raises EdgespecError if none is."""
    words = mask.nonzero()[0]
    if not len(words):
        raise EdgespecError("the grammar allows no token here: it cannot be completed")
    word = int(mask[words[0]])
    if len(words) > 1 or word & (word - 1):
        return None
    return 32 * int(words[0]) + word.bit_length() - 1


def _allows(mask: Mask, token: int) -> bool:
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def _set(mask: Mask, size: int) -> Ids:
    """Return the ids below `size` whose bit is set, ascending."""
    words = mask.nonzero()[0]
    bits = np.unpackbits(mask[words].astype("<u4").view(np.uint8), bitorder="little").nonzero()[0]
    ids = 32 * words[bits // 32] + bits % 32
    return ids[: ids.searchsorted(size)]


def token_logprob(row: Row, token: int, top: int) -> TokenLogprob:
    """Return natural log-probabilities under the softmax of `row`: of `token` and the `top` most likely."""
    peak = float(row.max())
    norm = peak + math.log(float(np.exp(row - np.float32(peak)).sum(dtype=np.float64)))
    ids = largest(row, top) if top else np.empty(0, np.int64)
    best = sorted(((int(i), float(row[i]) - norm) for i in ids), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, float(row[token]) - norm, tuple(best))


def largest(values: npt.NDArray[np.floating], k: int) -> Ids:
    """Return the indices of the k largest of `values`, ascending; of equal ones the first.

    The k-th largest of the maxima of any k or more disjoint blocks is a lower bound for the k-th largest
    value, so one pass for the maxima and one for the comparison leave a handful of candidates to sort.
    """
    n = len(values)
    if k >= n:
        return np.arange(n)
    width = n // _BLOCKS
    if width < k:
        candidates = np.arange(n)
    else:
        maxima = values[: width * _BLOCKS].reshape(_BLOCKS, width).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(maxima, width - k)[width - k])
    order = np.argsort(-values[candidates], kind="stable")[:k]
    kept = candidates[order]
    kept.sort()
    return kept


def _softmax(row: Row, peak: float, temperature: float) -> Probs:
    # Overflow goes to -infinity, whose exponential is the correct zero. Below 1e-30 the factor itself would
    # be infinite, and the peak's 0 times that NaN.
    with np.errstate(over="ignore"):
        scaled = (row - np.float32(peak)) * np.float32(1.0 / max(temperature, 1e-30))
    np.exp(scaled, out=scaled)
    scaled *= np.float32(1.0 / float(scaled.sum(dtype=np.float64)))
    return scaled


def _nucleus(probs: Probs, top_p: float) -> Ids:
    """Return ascending indices of the fewest most probable entries whose sum reaches top_p, at least one."""
    k = 64
    while True:
        ids = largest(probs, min(k, len(probs)))
        order = ids[np.argsort(-probs[ids], kind="stable")]
        mass = probs[order].cumsum(dtype=np.float64)
        if mass[-1] >= top_p or len(ids) == len(probs):
            kept = order[: int(mass.searchsorted(top_p)) + 1]
            kept.sort()
            return kept
        k *= 8
