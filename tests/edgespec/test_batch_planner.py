"""How many rows each text of a pass has: what is best of all numbers, on any curve."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.batch_planner import BatchPlanner
from edgespec.core import Draft, DraftCandidate
from edgespec.costs import CostCurve

# Sixteen rows cost hardly more than nine, as on processors whose kernels work in blocks.
STEPS = {1: 1.0, 2: 1.9, 3: 2.5, 4: 3.1, 5: 3.9, 6: 4.4, 8: 5.1, 12: 6.1, 16: 5.8, 24: 9.0, 32: 10.2}


def offer(*accept_probs: float, least: int = 0) -> DraftCandidate:
    n = len(accept_probs)
    return DraftCandidate(Draft(tuple(range(n)), accept_probs, ("x",) * n), accept_probs, least)


def sharing(seconds: dict[int, float] = STEPS) -> BatchPlanner:
    curve = CostCurve(seconds)
    return BatchPlanner(lambda: curve)


def room(offers: list[DraftCandidate], tokens: int = 99) -> list[tuple[int, int]]:
    return [(1, 1 + tokens)] * len(offers)


def value(offers: list[DraftCandidate], bounds: list[tuple[int, int]], rows: int, curve: CostCurve) -> float:
    """Tokens expected, less what the pass costs in plain decoding's tokens; token by token."""
    expected = sum(
        math.prod(one.accept_probs[: i + 1])
        for one in offers
        for i in range(len(one.accept_probs[: rows - 1]))
    )
    left = [max(low, min(high, rows)) for low, high in bounds]
    seconds = 0.0
    while left:
        seconds += curve.seconds(min(left) * len(left))
        left = [n - min(left) for n in left if n > min(left)]
    return expected - len(offers) / curve.seconds(len(offers)) * seconds


accept_probs = st.lists(st.floats(0.05, 1.0), max_size=6)
texts = st.lists(
    st.tuples(accept_probs, st.integers(0, 3), st.integers(0, 6), st.integers(1, 3)), min_size=1, max_size=3
)
prompts = st.lists(st.integers(1, 40), max_size=2)
curves = st.fixed_dictionaries({n: st.floats(1.0, 9.0) for n in (1, 2, 3, 4, 6, 8, 12)})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts, prompts, curves, st.integers(1, 12))
def test_no_other_number_is_expected_to_bring_more(found, reading, seconds, most):
    curve = CostCurve(seconds)
    offers, bounds = [], []
    for has, least, more, low in found:
        has = has[: max(0, min(most - 1, more))] if low == 1 else []  # at a prompt's end nothing is drafted
        offers.append(offer(*has, least=min(least, len(has))))
        bounds.append((low, low + more))
    bounds += [(n, n) for n in reading]
    rows = sharing(seconds).rows(offers, bounds, most, 0)
    least = 1 + max(one.least for one in offers)
    assert least <= rows <= most
    assert rows == least or rows * len(bounds) <= curve.largest
    ours = value(offers, bounds, rows, curve)
    for other in range(least, most + 1):
        if other * len(bounds) <= curve.largest:
            assert value(offers, bounds, other, curve) <= ours + 1e-9


def test_a_larger_batch_that_none_would_pay_for_alone_pays_for_all():
    many, one = [offer(0.6, 0.6)] * 8, [offer(0.6, 0.6), *[offer()] * 7]
    assert sharing().rows(many, room(many), 4, 0) == 2
    assert sharing().rows(one, room(one), 4, 0) == 1


def test_padding_that_makes_the_batch_cheaper_is_taken():
    offers = [offer()] * 2
    assert sharing({1: 1.0, 2: 2.0, 4: 1.5, 6: 2.5}).rows(offers, room(offers), 4, 0) == 2


def test_what_must_not_be_dropped_is_kept():
    offers = [offer(0.01, 0.01, least=2), offer(0.01)]
    assert sharing().rows(offers, room(offers), 8, 0) == 3
    offers = [offer(0.01, 0.01, least=2), *[offer()] * 39]  # more texts than the largest batch known has rows
    assert sharing().rows(offers, room(offers), 8, 0) == 3


def test_rows_next_to_a_prompt_cost_what_it_has_not_in_them():
    """What is read side by side with the others' rows need not be read after them."""
    seconds = {1: 1.0, 2: 1.1, 4: 1.9, 8: 3.5, 16: 6.9, 32: 13.6}
    offers = [offer(0.7)]
    assert sharing(seconds).rows(offers, [(1, 99)], 8, 0) == 2
    assert sharing(seconds).rows([offer(0.7), offer()], [(1, 99)] * 2, 8, 0) == 1
    assert sharing(seconds).rows(offers, [(1, 99), (64, 64)], 8, 0) == 2


def test_a_text_without_room_is_evaluated_with_fewer():
    """It costs a pass of the engine more: that must pay."""
    offers = [offer(0.9, 0.9, 0.9), offer()]
    seconds = {1: 1.0, 2: 1.2, 3: 1.3, 4: 1.4, 6: 1.6, 8: 1.8}
    assert sharing(seconds).rows(offers, [(1, 99), (1, 99)], 4, 0) == 4
    assert sharing(seconds).rows(offers, [(1, 99), (1, 1)], 4, 0) == 4
    assert sharing(seconds).rows([offer(0.5), offer()], [(1, 99), (1, 99)], 4, 0) == 2
    assert sharing(seconds).rows([offer(0.5), offer()], [(1, 99), (1, 1)], 4, 0) == 1


def test_what_was_quick_so_far_makes_rows_dearer():
    slow, quick = sharing(), sharing()
    offers = [offer(0.35)] * 8
    quick.observe(5000, 5000 / 8 * 5.1 / 4)  # four times plain decoding
    slow.observe(5000, 5000 / 8 * 5.1 * 4)
    assert slow.rows(offers, room(offers), 4, 0) == 2
    assert quick.rows(offers, room(offers), 4, 0) == 1
