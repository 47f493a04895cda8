"""A cost curve on disk that is wrong: the planner finds out within 300 tokens and loses little meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from planned import MACHINES, Seconds, copied, decode, interrupted, make_planner, random_text, took

from edgespec.acceptance import Acceptance
from edgespec.core import Round
from edgespec.costs import CostCurve
from edgespec.models.cost_priors import relative_costs
from edgespec.retrieval import SuffixDrafter

PRIORS = {
    "cliffs": relative_costs("llama.cpp", {"Q4_K": 1 << 30}, 2),
    "blocks": relative_costs("ik", {"Q4_K": 1 << 30}, 2),
    "flat": relative_costs("llama.cpp", {"BF16": 1 << 30}, 2),
}


def file(shape: Mapping[int, float], pace: float) -> dict[str, Any]:
    """A file that claims to be sure."""
    return {
        "pace": pace,
        "slope": 0.0,
        "most": 32,
        "shape": {str(n): relative for n, relative in shape.items()},
        "deviation": {str(n): 0.05 for n in shape},
        "seen": {str(n): 100 for n in shape},
    }


def scaled(factor: float) -> Callable[[Seconds], dict[str, Any]]:
    return lambda seconds: file(
        {n: max(0.5, factor * s / seconds[1]) if n > 1 else 1.0 for n, s in seconds.items()}, seconds[1]
    )


def of_machine(name: str) -> Callable[[Seconds], dict[str, Any]]:
    other = MACHINES[name]
    return lambda seconds: file({n: s / other[1] for n, s in other.items()}, seconds[1])


PLANTED: dict[str, Callable[[Seconds], dict[str, Any]]] = {
    "100 times too dear": scaled(100.0),
    "3 times too dear": scaled(3.0),
    "2 times too dear": scaled(2.0),
    "3 times too cheap": scaled(1 / 3),
    "2 times too cheap": scaled(1 / 2),
    "missing": lambda seconds: file({1: 1.0}, seconds[1]),
    "in proportion": lambda seconds: file({n: float(n) for n in seconds}, seconds[1]),
    "all alike": lambda seconds: file(dict.fromkeys(seconds, 1.0), seconds[1]),
    # As a first start next to three busy loops kept them.
    "busy": lambda _: {"pace": 7.97, "slope": 0.0, "most": 32, "shape": {"1": 1.0}},
    "busy, three sizes": lambda _: {
        "pace": 7.97, "slope": 0.0, "most": 32, "shape": {"1": 1.0, "2": 1.2, "3": 106.5},
    },
    **{f"of the machine {name}": of_machine(name) for name in MACHINES},
}  # fmt: skip


def written(costs: CostCurve, text: Sequence[int], seconds: Seconds, seed: int) -> list[Round]:
    rng = random.Random(seed)
    one = make_planner(costs, Acceptance(), SuffixDrafter())
    return decode(text, one, seconds, noise=lambda: rng.lognormvariate(0.0, 0.08))


def speed(rounds: Sequence[Round], seconds: Seconds, start: int = 0, stop: int = 10**9) -> float:
    """In plain decoding speeds, of the rounds that began between the tokens `start` and `stop`."""
    at, tokens, time = 0, 0, 0.0
    for one in rounds:
        if start <= at < stop:
            tokens += len(one.tokens)
            time += took(seconds, one.draft.rows)
        at += len(one.tokens)
    return tokens * took(seconds, 1) / time


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("machine", PRIORS)
def test_after_300_tokens_of_repetition_the_curve_is_as_good_as_right(
    machine: str, planted: str, seed: int
) -> None:
    seconds, text = MACHINES[machine], copied(seed, 40, 0.0, 1200)
    wrong = CostCurve.from_json(PLANTED[planted](seconds), PRIORS[machine])
    right = speed(written(CostCurve(seconds), text, seconds, seed), seconds, 300, 1000)
    assert right > 2.0
    assert speed(written(wrong, text, seconds, seed), seconds, 300, 1000) >= 0.95 * right


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("machine", PRIORS)
def test_ordinary_text_loses_little_meanwhile(machine: str, planted: str) -> None:
    seconds, figures = MACHINES[machine], list[float]()
    for seed in range(3):
        for text in (random_text(3, seed, 400), random_text(1000, seed, 400), interrupted(seed, 6, 400)):
            wrong = CostCurve.from_json(PLANTED[planted](seconds), PRIORS[machine])
            figures.append(speed(written(wrong, text, seconds, seed), seconds))
    assert min(figures) >= 0.95
    assert sorted(figures)[len(figures) // 2] >= 0.98


def test_trying_sizes_takes_one_percent_of_the_time() -> None:
    """On a machine where no size ever pays, whatever the prior hopes for."""
    steep = MACHINES["steep"]
    text, costs = copied(1, 40, 0.0, 3000), CostCurve({1: steep[1]}, most=32, measured=False)
    assert speed(written(costs, text, steep, 1), steep, 400) >= 0.985
