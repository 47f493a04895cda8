"""Settings, penalties, randomness, log-probabilities; `distribution` meets its reference in test_verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import EdgespecError, Mask
from edgespec.sampling import Sampler, Sampling, largest, token_logprob

ROW = np.array([1.0, -2.0, 0.5, 3.0, -0.5], np.float32)


def realistic_row(size: int = 150_000, seed: int = 0) -> npt.NDArray[np.float32]:
    """A peaked row: noise, and a few tokens far above it."""
    rng = np.random.default_rng(seed)
    row = rng.normal(0.0, 2.0, size).astype(np.float32)
    row[rng.integers(0, size, 50)] += np.linspace(10.0, 20.0, 50, dtype=np.float32)
    return row


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 20_000),
    st.integers(1, 300),
    st.sampled_from([1, 3, 1000, 10**9]),
    st.sampled_from([0.0, 0.1, 0.999, 1.0]),
    st.integers(0, 10_000),
    st.sampled_from([np.float32, np.float64]),
)
def test_largest_is_a_stable_full_sort(
    size: int, k: int, levels: int, lost: float, seed: int, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, size).astype(dtype)
    values[rng.random(size) < lost] = -np.inf
    assert largest(values, k).tolist() == sorted(sorted(range(size), key=lambda i: -values[i])[:k])


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("top_k", [0, 4])
def test_a_tiny_temperature_leaves_the_likeliest(temperature: float, top_k: int) -> None:
    row = np.array([0.0, 7.0, 6.75, 7.0, -np.inf, -3e38], np.float32)
    p = Sampler(Sampling(temperature, top_k=top_k)).distribution(row)
    assert [p.prob(t) for t in range(6)] == [0.0, 0.5, 0.0, 0.5, 0.0, 0.0]


def test_a_huge_temperature_forgets_the_scores() -> None:
    p = Sampler(Sampling(100.0)).distribution(np.linspace(0.0, 0.1, 5000, dtype=np.float32))
    assert p.probs == pytest.approx(np.full(5000, 1 / 5000), rel=2e-3)


@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7),
        Sampling(1.0, 40, 0.9, 0.1),
        Sampling(1.0, repetition_penalty=1.2, logit_bias={2: 4.0}),
    ],
    ids=["greedy", "temperature", "truncated", "penalties"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float, sampling: Sampling, size: int) -> None:
    for at in (0, size // 2, size - 1):
        row = np.zeros(size, np.float32)
        row[at] = bad
        with pytest.raises(EdgespecError, match="logits are not numbers"):
            Sampler(sampling, [0, 1]).distribution(row)
    with pytest.raises(EdgespecError, match="logits are not numbers"):
        Sampler(sampling, [0, 1]).distribution(np.full(size, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 100.5, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, 101.0, math.nan]),
        ("frequency_penalty", [-101.0, 101.0, math.nan]),
        ("presence_penalty", [-101.0, 101.0, math.nan]),
        ("seed", [-1]),
        ("logprobs", [-1, 101]),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {1: 1e39}, {-1: 2.0}, {1: 1.0, 2: math.nan}]),
    ],
)
def test_an_invalid_setting_is_named(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(EdgespecError, match=f"^{name} is .*: it must be .+"):
            Sampling(**{name: value})


def test_the_edges_of_every_setting_are_valid() -> None:
    low = Sampling(0.0, 0, 1e-9, 0.0, 1e-3, -100.0, -100.0, {0: -math.inf}, 0, 0)
    high = Sampling(100.0, 10**6, 1.0, 1.0, 100.0, 100.0, 100.0, {10**9: 1000.0}, 2**63, 100)
    for sampling in (low, high):
        assert Sampler(sampling).distribution(ROW).prob(3) > 0.0


def logits(sampler: Sampler) -> list[float]:
    """What the sampler makes of ROW, up to a constant: its logarithm at temperature 1, minus token 4's."""
    p = sampler.distribution(ROW)
    return [math.log(p.prob(t) / p.prob(4)) + float(ROW[4]) for t in range(5)]


def test_the_repetition_penalty_counts_prompt_and_answer_once() -> None:
    sampler = Sampler(Sampling(1.0, repetition_penalty=2.0), [0, 1, 0, 0])
    assert logits(sampler) == pytest.approx([0.5, -4.0, 0.5, 3.0, -0.5], abs=1e-5)
    for token in (2, 2, 0):
        sampler.accept(token, ROW)
    assert logits(sampler) == pytest.approx([0.5, -4.0, 0.25, 3.0, -0.5], abs=1e-5)


def test_frequency_and_presence_count_the_answer_alone() -> None:
    sampler = Sampler(Sampling(1.0, frequency_penalty=0.5, presence_penalty=0.25), [0, 1, 3, 3])
    assert logits(sampler) == pytest.approx(ROW.tolist(), abs=1e-5)
    for token in (3, 2, 3, 1):
        sampler.accept(token, ROW)
    assert logits(sampler) == pytest.approx([1.0, -2.75, -0.25, 1.75, -0.5], abs=1e-5)


def test_penalties_count_thousands_of_tokens() -> None:
    sampler = Sampler(Sampling(1.0, presence_penalty=1.0), range(3))
    row = np.zeros(3000, np.float32)
    for token in range(0, 2000, 2):
        sampler.accept(token, row)
    p = sampler.distribution(row)
    counted = p.probs < p.prob(1) * 0.9
    assert np.flatnonzero(counted).tolist() == list(range(0, 2000, 2))


def test_a_bias_is_added_where_there_is_a_token() -> None:
    sampler = Sampler(Sampling(1.0, logit_bias={1: 2.5, 3: -1.0, 5: 9.0, 10**12: 9.0}))
    assert logits(sampler) == pytest.approx([1.0, 0.5, 0.5, 2.0, -0.5], abs=1e-5)


def test_the_row_is_not_changed() -> None:
    sampling = Sampling(0.7, 3, 0.9, 0.05, 1.3, 0.4, 0.2, {0: -1.0, 2: -math.inf}, 1, 2)
    row = ROW.copy()
    row.flags.writeable = False  # writing to it raises
    sampler = Sampler(sampling, [0, 3])
    for token in (3, 1, 3):
        assert sampler.distribution(row).prob(token) >= 0.0
        sampler.accept(token, row)
    assert row.tolist() == ROW.tolist()


def test_a_seed_repeats_the_numbers_and_none_does_not() -> None:
    def numbers(seed: int | None) -> list[float]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.uniform() for _ in range(50)]

    assert numbers(7) == numbers(7)
    assert numbers(7) != numbers(8)
    assert numbers(None) != numbers(None)
    assert all(0.0 <= u < 1.0 for u in numbers(7))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-640, 640).map(lambda n: n / 8), min_size=1, max_size=60),
    st.integers(0, 70),
    st.data(),
)
def test_logprobs_are_the_plain_log_softmax(values: list[float], top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    exact = np.array(values, np.float64)
    exact -= exact.max() + math.log(np.exp(exact - exact.max()).sum())
    got = token_logprob(np.array(values, np.float32), token, top)
    assert got.token == token
    assert got.logprob == pytest.approx(exact[token], abs=2e-5)
    ranked = sorted(range(len(values)), key=lambda t: (-values[t], t))[:top]
    assert [t for t, _ in got.top] == ranked
    assert [p for _, p in got.top] == pytest.approx(exact[ranked], abs=2e-5)


def test_logprobs_of_a_whole_vocabulary() -> None:
    row = realistic_row()
    exact = row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64))
    best = int(row.argmax())
    got = token_logprob(row, best, 3)
    assert got.logprob == pytest.approx(exact[best], abs=1e-5)
    assert [t for t, _ in got.top] == np.argsort(-row)[:3].tolist()
    masked = token_logprob(np.array([0.0, -np.inf], np.float32), 1, 1)
    assert (masked.logprob, masked.top) == (-math.inf, ((0, 0.0),))


def test_accepted_tokens_are_scored_before_any_setting() -> None:
    sampler = Sampler(Sampling(0.5, 1, repetition_penalty=3.0, logit_bias={3: -50.0}, logprobs=1))
    sampler.accept(3, ROW)
    sampler.accept(0, ROW)
    assert sampler.logprobs == [token_logprob(ROW, 3, 1), token_logprob(ROW, 0, 1)]
    assert sampler.logprobs[0].top[0][0] == 3


class Masked:
    """A Constraint that always allows the same tokens."""

    finished = False

    def __init__(self, allowed: Sequence[int] | None, size: int) -> None:
        self.accepted: list[int] = []
        self._mask = None
        if allowed is not None:
            bits = np.zeros(32 * -(-size // 32), np.uint8)
            bits[list(allowed)] = 1
            self._mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    def mask(self) -> Mask | None:
        return self._mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def forced(self, limit: int, after: Sequence[int] = ()) -> tuple[int, ...]:
        return ()

    def spelled(self, after: Sequence[int] = ()) -> tuple[int, ...]:
        return ()

    def admits(self, tokens: Sequence[int]) -> int:
        return len(tokens)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([3, 31, 32, 33, 64, 1000]),
    st.sampled_from([0.01, 0.3, 0.7, 0.99]),
    st.integers(0, 10_000),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 3.0]),
        top_k=st.sampled_from([0, 1, 5, 2000]),
        top_p=st.sampled_from([0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 2.0]),
        logit_bias=st.dictionaries(st.integers(0, 2), st.sampled_from([-4.0, 0.5, 9.0])),
    ),
)
def test_a_mask_is_minus_infinity_for_what_it_refuses(
    size: int, share: float, seed: int, sampling: Sampling
) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.integers(-40, 40, size) / 4).astype(np.float32)
    allowed = sorted({int(rng.integers(size)), *np.flatnonzero(rng.random(size) < share).tolist()})
    dense = np.full(size, -np.inf, np.float32)
    biased = row.copy()
    free = Sampler(sampling, [0, 1])
    if sampling.changes_logits:
        biased = free._adjusted(row)
    dense[allowed] = biased[allowed]
    settled = replace(sampling, repetition_penalty=1.0, logit_bias={})
    want = Sampler(settled).distribution(dense)
    got = Sampler(sampling, [0, 1], Masked(allowed, size)).distribution(row)
    np.testing.assert_allclose(
        [got.prob(t) for t in range(size)], [want.prob(t) for t in range(size)], rtol=1e-5, atol=1e-7
    )
    assert (np.diff(got.ids) > 0).all()
    assert got.probs.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)


def test_one_token_allowed_is_certain_whatever_the_model_says() -> None:
    for row in (ROW, np.full(5, np.nan, np.float32), np.full(5, -np.inf, np.float32)):
        for token in range(5):
            for sampling in (Sampling(), Sampling(2.0, logit_bias={token: -math.inf})):
                p = Sampler(sampling, (), Masked([token], 5)).distribution(row)
                assert (p.ids.tolist(), p.probs.tolist()) == ([token], [1.0])


def test_no_token_allowed_is_an_error() -> None:
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(EdgespecError, match="allows no token here"):
            Sampler(sampling, (), Masked([], 5)).distribution(ROW)
        banned = replace(sampling, logit_bias={1: -math.inf, 2: -math.inf})
        with pytest.raises(EdgespecError, match="logit_bias forbids every token"):
            Sampler(banned, (), Masked([1, 2], 5)).distribution(ROW)
        with pytest.raises(EdgespecError, match="logits are not numbers"):
            Sampler(sampling, (), Masked([1, 2], 5)).distribution(np.full(5, np.nan, np.float32))


def test_without_a_mask_a_constraint_only_follows() -> None:
    constraint = Masked(None, 5)
    sampler = Sampler(Sampling(0.7, logprobs=1), (), constraint)
    free = Sampler(Sampling(0.7))
    assert sampler.distribution(ROW).probs.tolist() == free.distribution(ROW).probs.tolist()
    sampler.accept(3, ROW)
    sampler.accept(1, ROW)
    assert constraint.accepted == [3, 1]


def test_logprobs_are_those_of_the_row_before_the_mask() -> None:
    sampler = Sampler(Sampling(logprobs=2), (), Masked([0, 1], 5))
    assert sampler.distribution(ROW).ids.tolist() == [0]
    sampler.accept(0, ROW)
    assert sampler.logprobs == [token_logprob(ROW, 0, 2)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, top_k=40),
        Sampling(0.8, top_p=0.95),
        Sampling(0.8, min_p=0.05),
        Sampling(0.8, 40, 0.95, 0.05, 1.1, 0.1, 0.1, {5: 1.0}),
    ],
    ids=["greedy", "top-k", "top-p", "min-p", "all"],
)
def test_a_vocabulary_is_never_sorted(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(sort: Callable[..., object]) -> Callable[..., object]:
        def call(values: npt.NDArray[np.floating], *args: object, **named: object) -> object:
            sizes.append(len(values))
            return sort(values, *args, **named)

        return call

    for name in ("sort", "argsort", "partition", "argpartition", "unique", "lexsort"):
        monkeypatch.setattr(np, name, watched(getattr(np, name)))
    row = realistic_row().view(Unsorted)
    sampler = Sampler(sampling, range(2000))
    p = sampler.distribution(row)
    sampler.accept(int(p.ids[0]), row)
    assert len(p.ids) <= 50
    assert max(sizes, default=0) < 5000
    assert bool(sizes) == bool(sampling.top_k or sampling.top_p < 1.0)


class Unsorted(np.ndarray):
    """A row whose own methods refuse to sort it whole."""

    def _refuse(self, *args: object, **named: object) -> None:
        assert self.size < 5000
        np.ndarray.sort(self, *args, **named)

    sort = _refuse

    def argsort(self, *args: object, **named: object) -> object:
        assert self.size < 5000
        return super().argsort(*args, **named)

    def partition(self, *args: object, **named: object) -> None:
        assert self.size < 5000
        super().partition(*args, **named)
