"""A distribution gives each token its share of the uniform numbers, at any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import Distribution

ALMOST_ONE = 1.0 - 2.0**-53  # the largest number random() returns


def make(size: int, seed: int, zeros: float, dtype: type) -> Distribution:
    """Probabilities over ids that are not their own positions, some of them zero."""
    rng = np.random.default_rng(seed)
    probs = rng.exponential(size=size) ** 4 + 1e-9
    probs[rng.random(size) < zeros] = 0.0
    probs[rng.integers(size)] = 1.0
    return Distribution(np.arange(size) * 3 + 1, (probs / probs.sum()).astype(dtype))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 1280, 1281, 150_000])),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([np.float32, np.float64]),
    st.lists(st.floats(0.0, ALMOST_ONE), max_size=20),
)
def test_sampling_inverts_the_cumulative_distribution(
    size: int, seed: int, zeros: float, dtype: type, uniforms: list[float]
) -> None:
    p = make(size, seed, zeros, dtype)
    above = p.probs.cumsum(dtype=np.float64)
    above /= above[-1]
    for uniform in (0.0, 0.5, ALMOST_ONE, *uniforms):
        token = p.sample(uniform)
        i = token // 3
        assert p.ids[i] == token
        assert p.probs[i] > 0
        rounding = 1e-6 if size > 1024 and dtype is np.float32 else 1e-12
        assert (above[i - 1] if i else 0.0) <= uniform + rounding
        assert uniform < above[i] + rounding


def test_small_shares_are_exact() -> None:
    p = Distribution(np.array([2, 5, 9, 11]), np.array([0.25, 0.0, 0.5, 0.25]))
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, ALMOST_ONE]
    assert [p.sample(u) for u in uniforms] == [2, 2, 9, 9, 11, 11]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("at", [0, 255, 256, 77_777, 149_999])
def test_one_token_in_150_000(at: int, dtype: type) -> None:
    probs = np.zeros(150_000, dtype)
    probs[at] = 1.0
    p = Distribution(np.arange(150_000), probs)
    assert {p.sample(u) for u in (0.0, 0.3, ALMOST_ONE)} == {at}


def test_the_end_of_a_block_is_never_a_token_without_probability() -> None:
    # Float32 sums of blocks round otherwise than the float64 sums within: the walk may leave a block.
    rng = np.random.default_rng(1)
    probs = rng.random((8, 256)).astype(np.float32)
    probs[:, 200:] = 0.0
    p = Distribution(np.arange(2048), probs.ravel() / probs.sum(dtype=np.float64))
    p = Distribution(p.ids, p.probs.astype(np.float32))
    edges = np.add.reduceat(p.probs, np.arange(0, 2048, 256)).cumsum(dtype=np.float64)
    for edge in edges / edges[-1]:
        for uniform in edge + np.arange(-40, 40) * 2.0**-30:
            if 0.0 <= uniform < 1.0:
                assert p.prob(p.sample(float(uniform))) > 0.0


def test_probabilities_need_not_sum_to_one() -> None:
    p = Distribution(np.array([0, 1]), np.array([3.0, 1.0]))
    assert [p.sample(u) for u in (0.0, 0.74, 0.76)] == [0, 0, 1]


def test_prob_is_zero_for_all_other_tokens() -> None:
    p = Distribution(np.array([2, 5]), np.array([0.25, 0.75]))
    assert [p.prob(t) for t in (-1, 0, 2, 3, 5, 6, 10**9)] == [0, 0, 0.25, 0, 0.75, 0, 0]


@pytest.mark.parametrize("size", [7, 3000])
def test_shares_are_right_in_the_mean(size: int) -> None:
    p = make(size, 3, 0.3, np.float32)
    count = 20_000
    found = np.zeros(size)
    for i in range(count):  # evenly spread uniforms: every share is met within one
        found[p.sample((i + 0.5) / count) // 3] += 1
    assert np.abs(found - p.probs * count).max() <= 1.01
