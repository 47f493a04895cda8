"""The best that a perfect choice of length could have done, with the same drafters and the same cost curve.

Computed afterwards from a finished answer: known is where each drafter would have been right, so the shortest
time is a walk backwards over the positions. What a controller reaches of it is a measure of its judgement.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgespec.app.engine.engine import Engine
from edgespec.core import common_prefix
from edgespec.costs import CostCurve
from edgespec.planner import Chain
from edgespec.retrieval import CorpusDrafter, SuffixDrafter


def best_possible(engine: Engine, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """How many times faster than plain `answer` could have been with the best length of every draft.

    With the drafters and the cost curves of `engine`, whose caches are emptied. 1.0 for an answer too short
    to measure.
    """
    drafters, drafting = engine.drafters, engine.pool.slots[0].drafting
    costs = engine.resources.measured
    most = costs.largest - 1
    suffix = model = [0] * len(answer)
    if drafters.suffix:
        corpus = [CorpusDrafter(drafters.corpus)] if drafters.corpus is not None else []
        suffix = suffix_runs(prompt, answer, Chain(free=[SuffixDrafter(), *corpus]), most)
    step = 0.0
    if drafters.draft is not None and drafting is not None:
        step = drafters.draft.costs.seconds(1)
        engine.forget()
        rows = drafters.draft.model.options.max_rows
        drafts = [int(drafting.forward(prompt)[0].argmax())]
        for start in range(0, len(answer) - 1, rows):
            new = answer[start : min(start + rows, len(answer) - 1)]
            drafts += [int(row.argmax()) for row in drafting.forward(new, len(new))]
        model = model_runs(drafts, answer, most)
    best = shortest(costs, suffix, model, step)
    return (len(answer) - 1) * costs.seconds(1) / best if best > 0.0 else 1.0


def suffix_runs(prompt: Sequence[int], answer: Sequence[int], chain: Chain, most: int) -> list[int]:
    """How many right tokens, at most `most`, free drafters would have drafted before each of `answer`."""
    text = list(prompt)
    runs = []
    for i, token in enumerate(answer):
        runs.append(common_prefix(chain.best_free(text, most).tokens, answer[i : i + most]))
        text.append(token)
    return runs


def model_runs(drafts: Sequence[int], answer: Sequence[int], most: int) -> list[int]:
    """The same for a draft model: drafts[i] is its token after the answer up to answer[i]."""
    runs = [0] * len(answer)
    for i in reversed(range(len(answer))):
        if drafts[i] == answer[i]:
            runs[i] = min(most, 1 + (runs[i + 1] if i + 1 < len(answer) else 0))
    return runs


def shortest(costs: CostCurve, suffix: Sequence[int], model: Sequence[int] = (), step: float = 0.0) -> float:
    """Seconds that the answer's tokens after the first would have taken at best.

    `suffix` and `model` are runs as above; each draft token of the model costs `step` seconds, and repetition
    may continue after them.
    """
    n = len(suffix)
    most = costs.largest
    model = model or [0] * n
    best = [0.0] * (n + 1)
    check = [costs.seconds(costs.size(k + 1, most)) for k in range(most)]
    for i in reversed(range(1, n)):
        choices = [check[0] + best[i + 1]]
        for drafted in range(model[i] + 1):
            start = i + drafted
            longest = min(drafted + (suffix[start] if start < n else 0), most - 1, n - 1 - i)
            choices += [
                drafted * step + check[k] + best[i + k + 1] for k in range(max(drafted, 1), longest + 1)
            ]
        best[i] = min(choices)
    return best[1] if n > 1 else 0.0
