"""A cost curve keeps its cliffs, follows the machine, and is read back only from what it wrote."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.costs import SIZES, CostCurve, measure

relaxed = settings(max_examples=200, deadline=None, derandomize=True)
# As llama.cpp's kernels work: three rows cost more than four, six more than eight, twelve more than sixteen.
CLIFFS = {1: 36.0, 2: 61.0, 3: 99.0, 4: 98.0, 5: 131.0, 6: 171.0, 8: 165.0, 12: 280.0, 16: 270.0, 32: 450.0}
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)  # what from_json documents

figures = st.floats(1e-4, 1e3)
curves = st.builds(
    lambda one, others: {1: one, **others},
    figures,
    st.dictionaries(st.integers(2, 32), figures, max_size=8),
)
passes = st.lists(
    st.tuples(st.integers(-1, 40), st.integers(0, 8000), st.just(0.0) | st.floats(1e-9, 1e9)), max_size=30
)


def test_every_size_keeps_its_own_figure() -> None:
    curve = CostCurve(CLIFFS)
    assert {n: curve.seconds(n) for n in CLIFFS} == pytest.approx(CLIFFS)
    assert curve.seconds(7) == curve.seconds(8)  # padded
    assert curve.seconds(11) == curve.seconds(12)
    assert curve.seconds(64) == pytest.approx(900.0)  # reading goes on in proportion
    assert curve.largest == 32


def test_cliffs_stay_while_noisy_passes_are_seen() -> None:
    rng, curve = random.Random(1), CostCurve(CLIFFS)
    for _ in range(3000):
        n = rng.choice(list(CLIFFS))
        curve.observe(n, 0, CLIFFS[n] * rng.lognormvariate(0.0, 0.1))
    assert {n: curve.seconds(n) for n in CLIFFS} == pytest.approx(CLIFFS, rel=0.12)
    assert curve.seconds(12) > curve.seconds(16)
    assert curve.size(6, 32) == 8


@relaxed
@given(curves, passes, st.integers(1, 40), st.integers(0, 40))
def test_a_batch_is_the_cheapest_that_is_large_enough_and_allowed(
    seconds: dict[int, float], seen: list[tuple[int, int, float]], rows: int, more: int
) -> None:
    curve = CostCurve(seconds)
    for one in seen:
        curve.observe(*one)
        curve.size(rows, rows + more)  # what was planned before a pass must not outlive it
    size = curve.size(rows, rows + more)
    allowed = [n for n in seconds if rows <= n <= rows + more]  # what was measured
    assert (size == 0) == (not allowed)
    assert size == 0 or (size in allowed and curve.seconds(size) == min(map(curve.seconds, allowed)))


def test_no_row_is_padded_for_nothing() -> None:
    curve = CostCurve({1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0, 8: 4.0})
    assert [curve.size(n, 8) for n in range(1, 10)] == [1, 2, 3, 4, 8, 8, 8, 8, 0]
    assert curve.size(5, 7) == 0  # eight are not allowed
    cheap = CostCurve({1: 3.0, 2: 2.0, 16: 1.0, 32: 9.0})
    assert [cheap.size(1, most) for most in (1, 2, 15, 16, 40)] == [1, 2, 2, 16, 16]


def test_no_other_sizes_than_allowed_are_planned() -> None:
    curve = CostCurve(CLIFFS)
    assert curve.size(3, 32) == 4
    curve.only([1, 2, 8, 16, 99])
    assert [curve.size(n, 32) for n in (1, 2, 3, 8, 9, 17, 99)] == [1, 2, 8, 8, 16, 0, 0]
    assert [curve.size(3, most) for most in (3, 7, 8)] == [0, 0, 8]
    for n in (3, 4, 5):
        curve.observe(n, 0, 1e-3)  # seen is not allowed
    assert curve.size(3, 32) == 8
    curve.only([1, 2, 3])
    assert [curve.size(n, 32) for n in (1, 2, 3)] == [1, 2, 0]


def test_sizes_too_large_to_measure_are_assumed_until_they_are_seen() -> None:
    curve = CostCurve({1: 10.0, 2: 15.0, 4: 20.0}, most=20)
    assert curve.largest == 20
    assert [curve.seconds(n) for n in (5, 8, 16, 20)] == pytest.approx([25.0, 40.0, 80.0, 100.0])
    assert [curve.size(n, 20) for n in (5, 7, 13, 17)] == [5, 8, 16, 20]
    assert curve.size(5, 4) == 0
    curve.observe(16, 0, 45.0)
    assert curve.seconds(16) == pytest.approx(45.0)
    assert [curve.size(n, 20) for n in (5, 8, 9, 17)] == [5, 8, 16, 20]
    back = through_json(curve)
    assert [back.seconds(n) for n in (1, 2, 4, 16)] == pytest.approx([10.0, 15.0, 20.0, 45.0])
    assert back.largest == 20
    back.observe(20, 0, 5000.0)  # still the first figure of its size, which one stalled pass does not ruin
    assert back.seconds(20) == pytest.approx(2 * 45.0 * 20 / 16)


@pytest.mark.parametrize("factor", [0.001, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("rows", CLIFFS)
def test_an_outlier_moves_nothing_much(rows: int, factor: float) -> None:
    curve = CostCurve(CLIFFS, 1e-5)
    before = {(n, c): curve.seconds(n, c) for n in range(1, 33) for c in (0, 3000)}
    curve.observe(rows, 1000, factor * curve.seconds(rows, 1000))
    after = {(n, c): curve.seconds(n, c) for n in range(1, 33) for c in (0, 3000)}
    assert after == pytest.approx(before, rel=0.05)
    assert after != before


def test_the_first_figure_of_a_size_moves_no_other() -> None:
    curve = CostCurve(CLIFFS)
    before = {n: curve.seconds(n) for n in CLIFFS}
    for _ in range(300):
        curve.observe(7, 0, 120.0)
    assert curve.seconds(7) == pytest.approx(120.0, rel=0.02)
    assert curve.size(6, 8) == 8
    assert {n: curve.seconds(n) / curve.pace for n in CLIFFS} == pytest.approx(
        {n: s / before[1] for n, s in before.items()}
    )


@pytest.mark.parametrize("factor", [0.5, 1.4, 3.0])
def test_drift_of_all_sizes_is_followed_by_pace(factor: float) -> None:
    rng, curve = random.Random(1), CostCurve(CLIFFS, 1e-5)
    shape = {n: curve.seconds(n) / curve.seconds(1) for n in CLIFFS}
    for _ in range(600):
        n = rng.choice([1, 1, 1, 2, 4, 8])
        curve.observe(n, 200, factor * CLIFFS[n] * (1 + 200e-5) * rng.lognormvariate(0.0, 0.05))
    for n in CLIFFS:  # those that were never seen too
        assert curve.seconds(n) == pytest.approx(factor * CLIFFS[n], rel=0.12)
    assert curve.pace == pytest.approx(factor * 36.0, rel=0.1)
    assert {n: curve.seconds(n) / curve.seconds(1) for n in CLIFFS} == pytest.approx(shape, rel=0.12)


def test_drift_seen_at_one_size_alone_moves_every_size() -> None:
    curve = CostCurve(CLIFFS)
    for _ in range(300):
        curve.observe(1, 0, 1.4 * 36.0)
    assert {n: curve.seconds(n) for n in CLIFFS} == pytest.approx(
        {n: 1.4 * s for n, s in CLIFFS.items()}, rel=0.01
    )


def test_a_size_measured_wrong_is_mended() -> None:
    rng, curve = random.Random(1), CostCurve({**CLIFFS, 8: 40.0})
    for _ in range(800):
        n = rng.choice([1, 2, 4, 8])
        curve.observe(n, 0, CLIFFS[n])
    assert {n: curve.seconds(n) for n in (1, 2, 4, 8, 16)} == pytest.approx(
        {n: CLIFFS[n] for n in (1, 2, 4, 8, 16)}, rel=0.1
    )


def test_the_context_makes_passes_dearer() -> None:
    curve = CostCurve(CLIFFS, 2e-4)
    assert curve.seconds(8, 5000) == pytest.approx(2 * 165.0)


@pytest.mark.parametrize("truth", [3e-5, 2e-4])
@pytest.mark.parametrize("assumed", [0.5, 1.0, 2.0])
def test_conversations_of_all_lengths_do_not_bend_the_curve(truth: float, assumed: float) -> None:
    rng, curve = random.Random(1), CostCurve(CLIFFS, assumed * truth)
    for _ in range(60):
        start = rng.choice([100, 500, 2000, 5000])
        for context in range(start, start + rng.choice([100, 300]), 2):
            n = rng.choice([1, 1, 1, 4, 8])
            seconds = CLIFFS[n] * (1 + truth * context)
            curve.observe(n, context, seconds * rng.lognormvariate(0.0, 0.05))
        for n in (1, 4, 8):
            assert curve.seconds(n, context) == pytest.approx(CLIFFS[n] * (1 + truth * context), rel=0.1)
    assert curve.seconds(1, 0) == pytest.approx(
        36.0 * (1 + truth * context) / (1 + assumed * truth * context), rel=0.1
    )


@relaxed
@given(curves, passes)
def test_whatever_was_seen_the_figures_stay_figures(
    seconds: dict[int, float], seen: list[tuple[int, int, float]]
) -> None:
    curve = CostCurve(seconds)
    for one in [*seen, (1, 0, math.inf), (1, 0, math.nan), (1, 0, -1.0), (2, 0, math.inf)]:
        curve.observe(*one)
    for n in range(1, 50):
        for context in (0, 100_000):
            assert 0.0 < curve.seconds(n, context) < math.inf


@pytest.mark.parametrize("rows", [-3, 0, 33, 1000])
def test_passes_of_unknown_size_teach_nothing(rows: int) -> None:
    curve = CostCurve(CLIFFS)
    curve.observe(rows, 0, 1e-3)
    assert curve.as_json() == CostCurve(CLIFFS).as_json()


@pytest.mark.parametrize(
    "seconds", [{}, {2: 1.0}, {1: 0.0}, {1: -1.0}, {1: math.nan}, {1: 1.0, 2: math.inf}, {1: 1.0, 4: 0.0}]
)
def test_a_curve_needs_figures(seconds: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        CostCurve(seconds)


def through_json(curve: CostCurve) -> CostCurve:
    return CostCurve.from_json(json.loads(json.dumps(curve.as_json())))


@relaxed
@given(curves, passes)
def test_a_curve_comes_back_from_json(seconds: dict[int, float], seen: list[tuple[int, int, float]]) -> None:
    curve = CostCurve({n: min(max(s, seconds[1] / 50), seconds[1] * 1000) for n, s in seconds.items()}, 3e-5)
    for rows, context, _ in seen:
        curve.observe(rows, context, seconds[1] * max(1, rows))
    back = through_json(curve)
    assert back.largest == curve.largest
    for n in range(1, 40):
        assert back.seconds(n, 500) == pytest.approx(curve.seconds(n, 500), rel=0.01)
    assert through_json(back).as_json() == back.as_json()


def good() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(CostCurve(CLIFFS, 1e-5).as_json()))
    return data


def damaged(key: str, value: object) -> dict[str, Any]:
    return {**good(), key: value}


def reshaped(key: str, value: object) -> dict[str, Any]:
    return {**good(), "shape": {**good()["shape"], key: value}}


@pytest.mark.parametrize(
    "data",
    [
        {},
        *({k: v for k, v in good().items() if k != gone} for gone in good()),
        *(damaged(k, bad) for k in good() for bad in (None, [], {}, "x", math.nan, -1, -math.inf, [1.0])),
        damaged("pace", 0),
        damaged("pace", math.inf),
        damaged("pace", 10**400),
        damaged("slope", 0.1),
        damaged("slope", math.inf),
        damaged("shape", math.inf),
        damaged("shape", {"2": 2.0}),
        *(reshaped("1", bad) for bad in (0.0, -1.0, math.nan, math.inf, None, "x", [], 10**400)),
        *(reshaped("4", bad) for bad in (0.0, -1.0, math.nan, math.inf, None, "x", [], 10**400)),
        *(reshaped(bad, 1.0) for bad in ("x", "", "1.5", "1e3", "1" * 5000)),
        reshaped("1000000000", 3.0),
    ],
    ids=lambda data: json.dumps(data)[:80],
)  # fmt: skip
def test_damaged_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(DAMAGE):
        CostCurve.from_json(json.loads(json.dumps(data)))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["1", "2", "x"]), inner),
    max_leaves=6,
)


@relaxed
@given(st.dictionaries(st.sampled_from(sorted(good())), values))
def test_any_json_is_a_working_curve_or_refused(changes: dict[str, Any]) -> None:
    try:
        curve = CostCurve.from_json({**good(), **changes})
    except DAMAGE:
        return
    assert curve.size(1, 8) <= 8
    assert curve.largest <= 1024
    assert all(0.0 < curve.seconds(n, 1000) < math.inf for n in range(1, curve.largest + 1))


class Machine:
    """A clock that only passes advance. `cost(n, now)` is what n rows take when they begin at `now`."""

    def __init__(self, cost: Callable[[int, float], float]) -> None:
        self._cost = cost
        self.now = 0.0
        self.ran: list[int] = []

    def run(self, rows: int) -> None:
        self.ran.append(rows)
        self.now += self._cost(rows, self.now)

    def measure(self, most: int = SIZES[-1], seconds: float = 4.0) -> dict[int, float]:
        return measure(self.run, most, seconds, lambda: self.now)


def flat(rows: int) -> float:
    return 0.01 + 0.004 * rows


def test_a_steady_machine_is_measured_exactly() -> None:
    machine = Machine(lambda n, now: flat(n))
    assert machine.measure() == pytest.approx({n: flat(n) for n in SIZES})
    assert machine.now <= 4.0 + flat(32)


@pytest.mark.parametrize("most", [1, 2, 7, 16, 31, 32, 500])
def test_no_more_rows_than_allowed_are_run(most: int) -> None:
    machine = Machine(lambda n, now: flat(n))
    assert set(machine.measure(most)) == {n for n in SIZES if n <= most} == set(machine.ran)


def test_passes_alternate_in_direction() -> None:
    machine = Machine(lambda n, now: flat(n))
    machine.measure()
    assert machine.ran[0] == 1  # not counted
    passes = [tuple(machine.ran[i : i + len(SIZES)]) for i in range(1, len(machine.ran), len(SIZES))]
    assert len(passes) >= 3
    assert passes == [SIZES if i % 2 == 0 else SIZES[::-1] for i in range(len(passes))]


@pytest.mark.parametrize("drift", [0.15, -0.15])
def test_drift_does_not_bend_the_curve(drift: float) -> None:
    """Over the measurement the machine becomes half as fast, or twice: the ratios stay."""
    found = Machine(lambda n, now: flat(n) * math.exp(drift * now)).measure(seconds=8.0)
    assert {n: s / found[1] for n, s in found.items()} == pytest.approx(
        {n: flat(n) / flat(1) for n in SIZES}, rel=0.1
    )


def test_the_first_pass_is_not_counted() -> None:
    found = Machine(lambda n, now: flat(n) + (1.0 if now == 0.0 else 0.0)).measure()
    assert found[1] == pytest.approx(flat(1))


@pytest.mark.parametrize("stalled", SIZES)
def test_one_stalled_pass_is_outvoted(stalled: int) -> None:
    stalls = iter([2.0])
    machine = Machine(lambda n, now: flat(n))
    cost = machine._cost
    machine._cost = lambda n, now: (
        cost(n, now) + (next(stalls, 0.0) if n == stalled and len(machine.ran) > 5 else 0.0)
    )
    assert machine.measure(seconds=8.0) == pytest.approx({n: flat(n) for n in SIZES})


@pytest.mark.parametrize("row", [0.02, 0.1, 0.5, 3.0, 50.0])
def test_a_slow_machine_leaves_out_the_large_sizes(row: float) -> None:
    """And keeps to its time, but for the passes of one row that there must be."""
    machine = Machine(lambda n, now: row * n)
    found = machine.measure()
    assert tuple(found) == SIZES[: len(found)]
    assert found == pytest.approx({n: row * n for n in found})
    assert machine.now <= row + 4.0 + row + 1e-9
    assert 32 * row < 1.0 or len(found) < len(SIZES)
    CostCurve(found)


def test_a_cliff_does_not_break_the_time_by_much() -> None:
    machine = Machine(lambda n, now: 0.05 * n if n < 12 else 0.5 * n)
    found = machine.measure()
    assert {1, 2, 3, 4, 5, 6, 8} <= set(found)
    assert machine.now < 4.0 + 0.05 + 0.5 * 12
