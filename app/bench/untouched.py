"""A fresh installation against one that `edgespec tune` has set up, on the same prompts in turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from edgespec.app.bench.measure import Prompt, answer
from edgespec.app.engine import loading
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.models.gguf.native import LlamaOptions
from edgespec.quant import tune
from edgespec.sampling import Sampling

_NAMED = ("engine", "threads", "threads_batch", "flash_attention", "repack")


def measure_untouched(
    path: Path,
    draft: Path | None,
    context: int,
    prompts: Sequence[Prompt],
    max_tokens: int,
    repetitions: int,
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Choose settings as a first use does and as `tune` does, and answer every prompt with both, in turns.

    The settings are not kept. Raises EdgespecError if a model cannot be loaded.
    """
    show = progress or (lambda _: None)
    show("comparing runtimes as a first use does")
    untouched = tune.compare_engines(path, lambda *_: True).best.options
    tuned = tune.tune(path, draft, progress=lambda what, share: not show(f"tuning: {what} {share:.0%}"))
    form = tuned.draft.path if tuned.draft is not None else draft
    ratios: dict[str, list[float]] = defaultdict(list)
    settings = (draft and loading.form_of(draft, ""), untouched), (form, tuned.best.options)
    for turn in range(2 * repetitions):
        # Of two equal engines the one loaded last was up to 9% faster: each is last in half of the turns.
        with ExitStack() as stack:
            loaded = {
                i: stack.enter_context(_engine(path, *settings[i], context)) for i in (turn % 2, 1 - turn % 2)
            }
            first, second = loaded[0], loaded[1]
            for i, prompt in enumerate(prompts):
                show(f"{i + 1} of {len(prompts)}: {prompt.task}")
                order = (first, second) if (i + turn) % 2 == 0 else (second, first)
                speeds = {
                    id(engine): answer(
                        engine, prompt, max_tokens, Sampling(), speculate=True
                    ).tokens_per_second
                    for engine in order
                }
                ratios[prompt.task].append(speeds[id(first)] / max(speeds[id(second)], 1e-9))
    return {
        "model": path.name,
        "untouched": _named(untouched),
        "tuned": _named(tuned.best.options) | {"draft": form.name if form else None},
        "tasks": {task: round(median(values), 3) for task, values in ratios.items()},
        "overall": round(geometric_mean(median(values) for values in ratios.values()), 3),
        "least": round(min(min(values) for values in ratios.values()), 3),
    }


def untouched_table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    lines = [f"{name}: {report[name]}" for name in ("untouched", "tuned")]
    lines += [f"{task:<14} {ratio:.2f}" for task, ratio in report["tasks"].items()]
    return "\n".join(
        [*lines, f"{'all':<14} {report['overall']:.2f} of the tuned speed, least {report['least']:.2f}"]
    )


def _engine(path: Path, draft: Path | None, options: LlamaOptions, context: int) -> Engine:
    return open_engine(path, draft, mode="performance", options=replace(options, context=context))


def _named(options: LlamaOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name in _NAMED}
