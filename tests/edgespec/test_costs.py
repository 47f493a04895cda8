"""A cost curve keeps its cliffs, follows the machine, and is read back only from what it wrote."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.costs import SIZES, TYPICAL, CostCurve, measure

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
    assert curve.size(3, 32) in (3, 4)
    assert curve.size(6, 32) in (6, 8)


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


def test_sizes_that_were_not_measured_have_their_prior() -> None:
    """Corrected by what the measured ones cost more or less than theirs."""
    prior = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0, 16: 5.0, 32: 9.0}
    curve = CostCurve({1: 10.0, 2: 15.0, 4: 20.0}, most=32, prior=prior)
    assert curve.largest == 32
    assert [curve.seconds(n) for n in (8, 16, 32)] == pytest.approx([30.0, 50.0, 90.0], rel=0.01)
    assert [curve.size(n, 32) for n in (3, 5, 7, 13, 17)] == [4, 5, 8, 16, 24]
    assert curve.size(5, 4) == 0
    dear = CostCurve({1: 10.0, 2: 20.0, 4: 30.0}, most=32, prior=prior)
    assert 35.0 < dear.seconds(8) < 50.0
    unknown = CostCurve({1: 10.0}, most=32, prior=prior, measured=False)
    assert [unknown.seconds(n) for n in prior] == pytest.approx([10.0 * share for share in prior.values()])
    assert unknown.uncertainty(8) > curve.uncertainty(8) > curve.uncertainty(4) > 0.0


def test_a_pass_of_one_size_says_something_of_its_neighbors_and_less_of_others() -> None:
    curve = CostCurve({1: 10.0}, most=32, measured=False)
    before = {n: curve.seconds(n) / curve.pace for n in SIZES}
    doubt = {n: curve.uncertainty(n) for n in SIZES}
    for _ in range(5):
        curve.observe(1, 0, 10.0)
        curve.observe(8, 0, 10.0 * 1.3 * before[8])
    moved = {n: curve.seconds(n) / curve.pace / before[n] for n in SIZES}
    assert moved[8] == pytest.approx(1.3, rel=0.02)
    assert 1.1 < moved[6] < 1.3
    assert 1.1 < moved[12] < 1.3
    assert moved[2] < moved[6]
    assert curve.uncertainty(8) < 0.5 * doubt[8]
    assert all(curve.uncertainty(n) <= doubt[n] for n in SIZES)


@pytest.mark.parametrize("factor", [0.001, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("rows", CLIFFS)
def test_one_outlier_moves_little_and_the_next_passes_move_it_back(rows: int, factor: float) -> None:
    curve = CostCurve(CLIFFS, 1e-5)
    for _ in range(8):
        for n in CLIFFS:
            curve.observe(n, 1000, curve.seconds(n, 1000))
    before = {(n, c): curve.seconds(n, c) for n in range(1, 33) for c in (0, 3000)}
    curve.observe(rows, 1000, factor * curve.seconds(rows, 1000))
    after = {(n, c): curve.seconds(n, c) for n in range(1, 33) for c in (0, 3000)}
    assert after == pytest.approx(before, rel=0.15)
    assert after != before
    for _ in range(3):
        curve.observe(1, 1000, before[1, 0] * 1.01)
        curve.observe(rows, 1000, before[rows, 0] * 1.01)
    assert {key: curve.seconds(*key) for key in before} == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("rows", CLIFFS)
def test_a_cost_that_has_changed_is_believed_at_the_second_pass(rows: int) -> None:
    curve = CostCurve(CLIFFS)
    for _ in range(8):
        for n in CLIFFS:
            curve.observe(n, 0, CLIFFS[n])
    for _ in range(4):
        curve.observe(rows, 0, 2.0 * CLIFFS[rows])
    assert curve.seconds(rows) == pytest.approx(2.0 * CLIFFS[rows], rel=0.15)


def test_a_size_without_a_figure_gets_one_and_is_still_not_planned() -> None:
    """Exact answers depend on the sizes allowed; 7 rows are seen where several texts share a pass."""
    curve = CostCurve(CLIFFS)
    for _ in range(300):
        curve.observe(1, 0, CLIFFS[1])
        curve.observe(7, 0, 120.0)
    assert curve.seconds(7) == pytest.approx(120.0, rel=0.03)
    assert curve.size(6, 8) == 8
    assert {n: curve.seconds(n) for n in CLIFFS} == pytest.approx(CLIFFS, rel=0.1)


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


def test_a_size_measured_wrong_is_corrected() -> None:
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
@given(st.dictionaries(st.sampled_from(SIZES[1:]), st.floats(0.75, 1.5)), passes)
def test_a_curve_comes_back_from_json(factors: dict[int, float], seen: list[tuple[int, int, float]]) -> None:
    """As far as its prior allows."""
    figures = {1: 2.0} | {n: 2.0 * TYPICAL[n] * factor for n, factor in factors.items()}
    curve = CostCurve(figures, 3e-5)
    back = through_json(curve)
    assert back.largest == curve.largest
    assert {n: back.seconds(n, 500) for n in figures} == pytest.approx(
        {n: curve.seconds(n, 500) for n in figures}, rel=0.12
    )
    for one in seen:
        back.observe(*one)
    again = through_json(back)
    assert again.largest == back.largest
    assert again.pace == pytest.approx(back.pace)


@pytest.mark.parametrize("factor", [0.01, 0.2, 5.0, 100.0])
def test_a_kept_figure_that_cannot_be_is_not_believed(factor: float) -> None:
    data = CostCurve({1: 1.0, **{n: TYPICAL[n] * factor for n in SIZES[1:]}}).as_json()
    curve = CostCurve.from_json(data)
    assert {n: curve.seconds(n) for n in SIZES} == pytest.approx(dict(TYPICAL), rel=0.01)
    assert curve.seen == {}


def test_files_of_the_version_before_are_read() -> None:
    data = {"pace": 0.03, "slope": 1e-5, "shape": {"1": 1.0, "2": 1.7, "8": 4.0}, "most": 32, "best": 0.028}
    curve = CostCurve.from_json(data)
    assert curve.seconds(8) == pytest.approx(0.12, rel=0.05)
    assert curve.seen == {1: 1, 2: 1, 8: 1}
    assert curve.best == 0.028


def test_the_pace_of_a_busy_day_is_corrected_by_the_first_passes() -> None:
    """A file from among other programs: its pace is 200 times the machine's."""
    curve = CostCurve.from_json({"pace": 7.97, "slope": 0.0, "shape": {"1": 1.0}, "most": 32})
    shape = {n: curve.seconds(n) / curve.pace for n in SIZES}
    for _ in range(3):
        curve.observe(4, 0, 0.036 * TYPICAL[4])
    assert curve.pace == pytest.approx(0.036, rel=0.25)
    assert {n: curve.seconds(n) / curve.pace for n in SIZES} == pytest.approx(shape, rel=0.25)


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
        *({k: v for k, v in good().items() if k != gone} for gone in ("pace", "slope", "most", "shape")),
        *(damaged(k, bad) for k in good() for bad in (None, [], {}, "x", math.nan, -1, -math.inf, [1.0])
          if bad != {} or k not in ("deviation", "seen")),  # as if they were not there
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

    def measure(self, seconds: float = 4.0, sizes: Sequence[int] = SIZES[1:]) -> dict[int, float]:
        self.figures, self.noise = measure(self.run, sizes, seconds, TYPICAL.__getitem__, lambda: self.now)
        return self.figures


def flat(rows: int) -> float:
    return 0.01 + 0.004 * rows


def test_a_steady_machine_is_measured_exactly() -> None:
    machine = Machine(lambda n, now: flat(n))
    assert machine.measure() == pytest.approx({n: flat(n) for n in SIZES})
    assert machine.now <= 4.0
    assert machine.noise < 0.1


def test_only_the_sizes_wanted_are_run() -> None:
    machine = Machine(lambda n, now: flat(n))
    assert set(machine.measure(sizes=(8, 4))) == {1, 4, 8} == set(machine.ran)


@pytest.mark.parametrize("drift", [0.15, -0.15])
def test_drift_does_not_bend_the_curve(drift: float) -> None:
    """Over the measurement the machine becomes half as fast, or twice: the ratios stay."""
    found = Machine(lambda n, now: flat(n) * math.exp(drift * now)).measure(seconds=8.0)
    assert {n: s / found[1] for n, s in found.items()} == pytest.approx(
        {n: flat(n) / flat(1) for n in SIZES}, rel=0.15
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


@pytest.mark.parametrize("row", [0.005, 0.02, 0.1, 0.5, 3.0, 50.0])
def test_a_slow_machine_keeps_to_its_time(row: float) -> None:
    """Whatever it is, but for one pass of one row that there must be; what does not fit is left out."""
    machine = Machine(lambda n, now: row * TYPICAL[n])
    found = machine.measure(0.9, (8, 4, 16, 2, 32))
    assert found == pytest.approx({n: row * TYPICAL[n] for n in found})
    assert machine.now <= max(0.9, row) + 1e-9
    assert set(found) >= ({1, 8, 4} if row <= 0.1 else {1})


def test_the_spread_of_passes_is_their_noise() -> None:
    rng = random.Random(1)
    noisy = Machine(lambda n, now: flat(n) * rng.lognormvariate(0.0, 0.5))
    noisy.measure()
    calm = Machine(lambda n, now: flat(n) * rng.lognormvariate(0.0, 0.01))
    calm.measure()
    assert noisy.noise > 0.3 > 0.1 > calm.noise
