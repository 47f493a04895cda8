"""Figures of a comparison of systems: ratios within a turn, their medians and spreads, and the table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgespec.app.bench.measure import Prompt, first_difference
from edgespec.app.bench.systems import BenchSystem, SystemAnswer

Oracle = Callable[[str, SystemAnswer], "float | None"]
"""oracle(name of a plain system, its answer) -> how many times faster than plain the same engine could have
generated that answer with perfect drafts; None if unknown."""

Turn = Mapping[str, SystemAnswer]
"""The answers to one prompt in one pass, by the name of the system."""

ALL = "all"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a run. `index` is the position of the prompt in the suite."""

    repetition: int
    index: int
    prompt: Prompt
    system: str
    answer: SystemAnswer

    def as_json(self) -> dict[str, Any]:
        answer = self.answer
        return {
            "repetition": self.repetition,
            "prompt": self.index,
            "system": self.system,
            "tokens": list(answer.tokens),
            "written": answer.written,
            "seconds_to_first_token": round(answer.seconds_to_first_token, 5),
            "seconds": round(answer.seconds, 5),
            "drafted": answer.drafted,
            "accepted": answer.accepted,
            "rounds": answer.rounds,
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the quartiles of some ratios."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None if there are no values."""
        low, median, high = np.percentile(kept, [25, 50, 75]) if (kept := list(values)) else (0, 0, 0)
        return cls(float(median), float(low), float(high)) if kept else None

    def as_json(self) -> dict[str, float]:
        return {"median": round(self.median, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def speed(answer: SystemAnswer) -> float:
    """Tokens per second after the first token."""
    return answer.tokens_per_second


def first_token(answer: SystemAnswer) -> float:
    """Seconds to the first token."""
    return answer.seconds_to_first_token


def ratios(
    turns: Iterable[Turn], over: str, under: str, measure: Callable[[SystemAnswer], float]
) -> list[float]:
    """`measure` of one system over that of another, for each turn in which both are positive."""
    pairs = ((measure(turn[over]), measure(turn[under])) for turn in turns if over in turn and under in turn)
    return [a / b for a, b in pairs if a > 0 and b > 0]


def geometric_mean(values: Iterable[float]) -> float | None:
    """None if there are no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def figures(
    systems: Sequence[BenchSystem], samples: Sequence[Sample], reference: str, oracle: Oracle | None = None
) -> dict[str, Any]:
    """All figures per task and overall, by system.

    `reference` is the plain system that all are compared with. Per task, figures are medians over its turns;
    overall, geometric means of those over tasks, with the quartiles of all turns.
    """
    tasks: dict[str, dict[tuple[int, int], dict[str, SystemAnswer]]] = defaultdict(lambda: defaultdict(dict))
    for one in samples:
        tasks[one.prompt.task][one.repetition, one.index][one.system] = one.answer
    label = reference.rpartition(" ")[0]
    rivals = [system.name for system in systems if system.name.startswith(f"{label} ")]
    rows: dict[str, dict[str, _Row]] = {}
    best: dict[str, str] = {}
    for task, by_key in tasks.items():
        turns = list(by_key.values())
        best[task] = max(rivals, key=lambda name: _median(ratios(turns, name, reference, speed)) or 0.0)
        rows[task] = {
            system.name: _Row.of(turns, system, reference, best[task], oracle) for system in systems
        }
    return {
        "reference": reference,
        "best_mode": best,
        "tasks": {
            task: {name: row.as_json() for name, row in by_name.items()} for task, by_name in rows.items()
        },
        "overall": {
            system.name: _Row.overall([by_name[system.name] for by_name in rows.values()]).as_json()
            for system in systems
        },
        "differences": _differences(systems, samples),
    }


@dataclass(frozen=True, slots=True)
class _Row:
    """One system on one task. `ratios` have one value per turn; `scalars` are medians, or None."""

    scalars: Mapping[str, float | None]
    ratios: Mapping[str, list[float]]
    medians: Mapping[str, float | None]
    counts: tuple[int, int, int, int]  # drafted, accepted, written, rounds

    @classmethod
    def of(
        cls, turns: Sequence[Turn], system: BenchSystem, reference: str, best: str, oracle: Oracle | None
    ) -> _Row:
        name = system.name
        answers = [turn[name] for turn in turns if name in turn]
        lists = {
            "to_reference": ratios(turns, name, reference, speed),
            "to_best_mode": ratios(turns, name, best, speed),
            "to_plain": ratios(turns, name, system.plain, speed),
            "first_token_to_plain": ratios(turns, name, system.plain, first_token),
            "first_token_to_reference": ratios(turns, name, reference, first_token),
        }
        if oracle is not None and name != system.plain:
            possible = [
                (limit, turn)
                for turn in turns
                if system.plain in turn and (limit := oracle(system.plain, turn[system.plain]))
            ]
            lists["oracle"] = [limit for limit, _ in possible]
            lists["oracle_share"] = [
                ratio / limit
                for limit, turn in possible
                for ratio in ratios([turn], name, system.plain, speed)
            ]
        return cls(
            {
                "tokens_per_second": _median(s for s in map(speed, answers) if s > 0),
                "seconds_to_first_token": _median(map(first_token, answers)),
            },
            lists,
            {key: _median(values) for key, values in lists.items()},
            _total((one.drafted, one.accepted, one.written, one.rounds) for one in answers),
        )

    @classmethod
    def overall(cls, rows: Sequence[_Row]) -> _Row:
        """Tasks have equal weight, however many prompts they have; quartiles are those of all turns."""

        def mean(pick: Callable[[_Row], float | None]) -> float | None:
            return geometric_mean(value for row in rows if (value := pick(row)))

        return cls(
            {key: mean(lambda row, key=key: row.scalars[key]) for key in rows[0].scalars},  # type: ignore[misc]
            {key: [value for row in rows for value in row.ratios[key]] for key in rows[0].ratios},
            {key: mean(lambda row, key=key: row.medians[key]) for key in rows[0].ratios},  # type: ignore[misc]
            _total(row.counts for row in rows),
        )

    def as_json(self) -> dict[str, Any]:
        drafted, accepted, written, rounds = self.counts
        report: dict[str, Any] = {
            key: None if value is None else round(value, 4) for key, value in self.scalars.items()
        }
        for key, values in self.ratios.items():
            spread, median = Spread.of(values), self.medians[key]
            report[key] = (
                None
                if spread is None or median is None
                else Spread(median, spread.low, spread.high).as_json()
            )
        report["acceptance"] = round(accepted / drafted, 4) if drafted else None
        report["tokens_per_round"] = round(written / rounds, 4) if rounds else None
        return report


def _median(values: Iterable[float]) -> float | None:
    spread = Spread.of(values)
    return None if spread is None else spread.median


def _total(counts: Iterable[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    sums = np.sum([(0, 0, 0, 0), *counts], axis=0)
    return int(sums[0]), int(sums[1]), int(sums[2]), int(sums[3])


def _differences(systems: Sequence[BenchSystem], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Answers that differ from those of the same system without speculation, each prompt once."""
    plain = {system.name: system.plain for system in systems}
    answers = {(one.repetition, one.index, one.system): one.answer for one in samples}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for one in samples:
        other = answers.get((one.repetition, one.index, plain[one.system]))
        position = None if other is None else first_difference(other.tokens, one.answer.tokens)
        if position is not None:
            row = {"system": one.system, "task": one.prompt.task, "id": one.prompt.id, "position": position}
            found.setdefault((one.index, one.system), row)
    return list(found.values())


def table(report: Mapping[str, Any]) -> str:
    """Format the report for people."""
    systems = list(report["overall"])
    has_oracle = any("oracle" in row for row in report["overall"].values())
    rows = Table(box=None, pad_edge=False)
    rows.add_column("task", no_wrap=True)
    rows.add_column("system", no_wrap=True)
    titles = [
        "tok/s",
        "of reference",
        "(quartiles)",
        "of best",
        "of plain",
        "first token s",
        "of plain",
        "accepted",
    ]
    titles += ["tok/round", *(["oracle", "share"] if has_oracle else [])]
    for title in titles:
        rows.add_column(title, justify="right", no_wrap=True)
    for task, by_system in [*report["tasks"].items(), (ALL, report["overall"])]:
        for i, name in enumerate(systems):
            rows.add_row(task if i == 0 else "", name, *_cells(by_system[name], has_oracle))
        rows.add_section()
    console = Console(width=160, markup=False, highlight=False)
    with console.capture() as out:
        console.print(rows)
    lines = [line.rstrip() for line in out.get().splitlines()]
    lines += [
        "",
        f"{report['model']}, draft {report['draft'] or 'none'}, threads {report['threads']}, "
        f"{len(report['prompts'])} prompts, passes: {report['repetitions']}, tokens: {report['max_tokens']}.",
        f"Reference: {report['reference']}. Best: the peer's fastest mode for the task. Plain: the same "
        "system without speculation.",
        "Ratios are medians within a turn; overall, geometric means over tasks. Above 1 is faster, for the "
        "first token below 1.",
        *report["notes"],
    ]
    for name in systems:
        where = [
            f"{one['id']} at {one['position']}" for one in report["differences"] if one["system"] == name
        ]
        if where:
            lines.append(f"{name} is not token-identical to plain (near-ties): {', '.join(where)}.")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], has_oracle: bool) -> list[str]:
    reference = row["to_reference"]
    cells = [
        _number(row["tokens_per_second"], ".1f"),
        _ratio(reference),
        f"{reference['low']:.2f}-{reference['high']:.2f}" if reference else "",
        _ratio(row["to_best_mode"]),
        _ratio(row["to_plain"]),
        _number(row["seconds_to_first_token"], ".2f"),
        _ratio(row["first_token_to_plain"]),
        _number(row["acceptance"], ".0%"),
        _number(row["tokens_per_round"], ".2f"),
    ]
    return cells + [_ratio(row.get("oracle")), _ratio(row.get("oracle_share"), ".0%")] * has_oracle


def _ratio(spread: Mapping[str, float] | None, form: str = ".2f") -> str:
    return _number(spread["median"] if spread else None, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
