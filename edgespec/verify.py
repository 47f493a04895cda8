"""The two acceptance rules of speculative decoding.

With both, the output is distributed exactly as the target's own (Leviathan et al. 2023, Chen et al. 2023). p
is the target's final distribution, with temperature, truncation, penalties and masks applied along the
accepted path; q is the distribution that the drafter sampled from.
"""

from __future__ import annotations

import numpy as np

from edgespec.core import Distribution, Done, Draft, Logits, Verdict
from edgespec.sampling import Sampler


def verify(draft: Draft, logits: Logits, sampler: Sampler, done: Done) -> Verdict:
    """Accept draft tokens from the left, up to the first one that the target does not choose.

    `logits` has shape [len(draft.tokens) + 1, vocab]: row i follows draft.tokens[:i]. Rows after the first
    rejection are not read. `sampler` and `done` get every final token once, in order.
    """
    for i, drafted in enumerate((*draft.tokens, None)):
        p = sampler.distribution(logits[i])
        if drafted is None or draft.probs is None:
            # Sampling from p and comparing is the point-mass rule: the token is accepted with probability
            # p(token), and its replacement has p's distribution without it. It takes one random number for
            # any draft.
            token = p.sample(sampler.uniform())
        else:
            token = choose(p, draft.probs[i], drafted, sampler)
        sampler.accept(token, logits[i])
        ended = done(token)
        if ended or token != drafted:
            return Verdict(i, token, ended)
    raise AssertionError("the last row has no draft token to agree with")


def choose(p: Distribution, q: Distribution, token: int, sampler: Sampler) -> int:
    """Apply the ratio rule: `token`, sampled from q, with probability min(1, p/q), else a residual token."""
    if sampler.uniform() * q.prob(token) < p.prob(token):
        return token
    return residual(p, q).sample(sampler.uniform())


def residual(p: Distribution, q: Distribution) -> Distribution:
    """Return max(0, p - q), not normalized; p itself where rounding leaves nothing."""
    rest = p.probs.astype(np.float64)
    if p.ids is q.ids:
        rest -= q.probs
    else:
        at = p.ids.searchsorted(q.ids)
        at[at == len(p.ids)] = 0
        shared = p.ids[at] == q.ids
        rest[at[shared]] -= q.probs[shared]
    np.maximum(rest, 0.0, out=rest)
    return Distribution(p.ids, rest) if rest.any() else p
