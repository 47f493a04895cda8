"""Texts, machines and drafters that are made up, for the planner."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgespec.acceptance import Acceptance
from edgespec.core import Draft, Round
from edgespec.costs import CostCurve
from edgespec.drafting import ModelDrafter
from edgespec.fakes import ScriptedModel
from edgespec.grammar_drafting import GrammarDrafter
from edgespec.planner import Chain, Planner
from edgespec.retrieval import SuffixDrafter

Seconds = Mapping[int, float]


Text = Sequence[int]


# Curves as they were measured on laptop-like machines, in seconds: with cliffs, cheaper, and nearly flat.
CLIFFS = {1: 36, 2: 61, 3: 90, 4: 98, 5: 131, 6: 141, 8: 165, 12: 280, 16: 270, 24: 400, 32: 450}


BLOCKS = {1: 26, 2: 48, 3: 54, 4: 67, 5: 71, 6: 85, 8: 74, 12: 118, 16: 165, 24: 200, 32: 234}


FLAT = {1: 106, 2: 128, 3: 135, 4: 160, 5: 174, 6: 184, 8: 208, 12: 260, 16: 297, 24: 380, 32: 459}


STEEP = {n: 40 * n for n in CLIFFS}


MACHINES: dict[str, Seconds] = {
    name: {n: ms / 1000 for n, ms in curve.items()}
    for name, curve in {"cliffs": CLIFFS, "blocks": BLOCKS, "flat": FLAT, "steep": STEEP}.items()
}


START = 100  # tokens of prompt


def agreed(draft: Draft, text: Text, at: int) -> int:
    """How many of the drafted tokens stand after text[:at]."""
    pairs = zip(draft.tokens, text[at:], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def took(seconds: Seconds, rows: int) -> float:
    """What the made machine takes: a size without a figure runs as the next."""
    return seconds[min(n for n in seconds if n >= rows)]


def decode(
    text: Text,
    planner: Planner,
    seconds: Seconds,
    model: ScriptedModel | None = None,
    model_seconds: CostCurve | None = None,
    noise: Callable[[], float] = lambda: 1.0,
    after: Callable[[Round], None] = lambda _: None,
) -> list[Round]:
    """Write `text` from START on; the first round is not planned, as in `generate`."""
    context, rounds = list(text[:START]), list[Round]()
    while len(context) < len(text):
        limit, draft, evaluated = len(text) - len(context) - 1, Draft(), len(model.evaluated) if model else 0
        if limit and rounds:
            draft = planner.propose(context, limit)
            assert draft.rows <= limit + 1
            assert len(draft.tokens) == len(draft.confidence) == len(draft.sources)
        drafting = 0.0
        if model and model_seconds:
            drafting = sum(model_seconds.seconds(new) for new, _ in model.evaluated[evaluated:])
        at = len(context)
        accepted = agreed(draft, text, at)
        waiting = took(seconds, draft.rows) * noise()
        tokens = tuple(text[at : at + accepted + 1])
        rounds.append(Round(tokens, draft, accepted, drafting + waiting, drafting, waiting))
        context += tokens
        planner.observe(rounds[-1])
        after(rounds[-1])
    return rounds


def make_planner(
    costs: CostCurve,
    acceptance: Acceptance | None = None,
    suffix: Any = None,
    model: ModelDrafter | None = None,
    model_costs: CostCurve | None = None,
    most: int = 31,
    ahead: int = 0,
    grammar: GrammarDrafter | None = None,
    kind: type[Planner] = Planner,
) -> Planner:
    if model is not None:
        model.costs = model_costs or costs
    free = () if suffix is None else (suffix,)
    chain = Chain(grammar, free, () if model is None else (model,))
    return kind(costs, acceptance or Acceptance(), chain, most, ahead)


def planner(
    seconds: Seconds, suffix: Any = None, acceptance: Acceptance | None = None, **more: Any
) -> Planner:
    suffix = SuffixDrafter() if suffix is None else suffix
    return make_planner(CostCurve(seconds), acceptance, suffix, **more)


def random_text(vocab: int, seed: int, size: int = 600) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(size)]


def copied(seed: int, block: int, errors: float, size: int = 700) -> list[int]:
    """One block again and again, a share of its tokens changed each time."""
    rng, text = random.Random(seed), list[int]()
    lines = [rng.randrange(1000) for _ in range(block)]
    while len(text) < size:
        lines = [rng.randrange(1000) if rng.random() < errors else token for token in lines]
        text += lines
    return text[:size]


def interrupted(seed: int, run: int, size: int = 700) -> list[int]:
    """Lines copied but for one token after every `run`: sums in a table."""
    rng, text = random.Random(seed), list[int]()
    line = [rng.randrange(1000) for _ in range(12)]
    while len(text) < size:
        for i in range(0, 12, run):
            text += [*line[i : i + run], rng.randrange(1000)]
    return text[:size]
