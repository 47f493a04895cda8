"""How the rows of a pass are divided: what is best of all divisions, on any curve."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import Draft, Offer
from edgespec.costs import CostCurve
from edgespec.sharing import Sharing

# Sixteen rows cost hardly more than nine, as on processors whose kernels work in blocks.
STEPS = {1: 1.0, 2: 1.9, 3: 2.5, 4: 3.1, 5: 3.9, 6: 4.4, 8: 5.1, 12: 6.1, 16: 5.8, 24: 9.0, 32: 10.2}


def offer(*chances: float, least: int = 0) -> Offer:
    n = len(chances)
    return Offer(Draft(tuple(range(n)), chances, ("x",) * n), chances, least)


def sharing(seconds: dict[int, float] = STEPS) -> Sharing:
    curve = CostCurve(seconds)
    return Sharing(lambda: curve)


def value(offers: list[Offer], kept: list[int], rows: int, curve: CostCurve) -> float:
    """Tokens expected, less what the pass costs in plain decoding's tokens."""
    expected = sum(
        math.prod(one.chances[: i + 1]) for one, n in zip(offers, kept, strict=True) for i in range(n)
    )
    return expected - len(offers) / curve.seconds(len(offers)) * curve.seconds(rows)


chances = st.lists(st.floats(0.05, 1.0), max_size=4)
curves = st.fixed_dictionaries({n: st.floats(1.0, 9.0) for n in (1, 2, 3, 4, 6, 8, 12)})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(chances, min_size=1, max_size=3), curves, st.integers(3, 12))
def test_no_other_division_is_expected_to_bring_more(found, seconds, rows):
    curve, offers = CostCurve(seconds), [offer(*one) for one in found]
    kept, padding = sharing(seconds).divide(offers, rows, 0)
    taken = len(offers) + sum(kept)
    assert taken + padding <= rows
    assert all(n <= len(one.chances) for n, one in zip(kept, offers, strict=True))
    ours = value(offers, kept, taken + padding, curve)
    for others in itertools.product(*(range(len(one.chances) + 1) for one in offers)):
        size = curve.size(len(offers) + sum(others), rows)
        if size:
            assert value(offers, list(others), size, curve) <= ours + 1e-9


def test_a_larger_batch_that_none_would_pay_for_alone_pays_for_all():
    kept, padding = sharing().divide([offer(0.6, 0.6)] * 8, 32, 0)
    assert kept == [1] * 8
    assert padding == 0
    kept, padding = sharing().divide([offer(0.6, 0.6), *[offer()] * 7], 32, 0)
    assert (kept, padding) == ([0] * 8, 0)


def test_likely_tokens_go_before_unlikely_ones_whosever_they_are():
    kept, _ = sharing().divide([offer(0.3, 0.3, 0.3), *[offer(1.0, 1.0, 1.0)] * 2, *[offer(0.9)] * 5], 16, 0)
    assert kept == [0, 3, 3, 0, 0, 0, 0, 0] or sum(kept[1:3]) == 6
    assert kept[0] == 0


def test_what_must_not_be_dropped_is_kept():
    kept, _ = sharing().divide([offer(0.01, 0.01, least=2), offer(0.01)], 16, 0)
    assert kept == [2, 0]


def test_beside_a_prompt_a_row_costs_its_share_and_nothing_is_padded():
    kept, padding = sharing().divide([offer(0.9, 0.9), offer(0.2)], 32, 0, beside_prompts=True)
    assert kept == [2, 0]
    assert padding == 0


def test_what_was_quick_so_far_makes_rows_dearer():
    slow, quick = sharing(), sharing()
    offers = [offer(0.35)] * 8
    quick.observe(8, 5000, 5000 / 8 * 5.1 / 4, 0)  # four times plain decoding
    slow.observe(8, 5000, 5000 / 8 * 5.1 * 4, 0)
    assert sum(slow.divide(offers, 32, 0)[0]) == 8
    assert sum(quick.divide(offers, 32, 0)[0]) == 0


def test_more_texts_than_the_largest_batch_known():
    kept, padding = sharing({1: 1.0, 2: 1.5}).divide([offer(1.0)] * 4, 8, 0)
    assert (kept, padding) == ([0] * 4, 0)
