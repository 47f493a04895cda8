"""The oracle is the shortest time there is, by trying everything on small cases."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.app.bench.oracle import model_runs, shortest, suffix_runs
from edgespec.costs import CostCurve
from edgespec.planner import Chain
from edgespec.retrieval import SuffixDrafter

CURVE = {1: 1.0, 2: 1.9, 3: 2.2, 4: 2.1, 5: 3.0}


def by_trying(
    curve: CostCurve, suffix: Sequence[int], model: Sequence[int], step: float, i: int = 1
) -> float:
    n = len(suffix)
    if i >= n:
        return 0.0
    results = []
    for drafted in range(model[i] + 1):
        extra = suffix[i + drafted] if i + drafted < n else 0
        for k in range(drafted, drafted + extra + 1):
            if k < curve.largest and i + k < n:
                seconds = drafted * step + curve.seconds(curve.size(k + 1, curve.largest))
                results.append(seconds + by_trying(curve, suffix, model, step, i + k + 1))
    return min(results)


runs = st.lists(st.integers(0, 4), min_size=7, max_size=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(runs, runs, st.sampled_from([0.0, 0.1, 0.5]))
def test_nothing_is_shorter(suffix: list[int], model: list[int], step: float) -> None:
    curve = CostCurve(CURVE)
    assert shortest(curve, suffix, model, step) == pytest.approx(by_trying(curve, suffix, model, step))


def test_without_right_drafts_it_is_plain_decoding() -> None:
    assert shortest(CostCurve(CURVE), [0] * 11) == pytest.approx(10.0)
    assert shortest(CostCurve(CURVE), [0]) == 0.0


def test_runs_count_what_would_have_been_right() -> None:
    answer = [1, 2, 3, 4, 1, 2, 9, 3]
    found = suffix_runs([1, 2, 3, 4, 5], answer, Chain(free=[SuffixDrafter()]), 8)
    assert found[1] == 3  # after 1 came 2, 3, 4, and then 5 instead of 1
    assert found[6] == 0
    assert model_runs([1, 2, 0, 4, 1, 2, 9, 3], answer, 3) == [2, 1, 0, 3, 3, 3, 2, 1]
