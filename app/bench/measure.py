"""Plain against speculative decoding: same prompts, same process, interleaved.

Machines drift by tens of percent within minutes, so only ratios of neighboring runs are meaningful. Every
prompt is answered twice in a row, in alternating order, and figures are medians over prompts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from edgespec.app import console
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.core import EdgespecError
from edgespec.machine.reading import reported_fields
from edgespec.machine.sensors import peak_memory
from edgespec.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a suite: its task, its id within the suite, and its text."""

    task: str
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers to one prompt, plain and speculative."""

    prompt: Prompt
    plain: GenerationStats
    speculative: GenerationStats

    @property
    def ratio(self) -> float:
        """Seconds per token after the first step, plain over speculative: above 1 is faster."""
        return self.speculative.tokens_per_second / max(self.plain.tokens_per_second, 1e-9)

    @property
    def first_difference(self) -> int | None:
        """Index of the first token id that differs between the answers, None if none does."""
        return first_difference(self.plain.tokens, self.speculative.tokens)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token id that differs, None if none does; a negative id is unknown, matching any."""
    shared = min(len(ours), len(theirs))
    for i in range(shared):
        if ours[i] != theirs[i] and min(ours[i], theirs[i]) >= 0:
            return i
    return None if len(ours) == len(theirs) else shared


def read_suite(path: Path | None, per_task: int) -> list[Prompt]:
    """The first `per_task` prompts of every task. Raises EdgespecError for a file that is not a suite."""
    try:
        text = path.read_text("utf-8") if path else _own_suite()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        prompts = [Prompt(str(row["task"]), str(row["id"]), str(row["prompt"])) for row in rows]
    except OSError as error:
        raise EdgespecError(f"cannot read the suite {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise EdgespecError(
            f"{path} is not a suite: each line must be JSON with task, id and prompt"
        ) from None
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        if len(by_task[prompt.task]) < per_task:
            by_task[prompt.task].append(prompt)
    if not by_task:
        raise EdgespecError(f"the suite {path} is empty: add lines of JSON with task, id and prompt")
    # Tasks take turns, so that a slow minute of the machine does not fall on one of them alone.
    return [rows[i] for i in range(per_task) for rows in by_task.values() if i < len(rows)]


def _own_suite() -> str:
    return (resources.files(__package__) / "prompts.jsonl").read_text("utf-8")


def measure(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_tokens: int,
    temperature: float = 0.0,
    progress: Callable[[str], None] | None = None,
    repetitions: int = 1,
) -> dict[str, Any]:
    """Answer every prompt both ways, `repetitions` times, and return the report."""
    sampling = Sampling(temperature=temperature)
    answer(engine, prompts[0], min(max_tokens, 8), sampling, speculate=True)  # warm-up
    pairs = []
    turns = [prompt for _ in range(repetitions) for prompt in prompts]
    for i, prompt in enumerate(turns):
        if progress:
            progress(f"{i + 1} of {len(turns)}: {prompt.task}")
        # Reversed from prompt to prompt, and for each prompt from pass to pass.
        order = (False, True) if sum(divmod(i, len(prompts))) % 2 == 0 else (True, False)
        results = {
            speculate: answer(engine, prompt, max_tokens, sampling, speculate=speculate)
            for speculate in order
        }
        pairs.append(Pair(prompt, results[False], results[True]))
    return report(engine, pairs, greedy=temperature == 0.0)


def answer(
    engine: Engine, prompt: Prompt, max_tokens: int, sampling: Sampling, *, speculate: bool
) -> GenerationStats:
    """Answer a prompt from an empty KV cache."""
    tokens = engine.chat_prompt([{"role": "user", "content": prompt.text}])
    return answer_tokens(engine, tokens, max_tokens, sampling, speculate=speculate)


def answer_tokens(
    engine: Engine, prompt: Sequence[int], max_tokens: int, sampling: Sampling, *, speculate: bool
) -> GenerationStats:
    """Answer token ids from an empty KV cache."""
    engine.forget()
    return answered(engine, Request(prompt, sampling, max_tokens, speculate=speculate))


def answered(engine: Engine, request: Request) -> GenerationStats:
    """An answer to its end."""
    answering = engine.generate(request)
    for _ in answering:
        pass
    return answering.stats


def report(engine: Engine, pairs: Sequence[Pair], *, greedy: bool) -> dict[str, Any]:
    """The report per task and overall; `differences` lists greedy answers that were not token-identical."""
    by_task: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_task[pair.prompt.task].append(pair)
    differences = [
        {"id": pair.prompt.id, "task": pair.prompt.task, "position": pair.first_difference}
        for pair in pairs
        if greedy and pair.first_difference is not None
    ]
    model = engine.model
    return {
        "model": model.path.name,
        "draft": engine.draft.path.name if engine.draft else None,
        "threads": list(model.threads),
        "tasks": {task: _summary(rows) for task, rows in by_task.items()},
        "overall": _summary(pairs),
        "prompts": len(pairs),
        "differences": differences,
        "bookkeeping_share": round(median(pair.speculative.bookkeeping_share for pair in pairs), 5),
        "memory": _memory(engine),
        "governor": _governed(pairs),
        "energy": {
            "plain": _energy([p.plain for p in pairs]),
            "speculative": _energy([p.speculative for p in pairs]),
        },
    }


def _governed(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every mode that answers were generated in with its reason, and the last sensor reading."""
    modes = {
        mode: reason for pair in pairs for one in (pair.plain, pair.speculative) for mode, reason in one.modes
    }
    return {"modes": modes, "reading": reported_fields(pairs[-1].speculative.reading)}


def _energy(results: Sequence[GenerationStats]) -> dict[str, float]:
    """Medians per token after the first step: CPU time, and joules if all answers were metered."""
    joules = [one.joules_per_token for one in results]
    metered = [one for one in joules if one is not None]
    figures = {"cpu_seconds_per_token": round(median(one.cpu_seconds_per_token for one in results), 5)}
    if len(metered) == len(results):
        figures["joules_per_token"] = round(median(metered), 4)
    return figures


def _summary(pairs: Sequence[Pair]) -> dict[str, float]:
    drafted = sum(pair.speculative.drafted for pair in pairs)
    rounds = sum(pair.speculative.rounds for pair in pairs)
    return {
        "ratio": round(median(pair.ratio for pair in pairs), 3),
        "least": round(min(pair.ratio for pair in pairs), 3),
        "plain": round(median(pair.plain.tokens_per_second for pair in pairs), 2),
        "speculative": round(median(pair.speculative.tokens_per_second for pair in pairs), 2),
        "acceptance": round(sum(pair.speculative.accepted for pair in pairs) / drafted, 3)
        if drafted
        else 0.0,
        "tokens_per_round": round(sum(pair.speculative.written for pair in pairs) / max(rounds, 1), 3),
        "seconds_to_first_token": round(median(pair.speculative.seconds_to_first_token for pair in pairs), 3),
        "seconds_to_first_token_plain": round(median(pair.plain.seconds_to_first_token for pair in pairs), 3),
    }


def _memory(engine: Engine) -> dict[str, int | None]:
    """Bytes: peak of the process, weights and KV caches, and the rest."""
    models = [engine.model, *([engine.draft] if engine.draft else [])]
    needed = sum(model.summary.tensor_bytes + model.cache_bytes for model in models)
    peak = peak_memory()
    return {"peak": peak, "weights_and_cache": needed, "rest": None if peak is None else peak - needed}


def table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    titles = (
        "task", "ratio", "least", "plain tok/s", "spec. tok/s", "accepted", "tokens/round", "first token s",
    )  # fmt: skip
    rows = [
        (
            task,
            f"{line['ratio']:.2f}",
            f"{line['least']:.2f}",
            f"{line['plain']:.1f}",
            f"{line['speculative']:.1f}",
            f"{line['acceptance']:.0%}",
            f"{line['tokens_per_round']:.2f}",
            f"{line['seconds_to_first_token']:.2f}",
        )
        for task, line in [*report["tasks"].items(), ("all", report["overall"])]
    ]
    memory = report["memory"]
    lines = [
        console.table(titles, rows, right=range(1, len(titles))),
        f"{report['model']}, draft {report['draft'] or 'none'}, threads {report['threads']}, "
        f"{report['prompts']} prompts; bookkeeping {report['bookkeeping_share']:.2%} of the time",
    ]
    if memory["peak"] is not None:
        lines.append(
            f"peak memory {memory['peak'] / 1e6:.0f} MB: weights and KV cache "
            f"{memory['weights_and_cache'] / 1e6:.0f} MB, the rest {memory['rest'] / 1e6:.0f} MB"
        )
    if report["differences"]:
        where = ", ".join(f"{one['id']} at token {one['position']}" for one in report["differences"])
        lines.append(f"not token-identical (near-ties): {where}")
    return "\n".join(lines)
