"""Energy per token: plain decoding against speculation in each mode, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from edgespec.app import console
from edgespec.app.bench.measure import Prompt, answer
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats
from edgespec.machine.governor import LADDER, Mode
from edgespec.sampling import Sampling

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode: its name, the governor's mode, and whether to speculate."""

    name: str
    mode: Mode
    speculate: bool


WAYS = (Way(PLAIN, "performance", False), *(Way(mode, mode, True) for mode in LADDER))


def measure_energy(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_tokens: int,
    progress: Callable[[str], None] | None = None,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Answer every prompt in every way, and report energy per token and speed after the first step.

    Energy is in joules if a meter counted them in every answer, else in CPU seconds, as `unit` states.
    """
    before = engine.resources.governor.mode
    turns = [prompt for _ in range(repetitions) for prompt in prompts]
    results: list[tuple[str, dict[str, GenerationStats]]] = []
    try:
        for way in WAYS:  # threads and cost curves are measured here, not during an answer
            _answer(engine, prompts[0], min(max_tokens, 8), way)
        for i, prompt in enumerate(turns):
            if progress:
                progress(f"{i + 1} of {len(turns)}: {prompt.task}")
            order = [*WAYS[i % len(WAYS) :], *WAYS[: i % len(WAYS)]]
            results.append(
                (prompt.task, {way.name: _answer(engine, prompt, max_tokens, way) for way in order})
            )
    finally:
        engine.resources.governor.choose(before)
    return energy_report(engine, results)


def _answer(engine: Engine, prompt: Prompt, max_tokens: int, way: Way) -> GenerationStats:
    engine.resources.governor.choose(way.mode)
    return answer(engine, prompt, max_tokens, Sampling(), speculate=way.speculate)


def energy_report(
    engine: Engine, results: Sequence[tuple[str, Mapping[str, GenerationStats]]]
) -> dict[str, Any]:
    """Medians by task and overall of the energy per token, and of its ratio to plain decoding."""
    metered = all(one.joules_per_token is not None for _, row in results for one in row.values())

    def price(result: GenerationStats) -> float:
        return (result.joules_per_token or 0.0) if metered else result.cpu_seconds_per_token

    def summary(rows: Sequence[Mapping[str, GenerationStats]]) -> dict[str, Any]:
        measured = [row for row in rows if all(price(one) > 0.0 for one in row.values())]
        if not measured:  # answers of one step
            return {}
        return {
            way.name: {
                "per_token": round(median(price(row[way.name]) for row in measured), 5),
                "to_plain": round(median(price(row[way.name]) / price(row[PLAIN]) for row in measured), 3),
                "tokens_per_second": round(median(row[way.name].tokens_per_second for row in measured), 2),
            }
            for way in WAYS
        }

    tasks = list(dict.fromkeys(task for task, _ in results))
    threads = engine.resources.governor.threads
    return {
        "model": engine.model.path.name,
        "draft": engine.draft.path.name if engine.draft else None,
        "unit": "J" if metered else "CPU-s",
        "threads": {"performance": list(engine.resources.loaded), **{k: list(v) for k, v in threads.items()}},
        "answers": len(results),
        "tasks": {task: summary([row for name, row in results if name == task]) for task in tasks},
        "overall": summary([row for _, row in results]),
    }


def energy_table(report: Mapping[str, Any]) -> str:
    """Format the report for people: for each way energy per token, ratio to plain, and tokens/s."""
    titles = ["task", *(f"{way.name} {report['unit']}/token, tok/s" for way in WAYS)]
    rows = [
        [
            task,
            *(
                f"{line[way.name]['per_token']:.4f} ({line[way.name]['to_plain']:.2f}), "
                f"{line[way.name]['tokens_per_second']:.1f}"
                if line
                else "-"
                for way in WAYS
            ),
        ]
        for task, line in [*report["tasks"].items(), ("all", report["overall"])]
    ]
    threads = ", ".join(f"{mode} {tuple(pair)}" for mode, pair in report["threads"].items())
    return (
        f"{console.table(titles, rows, right=range(1, len(titles)), width=140)}\n"
        f"{report['model']}, draft {report['draft'] or 'none'}, {report['answers']} answers each; "
        f"threads for one row and for several: {threads}"
    )
