"""Lossless (b): drafted or not, tokens have the target's distribution. Wrong rules are shown to be caught.

The expected probabilities come from `reference`, a brute-force final distribution that shares no code with
`sampling`; `Sampler.distribution` is compared with it here too.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgespec.verify as rules
from edgespec.core import Distribution, Draft, Mask
from edgespec.fakes import noise_script
from edgespec.grammar_drafting import GrammarDrafter
from edgespec.sampling import Row, Sampler, Sampling

VOCAB, LENGTH = 12, 3
PROMPT = (3, 5, 3, 8)
Path = tuple[int, ...]
Drafting = Callable[[Path, int], Draft]


def reference(
    row: Sequence[float],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    nudge: float = 0.0,
) -> list[float]:
    """The final distribution as the documentation words it: float64, a full sort, one token at a time.

    A positive `nudge` loosens the top-p and min-p thresholds, to tell where rounding could decide.
    """
    scores = [float(score) for score in row]
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= sampling.frequency_penalty * list(answer).count(token)
        scores[token] -= sampling.presence_penalty * (token in answer)
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    if sampling.temperature == 0.0:
        return [float(token == ranked[0]) for token in range(len(scores))]
    kept = ranked[: sampling.top_k or None]
    peak = scores[ranked[0]]
    weights = {token: math.exp((scores[token] - peak) / sampling.temperature) for token in kept}
    total, reached = sum(weights.values()), 0.0
    nucleus = []
    for token in kept:
        if nucleus and sampling.top_p < 1.0 and reached >= sampling.top_p + nudge:
            break
        nucleus.append(token)
        reached += weights[token] / total
    threshold = min(sampling.min_p - nudge, 1.0)  # the likeliest weighs 1
    final = {token: weights[token] for token in nucleus if weights[token] >= threshold}
    return [final.get(token, 0.0) / sum(final.values()) for token in range(len(scores))]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(3, 40), st.sampled_from([300, 5000])),
    st.integers(0, 10_000),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0, 100.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 7, 40, 6000]),
        top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.95, 0.999, 1.0, 1.0]),
        min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 0.5, 2.0, 8.0]),
        frequency_penalty=st.sampled_from([0.0, 0.5, -1.25]),
        presence_penalty=st.sampled_from([0.0, 1.5, -0.25]),
        logit_bias=st.dictionaries(st.integers(0, 1), st.sampled_from([-math.inf, -4.0, 0.5, 6.0])),
    ),
    st.lists(st.integers(0, 1), max_size=4),
    st.lists(st.integers(0, 1), max_size=4),
)
def test_distribution_is_the_reference(
    size: int, seed: int, sampling: Sampling, prompt: list[int], answer: list[int]
) -> None:
    # Every number is a multiple of 1/32 in float32 too, so ties are ties in both, and there are many.
    rng = np.random.default_rng(seed)
    row = (rng.integers(-40, 40, size) / 4).astype(np.float32)
    row[rng.random(size) < rng.choice([0.0, 0.5])] = -np.inf
    row[rng.integers(size)] = 9.0
    row[-1] = 3.0  # one that no bias forbids
    sampler = Sampler(sampling, prompt)
    for token in answer:
        sampler.accept(token, row)
    got = sampler.distribution(row)
    exact, loose, tight = (reference(row, sampling, prompt, answer, nudge) for nudge in (0.0, 1e-5, -1e-5))
    support = set(got.ids.tolist())
    assert {t for t, p in enumerate(tight) if p > 1e-30} <= support
    assert {t for t in support if got.prob(t) > 0} <= {t for t, p in enumerate(loose) if p > 0}
    assert (np.diff(got.ids) > 0).all()
    assert got.probs.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)
    if loose == tight:
        np.testing.assert_allclose([got.prob(t) for t in range(size)], exact, rtol=1e-4, atol=1e-7)


target_script = noise_script(VOCAB, seed=11, memory=2, scale=1.2)
draft_script = noise_script(VOCAB, seed=12, memory=2, scale=1.2)
PENALTIES = {"repetition_penalty": 1.5, "frequency_penalty": 0.6, "presence_penalty": 0.4}
SETTINGS = {
    "temperature": Sampling(1.4),
    "top-k": Sampling(0.9, top_k=5),
    "top-p": Sampling(1.1, top_p=0.8),
    "min-p": Sampling(1.2, min_p=0.15),
    "penalties": Sampling(1.0, **PENALTIES),
    "all": Sampling(1.3, 8, 0.9, 0.06, **PENALTIES, logit_bias={0: 1.5, 4: -2.0, 7: -math.inf}),
}
TEXTS = 36_000  # for each setting and rule: 216,000 texts a rule


@cache
def target_row(path: Path) -> Row:
    return np.array(target_script([*PROMPT, *path]), np.float32)


class Paths:
    """What verify asks of a Sampler; the distribution of a row after a path is computed once."""

    def __init__(self, sampling: Sampling, seed: int, grammar: bool = False) -> None:
        self.uniform = random.Random(seed).random
        self.path: Path = ()
        self._sampling = sampling
        self._grammar = grammar
        self._known: dict[tuple[Path, bytes], Distribution] = {}

    def accept(self, token: int, row: Row) -> None:
        assert row is target_row(self.path)
        self.path += (token,)

    def distribution(self, row: Row) -> Distribution:
        key = self.path, row.tobytes()
        if key not in self._known:
            sampler = Sampler(self._sampling, PROMPT, TwoThirds() if self._grammar else None)
            for token in self.path:
                sampler.accept(token, row)
            self._known[key] = sampler.distribution(row)
        return self._known[key]


class TwoThirds:
    """A Constraint that refuses every third token, others after each path."""

    finished = False

    def __init__(self, path: Path = ()) -> None:
        self.path = path

    def allowed(self, path: Path) -> list[bool]:
        return [(token + sum(path) + len(path)) % 3 > 0 for token in range(VOCAB)]

    def mask(self) -> Mask:
        bits = sum(1 << token for token, good in enumerate(self.allowed(self.path)) if good)
        return np.array([bits], np.uint32)

    def accept(self, token: int) -> None:
        assert self.allowed(self.path)[token]
        self.path += (token,)

    def forced(self, limit: int, after: Sequence[int] = ()) -> Path:
        return ()

    def spelled(self, after: Sequence[int] = ()) -> tuple[int, ...]:
        return ()

    def admits(self, tokens: Sequence[int]) -> int:
        good = [self.allowed(self.path + tuple(tokens[:i]))[token] for i, token in enumerate(tokens)]
        return [*good, False].index(False)


class Sampled:
    """Drafts sampled from q: the draft model at a temperature of its own, truncated in its own way."""

    def __init__(self, sampling: Sampling, seed: int = 5) -> None:
        self._sampler, self._uniform = Sampler(sampling), random.Random(seed).random
        self.q = cache(self._q)

    def _q(self, path: Path) -> tuple[Distribution, list[float]]:
        q = self._sampler.distribution(np.array(draft_script([*PROMPT, *path]), np.float32))
        return q, (q.probs.cumsum(dtype=np.float64) / q.probs.sum(dtype=np.float64)).tolist()

    def __call__(self, path: Path, limit: int) -> Draft:
        tokens: Path = ()
        probs: tuple[Distribution, ...] = ()
        while len(tokens) < limit:
            q, cumulative = self.q(path + tokens)
            at = min(bisect_right(cumulative, self._uniform()), len(cumulative) - 1)
            tokens, probs = (*tokens, int(q.ids[at])), (*probs, q)
        return Draft(tokens, (1.0,) * len(tokens), probs=probs)


# p keeps tokens that this q never drafts, and under top-k, top-p and min-p q drafts tokens that p forbids.
RATIO = Sampled(Sampling(0.8, top_k=7))
WHOLE = Sampled(Sampling(0.8))


def point_mass(path: Path, limit: int) -> Draft:
    """Drafted tokens without q: drawn at random, so good, bad and impossible ones are among them."""
    return Draft(RATIO(path, limit).tokens, (1.0,) * limit)


def texts(draft: Drafting, sampling: Sampling, count: int, grammar: bool = False) -> Counter[Path]:
    """`count` texts of LENGTH tokens, decoded round by round with drafts as long as there is room for."""
    sampler, found = Paths(sampling, seed=1, grammar=grammar), Counter[Path]()
    for _ in range(count):
        sampler.path = start = ()
        while len(start) < LENGTH:
            one = draft(start, LENGTH - len(start) - 1)
            rows = [target_row(start + one.tokens[:i]) for i in range(len(one.tokens) + 1)]
            verdict = rules.verify(one, rows, sampler, lambda token: False)
            start += (*one.tokens[: verdict.accepted], verdict.next)
            assert sampler.path == start
        found[start] += 1
    return found


@cache
def expected(name: str, grammar: bool = False) -> dict[Path, float]:
    """The probability of every text of LENGTH tokens."""

    def row(path: Path) -> list[float]:
        good = TwoThirds().allowed(path) if grammar else [True] * VOCAB
        return [score if fine else -math.inf for score, fine in zip(target_row(path), good, strict=True)]

    probs: dict[Path, float] = {(): 1.0}
    for _ in range(LENGTH):
        probs = {
            (*path, token): before * p
            for path, before in probs.items()
            for token, p in enumerate(reference(row(path), SETTINGS[name], PROMPT, path))
            if p > 0
        }
    assert math.isclose(sum(probs.values()), 1.0)
    return probs


def surprise(found: Counter[Path], probs: dict[Path, float]) -> float:
    """Pearson's chi-squared over all texts, as a standard normal deviate (5 is one in 3 million).

    Texts expected fewer than 5 times share one cell. Wilson and Hilferty (1931): the cube root of
    chi-squared over its degrees of freedom df is about normal, with mean 1 - 2/(9 df) and variance 2/(9 df).
    """
    if not found.keys() <= probs.keys():
        return math.inf
    count = found.total()
    cells = [(found[path], p * count) for path, p in probs.items() if p * count >= 5]
    cells.append((count - sum(n for n, _ in cells), count - sum(e for _, e in cells)))
    cells = [(n, e) for n, e in cells if e >= 5]
    df = len(cells) - 1
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("draft", [point_mass, RATIO], ids=["point mass", "ratio"])
def test_texts_have_the_targets_distribution(draft: Drafting, name: str) -> None:
    assert abs(surprise(texts(draft, SETTINGS[name], TEXTS), expected(name))) < 4.5


def test_drafts_reach_beyond_p_and_p_beyond_drafts() -> None:
    p = {t for t, prob in enumerate(reference(target_row(()), SETTINGS["top-k"], PROMPT)) if prob}
    q = set(RATIO.q(())[0].ids.tolist())
    assert p - q
    assert q - p
    assert p & q


def dropping(path: Path, limit: int) -> Draft:
    """Wrong: drafts end before a token that came out improbable."""
    draft = RATIO(path, limit)
    assert draft.probs is not None
    good = [q.prob(t) >= 0.2 for t, q in zip(draft.tokens, draft.probs, strict=True)]
    n = (*good, False).index(False)
    return Draft(draft.tokens[:n], draft.confidence[:n], probs=draft.probs[:n])


def unnormalised(path: Path, limit: int) -> Draft:
    """Wrong: q before truncation, without the renormalisation that sampling from it implies."""
    draft = RATIO(path, limit)
    probs = tuple(WHOLE.q(path + draft.tokens[:i])[0] for i in range(len(draft.tokens)))
    return Draft(draft.tokens, draft.confidence, probs=probs)


def admitted(draft: Drafting) -> Drafting:
    """`draft` as far as it is checked under the grammar."""

    def drafting(path: Path, limit: int) -> Draft:
        grammar = GrammarDrafter(TwoThirds(path))
        lead = grammar.lead(limit)
        room = limit - len(lead.tokens)
        return grammar.completed(lead, draft((*path, *lead.tokens), room), limit) if room else lead

    return drafting


@pytest.mark.parametrize("name", ["temperature", "top-p", "all"])
@pytest.mark.parametrize("draft", [point_mass, RATIO], ids=["point mass", "ratio"])
@pytest.mark.parametrize("cut", [admitted, lambda draft: draft], ids=["cut", "whole"])
def test_texts_under_a_grammar_have_the_masked_distribution(
    draft: Drafting, name: str, cut: Callable[[Drafting], Drafting]
) -> None:
    found = texts(cut(draft), SETTINGS[name], TEXTS, grammar=True)
    assert abs(surprise(found, expected(name, grammar=True))) < 4.5


def refusing(path: Path, limit: int) -> Draft:
    """Wrong: drafts end before the sampled token that the grammar refuses."""
    draft = RATIO(path, limit)
    n = TwoThirds(path).admits(draft.tokens)
    assert draft.probs is not None
    return Draft(draft.tokens[:n], draft.confidence[:n], probs=draft.probs[:n])


@pytest.mark.parametrize("name", ["temperature", "all"])
def test_dropping_what_was_sampled_and_refused_is_seen(name: str) -> None:
    found = texts(refusing, SETTINGS[name], TEXTS, grammar=True)
    assert surprise(found, expected(name, grammar=True)) > 10


def accept_always(p: Distribution, q: Distribution, token: int, sampler: Sampler) -> int:
    return token


def inverted(p: Distribution, q: Distribution, token: int, sampler: Sampler) -> int:
    if sampler.uniform() * p.prob(token) < q.prob(token):
        return token
    return rules.residual(p, q).sample(sampler.uniform())


def one_number(p: Distribution, q: Distribution, token: int, sampler: Sampler) -> int:
    u = sampler.uniform()
    return token if u * q.prob(token) < p.prob(token) else rules.residual(p, q).sample(u)


def point_then_p(p: Distribution, q: Distribution, token: int, sampler: Sampler) -> int:
    """Accepts with probability p(token), but replaces it from all of p."""
    return token if sampler.uniform() < p.prob(token) else p.sample(sampler.uniform())


def certain(path: Path, limit: int) -> Draft:
    """The point-mass drafts, written as distributions."""
    draft = point_mass(path, limit)
    probs = tuple(Distribution(np.array([token]), np.ones(1)) for token in draft.tokens)
    return Draft(draft.tokens, draft.confidence, probs=probs)


WRONG: dict[str, tuple[Drafting, dict[str, object]]] = {
    "drafts cut by the token drawn": (dropping, {}),
    "q not renormalised": (unnormalised, {}),
    "accepts always": (RATIO, {"choose": accept_always}),
    "ratio inverted": (RATIO, {"choose": inverted}),
    "one random number for both": (RATIO, {"choose": one_number}),
    "residual is p": (RATIO, {"residual": lambda p, q: p}),
    "point mass, accepts always": (certain, {"choose": accept_always}),
    "point mass, replaced from p": (certain, {"choose": point_then_p}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["temperature", "all"])
def test_a_wrong_rule_is_seen(wrong: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, patches = WRONG[wrong]
    for attribute, value in patches.items():
        monkeypatch.setattr(rules, attribute, value)
    assert surprise(texts(draft, SETTINGS[name], TEXTS), expected(name)) > 10


def test_a_point_mass_written_as_a_distribution_is_the_same_rule() -> None:
    assert abs(surprise(texts(certain, SETTINGS["all"], TEXTS), expected("all"))) < 4.5


def test_a_shared_vocabulary_does_not_change_the_residual() -> None:
    ids = np.arange(5)
    p, q = np.array([0.5, 0.2, 0.1, 0.1, 0.1]), np.array([0.1, 0.3, 0.3, 0.1, 0.2])
    for q_ids in (ids, ids.copy()):
        rest = rules.residual(Distribution(ids, p), Distribution(q_ids, q))
        assert rest.ids.tolist() == [0, 1, 2, 3, 4]
        assert rest.probs.tolist() == [0.4, 0, 0, 0, 0]
    same = Distribution(ids, p)
    assert rules.residual(same, same) is same  # nothing is left: p itself
    beyond = rules.residual(same, Distribution(np.array([3, 9]), np.array([0.05, 0.95])))
    assert beyond.probs.tolist() == [0.5, 0.2, 0.1, 0.05, 0.1]
    assert p.tolist() == [0.5, 0.2, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("end", [2, 3, 4])
def test_the_walk_ends_with_the_generation(end: int) -> None:
    asked: list[int] = []

    def done(token: int) -> bool:
        asked.append(token)
        return len(asked) == end

    one = (1, 2, 3)
    rows = np.full((4, 6), -9.0, np.float32)
    rows[range(4), (*one, 4)] = 9.0
    verdict = rules.verify(Draft(one, (1.0,) * 3), rows, Sampler(Sampling()), done)
    assert asked == [1, 2, 3, 4][:end]
    assert verdict == rules.Verdict(end - 1, asked[-1], True)


def test_rows_after_a_rejection_are_not_looked_at() -> None:
    rows = np.full((4, 6), np.nan, np.float32)
    rows[:2] = [[9, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0]]
    verdict = rules.verify(Draft((0, 5, 5), (1.0,) * 3), rows, Sampler(Sampling()), lambda token: False)
    assert verdict == rules.Verdict(1, 1, False)
